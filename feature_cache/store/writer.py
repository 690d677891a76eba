"""Writing packs: under a temporary name, as Zarr's format says, synced, renamed."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import UnknownNameError
from ..hashing import DIGEST_BYTES, JSON, Digest
from ..key import Record
from ..system import sync_folder
from .array import CODECS, DECODED_LIMIT, DTYPES, AnyArray, write_array
from .files import TEMPORARY_PREFIX, group_text, rename_new, share_tree, sync_tree
from .pack import NO_DIGEST, PACK_VERSION, metadata_digest, record_checksum
from .pack_contents import Contents, pack_name, write_contents

_COMPRESSED_CHUNK_BYTES = 1 << 20
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NewRecord:
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
    entries: Sequence[NewRecord],
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
    entries : sequence of NewRecord
        At least one; all of one kind, dtype and width (grids: of one shape), keys unique.
    provenance : mapping
        What is common to the records.
    codec : str
        One of `CODECS`.
    writer : str
        This process, in the temporary name; see `feature_cache.store.process`.
    unusable : container of str
        Names of damaged packs that are in the way; the new pack gets none of them.

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
    # In the same folder, and so on the same file system: to another one nothing is renamed.
    temporary = folder / f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        contents = _write_arrays(temporary, entries, codec)
        salt, name = 0, pack_name(contents.keys, contents.checksums, 0)
        while name in unusable:
            salt, name = salt + 1, pack_name(contents.keys, contents.checksums, salt + 1)
        records: list[JSON] = [dict(entry.provenance) for entry in entries]
        kind = "grid" if contents.labels is None else "regions"
        # After the arrays, whose metadata go into its digest.
        _write_metadata(temporary, {**provenance, "records": records}, kind, salt)
        install_pack(temporary, folder / name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return name


def install_pack(temporary: Path, target: Path) -> None:
    """Commit a whole pack that lies in the same folder under a temporary name.

    Synced before the rename and after it; where the pack is there already, it stays, as if it had
    just been written.
    """
    # Permissions first: they are to last as well.
    share_tree(temporary)
    sync_tree(temporary)
    while not rename_new(temporary, target):
        try:
            os.utime(target)  # as good as written now; gc sees it, and leaves it
        except FileNotFoundError:
            continue  # gc took it away since: now this one is needed
        except OSError as error:
            _log.debug("%s is not seen as used: %s", target, error)
        break
    # Also for one that was there: whoever renamed it may not have come to this yet.
    sync_folder(target.parent)


def _check_entries(entries: Sequence[NewRecord]) -> None:
    dtypes = {entry.record.features.dtype for entry in entries}
    if dtypes not in ({DTYPES["float16"]}, {DTYPES["float32"]}):
        found = ", ".join(sorted(map(str, dtypes))) or "none"
        raise ValueError(f"a pack of dtypes {found}: expected all float16 or all float32")
    shapes = {shape_of(entry.record) for entry in entries}
    if len(shapes) > 1:
        raise ValueError(f"a pack of shapes {shapes}: expected one kind and one width")
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


def shape_of(record: Record) -> tuple[int, ...]:
    """Give what records of one pack share: the shape of a grid, or the width of regions."""
    return record.features.shape[record.labels is not None :]


def _write_arrays(path: Path, entries: Sequence[NewRecord], codec: str) -> Contents:
    """Write the arrays of a pack; give what it holds beside the features."""
    features = [entry.record.features for entry in entries]
    if features[0].ndim > 2:
        if features[0].nbytes > DECODED_LIMIT:
            codec = "raw"  # decoded as a whole, it could not be read again
        write_array(path / "features", np.stack(features), chunk_rows=1, codec=codec)
    else:
        rows = np.concatenate(features)
        write_array(path / "features", rows, chunk_rows=_rows_of_chunk(rows, codec), codec=codec)
    contents = _list_contents(entries)
    write_contents(path, contents)
    return contents


def _rows_of_chunk(rows: AnyArray, codec: str) -> int | None:
    if codec == "raw" or not rows.size:
        return None
    return min(len(rows), max(1, _COMPRESSED_CHUNK_BYTES // rows[0].nbytes))


def _list_contents(entries: Sequence[NewRecord]) -> Contents:
    keys = np.frombuffer(b"".join(entry.key for entry in entries), np.uint8)
    sums = np.array([record_checksum(entry.key, entry.record) for entry in entries], np.uint64)
    labels = [e.record.labels for e in entries if e.record.labels is not None]
    return Contents(
        keys.reshape(-1, DIGEST_BYTES),
        sums,
        np.cumsum([0, *map(len, labels)], dtype=np.int64) if labels else None,
        np.concatenate(labels).astype(np.int32) if labels else None,
    )


def _write_metadata(path: Path, provenance: Mapping[str, JSON], kind: str, salt: int) -> None:
    own: JSON = {"pack_version": PACK_VERSION, "kind": kind, "salt": salt, "digest": NO_DIGEST}
    text = group_text({"feature_cache": own, "provenance": dict(provenance)}, indent=None)
    digest = metadata_digest(path, text.encode())
    (path / "zarr.json").write_text(text.replace(NO_DIGEST, digest, 1), encoding="utf-8")
