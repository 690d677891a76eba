"""The engine: claim, look again, read, embed, pool, commit, answer. Nothing else does any of these.

::

    claim    frames that nobody else computes, and are not there by now; the others wait their time
    read     decode, check and normalise, once a frame; as many threads as the process has cores
    embed    batches of one shape (of any, where the network's input has but one), of whatever draws
             and movies, one after the other on the device; the next one is drawn meanwhile
    pool     by the threads that read
    commit   by bytes, by age, or when another process waits

Each stage has threads of its own; what lies between two of them is bounded, so that memory does
not grow with the number of frames.
"""

from __future__ import annotations

import logging
import threading
import time
from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from operator import attrgetter
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from ..augment import Draw
from ..errors import FeatureCacheError, ServiceError, StoreError
from ..hashing import DIGEST_BYTES, Digest
from ..key import Keys, Record
from ..store import Counter, NewRecord, Space
from ..store.claims import Claims
from ..system import count_cores, trim
from .batches import choose_batch, is_full
from .commit import COMMIT_SECONDS, Budget, Commits, Written
from .cpu import Embedding
from .frame import Frame
from .frame_claims import ASKED_SECONDS, FrameClaims
from .interrupt import finish, say_kept, terminable
from .pending import Flights
from .queue import LAST_PAUSE_SECONDS, LOOK_SECONDS, Queue
from .request import Part, Promise, Request, Wanted
from .threads import Crew, start_or_raise

PATIENCE_SECONDS = 600.0
"""How long others may take without a new record before their work is done here as well."""
IDLE_SECONDS = 3.0
"""How long what is computed may wait to be committed where nothing more is being computed."""
GATHER_SECONDS = 0.003
"""How long a batch that is not full waits for more."""
MEMORY_BYTES = 2 << 30
"""Pixels that may wait to be computed; who sends more waits."""
CLOSING_SECONDS = 120.0
"""How long the last commit may take before nobody waits for it any more."""

_BATCHES_AHEAD = 3
_MOST_HELD = 4096
"""Frames that others compute, and that are waited for at once."""
_TRIM_FRAMES = 64
_log = logging.getLogger(__name__)
_rank = attrgetter("rank")


