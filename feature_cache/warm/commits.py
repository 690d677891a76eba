"""Claims and commits of a run: records of any movie and space, written beside the computation."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from ..cache import FeatureCache, MovieFeatures, fill
from ..hashing import Digest
from ..key import Record
from ..store import Entry, Space, Usage
from ..store.files import tree_bytes

RECORD_BYTES = 1024
PACK_BYTES = 16 << 10
"""At most about what a record, and a pack, take on disk beside the features."""


class Budget:
    """Bytes that the cache may take on disk; may be shared by threads.

    Parameters
    ----------
    max_bytes : int
    used : int
        Bytes of the packs that are there.
    """

    def __init__(self, max_bytes: int, used: int) -> None:
        self.max_bytes, self.used = max_bytes, used
        self.spent = False
        self._lock = threading.Lock()

    @classmethod
    def of(cls, cache: FeatureCache, max_bytes: int) -> Budget:
        """Look at what the packs of a cache take now."""
        return cls(max_bytes, sum(space.disk_bytes() for space in cache.store.spaces()))

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


class RunCommits:
    """Claims, collects computed records, and commits them now and then, and at the end.

    One commit is written while the next is collected.

    Parameters
    ----------
    cache : FeatureCache
    budget : Budget, optional
    """

    def __init__(self, cache: FeatureCache, budget: Budget | None = None) -> None:
        self.cache, self.budget = cache, budget
        self._claims = cache.store.claims
        self._claimed: set[Digest] = set()
        self._lock = threading.Lock()
        self._pending: list[tuple[Space, Entry]] = []
        self._spaces: set[Space] = set()
        self._bytes, self._reserved, self._since = 0, 0, time.monotonic()
        self._writer = ThreadPoolExecutor(1, "feature_cache commit")
        self._writing: Future[None] | None = None

    def claim(self, keys: Sequence[Digest]) -> list[bool]:
        """Claim records; tell for each whether it is this run's."""
        won = self._claims.take(key.hex() for key in keys)
        with self._lock:
            self._claimed.update(key for key, mine in zip(keys, won, strict=True) if mine)
        return won

    def release(self, keys: Collection[Digest]) -> None:
        """Give up claims."""
        with self._lock:
            mine = self._claimed.intersection(keys)
            self._claimed -= mine
        self._claims.release(key.hex() for key in mine)

    def add(self, view: MovieFeatures, t: int, record: Record) -> bool:
        """Take a record to be committed; False where the budget has no room for it."""
        size = record.features.nbytes
        labels = 0 if record.labels is None else record.labels.nbytes
        reserved = self._reserve(view.space, size + labels + RECORD_BYTES)
        if reserved is None:
            return False
        self._spaces.add(view.space)
        self._pending.append((view.space, Entry(view.key(t), record, view.provenance(t))))
        self._bytes += size
        self._reserved += reserved
        if self._bytes >= fill.COMMIT_BYTES or self._is_due():
            self.flush()
        return True

    def _reserve(self, space: Space, size: int) -> int | None:
        """Reserve bytes, at need once it is known what the last commits took; None for no room."""
        if self.budget is None:
            return 0
        for last in (False, True):
            wanted = size + (0 if space in self._spaces else PACK_BYTES)
            if self.budget.take(wanted):
                return wanted
            if not last:
                self.flush()
                self._wait()
        self.budget.spent = True
        return None

    def _is_due(self) -> bool:
        return time.monotonic() - self._since >= fill.COMMIT_SECONDS

    def flush(self) -> None:
        """Hand over what is collected to be written; waits for the commit before it."""
        pending, reserved = self._pending, self._reserved
        self._pending, self._spaces = [], set()
        self._bytes, self._reserved, self._since = 0, 0, time.monotonic()
        self._wait()
        if pending:
            self._writing = self._writer.submit(self._write, pending, reserved)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, pending: list[tuple[Space, Entry]], reserved: int) -> None:
        taken = 0
        for space in dict.fromkeys(space for space, _ in pending):
            entries = [entry for one, entry in pending if one is space]
            names = space.write(entries, fill.versions(), self.cache.codec)
            size = sum(entry.record.features.nbytes for entry in entries)
            self.cache.counter.add(Usage(computed=len(entries), bytes_written=size))
            self.release([entry.key for entry in entries])
            if self.budget is not None:
                taken += sum(tree_bytes(space.packs_folder / name) for name in names)
        if self.budget is not None:
            self.budget.settle(reserved, taken)

    def close(self) -> None:
        """Commit what is collected, and give up all claims."""
        try:
            self.flush()
            self._wait()
        finally:
            self._writer.shutdown()
            self.release(set(self._claimed))
