"""A run of a plan on this machine, on one device or several."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import TYPE_CHECKING

from ..cache import Progress, check_batch_size, fill
from ..errors import MissingRecordError
from ..movies.check import summarize
from ..store import Usage, count_regions
from .commits import Budget
from .pipeline import Pipeline
from .plan import Unit, WarmPlan
from .push import Pushing
from .rates import remember_rate
from .report import Failure, FailureListener, Tally, WarmReport

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..cache import FeatureCache
    from ..spec import BackboneSpec

_log = logging.getLogger(__name__)
_FIRST_WAIT_SECONDS, _LAST_WAIT_SECONDS = 0.02, 1.0


def run_warm(
    plan: WarmPlan,
    *,
    batch_size: int = 8,
    progress: Progress | None = None,
    failed: FailureListener | None = None,
    backbones: Sequence[Backbone] = (),
    max_bytes: int | None = None,
    push: str | None = None,
) -> WarmReport:
    """Compute and commit what a plan found missing.

    What fails is left out and reported, and the rest is done. What is computed when an error or a
    signal ends the run is committed.

    Parameters
    ----------
    plan : WarmPlan
    batch_size : int
        Frames embedded at once.
    progress : callable, optional
        Called with the number of records just done.
    failed : callable, optional
        Called with each failure.
    backbones : sequence of Backbone, optional
        The same backbone on several devices, which share the work; by default the plan's.
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
    check_batch_size(batch_size)
    check_writable(plan)
    plan.cache.counter.add(Usage(hits=plan.present, misses=plan.missing))
    tally = Tally(progress, failed)
    pushing = None if push is None else Pushing(plan.cache, push)
    if plan.tasks:
        budget = None if max_bytes is None else Budget.of(plan.cache, max_bytes)
        models = list(backbones) or [plan.tasks[0].movie.backbone]
        work_off(plan.cache, plan.units(), models, batch_size, tally, budget, pushing)
        remember_rate(models[0], tally.embedded // len(models), time.monotonic() - started)
        if budget is not None and budget.spent:
            tally.fail(over_budget(plan, budget.max_bytes, tally))
    finish_push(pushing, tally)
    return make_report(plan, tally, started)


def finish_push(pushing: Pushing | None, tally: Tally) -> None:
    """Send what the remote lacks at the end of a run."""
    for failure in pushing.finish(everything=True) if pushing is not None else ():
        tally.fail(failure)


def make_report(plan: WarmPlan, tally: Tally, started: float) -> WarmReport:
    """Sum up a run that began at a time of `time.monotonic`."""
    return WarmReport(
        plan.planned,
        plan.present + tally.elsewhere,
        tally.computed,
        time.monotonic() - started,
        (*plan.failures, *tally.failures),
        _sum_regions(plan),
    )


def _sum_regions(plan: WarmPlan) -> tuple[int, float, int] | None:
    """Sum up the regions of the frames of a plan's movies, from what is stored."""
    found = (count_regions(plan.cache.space(spec), keys) for spec, keys in plan.originals)
    return summarize([count for counts in found for count in counts])


def check_writable(plan: WarmPlan) -> None:
    """Raise MissingRecordError where something is missing that may not be written."""
    if plan.missing and plan.cache.store.mode == "r":
        raise MissingRecordError(
            f"{plan.missing} records, first of {plan.tasks[0].movie.name}, are not in "
            f"{plan.cache!r}, which can only be read: warm it where you may write"
        )


def over_budget(plan: WarmPlan, max_bytes: int, tally: Tally) -> Failure:
    """Say what is left out as the cache may take no more bytes."""
    left = plan.missing - tally.done
    return Failure(
        str(plan.cache.store.root),
        f"stopped before the cache passes --max-size {max_bytes:,} bytes, {left} records are "
        "left out: give it more, or make room with feature-cache gc",
        left,
    )


def work_off(
    cache: FeatureCache,
    units: Sequence[Unit],
    backbones: Sequence[Backbone],
    batch_size: int,
    tally: Tally,
    budget: Budget | None = None,
    pushing: Pushing | None = None,
) -> None:
    """Compute units; those that other processes are at are waited for, as long as these live."""
    left, pause, since = list(units), _FIRST_WAIT_SECONDS, time.monotonic()
    while left and not (budget is not None and budget.is_over):
        before, waited = sum(unit.records for unit in left), time.monotonic() - since
        claim = waited < fill.PATIENCE_SECONDS
        if not claim:
            _log.warning(
                "no record came from other processes for %.0f s: computing %d here", waited, before
            )

        spec = left[0].task.specs[0].backbone

        def pipeline(
            backbone: Backbone, spec: BackboneSpec = spec, claim: bool = claim
        ) -> Pipeline:
            return Pipeline(
                cache, backbone, spec, batch_size=batch_size, tally=tally, budget=budget,
                pushing=pushing, claim=claim,
            )  # fmt: skip

        left = _run_all([pipeline(backbone) for backbone in backbones], left)
        if sum(unit.records for unit in left) < before:
            pause, since = _FIRST_WAIT_SECONDS, time.monotonic()
        elif left:
            if pause == _FIRST_WAIT_SECONDS:
                _log.info("waiting for %d records that others compute: %s", before, left[0].where)
            time.sleep(pause)
            pause = min(2 * pause, _LAST_WAIT_SECONDS)


def _run_all(pipelines: Sequence[Pipeline], units: Sequence[Unit]) -> list[Unit]:
    """Let pipelines share units, each taking the next; one of them in this very thread."""
    if len(pipelines) == 1:
        return pipelines[0].run(units)
    shared = _share(units)
    with ThreadPoolExecutor(len(pipelines), "feature_cache device") as threads:
        futures = [threads.submit(pipeline.run, shared()) for pipeline in pipelines]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        finally:
            for pipeline, future in zip(pipelines, futures, strict=True):
                if not future.done():
                    pipeline.halt()
    return [unit for future in futures for unit in future.result()]


def _share(units: Iterable[Unit]) -> Callable[[], Iterator[Unit]]:
    """Make iterators, one for each thread, that together give each unit once."""
    remaining, lock = iter(units), threading.Lock()

    def take() -> Iterator[Unit]:
        with suppress(StopIteration):
            while True:
                with lock:
                    unit = next(remaining)
                yield unit

    return take
