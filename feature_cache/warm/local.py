"""A run of a plan on one device of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from itertools import chain, groupby

from ..cache import FeatureCache, MovieFeatures, Progress, check_batch_size, request_all
from ..engine import Budget, Failure, FailureListener, Tally
from ..errors import MissingRecordError
from ..movies.check import summarize
from ..store import Usage, add_asked, count_regions
from ..units import check_amount
from .frame_rates import remember_rate
from .plan import Unit, WarmPlan
from .push import Pushing
from .run_report import WarmReport


def run_warm(
    plan: WarmPlan,
    *,
    batch_size: int | None = 8,
    progress: Progress | None = None,
    failed: FailureListener | None = None,
    max_bytes: int | None = None,
    push: str | None = None,
) -> WarmReport:
    """Compute and commit what a plan found missing.

    What fails is left out and reported, and the rest is done. What is computed when an error or a
    signal ends the run is committed.

    Parameters
    ----------
    plan : WarmPlan
    batch_size : int or None
        Frames embedded at once; None for as many as fit.
    progress : callable, optional
        Called with the number of records just done.
    failed : callable, optional
        Called with each failure.
    max_bytes : int, optional
        Stop before the packs of the cache take more.
    push : str, optional
        A URL, as `FeatureCache.push`: packs are sent there as they are committed, and at the end
        it has all that the cache has.

    Raises
    ------
    MissingRecordError
        Something is missing, and the cache can only be read.
    StoreError
        The cache can't be written, or the remote can't when the run begins; what was committed
        stays.
    """
    started = time.monotonic()
    begin(plan, batch_size)
    tally, budget = Tally(progress, failed), None
    pushing = None if push is None else Pushing(plan.cache, push)
    if plan.tasks:
        budget = None if max_bytes is None else open_budget(plan.cache, max_bytes)
        compute_units(plan.cache, plan.units(), batch_size, tally, budget, pushing)
        share = tally.computed / plan.missing
        embedded = int(share * sum(task.embeddings for task in plan.tasks))
        remember_rate(plan.tasks[0].movie.backbone, embedded, time.monotonic() - started)
    return finish(plan, tally, started, budget, pushing)


def open_budget(cache: FeatureCache, max_bytes: int) -> Budget:
    """Look at what the packs of a cache take now; TypeError for a limit that is no number."""
    check_amount("max_bytes", max_bytes, "100 * 10**9 for 100 GB")
    return Budget(max_bytes, sum(space.disk_bytes() for space in cache.store.spaces()))


def begin(plan: WarmPlan, batch_size: int | None) -> None:
    """Note what is asked for; raise MissingRecordError where it is missing and can't be written."""
    check_batch_size(batch_size)
    for asked in plan.asked if plan.cache.store.mode != "r" else ():
        add_asked(plan.cache.store.root, asked)
    if plan.missing and plan.cache.store.mode == "r":
        raise MissingRecordError(
            f"{plan.missing} records, first of {plan.tasks[0].movie.name}, are not in "
            f"{plan.cache!r}, which can only be read: warm it where you may write"
        )
    plan.cache.counter.add(Usage(hits=plan.present, misses=plan.missing))


def finish(
    plan: WarmPlan, tally: Tally, started: float, budget: Budget | None, pushing: Pushing | None
) -> WarmReport:
    """Send what the remote lacks, and sum up a run that began at a time of `time.monotonic`."""
    if budget is not None and budget.spent:
        left = plan.missing - tally.done
        reason = (
            f"stopped before the cache passes --max-size {budget.max_bytes:,} bytes, {left} "
            "records are left out: give it more, or make room with feature-cache gc"
        )
        tally.fail(Failure(str(plan.cache.store.root), reason, left))
    for failure in pushing.finish(everything=True) if pushing is not None else ():
        tally.fail(failure)
    counts = (count_regions(plan.cache.space(spec), keys) for spec, keys in plan.originals)
    return WarmReport(
        plan.planned,
        plan.present + tally.elsewhere,
        tally.computed,
        time.monotonic() - started,
        (*plan.failures, *tally.failures),
        summarize([*chain.from_iterable(counts)]),
    )


def compute_units(
    cache: FeatureCache,
    units: Iterable[Unit],
    batch_size: int | None,
    tally: Tally,
    budget: Budget | None = None,
    pushing: Pushing | None = None,
) -> None:
    """Compute units; those of other processes are waited for, as by `MovieFeatures.compute`."""

    def is_over() -> bool:
        return tally.fatal is not None or (budget is not None and budget.is_over)

    written = None if pushing is None else pushing.send
    with cache.open_engine(budget=budget, written=written) as engine:
        engine.run(request_all(_frames_of(units), tally, batch_size), until=is_over)
    if tally.fatal is not None:
        raise tally.fatal


def _frames_of(units: Iterable[Unit]) -> Iterator[tuple[int, list[MovieFeatures]]]:
    for task, group in groupby(units, key=lambda unit: unit.task):
        views = task.views()
        for unit in group:
            for t, spots in unit.wanted:
                yield t, [views[spot] for spot in spots]
