"""Taking packs and left-overs away, each in one step as others see it.

A reader that has a pack open reads on, as long as its file system keeps what is open; any other
finds the pack gone, looks again, and finds the one that replaces it.
"""

from __future__ import annotations

import secrets
import shutil
from math import inf
from pathlib import Path

from ...system import rename_folder
from ..files import TEMPORARY_PREFIX, rename_new

# More than a time of the file system loses as a float.
_TICK_SECONDS = 1e-3


def remove_tree(path: Path, writer: str, *, last_use: float = inf) -> bool:
    """Remove a file or folder, unless it was used, or written again, after a time.

    Parameters
    ----------
    path : Path
    writer : str
        This process, in the name that it has meanwhile; see `feature_cache.store.process`.
    last_use : float
        Seconds since 1970, as the file system counts.

    Returns
    -------
    bool
        Whether it was there and is gone; on Windows it stays while a process reads it.
    """
    doomed = path.with_name(f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}")
    try:
        # What is known to be used is not touched: killed before it gave it back, this lost it.
        if _is_used(path, last_use) or not rename_folder(path, doomed):
            return False
    except FileNotFoundError:
        return False
    # And after the rename: before it, a writer could still find the pack there, and take it for
    # committed.
    if _is_used(doomed, last_use):
        _put_back(doomed, path)
        return False
    _remove(doomed)
    return True


def _is_used(path: Path, last_use: float) -> bool:
    return path.lstat().st_mtime > last_use + _TICK_SECONDS


def _put_back(taken: Path, path: Path) -> None:
    """Give back a pack that was used just now, unless it was written again meanwhile."""
    if not rename_new(taken, path):
        _remove(taken)


def _remove(doomed: Path) -> None:
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink(missing_ok=True)
