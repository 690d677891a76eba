from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from feature_cache import IDENTITY, BackboneError, Draw, DrawError, SpaceSpec
from feature_cache.augment import (
    Affine,
    Blur,
    Brightness,
    Contrast,
    Elastic,
    Noise,
    Scale,
    hflip,
)
from feature_cache.engine import Embedding, Frame, Model, compute_records
from feature_cache.hashing import frame_digest
from feature_cache.normalize import normalize
from feature_cache.pooling import pool
from feature_cache.spec import Normalization
from feature_cache.testing import FakeBackbone


def make_jobs(frames, masks):
    return [
        Frame(f.astype(np.float32), m.astype(np.int32), frame_digest(f), f"frame {t}")
        for t, (f, m) in enumerate(zip(frames, masks, strict=True))
    ]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_batches_give_the_same_records(small, batch_size):
    frames, masks = small
    backbone = FakeBackbone()
    spec = SpaceSpec(backbone.spec, dtype="float32")
    expected = compute_records(make_jobs(frames, masks), spec, backbone, IDENTITY, 3)
    found = compute_records(make_jobs(frames, masks), spec, backbone, IDENTITY, batch_size)
    for one, other in zip(expected, found, strict=True):
        assert np.array_equal(one.features, other.features)
        assert np.array_equal(one.labels, other.labels)


def test_frames_of_several_shapes(small):
    frames, masks = list(small[0]), list(small[1])
    frames[2], masks[2] = frames[2][:40, :40], masks[2][:40, :40]
    backbone = FakeBackbone()
    spec = SpaceSpec(backbone.spec, None)
    records = list(compute_records(make_jobs(frames, masks), spec, backbone, IDENTITY, 4))
    shapes = [record.features.shape[:2] for record in records]
    assert shapes == [(6, 8), (6, 8), (5, 5), (6, 8), (6, 8), (6, 8)]


def test_a_stack_is_embedded_slice_by_slice():
    rng = np.random.default_rng(0)
    stack, mask = rng.random((3, 16, 24)).astype(np.float32), np.zeros((3, 16, 24), int)
    mask[1:, 3:9, 5:20] = 4
    backbone = FakeBackbone(dim=4)
    spec = SpaceSpec(backbone.spec, dtype="float32")
    [record] = compute_records(make_jobs([stack], [mask]), spec, backbone, IDENTITY, 2)
    grids = backbone.embed(torch.from_numpy(normalize(stack, Normalization()))).numpy()
    expected = pool(grids, mask, "mean_patches_exact")
    np.testing.assert_array_equal(record.features, expected)


class Wrong(FakeBackbone):
    """A fake whose embedding is changed by a function."""

    def __init__(self, change):
        super().__init__(dim=4)
        self.change = change

    def embed(self, frames):
        return self.change(super().embed(frames))


def poison(value, frame):
    """Spoil the grid of one frame, whatever batch it comes in."""
    spoiled = []

    def change(grids):
        spoiled.extend([] if spoiled else [grids[frame].clone()])
        grids[(grids == spoiled[0]).flatten(1).all(1), 0, 0, 0] = value
        return grids

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (poison(float("nan"), 2), "NaN or infinity for frame 2"),
        (poison(float("inf"), 0), "NaN or infinity for frame 0"),
        (lambda grids: grids[:-1], "gave shape"),
        (lambda grids: grids[..., :2], "gave shape"),
        (lambda grids: grids.flatten(1, 2), "gave shape"),
    ],
)
def test_a_wrong_embedding_is_an_error(small, change, message):
    backbone = Wrong(change)
    jobs = make_jobs(*small)
    with pytest.raises(BackboneError, match=message):
        list(compute_records(jobs, SpaceSpec(backbone.spec), backbone, IDENTITY, 6))


def test_what_float16_cannot_hold_is_an_error(small):
    backbone = Wrong(lambda grids: grids * 1e6)
    jobs = make_jobs(*small)
    with pytest.raises(BackboneError, match="use dtype float32"):
        list(compute_records(jobs, SpaceSpec(backbone.spec, None), backbone, IDENTITY, 6))
    whole = compute_records(jobs, SpaceSpec(backbone.spec, None, "float32"), backbone, IDENTITY, 6)
    assert len(list(whole)) == 6


class TestRange:
    """What a backbone sees is in the range that its normalisation promises."""

    RAW = Normalization("none")
    SEEN = (
        *(Scale(1.3), Scale(0.6), Affine(degrees=20), Affine(scale=1.1), Elastic(2.0, 40.0)),
        *(Blur(5, 1.2), hflip()),
    )
    UNIT_ALONE = (Brightness(1.1), Contrast(0.9), Noise(0.01))

    @pytest.mark.parametrize("operation", SEEN, ids=repr)
    def test_raw_intensities_stay_so_under_a_draw(self, cache, small, operation):
        """They were clamped to 0..1: all ones."""
        seen = []

        class Watching(FakeBackbone):
            def embed(self, frames):
                seen.append(frames.clone())
                return super().embed(frames)

        backbone = Watching(normalization=self.RAW)
        cache.get_or_compute(*small, backbone, draw=Draw.of(operation))
        pixels = torch.cat(seen)
        loaded = torch.from_numpy(small[0].astype(np.float32))
        assert pixels.max() > 0.5 * loaded.max()
        assert pixels.max() <= loaded.max() * (1 + 1e-6)
        scaled = Draw.of(operation).apply(loaded / 2**16) * 2**16
        torch.testing.assert_close(pixels, scaled, rtol=1e-4, atol=0.1)

    @pytest.mark.parametrize("operation", UNIT_ALONE, ids=repr)
    def test_what_needs_0_to_1_refuses_others_by_name(self, cache, small, operation):
        backbone = FakeBackbone(normalization=self.RAW)
        expected = (
            rf"the draw has {operation.name}, for pixels in 0..1, and those of fake "
            r"\(normalisation 'none'\) are as loaded: leave these operations out"
        )
        with pytest.raises(DrawError, match=expected):
            cache.movie(*small, backbone, draw=Draw.of(hflip(), operation))
        with pytest.raises(DrawError, match="those of these frames are as loaded"):
            Draw.of(operation).apply(torch.ones(1, 4, 4), digests=[bytes(16)], bounds=None)
        cache.movie(*small, FakeBackbone(), draw=Draw.of(operation))

    def test_another_range_than_promised_is_an_error(self, small):
        backbone = FakeBackbone()
        frames = make_jobs(*small)
        for frame in frames:
            frame.image = np.full((1, 48, 64), 0.5, np.float32)
        frames[3].image[0, 7, 7] = 1.5
        model = Model(backbone, (backbone.spec,))
        wanted = [Embedding(f, IDENTITY, (SpaceSpec(backbone.spec),)) for f in frames]
        outcomes = list(model.embed(wanted))
        assert [isinstance(one, Exception) for one in outcomes] == [t == 3 for t in range(6)]
        with pytest.raises(BackboneError, match=r"pixels from 0.5 to 1.5 for fake: its norm"):
            raise outcomes[3]


@given(st.integers(1, 40), st.integers(1, 40))
def test_fake_grids_cover_the_frame(height, width):
    grid = FakeBackbone(dim=2, stride=8).embed(torch.zeros(1, height, width))
    assert grid.shape == (1, -(-height // 8), -(-width // 8), 2)
