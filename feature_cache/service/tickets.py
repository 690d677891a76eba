"""What is asked of an engine, and what it needs for it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from ..augment import Draw
from ..cache import Grids
from ..cache.commits import Commits
from ..compute import Embedder, Job
from ..hashing import JSON, Digest
from ..key import Record
from ..spec import SpaceSpec
from ..store import Space

FIRST_WAIT_SECONDS = 0.02
"""How soon is looked again for what another process computes."""


class Promise:
    """A record to come, or the error in its place, for all who wait for it.

    A `Future` has a lock that Ctrl-C can leave held by who waits; who computes would hang on it.

    Parameters
    ----------
    record : Record, optional
        One that has come already.
    """

    def __init__(self, record: Record | None = None) -> None:
        self._record = record
        self._error: BaseException | None = None
        self._news = SimpleQueue[None]()

    @property
    def done(self) -> bool:
        """Whether it was kept, or failed."""
        return self._record is not None or self._error is not None

    def keep(self, record: Record) -> None:
        """Give the record."""
        self._record = record
        self._news.put(None)

    def fail(self, error: BaseException) -> None:
        """Give an error in its place."""
        self._error = error
        self._news.put(None)

    def wait(self, seconds: float) -> Record:
        """Give the record, or raise what came in its place; TimeoutError after some seconds."""
        if not self.done:
            with suppress(Empty):
                self._news.put(self._news.get(timeout=seconds))  # the next who waits hears it too
        if self._record is not None:
            return self._record
        try:
            raise self._error or TimeoutError
        finally:
            del self  # which the error's traceback would keep, and it the error


@dataclass(frozen=True, slots=True)
class Wanted:
    """A record to compute."""

    key: Digest
    job: Job
    draw: Draw
    provenance: dict[str, JSON]

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels."""
        return self.job.frame.nbytes + (self.job.mask.nbytes if self.job.mask is not None else 0)


@dataclass(eq=False, slots=True)
class Bench:
    """What one space needs: its spec, its records in the store, its backbone, stored grids."""

    spec: SpaceSpec
    space: Space
    embedder: Embedder
    commits: Commits
    grids: Grids


@dataclass(eq=False, slots=True)
class Ticket:
    """A record on its way, for all who ask for it."""

    bench: Bench
    key: Digest
    wanted: Wanted | None
    batch_size: int
    group: tuple[int, str, tuple[int, ...]]
    nbytes: int
    promise: Promise = field(default_factory=lambda: Promise())
    elsewhere_since: float | None = None
    due: float = 0.0
    wait: float = FIRST_WAIT_SECONDS

    @property
    def job(self) -> Job:
        """What to compute; gone once it is."""
        if self.wanted is None:
            raise RuntimeError(f"record {self.key.hex()} is computed already")
        return self.wanted.job
