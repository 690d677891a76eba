"""Whether folders need to be listed again: what they looked like when they last were."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

_BELIEVED_SECONDS = 30.0
"""How long a listing is believed: what a network file system says of a folder may be old."""
_TICK_SECONDS, _COARSE_TICK_SECONDS = 0.1, 2.0
"""Longer than the clock stands still that gives a folder its times, and one of whole 10 ms."""


@dataclass(frozen=True, slots=True)
class Listing:
    """What some folders looked like just before they were listed, and when that was.

    Something made in the tick of the clock in which a folder was listed may leave the folder as it
    looks. So, as git does with files, a listing counts only when the clock has gone on since the
    folder was first seen so.

    Attributes
    ----------
    looks : tuple of tuple of int
        Device, inode, and times in ns of each folder; empty where there is none.
    first_seen, listed : float
        Seconds of this process's clock.
    """

    looks: tuple[tuple[int, ...], ...] = ()
    first_seen: float = 0.0
    listed: float = 0.0

    @classmethod
    def after(cls, before: Listing, *folders: Path) -> Listing:
        """Look at folders now, and so before they are listed."""
        looks, now = tuple(map(_look_at, folders)), time.monotonic()
        return cls(looks, before.first_seen if looks == before.looks else now, now)

    def stands(self, now: Listing) -> bool:
        """Tell whether the folders, as they look now, need not be listed again."""
        # Some file systems keep whole seconds, or two; a time that looks so by chance costs little.
        coarse = any(stamp % 10**7 == 0 for look in self.looks for stamp in look[2:])
        tick = _COARSE_TICK_SECONDS if coarse else _TICK_SECONDS
        is_settled = self.listed - self.first_seen > tick
        return (
            is_settled and self.looks == now.looks and now.listed - self.listed < _BELIEVED_SECONDS
        )


def _look_at(folder: Path) -> tuple[int, ...]:
    try:
        status = os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return ()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns
