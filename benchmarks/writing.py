"""Writing records of 50 regions: packs small and large, with and without fsync."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np

from feature_cache import FeatureCache
from feature_cache.cache import MovieFeatures
from feature_cache.store import NewRecord

from .data import Collection
from .harness import OURS, Case, Options, interleave, seconds_of

Write = Callable[[Path, Sequence[NewRecord]], None]
RECORDS = {"small pack": 8, "large pack": 2560}


def run(options: Options) -> list[Case]:
    """Compare what it takes to write the same records, into an empty folder each time."""
    counts = {"small pack": 8, "large pack": 640} if options.quick else RECORDS
    cases = []
    for name, count in counts.items():
        movie, entries = make_entries(options, count)
        size = sum(entry.record.features.nbytes for entry in entries) / 1e6
        for synced in (False, True):
            title = f"{name} ({size:.3g} MB), fsync {'with' if synced else 'aside'}"
            sides = sides_of(movie, entries, options.folder, synced=synced)
            cases.append(Case(title, "write()", interleave(sides, options.rounds)))
    return cases


def make_entries(options: Options, count: int) -> tuple[MovieFeatures, list[NewRecord]]:
    collection = Collection(options.folder, 1, 1, count, 50)
    movie = collection.bind(FeatureCache(options.folder / "nothing"), 0)[0]
    return movie, collection.entries(0, 0, movie)


def sides_of(
    movie: MovieFeatures, entries: Sequence[NewRecord], folder: Path, *, synced: bool
) -> dict[str, Callable[[], float]]:
    writes: dict[str, Write] = {
        "write()": write_raw,
        OURS: lambda place, entries: write_ours(place, entries, movie),
        "zarr-python": write_zarr,
        "HDF5, dataset a record": write_hdf5,
        "LMDB": write_lmdb,
    }

    def side(write: Write) -> Callable[[], float]:
        def measure() -> float:
            place = folder / "written"
            place.mkdir()
            unsynced = nullcontext() if synced else patch("os.fsync", lambda _: None)
            with unsynced:
                taken = seconds_of(lambda: write_and_sync(write, place, entries, synced=synced))
            shutil.rmtree(place)
            return taken

        return measure

    return {name: side(write) for name, write in writes.items()}


def write_and_sync(
    write: Write, place: Path, entries: Sequence[NewRecord], *, synced: bool
) -> None:
    """Write, and have others synced as ours is: every file and folder."""
    write(place, entries)
    if synced and write is not write_lmdb and not (place / "cache").exists():
        for path in (*place.rglob("*"), place):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def write_raw(place: Path, entries: Sequence[NewRecord]) -> None:
    with open(place / "raw", "wb", buffering=0) as file:
        for entry in entries:
            file.write(entry.record.features.data)


def write_ours(place: Path, entries: Sequence[NewRecord], movie: MovieFeatures) -> None:
    FeatureCache(place / "cache").space(movie.spec).write(entries, {})


def write_zarr(place: Path, entries: Sequence[NewRecord]) -> None:
    import zarr

    rows = np.concatenate([entry.record.features for entry in entries])
    zarr.create_array(place / "array.zarr", data=rows, chunks=rows.shape, compressors=None)


def write_hdf5(place: Path, entries: Sequence[NewRecord]) -> None:
    import h5py

    with h5py.File(place / "file.h5", "w") as file:
        for entry in entries:
            file[entry.key.hex()] = entry.record.features


def write_lmdb(place: Path, entries: Sequence[NewRecord]) -> None:
    import lmdb

    synced = os.fsync.__module__ == "posix"  # and not replaced
    with (
        lmdb.open(str(place), map_size=1 << 32, sync=synced) as database,
        database.begin(write=True) as transaction,
    ):
        for entry in entries:
            transaction.put(entry.key, entry.record.features.data)
