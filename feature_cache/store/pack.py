"""Packs: immutable Zarr v3 groups, each with many records of one space.

::

    <pack>/zarr.json   group; its attributes hold the provenance, and a digest of all metadata
      features         regions: (R, C), one chunk; grids: (n, gh, gw, C), a shard with a chunk each
      index (m,) int32 parts, of which an attribute says where they are
        keys       (n, 16) uint8   the record keys
        checksums  (n,) uint64     xxh3-64 over key, shape, labels and features of each record
        offsets    (n + 1,) int64  regions: record i has rows offsets[i] to offsets[i + 1]
        labels     (R,) int32      regions only

`Pack` reads bytes at their places, after checking every size it relies on; what has a codec is
decoded by it.

Version 1 had no digest of the metadata, version 2 folders for each chunk, version 3 an array for
each part of the index, and all of them a file for each grid; they are read all the same.
"""

from __future__ import annotations

import json
import os
import struct
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptRecordError, StoreError
from ..hashing import DIGEST_BYTES, digest_bytes
from ..key import Record
from .array import AnyArray, ArrayFile
from .files import read_file, read_json
from .pack_contents import OLD_ARRAYS, Contents, missing_is_corrupt, pack_name, read_contents

PACK_VERSION = 4

NO_DIGEST = "0" * 2 * DIGEST_BYTES
SALTS = 1 << 32
"""The salt in a pack's name is below it."""
_GROUP_LIMIT = 1 << 30


def record_checksum(key: bytes, record: Record) -> int:
    """Sum up a record with its key and shape, so that swapped or reshaped ones are found too."""
    hasher = xxhash.xxh3_64(key)
    hasher.update(struct.pack(f"<{record.features.ndim}q", *record.features.shape))
    if record.labels is not None:
        hasher.update(np.ascontiguousarray(record.labels, "<i4").data)
    hasher.update(np.ascontiguousarray(record.features).reshape(-1).view(np.uint8).data)
    return hasher.intdigest()


def metadata_digest(pack: Path, group: bytes) -> str:
    """Sum up the metadata of a pack: those of its arrays, and of the group with a blank digest."""
    parts = []
    for name in sorted(("features", "index", *OLD_ARRAYS)):
        # A pack has the arrays of one version only.
        with suppress(FileNotFoundError):
            parts.append(name.encode() + read_file(pack / name / "zarr.json", _GROUP_LIMIT))
    return digest_bytes(group, *parts).hex()


def check_metadata(pack: Path) -> None:
    """Compare the metadata of a pack with their digest; a pack of version 1 has none."""
    text = _read_group(pack)
    own = _read_own(pack, text)
    version = own.get("pack_version")
    if version == 1:
        return
    digest = str(own.get("digest"))
    # The first only: what the writer said comes after it, and may hold the same letters.
    blank = text.replace(digest.encode(errors="replace"), NO_DIGEST.encode(), 1)
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


def find_salt(pack: Path, contents: Contents, name: str) -> int:
    """Find the salt with which a pack's keys and checksums make its name.

    Raises
    ------
    CorruptRecordError
        None does.
    """
    # Most packs have none, and their metadata, with a line for each record, need not be read.
    if pack_name(contents.keys, contents.checksums, 0) == name:
        return 0
    salt = _read_own(pack, _read_group(pack)).get("salt", 0)
    right = type(salt) is int and 0 <= salt < SALTS
    if not right or pack_name(contents.keys, contents.checksums, salt) != name:
        raise CorruptRecordError(f"{pack} holds other records than its name {name}")
    return int(salt)


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

    @classmethod
    def join(cls, spans: Sequence[Span]) -> Span:
        """Make one of several, of regions where they are more than one."""
        if len(spans) == 1:
            return spans[0]
        features = np.concatenate([one.features for one in spans])
        labels = np.concatenate([one.labels for one in spans if one.labels is not None])
        ends, offsets = 0, [np.zeros(1, np.int64)]
        for one in spans:
            if one.offsets is not None:
                offsets.append(one.offsets[1:] + ends)
            ends += len(one.features)
        return cls(features, labels, np.concatenate(offsets))

    def records(self) -> list[Record]:
        """Give them one by one."""
        if self.offsets is None or self.labels is None:
            return [Record(self.features, None)]
        rows = [slice(*bounds) for bounds in pairwise(self.offsets.tolist())]
        return [Record(self.features[some], self.labels[some]) for some in rows]


