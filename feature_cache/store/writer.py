"""Writing packs: through zarr-python, under a temporary name, synced, renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UnknownNameError
from ..hashing import DIGEST_BYTES, JSON, Digest
from ..key import Record
from .array import DTYPES, AnyArray
from .files import TEMPORARY_PREFIX, group_text, share_tree, sync_folder, sync_tree
from .pack import NO_DIGEST, PACK_VERSION, metadata_digest, pack_name, record_checksum

CODECS = ("raw", "zstd", "blosc")
"""How features are stored; all of them lossless, so none of them is in a key."""

_COMPRESSED_CHUNK_BYTES = 1 << 20


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
    salt, name = 0, pack_name(arrays, 0)
    while name in unusable:
        salt, name = salt + 1, pack_name(arrays, salt + 1)
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

    Synced before the rename and after it; where the pack is there already, it stays, as if it had
    just been written.
    """
    share_tree(temporary)
    sync_tree(temporary)
    try:
        temporary.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        with suppress(OSError):
            os.utime(target)  # as good as written now
    sync_folder(target.parent)


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
        "digest": NO_DIGEST,
    }
    text = group_text({"feature_cache": own, "provenance": dict(provenance)}, indent=None)
    digest = metadata_digest(path, text.encode())
    (path / "zarr.json").write_text(text.replace(NO_DIGEST, digest, 1))


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
