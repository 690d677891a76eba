"""All on the device, against all but the network on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_cache import Augmentations, BackboneError, Draw, FeatureCache, FrameError
from feature_cache.augment import Affine, Noise, Scale, hflip
from feature_cache.engine import Frame, compute_records, device
from feature_cache.normalize import ConstantFrameWarning
from feature_cache.pooling import POOLINGS
from feature_cache.rounding import records_agree
from feature_cache.spec import SpaceSpec
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

DRAWS = (
    Draw(),
    Draw.of(hflip(), Noise(0.02, 3)),
    Draw.of(Affine(degrees=20, scale=0.1)),  # regions vanish
    Draw.of(Scale(0.5)),
    Augmentations(copies=1).draw(1),
)


def movie_of(kind):
    images, masks, _ = make_movie(3)
    if kind == "stacks":
        return images.reshape(1, 3, *images.shape[1:]), masks.reshape(1, 3, *masks.shape[1:])
    return (images.astype(np.float32) + 0.25 if "real" in kind else images), masks


@pytest.fixture
def on_device(monkeypatch):
    """Take the way of a device on whatever there is."""
    monkeypatch.setenv(device.PLAIN, "0")


@pytest.mark.parametrize(
    ("kind", "draw"),
    [
        pytest.param(
            kind, draw, id=f"{kind}-{str(draw.to_json())[:40]}",
            marks=[] if kind == "frames" or draw in DRAWS[:3:2] else pytest.mark.slow,
        )
        for kind in ("frames", "stacks", "frames of real numbers")
        for draw in DRAWS
    ],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [pytest.param("float16", marks=pytest.mark.slow), "float32"])
def test_records_agree_within_rounding(tmp_path, monkeypatch, kind, draw, dtype):
    movie, backbone, found = movie_of(kind), FakeBackbone(dim=8, stride=8), []
    for plain in "01":
        monkeypatch.setenv(device.PLAIN, plain)
        cache = FeatureCache(tmp_path / plain)
        options = {"draw": draw, "dtype": dtype}
        found.append(
            [
                (SpaceSpec(backbone.spec, pooling, dtype), record)
                for pooling in (*POOLINGS, None)
                for record in cache.get_or_compute(*movie, backbone, pooling=pooling, **options)
            ]
        )
    assert len(found[0]) == len(movie[0]) * (len(POOLINGS) + 1)
    for (spec, one), (_, other) in zip(*found, strict=True):
        assert records_agree(one, other, spec), spec.pooling


def test_memory_may_lie_in_any_way(tmp_path, on_device):
    class ChannelsFirst(FakeBackbone):
        def embed(self, frames):
            return super().embed(frames).permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)

    images, masks, _ = make_movie(3)
    strange = np.asfortranarray(images[::-1].astype(">u2"))[::-1]
    strange.flags.writeable = False
    found = []
    torch.set_warn_always(True)  # not only for the first array that can't be written
    try:
        for n, frames in enumerate((images.astype(np.uint16), strange)):
            backbone, cache = ChannelsFirst(dim=4), FeatureCache(tmp_path / str(n))
            found.append(
                [
                    record
                    for pooling in (None, "mean_patches_exact")
                    for record in cache.get_or_compute(frames, masks, backbone, pooling=pooling)
                ]
            )
    finally:
        torch.set_warn_always(False)
    for one, other in zip(*found, strict=True):
        assert np.array_equal(one.features, other.features)


def test_a_record_holds_on_to_no_more_than_itself(on_device):
    images, masks, _ = make_movie(3)
    backbone = FakeBackbone(dim=4)
    frames = [Frame(image, mask, b"", "a frame") for image, mask in zip(images, masks, strict=True)]
    spec = SpaceSpec(backbone.spec, None, "float32")
    for record in compute_records(frames, spec, backbone, Draw(), batch_size=3):
        assert record.features.flags.owndata


def test_numbers_that_differ_are_an_error_and_never_stored(tmp_path, monkeypatch, on_device):
    real = device.pool_on
    monkeypatch.setattr(device, "pool_on", lambda *a: [p * 1.01 for p in real(*a)])
    images, masks, _ = make_movie(3)
    cache = FeatureCache(tmp_path / "cache")
    with pytest.raises(BackboneError, match=r"gives other numbers.*set FEATURE_CACHE_PLAIN=1"):
        cache.get_or_compute(images, masks, FakeBackbone(dim=4))
    assert cache.stats()["records"] == 0
    monkeypatch.setenv(device.PLAIN, "1")
    assert len(cache.get_or_compute(images, masks, FakeBackbone(dim=4))) == 3


def test_what_fails_is_said_as_on_the_cpu(tmp_path, on_device):
    images, masks, _ = make_movie(3)
    cache = FeatureCache(tmp_path / "cache")

    class Wrong(FakeBackbone):
        value = float("nan")

        def embed(self, frames):
            grids = super().embed(frames)
            grids[:, 0, 0, 0] = self.value
            return grids

    with pytest.raises(
        BackboneError, match=r"gave NaN or infinity for frame 0.*; and 2 other frames"
    ):
        cache.get_or_compute(images, masks, Wrong(dim=4))
    Wrong.value = 1e6
    with pytest.raises(BackboneError, match=r"reaches 1e\+06, too large for storage dtype float16"):
        cache.get_or_compute(images, None, Wrong(dim=4), pooling=None)
    with pytest.warns(ConstantFrameWarning, match="frame 0 is constant"):
        [record] = cache.get_or_compute(np.ones((1, 48, 64)), masks[:1], FakeBackbone(dim=4))
    assert np.isfinite(record.features).all()
    far = np.full((1, 48, 64), 3e38, np.float32)
    far[0, :, ::2] = -3e38
    with pytest.raises(FrameError, match="too far for float32"):
        cache.get_or_compute(far, masks[:1], FakeBackbone(dim=4))


def test_a_frame_for_which_there_is_no_memory_costs_itself(tmp_path, monkeypatch, on_device):
    real, calls = device.normalize_on, iter(range(9))

    def allocate(*args):
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    monkeypatch.setattr(device, "normalize_on", allocate)
    images, masks, _ = make_movie(3)
    with pytest.raises(BackboneError, match=r"for frame .*out of memory.*the other 2 are kept"):
        FeatureCache(tmp_path / "cache").get_or_compute(images, masks, FakeBackbone(dim=4))


def test_what_the_device_has_no_memory_to_pool_is_pooled_on_the_cpu(
    tmp_path, monkeypatch, on_device
):
    images, masks, _ = make_movie(3)
    backbone = FakeBackbone(dim=8)
    expected = FeatureCache(tmp_path / "right").get_or_compute(images, masks, backbone)

    def pool_none(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "pool_on", pool_none)
    found = FeatureCache(tmp_path / "cache").get_or_compute(images, masks, backbone)
    spec = SpaceSpec(backbone.spec)
    assert all(records_agree(*both, spec) for both in zip(expected, found, strict=True))


def test_a_grid_that_is_pooled_on_the_cpu_is_checked_too(tmp_path, monkeypatch, on_device):
    class Bad(FakeBackbone):
        def embed(self, frames):
            return super().embed(frames) * float("nan")

    def pool_none(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device, "pool_on", pool_none)
    with pytest.raises(BackboneError, match="NaN"):
        FeatureCache(tmp_path).get_or_compute(*make_movie(3)[:2], Bad(dim=8))


def test_more_pixels_than_the_backbone_may_see_are_an_error(tmp_path, monkeypatch, on_device):
    real = device.normalize_on

    def too_bright(*args):
        normalized = real(*args)
        normalized.pixels.add_(torch.tensor(0.5))
        return normalized

    monkeypatch.setattr(device, "normalize_on", too_bright)
    images, masks, _ = make_movie(2)
    with pytest.raises(BackboneError, match=r"to 1.5 for fake: its normalisation promises 0 to 1"):
        FeatureCache(tmp_path / "cache").get_or_compute(images, masks, FakeBackbone(dim=4))


def test_memory_that_is_short_for_a_comparison_fails_no_frame(tmp_path, small, on_device):
    class Short(FakeBackbone):
        failed = False

        def embed(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) == 1 and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().embed(images)

    backbone = Short()
    assert len(FeatureCache(tmp_path).get_or_compute(*small, backbone, batch_size=6)) == 6
    assert backbone.failed
