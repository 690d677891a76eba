"""What a run did, what failed and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..engine import Failure
from ..hashing import JSON


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
