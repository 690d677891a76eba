"""What a pack holds beside its features: which records, their checksums, and their regions.

In packs of version 4 it is one array, ``index`` (m,) int32, of which an attribute says where its
parts are; in those before, each part is an array of its own.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptRecordError
from ..hashing import DIGEST_BYTES, digest_bytes
from ..key import Keys
from .array import AnyArray, ArrayFile, write_array

OLD_ARRAYS = ("checksums", "keys", "labels", "offsets")
_ROW_INTS = {"keys": 4, "checksums": 2, "offsets": 2}


@dataclass(frozen=True, slots=True, eq=False)
class Contents:
    """What a pack of n records holds beside its features.

    Attributes
    ----------
    keys : (n, 16) uint8
    checksums : (n,) uint64
    offsets : (n + 1,) int64; None for grids
        Record i has rows offsets[i] to offsets[i + 1].
    labels : (R,) int32; None for grids
    """

    keys: Keys
    checksums: NDArray[np.uint64]
    offsets: NDArray[np.int64] | None = None
    labels: NDArray[np.int32] | None = None


def pack_name(keys: Keys, checksums: NDArray[np.uint64], salt: int) -> str:
    """Name a pack by its keys and checksums; a salt makes another name for the same."""
    salted = salt.to_bytes(8, "big") if salt else b""
    return digest_bytes(keys.tobytes(), checksums.tobytes(), salted).hex()


def write_contents(pack: Path, contents: Contents) -> None:
    """Write the array ``index`` of a pack."""
    index = join_parts(contents)
    parts = _place_parts(len(contents.keys), len(index), has_regions=contents.labels is not None)
    write_array(pack / "index", index, attributes={"parts": parts})


def join_parts(contents: Contents) -> NDArray[np.int32]:
    """Give all parts as one array: (m,) int32."""
    found = (contents.keys, contents.checksums, contents.offsets, contents.labels)
    arrays = [np.ascontiguousarray(one).reshape(-1) for one in found if one is not None]
    return np.concatenate([array.view(np.uint8) for array in arrays]).view(np.int32)


def _place_parts(records: int, size: int, *, has_regions: bool) -> dict[str, list[int]]:
    """Say where the parts of an index begin and end, in numbers of 4 bytes."""
    counts = {"keys": records, "checksums": records}
    counts |= {"offsets": records + 1} if has_regions else {}
    parts: dict[str, list[int]] = {}
    place = 0
    for name, count in counts.items():
        parts[name] = [place, place + count * _ROW_INTS[name]]
        place += count * _ROW_INTS[name]
    return {**parts, "labels": [place, size]} if has_regions else parts


def read_keys(pack: Path) -> Keys:
    """Read a pack's keys, (n, 16) uint8, checked by a CRC.

    Raises
    ------
    CorruptRecordError
        If they are not what was written.
    FileNotFoundError
        If the pack is gone.
    """
    with missing_is_corrupt(pack):
        found = _read_index(pack)
        return _read_old_keys(pack) if found is None else found.keys


def read_contents(pack: Path) -> Contents:
    """Read what a pack holds beside its features, checked by CRCs.

    Raises
    ------
    CorruptRecordError, FileNotFoundError
        It is not what was written; the pack is gone.
    """
    with missing_is_corrupt(pack):
        return _read_index(pack) or _read_old(pack)


def _read_index(pack: Path) -> Contents | None:
    """Read the array ``index``; None where there is none."""
    try:
        array = ArrayFile.read(pack / "index")
    except FileNotFoundError:
        return None
    values = array.read_whole()
    parts = array.attributes.get("parts")
    try:
        found: Mapping[str, list[int]] = dict(parts)  # type: ignore[arg-type]
        records = int(found["keys"][1]) // _ROW_INTS["keys"]
    except (TypeError, ValueError, KeyError, IndexError, OverflowError):
        found, records = {}, 0
    # Made as a writer makes them: places that lie could lead out of the array.
    wanted = _place_parts(records, len(values), has_regions="labels" in found)
    if (
        values.dtype != np.int32
        or values.ndim != 1
        or found != wanted
        or not _fills(wanted, len(values))
    ):
        raise CorruptRecordError(f"{array.path} has parts {parts}, which don't make an index")
    # Not those found, which may be floats, and in any order.
    at = {name: values[start:stop] for name, (start, stop) in wanted.items()}
    return Contents(
        at["keys"].view("u1").reshape(-1, DIGEST_BYTES),
        at["checksums"].view("<u8"),
        at["offsets"].view("<i8") if "offsets" in at else None,
        at.get("labels"),
    )


def _fills(parts: Mapping[str, list[int]], size: int) -> bool:
    start, stop = [*parts.values()][-1]
    return 0 <= start <= stop == size


def _read_old(pack: Path) -> Contents:
    """Read a pack of version 1 to 3."""
    has_regions = (pack / "labels").exists()
    arrays: dict[str, AnyArray] = {
        name: ArrayFile.read(pack / name).read_whole()
        for name in (("checksums", "offsets", "labels") if has_regions else ("checksums",))
    }
    dtypes = {"checksums": np.uint64, "offsets": np.int64, "labels": np.int32}
    if any(array.dtype != dtypes[name] or array.ndim != 1 for name, array in arrays.items()):
        raise CorruptRecordError(f"the arrays of {pack} have dtypes that no pack has")
    return Contents(_read_old_keys(pack), **arrays)


def _read_old_keys(pack: Path) -> Keys:
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
    except OSError as error:
        if error.errno == errno.ESTALE:  # another host removed it
            raise FileNotFoundError(f"{pack} is gone") from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError):
            raise
        if not pack.exists():
            raise FileNotFoundError(f"{pack} is gone") from error
        raise CorruptRecordError(f"{error.filename or pack} is missing from a pack") from error
