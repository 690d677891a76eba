"""A bounded queue between two stages, with an end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from typing import Generic, TypeVar

_Item = TypeVar("_Item")


class Pipe(Generic[_Item]):
    """What one thread puts in, another takes out, in order; never more than `size` wait in it.

    Parameters
    ----------
    size : int
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._items: deque[_Item] = deque()
        self._closed = self._broken = False
        # A lock of C's: that of a Condition's own `with` may be left held by a Ctrl-C.
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)

    def put(self, item: _Item) -> bool:
        """Put one in, waiting for room; False where nobody takes anything out any more."""
        with self._lock:
            self._changed.wait_for(lambda: len(self._items) < self._size or self._broken)
            if self._broken:
                return False
            self._items.append(item)
            self._changed.notify_all()
            return True

    def close(self) -> None:
        """Say that nothing more comes."""
        with self._lock:
            self._closed = True
            self._changed.notify_all()

    def break_off(self) -> None:
        """Say that nothing more is taken out; what waits is dropped."""
        with self._lock:
            self._broken = True
            self._items.clear()
            self._changed.notify_all()

    def __iter__(self) -> Iterator[_Item]:
        """Take out what comes, until the end."""
        while True:
            with self._lock:
                self._changed.wait_for(lambda: self._items or self._closed or self._broken)
                if not self._items:
                    return
                item = self._items.popleft()
                self._changed.notify_all()
            yield item
