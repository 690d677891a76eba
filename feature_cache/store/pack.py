"""Packs: immutable Zarr v3 groups, each with many records of one space.

::

    <pack>/zarr.json       group; its attributes hold the provenance, and a digest of all metadata
      keys       (n, 16) uint8   the record keys
      offsets    (n + 1,) int64  regions: record i has rows offsets[i] to offsets[i + 1]
      checksums  (n,) uint64     xxh3-64 over key, shape, labels and features of each record
      labels     (R,) int32      regions only
      features   (R, C)          regions: one chunk, or (n, gh, gw, C): grids, one chunk a frame

`write_pack` goes through zarr-python. `Pack` maps the raw bytes of chunks that are stored as such,
after checking every size it relies on, and leaves packs with a codec to zarr-python.

Version 1 had no digest of the metadata and is read all the same.
"""

from __future__ import annotations

import json
import mmap
import secrets
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CacheVersionError, CorruptRecordError, UnknownNameError
from ..hashing import DIGEST_BYTES, JSON, Digest, digest_bytes
from ..key import Keys, Record
from .array import DTYPES, AnyArray, ArrayFile
from .files import (
    TEMPORARY_PREFIX,
    group_text,
    read_file,
    read_json,
    share_tree,
    sync_folder,
    sync_tree,
)

if TYPE_CHECKING:
    import zarr

PACK_VERSION = 2
CODECS = ("raw", "zstd", "blosc")
"""How features are stored; all of them lossless, so none of them is in a key."""

_COMPRESSED_CHUNK_BYTES = 1 << 20

_NO_DIGEST = "0" * 2 * DIGEST_BYTES
_GROUP_LIMIT = 1 << 30


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
    folder: Path,
    entries: Sequence[Entry],
    provenance: Mapping[str, JSON],
    codec: str = "raw",
    *,
    writer: str = "",
    unusable: Container[str] = (),
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
    writer : str
        This process, in the temporary name; see `feature_cache.store.process`.
    unusable : container of str
        Names of packs on their way out; the new pack gets none of them.

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
    salt, name = 0, _pack_name(arrays, 0)
    while name in unusable:
        salt, name = salt + 1, _pack_name(arrays, salt + 1)
    temporary = folder / f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}"
    attributes = {**provenance, "records": [dict(entry.provenance) for entry in entries]}
    try:
        _write_group(temporary, arrays, attributes, codec, salt)
        install_pack(temporary, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def install_pack(temporary: Path, target: Path) -> None:
    """Commit a whole pack that lies in the same folder under a temporary name.

    Synced before the rename and after it; where the pack is there already, it stays.
    """
    share_tree(temporary)
    sync_tree(temporary)
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
    sync_folder(target.parent)


def _pack_name(arrays: Mapping[str, AnyArray], salt: int) -> str:
    salted = salt.to_bytes(8, "big") if salt else b""
    return digest_bytes(arrays["keys"].tobytes(), arrays["checksums"].tobytes(), salted).hex()


def _check_entries(entries: Sequence[Entry]) -> None:
    dtypes = {entry.record.features.dtype for entry in entries}
    if dtypes not in ({DTYPES["float16"]}, {DTYPES["float32"]}):
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
    path: Path,
    arrays: Mapping[str, AnyArray],
    provenance: Mapping[str, JSON],
    codec: str,
    salt: int,
) -> None:
    import zarr

    for name, array in arrays.items():
        target = zarr.create_array(
            path / name,
            zarr_format=3,
            shape=array.shape,
            dtype=array.dtype,
            chunks=_chunk_shape(name, array, codec),
            compressors=_compressors(codec if name == "features" else "raw", array.dtype),
            config={"write_empty_chunks": True},
        )
        if array.size:
            target[...] = array
    own = {
        "pack_version": PACK_VERSION,
        "kind": "regions" if "labels" in arrays else "grid",
        "salt": salt,
        "digest": _NO_DIGEST,
    }
    text = group_text({"feature_cache": own, "provenance": dict(provenance)})
    digest = metadata_digest(path, text.encode())
    (path / "zarr.json").write_text(text.replace(_NO_DIGEST, digest, 1))


