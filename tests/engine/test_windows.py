"""A window in time: what a backbone sees around a frame is computed, keyed and kept with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from callers import CALLERS, COMPUTE, run
from feature_cache import Augmentations, CachedFeatureDataset, FeatureCache, FrameError
from feature_cache.engine import Frame
from feature_cache.hashing import frame_digest
from feature_cache.movies import write_movie
from feature_cache.normalize import normalize
from feature_cache.recompute import choose_records, recompute
from feature_cache.service import close_all
from feature_cache.testing import FakeBackbone, check_backbone
from shared_folder import contents
from synthetic import make_movie

BACKBONE = FakeBackbone(dim=6, context=(2, 1))
COPIES = Augmentations("default", copies=3, seed=3)


def grids_by_hand(frames, draw):
    """Draw each frame alone, join windows, and embed these."""
    rule, drawn, grids = BACKBONE.spec.normalization, [], []
    for frame in frames:
        image = torch.from_numpy(normalize(frame, rule, "a frame"))
        digests = Frame(frame, None, frame_digest(frame), "").slice_digests()
        slices = image.reshape(-1, *image.shape[-2:])
        drawn.append(draw.apply(slices, digests=digests, bounds=rule.range))
    for t in range(len(frames)):
        seen = [min(max(s, 0), len(frames) - 1) for s in (t - 2, t - 1, t, t + 1)]
        grid = BACKBONE.embed(torch.stack([drawn[s] for s in seen], dim=1)).numpy()
        grids.append(grid if frames.ndim == 4 else grid[0])
    return np.stack(grids)


@pytest.mark.parametrize("way", ["plain", "device"])
@pytest.mark.parametrize("shape", [(6,), (2,), (3, 4)], ids=["movie", "two frames", "stack"])
def test_each_frame_is_seen_with_those_around_it(tmp_path, monkeypatch, way, shape):
    monkeypatch.setenv("FEATURE_CACHE_PLAIN", "1" if way == "plain" else "0")
    flat, *_ = make_movie(int(np.prod(shape)))
    frames = flat.reshape(*shape, *flat.shape[1:])
    movie = FeatureCache(tmp_path).movie(frames, None, BACKBONE, pooling=None, dtype="float32")
    for draw in COPIES.draws():
        records = movie.with_draw(draw).get_or_compute(batch_size=4)
        expected = grids_by_hand(frames, draw)
        np.testing.assert_allclose([r.features for r in records], expected, atol=1e-6)


def test_a_frame_that_changes_is_a_miss_of_all_that_see_it(cache, small):
    frames, masks = small
    cache.movie(frames, masks, BACKBONE, name="movie").warm()
    other = frames.copy()
    other[3, 0, 0] += 1
    movie = cache.movie(other, masks, BACKBONE, name="movie")
    assert movie.contains().tolist() == [True, True, False, False, False, False]
    assert "frames around it" in movie.explain()[2].reason
    assert "pixels differ" in movie.explain()[3].reason
    assert movie.warm() == 4
    assert not FeatureCache(cache.store.root, "r").get(frames[1:], masks[1:], BACKBONE)[0]


def test_order_and_length_of_the_window_are_in_the_key():
    kinds = [(0, 0), (1, 0), (0, 1), (2, 1), (1, 2)]
    specs = [FakeBackbone(context=kind).spec for kind in kinds]
    assert len({spec.digest for spec in specs}) == len(kinds)
    assert "context" not in specs[0].to_json()
    with pytest.raises(ValueError, match="expected frames before and after"):
        replace(specs[0], context=(1, -1))


def test_each_frame_is_read_once_to_be_hashed_and_once_to_be_computed(cache):
    class Source:
        """What is indexed like a list."""

        def __init__(self, frames):
            self.frames, self.reads = frames, Counter()

        def __len__(self):
            return len(self.frames)

        def __getitem__(self, t):
            self.reads[t] += 1
            return self.frames[t]

    source = Source(make_movie(24)[0])
    movie = cache.movie(source, None, BACKBONE, pooling=None)
    movie.keys()
    before = Counter(source.reads)
    movie.compute(range(24), batch_size=1)
    assert source.reads - before == dict.fromkeys(range(24), 1)


def test_memory_counts_every_frame_of_a_window_once(small):
    pixels, masks = small
    first, second, third = (Frame(pixels[t], None, frame_digest(pixels[t]), "") for t in range(3))
    seen = (first, first, second, third)
    frame = Frame(second.pixels, masks[1], second.digest, "", seen)
    assert frame.nbytes == 3 * pixels[0].nbytes + masks[1].nbytes


def test_frames_of_other_sizes_are_not_seen_together(cache):
    frames = [*make_movie(2)[0], make_movie(1, 40, 40)[0][0]]
    with pytest.raises(FrameError, match=r"shape \(48, 64\) and frame 2.*\(40, 40\)"):
        cache.get_or_compute(frames, None, BACKBONE, pooling=None)


def test_one_bad_frame_costs_those_that_see_it(cache, small):
    frames, masks = (list(part) for part in small)
    frames[5] = np.where(np.eye(48, 64) > 0, np.nan, frames[5])
    movie = cache.movie(frames, masks, BACKBONE, name="movie")
    with pytest.raises(FrameError, match="frame 5"):
        movie.warm()
    assert movie.contains(range(4)).all()


def test_records_are_computed_again_from_their_windows(tmp_path, cache):
    write_movie(tmp_path / "01", *make_movie())
    movie = cache.movie(tmp_path / "01", None, BACKBONE)
    movie.with_draw(COPIES.draw(1)).warm()
    [chosen] = choose_records(cache.store.spaces(), None)
    assert recompute([chosen], backbones=[BACKBONE]).agree == 6
    frames, *rest = make_movie()
    frames[2, 1, 1] += 1
    write_movie(tmp_path / "01", frames, *rest, overwrite=True)
    again = recompute([chosen], backbones=[BACKBONE])
    assert (again.agree, again.unknown.total()) == (2, 4)


class Tokens(torch.utils.data.Dataset):
    """A training's samples, one a frame."""

    def __init__(self, masks):
        self.masks = masks

    def __len__(self):
        return len(self.masks)

    def __getitem__(self, t):
        labels = torch.from_numpy(np.setdiff1d(self.masks[t], 0).astype(np.int64))
        return {"timepoints": torch.full_like(labels, t), "labels": labels}


