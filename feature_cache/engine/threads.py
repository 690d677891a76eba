"""Threads that take one job after the other."""

from __future__ import annotations

import threading
from collections.abc import Callable
from queue import SimpleQueue

from ..errors import ServiceError
from ..system import start

Job = Callable[[], object]
"""Raises nothing."""


def start_or_raise(thread: threading.Thread) -> None:
    """Start a thread that is needed; ServiceError where none starts any more."""
    try:
        thread.start()
    except RuntimeError as error:
        raise ServiceError(
            f"no thread starts that computes ({error}): end other programs, or allow more threads "
            "(ulimit -u)"
        ) from error


class Crew:
    """A thread more with each job, up to a number; they end with the process.

    An executor of the standard library takes 0.1 ms for each job, of which nobody needs the result.

    Parameters
    ----------
    most : int
        Threads, at most.
    name : str
    """

    def __init__(self, most: int, name: str) -> None:
        self._most, self._name = most, name
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def submit(self, job: Job) -> None:
        """Have a job done; after `close`, perhaps not."""
        if len(self._threads) < self._most:
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            # none starts while the interpreter ends: those that there are do it, or else the caller
            if start(thread):
                self._threads.append(thread)
            elif not self._threads:
                job()
                return
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
            del job  # which may hold pixels

    def close(self) -> None:
        """Wait until all jobs are done, and end."""
        # behind all jobs in the queue; each thread takes one, and ends
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
