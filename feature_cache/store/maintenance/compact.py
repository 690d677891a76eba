"""Compaction: small packs become large ones, ordered by movie, copy and time."""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ...errors import CorruptRecordError
from ...hashing import JSON, canonical_json
from ..claims import Claims
from ..files import reading, writing
from ..pack import Pack, read_provenance
from ..space import Space
from ..writer import Entry
from .retire import last_uses, retire

TARGET_BYTES = 64 << 20
"""How large packs become, in bytes of features."""

_OPEN_PACKS, _OPEN_BYTES, _KEPT_BYTES = 64, 20_000, 1 << 28
"""Packs that stay open at once, what one takes beside its features, and how much is kept."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CompactReport:
    """What a compaction did in one space.

    Attributes
    ----------
    space : str
    merged, written : int
        Packs before and after.
    records, duplicates : int
        Records kept, and dropped because they are elsewhere too.
    busy : bool
        Whether another process is at it, so that nothing was done here.
    """

    space: str
    merged: int = 0
    written: int = 0
    records: int = 0
    duplicates: int = 0
    busy: bool = False

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return {
            "space": self.space,
            "merged": self.merged,
            "written": self.written,
            "records": self.records,
            "duplicates": self.duplicates,
            "busy": self.busy,
        }


@dataclass(frozen=True, slots=True)
class _Row:
    """One record of a pack; its kind is codec and shape, the same in a pack.

    A pack's bytes are those of its features, decoded, so that no codec makes a pack small.
    """

    pack: str
    pack_bytes: int
    row: int
    key: bytes
    source: Mapping[str, Any]
    kind: tuple[str, tuple[int, ...]]

    @property
    def order(self) -> tuple[Any, ...]:
        source = self.source
        draw = canonical_json(source.get("draw", []))
        frame = source.get("frame", 0)
        return self.kind, str(source.get("movie")), draw, frame if type(frame) is int else 0


def compact_space(
    space: Space,
    *,
    target_bytes: int = TARGET_BYTES,
    progress: Callable[[int], None] | None = None,
) -> CompactReport:
    """Merge the small packs of a space, and drop records that are there twice.

    Readers go on undisturbed: the new packs are committed first, then the old ones retired, and
    those that a reader has mapped stay until it lets go. Killed at any moment, nothing is lost;
    what is there twice is dropped the next time.

    Parameters
    ----------
    space : Space
        In mode ``"a"``.
    target_bytes : int
        How large packs become; those of half the size and more are left as they are.
    progress : callable, optional
        Called with the number of records just written.

    Raises
    ------
    StoreError
        The folder can't be read or written.
    """
    with alone(space) as granted, reading(space.path):
        while granted:
            space.refresh()
            with suppress(FileNotFoundError):  # gc took a pack away meanwhile: choose again
                return _compact(space, target_bytes, progress)
    return CompactReport(space.name, busy=True)


@contextmanager
def alone(space: Space) -> Iterator[bool]:
    """Be the only process that writes the packs of a space anew; tells whether that is so."""
    claims, claim = Claims(space.root), f"compact-{space.name}"
    granted = claims.take([claim])[0]
    try:
        yield granted
    finally:
        if granted:
            claims.release([claim])


class _Packs:
    """The packs of a compaction: opened once, as long as they are small together."""

    def __init__(self, space: Space) -> None:
        self._space, self._kept_bytes = space, 0
        self._kept: dict[str, Pack] = {}
        self._last: dict[str, Pack] = {}

    def open(self, name: str) -> Pack:
        """Give a pack; errors as `Pack`."""
        pack = self._kept.get(name) or self._last.get(name)
        if pack is None:
            pack = Pack(self._space.packs_folder / name)
            size = pack.features.array_bytes + _OPEN_BYTES
            if self._kept_bytes + size <= _KEPT_BYTES:
                self._kept[name], self._kept_bytes = pack, self._kept_bytes + size
            else:
                self._last[name] = pack
            if len(self._last) > _OPEN_PACKS:
                self._last.pop(next(iter(self._last)))
        return pack


def _compact(
    space: Space, target_bytes: int, progress: Callable[[int], None] | None
) -> CompactReport:
    packs = _Packs(space)
    merged, rows, duplicates = _choose(space, packs, target_bytes)
    while _drop_damaged(space, packs, merged):
        packs = _Packs(space)
        merged, rows, duplicates = _choose(space, packs, target_bytes)
    if not merged:
        return CompactReport(space.name)
    origins = _read_origins(space, merged)
    written: set[str] = set()
    uses = last_uses(space)
    last_use = max((uses[name] for name in merged if name in uses), default=0.0)
    for kind, group in groupby(sorted(rows, key=lambda row: row.order), lambda row: row.kind):
        for entries in _read_entries(packs, list(group), target_bytes):
            names = space.write(entries, {"compacted_from": origins}, codec=kind[0])
            written.update(names)
            for name in names:
                with suppress(PermissionError):  # it was there, and is another user's
                    os.utime(space.packs_folder / name, (last_use, last_use))
            if progress is not None:
                progress(len(entries))
    with writing(space.root):
        retire(space, set(merged) - written)
    space.refresh()
    return CompactReport(space.name, len(merged), len(written), len(rows), duplicates)


def _choose(space: Space, packs: _Packs, target_bytes: int) -> tuple[list[str], list[_Row], int]:
    """Choose packs to merge; give the records to keep, and how many are elsewhere too."""
    names = [name for name in space.pack_names() if not space.is_aside(name)]
    listed = {name: rows for name in names if (rows := _list_rows(packs, name))}
    small = {name for name, rows in listed.items() if rows[0].pack_bytes < target_bytes / 2}
    kinds = Counter(listed[name][0].kind for name in small if listed[name])
    seen: dict[bytes, str] = {}
    for name in sorted(listed, key=lambda name: (name in small, name)):
        for row in listed[name]:
            seen.setdefault(row.key, name)
    merged = sorted(
        name
        for name, rows in listed.items()
        if any(seen[row.key] != name for row in rows) or (name in small and kinds[rows[0].kind] > 1)
    )
    kept = [row for name in merged for row in listed[name] if seen[row.key] == name]
    return merged, kept, sum(len(listed[name]) for name in merged) - len(kept)


def _drop_damaged(space: Space, packs: _Packs, names: Sequence[str]) -> bool:
    """Set aside the packs with a wrong bit; tell whether there was one."""
    found = False
    for name in names:
        try:
            packs.open(name).check()
        except (CorruptRecordError, FileNotFoundError) as error:
            found = True
            if isinstance(error, CorruptRecordError):
                space.condemn(name, error)
    return found


def _list_rows(packs: _Packs, name: str) -> list[_Row]:
    """List the records of a pack; none where it is gone or damaged, which is for verify."""
    try:
        pack = packs.open(name)
        sources = read_provenance(pack.path)["records"]
    except (FileNotFoundError, CorruptRecordError) as error:
        _log.warning("%s is not compacted: %s", name, error)
        return []
    sources += [{}] * (len(pack) - len(sources))
    keys, codec = [key.tobytes() for key in pack.keys], pack.features.codec
    return [
        _Row(name, pack.features.array_bytes, row, key, source, (codec, pack.features.shape[1:]))
        for row, (key, source) in enumerate(zip(keys, sources, strict=False))
    ]


def _read_origins(space: Space, names: Sequence[str]) -> list[JSON]:
    """Give what the writers of the packs said of themselves, each once."""
    found: dict[str, JSON] = {}
    for name in names:
        own = read_provenance(space.packs_folder / name)
        del own["records"]
        for origin in own.get("compacted_from", [own]):
            found.setdefault(canonical_json(origin), origin)
    return [json.loads(text) for text in sorted(found)]


def _read_entries(packs: _Packs, rows: Sequence[_Row], target_bytes: int) -> Iterator[list[Entry]]:
    """Read records, verified, in lists of about one pack's size."""
    entries: list[Entry] = []
    size = 0
    for row in rows:
        record = packs.open(row.pack).record(row.row)
        entries.append(Entry(row.key, record, row.source))
        size += record.features.nbytes
        if size >= target_bytes:
            yield entries
            entries, size = [], 0
    if entries:
        yield entries
