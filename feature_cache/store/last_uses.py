"""Last use: which packs each process read and when, so that `gc` lets go of the least used.

``uses/<process>`` says for each pack how many seconds before the file was written it was last read,
so that clocks of hosts need not agree. It is written anew every few seconds while something is
read. When the process ends, and where it may not, when the next `gc` runs, the times go to the
packs' folders, and the file goes. Who can read a cache but not write it is seen where ``uses/`` may
be written by all (mode 1777).
"""

from __future__ import annotations

import logging
import os
import stat
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

from ..forks import Lock
from ..hashing import canonical_json
from .files import TEMPORARY_PREFIX, list_folder, read_json, write_bytes

LATELY_SECONDS = 86400.0
"""What a running process read within this time goes after everything else."""

_QUIET_SECONDS = 900.0
"""How long a file counts as that of a running process, where nothing else tells."""
_COST = 0.005
"""The part of the time that may go into writing down uses."""
_AGAIN_SECONDS = 60.0
"""When it is tried again where they can't be written down."""
_LIMIT = 1 << 27
_log = logging.getLogger(__name__)
Pack = tuple[str, str]
"""A space's name, and a pack's."""


class Uses:
    """What one process used of a cache; may be shared by threads.

    Parameters
    ----------
    root : Path
        The cache's folder.
    process : str
        The process's name.
    """

    def __init__(self, root: Path, process: str) -> None:
        self.file = root / "uses" / process
        self._root, self._lock = root, Lock()
        self._times: dict[str, dict[str, float]] = {}
        self._changed, self._next = False, 0.0

    def add(self, space: str, packs: Collection[str]) -> None:
        """Take in that packs of a space were read, just now."""
        if packs:
            with self._lock:
                self._times.setdefault(space, {}).update(dict.fromkeys(packs, time.monotonic()))
                self._changed = True

    def save(self) -> None:
        """Write down what is new, unless that would take more than 0.5 % of the time."""
        with self._lock:
            now = time.monotonic()
            if not self._changed or now < self._next:
                return
            ages = {
                space: {pack: round(now - used, 1) for pack, used in packs.items()}
                for space, packs in self._times.items()
            }
            try:
                write_bytes(self.file, canonical_json(ages).encode())
                self._changed = False
            except OSError as error:
                _log.info("gc does not see what is read here, as it can't be noted: %s", error)
                self._next = now + _AGAIN_SECONDS
                return
            after = time.monotonic()
            self._next = after + (after - now) / _COST

    def end(self, now: float) -> None:
        """Give the packs their times, at the end of the process; `now` as the file system has it.

        Where some can't be given, the file stays for `gc`.
        """
        ahead = now - time.monotonic()
        with self._lock:
            times = {
                (space, pack): used + ahead
                for space, packs in self._times.items()
                for pack, used in packs.items()
            }
        self._next = 0.0
        if _give(self._root, times):
            with suppress(OSError):
                self.file.unlink()
        else:
            self.save()


@dataclass(frozen=True, slots=True)
class KnownUses:
    """What the files of all processes say.

    Attributes
    ----------
    times : mapping of Pack to float
        When a pack was last used, in seconds since 1970 as the file system counts them.
    lately : collection of Pack
        What a running process used lately.
    ended : mapping of Path to mapping
        The files of ended processes, and what they say.
    """

    times: Mapping[Pack, float] = field(default_factory=dict)
    lately: Collection[Pack] = frozenset()
    ended: Mapping[Path, Mapping[Pack, float]] = field(default_factory=dict)


def read_uses(root: Path, now: float, runs: Mapping[str, bool]) -> KnownUses:
    """Read what all processes used; a file that holds something else is left out.

    Parameters
    ----------
    root : Path
    now : float
        As the file system has it.
    runs : mapping of str to bool
        Whether a process runs, by name, as far as that is known.
    """
    times: dict[Pack, float] = {}
    lately: set[Pack] = set()
    ended = {}
    for name in list_folder(root / "uses"):
        file = root / "uses" / name
        try:
            written = min(file.lstat().st_mtime, now)
            found = _read(file, written)
        except (OSError, ValueError) as error:
            _log.debug("%s is left out: %s", file, error)
            continue
        for pack, used in found.items():
            times[pack] = max(used, times.get(pack, used))
        if runs.get(name, now - written < _QUIET_SECONDS):
            lately.update(pack for pack, used in found.items() if now - used < LATELY_SECONDS)
        else:
            ended[file] = found
    return KnownUses(times, lately, ended)


def _read(file: Path, written: float) -> dict[Pack, float]:
    if file.name.startswith(TEMPORARY_PREFIX):
        raise ValueError("a file on its way")
    found = {}
    for space, packs in read_json(file, _LIMIT).items():
        for pack, age in packs.items() if isinstance(packs, dict) else ():
            if type(age) not in (int, float) or not isfinite(age):
                raise ValueError(f"{age!r} is no age")
            found[space, pack] = written - max(0.0, age)
    return found


def settle_uses(root: Path, known: KnownUses) -> None:
    """Give the packs the times that files of ended processes say, and remove these."""
    for file, times in known.ended.items():
        if _give(root, times):
            with suppress(OSError):
                file.unlink()


def _give(root: Path, times: Mapping[Pack, float]) -> bool:
    """Give packs' folders the times of their last use; tell whether all have theirs now."""
    try:
        spaces = set(list_folder(root / "spaces"))
    except OSError:
        return False
    done = [
        set_last_use(root / "spaces" / space / "packs" / pack, used)
        for (space, pack), used in times.items()
        # The names are from files that all may write: none may lead elsewhere.
        if space in spaces and pack.isalnum()
    ]
    return all(done)


def set_last_use(folder: Path, used: float) -> bool:
    """Give a pack the time of its last use, unless it has a later one; tell whether it has it."""
    try:
        if folder.stat().st_mtime >= used:
            return True
        try:
            os.utime(folder, (used, used))
        except PermissionError:  # another user's, in a folder of a group: only "now" can be set
            os.utime(folder)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def find_unseen(root: Path) -> str:
    """Name those who may read a cache, and have no place to note it; empty where there are none."""
    mode, uses = _mode(root), _mode(root / "uses")
    above = [_mode(folder) for folder in root.parents]
    who: Iterable[tuple[str, int, int]] = (
        ("its group", stat.S_IRGRP | stat.S_IXGRP, stat.S_IWGRP),
        ("others", stat.S_IROTH | stat.S_IXOTH, stat.S_IWOTH),
    )
    return " and ".join(
        name
        for name, read, write in who
        if mode & read == read and not uses & write and all(m & read & 0o111 for m in above)
    )


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except OSError:
        return 0
