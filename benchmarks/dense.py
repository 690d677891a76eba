"""Whole grids of 2 MB, warm and cold, and pooling again from one that is mapped."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_cache import FeatureCache
from feature_cache.key import Record
from feature_cache.pooling import pool
from feature_cache.store import NewRecord
from feature_cache.testing import FakeBackbone

from .data import load_real, make_grids
from .harness import OURS, Case, Options, compare_calls, interleave, make_cold, seconds_of

SHAPE = (64, 64, 256)
SIDE = 64
Read = Callable[[int], NDArray[np.float16]]


def run(options: Options) -> list[Case]:
    """Read frames as stored (float16) into new arrays, and pool again."""
    count = 24 if options.quick else 120
    grids = make_grids(options.folder, count, SHAPE).astype(np.float16)
    home = options.folder / "dense"
    home.mkdir()
    reads = open_formats(home, grids)
    for t in range(count):
        for name, read in reads.items():
            if not np.array_equal(read(t).reshape(SHAPE), grids[t]):
                raise AssertionError(f"{name} gives other numbers for frame {t}")
    frames = list(range(count))
    budget = 0.05 if options.quick else 0.3
    named = "a frame of 64 x 64 x 256"
    return [
        compare_calls(f"{named}, warm", "np.memmap", reads, frames, options.rounds, budget),
        compare_cold(f"{named}, cold", home, reads, count, options),
        compare_pooling(home, options, frames),
    ]


def write_cache(root: Path, grids: NDArray[np.float16], codec: Any = "raw") -> Read:
    cache = FeatureCache(root, codec=codec)
    frames = np.arange(len(grids) * SIDE * SIDE, dtype=np.float32).reshape(-1, SIDE, SIDE)
    movie = cache.movie(frames, None, FakeBackbone(dim=SHAPE[2]), pooling=None, name="dense")
    entries = [
        NewRecord(movie.key(t), Record(grid, None), movie.provenance(t))
        for t, grid in enumerate(grids)
    ]
    movie.space.write(entries, {}, codec)

    def read(t: int) -> NDArray[np.float16]:
        [record] = movie.get([t])
        return np.array(record.features)  # type: ignore[union-attr]

    return read


def open_formats(home: Path, grids: NDArray[np.float16]) -> dict[str, Read]:
    import zarr

    reads = {
        OURS: write_cache(home / "cache", grids),
        f"{OURS}, zstd": write_cache(home / "zstd", grids, "zstd"),
    }
    grids.tofile(home / "frames.raw")
    mapped = np.memmap(home / "frames.raw", np.float16, "r", shape=grids.shape)
    reads["np.memmap"] = lambda t: np.array(mapped[t])
    file = os.open(home / "frames.raw", os.O_RDONLY)
    size = grids[0].nbytes
    reads["pread"] = lambda t: np.frombuffer(os.pread(file, size, t * size), np.float16)
    reads["np.fromfile"] = lambda t: np.fromfile(
        home / "frames.raw", np.float16, grids[0].size, offset=t * size
    )
    array = zarr.create_array(
        home / "frames.zarr", data=grids, chunks=(1, *SHAPE), compressors=None
    )
    reads["zarr-python"] = lambda t: array[t]
    return reads


def compare_cold(
    name: str, home: Path, reads: dict[str, Read], count: int, options: Options
) -> Case:
    """Read frames in another order each round, all out of the page cache; verified before."""

    def side(read: Read, place: Path) -> Callable[[], float]:
        seeds = itertools.count()

        def measure() -> float:
            make_cold(place)
            frames = np.random.default_rng(next(seeds)).permutation(count)[:20].tolist()
            return seconds_of(lambda: [read(t) for t in frames]) / len(frames)

        return measure

    places = {"pread": "frames.raw", "np.memmap": "frames.raw", OURS: "cache"}
    sides = {name: side(reads[name], home / place) for name, place in places.items()}
    return Case(name, "pread", interleave(sides, options.rounds))


def compare_pooling(home: Path, options: Options, frames: list[int]) -> Case:
    """Pool a frame that is mapped, and one held in memory as float32."""
    mask = load_real(options.folder)["masks"][0][:512, :512].astype(np.int32)
    cache = FeatureCache(home / "cache", mode="r")
    [space] = cache.spaces()
    keys = [key for name in space.pack_names() for key in keys_of(space.packs_folder / name)]
    held = [np.array(space.read(key[None])[0].features, np.float32) for key in keys]
    sides = {
        "in memory": lambda t: pool(held[t], mask, "mean_patches_exact"),
        OURS: lambda t: pool(space.read(keys[t][None])[0].features, mask, "mean_patches_exact"),
    }
    budget = 0.1 if options.quick else 0.5
    return compare_calls(
        "pooling a frame again", "in memory", sides, frames, options.rounds, budget
    )


def keys_of(pack: Path) -> NDArray[np.uint8]:
    from feature_cache.store.pack_contents import read_keys

    return read_keys(pack)
