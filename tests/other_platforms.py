"""A work day on a system that lacks what Linux has: ``other_platforms.py win32 FOLDER [all]``.

The package, and nothing else, finds modules, functions and constants taken away, and Windows'
refusals in place: of folders that are opened, of files renamed or removed while they are open.
"""

from __future__ import annotations

import builtins
import errno
import fcntl
import os
import socket
import struct
import sys
import types
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import psutil

_LINUX = {"os": {"sched_getaffinity", "posix_fadvise", "pidfd_open", "memfd_create"}}
_UNIX = {
    "os": {
        *("fork", "register_at_fork", "getuid", "geteuid", "getgid", "pread", "pwrite", "fchmod"),
        *("chown", "statvfs", "killpg", "mkfifo", "uname", "getloadavg", "sched_getaffinity"),
        *("posix_fadvise", "O_NONBLOCK", "O_CLOEXEC", "O_NOFOLLOW", "O_DIRECTORY"),
    },
    "socket": {"AF_UNIX", "SO_PEERCRED", "socketpair", "sethostname"},
    "signal": {"SIGKILL", "SIGHUP", "SIGCHLD", "SIGUSR1", "SIGALRM", "setitimer", "alarm"},
}
_GONE = {"fcntl", "resource", "pwd", "grp", "termios", "tty", "pty"}


class Lacking(types.ModuleType):
    """A module without some of its names, and with others in the place of some."""

    def __init__(self, module: types.ModuleType, lacks: set[str], **others: Any) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(_module=module, _lacks=lacks, **others)

    def __getattr__(self, name: str) -> Any:
        if name in self._lacks:
            raise AttributeError(f"{self.__name__} has no {name} on this system")
        return getattr(self._module, name)


def pretend(system: str) -> None:
    """Make this process, for the package alone, one of ``"darwin"`` or ``"win32"``."""
    is_windows = system == "win32"
    others: dict[str, dict[str, Any]] = {"sys": {"platform": system}, "ctypes": {"CDLL": _no_libc}}
    if is_windows:
        others["os"] = {"name": "nt", "open": _open, "fsync": _fsync, "lstat": _lstat}
        _refuse_what_is_open()
        socket.socket.setsockopt = _setsockopt(socket.socket.setsockopt)  # type: ignore[method-assign]
    lacks = _UNIX if is_windows else _LINUX
    lacking = {
        name: Lacking(import_module(name), lacks.get(name, set()), **others.get(name, {}))
        for name in {*lacks, *others}
    }
    plain_import = builtins.__import__

    def find(
        name: str, scope: Any = None, rest: Any = None, fromlist: Any = (), level: int = 0
    ) -> Any:
        if ((scope or {}).get("__name__") or "").startswith("feature_cache"):
            if is_windows and name in _GONE:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            if name in lacking and not level:
                return lacking[name]
        return plain_import(name, scope, rest, fromlist, level)

    builtins.__import__ = find
    _hide_proc()
    warnings.filterwarnings("error", category=EncodingWarning, module="feature_cache")


def _no_libc(name: str | None) -> Any:
    raise TypeError("LoadLibrary() argument 1 must be str, not None")


def _open(path: Any, flags: int, mode: int = 0o777) -> int:
    if Path(path).is_dir():
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return os.open(path, flags, mode)


def _fsync(descriptor: int) -> None:
    if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
        raise OSError(errno.EBADF, "Bad file descriptor")
    os.fsync(descriptor)


def _lstat(path: Any) -> Any:
    found = os.lstat(path)
    names = [n for n in dir(found) if n.startswith("st_") and "blk" not in n and n != "st_blocks"]
    return types.SimpleNamespace(**{name: getattr(found, name) for name in names})


def _setsockopt(plain: Callable[..., None]) -> Callable[..., None]:
    def set_option(self: socket.socket, level: int, option: int, value: Any) -> None:
        if option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO) and len(value) == 4:
            seconds, rest = divmod(struct.unpack("=L", value)[0], 1000)
            value = struct.pack("ll", seconds, rest * 1000)
        plain(self, level, option, value)

    return set_option


