from __future__ import annotations

import gc
import io
import logging
import multiprocessing
import os
import pickle
import threading
import weakref
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_cache import (
    Augmentations,
    BackboneError,
    DrawError,
    FeatureCache,
    FrameError,
    MissingRecordError,
    MovieError,
    Normalization,
    UnknownNameError,
)
from feature_cache.pooling import POOLINGS, pool
from feature_cache.testing import FakeBackbone
from forked_processes import apart, content


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "embedded.log"


def computed(log: Path) -> int:
    return len(log.read_text().splitlines()) if log.exists() else 0


def equal(records, others) -> bool:
    return all(
        np.array_equal(a.features, b.features) and np.array_equal(a.labels, b.labels)
        for a, b in zip(records, others, strict=True)
    )


def compute_all(root, small):
    FeatureCache(root).get_or_compute(*small, FakeBackbone())


class TestHitsAndMisses:
    def test_a_miss_computes_and_a_hit_does_not(self, cache, small, log):
        backbone = FakeBackbone(log=log)
        first = cache.get_or_compute(*small, backbone)
        again = cache.get_or_compute(*small, backbone)
        assert computed(log) == 6
        assert equal(first, again)
        usage = {name: cache.stats()[name] for name in ("hits", "misses", "computed", "records")}
        assert usage == {"hits": 6, "misses": 6, "computed": 6, "records": 6}

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    @pytest.mark.parametrize("codec", ["raw", "zstd", "blosc"])
    def test_numbers_are_those_of_the_pooling(self, tmp_path, small, dtype, codec):
        import torch

        from feature_cache.normalize import normalize

        cache = FeatureCache(tmp_path / "cache", codec=codec)
        backbone = FakeBackbone()
        for _ in ("miss", "hit"):
            records = cache.get_or_compute(*small, backbone, dtype=dtype)
            for frame, mask, record in zip(*small, records, strict=True):
                pixels = normalize(frame.astype(np.float32), Normalization())
                grid = backbone.embed(torch.from_numpy(pixels)[None])[0].numpy()
                expected = pool(grid, mask, "mean_patches_exact").astype(dtype)
                assert np.array_equal(record.features, expected)
                assert record.features.dtype == dtype
                assert record.labels.tolist() == [1, 2, 3, 4, 5]
                assert record.labels.dtype == np.int32

    def test_grids_without_masks(self, cache, small):
        records = cache.get_or_compute(small[0], None, FakeBackbone(dim=3), pooling=None)
        assert [record.features.shape for record in records] == [(6, 8, 3)] * 6
        assert records[0].labels is None
        assert cache.contains(small[0], small[1], FakeBackbone(dim=3), pooling=None) == [True] * 6

    def test_only_what_is_missing_is_computed(self, cache, small, log):
        frames, masks = small
        backbone = FakeBackbone(log=log)
        cache.get_or_compute(frames[2:4], masks[2:4], backbone)
        assert cache.contains(frames, masks, backbone) == [False, False, True, True, False, False]
        cache.get_or_compute(frames, masks, backbone)
        assert computed(log) == 6

    def test_get_computes_nothing(self, cache, small, log):
        backbone = FakeBackbone(log=log)
        assert cache.get(*small, backbone) == [None] * 6
        cache.get_or_compute(small[0][:1], small[1][:1], backbone)
        records = cache.get(*small, backbone)
        assert [record is None for record in records] == [False] + [True] * 5
        assert computed(log) == 1

    @pytest.mark.parametrize("pooling", ["mean_patches_exact", None])
    @pytest.mark.parametrize("context", [(0, 0), (2, 1)])
    def test_frames_may_be_asked_for_in_any_form_and_order(self, cache, small, pooling, context):
        movie = cache.movie(*small, FakeBackbone(context=context), pooling=pooling)
        every = movie.get_or_compute()
        for again in range(2):  # read, then looked at where they lie
            for wanted in ([1, 2, 3], [3, 1, 1], np.array([2, 3]), torch.tensor([0, 1]), (-1, 0)):
                right = [every[int(t)] for t in wanted]
                assert equal(movie.get(wanted), right), (again, wanted)
            assert equal(movie.get(t for t in (4, 5)), every[4:])
            assert movie.get([]) == []
            assert equal(movie.get_or_compute([5, -1]), [every[5], every[5]])
            assert movie.key(-1) == movie.key(5)
            for beyond in (6, -7):
                for ask in (movie.get, movie.get_or_compute, movie.compute, movie.explain):
                    with pytest.raises(IndexError, match=f"frame {beyond} of .* has 6 frames"):
                        ask(indices=[beyond])

    def test_equal_frames_are_computed_once(self, cache, small, log):
        frames, masks = (np.stack([a[0], a[1], a[0]]) for a in small)
        records = cache.get_or_compute(frames, masks, FakeBackbone(log=log))
        assert computed(log) == 2
        assert equal(records[:1], records[2:])

    def test_frames_without_regions(self, cache, small):
        records = cache.get_or_compute(small[0], np.zeros_like(small[1]), FakeBackbone(dim=3))
        assert [record.features.shape for record in records] == [(0, 3)] * 6
        assert cache.get(small[0], np.zeros_like(small[1]), FakeBackbone(dim=3))[0] is not None

    def test_records_cannot_be_written_to(self, cache, small):
        for _ in ("miss", "hit"):
            [record, *_] = cache.get_or_compute(*small, FakeBackbone())
            with pytest.raises(ValueError, match="read-only"):
                record.features[0] = 0
            with pytest.raises(ValueError, match="read-only"):
                record.labels[0] = 0

    def test_stats_of_all_processes(self, cache, small):
        for _ in range(2):
            apart(compute_all, cache.store.root, small)
        total = cache.stats(lifetime=True)
        assert {k: total[k] for k in ("hits", "misses", "computed")} == {
            "hits": 6,
            "misses": 6,
            "computed": 6,
        }
        assert cache.stats()["hits"] == 0


