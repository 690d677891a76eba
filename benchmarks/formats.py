"""The ways to keep features that a user would take instead: each writes a collection, and gives
what reads a window of it as a new float16 array (frames * regions, C)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .data import Collection, Window
from .harness import seconds_each

Read = Callable[[Window], NDArray[np.float16]]
Open = Callable[[Path, Collection], Read]


def open_memmap(folder: Path, collection: Collection) -> Read:
    shape = (
        *(collection.movies, collection.copies, collection.frames),
        *(collection.regions, collection.width),
    )
    mapped = np.memmap(folder / "features.raw", np.float16, "w+", shape=shape)
    for movie, copy, features in collection.each():
        mapped[movie, copy] = features
    mapped.flush()
    mapped = np.memmap(folder / "features.raw", np.float16, "r", shape=shape)

    def read(window: Window) -> NDArray[np.float16]:
        part = mapped[window.movie, window.copy, window.start : window.stop]
        return np.array(part).reshape(-1, collection.width)

    return read


def open_memory(folder: Path, collection: Collection) -> Read:
    held = {(movie, copy): features for movie, copy, features in collection.each()}

    def read(window: Window) -> NDArray[np.float16]:
        part = held[window.movie, window.copy][window.start : window.stop]
        return part.copy().reshape(-1, collection.width)

    return read


def open_zarr_naive(folder: Path, collection: Collection) -> Read:
    """Keep an array a frame, with the default codec, in a group a copy."""
    import zarr

    root = zarr.open_group(folder / "naive.zarr", mode="w")
    for movie, copy, features in collection.each():
        group = root.create_group(f"{movie}/{copy}")
        for t, frame in enumerate(features):
            group.create_array(str(t), data=frame)

    def read(window: Window) -> NDArray[np.float16]:
        group = root[f"{window.movie}/{window.copy}"]
        return np.concatenate([group[str(t)][:] for t in window.frames])

    return read


def write_zarr(folder: Path, collection: Collection, frames_a_chunk: int) -> Path:
    """Write one array for all, uncompressed."""
    import zarr

    path = folder / f"chunks-of-{frames_a_chunk}.zarr"
    shape = (
        *(collection.movies * collection.copies, collection.frames),
        *(collection.regions, collection.width),
    )
    array = zarr.create_array(
        path, shape=shape, dtype="float16", chunks=(1, frames_a_chunk, *shape[2:]),
        compressors=None, overwrite=True,
    )  # fmt: skip
    for row, (_, _, features) in enumerate(collection.each()):
        array[row] = features
    return path


def _best(reads: Iterator[Read], collection: Collection) -> Read:
    windows = collection.windows(20, seed=1)
    return min(reads, key=lambda read: seconds_each(read, windows, 0.05))


def _chunkings(collection: Collection) -> tuple[int, ...]:
    return (1, 4, collection.frames)


def open_zarr_best(folder: Path, collection: Collection) -> Read:
    """Keep one open array, with the chunks that read fastest."""
    import zarr

    def open_one(frames_a_chunk: int) -> Read:
        array = zarr.open_array(write_zarr(folder, collection, frames_a_chunk), mode="r")

        def read(window: Window) -> NDArray[np.float16]:
            row = window.movie * collection.copies + window.copy
            return array[row, window.start : window.stop].reshape(-1, collection.width)

        return read

    return _best(map(open_one, _chunkings(collection)), collection)


def open_tensorstore(folder: Path, collection: Collection) -> Read:
    """Keep the same arrays, read by tensorstore."""
    import tensorstore

    def open_one(frames_a_chunk: int) -> Read:
        path = write_zarr(folder, collection, frames_a_chunk)
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
        array = tensorstore.open(spec, read=True).result()

        def read(window: Window) -> NDArray[np.float16]:
            row = window.movie * collection.copies + window.copy
            part = array[row, window.start : window.stop].read().result()
            return part.reshape(-1, collection.width)

        return read

    return _best(map(open_one, _chunkings(collection)), collection)


def open_hdf5(folder: Path, collection: Collection) -> Read:
    """Keep a file a movie with a dataset a frame, opened for each sample, as the predecessor."""
    import h5py

    for movie, copy, features in collection.each():
        with h5py.File(folder / f"{movie}.h5", "a") as file:
            for t, frame in enumerate(features):
                file[f"{copy}/{t}"] = frame

    def read(window: Window) -> NDArray[np.float16]:
        with h5py.File(folder / f"{window.movie}.h5", "r") as file:
            return np.concatenate([file[f"{window.copy}/{t}"][:] for t in window.frames])

    return read


def open_lmdb(folder: Path, collection: Collection) -> Read:
    """Keep a value a frame."""
    import lmdb

    database = lmdb.open(str(folder), map_size=1 << 36)
    for movie, copy, features in collection.each():
        with database.begin(write=True) as transaction:
            for t, frame in enumerate(features):
                transaction.put(f"{movie}/{copy}/{t}".encode(), frame.tobytes())

    def read(window: Window) -> NDArray[np.float16]:
        with database.begin(buffers=True) as transaction:
            values = [
                transaction.get(f"{window.movie}/{window.copy}/{t}".encode()) for t in window.frames
            ]
            frames = [np.frombuffer(value, np.float16) for value in values]
            return np.concatenate(frames).reshape(-1, collection.width)

    return read


def open_safetensors(folder: Path, collection: Collection) -> Read:
    """Keep a file a movie with a tensor a copy, open, of which a slice is read."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    for movie in range(collection.movies):
        copies = {str(k): collection.features(movie, k) for k in range(collection.copies)}
        save_file(copies, folder / f"{movie}.safetensors")

    @cache
    def open_movie(movie: int) -> Any:
        return safe_open(folder / f"{movie}.safetensors", framework="numpy")

    def read(window: Window) -> NDArray[np.float16]:
        part = open_movie(window.movie).get_slice(str(window.copy))[window.start : window.stop]
        return part.reshape(-1, collection.width)

    return read


