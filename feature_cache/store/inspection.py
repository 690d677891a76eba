"""Looking into a cache: one space, pack or record in full, and where records come from."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from ..errors import CorruptRecordError, MissingRecordError, StoreError
from ..hashing import JSON
from ..key import Keys
from .pack import Pack, read_provenance
from .pack_contents import read_contents, read_keys
from .space import Space
from .store import Store

_log = logging.getLogger(__name__)


def record_sources(space: Space) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Give the key of each record of a space and what its writer said, in no order that matters.

    A pack that vanishes meanwhile is left out, and so, with a warning in the log, is one whose
    provenance is damaged.
    """
    for name in space.walk_packs():
        try:
            keys = [key.tobytes() for key in read_keys(space.packs_folder / name)]
            sources = read_provenance(space.packs_folder / name)["records"]
            yield from zip(keys, sources, strict=False)
        except FileNotFoundError:
            continue
        except CorruptRecordError as error:
            _log.warning("%s; its records are left out", error)


def record_regions(space: Space, names: Iterable[str] | None = None) -> Iterator[tuple[bytes, int]]:
    """Give the key of each record of a space of regions, and how many it has.

    Reads no features, and counts no use. Packs that vanish or are damaged are left out, as by
    `record_sources`.

    Parameters
    ----------
    space : Space
    names : iterable of str, optional
        Only these packs.
    """
    for name in space.walk_packs() if names is None else names:
        try:
            found = read_contents(space.packs_folder / name)
            counts = [] if found.offsets is None else np.diff(found.offsets).tolist()
            yield from zip((key.tobytes() for key in found.keys), counts, strict=False)
        except FileNotFoundError:
            continue
        except CorruptRecordError as error:
            _log.warning("%s; its records are left out", error)


def count_regions(space: Space, keys: Keys) -> list[int]:
    """Count the regions of some records, as far as these are in this folder or in one below.

    Parameters
    ----------
    space : Space
        That pools.
    keys : (m, 16) uint8

    Returns
    -------
    list of int
        In no order that matters.
    """
    wanted, counts = {key.tobytes() for key in keys}, dict[bytes, int]()
    for folder in space.folders:
        try:
            folder.refresh()
        except StoreError as error:
            _log.warning("%s; its records are left out", error)
            continue
        found = record_regions(folder, folder.packs_of(keys))
        counts.update((key, count) for key, count in found if key in wanted)
    return [*counts.values()]


def inspect(store: Store, what: str) -> dict[str, JSON]:
    """Describe in full what a word stands for.

    Parameters
    ----------
    store : Store
    what : str
        The beginning of a space's or pack's name, or of a record's key in hex.

    Returns
    -------
    dict
        JSON; its ``kind`` is ``"space"``, ``"pack"`` or ``"record"``.

    Raises
    ------
    MissingRecordError
        If it stands for nothing, or for several things.
    """
    found = list(_find(store, what))
    if len(found) == 1:
        return found[0]
    if not found:
        raise MissingRecordError(
            f"{what!r} begins no name of a space or pack and no key of a record in {store.root}: "
            "see feature-cache ls, and feature-cache explain for keys"
        )
    names = ", ".join(f"{entry['kind']} {entry['name']}" for entry in found[:5])
    raise MissingRecordError(f"{what!r} begins {len(found)} names: {names} …; give more of it")


def _find(store: Store, what: str) -> Iterator[dict[str, JSON]]:
    for space in store.spaces():
        if space.path.name.startswith(what):
            yield _describe_space(space)
            continue
        for name in space.walk_packs():
            if name.startswith(what):
                yield _describe_pack(space, name)
                continue
            with suppress(FileNotFoundError):  # others that come next hold its records
                for row, key in enumerate(read_keys(space.packs_folder / name)):
                    if key.tobytes().hex().startswith(what):
                        yield _describe_record(space, name, row)


def _describe_space(space: Space) -> dict[str, JSON]:
    return {
        "kind": "space",
        "name": space.path.name,
        "records": len(space),
        "packs": list(space.pack_names()),
        "bytes": space.disk_bytes(),
        "spec": space.spec,
    }


def _describe_pack(space: Space, name: str) -> dict[str, JSON]:
    keys = [key.tobytes().hex() for key in read_keys(space.packs_folder / name)]
    provenance = read_provenance(space.packs_folder / name)
    sources = provenance.pop("records")
    records = [{"key": key, **source} for key, source in zip(keys, sources, strict=False)]
    named = {"kind": "pack", "name": name, "space": space.path.name}
    return {**named, **provenance, "records": records}


def _describe_record(space: Space, name: str, row: int) -> dict[str, JSON]:
    pack = Pack(space.packs_folder / name)
    record = pack.record(row)
    sources = read_provenance(pack.path)["records"]
    return {
        "kind": "record",
        "name": pack.keys[row].tobytes().hex(),
        "space": space.path.name,
        "pack": name,
        "row": row,
        "shape": list(record.features.shape),
        "dtype": str(record.features.dtype),
        "labels": record.labels.tolist() if record.labels is not None else None,
        **(sources[row] if row < len(sources) else {}),
    }
