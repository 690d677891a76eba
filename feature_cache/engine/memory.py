"""What is freed, given back to the system."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any


@cache
def _malloc_trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim() -> None:
    """Give back what was freed, where the C library is glibc.

    It keeps freed frames in an arena for each of some threads, and of what one has freed another
    takes nothing: with many frames, and more threads than cores, this grows.
    """
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)
