"""The engines of this process: one for each cache, as long as somebody uses it."""

from __future__ import annotations

import atexit
import concurrent.futures.thread  # noqa: F401 - its pools are to close after us
import logging
import multiprocessing.util
import os
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..cache import OpenCache
from ..engine import end_by_exit, finish, say_kept, was_interrupted
from ..errors import ServiceError
from ..system import in_forked_child
from .server import Server
from .service import Service

if TYPE_CHECKING:
    from ..backbones.base import Backbone

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Host:
    """A service, the server at which other processes find it, and who uses it.

    Attributes
    ----------
    service : Service
    server : Server or None
        None where there can't be one; the process's own misses are computed all the same.
    users : set of int
    pid : int
        Whose it is.
    """

    service: Service
    server: Server | None
    users: set[int] = field(default_factory=set)
    pid: int = field(default_factory=os.getpid)

    def leave(self, user: int) -> None:
        """One user less; with the last one it ends, soon. May be called in any thread."""
        if self.pid != os.getpid():  # a forked child lets go of what it inherited
            return
        # without `_opening`, as finalizers come in any thread at any moment: who is given a host
        # that closes just then finds nobody, and opens another (`Misses.fetch`)
        self.users.discard(user)
        if not self.users:
            self.stop()

    def stop(self) -> None:
        """Commit and end, soon."""
        if self.server is not None:
            self.server.stop()
        self.service.engine.stop()

    def close(self) -> None:
        """Commit and end."""
        self.stop()
        # the engine first: who is connected gets what is computed, or is told
        self.service.close()
        if self.server is not None:
            self.server.close()


_hosts: dict[Any, Host] = {}
_opening = threading.RLock()
_numbers = iter(range(1 << 62))
_closes_at_exit = False


def open_host(
    cache: OpenCache, backbones: Iterable[Backbone], user: object, *,
    standalone: bool = False, memory_bytes: int | None = None, progress: bool = False,
) -> Host:  # fmt: skip
    """Give this process's host for a cache, with some backbones, as long as `user` lives."""
    with _opening:
        _close_at_exit()
        key = _key_of(cache)
        host = _hosts.get(key)
        if host is None or host.service.engine.closing:
            if host is not None:
                host.stop()  # an error may have ended its engine alone: nobody is to find it
            service = Service(cache, memory_bytes=memory_bytes, progress=progress)
            host = _hosts[key] = Host(service, None)
        before = len(host.service.backbones)
        for backbone in backbones:
            host.service.add_backbone(backbone)
        if host.server is None:
            host.server = _make_server(host.service, standalone=standalone)
        if host.server is not None and len(host.service.backbones) > before:
            host.server.publish()
        number = next(_numbers)
        host.users.add(number)
        weakref.finalize(user, partial(host.leave, number))
        return host


def find_host(cache: OpenCache) -> Host | None:
    """Give this process's host for a cache, where there is one."""
    host = _hosts.get(_key_of(cache))
    return None if host is None or host.service.engine.closing else host


def _key_of(cache: OpenCache) -> Any:
    layers = tuple(layer.place for layer in cache.layers)
    return os.getpid(), str(cache.store.root), cache.codec, layers, cache.promote


def _make_server(service: Service, *, standalone: bool) -> Server | None:
    try:
        return Server(service, standalone=standalone)
    except ServiceError as error:
        if standalone:
            raise
        _log.warning("DataLoader workers can't ask this process to compute: %s", error)
        return None


def close_all() -> None:
    """Commit what is computed, and end all that runs here; also when it is interrupted once."""
    hosts = list(_hosts.values())
    if hosts:
        try:
            finish(partial(_close, hosts))
        finally:
            _hosts.clear()
        kept = sum(host.service.engine.kept for host in hosts)
        if was_interrupted() and kept:
            say_kept(kept)


def _close(hosts: Iterable[Host]) -> None:
    for host in hosts:
        host.close()


def _close_at_exit() -> None:
    """Close before the process leaves its caches, and before it can't start threads any more.

    The first is for a process of multiprocessing, the second for any other: what atexit calls comes
    after the thread pools are closed, by which layers in object stores are read.
    """
    global _closes_at_exit
    if not _closes_at_exit:
        # above 10, at which the process leaves its caches
        multiprocessing.util.Finalize(None, close_all, exitpriority=20)
        getattr(threading, "_register_atexit", atexit.register)(close_all)
        end_by_exit()
        _closes_at_exit = True


def _start_anew() -> None:
    """Forget, in a forked child, what its parent hosts."""
    global _opening, _closes_at_exit
    _hosts.clear()
    _opening, _closes_at_exit = threading.RLock(), False


in_forked_child(_start_anew)
