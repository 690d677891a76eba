"""What a cache holds, how old it is, how it was used, and what is wrong with it."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..store import Run, Space, Store, Usage
from ..store.files import list_folder, read_each, tree_bytes
from ..store.maintenance import Pin, last_uses, read_pins
from ..store.maintenance.collect import find_leftovers, find_quarantined
from ..store.maintenance.pins import read_pin
from ..store.process import living

_DAY = 86400.0
AGES: tuple[tuple[str, float], ...] = (
    ("a day", _DAY),
    ("a week", 7 * _DAY),
    ("30 days", 30 * _DAY),
    ("a year", 365 * _DAY),
    ("longer", float("inf")),
)
"""How long ago a pack was last used, at most: name and seconds."""

_MOST_PERIODS = 31


@dataclass(frozen=True, slots=True)
class SpaceFacts:
    """One space in numbers.

    Attributes
    ----------
    name : str
    spec : mapping
    records, packs : int
    bytes_by_age : tuple of int
        As in `AGES`, by the time since a pack was last used.
    last_use : float
        Of the pack used last, in seconds since 1970; 0 without packs.
    """

    name: str
    spec: Mapping[str, Any]
    records: int
    packs: int
    bytes_by_age: tuple[int, ...]
    last_use: float

    @property
    def bytes(self) -> int:
        """Sum up the sizes of all files of its packs."""
        return sum(self.bytes_by_age)


@dataclass(frozen=True, slots=True)
class Health:
    """What waits, and what should be looked after.

    Attributes
    ----------
    quarantined : tuple of (Path, int)
        Packs in quarantine, and their bytes.
    aside : tuple of str
        What else is in quarantine.
    pins : tuple of Pin
        None where one is damaged, which stops gc.
    damaged_pins : int
    claims : mapping of str to int
        Claims of living processes, by host and process.
    leftovers : int
        Files that killed processes left, with their claims.
    processes : int
        How many use the cache now, besides this one.
    """

    quarantined: tuple[tuple[Path, int], ...]
    aside: tuple[str, ...]
    pins: tuple[Pin, ...]
    damaged_pins: int
    claims: Mapping[str, int]
    leftovers: int
    processes: int


def measure(space: Space, now: float) -> SpaceFacts:
    """Measure a space; packs that vanish meanwhile are left out."""
    sizes, last, packs = [0] * len(AGES), 0.0, 0
    on_disk = space.pack_bytes()
    for name, used in last_uses(space).items():
        packs, last = packs + 1, max(last, used)
        sizes[_age_of(now - used)] += on_disk.get(name, 0)
    return SpaceFacts(space.name, space.spec, len(space), packs, tuple(sizes), last)


def _age_of(seconds: float) -> int:
    return next(i for i, (_, most) in enumerate(AGES) if seconds <= most)


def sum_by_period(runs: Iterable[Run]) -> list[tuple[str, Usage]]:
    """Sum up what processes counted, by the day (or month, or year) when they last counted.

    Parameters
    ----------
    runs : iterable of Run
        As `feature_cache.store.read_runs`.

    Returns
    -------
    list of (str, Usage)
        Newest first; days where that makes at most 31 rows, in local time.
    """
    listed = list(runs)
    for form in ("%Y-%m-%d", "%Y-%m"):
        periods = _sum_by(form, listed)
        if len(periods) <= _MOST_PERIODS:
            return periods
    return _sum_by("%Y", listed)


def _sum_by(form: str, runs: Sequence[Run]) -> list[tuple[str, Usage]]:
    sums: dict[str, Usage] = defaultdict(Usage)
    for run in runs:
        sums[time.strftime(form, time.localtime(run.ended))] += run.usage
    return sorted(sums.items(), reverse=True)


def examine_health(store: Store) -> Health:
    """Look at what is set aside, pinned and claimed. Changes nothing.

    Raises
    ------
    StoreError
        Files can't be read.
    """
    quarantined = tuple((path, tree_bytes(path)) for path in find_quarantined(store.root))
    known = {path.name for path, _ in quarantined}
    names = list_folder(store.root / "quarantine")
    now = store.presence.now()
    damaged_pins = len(read_each(store.root / "pins", read_pin)[1])
    others = set(living(store.root, now)) - {store.presence.name}
    return Health(
        quarantined=quarantined,
        aside=tuple(name for name in names if name not in known),
        pins=() if damaged_pins else tuple(read_pins(store.root)),
        damaged_pins=damaged_pins,
        claims=Counter(_holders(store, now)),
        leftovers=len(find_leftovers(store.root)),
        processes=len(others),
    )


def _holders(store: Store, now: float) -> Iterator[str]:
    claims = store.claims
    gone = {file.name for file in claims.leftovers(now)}
    for name in list_folder(claims.folder):
        if name not in gone and (holder := claims.holder(name)):
            host, pid, _ = holder.rsplit("-", 2)
            yield f"{host.rpartition('_')[0]}:{pid}"
