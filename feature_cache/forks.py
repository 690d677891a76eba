"""What is shared by threads, and must not be held for ever in a forked child.

A fork copies the thread that forks alone. A lock that another one holds at that moment stays held
in the child, with nobody to let go of it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar, overload

from .system import in_forked_child

T = TypeVar("T")


class Lock:
    """A reentrant lock that is free in a forked child."""

    __slots__ = ("__weakref__", "_lock")

    def __init__(self) -> None:
        self._lock = threading.RLock()
        _locks.add(self)

    # C enters and leaves it: a Ctrl-C that came at the end of a method of ours would leave it held,
    # and the threads that commit waiting for it.

    @property
    def __enter__(self) -> Callable[[], bool]:
        return self._lock.__enter__

    @property
    def __exit__(self) -> Callable[..., None]:
        return self._lock.__exit__

    def _renew(self) -> None:
        # `with` looks `__exit__` up before it enters: who forks inside lets go of the old lock.
        self._lock = threading.RLock()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()


def _renew_all() -> None:
    for lock in list(_locks):
        lock._renew()


# Such hooks run in the order in which they came: those of modules that import this one find
# the locks free.
in_forked_child(_renew_all)


class cached_property(Generic[T]):  # noqa: N801 (as functools has it)
    """`functools.cached_property` without its lock.

    In Python 3.11 a class has one for all its instances, held while a value is made: threads that
    pool different frames wait for each other, and a forked child may wait for ever. Here two
    threads may make the same value, as they do from Python 3.12 on.
    """

    def __init__(self, make: Callable[[Any], T]) -> None:
        self._make, self.__doc__ = make, make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        """Learn under which name the value is kept."""
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> cached_property[T]: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...

    def __get__(self, instance: object | None, owner: type) -> cached_property[T] | T:
        """Make the value the first time; it is found in the instance from then on."""
        if instance is None:
            return self
        # `vars`, as frozen dataclasses take no attribute; `setdefault`, so that of two threads that
        # make it both go on with the same one.
        return vars(instance).setdefault(self._name, self._make(instance))
