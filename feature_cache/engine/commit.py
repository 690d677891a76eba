"""Commits: what is computed is written now and then, as whole packs, within a budget of bytes."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from operator import itemgetter
from pathlib import Path

from ..hashing import JSON, Digest
from ..store import Counter, NewRecord, Space, Usage
from ..store.files import tree_bytes
from ..store.maintenance import merge_behind

COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 30.0
"""How long what is computed may wait while more is being computed."""

RECORD_BYTES = 1024
PACK_BYTES = 40 << 10
"""At most about what a record, and a pack, take on disk beside the features."""

Order = tuple[int, int]
"""A record's place in its pack: by draw, then by frame, so that windows in time lie together."""
Written = Callable[[Sequence[tuple[Space, Path]]], None]
"""Called with the packs that were just committed."""


class Budget:
    """Bytes that the cache may take on disk; may be shared by threads.

    Parameters
    ----------
    max_bytes : int
    used : int
        Bytes of the packs that are there.

    Attributes
    ----------
    spent, stopped : bool
        Whether there is no room for more, and whether somebody wants the run to end soon.
    """

    def __init__(self, max_bytes: int, used: int) -> None:
        self.max_bytes, self.used = max_bytes, used
        self.spent = self.stopped = False
        self._lock = threading.RLock()

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be computed."""
        return self.spent or self.stopped

    def take(self, count: int) -> bool:
        """Reserve bytes; False where they would be too many."""
        with self._lock:
            fits = not self.spent and self.used + count <= self.max_bytes
            if fits:
                self.used += count
            return fits

    def settle(self, reserved: int, taken: int) -> None:
        """Replace what was reserved by what was taken."""
        with self._lock:
            self.used += taken - reserved


class Commits:
    """Collects records of any space, and commits them; used by one thread.

    Parameters
    ----------
    counter : Counter
    codec : str
    settled : callable
        Called with the keys of records that are committed, or lost.
    budget : Budget, optional
    written : callable, optional

    Attributes
    ----------
    pending : dict
        What is collected, by key.
    committed : int
        Records committed so far.
    """

    def __init__(
        self,
        counter: Counter,
        codec: str,
        settled: Callable[[Sequence[Digest]], None],
        budget: Budget | None = None,
        written: Written | None = None,
    ) -> None:
        self._counter, self._codec, self._settled = counter, codec, settled
        self._budget, self._written = budget, written
        self.pending: dict[Digest, tuple[Order, Space, NewRecord]] = {}
        self._spaces: set[Space] = set()
        self._bytes = self._reserved = 0
        self._since = 0.0
        self.committed = 0

    def add(self, space: Space, entry: NewRecord, order: Order = (0, 0)) -> bool:
        """Take a record; False where the budget has no room for it, even when all is written.

        In a pack records lie in the order given, in which they came where that is equal.

        Raises
        ------
        StoreError
            As `flush`.
        """
        labels = entry.record.labels
        beside = RECORD_BYTES + (0 if labels is None else labels.nbytes)
        if not self._reserve(space, entry.record.features.nbytes + beside):
            return False
        if not self.pending:
            self._since = time.monotonic()
        self.pending[entry.key] = order, space, entry
        self._spaces.add(space)
        self._bytes += entry.record.features.nbytes
        self._counter.add(Usage(computed=1))
        return True

    def _reserve(self, space: Space, size: int) -> bool:
        if self._budget is None:
            return True
        for last in (False, True):
            # in the loop, as after a flush each space begins another pack
            wanted = size + (0 if space in self._spaces else PACK_BYTES)
            if self._budget.take(wanted):
                self._reserved += wanted
                return True
            if not last:
                self.flush()  # now it is known what these records take
        self._budget.spent = True
        return False

    def seconds_left(self, seconds: float) -> float | None:
        """Give in how many seconds to commit what may wait so long; None where nothing waits."""
        if not self.pending:
            return None
        if self._bytes >= COMMIT_BYTES:
            return 0.0
        return self._since + seconds - time.monotonic()

    def flush(self) -> None:
        """Commit what was added, a space after the other; it is then let go, whatever happens.

        Raises
        ------
        StoreError
            A pack can't be written, as where the disk is full.
        """
        pending, self.pending, self._bytes = self.pending, {}, 0
        spaces, self._spaces = self._spaces, set()
        reserved, self._reserved = self._reserved, 0
        packs: list[tuple[Space, Path]] = []
        ordered = sorted(pending.values(), key=itemgetter(0))
        try:
            for space in sorted(spaces, key=lambda space: space.name):
                entries = [entry for _, one, entry in ordered if one is space]
                names = space.write(entries, versions(), self._codec)
                packs += [(space, space.packs_folder / name) for name in names]
                size = sum(entry.record.features.nbytes for entry in entries)
                self._counter.add(Usage(bytes_written=size))
                self.committed += len(entries)
        finally:
            # not before its packs are there: whoever claims a frame next looks for it in the store;
            # after an error too, as anybody may compute again what is lost
            self._settled(list(pending))
        if self._budget is not None:
            # after an error the reserve stays taken: the run ends with it
            self._budget.settle(reserved, sum(tree_bytes(pack) for _, pack in packs))
        if self._written is None:
            for space, _ in packs:
                merge_behind(space)
        elif packs:
            self._written(packs)


def versions() -> dict[str, JSON]:
    """Say who writes: for people who ask where a record comes from."""
    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "versions": dict(_installed()),
    }


@cache
def _installed() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("feature-cache", "torch", "zarr", "numpy"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
