"""A run of a plan on a Dask cluster: workers compute and commit, and give back only counts.

A unit's Dask key is a digest of its records' keys and the cache's folder, so that two runs that
want the same there meet on the scheduler. Workers claim what they compute, as any process does;
nothing rests on Dask but who does what. A worker loads the backbone once, under the name that the
run was given.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any, TypeAlias

from ..cache import Progress
from ..engine import Budget, Failure, FailureListener, Tally
from ..errors import MovieError, SchedulerGoneError
from ..hashing import digest_bytes
from ..movies import Source
from .local import begin, finish, open_budget
from .plan import UNIT_EMBEDDINGS, Task, Unit, WarmPlan
from .push import Pushing
from .run_report import WarmReport
from .worker import Order, Outcome, Recipe, compute_order, stop_orders

Client: TypeAlias = Any
Future: TypeAlias = Any
"""Those of distributed, which is annotated in part."""

_log = logging.getLogger(__name__)

RETRIES = 2
"""How often a unit whose worker raised an error is tried again, on any worker."""

_UNITS_PER_THREAD = 3
_LEAST_UNITS_PER_THREAD, _MOST_EMBEDDINGS = 16, 1024
"""Units are as large as leaves so many for each thread, up to a size."""
_LOOK_SECONDS = 2.0
_LEAVE_SECONDS = 30.0
CONNECT_SECONDS = 10.0
"""How long a scheduler may take to answer."""


def run_on_cluster(
    plan: WarmPlan,
    recipe: Recipe | None,
    client: Client,
    *,
    batch_size: int | None = 8,
    progress: Progress | None = None,
    failed: FailureListener | None = None,
    max_bytes: int | None = None,
    push: str | None = None,
) -> WarmReport:
    """Have workers compute and commit what a plan found missing.

    Workers must see the cache and the movies under the same paths. A lost worker's units run
    again; what fails is left out and reported, and the rest is done.

    Parameters
    ----------
    plan : WarmPlan
        Made from sources, or from movies opened as a whole.
    recipe : Recipe or None
        The plan's backbone, by name; None where all is pooled from stored grids.
    client : distributed.Client
    batch_size, progress, failed, max_bytes, push
        As `run_warm`. Each worker sends the packs that it writes.

    Raises
    ------
    MovieError
        A movie of the plan can't be found by workers.
    MissingRecordError
        Something is missing, and the cache can only be read.
    StoreError
        The remote can't be written.
    """
    started = time.monotonic()
    begin(plan, batch_size)
    tally = Tally(progress, failed)
    pushing = None if push is None else Pushing(plan.cache, push)
    embeddings = _unit_embeddings(plan, client)
    orders = [
        (unit, _order(plan, unit, source, recipe, batch_size, push))
        for task in plan.tasks
        for source in [_source_of(task)]
        for unit in task.units(embeddings)
    ]
    budget = None if max_bytes is None else open_budget(plan.cache, max_bytes)
    _Run(plan, client, tally, budget, orders[::-1]).work_off()
    return finish(plan, tally, started, budget, pushing)


def _unit_embeddings(plan: WarmPlan, client: Client) -> int:
    """Choose how much a worker is given at once: much, as long as all end at about the same time.

    Each unit costs the one scheduler some milliseconds, and the file system a pack.
    """
    with _reaching(client):
        threads = sum(client.ncores().values())
    share = sum(task.embeddings for task in plan.tasks) // (
        _LEAST_UNITS_PER_THREAD * max(1, threads)
    )
    return min(max(UNIT_EMBEDDINGS, share), _MOST_EMBEDDINGS)


def _source_of(task: Task) -> Source:
    if task.movie.source is None:
        raise MovieError(
            f"{task.movie.name or 'a movie of the plan'} is made of arrays, which a worker can't "
            "read: save them, and name the folder or file"
        )
    return task.movie.source.absolute()


def _order(
    plan: WarmPlan,
    unit: Unit,
    source: Source,
    recipe: Recipe | None,
    batch_size: int | None,
    push: str | None,
) -> Order:
    task, cache = unit.task, plan.cache
    frames = {t for t, _ in unit.wanted}
    return Order(
        root=str(cache.store.root),
        codec=cache.codec,
        layers=tuple(layer.place for layer in cache.layers),
        recipe=recipe,
        source=source,
        specs=task.specs,
        copies=tuple((copy.draw, copy.origin) for copy in task.copies),
        digests=task.movie.digests_seen(frames),
        wanted=unit.wanted,
        grids=frozenset((t, copy) for t, copy in task.grids if t in frames),
        batch_size=batch_size,
        push=push,
    )


@dataclass(eq=False)
class _Run:
    """Keeps a window of units on the cluster; `waiting` are the others, the next one last.

    A budget is shared out among the units of a window; where a share was too small for anything,
    one unit at a time gets all that is left (`narrow`). Where there is no worker, it says so once
    (`told`).
    """

    plan: WarmPlan
    client: Client
    tally: Tally
    budget: Budget | None
    waiting: list[tuple[Unit, Order]]
    running: dict[Future, tuple[Unit, Order]] = field(default_factory=dict)
    finished: SimpleQueue[Future] = field(default_factory=SimpleQueue)
    narrow: bool = False
    told: bool = False

    def work_off(self) -> None:
        """Run units until each is done or has failed."""
        try:
            while self.waiting or self.running:
                self._submit()
                if not self.running:
                    break
                self._collect()
        except SchedulerGoneError as error:
            self._give_up([*self.running.values(), *self.waiting], str(error))
        except BaseException:
            self._leave()
            raise

    def _submit(self) -> None:
        window = self._window()
        while self.waiting and len(self.running) < window:
            if self.budget is not None and self.budget.spent:
                return
            unit, order = self.waiting[-1]
            if self.budget is not None:
                order = replace(order, max_bytes=self._allowance(window))
            order = replace(order, name=self._name(unit))
            future = self.client.submit(
                compute_order, order, key=order.name, retries=RETRIES, pure=True
            )
            self.running[future] = self.waiting.pop()[0], order
            future.add_done_callback(self.finished.put)

    def _name(self, unit: Unit) -> str:
        """Name a unit by its content and where it goes: by its records' keys and the cache."""
        root = os.fsencode(self.plan.cache.store.root)
        name = f"warm-{digest_bytes(*unit.keys(), root).hex()}"
        # a unit that may stop early is not the same as one that may not
        return name if self.budget is None else f"{name}-{secrets.token_hex(4)}"

    def _allowance(self, window: int) -> int:
        """Share out the bytes that are left among the units that can run at once."""
        # what is there is measured on the disk: units at work may still write all of their share
        reserved = sum(order.max_bytes or 0 for _, order in self.running.values())
        return max(0, self._left() - reserved) // (window - len(self.running))

    def _left(self) -> int:
        budget = open_budget(self.plan.cache, self.budget.max_bytes if self.budget else 0)
        return budget.max_bytes - budget.used

    def _window(self) -> int:
        with _reaching(self.client):
            threads = sum(self.client.ncores().values())
        if self.budget is None:
            return max(4, _UNITS_PER_THREAD * threads)
        return 1 if self.narrow else max(1, threads)

    def _collect(self) -> None:
        try:
            future = self.finished.get(timeout=_LOOK_SECONDS)
        except Empty:
            self._check()
            return
        with _reaching(self.client):
            self._take(future)

    def _take(self, future: Future) -> None:
        if future.status in ("cancelled", "lost"):
            raise SchedulerGoneError(_gone(self.client))
        error = future.exception()
        outcome: Outcome | None = None if error is not None else future.result()
        # not before its outcome is here: if the scheduler is gone, it is among those to give up
        unit, order = self.running.pop(future)
        if outcome is None:
            self._give_up([(unit, order)], f"{type(error).__name__}: {error}")
            return
        for failure in outcome.failures:
            self.tally.fail(failure)
        if outcome.stopped:
            self.tally.add(computed=outcome.computed, elsewhere=outcome.elsewhere)
            self._go_on(unit, order, outcome)
            return
        failed = sum(failure.records for failure in outcome.failures)
        # Another run may have submitted the same unit: then the records are those it computed.
        self.tally.add(
            computed=outcome.computed, elsewhere=unit.records - outcome.computed - failed
        )

    def _go_on(self, unit: Unit, order: Order, outcome: Outcome) -> None:
        """Have the rest of a unit computed, if there is room for any of it."""
        if self.budget is not None and not outcome.computed:
            self.budget.spent = (order.max_bytes or 0) >= self._left()
            self.narrow = True
        rest = unit.missing()
        failed = sum(failure.records for failure in outcome.failures)
        if not failed and rest.wanted:
            self.waiting.append((rest, replace(order, wanted=rest.wanted)))
        elif left := rest.records - failed:
            # Which of the rest failed isn't known, and would fail once more.
            reason = "stopped with the unit, some of which failed: run the same again"
            self.tally.fail(Failure(rest.where, reason, left))

    def _check(self) -> None:
        if self.client.status not in ("running", "connecting"):
            raise SchedulerGoneError(_gone(self.client))
        with _reaching(self.client):
            alone = not self.client.ncores()
        if alone and not self.told:
            address = _address(self.client)
            _log.warning("no worker is at %s: waiting for one (dask worker %s)", address, address)
        self.told = alone

    def _give_up(self, units: Sequence[tuple[Unit, Order]], reason: str) -> None:
        """Report units that nobody will do, at once; what is there by now is not among them."""
        left = [unit.missing() for unit, _ in units]
        count = sum(unit.records for unit in left)
        self.tally.add(elsewhere=sum(unit.records for unit, _ in units) - count)
        lost = [unit.where for unit in left if unit.records]
        if lost:
            more = f", and {len(lost) - 1} parts more" if lost[1:] else ""
            self.tally.fail(Failure(f"{lost[0]}{more}", reason, count))

    def _leave(self) -> None:
        """Take back what has not begun; what has begun ends soon, commits, and is counted."""
        # as far as it goes: who interrupts doesn't wait for a scheduler that is gone
        with suppress(OSError, CancelledError, RuntimeError):
            begun = {key for keys in self.client.processing().values() for key in keys}
            self.client.cancel([future for future in self.running if future.key not in begun])
            waiting = [future for future in self.running if future.key in begun]
            self.client.run(stop_orders, [future.key for future in waiting], on_error="ignore")
            until = time.monotonic() + _LEAVE_SECONDS
            while not all(future.done() for future in waiting) and time.monotonic() < until:
                time.sleep(0.05)
            for future in [one for one in self.running if one.status == "finished"]:
                self._take(future)


