"""What a newcomer, or someone who helps one, wants to know of an installation and a cache."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .errors import FeatureCacheError
from .hashing import JSON

_PACKAGES = ("feature-cache", "torch", "zarr", "numpy", "trackastra", "obstore")


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the report.

    Attributes
    ----------
    section, name, value : str
    source : str
        Where a setting comes from; empty for what is none.
    is_well : bool
        Whether it is as it should be.
    """

    section: str
    name: str
    value: str
    source: str = ""
    is_well: bool = True

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return {
            "section": self.section,
            "name": self.name,
            "value": self.value,
            "source": self.source,
            "well": self.is_well,
        }


def examine(cache: Path | None, cache_source: str) -> list[Fact]:
    """Look at versions, devices, settings and a cache's folder. Changes nothing.

    Parameters
    ----------
    cache : Path or None
        The cache's folder, if one was named.
    cache_source : str
        Where its name comes from.
    """
    return [*_versions(), *_devices(), *_settings(cache, cache_source), *_folder(cache)]


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "python", platform.python_version())
    for package in _PACKAGES:
        try:
            yield Fact("versions", package, version(package))
        except PackageNotFoundError:
            yield Fact("versions", package, "not installed")


def _devices() -> Iterator[Fact]:
    import torch

    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        memory = f"{properties.total_memory / 1e9:.0f} GB"
        yield Fact("device", f"cuda:{number}", f"{properties.name}, {memory}")
    if torch.backends.mps.is_available():
        yield Fact("device", "mps", "Apple GPU")
    yield Fact("device", "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")


def _settings(cache: Path | None, cache_source: str) -> Iterator[Fact]:
    from .memo import memo_folder

    yield Fact("setting", "cache", str(cache) if cache else "none named", cache_source)
    layers = os.environ.get("FEATURE_CACHE_LAYERS")
    where = "FEATURE_CACHE_LAYERS" if layers else "default"
    yield Fact("setting", "layers", layers or "none", where)
    chosen = os.environ.get("FEATURE_CACHE_MEMO")
    folder = memo_folder()
    memo = "off" if folder is None else str(folder)
    yield Fact("setting", "memo", memo, "FEATURE_CACHE_MEMO" if chosen else "default")


def _folder(cache: Path | None) -> Iterator[Fact]:
    from .store import Store
    from .store.filesystem import find_file_system
    from .store.process import living

    if cache is None:
        yield Fact("cache", "folder", "name one: --cache, or FEATURE_CACHE_DIR", is_well=False)
        return
    there = next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())
    system = find_file_system(there)
    kind = "a network file system" if system.is_network else "local"
    yield Fact("cache", "file system", f"{system.type} on {system.mount}, {kind}")
    usage = shutil.disk_usage(there)
    free = f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB"
    yield Fact("cache", "free", free, is_well=usage.free > usage.total / 100)
    if not cache.exists():
        yield Fact("cache", "folder", "not there yet: the first warm makes it")
        return
    try:
        store = Store(cache, "r")
    except FeatureCacheError as error:
        yield Fact("cache", "folder", str(error), is_well=False)
        return
    may_write = os.access(cache, os.W_OK)
    yield Fact("cache", "permission", "read and write" if may_write else "read only")
    yield Fact("cache", "spaces", str(len(store.spaces())))
    processes = len(living(cache, store.presence.now()))
    yield Fact("cache", "processes", f"{processes} use it now")