def change_pixel(request, place):
    request["frames"] = request["frames"].copy()
    request["frames"][place] += 1


def change_label(request, place):
    request["masks"] = request["masks"].copy()
    request["masks"][place] += 1


BASE = {"dim": 4, "stride": 8, "seed": 0}
CHANGES = {
    "one pixel": lambda r, place: change_pixel(r, place),
    "one label": lambda r, place: change_label(r, place),
    "weights": lambda r, _: r.update(backbone=FakeBackbone(**{**BASE, "seed": 1})),
    "width": lambda r, _: r.update(backbone=FakeBackbone(**{**BASE, "dim": 5})),
    "stride": lambda r, _: r.update(backbone=FakeBackbone(**{**BASE, "stride": 4})),
    "normalisation": lambda r, _: r.update(
        backbone=FakeBackbone(**BASE, normalization=Normalization(high=99.0))
    ),
    "pooling": lambda r, _: r.update(pooling="max_patches_exact"),
    "grid": lambda r, _: r.update(pooling=None),
    "dtype": lambda r, _: r.update(dtype="float32"),
    "other movie": lambda r, _: r.update(frames=r["frames"][..., ::-1]),
    "transposed": lambda r, _: r.update(
        frames=r["frames"].swapaxes(1, 2), masks=r["masks"].swapaxes(1, 2)
    ),
}
SAME = {
    "float32": lambda r: r.update(frames=r["frames"].astype(np.float32)),
    "float64 masks as int64": lambda r: r.update(masks=r["masks"].astype(np.int64)),
    "big-endian": lambda r: r.update(frames=r["frames"].astype(">u2")),
    "memory layout": lambda r: r.update(
        frames=np.asfortranarray(r["frames"]), masks=np.asfortranarray(r["masks"])
    ),
    "a list": lambda r: r.update(frames=list(r["frames"]), masks=list(r["masks"])),
    "batch size": lambda r: r.update(batch_size=1),
    "another object": lambda r: r.update(backbone=FakeBackbone(**BASE, seconds_per_frame=0.001)),
    "backwards": lambda r: r.update(frames=r["frames"][::-1], masks=r["masks"][::-1]),
    "one by one": lambda r: r.update(split=True),
}


def make_request(small, size=3):
    frames, masks = (array[:size] for array in small)
    return {"frames": frames, "masks": masks, "backbone": FakeBackbone(**BASE)}


def ask(cache, request):
    """Send a request; give the frames it had embedded."""
    request = dict(request)
    before = cache.stats()["computed"]
    if request.pop("split", False):
        for t in range(len(request["frames"])):
            one = {name: request[name][t : t + 1] for name in ("frames", "masks")}
            cache.get_or_compute(**{**request, **one})
    else:
        cache.get_or_compute(**request)
    return cache.stats()["computed"] - before


