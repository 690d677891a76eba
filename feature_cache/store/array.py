"""One array of a pack: its metadata, checked before anything they say is believed; its chunks."""

from __future__ import annotations

import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptRecordError
from .files import open_file, read_json
from .maps import map_file

AnyArray: TypeAlias = NDArray[Any]
DTYPES: Mapping[str, np.dtype[Any]] = {
    "uint8": np.dtype("u1"),
    "uint64": np.dtype("<u8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
CRC_BYTES = 4
_DECODED_LIMIT = 1 << 30
_MAPPED_LIMIT = 1 << 34
_PIECE_BYTES = 1 << 24
_COMPRESSORS: tuple[list[str], ...] = ([], ["zstd"], ["blosc"])


@dataclass(frozen=True, slots=True)
class ArrayFile:
    """A Zarr array on disk; what its metadata say, checked.

    Attributes
    ----------
    path : Path
    shape, chunk_shape : tuple of int
    dtype : dtype
    codec : str
        ``"raw"``, ``"zstd"`` or ``"blosc"``.
    raw : bool
        Whether a chunk's bytes are those of the array, so that it can be mapped.
    separator : str
        Between the parts of the name of a chunk's file; ``"/"`` in packs of version 1 and 2, where
        each chunk has folders of its own.
    """

    path: Path
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str
    raw: bool
    separator: str = "."

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
            meta = read_json(path / "zarr.json")
            shape = tuple(meta["shape"])
            chunk_shape = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
            dtype = DTYPES[meta["data_type"]]
            plain = (meta["zarr_format"], meta["node_type"], meta["chunk_grid"]["name"])
            separator = meta["chunk_key_encoding"]["configuration"]["separator"]
            named = (meta["chunk_key_encoding"]["name"], separator)
            codecs = [(c["name"], c.get("configuration", {})) for c in meta["codecs"]]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptRecordError(f"{path / 'zarr.json'} is no metadata of a pack") from error
        sound = (
            plain == (3, "array", "regular")
            and named in (("default", "."), ("default", "/"))
            and len(shape) == len(chunk_shape)
            and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            and all(type(n) is int and 0 < n < 1 << 48 for n in chunk_shape)
            and _are_ours(codecs)
        )
        codec = codecs[1][0] if sound and len(codecs) > 2 else "raw"
        array = cls(path, shape, chunk_shape, dtype, codec, sound and _is_raw(codecs), separator)
        limit = _MAPPED_LIMIT if array.raw else _DECODED_LIMIT
        if not sound or array.chunk_bytes > limit:
            raise CorruptRecordError(f"{path / 'zarr.json'} describes no array of a pack")
        return array

    @property
    def array_bytes(self) -> int:
        """The size of the array, decoded."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk, decoded."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def map_chunk(self, pack: str, *index: int, whole: bool) -> tuple[AnyArray, mmap.mmap | None]:
        """Map one raw chunk, read-only; read it where the process has many mapped already.

        `whole` says whether all of it is going to be read.
        """
        data: mmap.mmap | bytes | None
        with self._open_chunk(index) as file:
            mapped = data = map_file(file.fileno(), self.chunk_bytes, pack, whole=whole)
            if data is None:
                data = file.read()
                self.check_size(self.chunk_file(*index), len(data))
        values = np.frombuffer(data, self.dtype, math.prod(self.chunk_shape))
        return values.reshape(self.chunk_shape), mapped

    def read_whole(self) -> AnyArray:
        """Read an array of one raw chunk, of at most 1 GiB, into memory, and check its CRC."""
        if not self.raw or self.chunk_shape != tuple(max(1, n) for n in self.shape):
            raise CorruptRecordError(f"{self.path} should be one raw chunk and isn't")
        if math.prod(self.shape) == 0:
            return np.frombuffer(b"", self.dtype).reshape(self.shape)
        if self.chunk_bytes > _DECODED_LIMIT:
            raise CorruptRecordError(f"{self.path} is larger than it can be")
        from google_crc32c import value as crc32c

        index = tuple(0 for _ in self.shape)
        with self._open_chunk(index) as file:
            data = file.read()
        self._check_crc(index, crc32c(data[:-CRC_BYTES]), data[-CRC_BYTES:])
        return np.frombuffer(data, self.dtype, math.prod(self.shape)).reshape(self.shape)

    def check_chunk(self, *index: int) -> None:
        """Read one chunk, piece by piece, and compare its CRC.

        Raises
        ------
        CorruptRecordError
            They are not those that were written.
        FileNotFoundError
            The chunk is gone.
        """
        from google_crc32c import extend

        crc, last = 0, b""
        with self._open_chunk(index) as file:
            while piece := file.read(_PIECE_BYTES):
                data = last + piece
                crc, last = extend(crc, data[:-CRC_BYTES]), data[-CRC_BYTES:]
        self._check_crc(index, crc, last)

    def check_chunk_files(self, start: int, stop: int) -> None:
        """Look at the files of the chunks with some rows, before another reader opens them."""
        length = self.chunk_shape[0]
        for first in range(start // length, -(-stop // length)):
            self._open_chunk((first, *(0 for _ in self.shape[1:]))).close()

    def _open_chunk(self, index: tuple[int, ...]) -> BinaryIO:
        """Open a chunk's file; it has a size that it can have."""
        path = self.chunk_file(*index)
        try:
            file = open_file(path)
        except ValueError as error:
            raise CorruptRecordError(str(error)) from error
        try:
            self.check_size(path, os.fstat(file.fileno()).st_size)
        except CorruptRecordError:
            file.close()
            raise
        return file

    def _check_crc(self, index: tuple[int, ...], crc: int, expected: bytes) -> None:
        if crc.to_bytes(CRC_BYTES, "little") != expected:
            raise CorruptRecordError(
                f"{self.chunk_file(*index)} fails its CRC: its bytes changed since it was written"
            )

    def chunk_indices(self) -> Iterator[tuple[int, ...]]:
        """Give the index of every chunk."""
        counts = [-(-n // c) for n, c in zip(self.shape, self.chunk_shape, strict=True)]
        return product(*map(range, counts))

    def chunk_file(self, *index: int) -> Path:
        """Name the file of a chunk."""
        return self.path / self.separator.join(["c", *map(str, index)])

    def check_size(self, file: Path, size: int) -> None:
        """Raise CorruptRecordError where a chunk's file has another size than it can have."""
        if self.raw and size != self.chunk_bytes + CRC_BYTES:
            raise CorruptRecordError(
                f"{file} has {size} bytes, expected {self.chunk_bytes + CRC_BYTES}"
            )
        if size > 2 * self.chunk_bytes + _PIECE_BYTES:
            raise CorruptRecordError(f"{file} has {size} bytes, more than a compressed chunk can")


def write_array(
    path: Path,
    shape: tuple[int, ...],
    chunk_shape: tuple[int, ...],
    dtype: np.dtype[Any],
    chunks: Iterable[Iterable[AnyArray]],
) -> None:
    """Write a Zarr array as raw chunks, each with its CRC. Copies nothing, syncs nothing.

    Parameters
    ----------
    path : Path
        The array's folder; it is made.
    shape, chunk_shape : tuple of int
        Chunks follow one another along the first axis.
    dtype : dtype
        One of `DTYPES`.
    chunks : iterable of iterables of arrays
        The pieces of each chunk in the order of their bytes, C-contiguous; asked for once, one
        after the other, and written before the next is asked for.
    """
    path.mkdir()
    for number, pieces in enumerate(chunks if shape[0] else ()):
        _write_chunk(path / ".".join(["c", str(number), *("0" for _ in shape[1:])]), pieces)
    (path / "zarr.json").write_text(json.dumps(_describe(shape, chunk_shape, dtype)))


def _write_chunk(file: Path, pieces: Iterable[AnyArray]) -> None:
    from google_crc32c import extend

    crc = 0
    with open(file, "wb") as opened:
        for piece in pieces:
            data = piece.reshape(-1).view(np.uint8)
            crc = extend(crc, data)
            opened.write(data.data)
        opened.write(crc.to_bytes(CRC_BYTES, "little"))


def _describe(
    shape: tuple[int, ...], chunk_shape: tuple[int, ...], dtype: np.dtype[Any]
) -> dict[str, Any]:
    """Give the metadata of a raw array, as the specification of Zarr v3 has them."""
    order = {"configuration": {"endian": "little"}} if dtype.itemsize > 1 else {}
    return {
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk_shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0,
        "codecs": [{"name": "bytes", **order}, {"name": "crc32c"}],
        "attributes": {},
        "zarr_format": 3,
        "node_type": "array",
        "storage_transformers": [],
    }


def _are_ours(codecs: Sequence[tuple[str, Any]]) -> bool:
    """Tell whether these are codecs that a pack may have; no other is ever run."""
    names = [name for name, _ in codecs]
    return [*names[:1], *names[-1:]] == ["bytes", "crc32c"] and names[1:-1] in _COMPRESSORS


def _is_raw(codecs: Sequence[tuple[str, Any]]) -> bool:
    if len(codecs) != 2:
        return False
    return codecs[0][1] in ({}, {"endian": "little"}) and codecs[1][1] == {}