def test_pixels_are_sent_with_those_around_them(tmp_path):
    """To the process that computes: it can't read arrays by a name."""
    frames, masks, _ = make_movie()
    right = FeatureCache(tmp_path / "right").get_or_compute(frames, masks, BACKBONE)
    movie = FeatureCache(tmp_path / "cache").movie(frames, masks, BACKBONE)
    data = CachedFeatureDataset(Tokens(masks), [movie], movie_of=lambda _: 0, batch_size=2)
    loader = DataLoader(data, batch_size=None, num_workers=1, multiprocessing_context="fork")
    for sample, record in zip(loader, right, strict=True):
        assert np.array_equal(sample["pretrained_feats"], record.features)
    del loader, data
    close_all()


@pytest.mark.slow
@pytest.mark.parametrize("caller", CALLERS, ids=str)
def test_whoever_asks_gets_the_same(make_work, dask, caller):
    work = make_work("one", "two", copies=1, context=(1, 1), scheduler=dask)
    right = replace(work, cache=work.cache.with_name("right"))
    for one, other in ((COMPUTE, right), (caller, work)):
        assert run(one, other)[0].errors == []
    assert contents(work.cache) == contents(right.cache)
    assert set(work.embedded().values()) == {1}


def test_a_backbone_of_windows_keeps_what_backbones_promise():
    check_backbone(BACKBONE)
