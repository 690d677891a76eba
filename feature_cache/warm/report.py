"""What a run did, what failed and why."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..cache import Progress
from ..errors import BackboneError, FrameError, MovieError
from ..hashing import JSON

PART_FAILS = (BackboneError, FrameError, MovieError)
"""Errors that end one frame or movie, not the whole run."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be warmed, and why.

    Parameters
    ----------
    what : str
        A movie or a frame.
    reason : str
    records : int
        How many records it stands for; 1 for a movie that can't be opened, 0 for what is
        computed and could not be sent.
    """

    what: str
    reason: str
    records: int

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        return {"what": self.what, "reason": self.reason, "records": self.records}


@dataclass(frozen=True, slots=True)
class WarmReport:
    """What a run did, in records: planned = present + computed + failed.

    Attributes
    ----------
    present : int
        Those that were there, or that other processes computed meanwhile.
    computed : int
        Those computed by this run, on whatever machine.
    regions : (int, float, int) or None
        Least, median and most regions of a frame, of the movies themselves; None where none of
        their records is in a folder here, or nothing is pooled.
    """

    planned: int
    present: int
    computed: int
    seconds: float
    failures: tuple[Failure, ...] = field(default=())
    regions: tuple[int, float, int] | None = None

    @property
    def failed(self) -> int:
        """Count the records that could not be warmed."""
        return sum(failure.records for failure in self.failures)

    def to_json(self) -> dict[str, JSON]:
        """Give the counts, and each failure with its reason."""
        return {
            "planned": self.planned,
            "present": self.present,
            "computed": self.computed,
            "failed": self.failed,
            "seconds": round(self.seconds, 3),
            "regions": self.regions,
            "errors": [failure.to_json() for failure in self.failures],
        }


FailureListener = Callable[[Failure], Any]
"""Called with each failure as it comes."""


class Tally:
    """Counts records while a run goes on; may be shared by threads.

    Parameters
    ----------
    progress : callable, optional
        Called with the number of records just done, whoever computed them.
    failed : callable, optional
        Called with each failure.

    Attributes
    ----------
    embedded : int
        Frames that went through a backbone here.
    """

    def __init__(
        self, progress: Progress | None = None, failed: FailureListener | None = None
    ) -> None:
        self._progress, self._failed = progress, failed
        self.computed = self.elsewhere = self.embedded = 0
        self.failures: list[Failure] = []
        self._lock = threading.Lock()

    @property
    def done(self) -> int:
        """Count the records of which the outcome is known."""
        return self.computed + self.elsewhere + sum(f.records for f in self.failures)

    def add(self, *, computed: int = 0, elsewhere: int = 0, embedded: int = 0) -> None:
        """Count records computed here, and those that others computed; and frames embedded."""
        with self._lock:
            self.embedded += embedded
            self.computed += computed
            self.elsewhere += elsewhere
            if self._progress is not None and computed + elsewhere:
                self._progress(computed + elsewhere)

    def fail(self, failure: Failure) -> None:
        """Count what failed."""
        with self._lock:
            self.failures.append(failure)
            if self._failed is not None:
                self._failed(failure)
