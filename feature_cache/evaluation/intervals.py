"""How certain a share is: bootstrap over frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from ..hashing import JSON
from .cells import Floats

DRAWS = 2000
LEVEL = 0.95


@dataclass(frozen=True, slots=True)
class Share:
    """A share, or a difference of two, and the interval that it is in.

    Attributes
    ----------
    value, low, high : float
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Write value and interval."""
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"

    def signed(self) -> str:
        """Write a difference and its interval."""
        return f"{self.value:+.3f} ({self.low:+.3f} to {self.high:+.3f})"

    def to_json(self) -> dict[str, JSON]:
        """Give the three numbers."""
        return {"value": self.value, "low": self.low, "high": self.high}

    @property
    def is_positive(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.low > 0


class Bootstrap:
    """Draws frames anew, the same ones for whatever is asked, so that arms are compared in pairs.

    Parameters
    ----------
    units : (L,) int64
        The frame of each cell, 0 to the number of frames.
    seed : int
    """

    def __init__(self, units: NDArray[np.int64], seed: int = 0) -> None:
        self._units = units
        self._sizes = np.bincount(units).astype(np.float64)
        count = len(self._sizes)
        random = np.random.Generator(np.random.Philox(seed))
        self._draws = random.multinomial(count, np.full(count, 1 / count), DRAWS)

    def share(self, hits: Floats) -> Share:
        """Give the mean of (L,) hits, each 0 to 1, with its interval."""
        return self._mean(hits, 0.0, 1)

    def difference(self, hits: Floats, comparisons: float = 1) -> Share:
        """Give the mean of (L,) differences of hits with its interval.

        Parameters
        ----------
        hits : (L,) float64
        comparisons : float
            As many intervals hold at once (Bonferroni).

        Notes
        -----
        The interval is that of Student's t around the mean, with the deviation of the draws and the
        frames less one as degrees of freedom: percentiles of the draws alone are too narrow where
        frames are few. The deviation is at least that of so many cells by themselves, and a cell: a
        few frames, or cells, may agree by luck.
        """
        return self._mean(hits, -1.0, comparisons)

    def _mean(self, hits: Floats, least: float, comparisons: float) -> Share:
        frames, value = len(self._sizes), float(hits.mean())
        if frames < 2:
            return Share(value, least, 1.0)
        of_frames = float(self._draw(hits).std()) * np.sqrt(frames / (frames - 1))
        error = max(of_frames, float(hits.std()) / np.sqrt(len(hits)), 1 / len(hits))
        width = error * float(stats.t.ppf(1 - (1 - LEVEL) / 2 / comparisons, frames - 1))
        return Share(value, max(least, value - width), min(1.0, value + width))

    def count_independent(self, hits: Sequence[Floats]) -> float:
        """Say as how many independent ones these (L,) hits count, which are mostly alike.

        Notes
        -----
        From how far the farthest of them is off in the draws (Westfall & Young, 1993).
        """
        drawn = np.stack([self._draw(one) for one in hits], axis=1)
        errors = drawn.std(axis=0)
        varying = errors > 0
        if not varying.any():
            return 1.0
        off = np.abs(drawn - drawn.mean(axis=0))[:, varying] / errors[varying]
        farthest = np.quantile(off.max(axis=1), LEVEL)
        return float(np.clip((1 - LEVEL) / (2 * stats.norm.sf(farthest)), 1, len(hits)))

    def _draw(self, hits: Floats) -> Floats:
        """Give the mean of hits in each draw."""
        sums = np.bincount(self._units, hits, len(self._sizes))
        return (self._draws @ sums) / (self._draws @ self._sizes)
