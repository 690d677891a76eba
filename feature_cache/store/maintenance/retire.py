"""Taking packs away without hurting a reader.

Removing a file that another host has mapped from a network file system kills that process. So a
pack that is to go is first *retired*: a mark ``retired/<space>/<pack>`` makes new readers leave it
out, while those that have it open go on. Every process says in its heartbeat file which retired
packs it has let go of; when all living ones have, the pack is removed.
"""

from __future__ import annotations

import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path

from ..files import (
    TEMPORARY_PREFIX,
    create_exclusive,
    list_folder,
    make_folders,
    sync_folder,
    tree_bytes,
    writing,
)
from ..filesystem import find_file_system
from ..maps import mapped_names
from ..process import join, living
from ..space import PACK_NAME, Space
from ..uses import KnownUses, read_uses

NETWORK_GRACE_SECONDS = 3600.0
"""How long a retired pack stays on a network file system, where a reader may hear of it late, or
be unable to say that it reads."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A pack that is retired or in quarantine.

    Attributes
    ----------
    path : Path
        Its folder.
    mark : Path or None
        What retires it.
    bytes : int
    waits_for : str
        Who or what it stays for; empty where it can go.
    identity : tuple of int, or None
        Which pack of this name it is.
    """

    path: Path
    mark: Path | None
    bytes: int
    waits_for: str
    identity: tuple[int, int] | None


def known_uses(root: Path) -> KnownUses:
    """Read what all processes used, this one up to now."""
    presence = join(root, create=False)
    presence.note()
    now = presence.now()
    names = list_folder(root / "processes")  # first: those that come later are running
    lives = {*living(root, now), presence.name}
    return read_uses(root, now, {name: name in lives for name in {*names, *lives}})


def last_uses(space: Space) -> dict[str, float]:
    """Give when each pack of a space was last used, or written, in seconds since 1970, by name."""
    times = known_uses(space.root).times
    noted = space.pack_times()
    return {name: max(time, times.get((space.name, name), time)) for name, time in noted.items()}


def retire(space: Space, names: Iterable[str]) -> None:
    """Retire packs: readers let go of them as they refresh, and `remove` takes them away."""
    marks = space.root / "retired" / space.name
    make_folders(marks, space.root)
    for name in names:
        create_exclusive(marks / name, "")  # empty: it fits on a disk that is full
    sync_folder(marks)


def find_leaving(root: Path, grace_seconds: float | None = None) -> list[Leaving]:
    """List the packs that are retired or in quarantine, and what each waits for.

    Whatever else is in quarantine, or marked, stays.

    Parameters
    ----------
    root : Path
        The cache's folder.
    grace_seconds : float, optional
        How long retired packs stay at least; by default nothing on a local file system and
        `NETWORK_GRACE_SECONDS` on a network file system.
    """
    presence = join(root)
    presence.beat()
    now = presence.now()
    processes = living(root, now)
    if grace_seconds is None:
        grace_seconds = NETWORK_GRACE_SECONDS if find_file_system(root).is_network else 0.0

    def holds(process: str, name: str) -> bool:
        if process == presence.name:  # on a full disk it can't say what it has let go of
            return name in mapped_names(root)
        return name not in processes[process].released

    def waits_for(name: str, since: Path) -> str:
        holders = [p for own, p in processes.items() if holds(own, name)]
        if holders:
            who = ", ".join(f"{p.host.rpartition('_')[0]}:{p.pid}" for p in holders[:3])
            return f"{len(holders)} processes that may read it ({who})"
        with suppress(FileNotFoundError):
            if now - since.stat().st_mtime < grace_seconds:
                return f"{grace_seconds:.0f} s to pass since it was retired"
        return ""

    return [
        Leaving(path, mark, tree_bytes(path), waits_for(name, mark or path), _identity(path))
        for path, name, mark in _list_leaving(root)
    ]


def _list_leaving(root: Path) -> Iterator[tuple[Path, str, Path | None]]:
    """List packs that are to go: folder, name, and the mark of one that is retired."""
    for space in list_folder(root / "retired"):
        marks, packs = root / "retired" / space, root / "spaces" / space / "packs"
        for name in filter(PACK_NAME.fullmatch, list_folder(marks)):
            yield packs / name, name, marks / name
    for entry in list_folder(root / "quarantine"):
        name = "".join(entry.split("-")[-2:-1])
        if PACK_NAME.fullmatch(name):
            yield root / "quarantine" / entry, name, None


def _identity(pack: Path) -> tuple[int, int] | None:
    """Tell a pack from one that is written later under the same name."""
    try:
        status = (pack / "zarr.json").lstat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def remove(root: Path, leaving: Sequence[Leaving], deadline: float = inf) -> tuple[int, bool]:
    """Remove packs that wait for nothing, one at least, until a time of `time.monotonic`.

    Each is renamed first, so that nobody ever sees a part of it.

    Returns
    -------
    int, bool
        Bytes freed, and whether all were removed in time.
    """
    freed, writer = 0, join(root).name
    ready = [pack for pack in leaving if not pack.waits_for]
    for number, pack in enumerate(ready):
        if number and time.monotonic() > deadline:
            return freed, False
        if doomed := _take_away(pack.path, writer):
            if _identity(doomed) != pack.identity:
                _put_back(doomed, pack.path)
                continue
            _remove(doomed)
            freed += pack.bytes
        if pack.mark is not None:
            pack.mark.unlink(missing_ok=True)
    return freed, True


def remove_retired(root: Path) -> list[Leaving]:
    """Remove the retired packs that wait for nothing; list the others.

    Raises
    ------
    StoreError
        One of them can't be removed.
    """
    with writing(root):
        leaving = [pack for pack in find_leaving(root) if pack.mark is not None]
        remove(root, leaving)
    return [pack for pack in leaving if pack.waits_for]


def remove_tree(path: Path, writer: str) -> None:
    """Remove a file or folder in one step, as others see it."""
    if doomed := _take_away(path, writer):
        _remove(doomed)


def _take_away(path: Path, writer: str) -> Path | None:
    doomed = path.with_name(f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}")
    try:
        return path.rename(doomed)
    except FileNotFoundError:
        return None


def _put_back(taken: Path, path: Path) -> None:
    """Give back a pack that was written anew, when another process had removed the old one."""
    try:
        taken.rename(path)
    except OSError:
        if not path.is_dir():
            raise
        _remove(taken)


def _remove(doomed: Path) -> None:
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink(missing_ok=True)
