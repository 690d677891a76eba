"""Threads that can't start, as where the system allows no more."""

from __future__ import annotations

import threading

import pytest


def refuse_threads(patch: pytest.MonkeyPatch, name: str, after: int = 0) -> None:
    """Have no thread of a name start, but for so many."""
    begin, allowed = threading.Thread.start, [None] * after

    def start(thread: threading.Thread) -> None:
        if thread.name == f"feature_cache {name}":
            if not allowed:
                raise RuntimeError("can't start new thread")
            allowed.pop()
        begin(thread)

    patch.setattr(threading.Thread, "start", start)
