"""Requests that nobody computes yet: what is waited for, what is ahead of time, what others do."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection

from ..hashing import Digest
from .request import Request

LOOK_SECONDS = 1.0
"""How long to wait before looking again, at most."""
LAST_PAUSE_SECONDS = 1.0
"""The longest pause between two looks at what another process computes."""


class Queue:
    """Requests in the order in which they are to be claimed; used under the lock of its owner.

    Attributes
    ----------
    elsewhere : list of Request
        Those that other processes are at; each is looked at again when it is due.
    """

    def __init__(self) -> None:
        self._urgent: deque[Request] = deque()
        self._ahead: deque[Request] = deque()
        self.elsewhere: list[Request] = []

    def __len__(self) -> int:
        """Count what is waited for, and due or not seen yet."""
        return len(self._urgent) + len(self._due())

    @property
    def ahead(self) -> int:
        """Count what nobody waits for yet."""
        return len(self._ahead)

    def add(self, request: Request) -> None:
        """Take a request in."""
        (self._ahead if request.ahead else self._urgent).append(request)

    def hasten(self, keys: Collection[Digest]) -> None:
        """Put what somebody waits for now before what is ahead of time."""
        for request in [one for one in self._ahead if any(w.key in keys for w in one.wanted)]:
            self._ahead.remove(request)
            request.ahead = False
            self._urgent.append(request)

    def set_aside(self, request: Request) -> None:
        """Take back what another process is at, to look again after a while."""
        now = time.monotonic()
        if request.held_since is None:
            request.held_since = now
        request.due = now + request.pause
        request.pause = min(2 * request.pause, LAST_PAUSE_SECONDS)
        self.elsewhere.append(request)

    def take(self, room: int, room_ahead: int) -> list[Request]:
        """Take a batch: of what is due and waited for, else of what is ahead of time.

        Parameters
        ----------
        room, room_ahead : int
            How many requests to take at most, of either kind.
        """
        source = [*self._due(), *self._urgent]
        count = room if source else room_ahead
        source = source or list(self._ahead)
        batch = source[: max(0, min(count, source[0].batch_size))] if source else []
        taken = set(map(id, batch))
        self.elsewhere = [one for one in self.elsewhere if id(one) not in taken]
        self._urgent = deque(one for one in self._urgent if id(one) not in taken)
        self._ahead = deque(one for one in self._ahead if id(one) not in taken)
        return batch

    def clear(self) -> list[Request]:
        """Take everything."""
        everything = [*self._urgent, *self._ahead, *self.elsewhere]
        self._urgent, self._ahead, self.elsewhere = deque(), deque(), []
        return everything

    def seconds_to_look(self) -> float:
        """Give in how many seconds something is due, at most `LOOK_SECONDS`."""
        now = time.monotonic()
        return max(0.0, min([LOOK_SECONDS, *(one.due - now for one in self.elsewhere)]))

    def _due(self) -> list[Request]:
        now = time.monotonic()
        return [request for request in self.elsewhere if request.due <= now]
