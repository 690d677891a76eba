"""Who uses a cache: one small file a process, touched every 15 seconds.

``processes/<name>`` says host and process. Claims are held by such a name, and temporary folders
carry one. A process that can't write the file (a read-only folder, a full disk) goes on without.

Ages are differences of times that the file system itself gave, so clocks of hosts need not agree.
"""

from __future__ import annotations

import logging
import multiprocessing.util
import os
import re
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import psutil

from ..forks import Lock
from ..hashing import canonical_json, digest_json
from ..system import host_identity, in_forked_child, start, start_of
from .files import TEMPORARY_PREFIX, list_folder, make_folder, read_json, write_bytes
from .last_uses import Uses

BEAT_SECONDS = 15.0
NOTE_SECONDS = 5.0
"""How soon what was read is written down, for gc."""
SILENT_SECONDS = 90.0
"""A process of another host that was not heard of for so long has lost its claims: two beats, and
the minute for which a client of NFS may show a time that is old."""
GONE_SECONDS = 900.0
"""One that was not heard of for so long uses nothing any more."""

_NAME = re.compile(r"\w+-\d+-[0-9a-f]{16}")
# The start is counted in ticks, and the boot in whole seconds.
_START_TOLERANCE_SECONDS = 2.0
_log = logging.getLogger(__name__)


class Member(Protocol):
    """What a process has open in a cache."""

    def refresh(self) -> None:
        """Let go of packs that are gone, whose files would stay as long as they are open."""

    def note(self) -> None:
        """Tell `Presence.uses` what was used."""


