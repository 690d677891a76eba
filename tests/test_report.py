from __future__ import annotations

import base64
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from feature_cache import (
    Augmentations,
    FeatureCache,
    MissingDependencyError,
    MovieError,
    Normalization,
    Policy,
)
from feature_cache.augment import Entry
from feature_cache.dataset import Copies, TokenFeatures
from feature_cache.movies import Movie, Source, write_movie
from feature_cache.movies.arrays import ListedImages
from feature_cache.report import (
    Choice,
    compose_picture,
    draw_in_terminal,
    fit_palette,
    look_at,
    page,
    render_page,
    survey_cache,
)
from feature_cache.report.colours import GREY, Directions, Palette, normalize_rows
from feature_cache.report.coverage import find_coverage
from feature_cache.report.health import sum_by_period
from feature_cache.report.outlines import draw_edges, trace_outlines
from feature_cache.report.thumbnails import data_uri, resize_to, shrink_image
from feature_cache.report.warm_command import quote_movie
from feature_cache.spec import BackboneSpec
from feature_cache.store import Run, Usage, maintenance
from feature_cache.testing import FakeBackbone
from feature_cache.warm import plan_warm, run_warm
from synthetic import make_movie

FAKE = Choice("fake")
COPIES = Augmentations("default", copies=2, seed=42)


def warm(cache, path, detections="TRA", copies=None, backbone=None, **options):
    """Warm a movie in files, as the command does."""
    movie = Movie.open(path, detections=detections)
    features = cache.movie(movie, None, backbone or FakeBackbone(), **options)
    numbered = copies or Augmentations("none", copies=0)
    for copy, draw in enumerate(numbered.draws()):
        features.with_draw(draw, numbered.name_of(copy)).warm()
    return features


def read_only(cache):
    return FeatureCache(cache.store.root, "r")


class TestPalette:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 6))
    def test_is_the_same_for_the_same_vectors_of_any_length(self, seed, count, width):
        rows = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
        one = Palette.fit([rows]).colour(rows)
        assert one.shape == (count, 3)
        assert np.array_equal(one, Palette.fit([rows.copy()]).colour(rows))
        assert np.abs(one.astype(int) - Palette.fit([rows]).colour(4 * rows)).max() <= 1

    def test_equal_vectors_have_one_colour_in_all_frames(self):
        rng = np.random.default_rng(0)
        grid, regions = rng.normal(size=(4, 5, 8)), rng.normal(size=(3, 8))
        regions[1] = grid[2, 3]
        palette = Palette.fit([grid, regions])
        assert np.array_equal(palette.colour(grid)[2, 3], palette.colour(regions)[1])

    @pytest.mark.parametrize("rows", [np.ones((9, 4)), np.zeros((9, 4)), np.ones((1, 4))])
    def test_without_differences_all_is_grey(self, rows):
        assert (Palette.fit([rows]).colour(rows) == GREY).all()

    def test_without_regions_there_is_nothing_to_colour(self):
        none = np.zeros((0, 4), np.float16)
        assert Palette.fit([none]).colour(none).shape == (0, 3)

    def test_first_component_is_the_largest(self):
        rng = np.random.default_rng(0)
        rows = rng.normal(size=(500, 5)) * [1, 9, 1, 1, 1]
        palette = Palette.fit([rows])
        red = palette.colour(rows)[:, 0].astype(float)
        assert abs(np.corrcoef(red, normalize_rows(rows)[:, 1])[0, 1]) > 0.95


class TestDirections:
    @given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 12))
    def test_dot_products_are_cosines_within_the_error_it_states(self, seed, count, width):
        rows = np.random.default_rng(seed).normal(size=(count, 8)).astype(np.float32)
        short = Directions.of(rows, width)
        assert short.numbers.shape == (count, min(width, 8))
        numbers = short.numbers.astype(int)
        unit = normalize_rows(rows)
        found, true = numbers @ numbers.T * short.scale, unit @ unit.T
        assert np.abs(found - true).max() <= short.error + 1e-5
        if width >= 8:
            assert short.error < 0.03

    def test_no_regions(self):
        empty = Directions.of(np.zeros((0, 8), np.float16))
        assert empty.numbers.shape == (0, 8)
        assert empty.error == 0


