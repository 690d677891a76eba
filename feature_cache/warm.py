"""Warming: a plan of what is missing, and a run of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from .augment import Augmentations
from .backbones.base import Backbone
from .cache import FeatureCache, MovieFeatures, Progress
from .errors import BackboneError, FrameError, MovieError
from .hashing import JSON, Digest
from .movies import Movie
from .store import Usage

_log = logging.getLogger(__name__)
_PART_FAILS = (BackboneError, FrameError, MovieError)
"""Errors that end one movie, not the whole run."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be warmed, and why.

    Parameters
    ----------
    what : str
        A movie or a frame.
    reason : str
    records : int
        How many records it stands for; 1 for a movie that can't be opened.
    """

    what: str
    reason: str
    records: int

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        return {"what": self.what, "reason": self.reason, "records": self.records}


@dataclass(frozen=True, slots=True)
class Task:
    """The frames of one movie whose records are missing."""

    movie: MovieFeatures
    frames: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class WarmPlan:
    """What there is and what is missing, in records; records of equal keys count once."""

    cache: FeatureCache
    tasks: tuple[Task, ...]
    present: int
    failures: tuple[Failure, ...]

    @property
    def missing(self) -> int:
        """Count the records to compute."""
        return sum(len(task.frames) for task in self.tasks)

    @property
    def planned(self) -> int:
        """Count all records that were asked for."""
        return self.present + self.missing + sum(failure.records for failure in self.failures)


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What a run did, in records: planned = present + computed + failed."""

    planned: int
    present: int
    computed: int
    seconds: float
    failures: tuple[Failure, ...] = field(default=())

    @property
    def failed(self) -> int:
        """Count the records that could not be warmed."""
        return sum(failure.records for failure in self.failures)

    def to_json(self) -> dict[str, JSON]:
        """Give the counts, and each failure with its reason."""
        return {
            "planned": self.planned,
            "present": self.present,
            "computed": self.computed,
            "failed": self.failed,
            "seconds": round(self.seconds, 3),
            "errors": [failure.to_json() for failure in self.failures],
        }


def open_movies(
    paths: Iterable[str], detections: str | None = "TRA"
) -> tuple[list[Movie], list[Failure]]:
    """Open movies; what can't be opened becomes a failure."""
    movies, failures = [], []
    for path in paths:
        try:
            movies.append(Movie.open(path, detections))
        except MovieError as error:
            failures.append(Failure(path, str(error), 1))
    return movies, failures


def plan_warm(
    cache: FeatureCache,
    movies: Iterable[Movie],
    backbone: Backbone,
    *,
    pooling: str | None = "mean_patches_exact",
    dtype: str = "float16",
    augmentations: Augmentations | None = None,
    failures: Iterable[Failure] = (),
    progress: Progress | None = None,
) -> WarmPlan:
    """Find what is missing. Hashes frames and masks; computes nothing, leaves the cache as it is.

    Reads those whose digests the memo doesn't know, and remembers these.

    Parameters
    ----------
    cache, backbone, pooling, dtype
        As `FeatureCache.get_or_compute`.
    movies : iterable of Movie
    augmentations : Augmentations, optional
        Copies to warm beside the movies themselves.
    failures : iterable of Failure
        What failed before, such as movies that could not be opened.
    progress : callable, optional
        Called with the number of frames just hashed.
    """
    copies = augmentations or Augmentations("none", copies=0)
    tasks, failed, seen, present = [], list(failures), set[Digest](), 0
    for movie in movies:
        features = cache.movie(
            movie.frames,
            None if pooling is None else movie.masks,
            backbone,
            pooling=pooling,
            dtype=dtype,
            name=movie.name,
        )
        good, bad = _hash_frames(features, copies.copies + 1, progress)
        failed += bad
        for number, draw in enumerate(copies.draws()):
            copy = features.with_draw(draw, copies.name_of(number))
            new = _unseen(copy, good, seen)
            there = copy.contains(new)
            present += int(there.sum())
            missing = tuple(t for t, found in zip(new, there, strict=True) if not found)
            if missing:
                tasks.append(Task(copy, missing))
    return WarmPlan(cache, tuple(tasks), present, tuple(failed))


def _unseen(movie: MovieFeatures, frames: list[int], seen: set[Digest]) -> list[int]:
    """Give one frame for each key that is not in `seen`, and add these keys to it."""
    first = {movie.key(t): t for t in reversed(frames) if movie.key(t) not in seen}
    seen.update(first)
    return sorted(first.values())


def _hash_frames(
    movie: MovieFeatures, records: int, progress: Progress | None
) -> tuple[list[int], list[Failure]]:
    good, bad = [], []
    with movie.memo:
        for t in range(len(movie)):
            try:
                movie.key(t)
                good.append(t)
            except _PART_FAILS as error:
                bad.append(Failure(movie.where(t), str(error), records))
            if progress is not None:
                progress(1)
    return good, bad


def run_warm(
    plan: WarmPlan, *, batch_size: int = 8, progress: Progress | None = None
) -> WarmReport:
    """Compute and commit what a plan found missing.

    A movie that fails ends with what it had committed, and the rest is done.

    Parameters
    ----------
    plan : WarmPlan
    batch_size : int
        Frames embedded at once.
    progress : callable, optional
        Called with the number of records just computed.

    Raises
    ------
    StoreError
        The cache can't be written; what was committed stays.
    """
    started = time.monotonic()
    plan.cache.counter.add(Usage(hits=plan.present, misses=plan.missing))
    computed, failures = 0, list(plan.failures)
    for task in plan.tasks:
        try:
            computed += task.movie.compute(task.frames, batch_size=batch_size, progress=progress)
        except _PART_FAILS as error:
            left = int((~task.movie.contains(task.frames)).sum())
            computed += len(task.frames) - left
            failures.append(Failure(task.movie.name, str(error), left))
            _log.info("%s failed with %d records left", task.movie.name, left)
    return WarmReport(
        plan.planned, plan.present, computed, time.monotonic() - started, tuple(failures)
    )