class TestNeverStale:
    @pytest.mark.parametrize("name", CHANGES)
    @settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_what_changes_the_numbers_is_a_miss(self, tmp_path_factory, small, name, data):
        cache = FeatureCache(tmp_path_factory.mktemp("cache"))
        ask(cache, make_request(small))
        changed = make_request(small)
        place = tuple(data.draw(st.integers(0, n - 1)) for n in changed["frames"].shape)
        CHANGES[name](changed, place)
        expected = 1 if name.startswith("one ") else 3
        assert ask(cache, changed) == expected
        fresh = FeatureCache(tmp_path_factory.mktemp("fresh"))
        again = cache.get_or_compute(**changed)
        assert equal(again, fresh.get_or_compute(**changed))

    @pytest.mark.parametrize("name", SAME)
    def test_what_does_not_matter_is_a_hit(self, cache, small, name):
        ask(cache, make_request(small))
        same = make_request(small)
        SAME[name](same)
        assert ask(cache, same) == 0

    def test_every_pooling_has_records_of_its_own(self, cache, small):
        request = make_request(small)
        assert [ask(cache, {**request, "pooling": name}) for name in POOLINGS] == [3] * 7
        assert [ask(cache, {**request, "pooling": name}) for name in POOLINGS] == [0] * 7

    def test_a_moved_cache_still_hits(self, cache, small, tmp_path):
        ask(cache, make_request(small))
        moved = cache.store.root.rename(tmp_path / "elsewhere")
        assert ask(FeatureCache(moved), make_request(small)) == 0

    def test_a_frame_that_changes_while_it_is_read_is_an_error(self, cache, small):
        class Changing(list):
            reads = 0

            def __getitem__(self, t):
                self.reads += 1
                return super().__getitem__(t) + (self.reads > 3)

        with pytest.raises(FrameError, match="frame 0 changed since it was hashed"):
            cache.get_or_compute(Changing(small[0][:3]), small[1][:3], FakeBackbone())
        assert cache.stats()["records"] == 0


class TestFailure:
    def test_what_was_computed_before_an_error_is_kept(self, cache, small, log):
        class Failing(FakeBackbone):
            def embed(self, frames):
                if computed(log) >= 4:
                    raise KeyboardInterrupt
                return super().embed(frames)

        with pytest.raises(KeyboardInterrupt):
            cache.get_or_compute(*small, Failing(log=log), batch_size=2)
        kept = computed(log)  # a batch that is not full goes ahead where reading is slow
        assert 4 <= kept < 6
        assert sum(cache.contains(*small, FakeBackbone())) == kept

    def test_a_damaged_record_is_computed_again(self, cache, small, log, caplog):
        backbone = FakeBackbone(log=log)
        good = cache.get_or_compute(*small, backbone)
        [chunk] = cache.store.root.glob("spaces/*/packs/*/features/c.0.0")
        damaged = bytearray(chunk.read_bytes())
        damaged[5] ^= 1
        values = [(r.features.copy(), r.labels.copy()) for r in good]
        chunk.write_bytes(damaged)
        again = FeatureCache(cache.store.root)
        with caplog.at_level(logging.WARNING):
            records = again.get_or_compute(*small, backbone)
        assert "fails its checksum" in caplog.text
        assert computed(log) > 6
        for record, (features, labels) in zip(records, values, strict=True):
            assert np.array_equal(record.features, features)
            assert np.array_equal(record.labels, labels)

    def test_read_only_never_computes(self, cache, small, log):
        backbone = FakeBackbone(log=log)
        cache.get_or_compute(small[0][:2], small[1][:2], backbone)
        reader = FeatureCache(cache.store.root, mode="r")
        assert len(reader.get_or_compute(small[0][:2], small[1][:2], backbone)) == 2
        with pytest.raises(MissingRecordError, match="4 records, first frame 2, are not in"):
            reader.get_or_compute(*small, backbone)
        assert computed(log) == 2

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"masks": None}, MovieError, "needs masks"),
            ({"masks": np.zeros((5, 48, 64), int)}, MovieError, "6 frames and 5 masks"),
            ({"masks": np.zeros((6, 48, 63), int)}, MovieError, r"shape \(48, 64\) and its mask"),
            ({"masks": np.zeros((6, 48, 64))}, TypeError, "mask 0 has dtype float64"),
            ({"pooling": "mean"}, UnknownNameError, "unknown pooling 'mean'"),
            ({"draw": "hflip"}, DrawError, "draw is a str: expected a Draw"),
            ({"frames": np.ma.masked_less(np.ones((6, 48, 64)), 2)}, FrameError, "masked pixels"),
            (
                {"masks": np.ma.masked_less(np.ones((6, 48, 64), int), 2)},
                FrameError,
                "mask.*masked",
            ),
            ({"dtype": "int8"}, UnknownNameError, "unknown storage dtype"),
            ({"batch_size": 0}, ValueError, "batch_size 0"),
        ],
    )
    def test_bad_requests_write_nothing(self, cache, small, options, error, message):
        request = {"frames": small[0], "masks": small[1], "backbone": FakeBackbone(), **options}
        with pytest.raises(error, match=message):
            cache.get_or_compute(**request)
        assert cache.stats()["records"] == 0
        assert not list(cache.store.root.glob("spaces/*"))

    def test_masks_that_change_while_they_are_computed_change_no_record(self, cache, small):
        frames, masks = small[0], small[1].astype(np.int32)
        right = masks.copy()

        class Disturbing(FakeBackbone):
            def embed(self, images):
                masks[masks > 0] = 1
                return super().embed(images)

        with suppress(FrameError):
            cache.get_or_compute(frames, masks, Disturbing(dim=4))
        there = [record for record in cache.get(frames, right, FakeBackbone(dim=4)) if record]
        assert there
        expected = FeatureCache(cache.store.root.parent / "other").get_or_compute(
            frames, right, FakeBackbone(dim=4)
        )
        assert {content(record) for record in there} <= {content(one) for one in expected}

    def test_an_error_that_is_kept_keeps_no_pixels(self, cache, small):
        read = []

        class Frames(list):
            def __getitem__(self, t):
                frame = super().__getitem__(t).copy()
                read.append(weakref.ref(frame))
                return frame

        class Broken(FakeBackbone):
            def embed(self, frames):
                raise ZeroDivisionError("a mistake")

        with pytest.raises(BackboneError, match="a mistake") as caught:
            cache.get_or_compute(Frames(small[0]), small[1], Broken(dim=4))
        gc.collect()
        assert len(read) == 12
        assert not any(frame() is not None for frame in read), caught.value

    def test_a_nan_pixel_names_its_frame(self, cache, small):
        frames = small[0].astype(np.float32)
        frames[4, 3, 3] = np.nan
        with pytest.raises(FrameError, match="frame 4 has 1 NaN"):
            cache.get_or_compute(frames, small[1], FakeBackbone())

    def test_an_unknown_codec(self, tmp_path):
        with pytest.raises(UnknownNameError, match="unknown codec 'gzip'"):
            FeatureCache(tmp_path / "cache", codec="gzip")
        assert not (tmp_path / "cache").exists()


