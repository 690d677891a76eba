"""All that the report says of a cache as a whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..store import Store, Usage, read_asked, sum_usage
from ..store.counters import read_runs
from ..store.maintenance import Finding
from ..units import count_text, size_text
from .coverage import Coverage, KnownMovie, find_coverage
from .health import Health, SpaceFacts, examine_health, measure, sum_by_period


@dataclass(frozen=True, slots=True)
class Report:
    """A cache at one moment.

    Attributes
    ----------
    root : Path
    made : float
        Seconds since 1970.
    spaces : tuple of SpaceFacts
    movies : tuple of KnownMovie
    coverage : tuple of Coverage
        One for each space.
    periods : tuple of (str, Usage)
        Newest first.
    usage : Usage
        Of all processes so far.
    health : Health
    findings : tuple of Finding, or None
        What verifying found; None where nothing was verified.
    """

    root: Path
    made: float
    spaces: tuple[SpaceFacts, ...]
    movies: tuple[KnownMovie, ...]
    coverage: tuple[Coverage, ...]
    periods: tuple[tuple[str, Usage], ...]
    usage: Usage
    health: Health
    findings: tuple[Finding, ...] | None

    @property
    def totals(self) -> list[tuple[str, str]]:
        """Name the numbers that stand at the top."""
        asked = self.usage.hits + self.usage.misses
        return [
            ("movies", f"{len(self.movies):,}"),
            ("records", f"{sum(space.records for space in self.spaces):,}"),
            ("on disk", size_text(sum(space.bytes for space in self.spaces))),
            ("spaces", f"{len(self.spaces):,}"),
            ("hits, of all records asked for", f"{self.usage.hits / asked:.0%}" if asked else "-"),
        ]

    @property
    def condition(self) -> list[tuple[str, str]]:
        """Say what waits and what should be looked after, in lines for people."""
        health, packs = self.health, sum(space.packs for space in self.spaces)
        claims = ", ".join(f"{who} ({count:,})" for who, count in sorted(health.claims.items()))
        damaged = f"{health.damaged_pins} damaged: run feature-cache verify --repair"
        return [
            ("Packs", f"{packs:,}"),
            ("In quarantine", _count(len(health.quarantined) + len(health.aside), "thing")),
            ("Bytes in quarantine", size_text(sum(size for _, size in health.quarantined))),
            ("Pinned", damaged if health.damaged_pins else _count(len(health.pins), "pin")),
            ("Claimed just now", claims or "nothing"),
            ("Left by killed processes", _count(health.leftovers, "file")),
            ("Processes that use it now", f"{health.processes:,}"),
        ]


def _count(number: int, what: str) -> str:
    return count_text(number, what) if number else "none"


def survey_cache(store: Store, findings: Sequence[Finding] | None = None) -> Report:
    """Look at a cache: spaces, coverage, use and health. Changes nothing.

    Parameters
    ----------
    store : Store
        In mode ``"r"``.
    findings : sequence of Finding, optional
        What `feature_cache.store.maintenance.verify` just found.

    Raises
    ------
    StoreError
        Files can't be read.
    """
    spaces, now = store.spaces(), time.time()
    movies, coverage = find_coverage(spaces, read_asked(store.root))
    runs = read_runs(store.root)
    return Report(
        root=store.root,
        made=now,
        spaces=tuple(measure(space, now) for space in spaces),
        movies=tuple(movies),
        coverage=tuple(coverage),
        periods=tuple(sum_by_period(runs)),
        usage=sum_usage(runs),
        health=examine_health(store),
        findings=None if findings is None else tuple(findings),
    )
