"""Garbage collection: what to let go, to stay within a size or an age, and left-overs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path

import numpy as np

from ...errors import MissingRecordError, StoreError
from ...hashing import DIGEST_BYTES, JSON
from ...units import check_amount
from ..claims import Claims
from ..counters import merge_runs
from ..files import TEMPORARY_PREFIX, list_folder, tree_bytes, writing
from ..last_uses import KnownUses, find_unseen, settle_uses
from ..process import GONE_SECONDS, is_silent, join, living, read_process
from ..requested_movies import find_forgotten
from ..space import PACK_NAME, Space
from ..store import Store
from .pins import read_pins
from .removal import remove_tree
from .uses_of_packs import known_uses

_log = logging.getLogger(__name__)
TEMPORARY_GRACE_SECONDS = 3600.0
"""How long a temporary file whose writer is not known to be dead stays."""

_MERGE_RUNS_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class Eviction:
    """A pack to let go.

    Attributes
    ----------
    space, pack : str
        Names.
    bytes : int
        On disk.
    records : int
    last_use : float
        Seconds since 1970.
    """

    space: str
    pack: str
    bytes: int
    records: int
    last_use: float

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class GarbagePlan:
    """What is to go, and what stays.

    Attributes
    ----------
    evictions : tuple of Eviction
        Packs to let go, least recently used first.
    leftovers : tuple of (Path, int)
        Files and folders of killed processes, and their bytes.
    quarantined : tuple of (Path, int)
        Packs in quarantine, and their bytes.
    kept_bytes, pinned_bytes : int
        Of the packs that stay, and of those that stay because they are pinned.
    other_bytes : int
        Of all else that stays; 0 where some spaces alone were looked at.
    max_bytes : int or None
        What was asked for.
    unseen : str
        Who may read the cache without a place to note it, so that `gc` does not know what they
        use; empty where there is nobody.
    """

    evictions: tuple[Eviction, ...]
    leftovers: tuple[tuple[Path, int], ...]
    quarantined: tuple[tuple[Path, int], ...]
    kept_bytes: int
    pinned_bytes: int
    other_bytes: int
    max_bytes: int | None
    unseen: str

    @property
    def bytes(self) -> int:
        """Sum up what would be freed."""
        others = sum(size for _, size in (*self.leftovers, *self.quarantined))
        return others + sum(eviction.bytes for eviction in self.evictions)

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return {
            **asdict(self),
            "bytes": self.bytes,
            "leftovers": [{"path": str(path), "bytes": size} for path, size in self.leftovers],
            "quarantined": [{"path": str(path), "bytes": size} for path, size in self.quarantined],
        }


@dataclass(frozen=True, slots=True)
class GarbageReport:
    """What a run did.

    Attributes
    ----------
    evicted, records : int
        Packs and records let go.
    freed_bytes : int
    is_done : bool
        Whether the time was enough for everything.
    """

    evicted: int
    records: int
    freed_bytes: int
    is_done: bool

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return asdict(self)


def plan_gc(
    store: Store,
    *,
    max_bytes: int | None = None,
    max_age_seconds: float | None = None,
    spaces: Collection[str] = (),
) -> GarbagePlan:
    """Find what can go. Removes nothing.

    Parameters
    ----------
    store : Store
    max_bytes : int, optional
        Let go of the least recently used packs until the rest takes no more on the disk; what a
        running process read lately goes last.
    max_age_seconds : float, optional
        Let go of packs not used for longer.
    spaces : collection of str, optional
        Look at the packs of these spaces alone: beginnings of their names.

    Raises
    ------
    MissingRecordError
        No space of such a name.
    StoreError
        A pin is damaged, or files can't be read.
    TypeError
        What is to be a number is none.
    """
    check_amount("max_bytes", max_bytes, "100 * 10**9 for 100 GB")
    check_amount("max_age_seconds", max_age_seconds, "30 * 86400 for 30 days")
    chosen = choose_spaces(store.spaces(), spaces)
    uses = known_uses(store.root)
    pinned: list[Eviction] = []
    loose: list[Eviction] = []
    for space in chosen:
        for pack, is_pinned in _list_packs(space, uses):
            (pinned if is_pinned else loose).append(pack)
    loose.sort(key=lambda one: ((one.space, one.pack) in uses.lately, one.last_use, one.pack))
    leftovers = [(path, tree_bytes(path)) for path in find_leftovers(store.root)]
    quarantined = [(path, tree_bytes(path)) for path in find_quarantined(store.root)]
    going = sum(size for _, size in (*leftovers, *quarantined))
    other = 0 if spaces else max(0, tree_bytes(store.root, skips=PACK_NAME.fullmatch) - going)
    packs = sum(pack.bytes for pack in (*pinned, *loose))
    # As the file system has it, by which last uses are counted: this host's clock may be another.
    now = join(store.root, create=False).now()
    oldest = -inf if max_age_seconds is None else now - max_age_seconds
    evictions = tuple(_evict(loose, packs + other, max_bytes, oldest))
    return GarbagePlan(
        evictions,
        tuple(leftovers),
        tuple(quarantined),
        packs - sum(pack.bytes for pack in evictions),
        sum(pack.bytes for pack in pinned),
        other,
        max_bytes,
        find_unseen(store.root) if evictions else "",
    )


def find_quarantined(root: Path) -> list[Path]:
    """List the packs in quarantine; whatever else is there stays."""
    return [
        root / "quarantine" / name
        for name in list_folder(root / "quarantine")
        if PACK_NAME.fullmatch("".join(name.split("-")[-2:-1]))
    ]


def choose_spaces(spaces: list[Space], names: Collection[str]) -> list[Space]:
    """Give the spaces whose names begin so, by default all.

    Raises
    ------
    MissingRecordError
        None begins so.
    """
    chosen = choose_names([space.name for space in spaces], names)
    return [space for space in spaces if space.name in chosen]


def choose_names(names: Sequence[str], starts: Collection[str]) -> list[str]:
    """Give the names that begin so, by default all; MissingRecordError where none does."""
    for start in starts:
        if not any(name.startswith(start) for name in names):
            known = ", ".join(names) or "none"
            raise MissingRecordError(f"no space begins with {start!r}; there are: {known}")
    return [name for name in names if not starts or name.startswith(tuple(starts))]


def _list_packs(
    space: Space, uses: KnownUses, names: Collection[str] | None = None
) -> Iterator[tuple[Eviction, bool]]:
    """Give the packs of a space, or those named, and whether each is pinned."""
    pins = [pin for pin in read_pins(space.root) if pin.space == space.name]
    whole = any(pin.keys is None for pin in pins)
    wanted = b"".join(key for pin in pins for key in pin.keys or ())
    pinned = set(space.holders(np.frombuffer(wanted, np.uint8).reshape(-1, DIGEST_BYTES)))
    records, sizes = space.pack_records(), space.pack_bytes()
    for name, noted in space.pack_times().items():
        # What is not known is gone meanwhile, or damaged: that is for verify.
        if name in records and (names is None or name in names):
            used = max(noted, uses.times.get((space.name, name), noted))
            pack = Eviction(space.name, name, sizes[name], records[name], used)
            yield pack, whole or name in pinned


def _evict(
    packs: list[Eviction], total: int, max_bytes: int | None, oldest: float
) -> Iterator[Eviction]:
    for pack in packs:
        too_much = max_bytes is not None and total > max_bytes
        if too_much or pack.last_use < oldest:
            total -= pack.bytes
            yield pack


def find_leftovers(root: Path) -> list[Path]:
    """List the temporary files, claims and process files of processes that are gone.

    None of them does harm: they are in nobody's way, and `gc` removes them.
    """
    now = join(root, create=False).now()
    own = ("asked", "spaces", "stats", "pins", "processes", "tables", "uses")
    folders = [root, *(root / name for name in own)]
    for name in list_folder(root / "spaces"):
        folders += [root / "spaces" / name, root / "spaces" / name / "packs"]
    folders.append(root / "quarantine")
    temporary = [
        folder / name
        for folder in folders
        for name in list_folder(folder)
        if name.startswith(TEMPORARY_PREFIX)
    ]
    dead = [path for path in temporary if _is_left(root, path, now)]
    processes = list_folder(root / "processes")  # first: those that come later are no left-overs
    lives = living(root, now, silent_seconds=2 * GONE_SECONDS)
    gone = [
        root / "processes" / name
        for name in processes
        if name not in lives and not name.startswith(TEMPORARY_PREFIX)
    ]
    marks = filter(lambda path: PACK_NAME.fullmatch(path.name), root.glob("retired/*/*"))
    found = [*dead, *Claims(root).leftovers(now), *gone, *find_forgotten(root, now)]
    found += marks  # of version 1 to 3
    return [path for path in found if os.path.lexists(path)]


def _is_left(root: Path, path: Path, now: float) -> bool:
    """Tell whether a temporary file or folder belongs to nobody any more."""
    writer = path.name.removeprefix(TEMPORARY_PREFIX).rpartition("-")[0]
    process = read_process(root, writer) if writer else None
    if process is not None and process.runs is not None:
        return not process.runs
    if process is not None and not is_silent(root, writer, now, GONE_SECONDS):
        return False
    # Perhaps only cut off, or without a file of its own: how old all of it is decides.
    try:
        newest = max([path.lstat().st_mtime, *(f.lstat().st_mtime for f in path.rglob("*"))])
    except FileNotFoundError:
        return False
    return now - newest > TEMPORARY_GRACE_SECONDS


def run_gc(store: Store, plan: GarbagePlan, *, max_seconds: float | None = None) -> GarbageReport:
    """Let go of what a plan found. A pack that was used or pinned since stays.

    Parameters
    ----------
    store : Store
    plan : GarbagePlan
    max_seconds : float, optional
        Stop after about so long; what is left is for the next run.

    Raises
    ------
    StoreError
        Something can't be removed.
    """
    deadline = inf if max_seconds is None else time.monotonic() + max_seconds
    root, left, evicted = store.root, set[Path](), list[Eviction]()
    with writing(root):
        settle_uses(root, known_uses(root))  # first: the files of ended processes go below
        # Looked for again: what was left when it was planned may have been taken over since.
        left.update(find_leftovers(root) if plan.leftovers else ())
        going = [(path, size, inf) for path, size in plan.leftovers if path in left]
        going += [(path, size, inf) for path, size in plan.quarantined]
        freed, is_done = _remove(store, going, deadline)
        if is_done:
            chosen = _still_unused(store, plan.evictions)
            places = {store.root / "spaces" / e.space / "packs" / e.pack: e for e in chosen}
            going = [(path, one.bytes, one.last_use) for path, one in places.items()]
            size, is_done = _remove(store, going, deadline)
            freed += size
            evicted = [one for path, one in places.items() if not path.exists()]
    try:
        merge_runs(root, time.time() - _MERGE_RUNS_SECONDS)
    except StoreError as error:
        _log.warning("the counters of ended processes are not merged: %s", error)
    records = sum(eviction.records for eviction in evicted)
    return GarbageReport(len(evicted), records, freed, is_done)


def _remove(
    store: Store, going: Sequence[tuple[Path, int, float]], deadline: float
) -> tuple[int, bool]:
    """Remove what was not used after a time; give the bytes freed, and whether there was time."""
    freed = 0
    for number, (path, size, last_use) in enumerate(going):
        # One at least, so that runs with very little time come to an end as well.
        if number and time.monotonic() > deadline:
            return freed, False
        if remove_tree(path, store.presence.name, last_use=last_use):
            freed += size
    return freed, True


def _still_unused(store: Store, evictions: Sequence[Eviction]) -> list[Eviction]:
    """Give the packs that nobody used or pinned since they were chosen, in their order."""
    if not evictions:
        return []
    uses, kept = known_uses(store.root), set[tuple[str, str]]()
    for space in store.spaces():
        wanted = {one.pack: one.last_use for one in evictions if one.space == space.name}
        kept.update(
            (pack.space, pack.pack)
            for pack, is_pinned in _list_packs(space, uses, wanted)
            if not is_pinned and pack.last_use <= wanted[pack.pack]
        )
    return [one for one in evictions if (one.space, one.pack) in kept]
