"""What became of the records that were asked for: counts, failures and why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from ..augment import Draw
from ..errors import BackboneError, FrameError, MovieError, ServiceError
from ..hashing import JSON
from ..key import Record
from .model import Progress
from .request import Wanted

PART_FAILS = (BackboneError, FrameError, MovieError)
"""Errors that end one frame or movie, not the whole run."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What could not be computed, and why.

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


FailureListener = Callable[[Failure], Any]
"""Called with each failure as it comes."""


class Tally:
    """Counts records while they are computed; may be shared by threads.

    Parameters
    ----------
    progress : callable, optional
        Called with the number of records just done, whoever computed them.
    failed : callable, optional
        Called with each failure.

    Attributes
    ----------
    computed, elsewhere : int
        Records computed here, and those that others computed meanwhile.
    errors : list of (int, Exception)
        What frames failed of, with their numbers in the order they were asked for.
    fatal : Exception or None
        An error that ends more than a frame.
    """

    def __init__(
        self, progress: Progress | None = None, failed: FailureListener | None = None
    ) -> None:
        self._progress, self._failed = progress, failed
        self.computed = self.elsewhere = 0
        self.failures: list[Failure] = []
        self.errors: list[tuple[int, Exception]] = []
        self.fatal: Exception | None = None
        self._strange = 0
        self._lock = threading.RLock()

    @property
    def done(self) -> int:
        """Count the records of which the outcome is known."""
        return self.computed + self.elsewhere + sum(f.records for f in self.failures)

    def add(self, *, computed: int = 0, elsewhere: int = 0) -> None:
        """Count records computed here, and those that others computed."""
        with self._lock:
            self.computed += computed
            self.elsewhere += elsewhere
            self._strange = 0
            if self._progress is not None and computed + elsewhere:
                self._progress(computed + elsewhere)

    def fail(self, failure: Failure, error: Exception | None = None, number: int = 0) -> None:
        """Count what failed: a frame of an error, or anything else."""
        with self._lock:
            self.failures.append(failure)
            if error is not None:
                self.errors.append((number, error))
                # with a cause, it came from code that is not ours: the frame may not be to blame
                self._strange = self._strange + 1 if error.__cause__ is not None else 0
                if self._strange >= _MOST_STRANGE:
                    self.fatal = self.fatal or error
            if self._failed is not None:
                self._failed(failure)

    def check(self) -> None:
        """Raise what failed, and say what is kept.

        Raises
        ------
        BackboneError, FrameError, MovieError
            As the first frame that failed; names all.
        """
        if self.fatal is not None:
            raise self.fatal
        if not self.errors:
            return
        # in the order asked for, not in that in which threads came to them
        errors = [error for _, error in sorted(self.errors, key=itemgetter(0))]
        reasons = list(dict.fromkeys(map(str, errors)))
        if not self.computed + self.elsewhere:
            others = f"; and {len(errors) - 1} other frames failed" if errors[1:] else ""
            raise type(errors[0])(f"{reasons[0]}{others}") from errors[0]
        some = "; ".join(reasons[:_MOST_REASONS])
        more = f"; and {len(reasons) - _MOST_REASONS} more" if reasons[_MOST_REASONS:] else ""
        raise type(errors[0])(f"{some}{more}. {self._count()}") from errors[0]

    def _count(self) -> str:
        failed = sum(failure.records for failure in self.failures)
        there = self.computed + self.elsewhere
        return f"{failed} of {failed + there} records failed; the other {there} are kept"


_MOST_REASONS = 20
_MOST_STRANGE = 32
"""So many failures in a row, of errors that nobody expects, are not the frames' own."""


@dataclass(slots=True, eq=False)
class FrameAnswer:
    """Counts what becomes of one frame's records.

    Parameters
    ----------
    tally : Tally
    where : str
        What to call the frame.
    origins : mapping of Draw to str
        What to call each of its draws.
    number : int
        In the order that frames were asked for.
    reads : bool
        Whether a record that is found is read, so that what can't be read is computed.
    """

    tally: Tally
    where: str
    origins: Mapping[Draw, str]
    number: int = 0
    reads: bool = False

    def found(self, record: Record | None) -> None:
        """Count a record that others computed."""
        self.tally.add(elsewhere=1)

    def computed(self, record: Record) -> None:
        """Count a record."""
        self.tally.add(computed=1)

    def failed(self, error: Exception, wanted: Sequence[Wanted]) -> None:
        """Take note of a failure, or of what ends more than the frame."""
        if isinstance(error, ServiceError):
            return  # the engine has ended, and whoever ran it knows why
        if not isinstance(error, PART_FAILS):
            self.tally.fatal = self.tally.fatal or error
            return
        draws = {one.draw for one in wanted}
        is_whole = len(self.origins) > 1 and len(draws) == len(self.origins)
        names = [] if is_whole else [self.origins[one] for one in draws if self.origins[one]]
        what = ", ".join([self.where, *names[:1]])
        self.tally.fail(Failure(what, str(error), len(wanted)), error, self.number)
