"""Where servers are found: a socket and a description each, in the user's own runtime folder.

``$XDG_RUNTIME_DIR/feature_cache``, or else ``<tmp>/feature_cache-<uid>``; for this user only.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from ..errors import ServiceError
from ..store.process import Process, this_host

_VERSION = 1
_LONGEST_PATH = 90
"""Paths of sockets are limited to about 100 bytes."""
_DESCRIPTION_BYTES = 1 << 18
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens, and what it serves.

    Attributes
    ----------
    name : str
        Of its files.
    pid, started, host : int, float, str
        Its process, as in `feature_cache.store.process.Process`.
    cache : (int, int)
        Device and inode of the cache's folder.
    root : str
        Its path, for people.
    backbones : frozenset of str
        Hex digests of the specs of the backbones it has.
    device : str
    standalone : bool
        Whether it is ``feature-cache serve``, not a thread of a training.
    authkey : bytes
    """

    name: str
    pid: int
    started: float
    host: str
    cache: tuple[int, int]
    root: str
    backbones: frozenset[str]
    device: str
    standalone: bool
    authkey: bytes

    @property
    def socket(self) -> str:
        """Path of the socket."""
        return str(runtime_folder() / f"{self.name}.sock")

    @property
    def runs(self) -> bool | None:
        """Whether its process runs; None where that can't be seen."""
        return Process(self.host, self.pid, self.started).runs

    def __str__(self) -> str:
        """Name it for people."""
        kind = "feature-cache serve" if self.standalone else "the training"
        return f"{kind} with process number {self.pid}"

    def to_json(self) -> dict[str, Any]:
        """Give what its description holds."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "name"}
        changed = {
            "version": _VERSION,
            "backbones": sorted(self.backbones),
            "authkey": self.authkey.hex(),
        }
        return {**fields, **changed}

    @classmethod
    def from_json(cls, name: str, plain: dict[str, Any]) -> Address:
        """Read what `to_json` gave; ValueError, TypeError or KeyError for anything else."""
        if plain.pop("version") != _VERSION:
            raise ValueError("another version")
        device, inode = plain["cache"]
        changed = {
            "cache": (int(device), int(inode)),
            "backbones": frozenset(map(str, plain["backbones"])),
            "authkey": bytes.fromhex(plain["authkey"]),
        }
        return cls(name, **{**plain, **changed})


def this_process() -> Process:
    """Describe the process that runs, so that others can see whether it still does."""
    return Process(this_host(), os.getpid(), _started(os.getpid()))


@cache
def _started(pid: int) -> float:
    return float(psutil.Process(pid).create_time() - psutil.boot_time())


def identify(root: Path) -> tuple[int, int]:
    """Tell a cache's folder from others, whatever path leads to it."""
    status = root.stat()
    return status.st_dev, status.st_ino


def runtime_folder() -> Path:
    """Give the folder of sockets and descriptions. Makes nothing."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    own = Path(base, "feature_cache") if base and Path(base).is_dir() else None
    if own is not None and len(os.fsencode(own)) <= _LONGEST_PATH - 16:
        return own
    for parent in (tempfile.gettempdir(), "/tmp"):
        own = Path(parent, f"feature_cache-{os.getuid()}")
        if len(os.fsencode(own)) <= _LONGEST_PATH - 16:
            break
    return own or Path("/tmp")


def make_runtime_folder() -> Path:
    """Make the folder, which nobody else may enter.

    Raises
    ------
    ServiceError
        It belongs to somebody else, or others may enter it.
    """
    folder = runtime_folder()
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ServiceError(
            f"can't make {folder}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of your own"
        ) from error
    if not _is_private(folder):
        raise ServiceError(
            f"{folder} is not yours alone (owner, or mode other than 0700): remove it, or set "
            "XDG_RUNTIME_DIR to a folder of your own"
        )
    return folder


def _is_private(folder: Path) -> bool:
    try:
        status = folder.lstat()
    except OSError:
        return False
    private = not stat.S_IMODE(status.st_mode) & 0o077
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid() and private


def publish(address: Address) -> None:
    """Write a server's description, as a whole."""
    folder = runtime_folder()
    temporary = folder / f"{address.name}.tmp"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(address.to_json(), file)
    temporary.replace(folder / f"{address.name}.json")


def withdraw(name: str) -> None:
    """Remove a server's files."""
    for suffix in ("json", "sock", "tmp"):
        with suppress(OSError):
            (runtime_folder() / f"{name}.{suffix}").unlink()


def list_servers() -> Iterator[Address]:
    """Read the descriptions of servers; those of dead processes are removed."""
    folder = runtime_folder()
    if not _is_private(folder):
        return
    for file in sorted(folder.glob("*.json")):
        try:
            if file.stat().st_size > _DESCRIPTION_BYTES:
                raise ValueError("too large")
            address = Address.from_json(file.stem, json.loads(file.read_text()))
            runs = address.runs
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            _log.debug("passing over %s: %r", file, error)
            continue
        if runs is False:
            withdraw(address.name)
        else:
            yield address


def find_servers(
    cache: tuple[int, int], backbone: str, *, parent: int | None = None
) -> list[Address]:
    """List the servers of a cache that have a backbone, the best first.

    One that somebody started on purpose (``feature-cache serve``) comes first, then that of the
    process `parent`, then those of other trainings. The process that asks is left out.
    """
    found = [
        address
        for address in list_servers()
        if address.cache == cache and backbone in address.backbones and address.pid != os.getpid()
    ]
    return sorted(found, key=lambda a: (not a.standalone, a.pid != parent, a.started))