def metadata_digest(pack: Path, group: bytes) -> str:
    """Sum up the metadata of a pack: those of its arrays, and of the group with a blank digest."""
    arrays = sorted(file.parent.name for file in pack.glob("*/zarr.json"))
    parts = [name.encode() + (pack / name / "zarr.json").read_bytes() for name in arrays]
    return digest_bytes(group, *parts).hex()


def check_metadata(pack: Path) -> None:
    """Compare the metadata of a pack with their digest; a pack of version 1 has none.

    Raises
    ------
    CorruptRecordError
        If a bit of them changed.
    FileNotFoundError
        If the pack is gone.
    """
    with missing_is_corrupt(pack):
        _compare_metadata(pack, _read_group(pack))


def _compare_metadata(pack: Path, text: bytes) -> None:
    own = _read_own(pack, text)
    version = own.get("pack_version")
    if version == 1:
        return
    if type(version) is int and version > PACK_VERSION:
        raise CacheVersionError(
            f"{pack} has version {version}, this feature_cache reads up to {PACK_VERSION}: "
            "upgrade feature-cache"
        )
    digest = str(own.get("digest"))
    blank = text.replace(digest.encode(), _NO_DIGEST.encode(), 1)
    if metadata_digest(pack, blank) != digest:
        raise CorruptRecordError(f"the metadata of {pack} changed since they were written")


