"""Where missing records come from: the engine of this process, or a server on this host."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import get_worker_info

from ..cache import MovieFeatures
from ..engine import Engine, Promise
from ..errors import FeatureCacheError, MissingRecordError, ServiceError
from ..key import Record
from ..spec import BackboneSpec
from ..store import Usage
from ..system import start
from .addresses import Address, find_servers, identify
from .client import Ask, Client, OwnerAnswer, choose_pixels
from .process_engines import Host, find_host, open_host
from .service import Service

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..cache import OpenCache

AHEAD_BLOCKS = 256
"""Blocks that may wait to be read ahead; more are passed over."""

_IDLE_SECONDS, _LOOK_SECONDS = 1.0, 1.0
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StandIn:
    """A backbone without weights, in a process that leaves computing to another."""

    spec: BackboneSpec

    def embed(self, frames: Tensor) -> Tensor:
        """Raise MissingRecordError."""
        raise MissingRecordError(
            f"{self.spec.name} came to this process without its weights, and can't embed "
            f"{len(frames)} frames: make the dataset in this process"
        )


class Misses:
    """Has missing records computed, once, wherever they are asked for.

    Parameters
    ----------
    caches : sequence of (FeatureCache, Backbone)
        Which backbones to serve for which cache.
    records : int
        About how many records there are, for the progress line.
    progress : bool
        Whether to show it.
    inherited : iterable of Address
        Servers that the process which made this for another had.

    Notes
    -----
    In a process that is no DataLoader worker, this begins to serve: records are computed here, for
    this process without a socket, and for others at one. A worker asks: a ``feature-cache serve``
    first, then the process from which it has this, whose address it inherits, then any other that
    serves the same cache and backbone.
    """

    def __init__(
        self,
        caches: Sequence[tuple[OpenCache, Backbone]],
        records: int,
        *,
        progress: bool,
        inherited: Iterable[Address] = (),
    ) -> None:
        self.caches, self.records, self.progress = caches, records, progress
        self.hits = 0
        self._known = _Known(inherited)
        self._route, self._ahead = _Route(self._known), _Ahead(self._known)
        self._run: _Run | None = None
        self._lock, self._process = threading.Lock(), os.getpid()

    def addresses(self) -> list[Address]:
        """Give the servers that this process, or one that it comes from, has opened."""
        return self._known.addresses()

    def open(self) -> bool:
        """Begin to serve, unless this is a DataLoader worker; tell whether anything is served."""
        if get_worker_info() is not None:
            return False
        hosts = {}
        for cache, backbone in self.caches:
            if not isinstance(backbone, StandIn):
                host = open_host(cache, [backbone], self, progress=self.progress)
                hosts[id(host)] = host
        for host in hosts.values():
            host.service.progress.add(total=self.records // len(hosts))
        self._known.hosts |= hosts
        return bool(hosts)

    def fetch(
        self, movie: MovieFeatures, absent: Sequence[int], *, batch_size: int
    ) -> dict[int, Record]:
        """Give records that are not in the store; a block from there on is computed with them.

        Raises
        ------
        MissingRecordError
            Nobody is there who computes them.
        ServiceError
            The process that computes is gone.
        BackboneError, FrameError, MovieError, StoreError
            As in the process that computes.
        """
        self._renew()
        # one at a time: threads share the connection, and what tells that frames come in order
        with self._lock:
            block = plan_block(movie, absent, batch_size)
            hits, self.hits = self.hits, 0
            ask = Ask(movie, block, len(absent), batch_size, hits=hits)
            try:
                records, sent = self._route.run(ask)
            except MissingRecordError:  # it was closed, or this is a fork that outlives its parent
                if _own_host(movie.cache, movie.spec.backbone.digest.hex()) or not self.open():
                    raise
                records, sent = self._route.run(ask)
            misses = sum(i < ask.need for i in sent)
            hits = len(absent) - misses
            self.hits += hits
            movie.cache.counter.add(Usage(hits=hits, misses=misses))
            self._read_on(movie, ask, sent)
        return dict(zip(absent, records, strict=True))

    def prefetch(self, movie: MovieFeatures, times: Sequence[int], *, batch_size: int) -> None:
        """Have records computed in the background; passes over them where too much waits."""
        self._renew()
        good = _hash_frames(movie, times)
        if good:
            self._ahead.put(Ask(movie, good, 0, batch_size, ahead=True))

    def _read_on(self, movie: MovieFeatures, ask: Ask, sent: Sequence[int]) -> None:
        """Read one block more ahead, where frames are asked for one after the other."""
        place, first, last = id(movie), ask.block[0], ask.block[ask.need - 1]
        before = self._run if self._run is not None and self._run.place == place else None
        if sent:
            end = ask.block[sent[-1]] + 1
            goes_on = before is not None and before.end == ask.block[sent[0]] >= first
            self._run = _Run(place, end)
        else:
            goes_on = before is not None and before.ahead is not None and last >= before.ahead
        if goes_on and self._run is not None:
            following = _hash_frames(movie, range(self._run.end, self._run.end + ask.batch_size))
            if following:
                self._ahead.put(Ask(movie, following, 0, ask.batch_size, ahead=True))
                self._run = _Run(place, following[-1] + 1, following[0])

    def _renew(self) -> None:
        """Start anew in a forked child; what it inherited belongs to its parent."""
        if self._process != os.getpid():
            self._process, self._lock = os.getpid(), threading.Lock()
            # the parent's servers are others' from here on, and can be asked
            self._known = _Known(self.addresses())
            self._route, self._ahead = _Route(self._known), _Ahead(self._known)
            self._run = None


class _Known:
    """Servers that need not be looked for: those opened here, and those inherited."""

    def __init__(self, inherited: Iterable[Address]) -> None:
        self.hosts: dict[int, Host] = {}
        self._inherited = tuple(inherited)

    def addresses(self) -> list[Address]:
        servers = [host.server for host in self.hosts.values() if host.server is not None]
        return [*(server.address for server in servers), *self._inherited]


@dataclass(frozen=True, slots=True)
class _Run:
    """Frames of one movie and copy asked for one after the other.

    Attributes
    ----------
    place : int
        Which movie and copy.
    end : int
        The first frame that was not asked for yet.
    ahead : int or None
        Where the block begins that was read ahead.
    """

    place: int
    end: int
    ahead: int | None = None


class _Route:
    """The way of one thread to who computes; connections are kept.

    Parameters
    ----------
    known : _Known
    """

    def __init__(self, known: _Known) -> None:
        self._known = known
        self._client: Client | None = None

    def run(self, ask: Ask) -> tuple[list[Record], Sequence[int]]:
        """Have it done; give what is needed, and which of the block was to be computed for it."""
        failed: ServiceError | None = None
        # one that is found may have ended when it is asked, and so may the next
        for _ in range(8):
            try:
                answer = self._try(ask, failed)
                return _raise_errors(answer.records), answer.sent
            except ServiceError as error:
                _log.info("%s; looking for another", error)
                # a server commits when it ends: it may be there
                again = self._look_again(ask)
                if again is not None:
                    return again, ()
                failed = error
        raise failed or ServiceError("nobody answers")

    def _try(self, ask: Ask, failed: ServiceError | None) -> OwnerAnswer:
        backbone = ask.movie.spec.backbone.digest.hex()
        host = _own_host(ask.movie.cache, backbone)
        client = self._connected(ask.movie.cache, backbone, failed, own=host is not None)
        if client is not None:
            return client.fetch(ask)
        # an engine that closed while it was asked would refuse again
        if host is not None and not (failed is not None and host.service.engine.closing):
            return _compute_here(host.service, ask)
        raise failed or _nobody(ask)

    def _connected(
        self, cache: OpenCache, backbone: str, failed: ServiceError | None, *, own: bool
    ) -> Client | None:
        """Connect to the best server there is; None where this process does it itself."""
        place = identify(cache.store.root)
        kept = self._client
        if kept is not None and failed is None:
            served = kept.address.cache == place and backbone in kept.address.backbones
            if served and (kept.address.standalone or not own):
                return kept
        self.close()
        servers = find_servers(place, backbone, known=self._known.addresses())
        for address in servers:
            # who can compute asks no other training to
            if own and not address.standalone:
                continue
            self._client = self._connect(address)
            if self._client is not None:
                return self._client
        return None

    def _connect(self, address: Address) -> Client | None:
        try:
            return Client(address)
        except ServiceError as error:
            _log.info("%s", error)
            return None

    def _look_again(self, ask: Ask) -> list[Record] | None:
        """Read what may have been committed meanwhile."""
        records = ask.movie.space.read(ask.movie.keys(ask.block[: ask.need]))
        found = [record for record in records if record is not None]
        return found if len(found) == len(records) else None

    def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            self._client.close()
            self._client = None


def _raise_errors(records: list[Record | FeatureCacheError]) -> list[Record]:
    for record in records:
        if isinstance(record, FeatureCacheError):
            raise record
    return [record for record in records if isinstance(record, Record)]


def _own_host(cache: OpenCache, backbone: str) -> Host | None:
    host = None if get_worker_info() is not None else find_host(cache)
    return host if host is not None and backbone in host.service.backbones else None


def _nobody(ask: Ask) -> MissingRecordError:
    movie = ask.movie
    worker = "a DataLoader worker" if get_worker_info() is not None else "a process without it"
    first = movie.where(ask.block[0])
    return MissingRecordError(
        f"{max(1, ask.need)} records, first {first}, are not in {movie.cache!r}, and no process on "
        f"this host serves {movie.spec.backbone.name} for it (this is {worker}): warm the cache "
        "first (feature-cache warm, or warm() of the dataset), start feature-cache serve, or make "
        "the dataset in the process that runs the DataLoader"
    )


def _compute_here(service: Service, ask: Ask) -> OwnerAnswer:
    """Have the engine of this process compute; wait for what is needed."""
    movie, engine = ask.movie, service.engine
    promises = engine.find(movie.space, [movie.key(t) for t in ask.block])
    lacking = [i for i, promise in enumerate(promises) if promise is None]
    service.progress.add(hits=ask.hits, misses=sum(i < ask.need for i in lacking))
    numbers = choose_pixels(lacking, ask.need, ask.batch_size)
    frames = {i: ask.block[i] for i in numbers}
    for i, promise in service.submit(movie, frames, ask.batch_size, ahead=ask.ahead).items():
        promises[i] = promise
    return OwnerAnswer([_wait(engine, promise) for promise in promises[: ask.need]], numbers)


def _wait(engine: Engine, promise: Promise | None) -> Record | FeatureCacheError:
    if promise is None:
        raise ServiceError("a record that is needed was not submitted")
    while True:
        try:
            return promise.wait(_LOOK_SECONDS)
        except TimeoutError:
            # it may have been kept between the end of the wait and this look
            if not promise.done:
                engine.check()
        except FeatureCacheError as error:
            return error


def plan_block(movie: MovieFeatures, absent: Sequence[int], batch_size: int) -> list[int]:
    """Give the frames to have computed: the absent ones, then those after them that lack too."""
    following = _hash_frames(movie, range(absent[-1] + 1, absent[-1] + 1 + batch_size))
    if not following:
        return list(absent)
    there = movie.contains(following).tolist()
    lacking = there.index(True) if True in there else len(following)
    return [*absent, *following[:lacking]]


def _hash_frames(movie: MovieFeatures, times: Iterable[int]) -> list[int]:
    """Give the frames that there are, up to the first that can't be hashed."""
    good: list[int] = []
    for t in times:
        if t >= len(movie):
            break
        try:
            movie.key(t)
        except (FeatureCacheError, OSError):  # whoever asks for this frame is told
            break
        good.append(t)
    return good


