"""What is asked of an engine, and what it needs for it."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

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
    future: Future[Record] = field(default_factory=Future)
    elsewhere_since: float | None = None
    due: float = 0.0
    wait: float = FIRST_WAIT_SECONDS

    @property
    def job(self) -> Job:
        """What to compute; gone once it is."""
        if self.wanted is None:
            raise RuntimeError(f"record {self.key.hex()} is computed already")
        return self.wanted.job
