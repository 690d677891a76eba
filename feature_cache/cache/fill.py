"""Computing what is missing: once, whoever asks, and committed as it comes."""

from __future__ import annotations

import logging
import platform
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..compute import Job, compute_records
from ..hashing import JSON
from ..key import Record
from ..store import Entry, Usage

if TYPE_CHECKING:
    from .movie import MovieFeatures, Progress

COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 30.0
PATIENCE_SECONDS = 600.0
"""How long others may take without a new record before their work is done here as well."""

_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 0.02, 1.0
_log = logging.getLogger(__name__)


def fill(
    movie: MovieFeatures, frames: Sequence[int], *, batch_size: int, progress: Progress | None
) -> int:
    """Compute the records of some frames; those that another process is at are waited for.

    Returns
    -------
    int
        How many were computed here.
    """
    work = _Fill(movie, batch_size, progress)
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

    def __init__(self, movie: MovieFeatures, batch_size: int, progress: Progress | None) -> None:
        self.movie, self.batch_size, self.progress = movie, batch_size, progress
        self.computed = 0

    def run(self, frames: Sequence[int], *, claim: bool) -> list[int]:
        """Compute what can be claimed; give the frames that other processes are at."""
        movie, taken = self.movie, deque[int]()
        left: list[int] = []
        with _Commits(movie) as commits:
            jobs = self._jobs(frames, taken, left, commits, claim)
            records = compute_records(jobs, movie.spec, movie.backbone, movie.draw, self.batch_size)
            for record in records:
                commits.add(taken.popleft(), record)
                self.computed += 1
                self._tell(1)
        return left

    def _jobs(
        self,
        frames: Sequence[int],
        taken: deque[int],
        left: list[int],
        commits: _Commits,
        claim: bool,
    ) -> Iterator[Job]:
        """Claim frames a batch at a time, and give those to compute."""
        movie = self.movie
        for start in range(0, len(frames), self.batch_size):
            batch = list(frames[start : start + self.batch_size])
            if claim:
                won = commits.claim(batch)
                left += [t for t, mine in zip(batch, won, strict=True) if not mine]
                batch = [t for t, mine in zip(batch, won, strict=True) if mine]
            # Only now can nobody else commit them: what is there by now is not computed again.
            there = self._there(batch)
            commits.release([t for t, found in zip(batch, there, strict=True) if found])
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


class _Commits:
    """Claims, collects computed records, and commits them now and then, and at the end."""

    def __init__(self, movie: MovieFeatures) -> None:
        self.movie, self.claims = movie, movie.cache.store.claims
        self.pending: list[Entry] = []
        self.bytes, self.since = 0, time.monotonic()
        self.claimed: set[int] = set()

    def __enter__(self) -> _Commits:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self.release(list(self.claimed))

    def claim(self, frames: Sequence[int]) -> list[bool]:
        won = self.claims.take(self.movie.key(t).hex() for t in frames)
        self.claimed.update(t for t, mine in zip(frames, won, strict=True) if mine)
        return won

    def release(self, frames: Sequence[int]) -> None:
        mine = self.claimed.intersection(frames)
        self.claims.release(self.movie.key(t).hex() for t in mine)
        self.claimed -= mine

    def add(self, t: int, record: Record) -> None:
        self.pending.append(Entry(self.movie.key(t), record, self.movie.provenance(t)))
        self.bytes += record.features.nbytes
        if self.bytes >= COMMIT_BYTES or time.monotonic() - self.since >= COMMIT_SECONDS:
            self.flush()

    def flush(self) -> None:
        entries, size = self.pending, self.bytes
        self.pending, self.bytes, self.since = [], 0, time.monotonic()
        if not entries:
            return
        cache, keys = self.movie.cache, {entry.key for entry in entries}
        self.movie.space.write(entries, _versions(), cache.codec)
        cache.counter.add(Usage(computed=len(entries), bytes_written=size))
        self.release([t for t in self.claimed if self.movie.key(t) in keys])


def _versions() -> dict[str, JSON]:
    """Say who writes: for people who ask where a record comes from."""
    from importlib.metadata import PackageNotFoundError, version

    def installed() -> Iterator[tuple[str, JSON]]:
        for package in ("feature-cache", "torch", "zarr", "numpy"):
            try:
                yield package, version(package)
            except PackageNotFoundError:
                continue

    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "versions": dict(installed()),
    }