def open_litdata(folder: Path, collection: Collection) -> Read:
    """Keep an item a frame, in chunks of 64 MB."""
    from litdata import StreamingDataset
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=1 << 26)
    for number, (_, _, features) in enumerate(collection.each()):
        for t, frame in enumerate(features):
            writer[number * collection.frames + t] = frame
    writer.done()
    writer.merge()
    items = StreamingDataset(str(folder))

    def read(window: Window) -> NDArray[np.float16]:
        first = (window.movie * collection.copies + window.copy) * collection.frames
        return np.concatenate([items[first + t] for t in window.frames])

    return read


def open_npy(folder: Path, collection: Collection) -> Read:
    """Keep a file a frame."""
    for movie, copy, features in collection.each():
        home = folder / str(movie) / str(copy)
        home.mkdir(parents=True)
        for t, frame in enumerate(features):
            np.save(home / f"{t}.npy", frame)

    def read(window: Window) -> NDArray[np.float16]:
        home = folder / str(window.movie) / str(window.copy)
        return np.concatenate([np.load(home / f"{t}.npy") for t in window.frames])

    return read


FORMATS: dict[str, Open] = {
    "np.memmap": open_memmap,
    "in memory": open_memory,
    "LMDB": open_lmdb,
    "safetensors": open_safetensors,
    "LitData": open_litdata,
    ".npy a frame": open_npy,
    "HDF5 file a sample": open_hdf5,
    "tensorstore": open_tensorstore,
    "zarr-python, best chunks": open_zarr_best,
    "zarr-python, array a frame": open_zarr_naive,
}


def open_formats(folder: Path, collection: Collection) -> dict[str, Read]:
    """Write and open the collection in all formats, each in a folder; say what is not installed."""
    reads = {}
    for name, opener in FORMATS.items():
        try:
            reads[name] = opener(make_folder(folder, name), collection)
        except ImportError as error:
            print(f"{name} is left out: {error}")
    return reads


def make_folder(folder: Path, name: str) -> Path:
    """Make the folder of a format."""
    made = folder / name.strip(".").replace(" ", "-").replace(",", "")
    made.mkdir(parents=True)
    return made
