"""Taking packs away without hurting a reader.

Removing a file that another host has mapped from a network file system kills that process. So a
pack that is to go is first *retired*: a mark ``retired/<space>/<pack>`` makes new readers leave it
out, while those that have it open go on. Every process says in its heartbeat file which retired
packs it has let go of; when all living ones have, the pack is removed.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..files import (
    TEMPORARY_PREFIX,
    create_exclusive,
    list_folder,
    make_folder,
    sync_folder,
    tree_bytes,
)
from ..filesystem import find_file_system
from ..process import join, living
from ..space import Space

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
    """

    path: Path
    mark: Path | None
    bytes: int
    waits_for: str


def retire(space: Space, names: Iterable[str]) -> None:
    """Retire packs: readers let go of them as they refresh, and `remove` takes them away."""
    marks = space.root / "retired" / space.name
    make_folder(marks)
    for name in names:
        create_exclusive(marks / name, join(space.root).name)
    sync_folder(marks)


def find_leaving(root: Path, grace_seconds: float | None = None) -> list[Leaving]:
    """List the packs that are retired or in quarantine, and what each waits for.

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

    def waits_for(name: str, since: Path) -> str:
        holders = [p for p in processes.values() if name not in p.released]
        if holders:
            who = ", ".join(f"{p.host.rpartition('_')[0]}:{p.pid}" for p in holders[:3])
            return f"{len(holders)} processes that may read it ({who})"
        with suppress(FileNotFoundError):
            if now - since.stat().st_mtime < grace_seconds:
                return f"{grace_seconds:.0f} s to pass since it was retired"
        return ""

    found = []
    for space in list_folder(root / "retired"):
        for name in list_folder(root / "retired" / space):
            mark, path = root / "retired" / space / name, root / "spaces" / space / "packs" / name
            found.append(Leaving(path, mark, tree_bytes(path), waits_for(name, mark)))
    for entry in list_folder(root / "quarantine"):
        path, parts = root / "quarantine" / entry, entry.split("-")
        name = parts[-2] if len(parts) > 2 else entry
        found.append(Leaving(path, None, tree_bytes(path), waits_for(name, path)))
    return found


def remove(root: Path, leaving: Sequence[Leaving]) -> int:
    """Remove packs that wait for nothing; give the bytes freed.

    Each is renamed first, so that nobody ever sees a part of it.
    """
    freed, writer = 0, join(root).name
    for pack in leaving:
        if pack.waits_for:
            continue
        remove_tree(pack.path, writer)
        if pack.mark is not None:
            pack.mark.unlink(missing_ok=True)
        freed += pack.bytes
    return freed


def remove_tree(path: Path, writer: str) -> None:
    """Remove a file or folder in one step, as others see it."""
    doomed = path.with_name(f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}")
    try:
        path.rename(doomed)
    except FileNotFoundError:
        return
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink(missing_ok=True)
