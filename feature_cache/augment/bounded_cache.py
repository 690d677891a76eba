"""Arrays that are kept for as long as there is room."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import Any

from numpy.typing import NDArray

from ..system import in_forked_child


class Kept:
    """The arrays used last, up to so many bytes, shared by the threads of a process.

    Parameters
    ----------
    limit : int
        Bytes of all arrays together; a larger one is not kept at all.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._arrays: dict[Hashable, NDArray[Any]] = {}
        self._lock = threading.RLock()
        in_forked_child(self._start_anew)

    def _start_anew(self) -> None:
        """Forget, in a forked child, whose thread of the parent may have held the lock."""
        self._bytes, self._arrays, self._lock = 0, {}, threading.RLock()

    def get(self, key: Hashable, make: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        """Give the array kept under `key`, or make it; it can't be changed."""
        with self._lock:
            if key in self._arrays:
                self._arrays[key] = found = self._arrays.pop(key)  # the last one used
                return found
        made = make()
        made.flags.writeable = False
        with self._lock:
            self._keep(key, made)
        return made

    def _keep(self, key: Hashable, array: NDArray[Any]) -> None:
        if key in self._arrays or array.nbytes > self._limit:
            return
        self._arrays[key] = array
        self._bytes += array.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._arrays.pop(next(iter(self._arrays))).nbytes