def _address(client: Client) -> str:
    return str(getattr(client.scheduler, "address", "the address given"))


def _gone(client: Client) -> str:
    return (
        f"the Dask scheduler at {_address(client)} is gone: what is computed is in the cache; run "
        "the same again when there is a scheduler"
    )


@contextmanager
def _reaching(client: Client) -> Iterator[None]:
    from distributed.comm.core import CommClosedError

    try:
        yield
    except (CommClosedError, CancelledError, ConnectionError) as error:
        raise SchedulerGoneError(_gone(client)) from error


@contextmanager
def open_client(scheduler: str | None = None, local_workers: int | None = None) -> Iterator[Client]:
    """Connect to a scheduler, or start workers on this machine for as long as the block lasts.

    Parameters
    ----------
    scheduler : str, optional
        Such as ``tcp://10.0.0.1:8786``.
    local_workers : int, optional
        Processes to start; on machines with GPUs, each has one.

    Raises
    ------
    SchedulerGoneError
        There is no scheduler at the address.
    """
    distributed: Any = import_module("distributed")
    if scheduler is not None:
        try:
            client = distributed.Client(scheduler, set_as_default=False, timeout=CONNECT_SECONDS)
        except (OSError, TimeoutError, ValueError) as error:
            raise SchedulerGoneError(
                f"no Dask scheduler at {scheduler}: {error}; start one with: dask scheduler"
            ) from error
        with client:
            yield client
        return
    with (
        _local_cluster(local_workers or 1) as cluster,
        distributed.Client(cluster, set_as_default=False) as own,
    ):
        yield own


def _local_cluster(workers: int) -> Any:
    return import_module("distributed").LocalCluster(
        n_workers=workers,
        threads_per_worker=2,
        processes=True,
        dashboard_address="127.0.0.1:0",
        host="127.0.0.1",
        preload=["feature_cache.warm.worker"],  # for its `dask_setup`
    )
