"""The thread that owns the backbones: gathers what is asked into batches, computes, commits."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

import numpy as np

from ..augment import Draw
from ..cache import Grids
from ..cache.commits import Commits
from ..cache.fill import PATIENCE_SECONDS
from ..compute import Embedder, Grid, Job, compute_grids, make_record
from ..errors import BackboneError, FeatureCacheError, MissingRecordError, ServiceError, StoreError
from ..hashing import DIGEST_BYTES, Digest, canonical_json
from ..key import Keys, Record
from ..spec import SpaceSpec
from ..store import Entry
from .progress import Progress
from .tickets import Bench, Promise, Ticket, Wanted

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..cache import FeatureCache

GATHER_SECONDS = 0.003
"""How long a batch that is not full waits for more."""
COMMIT_SECONDS = 3.0
MEMORY_BYTES = 2 << 30
"""Pixels that may wait to be computed; who sends more waits."""
CLOSING_SECONDS = 120.0

DEAF_SECONDS = 30.0
"""How long a process that can't be asked to hurry is not asked again."""

_LAST_WAIT_SECONDS = 0.2
_log = logging.getLogger(__name__)


class Engine:
    """Computes records for one cache, each once, in a thread of its own.

    Records that are computed and not committed yet are answered from memory.

    Parameters
    ----------
    cache : FeatureCache
    memory_bytes : int
        Pixels that may wait to be computed.
    progress : bool
        Whether to show a line on stderr, where that is a terminal.

    Attributes
    ----------
    closing : bool
        Nothing more is taken.
    ended : bool
        All is committed, and the thread at its end.
    """

    def __init__(
        self, cache: FeatureCache, *, memory_bytes: int = MEMORY_BYTES, progress: bool = False
    ) -> None:
        self.cache, self.memory_bytes = cache, memory_bytes
        self.progress = Progress(progress)
        self.backbones: dict[str, Backbone] = {}
        self._benches: dict[Digest, Bench] = {}
        self._flight: dict[Digest, Ticket] = {}
        self._queue: dict[Digest, Ticket] = {}
        self._ahead: dict[Digest, Ticket] = {}
        self._elsewhere: dict[Digest, Ticket] = {}
        self._hurried: set[Digest] = set()
        self._held = 0
        self._lost: StoreError | None = None
        self._deaf: dict[int, float] = {}
        # A lock of C's: that of a Condition's own `with` may be left held by a Ctrl-C.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None
        self.closing = self.ended = False

    # What others call

    def add_backbone(self, backbone: Backbone) -> str:
        """Serve a backbone; give the hex digest of its spec."""
        digest = backbone.spec.digest.hex()
        with self._lock:
            self.backbones.setdefault(digest, backbone)
        return digest

    def bench(self, spec: SpaceSpec) -> Bench:
        """Give what one space needs. MissingRecordError where its backbone is not served."""
        digest = spec.digest
        with self._lock:
            if digest not in self._benches:
                backbone = self.backbones.get(spec.backbone.digest.hex())
                if backbone is None:
                    raise MissingRecordError(f"{spec.backbone.name} is not served here")
                space = self.cache.space(spec)
                grids = Grids(self.cache, spec.backbone)
                self._benches[digest] = Bench(
                    spec, space, Embedder(backbone, spec.backbone), Commits(self.cache), grids
                )
            return self._benches[digest]

    def find(self, bench: Bench, keys: Sequence[Digest]) -> list[Promise | None]:
        """Give what is there or on its way; None for what must be computed."""
        with self._lock:
            tickets = [self._flight.get(key) for key in keys]
            for ticket in tickets:
                if ticket is not None and self._ahead.pop(ticket.key, None) is not None:
                    self._queue[ticket.key] = ticket
        absent = [i for i, ticket in enumerate(tickets) if ticket is None]
        found: list[Promise | None] = [None if t is None else t.promise for t in tickets]
        records = bench.space.read(_as_rows([keys[i] for i in absent])) if absent else []
        for i, record in zip(absent, records, strict=True):
            if record is not None:
                found[i] = Promise(record)
        return found

    def reserve(self, nbytes: int, seconds: float, *, ahead: bool = False) -> bool:
        """Set memory aside for pixels; False where there was none for so long.

        What is read ahead gets no more than half of it.

        Raises
        ------
        ServiceError
            There is never so much, or the engine closes.
        """
        limit = self.memory_bytes // 2 if ahead else self.memory_bytes
        if nbytes > limit:
            raise ServiceError(
                f"frames of {nbytes:,} bytes at once, more than the {limit:,} that may "
                "wait to be computed: lower batch_size, or raise feature-cache serve --memory"
            )
        with self._lock:
            fits = self._changed.wait_for(
                lambda: self.closing or self._held + nbytes <= limit, seconds
            )
            self._check_open()
            if fits:
                self._held += nbytes
            return fits

    def give_back(self, nbytes: int) -> None:
        """Take back what was reserved and not submitted."""
        with self._lock:
            self._held -= nbytes
            self._changed.notify_all()

    def submit(
        self, bench: Bench, wanted: Iterable[Wanted], *, batch_size: int, ahead: bool = False
    ) -> list[Promise]:
        """Have records computed; memory for their pixels was reserved before.

        Parameters
        ----------
        bench : Bench
        wanted : iterable of Wanted
        batch_size : int
            Frames embedded at once, at most.
        ahead : bool
            Nobody waits for them yet: they come after all others.

        Raises
        ------
        StoreError
            What was computed before could not be committed.
        ServiceError
            The engine closes.
        """
        with self._lock:
            self._check_open()
            lost, self._lost = self._lost, None
            if lost is not None:
                raise lost
            promises = [self._put(bench, one, batch_size, ahead=ahead).promise for one in wanted]
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="feature_cache engine", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()
        return promises

    def hurry(self, keys: Iterable[Digest]) -> None:
        """Commit these records as soon as they are computed: another process waits for them."""
        with self._lock:
            self._hurried |= self._flight.keys() & set(keys)
            self._changed.notify_all()

    def stop(self) -> None:
        """Commit and end, soon, without waiting for it."""
        with self._lock:
            if self.closing:
                return
            self.closing = True
            self.ended = self._thread is None
            self._changed.notify_all()

    def close(self) -> None:
        """Commit what is computed and end; what is not computed fails for those who wait."""
        self.stop()
        if threading.current_thread() is not self._thread:
            with self._lock:
                self._changed.wait_for(lambda: self.ended or not self._runs(), CLOSING_SECONDS)

    def check(self) -> None:
        """Raise ServiceError where nothing will be computed any more."""
        if self.ended or (self._thread is not None and not self._runs()):
            raise ServiceError("the thread that computes has ended: make the dataset anew")

    def _runs(self) -> bool:
        """Tell whether the thread lives; one whose start was interrupted may never begin."""
        return self._thread is not None and self._thread.is_alive()

    def _check_open(self) -> None:
        if self.closing:
            raise ServiceError("the process that computes is closing: start the training again")

    # The thread

    def _put(self, bench: Bench, wanted: Wanted, batch_size: int, *, ahead: bool) -> Ticket:
        there = self._flight.get(wanted.key)
        if there is not None:
            self._held -= wanted.nbytes
            if not ahead and self._ahead.pop(wanted.key, None) is not None:
                self._queue[wanted.key] = there
            return there
        group = id(bench), canonical_json(wanted.draw.to_json()), wanted.job.frame.shape
        ticket = Ticket(bench, wanted.key, wanted, batch_size, group, wanted.nbytes)
        self._flight[wanted.key] = ticket
        (self._ahead if ahead else self._queue)[wanted.key] = ticket
        return ticket

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._work()
        finally:
            self.closing = True
            self._finish()

    def _work(self) -> None:
        """Do what is next. Keeps nothing: an error holds on to the frames of whoever caught it."""
        batch = self._next_batch()
        if batch:
            self._serve(batch)
        self._recall()
        self._commit()

    def _wait_for_work(self) -> bool:
        with self._lock:
            while not self.closing and not self._queue and not self._ahead:
                nap = self._nap()
                if nap is not None and nap <= 0:
                    break
                self._changed.wait(nap)
            if self.closing:
                return False
            first = next(iter(self._queue.values()), None)
            if first is not None and len(self._queue) < first.batch_size:
                deadline = time.monotonic() + GATHER_SECONDS
                full = first.batch_size
                self._changed.wait_for(
                    lambda: self.closing or len(self._queue) >= full,
                    max(0.0, deadline - time.monotonic()),
                )
        return not self.closing

    def _nap(self) -> float | None:
        """Give the seconds until something is due; None for nothing."""
        pending = [bench.commits for bench in self._benches.values() if bench.commits.pending]
        times = [commits.since + COMMIT_SECONDS for commits in pending]
        times += [ticket.due for ticket in self._elsewhere.values()]
        if any(map(self._is_hurried, pending)):
            return 0.0
        return min(times) - time.monotonic() if times else None

    def _next_batch(self) -> list[Ticket]:
        """Take the first that waits, and others that go with it."""
        with self._lock:
            first = next(iter((self._queue or self._ahead).values()), None)
            if first is None:
                return []
            alike = [
                ticket
                for queue in (self._queue, self._ahead)
                for ticket in queue.values()
                if ticket.group == first.group
            ][: first.batch_size]
            for ticket in alike:
                self._queue.pop(ticket.key, None)
                self._ahead.pop(ticket.key, None)
            return alike

    def _serve(self, batch: list[Ticket]) -> None:
        """Claim, look again, compute."""
        bench = batch[0].bench
        try:
            mine = self._claim(bench, batch)
            # Only now can nobody else commit them: what is there by now is not computed again.
            records = bench.space.read(_as_rows([ticket.key for ticket in mine])) if mine else []
        except StoreError as error:
            self._fail(batch, error)
            return
        missing = []
        for ticket, record in zip(mine, records, strict=True):
            if record is None:
                missing.append(ticket)
            else:
                bench.commits.release([ticket.key])
                self._settle(ticket)
                ticket.promise.keep(record)
        if missing:
            self._compute(missing)

    def _claim(self, bench: Bench, batch: list[Ticket]) -> list[Ticket]:
        won = bench.commits.claim([ticket.key for ticket in batch])
        mine = []
        for ticket, is_mine in zip(batch, won, strict=True):
            now = time.monotonic()
            if ticket.elsewhere_since is None:
                ticket.elsewhere_since = now
            if is_mine or now - ticket.elsewhere_since >= PATIENCE_SECONDS:
                mine.append(ticket)
            else:
                ticket.due = now + ticket.wait
                ticket.wait = min(2 * ticket.wait, _LAST_WAIT_SECONDS)
                self._elsewhere[ticket.key] = ticket
        return mine

    def _recall(self) -> None:
        """Look again for what other processes compute."""
        now = time.monotonic()
        again = [ticket for ticket in self._elsewhere.values() if ticket.due <= now]
        if not again:
            return
        with self._lock:
            for ticket in again:
                del self._elsewhere[ticket.key]
                self._queue[ticket.key] = ticket
        self._ask_to_hurry(again)

    def _ask_to_hurry(self, tickets: Sequence[Ticket]) -> None:
        """Ask those who compute them, where they are on this host, to commit soon."""
        from .client import hurry

        claims = self.cache.store.claims
        by_pid: dict[int, list[Digest]] = {}
        for ticket in tickets:
            parts = (claims.holder(ticket.key.hex()) or "").split("-")
            if len(parts) == 3 and parts[1].isdigit() and int(parts[1]) != os.getpid():
                by_pid.setdefault(int(parts[1]), []).append(ticket.key)
        now = time.monotonic()
        for pid, keys in by_pid.items():
            if self._deaf.get(pid, 0.0) < now and not hurry(self.cache.store.root, pid, keys):
                self._deaf[pid] = now + DEAF_SECONDS

    def _compute(self, tickets: list[Ticket]) -> None:
        """Compute a batch; each error goes to those who asked for its frame."""
        bench, jobs = tickets[0].bench, [ticket.job for ticket in tickets]
        draw = tickets[0].wanted.draw if tickets[0].wanted else Draw()
        grids = compute_grids(
            jobs, bench.embedder, draw, tickets[0].batch_size,
            find=bench.grids.find if bench.spec.pooling is not None else None,
            blame=(Exception,),
        )  # fmt: skip
        for ticket, (job, grid) in zip(tickets, grids, strict=True):
            try:
                record = _make_record(job, grid, bench.spec, draw)
            except Exception as error:  # noqa: BLE001 - it goes to those who asked
                self._fail([ticket], _as_ours(error, ticket))
            else:
                self._deliver(ticket, record)

    def _deliver(self, ticket: Ticket, record: Record) -> None:
        if ticket.wanted is not None:
            entry = Entry(ticket.key, record, ticket.wanted.provenance)
            ticket.bench.commits.collect(ticket.bench.space, entry)
        self._settle(ticket, keep=True)
        ticket.promise.keep(record)
        self.progress.add(computed=1)

    def _fail(self, tickets: Iterable[Ticket], error: BaseException) -> None:
        for ticket in tickets:
            with suppress(OSError):
                ticket.bench.commits.release([ticket.key])
            self._settle(ticket)
            ticket.promise.fail(error)

    def _settle(self, ticket: Ticket, *, keep: bool = False) -> None:
        """Let go of a ticket's pixels; `keep` answers from it until it is committed."""
        with self._lock:
            if ticket.wanted is not None:
                ticket.wanted = None
                self._held -= ticket.nbytes
            if not keep:
                self._flight.pop(ticket.key, None)
                self._hurried.discard(ticket.key)
            self._changed.notify_all()

    def _is_hurried(self, commits: Commits) -> bool:
        return bool(self._hurried) and not self._hurried.isdisjoint(commits.pending)

    def _commit(self, *, everything: bool = False) -> None:
        for bench in list(self._benches.values()):
            commits = bench.commits
            due = commits.due(COMMIT_SECONDS) or self._is_hurried(commits)
            if not (everything or due):
                continue
            keys = list(commits.pending)
            try:
                commits.flush()
            except StoreError as error:
                _log.error("%d records that were computed are lost: %s", len(keys), str(error))
                with self._lock:
                    waiting = [*self._queue.values(), *self._ahead.values()]
                    self._queue.clear()
                    self._ahead.clear()
                self._lost = None if waiting else error
                self._fail(waiting, error)
            with self._lock:
                for key in keys:
                    self._flight.pop(key, None)
                self._hurried.difference_update(keys)

    def _finish(self) -> None:
        try:
            self._commit(everything=True)
        finally:
            try:
                self._drop_what_is_left()
                self.progress.close()
            finally:
                with self._lock:
                    self.ended = True
                    self._changed.notify_all()

    def _drop_what_is_left(self) -> None:
        with self._lock:
            left = [t for t in self._flight.values() if not t.promise.done]
        self._fail(left, ServiceError("the process that computes has closed"))
        for bench in self._benches.values():
            bench.commits.close()


def _as_rows(keys: Sequence[Digest]) -> Keys:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, DIGEST_BYTES)


def _make_record(job: Job, grid: Grid | Exception, spec: SpaceSpec, draw: Draw) -> Record:
    if isinstance(grid, Exception):
        raise grid
    return make_record(job, grid, spec, draw)


def _as_ours(error: Exception, ticket: Ticket) -> FeatureCacheError:
    """Give an error of ours for whatever a backbone raises; it names the frame."""
    if isinstance(error, FeatureCacheError):
        return error
    name = ticket.bench.spec.backbone.name
    ours = BackboneError(f"{name} failed for {ticket.job.where}: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours
