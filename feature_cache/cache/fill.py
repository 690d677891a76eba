"""Computing what is missing: once, whoever asks, and committed as it comes."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..compute import Embedder, Job, compute_grids, make_record
from .commits import Commits
from .grids import Grids

if TYPE_CHECKING:
    from .movie import MovieFeatures, Progress

PATIENCE_SECONDS = 600.0
"""How long others may take without a new record before their work is done here as well."""

_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 0.02, 1.0
_log = logging.getLogger(__name__)


def fill(
    movie: MovieFeatures,
    frames: Sequence[int],
    *,
    batch_size: int,
    progress: Progress | None,
    keep_grids: bool,
) -> int:
    """Compute the records of some frames; those that another process is at are waited for.

    What is pooled is pooled from stored grids, where there are any.

    Returns
    -------
    int
        How many were computed here.
    """
    work = _Fill(movie, batch_size, progress, keep_grids)
    left, wait, since = list(frames), _FIRST_WAIT_SECONDS, time.monotonic()
    while left:
        before, waited = len(left), time.monotonic() - since
        if waited >= PATIENCE_SECONDS:
            _log.warning(
                "no record of %s came from other processes for %.0f s: computing %d here",
                movie.name or "the movie", waited, len(left),
            )  # fmt: skip
        left = work.run(left, claim=waited < PATIENCE_SECONDS)
        if len(left) < before:
            wait, since = _FIRST_WAIT_SECONDS, time.monotonic()
        elif left:
            if wait == _FIRST_WAIT_SECONDS:
                _say_waiting(movie, left)
            time.sleep(wait)
            wait = min(2 * wait, _LAST_WAIT_SECONDS)
    return work.computed


def _say_waiting(movie: MovieFeatures, left: Sequence[int]) -> None:
    _log.info(
        "waiting for %d records of %s that other processes compute, first %s by %s",
        len(left), movie.name or "the movie", movie.where(left[0]),
        movie.cache.store.claims.holder(movie.key(left[0]).hex()),
    )  # fmt: skip


class _Fill:
    """Passes over the missing frames of one movie."""

    def __init__(
        self,
        movie: MovieFeatures,
        batch_size: int,
        progress: Progress | None,
        keep_grids: bool,
    ) -> None:
        self.movie, self.batch_size, self.progress = movie, batch_size, progress
        self.embedder = Embedder(movie.backbone, movie.spec.backbone)
        self.grids = Grids(movie.cache, movie.spec.backbone)
        kept = keep_grids and movie.spec != self.grids.spec
        self.dense = movie.in_space(self.grids.spec) if kept else None
        self.computed = 0

    def run(self, frames: Sequence[int], *, claim: bool) -> list[int]:
        """Compute what can be claimed; give the frames that other processes are at."""
        movie, taken = self.movie, deque[int]()
        left: list[int] = []
        find = self.grids.find if movie.spec.pooling is not None else None
        with Commits(movie.cache) as commits:
            jobs = self._jobs(frames, taken, left, commits, claim)
            for job, grid in compute_grids(
                jobs, self.embedder, movie.draw, self.batch_size, find=find
            ):
                if isinstance(grid, Exception):
                    raise grid
                t = taken.popleft()
                commits.add(movie, t, make_record(job, grid, movie.spec, movie.draw))
                if self.dense is not None and not self.dense.contains([t])[0]:
                    commits.add(self.dense, t, make_record(job, grid, self.grids.spec, movie.draw))
                if commits.due():
                    commits.flush()
                self.computed += 1
                self._tell(1)
        return left

    def _jobs(
        self,
        frames: Sequence[int],
        taken: deque[int],
        left: list[int],
        commits: Commits,
        claim: bool,
    ) -> Iterator[Job]:
        """Claim frames a batch at a time, and give those to compute."""
        movie = self.movie
        for start in range(0, len(frames), self.batch_size):
            batch = list(frames[start : start + self.batch_size])
            if claim:
                won = commits.claim([movie.key(t) for t in batch])
                left += [t for t, mine in zip(batch, won, strict=True) if not mine]
                batch = [t for t, mine in zip(batch, won, strict=True) if mine]
            # Only now can nobody else commit them: what is there by now is not computed again.
            there = self._there(batch)
            commits.release([movie.key(t) for t, found in zip(batch, there, strict=True) if found])
            self._tell(sum(there))
            for t, found in zip(batch, there, strict=True):
                if not found:
                    taken.append(t)
                    yield movie.job(t)
        done = self._there(left)
        self._tell(sum(done))
        left[:] = [t for t, found in zip(left, done, strict=True) if not found]

    def _there(self, frames: Sequence[int]) -> list[bool]:
        return self.movie.contains(frames).tolist() if frames else []

    def _tell(self, count: int) -> None:
        if self.progress is not None and count:
            self.progress(count)
