"""One array of a pack: its metadata, checked before anything they say is believed; its files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby, product
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptRecordError
from ..hashing import JSON
from ..system import read_at
from .files import open_file, read_json

AnyArray: TypeAlias = NDArray[Any]
DTYPES: Mapping[str, np.dtype[Any]] = {
    "uint8": np.dtype("u1"),
    "uint64": np.dtype("<u8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
CODECS = ("raw", "zstd", "blosc")
"""How features are stored; all of them lossless, so none of them is in a key."""

_CRC_BYTES, _PLACE_BYTES = 4, 16
"""At the end of each chunk; of each chunk in the list at the end of a shard."""
DECODED_LIMIT, _CHUNKS_LIMIT = 1 << 30, 1 << 20
"""The most bytes of what is decoded as a whole, and chunks of an array: others are not read."""
_PIECE_BYTES = 1 << 24
_COMPRESSORS: tuple[list[str], ...] = ([], ["zstd"], ["blosc"])
_SHARD_INDEX: dict[str, JSON] = {
    "index_codecs": [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "crc32c"},
    ],
    "index_location": "end",
}


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """A Zarr array on disk; what its metadata say, checked.

    Attributes
    ----------
    path : Path
    shape, chunk_shape : tuple of int
    file_shape : tuple of int
        What one file holds: a chunk, or a shard of several.
    dtype : dtype
    codec : str
        One of `CODECS`.
    is_shard : bool
        Whether files are shards, as Zarr's codec `sharding_indexed` writes them.
    separator : str
        Between the parts of a file's name; ``"/"`` in packs of version 1 and 2, where each chunk
        has folders of its own.
    attributes : mapping
    """

    path: Path
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    file_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str
    is_shard: bool
    separator: str
    attributes: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> ArrayFile:
        """Read the metadata.

        Raises
        ------
        CorruptRecordError
            They are not those of an array of a pack.
        """
        if path.is_symlink() or (path / "c").is_symlink():
            raise CorruptRecordError(f"{path} is a link: no part of a pack lies elsewhere")
        try:
            array = cls._parse(path, read_json(path / "zarr.json"))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CorruptRecordError(f"{path / 'zarr.json'} is no metadata of a pack") from error
        if array is None:
            raise CorruptRecordError(f"{path / 'zarr.json'} describes no array of a pack")
        return array

    @classmethod
    def _parse(cls, path: Path, meta: Mapping[str, Any]) -> ArrayFile | None:
        """Give what metadata say; None for an array that no pack has."""
        shape, dtype = tuple(meta["shape"]), DTYPES[meta["data_type"]]
        file_shape = chunk_shape = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
        naming, codecs = meta["chunk_key_encoding"], meta["codecs"]
        separator = naming["configuration"]["separator"]
        if is_shard := codecs[0]["name"] == "sharding_indexed":
            shard = dict(codecs[0]["configuration"])
            chunk_shape, inside = tuple(shard.pop("chunk_shape")), shard.pop("codecs")
            if len(codecs) != 1 or shard != _SHARD_INDEX:
                return None
            codecs = inside
        plain = (meta["zarr_format"], meta["node_type"], meta["chunk_grid"]["name"])
        names = [codec["name"] for codec in codecs]
        sound = (
            plain == (3, "array", "regular")
            and (naming["name"], separator) in (("default", "."), ("default", "/"))
            and len(shape) == len(chunk_shape) == len(file_shape) > 0
            and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            and all(type(n) is int and 0 < n < 1 << 48 for n in (*chunk_shape, *file_shape))
            and not any(n % m for n, m in zip(file_shape, chunk_shape, strict=True))
            and [*names[:1], *names[-1:]] == ["bytes", "crc32c"]
            and names[1:-1] in _COMPRESSORS  # no other is ever run
            and codecs[0].get("configuration", {}) in ({}, {"endian": "little"})
        )
        if not sound:
            return None
        codec = "".join(names[1:-1]) or "raw"
        array = cls(
            *(path, shape, chunk_shape, file_shape, dtype, codec, is_shard, separator),
            dict(meta.get("attributes", {})),
        )
        # A compressed chunk is decoded as a whole: metadata that lie must not fill the memory.
        fits = array.is_direct or math.prod(chunk_shape) * dtype.itemsize <= DECODED_LIMIT
        counts = array.chunks_in_file, math.prod(array.file_counts)
        return array if fits and max(counts) <= _CHUNKS_LIMIT else None

    @property
    def row_bytes(self) -> int:
        """The size of one step along the first axis, decoded."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def array_bytes(self) -> int:
        """The size of the array, decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunks_in_file(self) -> int:
        """How many chunks a file holds."""
        return math.prod(self.file_shape) // math.prod(self.chunk_shape)

    @property
    def file_counts(self) -> tuple[int, ...]:
        """How many files there are along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.shape, self.file_shape, strict=True))

    @property
    def is_direct(self) -> bool:
        """Whether one file holds the array's bytes as they are: a chunk, or one for each row."""
        whole = (max(1, self.shape[0]), *self.shape[1:])
        chunk = (1, *self.shape[1:]) if self.is_shard else whole
        return self.codec == "raw" and (self.file_shape, self.chunk_shape) == (whole, chunk)

    def open_rows(self) -> int:
        """Open the file of a direct array with rows; give its descriptor, for `read_rows`.

        Raises
        ------
        CorruptRecordError
            It has another size than it can have, or is no plain file.
        FileNotFoundError
            It is gone.
        """
        with self._open_file(tuple(0 for _ in self.shape)) as file:
            return os.dup(file.fileno())

    def read_rows(self, descriptor: int, start: int, stop: int) -> AnyArray:
        """Read rows of a direct array: (stop - start, …), of one with shards one row at a time.

        Raises
        ------
        CorruptRecordError
            The file was cut short.
        """
        place = start * (self.row_bytes + self.is_shard * _CRC_BYTES)
        data = read_at(descriptor, (stop - start) * self.row_bytes, place)
        if len(data) != (stop - start) * self.row_bytes:
            raise CorruptRecordError(f"{self.path} was cut short")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])

    def read_whole(self) -> AnyArray:
        """Read an array of one raw chunk, of at most 1 GiB, into memory, and check its CRC."""
        if not self.is_direct or self.is_shard:
            raise CorruptRecordError(f"{self.path} should be one raw chunk and isn't")
        if self.array_bytes == 0:
            return np.frombuffer(b"", self.dtype).reshape(self.shape)
        if self.array_bytes > DECODED_LIMIT:
            raise CorruptRecordError(f"{self.path} is larger than it can be")
        from google_crc32c import value as crc32c

        index = tuple(0 for _ in self.shape)
        with self._open_file(index) as file:
            data = file.read()
        self._check_crc(index, crc32c(data[:-_CRC_BYTES]), data[-_CRC_BYTES:])
        return np.frombuffer(data, self.dtype, math.prod(self.shape)).reshape(self.shape)

    def check_file(self, *index: int) -> None:
        """Read one file, piece by piece, and compare the CRC of each chunk in it.

        Raises
        ------
        CorruptRecordError
            They are not those that were written.
        FileNotFoundError
            The file is gone.
        """
        with self._open_file(index) as file:
            sizes = [size for place, size in self._read_places(file, index) if place >= 0]
            left = os.fstat(file.fileno()).st_size - sum(sizes)  # the list of them, in a shard
            for length in [*sizes, left] if left else sizes:
                self._check_part(file, index, length)

    def _read_places(self, file: BinaryIO, index: tuple[int, ...]) -> list[list[int]]:
        """Give place and size of each chunk in a file; a place of -1 where there is none."""
        size = os.fstat(file.fileno()).st_size
        if not self.is_shard:
            return [[0, size]]
        listed = self.chunks_in_file * _PLACE_BYTES + _CRC_BYTES
        places = np.frombuffer(read_at(file.fileno(), listed, max(0, size - listed)), "u1")
        if len(places) < listed:
            raise CorruptRecordError(f"{self.chunk_file(*index)} was cut short")
        pairs = places[:-_CRC_BYTES].view("<u8").reshape(-1, 2).astype(np.int64)
        there = pairs[pairs[:, 0] >= 0]
        starts = np.sort(there[:, 0]).tolist()
        # No gap, no overlap: `check_file` goes through them in a row, and leaves no byte out.
        if [*starts, size - listed] != np.cumsum([0, *there[:, 1]]).tolist():
            raise CorruptRecordError(f"the chunks in {self.chunk_file(*index)} don't fill it")
        return pairs.tolist()

    def _check_part(self, file: BinaryIO, index: tuple[int, ...], length: int) -> None:
        from google_crc32c import extend

        crc, left = 0, length - _CRC_BYTES
        while left > 0 and (piece := file.read(min(left, _PIECE_BYTES))):
            crc, left = extend(crc, piece), left - len(piece)
        self._check_crc(index, crc, file.read(_CRC_BYTES))

    def decode_rows(self, start: int, stop: int) -> AnyArray:
        """Read rows of an array that is not direct: (stop - start, …).

        Not by Zarr, which reads in threads: where none starts, as while an interpreter ends, what
        is sound would seem damaged.

        Raises
        ------
        CorruptRecordError, FileNotFoundError
            A chunk fails its CRC; a file is gone.
        ValueError, RuntimeError
            A chunk can't be decoded.
        """
        rows, in_file = self.chunk_shape[0], self.chunks_in_file
        numbers = range(start // rows, -(-stop // rows))
        chunks = [np.empty((0, *self.shape[1:]), self.dtype)]
        for first, group in groupby(numbers, lambda number: number // in_file):
            index = (first, *(0 for _ in self.shape[1:]))
            with self._open_file(index) as file:
                places = self._read_places(file, index)
                chunks += [self._decode_chunk(file, index, *places[n % in_file]) for n in group]
        wanted = np.concatenate(chunks)[start - numbers.start * rows :][: stop - start]
        return wanted.copy()  # or a few rows would keep whole chunks in memory

    def _decode_chunk(
        self, file: BinaryIO, index: tuple[int, ...], place: int, size: int
    ) -> AnyArray:
        from google_crc32c import value as crc32c

        # Of the size that it should have: what lies of it fills no memory.
        chunk = np.zeros(self.chunk_shape, self.dtype)
        if place >= 0:
            data = read_at(file.fileno(), size, place)
            self._check_crc(index, crc32c(data[:-_CRC_BYTES]), data[-_CRC_BYTES:])
            if self.codec == "raw":
                return np.frombuffer(data, self.dtype, chunk.size).reshape(chunk.shape)
            _coder(self.codec).decode(data[:-_CRC_BYTES], out=chunk)
        return chunk

    def _open_file(self, index: tuple[int, ...]) -> BinaryIO:
        """Open a file of chunks; it has a size that it can have."""
        path = self.chunk_file(*index)
        try:
            file = open_file(path)
        except ValueError as error:
            raise CorruptRecordError(str(error)) from error
        try:
            self._check_size(path, os.fstat(file.fileno()).st_size)
        except CorruptRecordError:
            file.close()
            raise
        return file

    def _check_crc(self, index: tuple[int, ...], crc: int, expected: bytes) -> None:
        if crc.to_bytes(_CRC_BYTES, "little") != expected:
            raise CorruptRecordError(
                f"{self.chunk_file(*index)} fails its CRC: its bytes changed since it was written"
            )

    def file_indices(self) -> Iterator[tuple[int, ...]]:
        """Give the index of every file."""
        return product(*map(range, self.file_counts))

    def chunk_file(self, *index: int) -> Path:
        """Name the file of a chunk, or shard."""
        return self.path / self.separator.join(["c", *map(str, index)])

    def _check_size(self, file: Path, size: int) -> None:
        decoded = math.prod(self.file_shape) * self.dtype.itemsize
        around = self.chunks_in_file * _CRC_BYTES
        around += (self.chunks_in_file * _PLACE_BYTES + _CRC_BYTES) * self.is_shard
        if self.codec == "raw" and self.is_direct and size != decoded + around:
            raise CorruptRecordError(f"{file} has {size} bytes, expected {decoded + around}")
        # What can't be compressed becomes a little longer, never twice as long.
        if size > 2 * decoded + around + _PIECE_BYTES:
            raise CorruptRecordError(f"{file} has {size} bytes, more than a compressed chunk can")


def write_array(
    path: Path,
    array: AnyArray,
    *,
    chunk_rows: int | None = None,
    codec: str = "raw",
    attributes: Mapping[str, JSON] | None = None,
) -> None:
    """Write a Zarr array with one file of chunks. Syncs nothing.

    Parameters
    ----------
    path : Path
        The array's folder; it is made.
    array : array
        Of one of `DTYPES`.
    chunk_rows : int, optional
        How many rows a chunk of a shard has; by default all is one chunk, and no shard.
    codec : str
        One of `CODECS`.
    attributes : mapping, optional
    """
    rows = chunk_rows or max(1, len(array))
    metadata = _metadata(array, rows, codec, is_shard=chunk_rows is not None)
    path.mkdir(parents=True)
    text = json.dumps({**metadata, "attributes": dict(attributes or {})}, indent=2)
    (path / "zarr.json").write_text(text, encoding="utf-8")
    if array.size:
        with open(path / ".".join(["c", *"0" * array.ndim]), "wb") as file:
            _write_chunks(file, array, rows, codec, is_shard=chunk_rows is not None)


def _metadata(array: AnyArray, rows: int, codec: str, *, is_shard: bool) -> dict[str, JSON]:
    """Give what the zarr.json says of an array, but its attributes."""
    name, shape = array.dtype.name, [rows, *array.shape[1:]]
    number: JSON = {"endian": "little"}
    pipeline: list[JSON] = [
        {"name": "bytes", "configuration": number} if array.itemsize > 1 else {"name": "bytes"},
        *_compressor(codec, array.itemsize),
        {"name": "crc32c"},
    ]
    in_file = shape
    if is_shard:
        inside: dict[str, JSON] = {"chunk_shape": [*shape], "codecs": pipeline, **_SHARD_INDEX}
        pipeline = [{"name": "sharding_indexed", "configuration": inside}]
        in_file = [-(-max(1, len(array)) // rows) * rows, *array.shape[1:]]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [*array.shape],
        "data_type": name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [*in_file]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if array.dtype.kind == "f" else 0,
        "codecs": pipeline,
        "storage_transformers": [],
    }


def _compressor(codec: str, itemsize: int) -> list[JSON]:
    chosen: dict[str, dict[str, JSON]] = {
        "zstd": {"level": 3, "checksum": False},
        "blosc": {"typesize": itemsize, "cname": "zstd", "clevel": 3, "shuffle": "shuffle",
                  "blocksize": 0},
    }  # fmt: skip
    return [{"name": codec, "configuration": chosen[codec]}] if codec != "raw" else []


def _write_chunks(
    file: BinaryIO, array: AnyArray, rows: int, codec: str, *, is_shard: bool
) -> None:
    """Write the chunks one after another, each with its CRC, and at the end of a shard their list.

    Not by Zarr, which writes in threads: from Python 3.12 on, none starts while an interpreter
    ends, and that is when a training commits the last it has computed.
    """
    from google_crc32c import value as crc32c

    def write(data: bytes) -> int:
        return file.write(data) + file.write(crc32c(data).to_bytes(_CRC_BYTES, "little"))

    places, place = [], 0
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        # Chunks are all of one size: Zarr fills up the last one.
        if len(part) < rows:
            part = np.concatenate([part, np.zeros((rows - len(part), *part.shape[1:]), part.dtype)])
        size = write(_compress(np.ascontiguousarray(part), codec))
        places.append((place, size))
        place += size
    if is_shard:
        write(np.array(places, "<u8").tobytes())


def _compress(chunk: AnyArray, codec: str) -> bytes:
    if codec == "raw":
        return chunk.tobytes()
    return bytes(_coder(codec).encode(chunk))


def _coder(codec: str) -> Any:
    from numcodecs import Blosc, Zstd

    return Zstd(level=3) if codec == "zstd" else Blosc("zstd", clevel=3, shuffle=Blosc.SHUFFLE)
