"""From files to committed records on one device: reading, embedding, pooling and writing overlap.

::

    feed     claims records, and has frames read and normalised by a few threads
    embed    one batch after the other on the device, in the thread that calls `run`
    collect  takes what the threads pooled, and commits it

Between them are bounded queues, so that memory does not grow with a movie's length.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..cache import FeatureCache, Grids, MovieFeatures
from ..compute import Embedder, Grid, Job, make_record, prepare_frame
from ..key import Record
from ..normalize import Pixels
from ..spec import BackboneSpec
from .commits import Budget, RunCommits
from .memory import trim
from .pipe import Pipe
from .plan import Unit
from .push import Pushing
from .report import PART_FAILS, Failure, Tally

if TYPE_CHECKING:
    from ..backbones.base import Backbone

_THREADS = 3
_BATCHES_AHEAD = 3


@dataclass(frozen=True, slots=True)
class _Frame:
    """One frame on its way, and the spaces where its record is to be computed."""

    unit: Unit
    views: tuple[MovieFeatures, ...]
    t: int
    stored: bool

    def fail(self, error: Exception) -> Failure:
        where = self.views[0].where(self.t)
        if self.views[0].origin and not self.views[0].draw.is_identity:
            where = f"{where}, {self.views[0].origin}"
        return Failure(where, str(error), len(self.views))


@dataclass(frozen=True, slots=True)
class _Read:
    """A frame that was read: normalised pixels, or the grid that was stored."""

    frame: _Frame
    job: Job
    image: Pixels | None
    grid: Grid | None


_Pooled = tuple[_Frame, "Future[list[Record]]"]


class Pipeline:
    """Computes units with one backbone.

    Parameters
    ----------
    cache : FeatureCache
    backbone : Backbone
    spec : BackboneSpec
        Of which the keys were made.
    batch_size : int
        Frames embedded at once; fewer where the device's memory does not suffice.
    tally : Tally
    budget, pushing
        As `RunCommits`.
    claim : bool
        Whether work is claimed, so that nobody else does it.
    """

    def __init__(
        self,
        cache: FeatureCache,
        backbone: Backbone,
        spec: BackboneSpec,
        *,
        batch_size: int,
        tally: Tally,
        budget: Budget | None = None,
        pushing: Pushing | None = None,
        claim: bool = True,
    ) -> None:
        self.cache, self.spec, self.batch_size = cache, spec, batch_size
        self.tally, self.budget, self._claims = tally, budget, claim
        self._embedder, self._grids = Embedder(backbone, spec), Grids(cache, spec)
        self._commits = RunCommits(cache, budget, pushing)
        self._ready: Pipe[Future[_Read | Failure]] = Pipe(_BATCHES_AHEAD * batch_size)
        self._done: Pipe[_Pooled] = Pipe(2 * batch_size)

    def run(self, units: Iterable[Unit]) -> list[Unit]:
        """Compute units and commit their records; give what other processes are at.

        What is computed when an error or a signal ends it is committed.

        Raises
        ------
        StoreError
            The cache can't be read or written.
        """
        left: list[Unit] = []
        with (
            ThreadPoolExecutor(_THREADS, "feature_cache read") as self._threads,
            ThreadPoolExecutor(2, "feature_cache stage") as stages,
        ):
            feeding = stages.submit(_here(self._feed), units, left)
            collecting = stages.submit(_here(self._collect))
            try:
                self._embed_all()
            finally:
                self._ready.break_off()
                self._done.close()
                wait([feeding])  # or it would go on to claim
                try:
                    collecting.result()
                finally:
                    self._commits.close()
        feeding.result()
        return left

    def halt(self) -> None:
        """Stop soon, from another thread: what is embedded by then is committed."""
        self._ready.break_off()

    # Feed

    def _feed(self, units: Iterable[Unit], left: list[Unit]) -> None:
        try:
            for unit in units:
                trim()
                rest: list[tuple[int, tuple[int, ...]]] = []
                for frame in self._claim_unit(unit, rest):
                    if not self._ready.put(self._threads.submit(_here(self._read), frame)):
                        return
                if rest:
                    left.append(Unit(unit.task, tuple(rest)))
        finally:
            self._ready.close()

    def _claim_unit(self, unit: Unit, rest: list[tuple[int, tuple[int, ...]]]) -> Iterator[_Frame]:
        """Claim a batch at a time, and give what is to be computed."""
        views = unit.task.views()
        for start in range(0, len(unit.wanted), self.batch_size):
            batch = unit.wanted[start : start + self.batch_size]
            pairs = [(t, number) for t, numbers in batch for number in numbers]
            keys = [views[number].key(t) for t, number in pairs]
            won = self._commits.claim(keys) if self._claims else [True] * len(keys)
            # Only now can nobody else commit them: what is there by now is not computed again.
            there = _contained(views, pairs)
            self._commits.release(
                [k for k, mine, done in zip(keys, won, there, strict=True) if mine and done]
            )
            self.tally.add(elsewhere=sum(there))
            for t, _ in batch:
                state = [
                    (number, mine)
                    for (u, number), mine, done in zip(pairs, won, there, strict=True)
                    if u == t and not done
                ]
                mine = tuple(views[number] for number, own in state if own)
                others = tuple(number for number, own in state if not own)
                if others:
                    rest.append((t, others))
                if mine:
                    yield _Frame(unit, mine, t, self._is_stored(unit, mine, t))

    def _is_stored(self, unit: Unit, views: Sequence[MovieFeatures], t: int) -> bool:
        return t in unit.task.grids and all(view.spec.pooling is not None for view in views)

    def _read(self, frame: _Frame) -> _Read | Failure:
        masked = next((v for v in frame.views if v.spec.pooling is not None), frame.views[0])
        try:
            job = masked.job(frame.t)
            grid = self._grids.find([job], masked.draw)[0] if frame.stored else None
            image = None
            if grid is None:
                image = prepare_frame(job, self.spec.normalization)
        except PART_FAILS as error:
            return self._fail(frame, error)
        return _Read(frame, job, image, grid)

    def _fail(self, frame: _Frame, error: Exception) -> Failure:
        self._commits.release([view.key(frame.t) for view in frame.views])
        return frame.fail(error)

    # Embed

    def _embed_all(self) -> None:
        batch: list[_Read] = []
        for future in self._ready:
            read = future.result()
            if isinstance(read, Failure):
                self.tally.fail(read)
            elif read.grid is not None:
                self._pool_later(read, read.grid)
            else:
                if batch and not self._fits(batch, read):
                    self._embed(batch)
                    batch = []
                batch.append(read)
            if self.budget is not None and self.budget.is_over:
                return
        if batch:
            self._embed(batch)

    def _fits(self, batch: list[_Read], read: _Read) -> bool:
        first = batch[0]
        depth = 1 if first.job.frame.ndim == 2 else len(first.job.frame)
        return (
            len(batch) * depth < self.batch_size
            and first.job.frame.shape == read.job.frame.shape
            and first.frame.unit.task.movie.draw == read.frame.unit.task.movie.draw
        )

    def _embed(self, batch: list[_Read]) -> None:
        """Embed a batch; where it fails, the frame that is to blame is left out."""
        jobs = [read.job for read in batch]
        images = [read.image for read in batch if read.image is not None]
        draw = batch[0].frame.unit.task.movie.draw
        grids = self._embedder.embed(jobs, draw, images, blame=PART_FAILS)
        for read, grid in zip(batch, grids, strict=True):
            if isinstance(grid, Exception):
                self.tally.fail(self._fail(read.frame, grid))
            else:
                self._pool_later(read, grid)
        self.tally.add(embedded=len(batch))

    def _pool_later(self, read: _Read, grid: Grid) -> None:
        future = self._threads.submit(_here(_pool), read, grid)
        if not self._done.put((read.frame, future)):
            self._ready.break_off()

    # Collect

    def _collect(self) -> None:
        try:
            for frame, future in self._done:
                try:
                    records = future.result()
                except PART_FAILS as error:
                    self.tally.fail(self._fail(frame, error))
                    continue
                for view, record in zip(frame.views, records, strict=True):
                    if self._commits.add(view, frame.t, record):
                        self.tally.add(computed=1)
        finally:
            self._done.break_off()
            self._ready.break_off()


def _here(function: Any) -> Any:
    """Have a function called in this context, wherever it is called."""
    context = contextvars.copy_context()
    return lambda *args: context.copy().run(function, *args)


def _contained(views: Sequence[MovieFeatures], pairs: Sequence[tuple[int, int]]) -> list[bool]:
    """Tell for (frame, number of the view) whether the record is there."""
    found: dict[tuple[int, int], bool] = {}
    for number in {number for _, number in pairs}:
        frames = [t for t, one in pairs if one == number]
        there = views[number].contains(frames).tolist()
        found.update(zip(((t, number) for t in frames), there, strict=True))
    return [found[pair] for pair in pairs]


def _pool(read: _Read, grid: Grid) -> list[Record]:
    return [make_record(read.job, grid, view.spec, view.draw) for view in read.frame.views]