class Engine:
    """Computes records for one cache, each once.

    Records that are computed and not committed yet are answered from memory. As a context, it
    commits what is computed when it ends.

    Parameters
    ----------
    claims : Claims
    counter : Counter
        Of the cache.
    codec : str
        How packs are stored.
    budget : Budget, optional
        Bytes that may be written.
    written : callable, optional
        Called with the packs of each commit.
    memory_bytes : int
        Pixels that may wait to be computed.
    computed : callable, optional
        Called with how many records are computed more.

    Attributes
    ----------
    closing : bool
        Nothing more is taken.
    ended : bool
        All is committed, and the threads at their end.
    """

    def __init__(
        self,
        claims: Claims,
        counter: Counter,
        codec: str = "raw",
        *,
        budget: Budget | None = None,
        written: Written | None = None,
        memory_bytes: int = MEMORY_BYTES,
        computed: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.memory_bytes, self._computed = memory_bytes, computed
        self._claims = FrameClaims(claims)
        self._commits = Commits(counter, codec, self._let_go, budget, written)
        self._queue = Queue()
        self._ready: list[Part] = []
        self._collected: deque[tuple[Part, list[Record]]] = deque()
        self._left: dict[Request, int] = {}
        """How many parts of each frame on its way are not done."""
        self._coming = self._pooling = 0
        self._frame_bytes = self._reserved = self._frames = 0
        self._batch_size = 1
        self._draws: dict[Draw, int] = {}
        self._recent = deque[Frame](maxlen=2 * max(2, count_cores()))
        """Windows that share frames with those that are read next."""
        self._news = time.monotonic()
        self._lost: StoreError | None = None
        self.error: BaseException | None = None
        # A lock of C's: that of a Condition's own `with` may be left held by a Ctrl-C.
        self._lock = threading.RLock()
        self._claimable, self._embeddable, self._committable, self._changed = (
            threading.Condition(self._lock) for _ in range(4)
        )
        """What each stage waits for, and what those outside do."""
        self._flights = Flights(self._lock)
        self._ticks: SimpleQueue[None] | None = None
        self._thread: threading.Thread | None = None
        self.closing = self.ended = False

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *error: object) -> None:
        finish(self.close)

    @property
    def reserved(self) -> int:
        """Bytes of pixels that wait to be computed, of those that were sent."""
        return self._reserved

    @property
    def kept(self) -> int:
        """Count the records that were computed here and are committed."""
        return self._commits.committed

    @property
    def late(self) -> StoreError | None:
        """Say, after `close`, that something is still not committed, for which nobody waits."""
        if self.ended or not self._flights.uncommitted:
            return None
        return StoreError(
            f"the cache has not taken what was computed last in {CLOSING_SECONDS:.0f} s: look "
            "at its disk or network, and run the same again; what was committed is kept"
        )

    # What others call

    def run(self, requests: Iterable[Request], until: Callable[[], bool] = lambda: False) -> None:
        """Have all requests answered, and commit; the engine has ended then.

        Takes a request when there is room for it. Whatever ends it early, what is computed is
        committed; Ctrl-C and SIGTERM are said in the log, with what is kept.

        Parameters
        ----------
        requests : iterable of Request
        until : callable
            Tells whether to end early.

        Raises
        ------
        StoreError
            The cache can't be read or written, or not within `CLOSING_SECONDS` at the end.
        ServiceError
            The system starts no more threads.
        """
        self._ticks = SimpleQueue()
        try:
            with terminable():
                try:
                    self._feed(requests, until)
                finally:
                    finish(self.close)  # SIGTERM is heard here too: there is much to commit
        except (KeyboardInterrupt, SystemExit):
            if self.ended:
                say_kept(self.kept)
            raise
        if self.error is not None:
            raise self.error
        if (late := self.late) is not None:
            raise late

    def _feed(self, requests: Iterable[Request], until: Callable[[], bool]) -> None:
        for request in requests:
            self._tick_until(partial(self._has_room, request.batch_size), until)
            if until() or self.error is not None:
                return
            self._submit_one(request)
        self._tick_until(lambda: not self._flights.unanswered, until)

    def _submit_one(self, request: Request) -> None:
        try:
            self.submit([request])
        except ServiceError as refused:
            raise self.error or refused  # noqa: B904 - it ended just now, and has a cause of its own

    def _tick_until(self, done: Callable[[], bool], until: Callable[[], bool]) -> None:
        # No condition of threading: Ctrl-C may come while its lock is let go.
        while not (done() or until() or self.error is not None or self.ended):
            with suppress(Empty):
                if self._ticks is not None:
                    self._ticks.get(timeout=0.2)

    def _has_room(self, batch_size: int) -> bool:
        return len(self._queue) < 2 * batch_size and len(self._queue.elsewhere) < _MOST_HELD

    def find(self, space: Space, keys: Sequence[Digest]) -> list[Promise | None]:
        """Give what is there or on its way; None for what must be computed."""
        found: list[Promise | None] = [None] * len(keys)
        # on its way first, in the store second: a record leaves `_flights` when it is committed,
        # so that one which leaves it between the two looks is in the store
        with self._lock:
            for i, key in enumerate(keys):
                promise = Promise()
                if self._flights.join(key, promise):
                    found[i] = promise
            self._queue.hasten({k for k, promise in zip(keys, found, strict=True) if promise})
            self._claimable.notify_all()
        absent = [i for i, promise in enumerate(found) if promise is None]
        records = space.read(_as_rows([keys[i] for i in absent])) if absent else []
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
                lambda: self.closing or self._reserved + nbytes <= limit, seconds
            )
            self._check_open()
            if fits:
                self._reserved += nbytes
            return fits

    def give_back(self, nbytes: int) -> None:
        """Take back what was reserved and not submitted."""
        with self._lock:
            self._reserved -= nbytes
            self._changed.notify_all()

    def submit(self, requests: Iterable[Request]) -> None:
        """Have frames computed; each record's answer is told. Waits for nothing.

        Raises
        ------
        StoreError
            What was computed before could not be committed.
        ServiceError
            The engine closes, or its thread can't start.
        """
        with self._lock:
            self._check_open()
            # told once: those who had the lost records were answered before the commit failed
            lost, self._lost = self._lost, None
            if lost is not None:
                raise lost
            if self._thread is None:
                self._start()  # first: nobody would answer what is taken in without it
            for request in requests:
                self._batch_size = max(self._batch_size, request.batch_size)
                self._enqueue(request)
            self._claimable.notify_all()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._work, name="feature_cache engine", daemon=True)
        try:
            start_or_raise(self._thread)
        except ServiceError:
            self._thread = None  # who asks next tries again
            raise

    def stop(self) -> None:
        """Commit and end, soon, without waiting for it."""
        with self._lock:
            if self.closing:
                return
            self.closing = True
            # without a thread nobody else would say so
            self.ended = self._thread is None
            self._wake_all()

    def close(self) -> None:
        """Commit what is computed and end; what is not computed fails for those who wait."""
        self.stop()
        # the engine's own thread would wait for itself
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

    # Requests

    def _enqueue(self, request: Request) -> None:
        new = [wanted for wanted in request.wanted if self._flights.begin(wanted)]
        if not request.ahead:
            self._queue.hasten({wanted.key for wanted in request.wanted})
        if new:
            self._queue.add(request.of(new))
        else:
            self._free(request)

    def _fail(self, wanted: Iterable[Wanted], error: Exception) -> None:
        error = error.with_traceback(None)  # with which who keeps it would keep the frames' pixels
        keys = [one.key for one in wanted]
        # in this order, as in `_let_go`: who is told may ask again at once, and then must not join
        # a claim that is being given up
        self._claims.settle(keys)
        self._flights.fail(keys, error)
        self._tick_at_end()

    def _tick_at_end(self) -> None:
        if not self._flights.unanswered:
            self._tick()

    def _wake_all(self) -> None:
        for one in (self._claimable, self._embeddable, self._committable, self._changed):
            one.notify_all()
        self._tick()

    def _tick(self) -> None:
        """Have `run` look whether there is room, or all is answered."""
        if self._ticks is not None and self._ticks.empty():
            self._ticks.put(None)

    # The threads

    def _work(self) -> None:
        """Collect and commit; the other stages run beside it as long as it does."""
        self._crew = Crew(max(2, count_cores()), "feature_cache read")
        stages: list[threading.Thread] = []
        try:
            self._guard_once(lambda: self._start_stages(stages))
            self._guard(self._commit_some)
            # at once: a batch that is on the device may take longer than anybody waits
            self._guard_once(self._commit_all)
            # in the order of the work: each stage may still hand something to the next
            for stage in stages:
                stage.join()
            self._crew.close()  # what is embedded is pooled
            self._guard_once(self._finish)
        finally:
            with self._lock:
                self.ended = True
                self._wake_all()

    def _start_stages(self, started: list[threading.Thread]) -> None:
        for name, step in (
            ("claim", self._claim_some),
            ("embed", self._embed_some),
            ("embed", self._embed_some),  # one draws while the other's batch is embedded
        ):
            stage = threading.Thread(
                target=self._guard, args=(step,), name=f"feature_cache {name}", daemon=True
            )
            start_or_raise(stage)
            started.append(stage)

    def _guard(self, step: Callable[[], None]) -> None:
        """Repeat a step until the engine closes; what it did not expect ends the engine."""
        while not self.closing and self._guard_once(step):
            pass

    def _guard_once(self, step: Callable[[], None]) -> bool:
        try:
            step()
        except BaseException as error:  # noqa: BLE001 - whoever waits is told
            _log.debug("the engine ends", exc_info=True)
            with self._lock:
                self.error = self.error or error
                self.closing = True
                self._wake_all()
            return False
        return True

    def _finish(self) -> None:
        """Commit what is collected; who waits for anything else is told."""
        try:
            self._commit_all()
        finally:
            why = "" if self.error is None else f": {self.error}"
            self._flights.fail_all(ServiceError(f"the process that computes has closed{why}"))
            # Whoever waits raises that error, and its traceback keeps the dataset, with which the
            # host of this engine lives: no promise that has the error may stay here.
            self._queue.clear()
            self._ready.clear()
            self._left.clear()
            self._claims.close()

    # Claim

    def _claim_some(self) -> None:
        with self._lock:
            self._claimable.wait_for(self._may_claim, self._queue.seconds_to_look())
            batch = [] if self.closing else self._queue.take(self._room(), self._room(ahead=True))
            self._tick()
            # while it is being claimed it counts as one to come, for which the device waits
            self._coming += bool(batch)
        if not batch:
            return
        try:
            batch = self._claim(batch)  # what is set aside is not to fail with what is ours
            mine = self._look_again(batch)
        except StoreError as error:
            for request in batch:
                self._fail(request.wanted, error)
                self._free(request)
            mine = []
        with self._lock:
            self._coming += len(mine) - 1
            # one part each until it is read, so that `_room` counts it from here on
            self._left.update((request, 1) for request in mine)
            self._embeddable.notify_all()
        for request in mine:
            self._have_done(self._read, request)

    def _may_claim(self) -> bool:
        if self.closing:
            return True
        if len(self._queue):
            return self._room() > 0
        return self._queue.ahead > 0 and self._room(ahead=True) > 0

    def _room(self, *, ahead: bool = False) -> int:
        """Give how many frames more may be on their way: by number, and by bytes.

        What is read ahead is in nobody's way who waits.
        """
        most = _BATCHES_AHEAD * self._batch_size
        # by the largest frame until now; before one is read nobody knows
        if self._frame_bytes:
            most = min(most, max(1, self.memory_bytes // self._frame_bytes))
        return most - sum(ahead or not request.ahead for request in self._left)

    def _claim(self, batch: Sequence[Request]) -> list[Request]:
        """Give what is this engine's to compute; the rest is looked at again after a while."""
        impatient = [request for request in batch if self._waited(request) >= PATIENCE_SECONDS]
        if impatient:
            _log.warning(
                "no record came from other processes for %.0f s: computing %d frames here",
                PATIENCE_SECONDS, len(impatient),
            )  # fmt: skip
        asked = [request for request in batch if request not in impatient]
        # without a claim, which the others still hold: a record computed twice is the same record
        mine = list(impatient)
        shares = self._claims.take(asked)
        new = [s for r, s in zip(asked, shares, strict=True) if s.others and r.held_since is None]
        if new:
            _log.info(
                "waiting for %d records that other processes compute, the first by %s",
                sum(len(share.others) for share in new), self._claims.holder(new[0].held[0]),
            )  # fmt: skip
        for request, share in zip(asked, shares, strict=True):
            if share.mine:
                mine.append(request.of(share.mine))
            if share.others:
                rest = request.of(share.others)
                # reserved for both parts, and given back with the one that is computed here
                rest.nbytes = 0 if share.mine else request.nbytes
                self._claims.ask(share.held)
                with self._lock:
                    self._queue.set_aside(rest)
        return mine

    def _waited(self, request: Request) -> float:
        if request.held_since is None:
            return 0.0
        return time.monotonic() - max(request.held_since, self._news)

    def _look_again(self, requests: Sequence[Request]) -> list[Request]:
        """Answer what is there by now; only who holds the claims can say that it is not."""
        spaces: dict[Space, list[Wanted]] = defaultdict(list)
        for request in requests:
            for wanted in request.wanted:
                spaces[wanted.space].append(wanted)
        there: dict[Digest, Record | None] = {}
        for space, group in spaces.items():
            rows = _as_rows([wanted.key for wanted in group])
            if any(wanted.answer.reads for wanted in group):
                records = zip(group, space.read(rows), strict=True)
                there.update((w.key, record) for w, record in records if record is not None)
            else:
                found = space.contains(rows).tolist()
                there.update(
                    (w.key, None) for w, is_there in zip(group, found, strict=True) if is_there
                )
        if there:
            self._news = time.monotonic()
        left = []
        for request in requests:
            missing = [wanted for wanted in request.wanted if wanted.key not in there]
            if missing:
                left.append(request.of(missing))
            else:
                self._free(request)
        self._claims.settle(list(there))
        for key, record in there.items():
            for one in self._flights.take([key]):
                one.answer.found(record)
        self._tick_at_end()
        return left

    def _free(self, request: Request) -> None:
        with self._lock:
            self._reserved -= request.nbytes
            self._changed.notify_all()

    # Read

    def _have_done(self, function: Callable[..., None], *args: object) -> None:
        """Have a thread of the crew do something, unless the engine ends."""
        # `submit` counts the crew's threads, which two callers at once would get wrong
        with self._lock:
            self._crew.submit(lambda: self._guard_once(lambda: function(*args)))

    def _read(self, request: Request) -> None:
        # what is counted of it matters no more, and `_finish` tells those who wait
        if self.closing:
            return
        parts: list[Part] = []
        try:
            frame = self._read_frame(request)
            draws: dict[object, list[Wanted]] = defaultdict(list)
            for wanted in request.wanted:
                draws[wanted.draw].append(wanted)
            for group in draws.values():
                specs = tuple(wanted.spec for wanted in group)
                parts.append(Part(request, Embedding(frame, group[0].draw, specs), tuple(group)))
            found = request.model.find_grids([part.embedding for part in parts])
            if any(grid is None for grid in found):
                request.model.prepare(frame)
        except Exception as error:  # noqa: BLE001 - it goes to those who asked for the frame
            self._fail(request.wanted, error)
            with self._lock:
                self._coming -= 1
                self._embeddable.notify_all()
                self._done(request)
            return
        with self._lock:
            self._coming -= 1
            # in place of the 1 of `_claim_some`, now that its draws are known
            self._left[request] = len(parts)
            # pixels of one byte take four when they are normalised
            self._frame_bytes = max(self._frame_bytes, 4 * frame.nbytes)
            for part, grid in zip(parts, found, strict=True):
                if grid is None:
                    insort(self._ready, part, key=_rank)
            self._pooling += sum(grid is not None for grid in found)
            self._embeddable.notify_all()
        # not under the lock, as pooling takes long
        for part, grid in zip(parts, found, strict=True):
            if grid is not None:
                self._make_records(part, grid)

    def _read_frame(self, request: Request) -> Frame:
        """Read a frame; one with a window stays a while."""
        frame = request.read()
        if frame.window:
            # `Decoded` holds frames weakly: without this, the next window would read them again
            self._recent.append(frame)
        return frame

    def _done(self, request: Request) -> None:
        """Count a part as done; with its last one there is room for another frame."""
        with self._lock:
            self._left[request] -= 1
            if not self._left[request]:
                del self._left[request]
                self._reserved -= request.nbytes
                self._frames += 1
                self._claimable.notify_all()
                self._changed.notify_all()

    # Embed

    def _embed_some(self) -> None:
        with self._lock:
            wait_for = self._embeddable.wait_for
            wait_for(lambda: self.closing or self._ready, LOOK_SECONDS)
            if self.closing or not self._ready:
                return
            # frames come one after the other: while more are claimed or read, a batch that is not
            # full would waste the device; but reading may be slow, hence the limits
            wait_for(lambda: self.closing or is_full(self._ready), GATHER_SECONDS)
            wait_for(lambda: self.closing or not self._coming or is_full(self._ready), LOOK_SECONDS)
            if not self._ready:  # the other thread took it
                return
            batch = choose_batch(self._ready)
            chosen = set(map(id, batch))
            self._ready = [part for part in self._ready if id(part) not in chosen]
            # grids lie on the device until they are pooled: most of them are to go before more come
            wait_for(lambda: self.closing or self._pooling <= 2 * len(batch), LOOK_SECONDS)
        grids = batch[0].request.model.embed([part.embedding for part in batch])
        # one by one: where a batch is halved, its first half is pooled while the other is embedded
        for part, grid in zip(batch, grids, strict=True):
            if isinstance(grid, Exception):
                self._fail(part.wanted, grid)
                self._done(part.request)
            else:
                with self._lock:
                    self._pooling += 1
                self._have_done(self._make_records, part, grid)

    def _make_records(self, part: Part, grid: Any) -> None:
        try:
            records = part.request.model.make_records(part.embedding, grid)
        except FeatureCacheError as error:
            self._fail(part.wanted, error)
            self._done(part.request)
            records = []
        # a part that became records is done when `_collect` has taken them
        with self._lock:
            if records:
                self._collected.append((part, records))
                self._committable.notify_all()
            self._pooling -= 1
            self._embeddable.notify_all()

    # Commit

    def _commit_some(self) -> None:
        with self._lock:
            self._committable.wait_for(lambda: self.closing or self._collected, self._nap())
        self._collect()
        left = self._seconds_to_commit()
        if left is not None and left <= 0:
            self._commit()

    def _collect(self) -> None:
        """Take what was computed, and answer; it is committed later."""
        # without the lock: others only append, and no other thread takes
        while self._collected:
            part, records = self._collected.popleft()
            order = self._draws.setdefault(part.draw, len(self._draws)), part.request.number
            for wanted, record in zip(part.wanted, records, strict=True):
                entry = NewRecord(wanted.key, record, wanted.describe())
                try:
                    has_room = self._commits.add(wanted.space, entry, order)
                except StoreError as error:
                    self._lose(error)
                    # lost with the rest: only a run has a budget, and it ends with this error
                    has_room = True
                if has_room:
                    for one in self._flights.take([wanted.key], record):
                        one.answer.computed(record)
                else:
                    # nobody is told: the run ends, as the budget is spent
                    self._claims.settle([wanted.key])
                    self._flights.take([wanted.key])
                self._computed(int(has_room))
            self._tick_at_end()
            self._done(part.request)
            if self._frames >= _TRIM_FRAMES:
                self._frames = 0
                trim()

    def _nap(self) -> float | None:
        """Give the seconds until there is something to look at."""
        left = self._seconds_to_commit()
        # another process that waits leaves a file, of which no condition tells
        if self._claims.any:
            return ASKED_SECONDS if left is None else min(ASKED_SECONDS, max(0.0, left))
        return left

    def _seconds_to_commit(self) -> float | None:
        if not self._commits.pending:
            return None
        asked = time.monotonic() - self._claims.asked()
        # who waits asks anew at each look: not heard of for two pauses, it has what it wanted
        if asked < 2 * LAST_PAUSE_SECONDS:
            return self._commits.seconds_left(ASKED_SECONDS)
        is_idle = not (self._left or len(self._queue) or self._queue.ahead)
        return self._commits.seconds_left(IDLE_SECONDS if is_idle else COMMIT_SECONDS)

    def _commit_all(self) -> None:
        self._collect()
        self._commit()

    def _commit(self) -> None:
        try:
            self._commits.flush()
        except StoreError as error:
            self._lose(error)

    def _lose(self, error: StoreError) -> None:
        """Tell that what was computed could not be committed: those who wait, or who asks next."""
        _log.error("records that were computed are lost: %s", str(error))
        with self._lock:
            waiting = self._queue.clear()
            self._lost = None if waiting else error
        for request in waiting:
            self._fail(request.wanted, error)
            self._free(request)
        # `run` ends with it; what serves others goes on, and tells the next who asks
        if self._ticks is not None:
            self.error = self.error or error

    def _let_go(self, keys: Sequence[Digest]) -> None:
        """Let go of records that are committed, or lost."""
        self._claims.settle(keys)
        self._flights.let_go(keys)


def _as_rows(keys: Sequence[Digest]) -> Keys:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, DIGEST_BYTES)