def fill(path, shape, scale):
    """Fill a path by the even-odd rule: which pixels have their centre in it."""
    inside = np.zeros(shape, bool)
    centres = (np.indices(shape) + 0.5) * scale
    for loop in re.findall(r"M([^z]*)z", path):
        start, steps = loop.split("l")
        moves = [start.split(), *np.array(steps.split()).reshape(-1, 2)]
        points = np.cumsum(np.array(moves, float), axis=0)[:, ::-1]
        for (y0, x0), (y1, x1) in zip(points, np.roll(points, -1, axis=0), strict=True):
            crosses = (y0 > centres[0]) != (y1 > centres[0])
            if y0 != y1:
                at = x0 + (centres[0] - y0) * (x1 - x0) / (y1 - y0)
                inside ^= crosses & (centres[1] < at)
    return inside


class TestOutlines:
    @given(arrays.arrays(np.int32, st.tuples(st.integers(1, 7), st.integers(1, 7)),
                         elements=st.integers(0, 3)))  # fmt: skip
    def test_enclose_the_pixels_of_their_region_and_no_others(self, mask):
        paths = trace_outlines(mask, 8)
        assert set(paths) == set(np.unique(mask).tolist()) - {0}
        for label, path in paths.items():
            assert np.array_equal(fill(path, mask.shape, 8), mask == label)

    def test_of_large_labels_and_of_nothing(self):
        mask = np.zeros((4, 4), np.int32)
        assert trace_outlines(mask, 2) == {}
        mask[1:3, 1:3] = 2**31 - 1
        assert list(trace_outlines(mask, 2)) == [2**31 - 1]

    def test_edges_are_pixels_of_regions(self):
        mask = np.zeros((5, 6), np.int32)
        mask[1:4, 1:4], mask[1:4, 4] = 1, 2
        edges = draw_edges(mask)
        assert edges.sum() == 8 + 3
        assert not edges[2, 2]


