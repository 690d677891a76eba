"""What is missing of movies, asked of an engine: of any number of them in one run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

import numpy as np

from ..engine import (
    PART_FAILS,
    Failure,
    FrameAnswer,
    Model,
    Progress,
    Request,
    Tally,
    request_frame,
)
from ..errors import MissingRecordError
from ..store import Usage
from .folder import OpenCache
from .movie_keys import MovieKeys
from .recent_frames import Recent

_HASHED_AT_ONCE = 16


def compute_wanted(
    wanted: Iterable[tuple[int, Sequence[MovieKeys]]],
    tally: Tally,
    *,
    batch_size: int | None,
    uncounted: Sequence[MovieKeys] = (),
    reads: bool = False,
) -> None:
    """Compute and commit what is missing, of any movies of one cache, in one run of an engine.

    Parameters
    ----------
    wanted : iterable of (int, sequence of MovieKeys)
        A frame, and views of its movie: draws, and spaces of one backbone.
    tally : Tally
    batch_size : int or None
    uncounted : sequence of MovieKeys
        Views whose records are not counted.
    reads : bool
        Whether the records of the others are to be read then: those that can't be are missing.

    Raises
    ------
    As `MovieFeatures.compute`, but for what is a frame's own: that is in the tally.
    """
    check_batch_size(batch_size)
    frames = iter(wanted)
    if (first := next(frames, None)) is None:
        return
    frames, (t, views) = chain([first], frames), first
    cache = views[0].cache
    if cache.store.mode == "r":
        raise MissingRecordError(
            f"{sum(len(wanted) for _, wanted in frames)} records, first {views[0].where(t)}, "
            f"are not in {cache!r}, which can only be read: warm it where you may write"
        )
    with cache.open_engine() as engine:
        requests = request_all(frames, tally, batch_size, uncounted, reads=reads)
        engine.run(requests, until=lambda: tally.fatal is not None)
    if tally.fatal is not None:
        raise tally.fatal


def warm_movies(
    movies: Iterable[Sequence[MovieKeys]],
    *,
    batch_size: int | None,
    progress: Progress | None = None,
) -> int:
    """Compute and commit all that is missing of movies, in one run for each cache.

    Frames are hashed as it goes: the first is computed when a few have been read.

    Parameters
    ----------
    movies : iterable of sequence of MovieKeys
        Each movie's copies.
    batch_size : int or None
        Frames embedded at once.
    progress : callable, optional
        Called with the number of records that were there, or are just done.

    Returns
    -------
    int
        How many records were computed here.

    Raises
    ------
    As `MovieFeatures.compute`.
    """
    check_batch_size(batch_size)
    by_cache: dict[OpenCache, list[Sequence[MovieKeys]]] = {}
    for copies in movies:
        by_cache.setdefault(copies[0].cache, []).append(copies)
    tally = Tally(progress)
    for group in by_cache.values():
        compute_wanted(_find_missing(group, tally, progress), tally, batch_size=batch_size)
    tally.check()
    return tally.computed


def _find_missing(
    movies: Iterable[Sequence[MovieKeys]], tally: Tally, progress: Progress | None
) -> Iterator[tuple[int, Sequence[MovieKeys]]]:
    """Hash frames, some at once; give each with those of its copies that have no record."""
    recent = Recent()
    for movie in movies:
        # copies of equal draws are one: their records have the same keys
        unlike = {(copy.spec, copy.draw): copy for copy in movie}
        copies = [replace(copy, recent=recent) for copy in unlike.values()]
        first = copies[0]
        each = first.hash_each(range(len(first)), tally, len(copies))
        while good := list(islice(each, _HASHED_AT_ONCE)):
            there = np.stack([copy.contains(good) for copy in copies])
            hits = int(there.sum())
            first.cache.counter.add(Usage(hits=hits, misses=there.size - hits))
            if progress is not None:
                progress(hits)
            for t, found in zip(good, there.T, strict=True):
                absent = [
                    view for view, is_there in zip(copies, found, strict=True) if not is_there
                ]
                if absent:
                    yield t, absent
                else:
                    recent.drop((first.frames, first.masks), t)


def request_all(
    wanted: Iterable[tuple[int, Sequence[MovieKeys]]],
    tally: Tally,
    batch_size: int | None,
    uncounted: Sequence[MovieKeys] = (),
    *,
    reads: bool = False,
) -> Iterator[Request]:
    """Give requests for frames, each as it is taken; parameters as `compute_wanted`."""
    models: dict[int, Model] = {}
    silent = Tally()
    for number, (t, views) in enumerate(wanted):
        first = views[0]
        model = models.get(id(first.backbone))
        if model is None:
            model = first.cache.open_model(first.backbone, first.spec.backbone)
            models[id(first.backbone)] = model
        where, origins = first.where(t), {view.draw: view.origin for view in views}
        heard = FrameAnswer(tally, where, origins, number, reads)
        unheard = FrameAnswer(silent, where, origins, number)
        told = [(view, unheard if view in uncounted else heard) for view in views]
        try:
            yield request_frame(model, t, told, batch_size)
        except PART_FAILS as error:  # it can't be hashed
            tally.fail(Failure(where, str(error), len(views)), error, number)


def check_batch_size(batch_size: int | None) -> None:
    """Raise ValueError for a number of frames that makes no batch; None is as many as fit."""
    whole = batch_size is None or isinstance(batch_size, int | np.integer)
    if not whole or (batch_size is not None and batch_size < 1):
        raise ValueError(f"batch_size {batch_size}: expected 1 or more")
