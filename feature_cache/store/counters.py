"""Hits, misses, computed records and bytes: counted by each process, kept in the cache."""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import secrets
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import StoreError
from ..forks import Lock
from ..hashing import canonical_json
from .claims import Claims
from .files import make_folder, read_each, read_json, reading, write_text, writing
from .process import join, living, this_host

if TYPE_CHECKING:
    from .store import Store

_log = logging.getLogger(__name__)
_SAVE_SECONDS = 10.0
_MERGED = "merged-"
_MERGE_CLAIM = "merge-stats"
_FILE_LIMIT = 1 << 26


@dataclass(frozen=True, slots=True)
class Usage:
    """How a cache was used, in records, and bytes of features read and written."""

    hits: int = 0
    misses: int = 0
    computed: int = 0
    bytes_read: int = 0
    bytes_written: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Sum up field by field; written out, as it is done for every window read."""
        return Usage(
            self.hits + other.hits,
            self.misses + other.misses,
            self.computed + other.computed,
            self.bytes_read + other.bytes_read,
            self.bytes_written + other.bytes_written,
        )

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
        plain = asdict(self)
        usage = plain.pop("usage")
        return {**plain, **usage}

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Run:
        """Read a run, also one of an older version; ValueError for anything else."""
        host, pid = plain.get("host", ""), plain.get("pid", 0)
        times = plain.get("started", 0.0), plain.get("ended", 0.0)
        if not (type(pid) is int and all(type(t) in (int, float) and isfinite(t) for t in times)):
            raise ValueError(f"process {pid} and times {times} are no numbers")
        return cls(str(host), pid, float(times[0]), float(times[1]), Usage.from_json(plain))


class Counter:
    """Counts one process's hits, misses and computed records, and keeps them in the store.

    May be shared by threads. Kept every few seconds while counting, when asked, and when the cache
    object or the process ends; never in a read-only store. A forked child counts its own.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        # Two, so that nobody who counts waits for a file to be written.
        self._counting, self._saving = Lock(), Lock()
        self._restart()

    def _restart(self) -> None:
        process, self._total = os.getpid(), Usage()
        self._name = f"{process}-{secrets.token_hex(8)}"
        self._saved_at, self._saved, self._started = time.monotonic(), Usage(), time.time()
        self._process = process  # last: other threads look at it without the lock

    @property
    def total(self) -> Usage:
        """What this process counted so far."""
        if self._process != os.getpid():
            with self._counting:
                if self._process != os.getpid():
                    self._restart()
                    # What saves it when a process ends is passed over in a child of
                    # multiprocessing.
                    multiprocessing.util.Finalize(None, self.save, exitpriority=10)
        return self._total

    def add(self, usage: Usage) -> None:
        """Count more."""
        with self._counting:
            self._total = self.total + usage
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Keep the counters in the store; where that fails, say so in the log and go on."""
        # One after the other, or an older total could come last.
        with self._saving:
            self._save()

    def _save(self) -> None:
        # The time also where it can't be saved, or each count would try again.
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
    with reading(root / "stats"):
        files, _ = read_each(root / "stats", read_run)
    merged = {name for _, names in files.values() for name in names}
    runs = [run for name, (run, _) in files.items() if name not in merged]
    return sorted(runs, key=lambda run: run.ended)


def read_run(file: Path) -> tuple[Run, frozenset[str]]:
    """Read a file of counters, with the names of those that it stands for; else ValueError."""
    try:
        plain = read_json(file, _FILE_LIMIT)
        return Run.from_json(plain), frozenset(map(str, plain.get("of", ())))
    except (TypeError, OverflowError) as error:
        raise ValueError(f"{file} holds no counters") from error


def sum_usage(runs: Iterable[Run]) -> Usage:
    """Sum up what several processes counted."""
    return sum((run.usage for run in runs), Usage())


def merge_runs(root: Path, before: float) -> int:
    """Merge the files of processes that are gone, and last counted before a time; say how many.

    At every moment, also after a kill, each process counts exactly once: the merged file says
    which files it stands for.

    Raises
    ------
    StoreError
        The files can't be written.
    """
    claims = Claims(root)
    if not claims.take([_MERGE_CLAIM])[0]:
        return 0  # two mergers would count twice
    try:
        with writing(root / "stats"):
            return _merge(root, before)
    finally:
        claims.release([_MERGE_CLAIM])


def _merge(root: Path, before: float) -> int:
    living_processes = living(root, join(root).now()).values()
    alive = {(process.host, process.pid) for process in living_processes}
    files, _ = read_each(root / "stats", read_run)
    done = {name for _, names in files.values() for name in names}
    # None of who lives: it writes its file anew, and what a merged file names counts no more.
    old = {
        name: run
        for name, (run, _) in files.items()
        if name not in done and run.ended < before and (run.host, run.pid) not in alive
    }
    if len(old) > 1:
        started, ended = min(r.started for r in old.values()), max(r.ended for r in old.values())
        merged = Run("", 0, started, ended, sum_usage(old.values()))
        # With those that these stood for: a kill may leave them there when these are gone.
        of = sorted(set(old) | (done & set(files)))
        text = canonical_json({**merged.to_json(), "of": of})
        write_text(root / "stats" / f"{_MERGED}{secrets.token_hex(8)}.json", text)
        done |= set(old)
    # Also what an earlier merge, killed, had summed up and left.
    for name in done & set(files):
        (root / "stats" / name).unlink(missing_ok=True)
    return len(old) if len(old) > 1 else 0
