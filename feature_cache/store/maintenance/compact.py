"""Compaction: small packs become large ones, ordered by movie, copy and time.

`compact_space` does it for a whole space. `merge_packs` does a little of it, so that who commits
often can have it done as it goes: packs of about one size become one, as in a log-structured merge
tree, so that each record is moved a few times only, and a space has few packs of each size.
"""

from __future__ import annotations

import json
import logging
import multiprocessing.util
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import groupby
from math import log2
from pathlib import Path
from typing import Any

from ...errors import CorruptRecordError, StoreError
from ...hashing import JSON, canonical_json
from ...system import in_forked_child, start
from ..claims import Claims
from ..files import reading, writing
from ..filesystem import find_file_system
from ..last_uses import set_last_use
from ..pack import Pack, check_metadata, read_provenance
from ..process import join
from ..space import Space
from ..writer import NewRecord
from .removal import remove_tree
from .uses_of_packs import last_uses

TARGET_BYTES = 64 << 20
"""How large packs become, in bytes of features."""
MERGED_AT_ONCE = 16
"""So many packs of about one size become one while a process commits; the next size has as many
times the records."""
NETWORK_GRACE_SECONDS = 120.0
"""How long merged packs stay on a network file system, where a reader may hear late of the pack
that replaces them."""

_OPENED_AT_ONCE, _MERGED_MOST = 4096, 256
_OPEN_FILES = 128
"""Each pack that is read holds a descriptor, of which a process often has 1024 for everything."""
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Known:
    """What this process knows of a space: packs too large to merge, and packs to remove later.

    While there are packs to remove, with those that hold their records and since when they do, the
    claim of `alone` stays with this process, so that no other merges them again.
    """

    large: set[str] = field(default_factory=set)
    replaced: dict[str, tuple[set[str], float]] = field(default_factory=dict)


_known: defaultdict[Path, _Known] = defaultdict(_Known)
_merging = threading.Lock()
_thread: threading.Thread | None = None


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
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Source:
    """A pack to merge, what its writer said of it and of each record, and how old its last use is.

    Ages are 0 up to a day, 1 up to three, 2 up to seven, and so on by powers of two.
    """

    pack: Pack
    origin: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    age: int

    @property
    def kind(self) -> tuple[str, tuple[int, ...], int]:
        """Codec, shape and age: a pack's records have all three in common."""
        return self.pack.features.codec, self.pack.features.shape[1:], self.age

    @property
    def bytes(self) -> int:
        """The size of the features, decoded, so that no codec makes a pack small."""
        return self.pack.features.array_bytes


_Heirs = defaultdict[str, set[str]]
"""The packs, by name, whose records others hold by now, by these others' names."""
_Copies = defaultdict[bytes, set[str]]
"""The packs, by name, that hold what another is chosen for, by key."""


_Row = tuple[_Source, int]
"""One record to write again."""


def _order(record: _Row) -> tuple[Any, ...]:
    """Sort by kind, then movie, draw and frame."""
    source, row = record
    said = source.records[row]
    draw, frame = canonical_json(said.get("draw", [])), said.get("frame", 0)
    return source.kind, str(said.get("movie")), draw, frame if type(frame) is int else 0


