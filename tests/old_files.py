"""Files that are old enough for their digests to be remembered."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from feature_cache import memo

SETTLED_NS = 30_000_000
"""Longer than a tick of the clock that gives files their times."""


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have this process remember files that are some ticks old, so that tests needn't wait."""
    monkeypatch.setattr(memo, "_MINIMUM_AGE_NS", SETTLED_NS)


def age(*places: Path) -> None:
    """Wait until files, and those in folders, are old enough for a process that may `hurry`."""
    files = [file for place in places for file in (place.rglob("*") if place.is_dir() else [place])]
    latest = max(max(s.st_mtime_ns, s.st_ctime_ns) for s in map(Path.stat, files))
    time.sleep(max(0, latest + memo._MINIMUM_AGE_NS - time.time_ns()) / 1e9 + 0.005)
