"""Packs: immutable Zarr v3 groups, each with many records of one space.

::

    <pack>/zarr.json       group; its attributes hold the provenance, and a digest of all metadata
      keys       (n, 16) uint8   the record keys
      offsets    (n + 1,) int64  regions: record i has rows offsets[i] to offsets[i + 1]
      checksums  (n,) uint64     xxh3-64 over key, shape, labels and features of each record
      labels     (R,) int32      regions only
      features   (R, C)          regions: one chunk, or (n, gh, gw, C): grids, one chunk a frame

`Pack` maps the raw bytes of chunks that are stored as such,
after checking every size it relies on, and leaves packs with a codec to zarr-python.

Version 1 had no digest of the metadata, version 2 folders for each chunk; both are read all the
same.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptRecordError, StoreError
from ..hashing import DIGEST_BYTES, digest_bytes
from ..key import Keys, Record
from .array import CRC_BYTES, AnyArray, ArrayFile
from .files import read_file, read_json
from .maps import may_keep_map

if TYPE_CHECKING:
    import zarr

PACK_VERSION = 3
ARRAYS = ("checksums", "features", "keys", "labels", "offsets")


NO_DIGEST = "0" * 2 * DIGEST_BYTES
_GROUP_LIMIT = 1 << 30
_WILLNEED = getattr(mmap, "MADV_WILLNEED", None)


def record_checksum(key: bytes, record: Record) -> int:
    """Sum up a record with its key and shape, so that swapped or reshaped ones are found too."""
    hasher = xxhash.xxh3_64(key)
    hasher.update(struct.pack(f"<{record.features.ndim}q", *record.features.shape))
    if record.labels is not None:
        hasher.update(np.ascontiguousarray(record.labels, "<i4").data)
    hasher.update(np.ascontiguousarray(record.features).reshape(-1).view(np.uint8).data)
    return hasher.intdigest()


def pack_name(arrays: Mapping[str, AnyArray], salt: int) -> str:
    """Name a pack by its keys and checksums; a salt makes another name for the same."""
    salted = salt.to_bytes(8, "big") if salt else b""
    return digest_bytes(arrays["keys"].tobytes(), arrays["checksums"].tobytes(), salted).hex()


def metadata_digest(pack: Path, group: bytes) -> str:
    """Sum up the metadata of a pack: those of its arrays, and of the group with a blank digest."""
    parts = []
    for name in ARRAYS:
        with suppress(FileNotFoundError):
            parts.append(name.encode() + read_file(pack / name / "zarr.json", _GROUP_LIMIT))
    return digest_bytes(group, *parts).hex()


def _check_metadata(pack: Path) -> None:
    """Compare the metadata of a pack with their digest; a pack of version 1 has none."""
    text = _read_group(pack)
    own = _read_own(pack, text)
    version = own.get("pack_version")
    if version == 1:
        return
    digest = str(own.get("digest"))
    blank = text.replace(digest.encode(), NO_DIGEST.encode(), 1)
    try:
        changed = metadata_digest(pack, blank) != digest
    except ValueError as error:
        raise CorruptRecordError(str(error)) from error
    if changed:
        raise CorruptRecordError(f"the metadata of {pack} changed since they were written")


def _read_own(pack: Path, text: bytes) -> dict[str, Any]:
    try:
        return dict(json.loads(text)["attributes"]["feature_cache"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptRecordError(f"{pack / 'zarr.json'} is no metadata of a pack") from error


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


def read_checksums(pack: Path) -> NDArray[np.uint64]:
    """Read the checksums of a pack's records, (n,) uint64, checked by a CRC; as `read_keys`."""
    with missing_is_corrupt(pack):
        return ArrayFile.read(pack / "checksums").read_whole()


def find_salt(pack: Path, arrays: Mapping[str, AnyArray], name: str) -> int:
    """Find the salt with which a pack's keys and checksums make its name.

    Raises
    ------
    CorruptRecordError
        None does.
    """
    if pack_name(arrays, 0) == name:
        return 0
    salt = _read_own(pack, _read_group(pack)).get("salt", 0)
    if type(salt) is not int or not 0 <= salt < 1 << 32 or pack_name(arrays, salt) != name:
        raise CorruptRecordError(f"{pack} holds other records than its name {name}")
    return salt


