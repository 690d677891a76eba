"""One line that says how far the cache has filled."""

from __future__ import annotations

import sys
import time
from contextlib import suppress
from typing import Any

from ..forks import Lock


def progress_text(computed: int, total: int, rate: float, hits: int, misses: int) -> str:
    """Write the line.

    Examples
    --------
    >>> progress_text(1240, 9900, 12.34, 961, 39)
    'computed 1,240 of about 9,900, 12.3 frames/s, 96.1 % hits'
    """
    of = f" of about {max(total, computed):,}" if total else ""
    share = 100 * hits / max(1, hits + misses)
    return f"computed {computed:,}{of}, {rate:.1f} frames/s, {share:.1f} % hits"


class Progress:
    """Counts, and shows one line on stderr when something is computed.

    Parameters
    ----------
    shown : bool
        Whether to show it; never where stderr is no terminal.
    """

    def __init__(self, shown: bool) -> None:
        self.shown = shown and sys.stderr is not None and sys.stderr.isatty()
        self.computed = self.total = self.hits = self.misses = 0
        self._bar: Any = None
        self._busy, self._last = 0.0, 0.0
        self._lock = Lock()

    def add(self, *, computed: int = 0, hits: int = 0, misses: int = 0, total: int = 0) -> None:
        """Count more of something."""
        with self._lock:
            self.hits, self.misses = self.hits + hits, self.misses + misses
            self.computed, self.total = self.computed + computed, self.total + total
            if computed:
                now = time.monotonic()
                # a pause counts as a second at most: the rate is of the time in which it computes
                self._busy += min(now - self._last, 1.0) if self._last else 0.0
                self._last = now
                if self.shown:
                    self._show()

    def count(self, computed: int) -> None:
        """Count records as computed."""
        self.add(computed=computed)

    @property
    def text(self) -> str:
        """The line as it is now."""
        rate = self.computed / self._busy if self._busy else 0.0
        return progress_text(self.computed, self.total, rate, self.hits, self.misses)

    def _show(self) -> None:
        if self._bar is None:
            from tqdm import tqdm

            self._bar = tqdm(bar_format="{desc}", file=_Stderr(), leave=True)
        self._bar.set_description_str(self.text)

    def close(self) -> None:
        """End the line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Stderr:
    """Stderr as it is at each moment; what can't be written is left out.

    IPython exchanges it for each cell, and takes it down before threads end. An error inside tqdm
    would leave its lock held, for all bars of the process.
    """

    def write(self, text: str) -> None:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
