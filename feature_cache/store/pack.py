"""Packs: immutable Zarr v3 groups, each with many records of one space.

::

    <pack>/zarr.json       group; its attributes hold the provenance
      keys       (n, 16) uint8   the record keys
      offsets    (n + 1,) int64  regions: record i has rows offsets[i] to offsets[i + 1]
      checksums  (n,) uint64     xxh3-64 over key, shape, labels and features of each record
      labels     (R,) int32      regions only
      features   (R, C)          regions: one chunk, or (n, gh, gw, C): grids, one chunk a frame

`write_pack` goes through zarr-python. `Pack` maps the raw bytes of chunks that are stored as such,
after checking every size it relies on, and leaves packs with a codec to zarr-python.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import resource
import secrets
import shutil
import socket
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptRecordError, UnknownNameError
from ..hashing import DIGEST_BYTES, JSON, Digest, digest_bytes
from ..key import Keys, Record

if TYPE_CHECKING:
    import zarr

PACK_VERSION = 1
CODECS = ("raw", "zstd", "blosc")
"""How features are stored; all of them lossless, so none of them is in a key."""

TEMPORARY_PREFIX = ".tmp-"
_CRC_BYTES = 4
_COMPRESSED_CHUNK_BYTES = 1 << 20
_DTYPES: Mapping[str, np.dtype[Any]] = {
    "uint8": np.dtype("u1"),
    "uint64": np.dtype("<u8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
}
_MAPS_LIMIT = 1 << 14
_maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()

AnyArray: TypeAlias = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Entry:
    """One record on its way into a pack.

    Parameters
    ----------
    key : bytes, 16
    record : Record
        In the storage dtype.
    provenance : mapping of str to JSON
        Where the record comes from; for people, never read to find it.
    """

    key: Digest
    record: Record
    provenance: Mapping[str, JSON]


def record_checksum(key: bytes, record: Record) -> int:
    """Sum up a record with its key and shape, so that swapped or reshaped ones are found too."""
    hasher = xxhash.xxh3_64(key)
    hasher.update(np.array(record.features.shape, "<i8").data)
    if record.labels is not None:
        hasher.update(np.ascontiguousarray(record.labels, "<i4").data)
    hasher.update(np.ascontiguousarray(record.features).reshape(-1).view(np.uint8).data)
    return hasher.intdigest()


def write_pack(
    folder: Path, entries: Sequence[Entry], provenance: Mapping[str, JSON], codec: str = "raw"
) -> str:
    """Commit records as one new pack in `folder`.

    The pack is written under a temporary name, synced, and renamed: it is there as a whole or not
    at all. Its name is a digest of its keys and checksums, so writing the same again changes
    nothing.

    Parameters
    ----------
    folder : Path
        The space's ``packs`` folder; it must exist.
    entries : sequence of Entry
        At least one; all of one kind, dtype and width (grids: of one shape), keys unique.
    provenance : mapping
        What is common to the records.
    codec : str
        One of `CODECS`.

    Returns
    -------
    str
        The pack's name.

    Raises
    ------
    ValueError
        For entries that could not be read back as they are; nothing is written.
    OSError
        When the disk is full or the folder can't be written; nothing is left behind.
    """
    if codec not in CODECS:
        raise UnknownNameError("codec", codec, CODECS)
    _check_entries(entries)
    arrays = _pack_arrays(entries)
    name = digest_bytes(arrays["keys"].tobytes(), arrays["checksums"].tobytes()).hex()
    temporary = folder / f"{TEMPORARY_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(8)}"
    attributes = {**provenance, "records": [dict(entry.provenance) for entry in entries]}
    try:
        _write_group(temporary, arrays, attributes, codec)
        _sync_tree(temporary)
        _rename_new(temporary, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(folder)
    return name


def _check_entries(entries: Sequence[Entry]) -> None:
    dtypes = {entry.record.features.dtype for entry in entries}
    if dtypes not in ({_DTYPES["float16"]}, {_DTYPES["float32"]}):
        found = ", ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(f"a pack of dtypes {found}: expected all float16 or all float32")
    if len({entry.key for entry in entries}) < len(entries):
        raise ValueError("a pack can't hold the same key twice")
    for entry in entries:
        features, labels = entry.record.features, entry.record.labels
        fits = features.ndim > 2 if labels is None else labels.shape == features.shape[:-1]
        if len(entry.key) != DIGEST_BYTES or not fits:
            raise ValueError(
                f"record {entry.key.hex()} has features {features.shape} and labels "
                f"{None if labels is None else labels.shape}: expected a key of {DIGEST_BYTES} "
                "bytes, and (N, C) with (N,), or a grid without labels"
            )


def _pack_arrays(entries: Sequence[Entry]) -> dict[str, AnyArray]:
    records = [entry.record for entry in entries]
    keys = np.frombuffer(b"".join(entry.key for entry in entries), np.uint8).reshape(-1, 16)
    checksums = [record_checksum(entry.key, entry.record) for entry in entries]
    arrays: dict[str, AnyArray] = {"keys": keys, "checksums": np.array(checksums, np.uint64)}
    labels = [record.labels for record in records if record.labels is not None]
    if not labels:
        arrays["features"] = np.stack([record.features for record in records])
        return arrays
    arrays["offsets"] = np.cumsum([0, *map(len, labels)], dtype=np.int64)
    arrays["labels"] = np.concatenate(labels).astype(np.int32)
    arrays["features"] = np.concatenate([record.features for record in records])
    return arrays


def _write_group(
    path: Path, arrays: Mapping[str, AnyArray], attributes: Mapping[str, JSON], codec: str
) -> None:
    import zarr

    kind = "regions" if "labels" in arrays else "grid"
    group = zarr.create_group(
        path,
        zarr_format=3,
        attributes={
            "feature_cache": {"pack_version": PACK_VERSION, "kind": kind},
            "provenance": dict(attributes),
        },
    )
    for name, array in arrays.items():
        target = group.create_array(
            name,
            shape=array.shape,
            dtype=array.dtype,
            chunks=_chunk_shape(name, array, codec),
            compressors=_compressors(codec if name == "features" else "raw", array.dtype),
            config={"write_empty_chunks": True},
        )
        if array.size:
            target[...] = array


def _chunk_shape(name: str, array: AnyArray, codec: str) -> tuple[int, ...]:
    shape = tuple(max(1, length) for length in array.shape)
    if name != "features":
        return shape
    if array.ndim > 2:
        return (1, *shape[1:])
    if codec == "raw":
        return shape
    row_bytes = shape[1] * array.dtype.itemsize
    return (min(shape[0], max(1, _COMPRESSED_CHUNK_BYTES // row_bytes)), shape[1])


def _compressors(codec: str, dtype: np.dtype[Any]) -> list[Any]:
    from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

    chosen: dict[str, list[Any]] = {
        "raw": [],
        "zstd": [ZstdCodec(level=3)],
        "blosc": [BloscCodec(cname="zstd", clevel=3, shuffle="shuffle", typesize=dtype.itemsize)],
    }
    return [*chosen[codec], Crc32cCodec()]


def _host() -> str:
    name = socket.gethostname()
    return "".join(c if c.isalnum() else "_" for c in name)[:40] or "host"


def _sync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            _sync(Path(folder, file), os.O_RDONLY)
        sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _rename_new(source: Path, target: Path) -> None:
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():
            raise


@dataclass(frozen=True, slots=True)
class _ArrayFile:
    """What a Zarr array's metadata say, checked."""

    path: Path
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    raw: bool

    @classmethod
    def read(cls, path: Path) -> _ArrayFile:
        try:
            meta = json.loads((path / "zarr.json").read_bytes())
            shape = tuple(meta["shape"])
            chunk_shape = tuple(meta["chunk_grid"]["configuration"]["chunk_shape"])
            dtype = _DTYPES[meta["data_type"]]
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
        )
        if not sound:
            raise CorruptRecordError(f"{path / 'zarr.json'} describes no array of a pack")
        return cls(path, shape, chunk_shape, dtype, _is_raw(codecs))

    @property
    def chunk_bytes(self) -> int:
        return math.prod(self.chunk_shape) * self.dtype.itemsize

    def map_chunk(self, *index: int) -> AnyArray:
        """Map one raw chunk, read-only; read it where the process has many mapped already."""
        data: mmap.mmap | bytes
        with open(self._chunk_file(*index), "rb") as file:
            self._check_size(file.name, os.fstat(file.fileno()).st_size)
            if len(_maps) < _maps_allowed():
                data = mmap.mmap(file.fileno(), self.chunk_bytes, access=mmap.ACCESS_READ)
                _maps.add(data)
            else:
                data = file.read()
                self._check_size(file.name, len(data))
        values = np.frombuffer(data, self.dtype, math.prod(self.chunk_shape))
        return values.reshape(self.chunk_shape)

    def read_whole(self) -> AnyArray:
        """Read an array of one raw chunk into memory, and check its CRC."""
        from google_crc32c import value as crc32c

        if not self.raw or self.chunk_shape != tuple(max(1, n) for n in self.shape):
            raise CorruptRecordError(f"{self.path} should be one raw chunk and isn't")
        if math.prod(self.shape) == 0:
            return np.frombuffer(b"", self.dtype).reshape(self.shape)
        file = self._chunk_file(*(0 for _ in self.shape))
        data = file.read_bytes()
        self._check_size(file, len(data))
        if crc32c(data[: self.chunk_bytes]) != int.from_bytes(data[self.chunk_bytes :], "little"):
            raise CorruptRecordError(
                f"{file} fails its CRC: its bytes changed since it was written"
            )
        return np.frombuffer(data, self.dtype, math.prod(self.shape)).reshape(self.shape)

    def _chunk_file(self, *index: int) -> Path:
        return self.path.joinpath("c", *map(str, index))

    def _check_size(self, file: object, size: int) -> None:
        if size != self.chunk_bytes + _CRC_BYTES:
            raise CorruptRecordError(
                f"{file} has {size} bytes, expected {self.chunk_bytes + _CRC_BYTES}"
            )