class TestImages:
    @given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 6))
    def test_shrinking_keeps_the_mean_of_each_block(self, height, width, factor):
        image = np.random.default_rng(height * width).random((height, width))
        small = shrink_image(image, factor)
        assert small.shape == (-(-height // factor), -(-width // factor))
        assert small[0, 0] == pytest.approx(image[:factor, :factor].mean())
        assert small[-1, -1] == pytest.approx(
            image[(small.shape[0] - 1) * factor :, (small.shape[1] - 1) * factor :].mean()
        )

    def test_a_grid_spans_its_frame(self):
        grid = np.arange(6, dtype=np.uint8).reshape(2, 3)
        assert resize_to(grid, (4, 6)).tolist() == np.kron(grid, np.ones((2, 2))).tolist()

    def test_pictures_come_back(self):
        image = np.random.default_rng(0).integers(0, 255, (5, 7, 3)).astype(np.uint8)
        uri = data_uri(image, lossless=True)
        content = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
        assert np.array_equal(imagecodecs.png_decode(content), image)
        assert data_uri(image[..., 0]).startswith("data:image/webp;base64,")

    def test_a_terminal_gets_two_pixels_a_character(self):
        text = draw_in_terminal(np.full((9, 40, 3), 7, np.uint8), columns=20)
        lines = text.splitlines()
        assert len(lines) == 3
        assert all(line.count("▀") == 20 for line in lines)
        assert "38;2;7;7;7" in text


def cover(cache):
    """Give the names of movies, and of each space's copies how many records each movie has."""
    movies, coverage = find_coverage(cache.store.spaces())
    names = [" = ".join(movie.names) for movie in movies]
    return names, {one.spec["pooling"] and one.spec["pooling"]["name"]: one for one in coverage}


class TestCoverage:
    def test_movies_and_copies(self, cache, small_folder):
        one, two = small_folder("one"), small_folder("two", seed=3, frames=4)
        warm(cache, one, copies=COPIES)
        warm(cache, two)
        names, coverage = cover(cache)
        assert names == [f"{one} TRA", f"{two} TRA"]
        found = coverage["mean_patches_exact"]
        assert [(c.group.label, c.number) for c in found.columns] == [
            ("original", 0),
            ("seed 42 (default)", 1),
            ("seed 42 (default)", 2),
        ]
        assert found.counts == ((6, 6, 6), (4, 0, 0))
        assert found.expected == (6, 4)

    def test_a_movie_of_which_some_frames_are_there(self, cache, small_folder):
        root = small_folder()
        features = warm(cache, root)
        copy = features.with_draw(COPIES.draw(1), COPIES.name_of(1))
        copy.compute([1, 4])
        _, coverage = cover(cache)
        assert coverage["mean_patches_exact"].counts == ((6, 2),)

    def test_parts_of_a_movie_are_one_movie(self, cache, small_folder):
        root = small_folder()
        for part in ((0, 0.5), (0.5, 1)):
            movie = Movie.open(root, slice_pct=part)
            cache.movie(movie.frames, movie.masks, FakeBackbone(), name=movie.name).warm()
        movies, [found] = find_coverage(cache.store.spaces())
        assert (movies[0].slots, movies[0].versions) == (6, 0)
        assert (found.counts, found.expected) == (((6,),), (6,))

    def test_detections_are_movies_of_their_own(self, cache, small_folder):
        root = small_folder()
        other = Path(f"{root}_ERR_SEG")
        shutil.copytree(Path(f"{root}_GT") / "TRA", other)
        for file in other.glob("*.tif"):
            tifffile.imwrite(file, tifffile.imread(file) * 2)
        warm(cache, root, copies=COPIES)
        warm(cache, root, "ERR_SEG")
        names, coverage = cover(cache)
        assert names == [f"{root} ERR_SEG", f"{root} TRA"]
        assert coverage["mean_patches_exact"].counts == ((6, 0, 0), (6, 6, 6))

    def test_a_record_counts_by_its_content(self, cache, small_folder):
        one = small_folder("one")
        warm(cache, one)
        two = one.parent.with_name("two") / "01"
        shutil.copytree(one.parent, two.parent)
        warm(cache, two, copies=COPIES)
        names, coverage = cover(cache)
        assert names == [f"{one} TRA = {two} TRA"]
        assert coverage["mean_patches_exact"].counts == ((6, 6, 6),)

    def test_movies_that_share_frames_are_as_they_were_asked_for(self, cache, small_folder):
        one = small_folder("one")
        two = one.parent.with_name("two") / "01"
        shutil.copytree(one.parent, two.parent)
        for file in [*two.glob("t00[45].tif"), *two.parent.glob("01_GT/TRA/man_track00[45].tif")]:
            file.unlink()
        for root in (one, two):
            report = run_warm(plan_warm(cache, [root], FakeBackbone()))
        assert (report.present, report.computed) == (4, 0)
        survey = survey_cache(read_only(cache).store)
        assert [movie.names for movie in survey.movies] == [(f"{one} TRA",), (f"{two} TRA",)]
        assert survey.coverage[0].counts == ((6,), (4,))
        assert survey.coverage[0].expected == (6, 4)
        assert maintenance.verify(cache.store.root) == []

        features = cache.movie(Movie.open(two), None, FakeBackbone())
        TokenFeatures([features], Copies(COPIES), on_miss="error")
        features.keys()
        [found] = survey_cache(read_only(cache).store).coverage
        assert [column.group.label for column in found.columns][1:] == ["seed 42 (default)"] * 2
        assert found.counts == ((6, 0, 0), (4, 0, 0))

        for file in (cache.store.root / "asked").iterdir():
            os.utime(file, (1e9, 1e9))
        cache.gc(dry_run=False)
        assert len(survey_cache(read_only(cache).store).movies) == 1

    def test_movies_of_one_name_in_two_places_are_two(self, cache, small_folder, monkeypatch):
        """As two people have who warm from their own folders, or one has of two channels."""
        movies = [small_folder(name, seed=seed).parent for seed, name in enumerate(("a", "b"))]
        for folder in movies:
            monkeypatch.chdir(folder)
            run_warm(plan_warm(cache, [Source("01")], FakeBackbone()))
        survey = survey_cache(read_only(cache).store)
        assert [movie.names for movie in survey.movies] == [
            (f"01 TRA ({folder / '01'})",) for folder in movies
        ]
        assert [(movie.slots, movie.versions) for movie in survey.movies] == [(6, 0)] * 2
        assert (survey.coverage[0].counts, survey.coverage[0].expected) == (((6,), (6,)), (6, 6))

        frames = tifffile.imread(sorted(Path("01").glob("*.tif")))
        np.save("stack.npy", np.stack([frames, frames[::-1] + 1], axis=1))
        for channel in (0, 1):
            source = Source("stack.npy", None, channel=channel, axes="TCYX")
            run_warm(plan_warm(cache, [source], FakeBackbone(), pooling=None))
        movies = survey_cache(read_only(cache).store).movies[2:]
        assert [movie.names[0].partition(" --axes")[0] for movie in movies] == [
            f"stack.npy ({Path('stack.npy').absolute()} --channel {channel}" for channel in (0, 1)
        ]

    def test_changed_masks_count_for_themselves(self, cache, small_folder):
        root = small_folder()
        warm(cache, root)
        file = Path(f"{root}_GT") / "TRA" / "man_track002.tif"
        tifffile.imwrite(file, tifffile.imread(file) * 2)
        warm(cache, root, copies=COPIES)
        movies, [found] = find_coverage(cache.store.spaces())
        assert (movies[0].slots, movies[0].versions) == (6, 1)
        assert (found.counts, found.expected) == (((7, 6, 6),), (7,))

    @pytest.mark.parametrize("pooling", ["mean_patches_exact", None])
    def test_frames_around_count_where_they_are_seen(self, cache, small_folder, pooling):
        root, backbone = small_folder(), FakeBackbone(context=(2, 1))
        warm(cache, root, pooling="max_patches_exact")
        warm(cache, root, backbone=backbone, pooling=pooling)
        assert cover(cache)[1][pooling].counts == ((6,),)
        file = root / "t003.tif"
        tifffile.imwrite(file, tifffile.imread(file) + 1)
        movie = Movie.open(root, detections="TRA")
        changed = cache.movie(movie, None, backbone, pooling=pooling)
        changed.want([changed])
        changed.compute([3])
        there = np.flatnonzero(changed.contains()).tolist()
        assert there == [0, 1, 3]
        survey = survey_cache(read_only(cache).store)
        assert [(movie.slots, movie.versions) for movie in survey.movies] == [(6, 1)]
        found = sorted((one.counts, one.expected) for one in survey.coverage)
        assert found == [(((6,),), (7,)), (((7,),), (10,))]

    def test_grids_need_no_masks(self, cache, small_folder):
        one, two = small_folder("one"), small_folder("two", seed=3)
        warm(cache, one, pooling=None)
        warm(cache, two, None, pooling=None)
        warm(cache, one)
        names, coverage = cover(cache)
        assert names == [f"{one} TRA", str(two)]
        assert coverage[None].counts == ((6,), (6,))
        assert coverage["mean_patches_exact"].counts == ((6,), (0,))
        assert coverage["mean_patches_exact"].expected == (6, None)

    def test_is_the_same_when_packs_are_merged(self, cache, small_folder):
        warm(cache, small_folder("one"), copies=COPIES)
        warm(cache, small_folder("two", seed=3))
        before = find_coverage(cache.store.spaces())
        cache.compact()
        assert [one.counts for one in find_coverage(cache.store.spaces())[1]] == [
            one.counts for one in before[1]
        ]

    def test_commands_are_there_where_one_would_help(self, cache, small_folder, small):
        own = Augmentations(Policy((Entry.of("hflip"),)), copies=1)
        warm(cache, small_folder(), copies=COPIES, pooling="nearest_patch")
        warm(cache, small_folder(), copies=own, pooling="nearest_patch")
        cache.get_or_compute(small[0][:, ::-1], small[1], FakeBackbone())
        movies, _ = find_coverage(cache.store.spaces())
        assert [movie.source is not None for movie in movies] == [False, True]
        _, coverage = cover(cache)
        found = coverage["nearest_patch"]
        groups = sorted({column.group for column in found.columns})
        start = "feature-cache warm {movie} --cache /c --backbone fake"
        assert [found.command(group, "/c") for group in groups] == [
            f"{start} --pooling nearest_patch",
            None,
            f"{start} --copies 2 --pooling nearest_patch --seed 42",
        ]

    def test_regions_of_frames_are_those_of_the_movie_itself(self, cache, small_folder):
        root = small_folder()
        file = Path(f"{root}_GT") / "TRA" / "man_track002.tif"
        tifffile.imwrite(file, tifffile.imread(file) // 2)
        warm(cache, root, copies=COPIES)
        other = small_folder("other", seed=3)
        warm(cache, other, None, pooling=None)
        found = {movie.names[0]: movie.regions for movie in find_coverage(cache.spaces())[0]}
        assert found == {f"{root} TRA": (2, 5.0, 5), str(other): None}

    def test_a_movie_says_how_it_is_opened(self, cache, small_folder):
        root = small_folder()
        movie = Movie.open(root / "*.tif", f"{root}_GT/TRA")
        cache.movie(movie, None, FakeBackbone()).warm()
        [known] = find_coverage(cache.spaces())[0]
        assert known.source == movie.source
        words = shlex.split(quote_movie(known.source))
        assert words == [f"{root}/*.tif", "--masks", f"{root}_GT/TRA"]

    @pytest.mark.parametrize(
        ("name", "pooling", "words"),
        [
            ("data/01 TRA", "mean_patches_exact", ["data/01"]),
            ("my data/01 ERR_SEG", "mean_patches_exact", ["my data/01", "--detections", "ERR_SEG"]),
            ("my data/01", "mean_patches_exact", ["my data/01"]),
            ("my data/01", None, ["my data/01"]),
        ],
    )
    def test_what_0_1_wrote_tells_it_by_its_name(self, cache, small, name, pooling, words):
        class Files(ListedImages):
            place = "somewhere"

        movie = cache.movie(
            Files(list(small[0])), small[1], FakeBackbone(), pooling=pooling, name=name
        )
        movie.warm()
        [known] = find_coverage(cache.spaces())[0]
        assert shlex.split(quote_movie(known.source)) == words

    @given(st.text(min_size=1).filter(lambda name: "\0" not in name))
    def test_a_name_stays_one_word_in_a_shell(self, name):
        words = shlex.split(quote_movie(Source(name, "ERR SEG")))
        assert words[1:] == ["--detections", "ERR SEG"]
        assert words[0] in (name, f"./{name}")
        assert not words[0].startswith("-")


def run_at(day, **counts):
    return Run("host", 1, 0.0, day * 86400.0, Usage(**counts))


class TestCondition:
    def test_periods_are_days_or_longer(self):
        days = [run_at(day, hits=2, misses=1) for day in (100, 100, 103)]
        found = sum_by_period(days)
        assert [usage.hits for _, usage in found] == [2, 4]
        assert all(re.fullmatch(r"1970-\d\d-\d\d", when) for when, _ in found)
        months = sum_by_period([run_at(day, hits=1) for day in range(80)])
        assert all(re.fullmatch(r"19\d\d-\d\d", when) for when, _ in months)
        assert sum(usage.hits for _, usage in months) == 80
        years = sum_by_period([run_at(30 * month, hits=1) for month in range(60)])
        assert all(re.fullmatch(r"19\d\d", when) for when, _ in years)

    def test_bytes_are_all_that_the_cache_counts(self, cache, small_folder):
        warm(cache, small_folder(), copies=COPIES)
        stats = cache.stats()
        report = survey_cache(read_only(cache).store)
        assert sum(space.bytes for space in report.spaces) == stats["bytes"]
        assert report.usage.computed == 18

    def test_pins_and_quarantined_packs_show(self, cache, small_folder):
        warm(cache, small_folder("one"))
        warm(cache, small_folder("two", seed=3))
        cache.pin("one/01")
        [space] = cache.store.spaces()
        _, second = space.pack_names()
        chunk = space.packs_folder / second / "features" / "c.0.0"
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"!")
        findings = maintenance.verify(cache.store.root)
        report = survey_cache(read_only(cache).store, findings)
        lines = dict(report.condition)
        assert lines["Pinned"] == "1 pin"
        assert [finding.kind for finding in report.findings] == ["damaged"]
        assert "1 found" in render_page(report)
        maintenance.repair(cache.store.root, findings)
        lines = dict(survey_cache(read_only(cache).store).condition)
        assert lines["In quarantine"] == "1 thing"

    def test_a_damaged_pin_shows(self, cache, small_folder):
        warm(cache, small_folder())
        cache.pin("movie/01")
        [pin] = cache.store.root.glob("pins/*")
        pin.write_text("no pin")
        lines = dict(survey_cache(read_only(cache).store).condition)
        assert lines["Pinned"] == "1 damaged: run feature-cache verify --repair"

    def test_claims_of_living_processes_show(self, cache, small_folder):
        warm(cache, small_folder())
        cache.store.claims.take(["00" * 16, "11" * 16])
        health = survey_cache(read_only(cache).store).health
        assert list(health.claims.values()) == [2]


def snapshot(root):
    """Give every file of a cache but those that say who uses it: times and contents."""
    return {
        file: (file.stat().st_mtime_ns, file.read_bytes() if file.is_file() else b"")
        for file in Path(root).rglob("*")
        if file.relative_to(root).parts[0] not in ("processes", "uses")
    }


class TestStrip:
    def test_shows_what_is_stored(self, cache, small_folder):
        root = small_folder()
        warm(cache, root, pooling=None, dtype="float32")
        features = warm(cache, root)
        strip = look_at(read_only(cache), Source(str(root)), FAKE, 4)
        assert [view.number for view in strip.frames] == [1, 2, 3, 4]
        assert strip.missing == ()
        for view, record in zip(strip.frames, features.get([1, 2, 3, 4]), strict=True):
            assert np.array_equal(view.regions.features, record.features)
            assert view.grid.shape == (6, 8, 16)
            assert view.image.shape == view.mask.shape == (48, 64)

    def test_leaves_the_cache_as_it_was(self, cache, small_folder):
        root = small_folder()
        warm(cache, root)
        cache.counter.save()
        before = snapshot(cache.store.root)
        opened = read_only(cache)
        strip = look_at(opened, Source(str(root)), FAKE, 4)
        render_page(survey_cache(opened.store), [strip])
        del opened, strip
        assert snapshot(cache.store.root) == before

    def test_names_what_is_missing_and_what_warms_it(self, cache, small_folder):
        root = small_folder()
        warm(cache, root).with_draw(COPIES.draw(2)).compute([2])
        choice = Choice("fake", seed=42, copy=2)
        strip = look_at(read_only(cache), Source(str(root)), choice, 3)
        assert strip.missing == (1, 3)
        assert strip.copy == "copy 2 of seed 42 (default)"
        end = f"--cache {cache.store.root} --backbone fake --copies 2 --seed 42"
        assert strip.command == f"feature-cache warm {root} {end}"

    def test_shows_a_copy_as_the_backbone_saw_it(self, cache, small_folder):
        flip = Augmentations("flips", copies=9, seed=0)
        copy = next(k for k in range(1, 10) if not flip.draw(k).is_identity)
        root = small_folder()
        warm(cache, root)
        plain = look_at(read_only(cache), Source(str(root)), FAKE, [0]).frames[0]
        choice = Choice("fake", policy="flips", copy=copy)
        drawn = look_at(read_only(cache), Source(str(root)), choice, [0]).frames[0]
        assert np.array_equal(drawn.mask, flip.draw(copy).apply_mask(plain.mask))
        assert sorted(drawn.image.ravel()) == sorted(plain.image.ravel())
        assert not np.array_equal(drawn.image, plain.image)

    def test_shows_the_slice_of_a_stack_with_most_of_the_regions(self, cache, tmp_path):
        frames, masks, tracks = make_movie(frames=3)
        stack = np.stack([np.zeros_like(masks), masks], axis=1)
        write_movie(tmp_path / "01", np.stack([frames, frames], axis=1), stack, tracks)
        warm(cache, tmp_path / "01")
        warm(cache, tmp_path / "01", pooling=None, dtype="float16")
        strip = look_at(read_only(cache), Source(str(tmp_path / "01")), FAKE, [0])
        assert strip.slice == (1, 2)
        assert strip.frames[0].mask.shape == (48, 64)
        assert strip.frames[0].grid.shape == (6, 8, 16)
        assert "slice 2 of 2" in render_page(survey_cache(read_only(cache).store), [strip])

    def test_grids_alone_and_frames_without_a_scale(self, cache, small_folder):
        root = small_folder()
        raw = FakeBackbone(normalization=Normalization("none"))
        warm(cache, root, None, pooling=None, backbone=raw)
        strip = look_at(read_only(cache), Source(str(root)), Choice("fake", pooling=None), [0, 5])
        view = strip.frames[0]
        assert strip.missing == ()
        assert view.mask is None
        assert (view.image.min(), view.image.max()) == (0, 1)

    def test_damage_is_missing(self, cache, small_folder, caplog):
        root = small_folder()
        warm(cache, root)
        [space] = cache.store.spaces()
        chunk = space.packs_folder / space.pack_names()[0] / "features" / "c.0.0"
        chunk.write_bytes(bytes(len(chunk.read_bytes())))
        strip = look_at(read_only(cache), Source(str(root)), FAKE, [0])
        assert strip.missing == (0,)
        assert "shown as missing" in caplog.text

    def test_frames_of_layers_show_too(self, cache, small_folder, tmp_path):
        root = small_folder()
        warm(cache, root)
        FeatureCache(tmp_path / "top")
        top = FeatureCache(tmp_path / "top", "r", layers=[cache.store.root])
        assert look_at(top, Source(str(root)), FAKE, 2).missing == ()

    def test_a_frame_that_is_not_there(self, cache, small_folder):
        root = small_folder()
        warm(cache, root)
        with pytest.raises(MovieError, match="has no frame 6: expected 0 to 5"):
            look_at(read_only(cache), Source(str(root)), FAKE, [6])


class TestPicture:
    def test_has_frame_and_embedding_side_by_side(self, cache, small_folder):
        root = small_folder()
        warm(cache, root)
        regions = look_at(read_only(cache), Source(str(root)), FAKE, [0])
        picture = compose_picture(regions.frames[0], fit_palette(regions))
        assert picture.shape == (384, 512 + 4 + 512, 3)
        colours = {tuple(colour) for colour in picture[:, 516:].reshape(-1, 3).tolist()}
        assert 1 < len(colours) <= 6
        warm(cache, root, pooling=None)
        grids = look_at(read_only(cache), Source(str(root)), FAKE, [0])
        assert not np.array_equal(compose_picture(grids.frames[0], fit_palette(grids)), picture)


def data_of(html, name="coverage-data"):
    [text] = re.findall(rf'<script type="application/json" id="{name}">(.*?)</script>', html)
    return json.loads(text)


class TestPage:
    def test_names_are_never_markup(self, cache, small_folder):
        name = "<script>alert(1)</script>&\"'"
        root = small_folder("a</script><script>alert(2)</script>", seed=3)
        frames, masks, _ = make_movie()
        cache.movie(frames, masks, FakeBackbone(), name=f"{name}/01 TRA").warm()
        cache.pin(f"{name}/01")
        warm(cache, root)
        strip = look_at(read_only(cache), Source(str(root)), FAKE, 2)
        html = render_page(survey_cache(read_only(cache).store), [strip])
        assert "<script>alert" not in html
        assert html.count("<script") == 3
        assert f"{name}/01 TRA" in data_of(html)["movies"][1]["names"]

    def test_an_empty_cache(self, cache):
        html = render_page(survey_cache(cache.store))
        assert "Nothing is stored here yet" in html
        assert "Not verified" in html

    def test_no_command_warms_other_frames_than_are_missing(self, cache, small_folder):
        root = small_folder()
        for size in (1, 2):
            run_warm(plan_warm(cache, [Source(str(root), downscale_spatial=size)], FakeBackbone()))
        movies = data_of(render_page(survey_cache(read_only(cache).store)))["movies"]
        assert {tuple(movie["names"]): movie["argument"] for movie in movies} == {
            (f"{root} TRA ({root})",): str(root),
            (f"{root} TRA ({root}, downscaled by 2)",): None,
        }

    def test_specs_stand_in_full(self, cache, small_folder):
        warm(cache, small_folder())
        html = render_page(survey_cache(read_only(cache).store))
        [text] = re.findall(r"<pre[^>]*>(.*?)</pre>", html, re.DOTALL)
        spec = json.loads(text.replace("&#34;", '"'))
        assert BackboneSpec.from_json(spec["backbone"]) == FakeBackbone().spec

    def test_too_many_regions_are_drawn_and_not_compared(self, cache, small_folder, monkeypatch):
        root = small_folder()
        warm(cache, root)
        strip = look_at(read_only(cache), Source(str(root)), FAKE, 3)
        monkeypatch.setattr(page, "MOST_REGIONS", 12)
        html = render_page(survey_cache(read_only(cache).store), [strip])
        assert "cosines of 10 regions" in html
        assert "1 frames are too many to be compared" in html
        assert html.count('class="region"') == 10

    def test_a_missing_extra_is_named(self, cache, monkeypatch):
        monkeypatch.setitem(sys.modules, "jinja2", None)
        page.load_templates.cache_clear()
        with pytest.raises(MissingDependencyError, match=r"feature-cache\[report\]"):
            render_page(survey_cache(cache.store))


class TestCommands:
    def test_report(self, run, cache, small_folder):
        root = small_folder()
        warm(cache, root)
        cached = ("--cache", cache.store.root)
        code, out, _ = run("report", "out.html", *cached, "--movie", root, "--verify")
        assert (code, out.split(",")[0]) == (0, "out.html")
        html = Path("out.html").read_text()
        assert "All is well" in html
        assert html.count("<figure>") == 6
        code, _, err = run("report", "out.html", *cached, "--movie", root, "--movie", "nowhere")
        assert code == 1
        assert "left out: nowhere: no movie at nowhere" in err
        assert Path("out.html").read_text().count("<figure>") == 6

    def test_a_movie_that_can_not_be_read_is_left_out(self, run, cache, small_folder):
        root = small_folder()
        warm(cache, root)
        tifffile.imwrite(root / "t003.tif", np.full((48, 64), np.nan, np.float32))
        code, _, err = run("report", "out.html", "--cache", cache.store.root, "--movie", root)
        assert code == 1
        assert f"left out: {root}: frame 3 of" in err
        assert "Coverage" in Path("out.html").read_text()

    def test_report_wants_a_backbone_where_there_are_several(self, run, cache, small_folder):
        code, _, err = run(
            "report", "out.html", "--cache", cache.store.root, "--movie", small_folder()
        )
        assert code == 2
        assert "name a --backbone; stored: none" in " ".join(err.split())

    def test_the_only_layer_that_is_stored_is_drawn_and_warmed(self, run, small_folder):
        root, words = small_folder(), ("--cache", "cache", "--backbone")
        name = "efficientnet-lite0?layer=stride-8"
        assert run("warm", root, *words, f"{name}&weights=random:0")[0] == 0
        shown = ("show", root, "--cache", "cache", "--frame", 0)
        assert run(*shown)[0] == 0
        code, _, err = run(*shown, "--pooling", "nearest_patch")
        assert (code, f"--backbone '{name}' --pooling" in err) == (1, True)
        assert run("warm", root, *words, "efficientnet-lite0", "--weights", "random:0")[0] == 0
        code, _, err = run(*shown)
        assert (code, err) == (
            2, f"error: name a --backbone; stored: efficientnet-lite0, {name}\n"
        )  # fmt: skip

    def test_a_page_that_can_not_be_written(self, run, cache):
        code, _, err = run("report", "no/where.html", "--cache", cache.store.root)
        assert (code, err) == (2, "error: can't write no/where.html: No such file or directory\n")

    def test_what_the_page_needs_is_said_before_anything_is_done(self, run, cache, monkeypatch):
        monkeypatch.setitem(sys.modules, "jinja2", None)
        page.load_templates.cache_clear()
        done = "feature_cache.store.maintenance.verify", "feature_cache.evaluation.evaluate"
        for name in done:
            monkeypatch.setattr(name, lambda *_, **__: pytest.fail("it was done"))
        cached = ("--cache", cache.store.root)
        for words in (
            ("report", "out.html", *cached, "--verify"),
            ("evaluate", "movie", *cached, "--backbone", "debug/random", "--page", "out.html"),
        ):
            code, _, err = run(*words)
            assert (code, "feature-cache[report]" in err) == (2, True)

    def test_show(self, run, cache, small_folder):
        root = small_folder()
        warm(cache, root)
        options = ("--cache", cache.store.root, "--frame", 3)
        assert run("show", root, *options) == (0, "01-frame-3.png\n", "")
        assert imagecodecs.png_decode(Path("01-frame-3.png").read_bytes()).shape == (384, 1028, 3)
        code, out, err = run("show", root, *options, "-o", "x.png", "--pooling", "nearest_patch")
        assert (code, out) == (1, "")
        assert err.startswith(f"error: frame 3 of {root} TRA is not in the cache")
        assert err.rstrip().endswith("--backbone fake --pooling nearest_patch")
        assert not Path("x.png").exists()

    def test_a_picture_is_not_put_among_the_frames(self, run, cache, small_folder, monkeypatch):
        root = small_folder()
        warm(cache, root)
        words = ("--cache", cache.store.root, "--frame", 3)
        monkeypatch.chdir(root)
        code, _, err = run("show", ".", *words)
        assert (code, "01-frame-3.png would lie among the frames of .: name" in err) == (2, True)
        assert run("show", "t*.tif", "--masks", "../01_GT/TRA", *words)[0] == 2
        assert len(Movie.open(root)) == 6
        assert run("show", ".", *words, "-o", "../frame.png")[:2] == (0, "../frame.png\n")

    def test_show_draws_where_the_terminal_can(self, run, cache, small_folder, monkeypatch):
        root = small_folder()
        warm(cache, root)
        monkeypatch.setattr("feature_cache.cli.pictures._has_colours", lambda: True)
        _, out, _ = run("show", root, "--cache", cache.store.root, "--frame", 0)
        assert "▀" in out
        assert out.endswith("01-frame-0.png\n")

    def test_what_is_missing_is_there_after_the_command_that_is_shown(self, run, small_folder):
        root = small_folder("a movie")
        model = ("--backbone", "debug/random", "--device", "cpu")
        run("warm", root, "--cache", "cache", *model, "--copies", "1")
        shown = ("show", root, "--cache", "cache", "--frame", 0, "--copy", 3, "--seed", 0)
        code, _, err = run(*shown)
        assert code == 1
        command = shlex.split(err.partition("to warm it: ")[2])
        assert run(*command[1:])[0] == 0
        assert run(*shown)[0] == 0
