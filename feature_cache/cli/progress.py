"""Progress of a long run: a bar where there is a terminal, a line a minute where there is none."""

from __future__ import annotations

import logging
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..warm import Failure

LINE_SECONDS = 60.0
SHOWN = 20
"""How many failures are shown; all are in the report."""

_log = logging.getLogger("feature_cache.warm")


class RunProgress:
    """Says how far a run is; a context manager.

    Parameters
    ----------
    what : str
        What is done, such as ``"computing"``.
    total : int
    unit : str
        What is counted.
    """

    def __init__(self, what: str, total: int, unit: str = "record") -> None:
        self.what, self.total, self.unit = what, total, unit
        self.done = self.failed = 0
        self._started = self._told = time.monotonic()
        terminal = bool(sys.stderr) and sys.stderr.isatty()
        self._bar = _make_bar(what, total, unit) if terminal and total else None

    def __enter__(self) -> RunProgress:
        """Begin."""
        return self

    def __exit__(self, *error: object) -> None:
        """Take the bar away from what follows."""
        if self._bar is not None:
            self._bar.close()
        if self.total:
            self._say()

    def update(self, count: int) -> None:
        """Count what is done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        self._tell()

    def fail(self, failure: Failure) -> None:
        """Count what failed, and log why."""
        self.failed += failure.records
        _log.info("failed: %s (%d records)", failure.reason, failure.records)
        if self._bar is not None:
            self._bar.set_postfix(failed=self.failed)
        self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        if now - self._told >= LINE_SECONDS:
            self._told = now
            self._say()

    def _say(self) -> None:
        _log.info("%s", self.line())
        if self._bar is None and sys.stderr:
            typer.echo(self.line(), err=True)

    def line(self) -> str:
        """Say how far it is, in one line."""
        seconds = max(1e-9, time.monotonic() - self._started)
        rate = self.done / seconds
        left = self.total - self.done - self.failed
        parts = [f"{self.what}: {self.done:,} of {self.total:,} {self.unit}s"]
        if self.done:
            told = f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"
            parts.append(f"{told} a second, {_span(left / rate)} left")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        return ", ".join(parts)


def _make_bar(what: str, total: int, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(total=total, desc=what, unit=unit, file=sys.stderr, smoothing=0.05)


def _span(seconds: float) -> str:
    """Write a time for people, such as ``3 h 05 min``."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min" if minutes else f"{seconds:.0f} s"


class LogFile:
    """A file that gets what the package logs, from INFO on; a context manager.

    Parameters
    ----------
    path : Path or None
        Appended to; None for no file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._logger = logging.getLogger("feature_cache")
        self._level = self._logger.level
        self._handler: logging.Handler | None = None

    def __enter__(self) -> LogFile:
        """Open the file; others go on to get what they got."""
        if self.path is None:
            return self
        try:
            self._handler = logging.FileHandler(self.path, errors="backslashreplace")
        except OSError as error:
            told = error.strerror or error
            raise typer.BadParameter(f"can't write the log {self.path}: {told}") from error
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        shown = self._logger.getEffectiveLevel()
        self._others = [(handler, handler.level) for handler in logging.getLogger().handlers]
        for handler, level in self._others:
            handler.setLevel(max(level, shown))
        self._logger.addHandler(self._handler)
        self._logger.setLevel(min(shown, logging.INFO))
        return self

    def __exit__(self, *error: object) -> None:
        """Close it."""
        if self._handler is not None:
            self._logger.removeHandler(self._handler)
            self._logger.setLevel(self._level)
            self._handler.close()
            for handler, level in self._others:
                handler.setLevel(level)


def show_failures(failures: tuple[Failure, ...]) -> None:
    """List what failed, what is alike once, and how much more there is."""
    groups: dict[str, list[Failure]] = {}
    for failure in failures:  # of the same words, but for numbers: as of a wrong --channel
        groups.setdefault(re.sub(r"\d+", "0", failure.reason), []).append(failure)
    shown = [*groups.values()]
    for first, *others in shown[:SHOWN]:
        alike = f"; and {len(others):,} more alike, up to {others[-1].what}" if others else ""
        typer.echo(f"failed: {first.reason}{alike}", err=True)
    if len(shown) > SHOWN:
        more = sum(map(len, shown[SHOWN:]))
        typer.echo(f"failed: and {more:,} more (all with --json, or in a --report)", err=True)
