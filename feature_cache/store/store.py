"""The cache directory: spaces of packs, readable by any Zarr reader.

::

    <root>/CACHEDIR.TAG  zarr.json                     format version
      spaces/<slug>-<digest8>/zarr.json                the space's full spec
      spaces/<slug>-<digest8>/packs/<pack>/            see `feature_cache.store.pack`
      quarantine/                                      packs whose bytes were wrong
      claims/  processes/                              who computes what; who uses the cache
      asked/                                           movies and copies that were asked for
      stats/                                           hits and misses, one file a process
      uses/                                            what each process read lately
      tables/                                          keys of many packs, to open them at once
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CacheVersionError, NotACacheError, ReadOnlyCacheError, StoreError
from ..hashing import canonical_json
from ..spec import SpaceSpec
from .claims import Claims
from .files import (
    TEMPORARY_PREFIX,
    check_there,
    group_text,
    list_folder,
    make_folders,
    parse_json,
    read_file,
    reading,
    write_text,
    writing,
)
from .process import Presence, join
from .space import Mode, Space
from .url import find_folder

FORMAT_VERSION = 4
"""Version 1 knew no digest of a pack's metadata, version 2 gave each chunk folders of its own,
version 3 each part of a pack's index an array and each grid a file. All are read, and taken over by
the first writer."""

_log = logging.getLogger(__name__)
TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder is a cache made by feature_cache; backup tools may leave it out.\n"
)
ROOT_TEXTS = tuple(
    group_text({"feature_cache": {"format_version": version}})
    for version in range(1, FORMAT_VERSION + 1)
)
ROOT_TEXT = ROOT_TEXTS[-1]
OWN_NAMES = {
    *("CACHEDIR.TAG", "asked", "claims", "pins", "processes", "quarantine", "retired", "spaces"),
    *("stats", "tables", "uses", "zarr.json"),
}


class Store:
    """A cache directory.

    Parameters
    ----------
    root : path
    mode : str
        ``"a"`` reads and writes, and makes the directory where there is none; ``"r"`` only reads.
    create : bool
        Whether it is made in mode ``"a"``.

    Attributes
    ----------
    root : Path
        Absolute.
    place : str
        The same, which opens it again.

    Raises
    ------
    NotACacheError
        The folder holds something else, or is not there and not to be made; or `root` is a URL.
    CacheVersionError
        A newer version of feature_cache wrote it.
    ReadOnlyCacheError
        Mode ``"a"``, and the folder can't be written.
    """

    def __init__(
        self, root: str | os.PathLike[str], mode: Mode = "a", *, create: bool = True
    ) -> None:
        if mode not in ("a", "r"):
            raise ValueError(f"mode {mode!r}: expected 'a' (read and write) or 'r' (read only)")
        if not isinstance(root, str | os.PathLike):
            raise TypeError(
                f"root is a {type(root).__name__}: expected a folder, such as 'features'"
            )
        self.root, self.mode = find_folder(root), mode
        self.place = str(self.root)
        with reading(self.root):
            ready = _check_root(self.root, mode, create=create and mode == "a")
        if ready:
            return
        with writing(self.root, is_new=True):
            make_folders(self.root)
            write_text(self.root / "CACHEDIR.TAG", TAG)
            # Last: with it the folder is a cache. Cut short before, whoever opens it next goes on.
            write_text(self.root / "zarr.json", ROOT_TEXT)

    @property
    def presence(self) -> Presence:
        """The process that runs, as others see it."""
        return join(self.root, create=self.mode == "a")

    @property
    def claims(self) -> Claims:
        """Who computes what."""
        return Claims(self.root)

    def space(self, spec: SpaceSpec) -> Space:
        """Give the space of a spec, present or not.

        Raises
        ------
        StoreError
            If the folder holds another spec, which chance or damage would explain.
        """
        plain = spec.to_json()
        path = self.root / "spaces" / spec.folder_name
        with reading(path):
            there = (path / "zarr.json").exists()
            if there and canonical_json(read_spec(path)) != canonical_json(plain):
                raise StoreError(
                    f"{path / 'zarr.json'} holds another spec than its name says: run "
                    "feature-cache verify --repair"
                )
        space = Space(path, plain, self.mode)
        if not there and self.mode == "a" and path.is_dir():
            space.create()  # it was set aside by verify, or its making was cut short
        return space

    def spaces(self) -> list[Space]:
        """List the spaces on disk, refreshed, by name; one that is damaged only in the log.

        Raises
        ------
        StoreError
            The cache was moved or removed while it was open, or can't be read.
        """
        spaces = []
        check_there(self.root)
        with reading(self.root / "spaces"):
            for name in list_folder(self.root / "spaces"):
                folder = self.root / "spaces" / name
                if not (folder / "zarr.json").is_file() or not folder.is_dir():
                    continue
                try:
                    spaces.append(Space(folder, read_spec(folder), self.mode))
                except StoreError as error:
                    _log.warning("%s; the space is left out: run feature-cache verify", error)
        for space in spaces:
            space.refresh()
        return spaces


def _check_root(root: Path, mode: Mode, *, create: bool) -> bool:
    """Tell whether `root` is a cache that can be used; False where one can be made."""
    if not root.exists() and create:
        return False
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise NotACacheError(f"{root} {found}; name the folder of a feature cache")
    if not (root / "zarr.json").exists():
        foreign = {n for n in os.listdir(root) if not n.startswith(TEMPORARY_PREFIX)} - OWN_NAMES
        if foreign or not create:
            held = f"it holds {min(foreign)!r}" if foreign else "it has no zarr.json"
            raise NotACacheError(f"{root} is not a feature cache ({held}); name another folder")
        return False
    version = read_version(root)
    if mode == "a":
        if not os.access(root, os.W_OK):
            raise ReadOnlyCacheError(f"no permission to write in {root}; open it with mode='r'")
        if version < FORMAT_VERSION:
            with writing(root):
                write_text(root / "zarr.json", ROOT_TEXT)
    return True


def read_version(root: Path) -> int:
    """Read a cache's format version.

    Raises
    ------
    NotACacheError, CacheVersionError
        There is none; it is newer than ours.
    StoreError
        The file is damaged.
    """
    return check_version(_read_attributes(root), root, "folder")


def check_version(own: Mapping[str, Any], where: object, what: str) -> int:
    """Give the format version that is among the attributes of a cache.

    NotACacheError where there is none, CacheVersionError where it is newer than ours.
    """
    version = own.get("format_version")
    if type(version) is not int:
        raise NotACacheError(f"{where} is a Zarr group, but no feature cache; name another {what}")
    if version > FORMAT_VERSION:
        raise CacheVersionError(
            f"{where} has format version {version}, this feature_cache reads up to "
            f"{FORMAT_VERSION}: upgrade feature-cache, or name another {what}"
        )
    return version


def read_spec(space: Path) -> dict[str, Any]:
    """Read the spec of a space's folder; StoreError where it is damaged."""
    spec = _read_attributes(space).get("space")
    if not isinstance(spec, dict):
        raise StoreError(f"{space / 'zarr.json'} is damaged: it holds no spec of a space")
    return spec


def _read_attributes(folder: Path) -> dict[str, Any]:
    file = folder / "zarr.json"
    try:
        return own_attributes(read_file(file, 1 << 20), file)
    except ValueError as error:
        raise StoreError(f"{file} is damaged: {error}") from error


def own_attributes(data: bytes, where: object) -> dict[str, Any]:
    """Read what is ours of a group's ``zarr.json``; StoreError where it is damaged."""
    try:
        own = parse_json(data, where)["attributes"].get("feature_cache")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{where} is damaged: no attributes in it") from error
    return own if isinstance(own, dict) else {}
