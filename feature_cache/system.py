"""What only some systems have, and what does for it on the others: Linux, macOS, Windows."""

from __future__ import annotations

import ctypes
import errno
import getpass
import os
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil

IS_WINDOWS = sys.platform == "win32"
HAS_ABSTRACT = sys.platform == "linux"
"""Whether sockets can have a name that is no file's."""
SOCKET_FAMILY = getattr(socket, "AF_UNIX", socket.AF_INET)
"""Of sockets for this host; without those of Unix, TCP that only this host reaches."""
SHARED_TEMPORARY = tempfile.gettempdir() if IS_WINDOWS else "/tmp"
"""Where this user's processes meet, whatever their environment."""
_READ_PLAIN = os.O_RDONLY
# O_NONBLOCK: to open a pipe that lies in a file's place would wait for somebody who writes.
for _flag in ("O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW", "O_BINARY"):
    _READ_PLAIN |= getattr(os, _flag, 0)
_IN_USE_SECONDS = 2.0
_BLOCK_BYTES = 512
"""Of which the system counts what a file takes, whatever the file system's own blocks are."""
_CLUSTER_BYTES = 4096
"""Of which a file takes whole ones, where the system doesn't say how many."""
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
# No `forks.Lock`: it is taken only where there is no `pread`, and nothing forks there.
_seeking = threading.Lock()


# Processes


def in_forked_child(function: Callable[[], object]) -> None:
    """Have a function called in each child that is forked from here on; nothing forks elsewhere."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=function)


def around_forks(
    before: Callable[[], object], in_parent: Callable[[], object], in_child: Callable[[], object]
) -> None:
    """Have functions called by the thread that forks; what is asked for first begins last."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(before=before, after_in_parent=in_parent, after_in_child=in_child)


def start(thread: threading.Thread) -> bool:
    """Start a thread; False where none starts.

    The system allows no more, or the interpreter ends, when from Python 3.12 on none does.
    """
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def count_cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def user() -> str:
    """Name the user: by number, or by name where there are no numbers."""
    return str(os.getuid()) if hasattr(os, "getuid") else getpass.getuser()


def host_identity() -> list[str]:
    """Give what tells hosts of one name apart: boot and namespace of processes, or the card."""
    if not _BOOT_ID.exists():
        return [str(uuid.getnode())]
    found = [_BOOT_ID.read_text(encoding="ascii")]
    with suppress(OSError):
        found.append(str(Path("/proc/self/ns/pid").readlink()))
    return found


def start_of(process: psutil.Process) -> float:
    """Give when a process started, in seconds since whatever doesn't move with the clock.

    On Linux this is the boot, in terms of which the kernel keeps it. Others keep the clock's time
    of that moment.
    """
    # Both by the clock as it is now: before psutil 7.1 the first was by an older one.
    started = float(process.create_time())
    return started - float(psutil.boot_time()) if _BOOT_ID.exists() else started


@cache
def _malloc_trim() -> Any:
    try:
        return getattr(ctypes.CDLL(None), "malloc_trim", None)
    except (TypeError, OSError):  # Windows, where a library has a name
        return None


def trim() -> None:
    """Give back to the system what was freed, where the C library is glibc.

    It keeps freed frames in an arena for each of some threads, and of what one has freed another
    takes nothing: with many frames, and more threads than cores, this grows.
    """
    if (malloc_trim := _malloc_trim()) is not None:
        malloc_trim(0)


# Files


def open_plain(file: Path) -> int:
    """Open a file for reading, without waiting and without following a link; its descriptor."""
    if not hasattr(os, "O_NOFOLLOW") and file.is_symlink():
        raise OSError(errno.ELOOP, "is a link", str(file))
    return os.open(file, _READ_PLAIN)


def read_at(descriptor: int, length: int, place: int) -> bytes:
    """Read bytes from a place on, fewer where the file ends; any thread may, at the same time."""
    data = _read_some(descriptor, length, place)
    # Linux reads at most 2 GiB at once.
    while len(data) < length and (
        more := _read_some(descriptor, length - len(data), place + len(data))
    ):
        data += more
    return data


def _read_some(descriptor: int, length: int, place: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(descriptor, length, place)
    with _seeking:  # threads share the descriptor's place
        os.lseek(descriptor, place, os.SEEK_SET)
        return os.read(descriptor, length)


def sync_file(file: Path) -> None:
    """Make a file's bytes durable."""
    _sync(file, os.O_RDWR if IS_WINDOWS else os.O_RDONLY)  # Windows flushes for writers only


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable; Windows opens no folder, and NTFS has a journal of them."""
    if not IS_WINDOWS:
        _sync(folder, os.O_RDONLY | os.O_DIRECTORY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(file: Path, target: Path) -> None:
    """Rename a file over another, if there is one."""
    _insist(lambda: file.replace(target))


def remove(file: Path) -> None:
    """Remove a file, if it is there."""
    _insist(lambda: file.unlink(missing_ok=True))


def _insist(change: Callable[[], object]) -> None:
    """Change a file; on Windows, which refuses while anybody has it open, for a moment again."""
    end = time.monotonic() + _IN_USE_SECONDS * IS_WINDOWS
    while True:
        try:
            change()
            return
        except PermissionError:
            if time.monotonic() >= end:
                raise
            time.sleep(0.01)


def rename_folder(folder: Path, target: Path) -> bool:
    """Rename a folder; False where Windows refuses, as a process has a file in it open.

    Raises
    ------
    OSError
        It is not there, or may not be renamed.
    """
    try:
        folder.rename(target)
    except PermissionError:
        if not IS_WINDOWS:
            raise
        return False
    return True


def disk_bytes(status: os.stat_result) -> int:
    """Give what a file takes on the disk."""
    if hasattr(status, "st_blocks"):
        return status.st_blocks * _BLOCK_BYTES
    return -(-status.st_size // _CLUSTER_BYTES) * _CLUSTER_BYTES


def is_private(folder: Path) -> bool:
    """Tell whether a folder is there, and this user's alone.

    Windows says by lists who may enter, which a user's own folder for temporary files passes on to
    those in it.
    """
    try:
        # Not `stat`: a link that another user put there is not ours, wherever it leads.
        status = folder.lstat()
    except OSError:
        return False
    if IS_WINDOWS:
        return stat.S_ISDIR(status.st_mode)
    private = not stat.S_IMODE(status.st_mode) & 0o077
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and private


def create_private(file: Path) -> int:
    """Open a file for writing that this user alone may read, made anew; its descriptor."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
    return os.open(file, flags, 0o600)


# Sockets


def listen(address: str | tuple[str, int]) -> socket.socket:
    """Open a socket of `SOCKET_FAMILY` at which others of this host can connect."""
    opened = socket.socket(SOCKET_FAMILY, socket.SOCK_STREAM)
    try:
        if hasattr(socket, "SO_EXCLUSIVEADDRUSE"):  # or another process could take it over
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        opened.bind(address)
        opened.listen(64)
    except OSError:
        opened.close()
        raise
    return opened


def limit_waiting(opened: socket.socket, seconds: float) -> None:
    """Limit each read and write; also of a `Connection` made of the socket."""
    # Not by `settimeout`: it makes the descriptor non-blocking, which a `Connection` reads itself.
    limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
    if IS_WINDOWS:
        limit = struct.pack("=L", int(seconds * 1e3))
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        opened.setsockopt(socket.SOL_SOCKET, option, limit)