def compact_space(
    space: Space,
    *,
    target_bytes: int = TARGET_BYTES,
    progress: Callable[[int], None] | None = None,
) -> CompactReport:
    """Merge the small packs of a space, and drop records that are there twice.

    What is used every day does not share a pack with what nobody has used for weeks, so that `gc`
    can tell them apart.

    Readers go on undisturbed: the new packs are committed first, then the old ones removed. Killed
    at any moment, nothing is lost; what is there twice is dropped the next time. On a network file
    system the old ones stay for `NETWORK_GRACE_SECONDS`, and go the next time.

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
        if not granted:
            return CompactReport(space.name, busy=True)
        space.refresh()
        _remove_replaced(space)
        reports = []
        names = _by_age(space)
        for first in range(0, len(names), _OPENED_AT_ONCE):
            some = names[first : first + _OPENED_AT_ONCE]
            reports.append(_merge(space, some, target_bytes, progress))
        if len(reports) > 1:  # what is left small of each part
            reports.append(_merge(space, _by_age(space), target_bytes, progress))
        return CompactReport(
            space.name,
            merged=sum(report.merged for report in reports),
            written=sum(report.written for report in reports),
            records=sum(report.records for report in reports),
            duplicates=sum(report.duplicates for report in reports),
        )


def merge_packs(space: Space) -> CompactReport:
    """Merge `MERGED_AT_ONCE` packs or more of about one size, if there are as many.

    What one call does is bounded, and nothing rests on it. StoreError where the folder can't be
    read or written.
    """
    known = _known[space.path]
    # Before anything is claimed: after most commits there is nothing to do.
    if not known.replaced and not choose_tier(space.pack_records(), known.large):
        return CompactReport(space.name)
    with alone(space) as granted, reading(space.path):
        if not granted:
            return CompactReport(space.name, busy=True)
        space.refresh()
        _remove_replaced(space)
        names = choose_tier(space.pack_records(), {*known.large, *known.replaced})
        return _merge(space, names, TARGET_BYTES, None, most=2 * TARGET_BYTES)


def merge_behind(space: Space) -> None:
    """Have `merge_packs` done by a thread, unless one is at it in this process."""
    global _thread
    if not _merging.locked():
        if _thread is None:  # a process leaves a cache when it has ended what it does in it
            multiprocessing.util.Finalize(None, _wait, exitpriority=20)
        thread = threading.Thread(target=_try_to_merge, args=(space,), name="feature_cache merges")
        if start(thread):  # at the end of a process others will merge
            _thread = thread


def _wait() -> None:
    if _thread is not None:
        _thread.join()


def _try_to_merge(space: Space) -> None:
    try:
        merge_packs(space)
    except StoreError as error:
        _log.warning("the packs of %s are not merged: %s", space.path, error)


def choose_tier(records: Mapping[str, int], large: Collection[str] = ()) -> list[str]:
    """Choose packs to merge by their numbers of records: many of the smallest size with enough.

    A size is all numbers up to `MERGED_AT_ONCE` times the one before it.

    Parameters
    ----------
    records : mapping of str to int
        By pack.
    large : collection of str
        Packs to leave out.
    """
    tiers: dict[int, list[str]] = {}
    for name, count in records.items():
        if name not in large:
            tier, limit = 0, MERGED_AT_ONCE
            while count >= limit:
                tier, limit = tier + 1, limit * MERGED_AT_ONCE
            tiers.setdefault(tier, []).append(name)
    enough = [tier for tier, names in tiers.items() if len(names) >= MERGED_AT_ONCE]
    return tiers[min(enough)][:_MERGED_MOST] if enough else []


@contextmanager
def alone(space: Space) -> Iterator[bool]:
    """Be the only process that writes the packs of a space anew; tells whether that is so."""
    claims, claim, known = Claims(space.root), f"compact-{space.name}", _known[space.path]
    # Among threads the claim does not do: with packs still to remove it is held already.
    if not _merging.acquire(blocking=False):
        yield False
        return
    try:
        if known.replaced and claims.holder(claim) != join(space.root).name:
            known.replaced.clear()  # it is another's by now
        granted = bool(known.replaced) or claims.take([claim])[0]
        try:
            yield granted
        finally:
            if granted and not known.replaced:
                claims.release([claim])
    finally:
        _merging.release()


def _by_age(space: Space) -> list[str]:
    """List the packs that may be merged, the first written first, as far as folders tell."""
    times = space.pack_times()
    replaced = _known[space.path].replaced
    names = [n for n in space.pack_records() if n in times and n not in replaced]
    return sorted(names, key=lambda name: (times[name], name))


def _merge(
    space: Space,
    names: Sequence[str],
    target_bytes: int,
    progress: Callable[[int], None] | None,
    most: int | None = None,
) -> CompactReport:
    """Merge those of some packs that are small, or hold what another holds; all of them if done."""
    ages = {} if most is not None else _ages(space)
    opened = _open(space, names, ages)
    while True:
        merged, rows, duplicates, copies = _choose(space, opened, target_bytes, most)
        if not merged:
            return CompactReport(space.name)
        try:
            written = _write(space, merged, rows, copies, target_bytes, progress)
        except (CorruptRecordError, FileNotFoundError):
            # What is written by now stays; what is there twice then is dropped another time.
            space.refresh()
            opened = _choose_sound(space, opened)
            continue
        # A pack that came out as it was has the same name, and is not one that goes.
        names = [source.pack.name for source in merged if source.pack.name not in written]
        heirs = _heirs(opened, names, copies)
        with writing(space.root):
            # While the old packs are there, as their folders say when they were used.
            _hand_on_uses(space, written, heirs)
            holders: defaultdict[str, set[str]] = defaultdict(set)
            for holder, of in (*written.items(), *heirs.items()):
                for name in of:
                    holders[name].add(holder)
            times = {name: _time_of(space, name) for name in {*written, *heirs}}
            for name in names:
                since = max((times[holder] for holder in holders[name]), default=0.0)
                _known[space.path].replaced[name] = holders[name], since
            _remove_replaced(space)
        return CompactReport(space.name, len(merged), len(written), len(rows), duplicates)


def _ages(space: Space) -> dict[str, int]:
    now = join(space.root).now()
    uses = last_uses(space)
    return {name: int(log2(1.0 + max(0.0, now - used) / 86400.0)) for name, used in uses.items()}


def _open(space: Space, names: Iterable[str], ages: Mapping[str, int]) -> list[_Source]:
    """Open packs, those that are sound as far as this reads them."""
    opened = []
    for name in names:
        with _leaving_out(space, name):
            pack = Pack(space.packs_folder / name)
            check_metadata(pack.path)
            origin = read_provenance(pack.path)
            records = origin.pop("records")
            records += [{} for _ in range(len(pack) - len(records))]
            opened.append(_Source(pack, origin, records, ages.get(name, 0)))
    return opened


def _choose_sound(space: Space, opened: Iterable[_Source]) -> list[_Source]:
    """Give the packs of which all is as it was written."""
    sound = []
    for source in opened:
        with _leaving_out(space, source.pack.name):
            source.pack.check()
            sound.append(source)
    return sound


@contextmanager
def _leaving_out(space: Space, name: str) -> Iterator[None]:
    """Go on without a pack that is gone, or damaged, which is set aside."""
    try:
        yield
    except FileNotFoundError:
        return
    except CorruptRecordError as error:
        space.condemn(name, error)


def _choose(
    space: Space, opened: Sequence[_Source], target_bytes: int, most: int | None
) -> tuple[list[_Source], list[_Row], int, _Copies]:
    """Choose packs to merge; give the records to keep, how many are elsewhere too, and copies."""
    small = {source.pack.name for source in opened if source.bytes < target_bytes / 2}
    # So that `merge_packs` doesn't open them again with every commit.
    _known[space.path].large.update(s.pack.name for s in opened if s.pack.name not in small)
    seen: dict[bytes, str] = {}
    # Ordered by the packs alone, so that two processes that merge at once keep the same copy.
    for source in sorted(opened, key=lambda one: (-len(one.pack), one.pack.name)):
        for key in source.pack.keys:
            seen.setdefault(key.tobytes(), source.pack.name)
    wanted = small & set(seen.values())
    kinds = Counter(source.kind for source in opened if source.pack.name in wanted)
    merged: list[_Source] = []
    rows: list[_Row] = []
    copies: _Copies = defaultdict(set)
    total = size = 0
    for source in opened:
        name = source.pack.name
        for key in map(bytes, source.pack.keys):
            if seen[key] != name:
                copies[key].add(name)
        own = [r for r, key in enumerate(source.pack.keys) if seen[key.tobytes()] == name]
        is_chosen = len(own) < len(source.pack) or (name in wanted and kinds[source.kind] > 1)
        if is_chosen and (most is None or size + source.bytes <= most):
            merged.append(source)
            rows += [(source, row) for row in own]
            total, size = total + len(source.pack), size + source.bytes
    return merged, rows, total - len(rows), copies


def _heirs(opened: Sequence[_Source], gone: Collection[str], copies: _Copies) -> _Heirs:
    """Give the packs that stay and hold what those that go held too, and which these are."""
    heirs, left = _Heirs(set), set(gone)
    for source in opened:
        if source.pack.name not in left:
            for key in copies.keys() & set(map(bytes, source.pack.keys)):
                heirs[source.pack.name] |= copies[key] & left
    return heirs


def _write(
    space: Space,
    merged: Sequence[_Source],
    rows: Sequence[_Row],
    copies: _Copies,
    target_bytes: int,
    progress: Callable[[int], None] | None,
) -> _Heirs:
    """Write records as new packs."""
    origins, written = _join_origins(merged), _Heirs(set)
    for kind, group in groupby(sorted(rows, key=_order), lambda record: record[0].kind):
        for entries, sources in _read_entries(group, copies, target_bytes):
            for name in space.write(entries, {"compacted_from": origins}, codec=kind[0]):
                written[name] |= sources
            if progress is not None:
                progress(len(entries))
    return written


def _hand_on_uses(space: Space, written: _Heirs, heirs: _Heirs) -> None:
    """Let packs have been used when the last of those was whose records they hold now."""
    uses = last_uses(space)
    for name, sources in written.items():
        # A new pack would count as used just now, and to be merged is no use.
        used = max(uses.get(source, 0.0) for source in sources)
        with suppress(PermissionError, FileNotFoundError):  # it is another user's, or gone again
            os.utime(space.packs_folder / name, (used, used))
    for name, sources in heirs.items():
        used = max((uses.get(source, 0.0) for source in sources), default=0.0)
        set_last_use(space.packs_folder / name, used)


def _join_origins(sources: Iterable[_Source]) -> list[JSON]:
    """Give what the writers of the packs said of themselves, each once."""
    found: dict[str, JSON] = {}
    for source in sources:
        told = source.origin.get("compacted_from")
        for origin in told if isinstance(told, list) else [source.origin]:
            found.setdefault(canonical_json(origin), origin)
    return [json.loads(text) for text in sorted(found)]


def _read_entries(
    rows: Iterable[_Row], copies: _Copies, target_bytes: int
) -> Iterator[tuple[list[NewRecord], set[str]]]:
    """Read records, verified, in lists of about one pack's size; name the packs that hold them."""
    entries: list[NewRecord] = []
    sources: set[str] = set()
    size = 0
    # Rows are ordered by movie and time, not by pack: those read last are likely to be read again.
    opened: dict[str, Pack] = {}
    for source, row in rows:
        opened[source.pack.name] = opened.pop(source.pack.name, source.pack)
        if len(opened) > _OPEN_FILES:
            opened.pop(next(iter(opened))).close()
        record = source.pack.record(row)
        key = source.pack.keys[row].tobytes()
        entries.append(NewRecord(key, record, source.records[row]))
        sources |= {source.pack.name, *copies.get(key, ())}
        size += record.features.nbytes
        if size >= target_bytes:
            yield entries, sources
            entries, sources, size = [], set(), 0
    for pack in opened.values():
        pack.close()
    if entries:
        yield entries, sources


def _time_of(space: Space, name: str) -> float:
    """Give since when a pack is there; 0 where it is gone again."""
    try:
        # Not mtime, which says when it was used.
        return (space.packs_folder / name).stat().st_ctime
    except FileNotFoundError:
        return 0.0


def _remove_replaced(space: Space) -> None:
    """Remove packs whose records are all in others for long enough, and still are."""
    root, replaced = space.root, _known[space.path].replaced
    grace = NETWORK_GRACE_SECONDS if find_file_system(root).is_network else 0.0
    now = join(root).now()
    there, is_removed = set(space.pack_names()) if replaced else set(), False
    for name, (holders, since) in list(replaced.items()):
        path = space.packs_folder / name
        if not (holders and holders <= there):
            del replaced[name]  # one was set aside, or collected: no other holds its records now
        elif not grace or now - since >= grace:
            is_removed = True
            # On Windows it stays while somebody reads it, and is tried again.
            if remove_tree(path, join(root).name) or not path.exists():
                del replaced[name]
    if is_removed:
        space.refresh()


def _start_anew() -> None:
    global _merging, _thread
    # The child has none of its parent's claims.
    _known.clear()
    _merging, _thread = threading.Lock(), None


in_forked_child(_start_anew)
