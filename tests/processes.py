"""Processes that tests start, and where their threads are when one outlives its time."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress

import psutil

LAST_SECONDS = 15.0
"""How long is waited for what an aborted process says."""

os.environ["PYTHONFAULTHANDLER"] = "1"  # SIGABRT: each Python prints the stacks of its threads


def outcome(process: subprocess.Popen[str], seconds: float = 60.0) -> tuple[str, str]:
    """Wait for the end; give what was printed. What stays longer says where its threads are."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        one = psutil.Process(process.pid)
        abort([*one.children(recursive=True), one])
        _, said = process.communicate(timeout=LAST_SECONDS)
    raise AssertionError(f"it was still there after {seconds:.0f} s:\n{said}")


def abort_children() -> bool:
    """End all processes that were started from here; tell whether there were any."""
    children = psutil.Process().children(recursive=True)
    abort(children)
    return bool(children)


def abort(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGABRT)