def _maps_allowed() -> int:
    """Half of the files that the process may have open: each map keeps a descriptor."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAPS_LIMIT if limit == resource.RLIM_INFINITY else min(limit // 2, _MAPS_LIMIT)


def _is_raw(codecs: Sequence[tuple[str, Any]]) -> bool:
    if [name for name, _ in codecs] != ["bytes", "crc32c"]:
        return False
    return codecs[0][1] in ({}, {"endian": "little"}) and codecs[1][1] == {}


def read_keys(pack: Path) -> Keys:
    """Read a pack's keys, (n, 16) uint8, checked by their CRC.

    Raises
    ------
    CorruptRecordError
        If they are not what was written.
    FileNotFoundError
        If the pack is gone.
    """
    with _missing_is_corrupt(pack):
        array = _ArrayFile.read(pack / "keys")
        if len(array.shape) != 2 or array.shape[1] != DIGEST_BYTES or array.dtype != np.uint8:
            raise CorruptRecordError(
                f"{pack / 'keys'} has shape {array.shape}, expected (n, {DIGEST_BYTES}) uint8"
            )
        return array.read_whole()


@contextmanager
def _missing_is_corrupt(pack: Path) -> Iterator[None]:
    """Tell a pack that lacks a file from one that is gone: packs come and go by a rename."""
    try:
        yield
    except FileNotFoundError as error:
        if not pack.is_dir():
            raise
        raise CorruptRecordError(f"{error.filename or pack} is missing from a pack") from error


def read_provenance(pack: Path) -> dict[str, Any]:
    """Read what a pack's writer said of itself and, under ``records``, of each record.

    Raises
    ------
    CorruptRecordError
        If it is damaged.
    FileNotFoundError
        If the pack is gone.
    """
    try:
        provenance: dict[str, Any] = json.loads((pack / "zarr.json").read_bytes())["attributes"][
            "provenance"
        ]
        provenance["records"] = [dict(record) for record in provenance["records"]]
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptRecordError(f"{pack / 'zarr.json'} is damaged: no provenance in it") from error
    return provenance


class Pack:
    """A pack opened for reading.

    A mapped record is compared with its checksum the first time it is read here, a decoded one each
    time. Arrays given out stay valid as long as they are referenced, also when the pack is closed
    or removed on this host. A file that is cut short while it is mapped ends the process (SIGBUS),
    as with any map: packs are replaced, never edited.

    Parameters
    ----------
    path : Path

    Raises
    ------
    CorruptRecordError
        If the metadata or sizes contradict each other.
    FileNotFoundError
        If the pack is gone.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys = read_keys(path)
        with _missing_is_corrupt(path):
            self._checksums = _ArrayFile.read(path / "checksums").read_whole()
            self._features = _ArrayFile.read(path / "features")
            self._offsets, self._labels = self._read_rows()
        self._verified = np.zeros(len(self.keys), bool)
        self._mapped: AnyArray | None = None
        self._array: zarr.Array[Any] | None = None
        self._check_shapes()

    def _read_rows(self) -> tuple[NDArray[np.int64] | None, NDArray[np.int32] | None]:
        if len(self._features.shape) > 2:
            return None, None
        offsets = _ArrayFile.read(self.path / "offsets").read_whole()
        return offsets, _ArrayFile.read(self.path / "labels").read_whole()

    def _check_shapes(self) -> None:
        n, features = len(self.keys), self._features
        rows, chunk = features.shape[0], features.chunk_shape
        sound = self._checksums.shape == (n,) and features.shape[1:] == chunk[1:] != ()
        if self._offsets is None or self._labels is None:
            sound = sound and rows == n and chunk[0] == 1
        else:
            bounds = self._offsets
            sound = (
                sound
                and (chunk[0] == max(1, rows) or not features.raw)
                and bounds.shape == (n + 1,)
                and self._labels.shape == (rows,)
                and (bounds[0], bounds[-1]) == (0, rows)
                and bool((np.diff(bounds) >= 0).all())
            )
        if not sound:
            raise CorruptRecordError(f"the arrays of {self.path} have sizes that don't agree")

    def record(self, row: int) -> Record:
        """Give record `row`, verified.

        Raises
        ------
        CorruptRecordError
            If it is not what was written.
        """
        record = self._read(row)
        if not (self._verified[row] and self._features.raw):
            if record_checksum(self.keys[row].tobytes(), record) != int(self._checksums[row]):
                raise CorruptRecordError(
                    f"record {self.keys[row].tobytes().hex()} in {self.path} fails its checksum: "
                    "its bytes changed since it was written"
                )
            self._verified[row] = True
        return record

    def _read(self, row: int) -> Record:
        if self._offsets is None or self._labels is None:
            return Record(self._grid(row), None)
        start, stop = int(self._offsets[row]), int(self._offsets[row + 1])
        return Record(self._rows(start, stop), self._labels[start:stop])

    def _rows(self, start: int, stop: int) -> AnyArray:
        if not self._features.raw:
            return self._decode(slice(start, stop))
        if self._mapped is None:
            with _missing_is_corrupt(self.path):
                self._mapped = self._map_rows()
        return self._mapped[start:stop]

    def _map_rows(self) -> AnyArray:
        if self._features.shape[0]:
            return self._features.map_chunk(0, 0)
        return np.frombuffer(b"", self._features.dtype).reshape(self._features.shape)

    def _grid(self, row: int) -> AnyArray:
        if not self._features.raw:
            return self._decode(row)
        with _missing_is_corrupt(self.path):
            return self._features.map_chunk(row, *(0 for _ in self._features.shape[1:]))[0]

    def _decode(self, rows: int | slice) -> AnyArray:
        import zarr

        try:
            if self._array is None:
                self._array = zarr.open_array(self._features.path, mode="r")
            decoded = np.asarray(self._array[rows])
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise CorruptRecordError(f"{self._features.path} can't be decoded: {error}") from error
        decoded.flags.writeable = False
        return decoded