class TestGrids:
    POOLED = (
        {"pooling": "median_patches_exact"},
        {"pooling": "nearest_patch", "dtype": "float32"},
    )

    @pytest.mark.parametrize("draw", [None, Augmentations("default", copies=1).draw(1)])
    def test_what_is_pooled_from_kept_grids_has_the_same_bits(
        self, cache, small, log, tmp_path, draw
    ):
        backbone = FakeBackbone(log=log)
        cache.get_or_compute(*small, backbone, draw=draw, keep_grids=True)
        assert computed(log) == 6
        assert cache.stats()["records"] == 12
        fresh = FeatureCache(tmp_path / "fresh")
        other = small[0], np.roll(small[1], 3, axis=2)
        for options in self.POOLED:
            expected = fresh.get_or_compute(*other, FakeBackbone(), draw=draw, **options)
            found = cache.get_or_compute(*other, backbone, draw=draw, **options)
            assert list(map(content, found)) == list(map(content, expected))
        assert computed(log) == 6
        cache.get_or_compute(small[0], None, backbone, pooling=None, draw=draw)  # rounded ones
        assert computed(log) == 12

    def test_grids_of_a_layer_below(self, cache, small, log, tmp_path):
        cache.get_or_compute(*small, FakeBackbone(), keep_grids=True)
        upper = FeatureCache(tmp_path / "upper", layers=[cache.store.root])
        upper.get_or_compute(*small, FakeBackbone(log=log), pooling="nearest_patch")
        assert computed(log) == 0

    def test_only_what_is_computed_is_kept_and_once(self, cache, small, log):
        frames, masks = (np.concatenate([a, a[:2]]) for a in small)
        masks[-1] = np.roll(masks[-1], 5)
        movie = cache.movie(frames, masks, FakeBackbone(log=log))
        movie.compute([0, 1])
        assert movie.warm(keep_grids=True) == 5  # four new frames, and one in another mask
        grids = cache.contains(frames, None, movie.backbone, pooling=None, dtype="float32")
        assert grids == [False, True, True, True, True, True, False, True]
        again = cache.movie(frames, None, movie.backbone, pooling=None, dtype="float32")
        again.warm(keep_grids=True)
        assert cache.stats()["records"] == 7 + 6

    def test_a_damaged_grid_is_computed_again(self, cache, small, log, caplog):
        backbone = FakeBackbone(log=log)
        cache.get_or_compute(*small, backbone, keep_grids=True)
        [grids] = [space for space in cache.spaces() if space.spec["pooling"] is None]
        for chunk in grids.packs_folder.glob("*/features/c.*"):
            chunk.write_bytes(b"\x7f" + chunk.read_bytes()[1:])
        again = FeatureCache(cache.store.root)
        found = again.get_or_compute(*small, backbone, pooling="nearest_patch")
        assert "fails its checksum" in caplog.text
        assert 7 <= computed(log) <= 12
        assert again.contains(*small, backbone, pooling="nearest_patch") == [True] * 6
        fresh = FeatureCache(cache.store.root.parent / "fresh")
        expected = fresh.get_or_compute(*small, FakeBackbone(), pooling="nearest_patch")
        assert list(map(content, found)) == list(map(content, expected))