def read_offsets(pack: Path) -> NDArray[np.int64]:
    """Read where the records of a pack of regions begin and end, (n + 1,) int64; checked by a CRC.

    Errors as `read_keys`.
    """
    with missing_is_corrupt(pack):
        return ArrayFile.read(pack / "offsets").read_whole()


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
    if pack.is_symlink():
        raise CorruptRecordError(f"{pack} is a link: no pack lies elsewhere")
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


@dataclass(frozen=True, slots=True)
class Span:
    """Records of one pack that lie one after the other.

    Attributes
    ----------
    features : (R, C), or one grid, read-only
    labels : (R,) int32; None for a grid
    offsets : (n + 1,) int64; None for a grid
        Record i has rows offsets[i] to offsets[i + 1].
    """

    features: AnyArray
    labels: NDArray[np.int32] | None
    offsets: NDArray[np.int64] | None

    def __len__(self) -> int:
        """Count the records."""
        return 1 if self.offsets is None else len(self.offsets) - 1

    def records(self) -> list[Record]:
        """Give them one by one."""
        if self.offsets is None or self.labels is None:
            return [Record(self.features, None)]
        rows = [slice(*bounds) for bounds in pairwise(self.offsets.tolist())]
        return [Record(self.features[some], self.labels[some]) for some in rows]


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
    keeps_maps : bool
        Whether grids stay mapped, for those who read them again.

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

    def __init__(self, path: Path, name: str | None = None, *, keeps_maps: bool = False) -> None:
        self.path, self.name, self.used = path, name or path.name, False
        self._keeps_maps = keeps_maps
        with missing_is_corrupt(path):
            self.keys = _read_keys(path)
            self.checksums: NDArray[np.uint64] = ArrayFile.read(path / "checksums").read_whole()
            self.features = ArrayFile.read(path / "features")
            self._offsets, self._labels = self._read_rows()
            self._check_shapes()
            arrays: dict[str, AnyArray] = {"keys": self.keys, "checksums": self.checksums}
            find_salt(path, arrays, self.name)
        self._verified = np.zeros(len(self.keys), bool)
        self._rows_mapped: tuple[AnyArray, mmap.mmap | None] | None = None
        self._grids: dict[int, tuple[AnyArray, mmap.mmap]] = {}
        self._mapped_bytes = self.features.chunk_bytes + CRC_BYTES
        self._array: zarr.Array[Any] | None = None

    def __len__(self) -> int:
        """Count the records."""
        return len(self.keys)

    def has_mapped(self, start: int, stop: int) -> bool:
        """Tell whether these records are one span, and mapped: regions once any were read."""
        if self._offsets is None:
            return self.features.raw and stop - start == 1
        return self._rows_mapped is not None and self._rows_mapped[1] is not None

    def _read_rows(self) -> tuple[NDArray[np.int64] | None, NDArray[np.int32] | None]:
        if len(self.features.shape) > 2:
            return None, None
        offsets = ArrayFile.read(self.path / "offsets").read_whole()
        return offsets, ArrayFile.read(self.path / "labels").read_whole()

    def _check_shapes(self) -> None:
        n, features = len(self.keys), self.features
        rows, chunk = features.shape[:1], features.chunk_shape
        sound = (
            self.checksums.shape == (n,)
            and self.checksums.dtype == np.uint64
            and features.shape[1:] == chunk[1:] != ()
        )
        if self._offsets is None or self._labels is None:
            sound = sound and rows == (n,) and chunk[0] == 1
        else:
            bounds = self._offsets
            sound = (
                sound
                and (chunk[0] == max(1, *rows) or not features.raw)
                and bounds.shape == (n + 1,)
                and bounds.dtype == np.int64
                and self._labels.dtype == np.int32
                and self._labels.shape == rows
                and (bounds[0], bounds[-1]) == (0, rows[0])
                and bool((np.diff(bounds) >= 0).all())
            )
        if not sound:
            raise CorruptRecordError(f"the arrays of {self.path} have sizes that don't agree")

    def check_mapped(self) -> None:
        """Compare the size of the mapped file once more, before its numbers are read.

        Raises
        ------
        CorruptRecordError
            If the file was cut short.
        """
        if self._rows_mapped is None or self._rows_mapped[1] is None:
            return
        size = self._rows_mapped[1].size()
        if size != self._mapped_bytes:
            self.features.check_size(self.path / "features", size)

    def check(self) -> None:
        """Compare all of it: the metadata, and every record, which is so again when it is read.

        Raises
        ------
        CorruptRecordError
            If a bit is not as it was written.
        FileNotFoundError
            If the pack is gone.
        """
        with missing_is_corrupt(self.path):
            _check_metadata(self.path)
        for row in range(len(self)):
            self.record(row)
        self._verified[:] = False

    def record(self, row: int) -> Record:
        """Give record `row`, verified. Errors as `spans`."""
        return self.spans(row, row + 1)[0].records()[0]

    def spans(self, start: int, stop: int) -> list[Span]:
        """Give records `start` to `stop`, verified: regions as one span, grids as one each.

        Raises
        ------
        CorruptRecordError
            One of them is not what was written.
        """
        self.used = True
        if self._offsets is None or self._labels is None:
            spans = [Span(self._grid(row), None, None) for row in range(start, stop)]
        else:
            bounds = self._offsets[start : stop + 1]
            first, last = int(bounds[0]), int(bounds[-1])
            spans = [Span(self._rows(first, last), self._labels[first:last], bounds - first)]
        if not (self.features.raw and self._verified[start:stop].all()):
            records = (record for span in spans for record in span.records())
            for row, record in zip(range(start, stop), records, strict=True):
                self._verify(row, record)
        return spans

    def _verify(self, row: int, record: Record) -> None:
        if self.features.raw and self._verified[row]:
            return
        key = self.keys[row].tobytes()
        if record_checksum(key, record) != int(self.checksums[row]):
            raise CorruptRecordError(
                f"record {key.hex()} in {self.path} fails its checksum: "
                "its bytes changed since it was written"
            )
        self._verified[row] = True

    def _rows(self, start: int, stop: int) -> AnyArray:
        if not self.features.raw:
            return self._decode(slice(start, stop))
        if self._rows_mapped is None:
            with missing_is_corrupt(self.path):
                self._rows_mapped = self._map_rows()
        rows, mapped = self._rows_mapped
        if mapped is not None and _WILLNEED is not None and start < stop:
            # From disk at once, instead of page by page; a microsecond where it is in memory.
            first = start * rows.strides[0] // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(_WILLNEED, first, stop * rows.strides[0] - first)
        return rows[start:stop]

    def _map_rows(self) -> tuple[AnyArray, mmap.mmap | None]:
        if self.features.shape[0]:
            return self.features.map_chunk(str(self.path), 0, 0, whole=False)
        return np.frombuffer(b"", self.features.dtype).reshape(self.features.shape), None

    def _grid(self, row: int) -> AnyArray:
        if not self.features.raw:
            return self._decode(row)
        grid, mapped = self._grids.get(row, (None, None))
        if grid is not None and mapped is not None and mapped.size() == self._mapped_bytes:
            return grid
        with missing_is_corrupt(self.path):
            index = (row, *(0 for _ in self.features.shape[1:]))
            chunk, mapped = self.features.map_chunk(str(self.path), *index, whole=True)
        if mapped is not None and self._keeps_maps and may_keep_map():
            self._grids[row] = chunk[0], mapped
        return chunk[0]

    def _decode(self, rows: int | slice) -> AnyArray:
        import zarr

        start, stop = (rows, rows + 1) if isinstance(rows, int) else (rows.start, rows.stop)
        with missing_is_corrupt(self.path):
            self.features.check_chunk_files(start, stop)
        try:
            if self._array is None:
                self._array = zarr.open_array(self.features.path, mode="r", zarr_format=3)
            decoded = np.asarray(self._array[rows])
        except MemoryError as error:
            raise StoreError(f"{self.features.path} can't be decoded in memory") from error
        except (ValueError, RuntimeError, TypeError, LookupError, ArithmeticError) as error:
            raise CorruptRecordError(f"{self.features.path} can't be decoded: {error}") from error
        decoded.flags.writeable = False
        return decoded


def check_pack(folder: Path, name: str) -> None:
    """Compare all of a pack with what was written, its name too; errors as `Pack.check`.

    Parameters
    ----------
    folder : Path
        The pack, perhaps under a temporary name.
    name : str
        The name it should have.
    """
    Pack(folder, name).check()