class _Ahead:
    """A thread that has records computed before they are asked for; it ends when it is idle."""

    def __init__(self, known: _Known) -> None:
        self._known = known
        self._asks: deque[Ask] = deque()
        self._lock = threading.RLock()  # as the engine's
        self._changed = threading.Condition(self._lock)
        self._thread: threading.Thread | None = None

    def put(self, ask: Ask) -> None:
        with self._lock:
            if len(self._asks) >= AHEAD_BLOCKS:
                return
            self._asks.append(ask)
            if self._thread is None:
                self._start()
            self._changed.notify()

    def _start(self) -> None:
        """Start the thread; where none starts, what waits is passed over, and the next tries."""
        self._thread = threading.Thread(
            target=self._run, name="feature_cache read-ahead", daemon=True
        )
        if not start(self._thread):
            self._thread = None
            self._asks.clear()

    def _next(self) -> Ask | None:
        with self._lock:
            self._changed.wait_for(lambda: self._asks, _IDLE_SECONDS)
            if not self._asks:
                # under the lock: `put` finds a thread that will look again, or starts another
                self._thread = None
                return None
            return self._asks.popleft()

    def _run(self) -> None:
        route = _Route(self._known)
        while (ask := self._next()) is not None:
            try:
                # asked for some time ago: by now it may be there
                there = ask.movie.contains(ask.block).tolist()
                missing = [t for t, found in zip(ask.block, there, strict=True) if not found]
                if missing:
                    route.run(Ask(ask.movie, missing, 0, ask.batch_size, ahead=True))
            except Exception as error:  # noqa: BLE001 - the sample that needs it is told
                _log.info("not read ahead: %s", error)
        route.close()


def check_writable(movie: MovieFeatures, absent: Sequence[int]) -> None:
    """Raise MissingRecordError where the cache can only be read."""
    if movie.cache.store.mode == "r":
        raise MissingRecordError(
            f"{len(absent)} records, first {movie.where(absent[0])}, are not in {movie.cache!r}, "
            "which can only be read: warm it where you may write"
        )
