"""Records on their way, and who waits for each of them."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..hashing import Digest
from ..key import Record
from .request import Answer, Wanted


@dataclass(slots=True, eq=False)
class Waiting:
    """Who waits for a record, and as what it was wanted, where it was."""

    answer: Answer
    wanted: Wanted | None = None


@dataclass(slots=True, eq=False)
class _Flight:
    waiting: list[Waiting] = field(default_factory=list)
    record: Record | None = None


class Flights:
    """Records from when they are asked for until they are committed, each once.

    Parameters
    ----------
    lock : threading.RLock
        Of whoever it belongs to.

    Attributes
    ----------
    unanswered : int
        How many records nobody was told of yet.
    """

    def __init__(self, lock: threading.RLock) -> None:
        self._lock, self._flights = lock, dict[Digest, _Flight]()
        self.unanswered = 0

    @property
    def uncommitted(self) -> int:
        """Count the records that are computed, and neither committed nor lost yet."""
        with self._lock:
            return len(self._flights) - self.unanswered

    def begin(self, wanted: Wanted) -> bool:
        """Take in a record, unless it is on its way; tell whether it is new."""
        with self._lock:
            if self.join(wanted.key, wanted.answer, wanted):
                return False
            self._flights[wanted.key] = _Flight([Waiting(wanted.answer, wanted)])
            self.unanswered += 1
            return True

    def join(self, key: Digest, answer: Answer, wanted: Wanted | None = None) -> bool:
        """Have one more told what becomes of a record; False where it is not on its way.

        One that is computed, and waits to be committed, is told at once.
        """
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                return False
            if flight.record is None:
                flight.waiting.append(Waiting(answer, wanted))
            else:
                answer.computed(flight.record)
            return True

    def take(self, keys: Iterable[Digest], record: Record | None = None) -> list[Waiting]:
        """Take who waits for records; with one that is computed, it stays until it is let go."""
        waiting: list[Waiting] = []
        with self._lock:
            for key in keys:
                flight = self._flights.get(key)
                # one that has its record was told already: no later error reaches it
                if flight is not None and flight.record is None:
                    waiting += flight.waiting
                    flight.waiting, flight.record = [], record
                    self.unanswered -= 1
                    if record is None:
                        del self._flights[key]
        return waiting

    def fail(self, keys: Iterable[Digest], error: Exception) -> None:
        """Tell an error in the place of records: each who waits once, of all that it wanted."""
        failed: dict[Answer, list[Wanted]] = {}
        for one in self.take(keys):
            failed.setdefault(one.answer, []).extend([] if one.wanted is None else [one.wanted])
        # not under the lock: who listens may take its time
        for answer, group in failed.items():
            answer.failed(error, group)

    def fail_all(self, error: Exception) -> None:
        """Tell all who still wait."""
        with self._lock:
            left = [key for key, flight in self._flights.items() if flight.record is None]
        self.fail(left, error)

    def let_go(self, keys: Iterable[Digest]) -> None:
        """Forget records that are committed, or lost."""
        with self._lock:
            for key in keys:
                self._flights.pop(key, None)
