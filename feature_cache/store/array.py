"""One array of a pack: its metadata, checked before anything they say is believed; its chunks."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptRecordError
from .files import open_file, read_file, read_json
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
    """

    path: Path
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    codec: str
    raw: bool

    @classmethod
    def read(cls, path: Path) -> ArrayFile:
        """Read the metadata.

        Raises
        ------
        CorruptRecordError
            They are not those of an array of a pack.
        """
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
            and named == ("default", "/")
            and len(shape) == len(chunk_shape)
            and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
            and all(type(n) is int and 0 < n < 1 << 48 for n in chunk_shape)
            and _are_ours(codecs)
        )
        codec = codecs[1][0] if sound and len(codecs) > 2 else "raw"
        array = cls(path, shape, chunk_shape, dtype, codec, sound and _is_raw(codecs))
        if not sound or not (array.raw or array.chunk_bytes <= _DECODED_LIMIT):
            raise CorruptRecordError(f"{path / 'zarr.json'} describes no array of a pack")
        return array

    @property
    def chunk_bytes(self) -> int:
        """The size of a chunk, decoded."""
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def map_chunk(self, pack: str, *index: int) -> tuple[AnyArray, mmap.mmap | None]:
        """Map one raw chunk, read-only; read it where the process has many mapped already."""
        data: mmap.mmap | bytes | None
        path = self.chunk_file(*index)
        with open_file(path) as file:
            self.check_size(path, os.fstat(file.fileno()).st_size)
            mapped = data = map_file(file.fileno(), self.chunk_bytes, pack)
            if data is None:
                data = read_file(path, self.chunk_bytes + CRC_BYTES)
                self.check_size(path, len(data))
        values = np.frombuffer(data, self.dtype, math.prod(self.chunk_shape))
        return values.reshape(self.chunk_shape), mapped

    def read_whole(self) -> AnyArray:
        """Read an array of one raw chunk into memory, and check its CRC."""
        if not self.raw or self.chunk_shape != tuple(max(1, n) for n in self.shape):
            raise CorruptRecordError(f"{self.path} should be one raw chunk and isn't")
        if math.prod(self.shape) == 0:
            return np.frombuffer(b"", self.dtype).reshape(self.shape)
        data = self.check_chunk(*(0 for _ in self.shape))
        return np.frombuffer(data, self.dtype, math.prod(self.shape)).reshape(self.shape)

    def check_chunk(self, *index: int) -> bytes:
        """Read the bytes of one chunk, and compare their CRC.

        Raises
        ------
        CorruptRecordError
            They are not those that were written.
        FileNotFoundError
            The chunk is gone.
        """
        from google_crc32c import value as crc32c

        file = self.chunk_file(*index)
        try:
            data = read_file(file, (self.chunk_bytes if self.raw else _DECODED_LIMIT) + CRC_BYTES)
        except ValueError as error:
            raise CorruptRecordError(str(error)) from error
        if self.raw:
            self.check_size(file, len(data))
        if crc32c(data[:-CRC_BYTES]) != int.from_bytes(data[-CRC_BYTES:], "little"):
            raise CorruptRecordError(
                f"{file} fails its CRC: its bytes changed since it was written"
            )
        return data

    def chunk_indices(self) -> Iterator[tuple[int, ...]]:
        """Give the index of every chunk."""
        counts = [-(-n // c) for n, c in zip(self.shape, self.chunk_shape, strict=True)]
        return product(*map(range, counts))

    def chunk_file(self, *index: int) -> Path:
        """Name the file of a chunk."""
        return self.path.joinpath("c", *map(str, index))

    def check_size(self, file: Path, size: int) -> None:
        """Raise CorruptRecordError where a raw chunk's file has another size than it should."""
        if size != self.chunk_bytes + CRC_BYTES:
            raise CorruptRecordError(
                f"{file} has {size} bytes, expected {self.chunk_bytes + CRC_BYTES}"
            )


def _are_ours(codecs: Sequence[tuple[str, Any]]) -> bool:
    """Tell whether these are codecs that a pack may have; no other is ever run."""
    names = [name for name, _ in codecs]
    return [*names[:1], *names[-1:]] == ["bytes", "crc32c"] and names[1:-1] in _COMPRESSORS


def _is_raw(codecs: Sequence[tuple[str, Any]]) -> bool:
    if len(codecs) != 2:
        return False
    return codecs[0][1] in ({}, {"endian": "little"}) and codecs[1][1] == {}
