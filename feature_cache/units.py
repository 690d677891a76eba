"""Counts, sizes and times, as people read them."""

from __future__ import annotations

import time
from numbers import Real


def count_text(count: int, what: str) -> str:
    """Write a number of things for people.

    >>> count_text(1, "pack"), count_text(2000, "pack")
    ('1 pack', '2,000 packs')
    """
    return f"{count:,} {what}{'s' * (count != 1)}"


def check_amount(name: str, amount: object, example: str) -> None:
    """Raise TypeError for an amount that is neither a number nor None."""
    if amount is not None and not isinstance(amount, Real):
        raise TypeError(f"{name} is {amount!r}: expected a number, such as {example}")


def size_text(count: float) -> str:
    """Write a number of bytes for people.

    >>> size_text(1234567), size_text(999_999)
    ('1.23 MB', '1 MB')
    """
    value, units = float(count), ["B", "kB", "MB", "GB", "TB", "PB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def time_text(seconds: float) -> str:
    """Write a time of day for people, in local time; ``-`` for none."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else "-"
