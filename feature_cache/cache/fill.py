"""Computing what is missing: once, whoever asks, and committed as it comes."""

from __future__ import annotations

import logging
import platform
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from ..compute import Job, compute_records
from ..hashing import JSON, Digest
from ..store import Entry, Space, Usage

if TYPE_CHECKING:
    from .cache import FeatureCache
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
        with Commits(movie.cache, movie.space) as commits:
            jobs = self._jobs(frames, taken, left, commits, claim)
            records = compute_records(jobs, movie.spec, movie.backbone, movie.draw, self.batch_size)
            for record in records:
                t = taken.popleft()
                commits.add(Entry(movie.key(t), record, movie.provenance(t)))
                if commits.due(COMMIT_SECONDS):
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


class Commits:
    """Claims records of one space, collects those computed, and commits them.

    As a context, it commits what there is and gives up its claims at the end.
    """

    def __init__(self, cache: FeatureCache, space: Space) -> None:
        self.cache, self.space, self.claims = cache, space, cache.store.claims
        self.pending: list[Entry] = []
        self.bytes, self.since = 0, time.monotonic()
        self.claimed: set[Digest] = set()

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self.flush()
        finally:
            self.release(list(self.claimed))

    def claim(self, keys: Sequence[Digest]) -> list[bool]:
        """Claim records to compute; tell for each whether it is this object's to do."""
        won = self.claims.take(key.hex() for key in keys)
        self.claimed.update(key for key, mine in zip(keys, won, strict=True) if mine)
        return won

    def release(self, keys: Iterable[Digest]) -> None:
        """Give up claims, of those that are this object's."""
        mine = self.claimed.intersection(keys)
        self.claims.release(key.hex() for key in mine)
        self.claimed -= mine

    def add(self, entry: Entry) -> None:
        """Take a record just computed, to be committed when that is due."""
        if not self.pending:
            self.since = time.monotonic()
        self.pending.append(entry)
        self.bytes += entry.record.features.nbytes
        self.cache.counter.add(Usage(computed=1))

    def due(self, seconds: float) -> bool:
        """Tell whether the records should be committed: many bytes, or waiting for some time."""
        waited = time.monotonic() - self.since
        return bool(self.pending) and (self.bytes >= COMMIT_BYTES or waited >= seconds)

    def flush(self) -> list[Digest]:
        """Commit what was added; give its keys. Errors as `Space.write`: it is then let go."""
        entries, size = self.pending, self.bytes
        self.pending, self.bytes = [], 0
        if not entries:
            return []
        keys = [entry.key for entry in entries]
        try:
            self.space.write(entries, versions(), self.cache.codec)
        finally:
            self.release(keys)
        self.cache.counter.add(Usage(bytes_written=size))
        return keys


def versions() -> dict[str, JSON]:
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
