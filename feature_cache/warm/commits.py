"""Commits of a run: written beside the computation, within a budget of bytes."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from ..cache import FeatureCache, MovieFeatures
from ..cache.commits import Commits, Pending
from ..key import Record
from ..store import Space
from ..store.files import tree_bytes
from .push import Pushing

RECORD_BYTES, GRID_BYTES = 1024, 8 << 10
PACK_BYTES = 96 << 10
"""At most about what a record, and a pack, take on disk beside the features."""


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
        self._lock = threading.Lock()

    @classmethod
    def of(cls, cache: FeatureCache, max_bytes: int) -> Budget:
        """Look at what the packs of a cache take now."""
        return cls(max_bytes, sum(space.disk_bytes() for space in cache.store.spaces()))

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


class RunCommits(Commits):
    """Commits what is due by itself; one commit is written while the next is collected.

    Parameters
    ----------
    cache : FeatureCache
    budget : Budget, optional
    pushing : Pushing, optional
        Where the packs are sent.
    """

    def __init__(
        self, cache: FeatureCache, budget: Budget | None = None, pushing: Pushing | None = None
    ) -> None:
        super().__init__(cache)
        self.budget, self.pushing, self._reserved = budget, pushing, 0
        self._spaces: set[Space] = set()
        self._writer = ThreadPoolExecutor(1, "feature_cache commit")
        self._writing: Future[None] | None = None

    def add(self, view: MovieFeatures, t: int, record: Record) -> bool:
        """Take a record to be committed; False where the budget has no room for it."""
        beside = GRID_BYTES if record.labels is None else RECORD_BYTES + record.labels.nbytes
        reserved = self._reserve(view.space, record.features.nbytes + beside)
        if reserved is None:
            return False
        self._spaces.add(view.space)
        self._reserved += reserved
        super().add(view, t, record)
        if self.due():
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

    def flush(self) -> None:
        """Hand over what is collected to be written; waits for the commit before it."""
        pending, reserved = self._take(), self._reserved
        self._spaces, self._reserved = set(), 0
        self._wait()
        if pending:
            self._writing = self._writer.submit(self._write_within, pending, reserved)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write_within(self, pending: Pending, reserved: int) -> None:
        packs = self._write(pending)
        if self.budget is not None:
            self.budget.settle(reserved, sum(tree_bytes(pack) for _, pack in packs))
        if self.pushing is not None:
            self.pushing.send(packs)

    def close(self) -> None:
        """Commit what is collected, and give up all claims."""
        try:
            self.flush()
            self._wait()
        finally:
            self._writer.shutdown()
            self.release(set(self._claimed))
