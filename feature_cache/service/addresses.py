"""Where servers are found: by what a process inherits, or by descriptions in the user's folders.

Descriptions are in ``$XDG_RUNTIME_DIR/feature_cache``, or else ``<tmp>/feature_cache-<uid>``, and
in ``/tmp/feature_cache-<uid>``, where others find them whose environment is another; for this user
only. On Linux a server listens at an abstract socket, which needs no folder: who has its address
reaches it when the folders are gone.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from socket import AF_INET, socket
from typing import Any

import psutil

from .. import system
from ..errors import ServiceError
from ..store.process import Process, this_host
from ..system import HAS_ABSTRACT, SHARED_TEMPORARY, SOCKET_FAMILY, is_private, user

_VERSION = 2
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
    port : int
        Of TCP, where the system has no sockets of Unix.
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
    port: int = 0

    @property
    def socket(self) -> str | tuple[str, int]:
        """Name of the abstract socket, or path of the socket; host and port where it has one."""
        if SOCKET_FAMILY == AF_INET:
            return "127.0.0.1", self.port
        if HAS_ABSTRACT:
            return f"\0feature_cache-{user()}-{self.name}"
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


# by number, so that a forked child finds its own
@cache
def _started(pid: int) -> float:
    return system.start_of(psutil.Process(pid))


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
    own = Path(tempfile.gettempdir(), f"feature_cache-{user()}")
    return own if len(os.fsencode(own)) <= _LONGEST_PATH - 16 else _shared_folder()


def _shared_folder() -> Path:
    return Path(SHARED_TEMPORARY, f"feature_cache-{user()}")


def _folders() -> list[Path]:
    """Give the folders of descriptions: that of this environment, and that of any."""
    return list(dict.fromkeys([runtime_folder(), _shared_folder()]))


def _make_private(folder: Path) -> None:
    """Make a folder which nobody else may enter; ServiceError where that can't be."""
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise ServiceError(
            f"can't make {folder}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of your own"
        ) from error
    if not is_private(folder):
        raise ServiceError(
            f"{folder} is not yours alone (owner, or mode other than 0700): remove it, or set "
            "XDG_RUNTIME_DIR to a folder of your own"
        )


def listen(address: Address) -> tuple[socket, Address]:
    """Open a server's socket; give it, and the address with its port.

    Raises
    ------
    OSError
        That can't be; ServiceError is one.
    """
    if not HAS_ABSTRACT:
        _make_private(runtime_folder())
    opened = system.listen(address.socket)
    port = opened.getsockname()[1] if SOCKET_FAMILY == AF_INET else 0
    return opened, replace(address, port=port)


def publish(address: Address) -> None:
    """Write a server's description, as a whole, in each folder where that can be.

    Raises
    ------
    ServiceError
        It can be in none.
    """
    failures = []
    for folder in _folders():
        try:
            _make_private(folder)
            _write(folder, address)
        except ServiceError as error:
            failures.append(error)
        except OSError as error:
            failures.append(ServiceError(f"can't write in {folder}: {error}"))
    if len(failures) == len(_folders()):
        raise failures[0]


def _write(folder: Path, address: Address) -> None:
    temporary = folder / f"{address.name}.tmp"
    with os.fdopen(system.create_private(temporary), "w", encoding="utf-8") as file:
        json.dump(address.to_json(), file)
    system.replace(temporary, folder / f"{address.name}.json")


def is_published(name: str) -> bool:
    """Tell whether a server's description is where it should be."""
    return all((folder / f"{name}.json").exists() for folder in _folders())


def withdraw(name: str) -> None:
    """Remove a server's files."""
    for folder in _folders():
        for suffix in ("json", "sock", "tmp"):
            with suppress(OSError):
                (folder / f"{name}.{suffix}").unlink()


def list_servers() -> Iterator[Address]:
    """Read the descriptions of servers; those of dead processes are removed."""
    files = [file for f in _folders() if is_private(f) for file in sorted(f.glob("*.json"))]
    # a server has a description in each folder: the first folder's counts
    for file in {file.name: file for file in reversed(files)}.values():
        try:
            if file.stat().st_size > _DESCRIPTION_BYTES:
                raise ValueError("too large")
            address = Address.from_json(file.stem, json.loads(file.read_text("utf-8")))
            runs = address.runs
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            # of another version, perhaps: not ours to remove
            _log.debug("passing over %s: %r", file, error)
            continue
        # not where that can't be seen (None), as from a container that shares the folder
        if runs is False:
            withdraw(address.name)
        else:
            yield address


def find_servers(
    cache: tuple[int, int], backbone: str, *, known: Iterable[Address] = ()
) -> list[Address]:
    """List the servers of a cache that have a backbone, the best first.

    One that somebody started on purpose (``feature-cache serve``) comes first, then those that are
    `known`, then those of other trainings. The process that asks is left out.
    """
    ours = {address.name: address for address in known}
    found = [
        address
        for address in ({one.name: one for one in list_servers()} | ours).values()
        if address.cache == cache and backbone in address.backbones and address.pid != os.getpid()
    ]
    return sorted(found, key=lambda a: (not a.standalone, a.name not in ours, a.started))