def _refuse_what_is_open() -> None:
    """Have files renamed or removed only while none of these processes has them open."""

    def check(path: Path) -> None:
        root = f"{Path(path).absolute()}"
        us = psutil.Process()
        for process in [us, *us.parents()[:1], *us.children(recursive=True)]:
            folder = f"/proc/{process.pid}/fd"
            for name in os.listdir(folder) if os.access(folder, os.R_OK) else ():
                try:
                    held = os.readlink(f"{folder}/{name}")  # noqa: PTH115
                except OSError:
                    continue
                if held == root or held.startswith(f"{root}/"):
                    raise PermissionError(errno.EACCES, "used by another process", root)

    def guarded(plain: Callable[..., Any]) -> Callable[..., Any]:
        def change(self: Path, *more: Any, **options: Any) -> Any:
            for path in (self, *more):
                check(path)
            return plain(self, *more, **options)

        return change

    for name in ("rename", "replace", "unlink"):
        setattr(Path, name, guarded(getattr(Path, name)))


def _hide_proc() -> None:
    def hiding(plain: Callable[..., Any]) -> Callable[..., Any]:
        def look(self: Path, *more: Any, **options: Any) -> Any:
            if str(self).startswith("/proc"):
                raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(self))
            return plain(self, *more, **options)

        return look

    for name in ("stat", "readlink"):
        setattr(Path, name, hiding(getattr(Path, name)))


if __name__ in ("__main__", "__mp_main__"):  # its workers too
    pretend(sys.argv[1])

import torch  # noqa: E402

from cold_trainings import FRAMES, embeddings, make_dataset, make_loader  # noqa: E402
from feature_cache import FeatureCache  # noqa: E402
from feature_cache.service import close_all, list_servers  # noqa: E402
from feature_cache.testing import FakeBackbone  # noqa: E402
from synthetic import make_movie  # noqa: E402


def import_all() -> None:
    """Import every module, those too that only extras use."""
    import feature_cache

    for module in walk_packages(feature_cache.__path__, "feature_cache."):
        if not module.name.endswith("__main__"):
            import_module(module.name)


def servers(folder: Path) -> list[str]:
    return [one.name for one in list_servers() if one.root == str(folder / "cache")]


def train(folder: Path, workers: int) -> float:
    """Train on a cold cache, with workers that inherit nothing; give the last loss."""
    dataset = make_dataset(folder / "cache", FakeBackbone(dim=4, log=folder / "log"))
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    for sample in make_loader(dataset, workers, "spawn"):
        loss = (model(sample["pretrained_feats"]) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert {*embeddings(folder / "log").values()} == {1}
    assert len(embeddings(folder / "log")) == FRAMES
    assert servers(folder)
    del dataset
    close_all()
    assert not servers(folder)
    return loss.item()


def store(folder: Path) -> None:
    """Compute in parts, and tidy up while a reader has them open."""
    images, masks, _ = make_movie(12)
    backbone, root = FakeBackbone(dim=4), folder / "parts"
    for start in range(0, 12, 3):
        part = slice(start, start + 3)
        FeatureCache(root).get_or_compute(images[part], masks[part], backbone)
    reader, packs = FeatureCache(root), lambda: len([*root.glob("spaces/*/packs/[0-9a-f]*")])
    read = reader.get(images, masks, backbone)
    assert packs() == 4
    FeatureCache(root).compact()
    for one, other in zip(reader.get(images, masks, backbone), read, strict=True):
        assert (one.features == other.features).all()
    del reader
    cache = FeatureCache(root)
    cache.compact()
    assert packs() == 1
    assert not cache.verify(deep=True)
    cache.gc(max_bytes=1, dry_run=False)
    assert packs() == 0


if __name__ == "__main__":
    everything = "all" in sys.argv
    if everything:
        import_all()
    here = Path(sys.argv[2])
    print(f"trained to {train(here, 2 if everything else 1):.3f}")
    store(here)
