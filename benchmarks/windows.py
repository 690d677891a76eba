"""A window of 8 frames, any movie and copy, read from our cache and from what else there is."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from feature_cache.cache import MovieFeatures
from feature_cache.dataset import Copies, TokenFeatures
from feature_cache.key import Keys
from feature_cache.store import Space

from .data import Collection, Window
from .formats import Read, open_formats
from .harness import OURS, Case, Options, compare_calls, interleave, make_cold, seconds_of

COPIES = 11
FRAMES = 20
SIZES = {5: 30, 50: 30, 500: 4}
"""Regions a frame, and how many movies."""
QUICK_SIZES = {50: 2}
COLD_WINDOWS = 20
BY_RECORDS = f"{OURS}, record by record"
BY_KEYS = f"{OURS}, by keys"
BY_TOKENS = f"{OURS}, TokenFeatures"
FIRST = f"{OURS}, first touch"


def run(options: Options) -> list[Case]:
    """Compare windows as stored (float16), as training takes them (float32), and cold."""
    torch.set_num_threads(1)  # as in DataLoader workers
    sizes = QUICK_SIZES if options.quick else SIZES
    cases = []
    for regions, movies in sizes.items():
        collection = Collection(options.folder, movies, COPIES, FRAMES, regions)
        cases += compare_windows(collection, options)
    return cases


def compare_windows(collection: Collection, options: Options) -> list[Case]:
    reads = open_formats(collection.home / "formats", collection)
    variants = collection.open_cache()
    windows = collection.windows(200)
    name = f"8 x {collection.regions} x {collection.width}"
    keys = {window: variants[window.movie][window.copy].keys(window.frames) for window in windows}
    stored = {
        OURS: by_span(variants),
        BY_RECORDS: by_records(variants),
        BY_KEYS: by_keys(variants[0][0].space, keys),
        **reads,
    }
    check_equal(stored, windows[:20])
    budget = 0.05 if options.quick else 0.2
    tokens = TokenFeatures(
        [copies[0] for copies in variants], Copies(collection.augmentations), "error"
    )
    trained = {
        BY_TOKENS: by_tokens(tokens, collection),
        "np.memmap": as_float32(reads["np.memmap"]),
        "in memory": as_float32(reads["in memory"]),
    }
    return [
        compare_calls(f"{name} warm", "np.memmap", stored, windows, options.rounds, budget),
        compare_calls(
            f"{name} float32, warm", "np.memmap", trained, windows, options.rounds, budget
        ),
        compare_cold(f"{name} cold", collection, reads, variants, options),
    ]


def by_span(variants: list[list[MovieFeatures]]) -> Read:
    """Copy what lies side by side, as a slice of a memmap is copied."""
    apart = by_records(variants)

    def read(window: Window) -> NDArray[np.float16]:
        span = variants[window.movie][window.copy].span(window.frames)
        return apart(window) if span is None else span.features.copy()

    return read


def by_records(variants: list[list[MovieFeatures]]) -> Read:
    def read(window: Window) -> NDArray[np.float16]:
        records = variants[window.movie][window.copy].get(window.frames)
        return np.concatenate([record.features for record in records if record is not None])

    return read


def by_keys(space: Space, keys: Mapping[Window, Keys]) -> Read:
    def read(window: Window) -> NDArray[np.float16]:
        records = space.read(keys[window])
        return np.concatenate([record.features for record in records if record is not None])

    return read


def by_tokens(tokens: TokenFeatures, collection: Collection) -> Callable[[Window], torch.Tensor]:
    labels = torch.arange(1, collection.regions + 1).repeat(8)
    steps = torch.arange(8).repeat_interleave(collection.regions)

    def read(window: Window) -> torch.Tensor:
        return tokens(window.movie, steps + window.start, labels, window.copy)

    return read


def as_float32(read: Read) -> Callable[[Window], torch.Tensor]:
    return lambda window: torch.from_numpy(read(window)).float()


def check_equal(reads: dict[str, Read], windows: list[Window]) -> None:
    """Make sure that all sides give the same numbers."""
    for window in windows:
        expected = reads["np.memmap"](window)
        for name, read in reads.items():
            if not np.array_equal(read(window), expected):
                raise AssertionError(f"{name} gives other numbers for {window}")


def compare_cold(
    name: str,
    collection: Collection,
    reads: dict[str, Read],
    variants: list[list[MovieFeatures]],
    options: Options,
) -> Case:
    """Compare with pread of the same bytes, all files out of the page cache in each round."""
    formats, root = collection.home / "formats", collection.home / "cache"
    raw = formats / "np.memmap" / "features.raw"
    ours = by_span(variants)
    for window in every_window(collection):  # so that all are verified
        ours(window)
    with open(raw, "rb", buffering=0) as file:
        pread = by_pread(file.fileno(), collection)
        places = {"pread": (pread, raw), "np.memmap": (reads["np.memmap"], raw), OURS: (ours, root)}
        if "HDF5 file a sample" in reads:
            places["HDF5 file a sample"] = (
                reads["HDF5 file a sample"],
                formats / "HDF5-file-a-sample",
            )
        sides = {name: cold_side(*place, collection) for name, place in places.items()}
        sides[FIRST] = cold_side(ours, root, collection, lambda: forget_verified(variants))
        return Case(name, "pread", interleave(sides, options.rounds))


def every_window(collection: Collection) -> list[Window]:
    return [
        Window(movie, copy, 0, collection.frames)
        for movie in range(collection.movies)
        for copy in range(collection.copies)
    ]


def by_pread(file: int, collection: Collection) -> Read:
    frame_bytes = collection.regions * collection.width * 2

    def read(window: Window) -> NDArray[np.float16]:
        first = (window.movie * collection.copies + window.copy) * collection.frames
        size = frame_bytes * len(window.frames)
        return np.frombuffer(os.pread(file, size, (first + window.start) * frame_bytes), np.float16)

    return read


def cold_side(
    read: Read, place: Path, collection: Collection, prepare: Callable[[], None] = lambda: None
) -> Callable[[], float]:
    """Give what times windows that are not in the page cache, other ones in each round."""
    seeds = itertools.count(2)

    def measure() -> float:
        prepare()
        make_cold(place)
        windows = collection.windows(COLD_WINDOWS, seed=next(seeds))
        return seconds_of(lambda: [read(window) for window in windows]) / len(windows)

    return measure


def forget_verified(variants: list[list[MovieFeatures]]) -> None:
    """Have every record verified again, as in a new process."""
    for pack in variants[0][0].space._packs.values():
        pack._verified[:] = False