class Pack:
    """A pack opened for reading.

    A record that is stored as it is, is compared with its checksum the first time it is read here,
    a decoded one each time. What was read stays as it is, whatever becomes of the pack.

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
            contents = read_contents(path)
            self.features = ArrayFile.read(path / "features")
            find_salt(path, contents, self.name)
        self.keys, self.checksums = contents.keys, contents.checksums
        self._offsets, self._labels = contents.offsets, contents.labels
        self._check_shapes()
        self._verified = np.zeros(len(self.keys), bool)
        self._file: int | None = None
        self._closes: weakref.finalize[Any, Any] | None = None

    def __len__(self) -> int:
        """Count the records."""
        return len(self.keys)

    def close(self) -> None:
        """Let go of the file; who reads on opens it again, and verifies what is in it by then."""
        if self._closes is not None:
            self._closes()
        self._file, self._closes = None, None
        self._verified[:] = False

    def is_span(self, start: int, stop: int) -> bool:
        """Tell whether these records can be read as one span, at once."""
        return self.features.is_direct and (self._offsets is not None or stop - start == 1)

    def _check_shapes(self) -> None:
        n, features = len(self.keys), self.features
        rows = features.shape[:1]
        inner = {shape[1:] for shape in (features.shape, features.chunk_shape, features.file_shape)}
        sound = self.checksums.shape == (n,) and len(inner) == 1
        if self._offsets is None or self._labels is None:
            sound = (
                sound and rows == (n,) and features.chunk_shape[0] == 1 < len(features.shape) - 1
            )
        else:
            bounds = self._offsets
            sound = (
                sound
                and len(features.shape) == 2
                and (features.is_direct or features.codec != "raw")
                and bounds.shape == (n + 1,)
                and self._labels.shape == rows
                and (bounds[0], bounds[-1]) == (0, rows[0])
                and bool((np.diff(bounds) >= 0).all())
            )
        if not sound:
            raise CorruptRecordError(f"the arrays of {self.path} have sizes that don't agree")

    def check(self) -> None:
        """Compare all of it: metadata, CRCs, and every record, which is so again when it is read.

        Raises
        ------
        CorruptRecordError
            If a bit is not as it was written.
        FileNotFoundError
            If the pack is gone.
        """
        try:
            with missing_is_corrupt(self.path):
                check_metadata(self.path)
                for index in self.features.file_indices():
                    self.features.check_file(*index)
            for row in range(len(self)):
                self.record(row)
        finally:
            self.close()

    def record(self, row: int) -> Record:
        """Give record `row`, verified; CorruptRecordError where it is not what was written."""
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
            spans = [Span(self._read(row, row + 1)[0], None, None) for row in range(start, stop)]
        else:
            bounds = self._offsets[start : stop + 1]
            first, last = int(bounds[0]), int(bounds[-1])
            spans = [Span(self._read(first, last), self._labels[first:last], bounds - first)]
        if not (self.features.is_direct and self._verified[start:stop].all()):
            records = (record for span in spans for record in span.records())
            for row, record in zip(range(start, stop), records, strict=True):
                self._verify(row, record)
        return spans

    def _verify(self, row: int, record: Record) -> None:
        if self.features.is_direct and self._verified[row]:
            return
        key = self.keys[row].tobytes()
        if record_checksum(key, record) != int(self.checksums[row]):
            raise CorruptRecordError(
                f"record {key.hex()} in {self.path} fails its checksum: "
                "its bytes changed since it was written"
            )
        self._verified[row] = True

    def _read(self, start: int, stop: int) -> AnyArray:
        """Read rows of the features, read-only."""
        if not self.features.is_direct:
            return self._decode(start, stop)
        if not self.features.shape[0]:
            return np.frombuffer(b"", self.features.dtype).reshape(self.features.shape)
        if self._file is None:
            with missing_is_corrupt(self.path):
                self._file = file = self.features.open_rows()
            self._closes = weakref.finalize(self, os.close, file)
        # Copied, not mapped: to touch a map of a file that was cut short kills the process.
        return self.features.read_rows(self._file, start, stop)

    def _decode(self, start: int, stop: int) -> AnyArray:
        try:
            with missing_is_corrupt(self.path):
                decoded = self.features.decode_rows(start, stop)
        except MemoryError as error:
            # Not the pack's fault, which would be set aside for a `CorruptRecordError`.
            raise StoreError(f"{self.features.path} can't be decoded in memory") from error
        except (ValueError, RuntimeError) as error:
            raise CorruptRecordError(f"{self.features.path} can't be decoded: {error}") from error
        decoded.flags.writeable = False
        return decoded


def check_pack(folder: Path, name: str) -> None:
    """Compare all of a pack with what was written, its name too.

    Parameters
    ----------
    folder : Path
        The pack, perhaps under a temporary name.
    name : str
        The name it should have.

    Raises
    ------
    CorruptRecordError, FileNotFoundError
        A bit is not as it was written; the pack is gone.
    """
    Pack(folder, name).check()
