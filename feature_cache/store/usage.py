"""Hits, misses, computed records and bytes: counted by each process, kept in the cache."""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..hashing import canonical_json
from .files import list_folder, make_folder, read_json, reading, write_text, writing
from .process import this_host

if TYPE_CHECKING:
    from .store import Store

_log = logging.getLogger(__name__)
_SAVE_SECONDS = 10.0
_MERGED = "merged-"


@dataclass(frozen=True, slots=True)
class Usage:
    """How a cache was used, in records, and bytes of features read and written."""

    hits: int = 0
    misses: int = 0
    computed: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Sum up field by field."""
        return Usage(*(a + b for a, b in zip(self._values(), other._values(), strict=True)))

    def _values(self) -> tuple[int, ...]:
        return tuple(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Give the counters by name."""
        return asdict(self)

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Usage:
        """Read counters by name; those not there are 0. ValueError for anything but numbers."""
        values = {name: plain.get(name, 0) for name in cls.__dataclass_fields__}
        if not all(type(value) is int for value in values.values()):
            raise ValueError(f"counters {values} are no whole numbers")
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Run:
    """How one process used a cache.

    Attributes
    ----------
    host, pid : str, int
        Who; empty and 0 for the sum of processes long gone.
    started, ended : float
        Seconds since 1970; `ended` is when it last counted.
    usage : Usage
    """

    host: str
    pid: int
    started: float
    ended: float
    usage: Usage

    def to_json(self) -> dict[str, Any]:
        """Give all by name."""
        times = {"host": self.host, "pid": self.pid, "started": self.started, "ended": self.ended}
        return {**times, **self.usage.to_json()}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Run:
        """Read a run, also one of an older version; ValueError for anything else."""
        host, pid = plain.get("host", ""), plain.get("pid", 0)
        started, ended = plain.get("started", 0.0), plain.get("ended", 0.0)
        return cls(str(host), int(pid), float(started), float(ended), Usage.from_json(plain))


class Counter:
    """Counts one process's hits, misses and computed records, and keeps them in the store.

    Kept every few seconds while counting, when asked, and when the cache object or the process
    ends; never in a read-only store. A forked child counts its own.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._restart()

    def _restart(self) -> None:
        self._process, self._total = os.getpid(), Usage()
        self._name = f"{self._process}-{secrets.token_hex(8)}"
        self._saved_at, self._saved, self._started = time.monotonic(), Usage(), time.time()

    @property
    def total(self) -> Usage:
        """What this process counted so far."""
        if self._process != os.getpid():
            self._restart()
        return self._total

    def add(self, usage: Usage) -> None:
        """Count more."""
        self._total = self.total + usage
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Keep the counters in the store; where that fails, say so in the log and go on."""
        total, self._saved_at = self.total, time.monotonic()
        if self._store.mode == "r" or total == self._saved or not self._store.root.exists():
            return
        run = Run(this_host(), self._process, self._started, time.time(), total)
        try:
            with writing(self._store.root):
                folder = self._store.root / "stats"
                make_folder(folder)
                write_text(folder / f"{self._name}.json", canonical_json(run.to_json()))
            self._saved = total
        except StoreError as error:
            _log.warning("hits and misses are not kept: %s", error)


def read_runs(root: Path) -> list[Run]:
    """Read how each process used a cache, oldest first; processes long gone are one run."""
    files = _read_files(root)
    merged = {name for plain in files.values() for name in plain.get("of", ())}
    runs = []
    for name, plain in files.items():
        try:
            runs += [Run.from_json(plain)] if name not in merged else []
        except (ValueError, TypeError) as error:
            _log.warning("leaving out the counters in stats/%s, which are damaged: %s", name, error)
    return sorted(runs, key=lambda run: run.ended)


def sum_usage(runs: Iterable[Run]) -> Usage:
    """Sum up what several processes counted."""
    return sum((run.usage for run in runs), Usage())


def merge_runs(root: Path, before: float) -> int:
    """Merge the files of processes that ended before a time into one; give how many there were.

    At every moment, also after a kill, each process counts exactly once: the merged file says
    which files it stands for.

    Raises
    ------
    StoreError
        The files can't be written.
    """
    files = _read_files(root)
    with writing(root / "stats"):
        done = {name for plain in files.values() for name in plain.get("of", ())}
        for name in done & set(files):
            (root / "stats" / name).unlink(missing_ok=True)
        old = {}
        for name, plain in files.items():
            if name not in done and float(plain.get("ended", 0.0)) < before:
                old[name] = Run.from_json(plain)
        if len(old) < 2:
            return 0
        started = min(run.started for run in old.values())
        ended = max(run.ended for run in old.values())
        run = Run("", 0, started, ended, sum_usage(old.values()))
        text = canonical_json({**run.to_json(), "of": sorted(old)})
        write_text(root / "stats" / f"{_MERGED}{secrets.token_hex(8)}.json", text)
        for name in old:
            (root / "stats" / name).unlink(missing_ok=True)
    return len(old)


def _read_files(root: Path) -> dict[str, dict[str, Any]]:
    found = {}
    with reading(root / "stats"):
        for name in list_folder(root / "stats"):
            if not name.endswith(".json"):
                continue
            try:
                found[name] = read_json(root / "stats" / name)
            except FileNotFoundError:
                continue
            except ValueError as error:
                _log.warning("leaving out stats/%s, which is damaged: %s", name, error)
    return found
