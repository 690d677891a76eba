"""Mapped files: which packs this process has in its address space, and how many it may."""

from __future__ import annotations

import mmap
import os
import resource
import threading
import weakref
from pathlib import Path

_MAPS_LIMIT = 1 << 14
_maps: weakref.WeakKeyDictionary[mmap.mmap, str] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def map_file(descriptor: int, length: int, pack: str, *, whole: bool) -> mmap.mmap | None:
    """Map the beginning of an open file, read-only; None where the process has many mapped already.

    Parameters
    ----------
    descriptor : int
    length : int
        In bytes; the caller has checked that the file is as long.
    pack : str
        The pack's folder, for `mapped_names`.
    whole : bool
        Whether all of it is going to be read: from disk at once then, not page by page.
    """
    if whole and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, length, os.POSIX_FADV_WILLNEED)
    with _lock:
        if len(_maps) >= _maps_allowed():
            return None
        data = mmap.mmap(descriptor, length, access=mmap.ACCESS_READ)
        _maps[data] = pack
        return data


def mapped_names(root: Path) -> frozenset[str]:
    """Name the packs of a cache of which an array is still referenced."""
    with _lock:
        packs = frozenset(map(Path, _maps.values()))
    real = os.path.realpath(root)
    roots = {pack.parents[3] for pack in packs if len(pack.parents) > 3}
    ours = {folder for folder in roots if os.path.realpath(folder) == real}
    return frozenset(p.name for p in packs if len(p.parents) > 3 and p.parents[3] in ours)


def may_keep_map() -> bool:
    """Tell whether a map may stay for the next time, though it could be made again."""
    return len(_maps) < _maps_allowed() // 2


def _maps_allowed() -> int:
    """Half of the files that the process may have open: each map keeps a descriptor."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MAPS_LIMIT if limit == resource.RLIM_INFINITY else min(limit // 2, _MAPS_LIMIT)


def _start_anew() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_start_anew)