@dataclass(frozen=True, slots=True)
class Process:
    """What a process says of itself.

    Attributes
    ----------
    host : str
        With a digest of what tells process numbers apart: boot and namespace.
    pid : int
    started : float
        As `feature_cache.system.start_of` gives it.
    """

    host: str
    pid: int
    started: float

    def to_text(self) -> str:
        """Write it as the file holds it."""
        return canonical_json(asdict(self))

    @classmethod
    def read(cls, file: Path) -> Process:
        """Read it; ValueError where the file holds none."""
        try:
            plain = read_json(file)
            pid, started = int(plain["pid"]), float(plain["started"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"{file} is no description of a process") from error
        if not 0 < pid < 1 << 31:
            raise ValueError(f"{file} has the process number {pid}")
        return cls(str(plain.get("host")), pid, started)

    @property
    def runs(self) -> bool | None:
        """Whether it runs; None where that can't be seen from this host."""
        if self.host != this_host():
            return None
        try:
            process = psutil.Process(self.pid)
            # Dead, and its parent has not looked yet. One that was killed may have its first thread
            # at the end, and another in the middle of a rename that will still be done.
            if process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1:
                return False
            return abs(start_of(process) - self.started) <= _START_TOLERANCE_SECONDS
        except psutil.NoSuchProcess:
            return False
        except psutil.AccessDenied:
            return None


@cache
def this_host() -> str:
    """Name this host, this boot of it and this namespace of processes."""
    name = "".join(c if c.isalnum() else "_" for c in socket.gethostname())[:40] or "host"
    return f"{name}_{digest_json([*host_identity()]).hex()[:8]}"


class Presence:
    """The process that runs, in one cache; made by `join`.

    Attributes
    ----------
    name : str
        Of the process's file; unique for all times.
    uses : Uses
        What it used.
    is_inherited : bool
        Whether it is that of the process from which this one was forked.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.name = f"{this_host()}-{os.getpid()}-{secrets.token_hex(8)}"
        self._members: weakref.WeakSet[Member] = weakref.WeakSet()
        self._adding = Lock()
        self.uses = Uses(root, self.name)
        self._process = Process(this_host(), os.getpid(), start_of(psutil.Process()))
        # Held, at the end, while members take theirs: who holds a member's must not wait for it.
        self._lock = Lock()
        self.announced = self._left = False
        self.is_inherited = False

    @property
    def file(self) -> Path:
        """The process's file."""
        return self.root / "processes" / self.name

    def announce(self, *, create: bool) -> None:
        """Write the file, before anything is read, claimed or written; where it can be."""
        try:
            if create:
                make_folder(self.file.parent)
                make_folder(self.uses.file.parent)
            with self._lock:
                self._write()
        except OSError as error:
            _log.debug("not announced in %s: %s", self.file, error)

    def add(self, member: Member) -> None:
        """Refresh a member, and let it note what was used, as long as it is there."""
        with self._adding:
            self._members.add(member)

    def _list_members(self) -> list[Member]:
        with self._adding:
            return list(self._members)

    def beat(self) -> None:
        """Say that the process lives; waits for nobody who reads."""
        with self._lock:
            if self._left:
                return
            try:
                # Not written yet; or the last beat failed: gc removes the file of who was silent.
                if not self.announced:
                    self._write()
                os.utime(self.file)
            except OSError as error:
                self.announced = False
                _log.debug("no heartbeat in %s: %s", self.file, error)

    def refresh(self) -> None:
        """Let go of packs that are gone."""
        for member in self._list_members():
            # Nobody to tell it to is here: whoever reads that space gets the error.
            with suppress(OSError):
                member.refresh()

    def note(self) -> None:
        """Write down what was used, unless the process has left."""
        # Outside the lock: this waits for a space that is being read, and others need not.
        self._ask_members()
        with self._lock:
            if not self._left:
                self.uses.save()

    def _ask_members(self) -> None:
        for member in self._list_members():
            member.note()

    def _write(self) -> None:
        write_bytes(self.file, self._process.to_text().encode())
        self.announced = True

    def now(self) -> float:
        """Give the file system's time, in seconds."""
        try:
            # Without times, which the server of a network file system then gives.
            os.utime(self.file)
            return self.file.stat().st_mtime
        except OSError:
            return time.time()

    def leave(self) -> None:
        """Take the file away; the heart may beat once more."""
        with self._lock:
            self._left = True
            self._ask_members()
            self.uses.end(self.now())
            with suppress(OSError):
                self.file.unlink()


_present: dict[Path, Presence] = {}
_joining = threading.Lock()
_threads: dict[str, threading.Thread] = {}
"""What beats and what notes, by name, once they have started."""
_leaves_at_end = False


def join(root: Path, *, create: bool = True) -> Presence:
    """Give this process's presence in a cache, announced the first time.

    Parameters
    ----------
    root : Path
    create : bool
        Whether folders may be made for it.
    """
    presence = _present.get(root)
    # Again where it could not be announced, or a reader was not to make the folders, or where no
    # thread could start.
    if presence is None or len(_threads) < 2 or (create and not presence.announced):
        with _joining:
            presence = _present.setdefault(root, presence or Presence(root))
            if not presence.announced:
                presence.announce(create=create)
            _start_threads()
    return presence


def _start_threads() -> None:
    """Start what beats and what notes, once; where none starts, when this process joins again."""
    global _leaves_at_end
    if not _leaves_at_end:
        # No `atexit`: children of multiprocessing, as a loader's workers are, end without it.
        multiprocessing.util.Finalize(None, _leave_all, exitpriority=10)
        _leaves_at_end = True
    for name, work in (("heartbeat", _beat_forever), ("notes", _note_forever)):
        if name in _threads:
            continue
        thread = threading.Thread(target=work, name=f"feature_cache {name}", daemon=True)
        if start(thread):
            _threads[name] = thread
        else:
            _log.debug("no %s: no more threads start", name)


def _beat_forever() -> None:
    while True:
        time.sleep(BEAT_SECONDS)
        _for_each(Presence.beat)


def _note_forever() -> None:
    # A thread of its own: a folder that takes long to list must not make the process silent.
    refreshed = time.monotonic()
    while True:
        time.sleep(min(NOTE_SECONDS, BEAT_SECONDS))
        _for_each(Presence.note)
        if time.monotonic() - refreshed >= BEAT_SECONDS:
            refreshed = time.monotonic()
            _for_each(Presence.refresh)


def _for_each(work: Callable[[Presence], None]) -> None:
    # Also in a cache that is away: when it is back, its spaces and claims have the same name.
    for presence in list(_present.values()):
        try:
            work(presence)
        except Exception:  # noqa: BLE001
            # The thread goes on: nobody would start it again.
            _log.exception("%s failed in %s", work.__name__, presence.root)


def _leave_all() -> None:
    for presence in list(_present.values()):
        presence.leave()


def _start_anew() -> None:
    """Forget, in a forked child, what its parent announced."""
    global _joining, _leaves_at_end
    for presence in _present.values():
        presence.is_inherited = True
    _present.clear()
    _joining, _leaves_at_end = threading.Lock(), False
    _threads.clear()


in_forked_child(_start_anew)


def living(
    root: Path, now: float, *, silent_seconds: float = GONE_SECONDS
) -> Mapping[str, Process]:
    """Read which processes use a cache, by name.

    One of this host lives as long as it runs; one of another host, as long as it was heard of
    within `silent_seconds`. A file that can't be read counts as a process of another host.
    """
    found = {}
    for name in list_folder(root / "processes"):
        if name.startswith(TEMPORARY_PREFIX):
            continue
        process = read_process(root, name)
        if process is None:
            continue
        runs = process.runs
        if runs or (runs is None and not is_silent(root, name, now, silent_seconds)):
            found[name] = process
    return found


def read_process(root: Path, name: str) -> Process | None:
    """Read one process's file; None where it is gone."""
    try:
        return Process.read(root / "processes" / name)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return Process("unknown", 0, 0.0)


def is_silent(root: Path, name: str, now: float, seconds: float) -> bool:
    """Tell whether a process was not heard of for some time."""
    try:
        return now - (root / "processes" / name).stat().st_mtime > seconds
    except OSError:
        return True


def holds_claims(root: Path, name: str, now: float) -> bool:
    """Tell whether a process lives and was heard of lately, so that its claims count."""
    # The name is what a file says: nothing else becomes a part of a path.
    process = read_process(root, name) if _NAME.fullmatch(name) else None
    if process is None or process.runs is False:
        return False
    # Also of this host: one that was stopped runs, and would be waited for without end.
    return not is_silent(root, name, now, SILENT_SECONDS)
