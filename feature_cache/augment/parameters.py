"""What a parameter may be, and the random numbers it is drawn from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.random import Philox
from numpy.typing import NDArray

from ..errors import DrawError
from ..hashing import Digest, digest_json

_QUANTILES = 2**16
_NORMAL_UNIT = 2**12
"""The table's normal numbers are whole multiples of 1 / 4096."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """The values that a parameter may take.

    Parameters
    ----------
    low, high : float
        Both included.
    kind : {"real", "integer", "odd"}
        Real numbers are kept to six significant digits: short to read, exact in JSON, and as fine
        as float32 pixels can tell apart.
    """

    low: float
    high: float
    kind: Literal["real", "integer", "odd"] = "real"

    def __str__(self) -> str:
        noun = {"real": "a number", "integer": "an integer", "odd": "an odd integer"}[self.kind]
        return f"{noun} from {_short(self.low)} to {_short(self.high)}"

    def check(self, where: str, value: object) -> int | float:
        """Give `value` as the int or float that stands for it in JSON.

        Raises
        ------
        DrawError
            If it is not allowed; the message has `where`, the value and what would be allowed.
        """
        number = self._number(value)
        if number is None or not self.low <= number <= self.high:
            raise DrawError(f"{where} is {value!r}: expected {self}")
        return number

    def _number(self, value: object) -> int | float | None:
        if isinstance(value, bool):
            return None
        if self.kind == "real":
            if not isinstance(value, int | float | np.integer | np.floating):
                return None
            return round_to(float(value), 6) if math.isfinite(value) else None
        if not isinstance(value, int | np.integer):
            return None
        return None if self.kind == "odd" and value % 2 == 0 else int(value)

    def pick(self, low: float, high: float, fraction: float) -> int | float:
        """Give the value at `fraction` (0 <= fraction < 1) of the range from `low` to `high`.

        Real numbers are rounded to four significant digits; a range of one value gives it.
        """
        if self.kind == "real":
            value = round_to(low + (high - low) * fraction, 4)
            return min(max(value, low), high)
        step = 2 if self.kind == "odd" else 1
        return int(low) + step * int(fraction * ((high - low) // step + 1))


SEED = Allowed(0, 2**63 - 1, "integer")


def round_to(value: float, digits: int) -> float:
    """Round to that many significant decimal digits; ``-0.0`` becomes ``0.0``."""
    return float(f"{value:.{digits}g}") + 0.0


def _short(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


class Stream:
    """Random numbers that are a function of `source` alone.

    They are made by hand from Philox's raw integers, which NumPy keeps the same over versions (it
    doesn't promise that of ``Generator``'s methods), and by exact arithmetic only, so that they
    are also the same on every machine.

    Parameters
    ----------
    source : JSON or 16 bytes
        What the numbers depend on.
    """

    __slots__ = ("_bits",)

    def __init__(self, source: object) -> None:
        digest: Digest = source if isinstance(source, bytes) else digest_json(source)
        self._bits = Philox(key=int.from_bytes(digest, "big"))

    def uniform(self) -> float:
        """Give one number, 0 <= number < 1."""
        return float(self.uniforms(1)[0])

    def uniforms(self, count: int) -> NDArray[np.float64]:
        """Give `count` numbers, 0 <= number < 1, in steps of 2**-53."""
        return (self._raw(count) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normals(self, count: int) -> NDArray[np.float32]:
        """Give `count` standard normal numbers.

        Each is one of 65,536 equally likely quantiles, between -4.33 and 4.33, to 1 / 4096.
        """
        raw = self._raw(-(-count // 4)).astype("<u8").view("<u2")[:count]
        return np.take(_normal_quantiles(), raw)

    def _raw(self, count: int) -> NDArray[np.uint64]:
        return np.asarray(self._bits.random_raw(count), dtype=np.uint64)


@lru_cache(maxsize=1)
def _normal_quantiles() -> NDArray[np.float32]:
    """Tabulate the normal distribution's quantiles at (i + 0.5) / 65536."""
    inverse = NormalDist().inv_cdf
    upper = [
        round(inverse((i + 0.5) / _QUANTILES) * _NORMAL_UNIT)
        for i in range(_QUANTILES // 2, _QUANTILES)
    ]
    steps = np.array([-step for step in reversed(upper)] + upper, dtype=np.float32)
    table = steps / np.float32(_NORMAL_UNIT)
    table.flags.writeable = False
    return table