def _read_own(pack: Path, text: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text)["attributes"]["feature_cache"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptRecordError(f"{pack / 'zarr.json'} is no metadata of a pack") from error


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


def read_keys(pack: Path) -> Keys:
    """Read a pack's keys, (n, 16) uint8, checked by their CRC.

    Raises
    ------
    CorruptRecordError
        If they are not what was written.
    FileNotFoundError
        If the pack is gone.
    """
    with missing_is_corrupt(pack):
        return _read_keys(pack)


def _read_keys(pack: Path) -> Keys:
    array = ArrayFile.read(pack / "keys")
    if array.shape[1:] != (DIGEST_BYTES,) or array.dtype != np.uint8:
        raise CorruptRecordError(
            f"{pack / 'keys'} has shape {array.shape}, expected (n, {DIGEST_BYTES}) uint8"
        )
    return array.read_whole()


@contextmanager
def missing_is_corrupt(pack: Path) -> Iterator[None]:
    """Tell a pack that lacks a file from one that is gone: packs come and go by a rename."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if not pack.exists():
            raise FileNotFoundError(f"{pack} is gone") from error
        raise CorruptRecordError(f"{error.filename or pack} is missing from a pack") from error


def _read_group(pack: Path) -> bytes:
    try:
        return read_file(pack / "zarr.json", _GROUP_LIMIT)
    except ValueError as error:
        raise CorruptRecordError(str(error)) from error


def read_provenance(pack: Path) -> dict[str, Any]:
    """Read what a pack's writer said of itself and, under ``records``, of each record.

    Raises
    ------
    CorruptRecordError
        If it is damaged.
    FileNotFoundError
        If the pack is gone.
    """
    with missing_is_corrupt(pack):
        try:
            plain = read_json(pack / "zarr.json", _GROUP_LIMIT)
            provenance: dict[str, Any] = dict(plain["attributes"]["provenance"])
            provenance["records"] = [dict(record) for record in provenance["records"]]
        except (ValueError, KeyError, TypeError) as error:
            raise CorruptRecordError(
                f"{pack / 'zarr.json'} is damaged: no provenance in it"
            ) from error
    return provenance


class Pack:
    """A pack opened for reading.

    A mapped record is compared with its checksum the first time it is read here, a decoded one each
    time. Arrays given out stay valid as long as they are referenced, also when the pack is closed
    or removed on this host. Sizes are compared before a file is mapped, and again by
    `check_mapped`; a file that is cut short while its numbers are being read ends the process
    (SIGBUS), as with any map: packs are replaced, never edited.

    Parameters
    ----------
    path : Path
    name : str, optional
        The name it should have, by default its folder's.

    Attributes
    ----------
    used : bool
        Whether a record was read since this was last made false.

    Raises
    ------
    CorruptRecordError
        If metadata, sizes and name contradict each other.
    FileNotFoundError
        If the pack is gone.
    """

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name, self.used = path, name or path.name, False
        with missing_is_corrupt(path):
            self.keys = _read_keys(path)
            self.checksums: NDArray[np.uint64] = ArrayFile.read(path / "checksums").read_whole()
            self.features = ArrayFile.read(path / "features")
            self._offsets, self._labels = self._read_rows()
            self._check_shapes()
            self._check_name()
        self._verified = np.zeros(len(self.keys), bool)
        self._rows_mapped: tuple[AnyArray, mmap.mmap | None] | None = None
        self._array: zarr.Array[Any] | None = None

    def __len__(self) -> int:
        """Count the records."""
        return len(self.keys)

    def _read_rows(self) -> tuple[NDArray[np.int64] | None, NDArray[np.int32] | None]:
        if len(self.features.shape) > 2:
            return None, None
        offsets = ArrayFile.read(self.path / "offsets").read_whole()
        return offsets, ArrayFile.read(self.path / "labels").read_whole()

    def _check_shapes(self) -> None:
        n, features = len(self.keys), self.features
        rows, chunk = features.shape[:1], features.chunk_shape
        sound = self.checksums.shape == (n,) and features.shape[1:] == chunk[1:] != ()
        if self._offsets is None or self._labels is None:
            sound = sound and rows == (n,) and chunk[0] == 1
        else:
            bounds = self._offsets
            sound = (
                sound
                and (chunk[0] == max(1, *rows) or not features.raw)
                and bounds.shape == (n + 1,)
                and self._labels.shape == rows
                and (bounds[0], bounds[-1]) == (0, rows[0])
                and bool((np.diff(bounds) >= 0).all())
            )
        if not sound:
            raise CorruptRecordError(f"the arrays of {self.path} have sizes that don't agree")

    def _check_name(self) -> None:
        arrays: dict[str, AnyArray] = {"keys": self.keys, "checksums": self.checksums}
        if _pack_name(arrays, 0) == self.name:
            return
        salt = _read_own(self.path, _read_group(self.path)).get("salt", 0)
        if (
            type(salt) is not int
            or not 0 <= salt < 1 << 32
            or _pack_name(arrays, salt) != self.name
        ):
            raise CorruptRecordError(f"{self.path} holds other records than its name {self.name}")

    def check_mapped(self) -> None:
        """Compare the size of the mapped file once more, before its numbers are read.

        Raises
        ------
        CorruptRecordError
            If the file was cut short.
        """
        if self._rows_mapped is not None and self._rows_mapped[1] is not None:
            self.features.check_size(self.path / "features", self._rows_mapped[1].size())

    def record(self, row: int) -> Record:
        """Give record `row`, verified.

        Raises
        ------
        CorruptRecordError
            If it is not what was written.
        """
        self.used = True
        record = self._read(row)
        if not (self._verified[row] and self.features.raw):
            if record_checksum(self.keys[row].tobytes(), record) != int(self.checksums[row]):
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
        if not self.features.raw:
            return self._decode(slice(start, stop))
        if self._rows_mapped is None:
            with missing_is_corrupt(self.path):
                self._rows_mapped = self._map_rows()
        return self._rows_mapped[0][start:stop]

    def _map_rows(self) -> tuple[AnyArray, mmap.mmap | None]:
        if self.features.shape[0]:
            return self.features.map_chunk(self.name, 0, 0)
        return np.frombuffer(b"", self.features.dtype).reshape(self.features.shape), None

    def _grid(self, row: int) -> AnyArray:
        if not self.features.raw:
            return self._decode(row)
        with missing_is_corrupt(self.path):
            index = (row, *(0 for _ in self.features.shape[1:]))
            return self.features.map_chunk(self.name, *index)[0][0]

    def _decode(self, rows: int | slice) -> AnyArray:
        import zarr

        try:
            if self._array is None:
                self._array = zarr.open_array(self.features.path, mode="r")
            decoded = np.asarray(self._array[rows])
        except (ValueError, RuntimeError, TypeError, KeyError) as error:
            raise CorruptRecordError(f"{self.features.path} can't be decoded: {error}") from error
        decoded.flags.writeable = False
        return decoded


def check_records(folder: Path, name: str) -> None:
    """Compare every record of a pack with its checksum, and its name with its contents.

    Raises
    ------
    CorruptRecordError
        If a bit of them changed.
    """
    pack = Pack(folder, name)
    for row in range(len(pack)):
        pack.record(row)
