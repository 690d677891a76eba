"""What got worse between two runs, by more than the noise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .harness import OURS, Case, format_value, quartiles

Results = Mapping[str, Mapping[str, Case]]
LEAST = 1.05
"""Less than this is not worth a line."""


def find_worse(old: Results, new: Results) -> list[str]:
    """Describe the sides of this package that take more than before.

    Compared are ratios, where there is another side to divide by, so that the two runs may be of
    different machines. Worse is a median that is higher by 5 % at least, where the middle halves
    of the rounds don't overlap.

    Parameters
    ----------
    old, new : mapping of benchmark, and name of the case, to Case
    """
    return [
        line
        for name in new.keys() & old.keys()
        for title in new[name].keys() & old[name].keys()
        for line in _compare(f"{name}: {title}", old[name][title], new[name][title])
    ]


def _compare(title: str, old: Case, new: Case) -> Iterator[str]:
    for side in new.values:
        if not side.startswith(OURS) or side not in old.values:
            continue
        against = _yardstick(old, new)
        _, before, high = quartiles(old.ratios(side, against))
        low, now, _ = quartiles(new.ratios(side, against))
        if low > high and now > LEAST * before:
            unit = f" x {against}" if against else ""
            values = [f"{x:.3g}" if against else format_value(x, new.unit) for x in (before, now)]
            yield f"{title}: {side}: {values[0]} before, {values[1]} now{unit}"


def _yardstick(old: Case, new: Case) -> str:
    """Choose what to divide by: a side that is not ours, and is in both."""
    others = [name for name in (new.against, *new.values) if name and not name.startswith(OURS)]
    return next((name for name in others if name in old.values and name in new.values), "")