class Tight(FakeBackbone):
    """Has memory for a few frames at once."""

    def __init__(self, room, **options):
        super().__init__(**options)
        self.room, self.sizes = room, []

    def embed(self, frames):
        self.sizes.append(len(frames))
        if len(frames) > self.room:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return super().embed(frames)


class TestMemory:
    def test_a_batch_out_of_memory_is_halved(self, cache, small, caplog):
        backbone = Tight(2)
        assert cache.movie(*small, backbone).warm(batch_size=6) == 6
        assert backbone.sizes == [6, 3, 1, 1, 1, 1, 1, 1]
        assert "out of memory with 6 frames at once, going on with 3" in caplog.text

    def test_a_frame_out_of_memory_says_what_to_lower(self, cache, small):
        with pytest.raises(BackboneError, match=r"one frame, frame 0 of shape .* lower"):
            cache.get_or_compute(*small, Tight(0))
        assert not list((cache.store.root / "claims").iterdir())


def read_in_child(cache, request, queue):
    queue.put(
        (
            os.getpid(),
            [np.array(r.features) for r in cache.get_or_compute(**request)],
            cache.stats()["computed"],
        )
    )


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_another_process_reads_the_same(cache, small, method):
    request = make_request(small)
    records = cache.get_or_compute(**request)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(cache, request, queue))
    child.start()
    pid, features, computed_there = queue.get(timeout=120)
    child.join()
    assert pid != os.getpid()
    assert computed_there == 0
    assert all(np.array_equal(a, b.features) for a, b in zip(features, records, strict=True))


def test_a_fork_while_another_thread_opens_a_space(tmp_path, small, monkeypatch):
    slow, other = (FeatureCache(tmp_path / name) for name in ("slow", "other"))
    request = make_request(small)
    begun, go_on = threading.Event(), threading.Event()

    def wait(_):
        begun.set()
        go_on.wait()

    monkeypatch.setattr(slow, "space", wait)
    movies = [cache.movie(*small, request["backbone"]) for cache in (slow, other)]
    thread = threading.Thread(target=lambda: movies[0].space)
    thread.start()
    begun.wait()
    child = multiprocessing.get_context("fork").Process(target=lambda: movies[1].space)
    child.start()
    child.join(60)
    ended = child.exitcode
    child.kill()
    go_on.set()
    thread.join()
    assert ended == 0


def test_a_pickled_cache_holds_no_data(cache, small):
    cache.get_or_compute(**make_request(small))
    copied = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 1000
    assert ask(copied, make_request(small)) == 0
    assert copied.stats()["computed"] == 0


def open_movies(root, small, poolings):
    """Bind a movie with one pooling after the other; give what was logged of each."""
    said = {pooling: io.StringIO() for pooling in poolings}
    for pooling, stream in said.items():
        logging.basicConfig(stream=stream, force=True)
        for _ in range(2):
            FeatureCache(root).movie(*small, FakeBackbone(), pooling=pooling)
    return {pooling: stream.getvalue() for pooling, stream in said.items()}


def test_nearest_patch_says_once_what_it_costs(cache, small):
    poolings = ("mean_patches_exact", "nearest_patch")
    before, after = apart(open_movies, cache.store.root, small, poolings).values()
    assert before == ""
    assert after.count("nearest_patch takes the one cell") == 1
    assert "10 to 14 of 100 parents fewer" in after
