"""The cache directory: spaces of packs, readable by any Zarr reader.

::

    <root>/CACHEDIR.TAG  zarr.json                     format version
      spaces/<slug>-<digest8>/zarr.json                the space's full spec
      spaces/<slug>-<digest8>/packs/<pack>/            see `feature_cache.store.pack`
      quarantine/                                      packs whose bytes were wrong
      stats/                                           hits and misses, one file a process
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import (
    CacheVersionError,
    CorruptRecordError,
    NotACacheError,
    ReadOnlyCacheError,
    StoreError,
)
from ..hashing import JSON, canonical_json
from ..key import Keys, Record
from ..spec import SpaceSpec
from .index import Index
from .pack import TEMPORARY_PREFIX, Entry, Pack, read_keys, sync_folder, write_pack
from .usage import Usage

FORMAT_VERSION = 1
Mode = Literal["a", "r"]

_log = logging.getLogger(__name__)
_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This folder is a cache made by feature_cache; backup tools may leave it out.\n"
)
_OWN_NAMES = {"CACHEDIR.TAG", "zarr.json", "spaces", "quarantine", "stats"}
_PACK_NAME = re.compile(r"[0-9a-f]{32}")
_OPEN_PACKS = 256


class Space:
    """The records of one spec.

    Parameters
    ----------
    path : Path
        The space's folder; it need not exist before the first `write`.
    spec : mapping
        The space's full spec as JSON.
    mode : str
        ``"a"`` or ``"r"``.
    """

    def __init__(self, path: Path, spec: Mapping[str, Any], mode: Mode) -> None:
        self.path, self.spec, self.mode = path, spec, mode
        self._index = Index()
        self._packs: dict[str, Pack] = {}

    @property
    def packs_folder(self) -> Path:
        """Where the packs are."""
        return self.path / "packs"

    def __len__(self) -> int:
        """Count the records known since the last refresh."""
        return len(self._index)

    def __getstate__(self) -> tuple[Path, Mapping[str, Any], Mode]:
        """Leave out index and mapped packs: another process opens its own."""
        return self.path, self.spec, self.mode

    def __setstate__(self, state: tuple[Path, Mapping[str, Any], Mode]) -> None:
        """Start with nothing open."""
        self.__init__(*state)  # type: ignore[misc]

    def refresh(self) -> None:
        """Take in packs committed, and let go of packs removed, since the last time."""
        with _reading(self.path):
            names = set(self.pack_names())
            known = set(self._index.packs)
            added: dict[str, Keys] = {}
            for name in sorted(names - known):
                try:
                    added[name] = read_keys(self.packs_folder / name)
                except FileNotFoundError:
                    continue
                except CorruptRecordError as error:
                    self._condemn(name, error)
            self._index = self._index.drop(known - names).add(added)

    def pack_names(self) -> list[str]:
        """List the committed packs, sorted."""
        try:
            names = os.listdir(self.packs_folder)
        except FileNotFoundError:
            return []
        return sorted(filter(_PACK_NAME.fullmatch, names))

    def contains(self, keys: Keys) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Tell which keys have a committed record: (m,) bool. Reads no record."""
        found = self._index.find(keys)[0] >= 0
        if not found.all():
            self.refresh()
            found = self._index.find(keys)[0] >= 0
        return found

    def read(self, keys: Keys) -> list[Record | None]:
        """Read records, verified; None where there is none.

        A pack with a wrong record is set aside (mode ``"a"``: moved to ``quarantine/``), with a
        warning in the log, and its records are missing from then on.

        Parameters
        ----------
        keys : (m, 16) uint8

        Raises
        ------
        CorruptRecordError
            In mode ``"r"``, where a wrong record can't be set aside.
        StoreError
            If the system can't read the files.
        """
        records: list[Record | None] = [None] * len(keys)
        with _reading(self.path):
            self._read_into(records, keys, np.arange(len(keys)))
            absent = np.flatnonzero([record is None for record in records])
            if len(absent):
                self.refresh()
                self._read_into(records, keys, absent)
        return records

    def _read_into(
        self, records: list[Record | None], keys: Keys, places: np.ndarray[Any, Any]
    ) -> None:
        index = self._index
        packs, rows = index.find(keys[places])
        for place, pack, row in zip(places.tolist(), packs.tolist(), rows.tolist(), strict=True):
            if pack >= 0:
                records[place] = self._read_row(index.packs[pack], row)

    def _read_row(self, name: str, row: int) -> Record | None:
        if name in self._packs:
            with suppress(FileNotFoundError, CorruptRecordError):
                return self._packs[name].record(row)
            # Another process may have set this pack aside since, and written it anew.
        try:
            return self._open(name).record(row)
        except FileNotFoundError:
            self._forget(name)
        except CorruptRecordError as error:
            self._condemn(name, error)
        return None

    def _open(self, name: str) -> Pack:
        self._packs.pop(name, None)
        pack = Pack(self.packs_folder / name)
        while len(self._packs) >= _OPEN_PACKS:
            self._packs.pop(next(iter(self._packs)), None)
        self._packs[name] = pack
        return pack

    def _forget(self, name: str) -> None:
        self._packs.pop(name, None)
        self._index = self._index.drop({name})

    def _condemn(self, name: str, error: CorruptRecordError) -> None:
        if self.mode == "r":
            raise error
        self._forget(name)
        quarantine = self.path.parent.parent / "quarantine"
        target = quarantine / f"{self.path.name}-{name}-{secrets.token_hex(4)}"
        _log.warning("%s; the pack goes to %s, its records count as missing", error, target)
        with _writing(quarantine):
            quarantine.mkdir(exist_ok=True)
            try:
                (self.packs_folder / name).rename(target)
            except FileNotFoundError:
                _log.debug("%s was already set aside by another process", name)

    def write(
        self, entries: Sequence[Entry], provenance: Mapping[str, JSON], codec: str = "raw"
    ) -> None:
        """Commit records: when this returns, they survive a crash; before, none is there.

        Parameters
        ----------
        entries : sequence of Entry
            Any number, keys unique. Grids of different shapes go to different packs.
        provenance : mapping
            What is common to these records.
        codec : str
            One of `feature_cache.store.pack.CODECS`.

        Raises
        ------
        ReadOnlyCacheError
            In mode ``"r"``, or where the folder can't be written.
        StoreError
            When the disk is full; nothing is left behind.
        """
        if self.mode == "r":
            raise ReadOnlyCacheError(f"{self.path} was opened with mode 'r' and can't be written")
        with _writing(self.path):
            self._create()
            for group in _by_shape(entries):
                write_pack(self.packs_folder, group, provenance, codec)
        self.refresh()

    def _create(self) -> None:
        if (self.path / "zarr.json").exists():
            return
        self.packs_folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.path.parent, self.packs_folder):
            _write_group_json(folder, {})
        for folder in (self.path.parent.parent, self.path.parent):
            sync_folder(folder)
        _write_group_json(self.path, {"feature_cache": {"space": dict(self.spec)}})

    def disk_bytes(self) -> int:
        """Sum up the sizes of all files of the packs."""
        total = 0
        for name in self.pack_names():
            for folder, _, files in os.walk(self.packs_folder / name):
                for file in files:
                    with suppress(FileNotFoundError):
                        total += os.stat(os.path.join(folder, file)).st_size
        return total


def _by_shape(entries: Sequence[Entry]) -> Iterator[list[Entry]]:
    groups: dict[tuple[int, ...], list[Entry]] = {}
    for entry in entries:
        grid = entry.record.labels is None
        shape = entry.record.features.shape if grid else entry.record.features.shape[1:]
        groups.setdefault(shape, []).append(entry)
    yield from groups.values()


class Store:
    """A cache directory.

    Parameters
    ----------
    root : path
    mode : str
        ``"a"`` reads and writes, and makes the directory where there is none; ``"r"`` only reads.

    Raises
    ------
    NotACacheError
        The folder holds something else, or (mode ``"r"``) is not there.
    CacheVersionError
        A newer version of feature_cache wrote it.
    ReadOnlyCacheError
        Mode ``"a"``, and the folder can't be written.
    """

    def __init__(self, root: str | os.PathLike[str], mode: Mode = "a") -> None:
        if mode not in ("a", "r"):
            raise ValueError(f"mode {mode!r}: expected 'a' (read and write) or 'r' (read only)")
        self.root, self.mode = Path(root).expanduser().absolute(), mode
        with _reading(self.root):
            ready = _check_root(self.root, mode)
        if ready:
            return
        with _writing(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            _write_text(self.root / "CACHEDIR.TAG", _TAG)
            _write_group_json(self.root, {"feature_cache": {"format_version": FORMAT_VERSION}})

    def space(self, spec: SpaceSpec) -> Space:
        """Give the space of a spec, present or not.

        Raises
        ------
        StoreError
            If the folder holds another spec, which chance or damage would explain.
        """
        plain = spec.to_json()
        path = self.root / "spaces" / f"{spec.slug}-{spec.digest.hex()[:8]}"
        with _reading(path):
            there = (path / "zarr.json").exists()
            if there and canonical_json(_read_spec(path)) != canonical_json(plain):
                raise StoreError(f"{path / 'zarr.json'} holds another spec than its name says")
        return Space(path, plain, self.mode)

    def spaces(self) -> list[Space]:
        """List the spaces on disk, refreshed, by name."""
        with _reading(self.root / "spaces"):
            folders = [self.root / "spaces" / name for name in _list_folder(self.root / "spaces")]
            there = [folder for folder in folders if (folder / "zarr.json").exists()]
            spaces = [Space(folder, _read_spec(folder), self.mode) for folder in there]
        for space in spaces:
            space.refresh()
        return spaces

    def save_usage(self, name: str, usage: Usage) -> None:
        """Keep a process's counters under a name of its own, replacing what it kept before."""
        with _writing(self.root):
            folder = self.root / "stats"
            folder.mkdir(exist_ok=True)
            _write_text(folder / f"{name}.json", canonical_json(usage.to_json()))

    def total_usage(self) -> Usage:
        """Sum up what all processes kept."""
        total = Usage()
        with _reading(self.root / "stats"):
            names = [n for n in _list_folder(self.root / "stats") if n.endswith(".json")]
        for file in (self.root / "stats" / name for name in names):
            try:
                total += Usage(**json.loads(file.read_bytes()))
            except (ValueError, TypeError) as error:
                _log.warning("leaving out the counters in %s, which are damaged: %s", file, error)
        return total


def _list_folder(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except FileNotFoundError:
        return []


def _check_root(root: Path, mode: Mode) -> bool:
    """Tell whether `root` is a cache that can be used; False where one can be made."""
    if not root.exists() and mode == "a":
        return False
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise NotACacheError(f"{root} {found}; name the folder of a feature cache")
    if not (root / "zarr.json").exists():
        foreign = {n for n in os.listdir(root) if not n.startswith(TEMPORARY_PREFIX)} - _OWN_NAMES
        if foreign or mode == "r":
            held = f"it holds {min(foreign)!r}" if foreign else "it has no zarr.json"
            raise NotACacheError(f"{root} is not a feature cache ({held}); name another folder")
        return False
    _check_version(root)
    if mode == "a" and not os.access(root, os.W_OK):
        raise ReadOnlyCacheError(f"no permission to write in {root}; open it with mode='r'")
    return True


def _check_version(root: Path) -> None:
    version = _read_attributes(root).get("format_version")
    if type(version) is not int:
        raise NotACacheError(f"{root} is a Zarr group, but no feature cache; name another folder")
    if version > FORMAT_VERSION:
        raise CacheVersionError(
            f"{root} has format version {version}, this feature_cache reads up to "
            f"{FORMAT_VERSION}: upgrade feature-cache, or name another folder"
        )


def _read_spec(space: Path) -> dict[str, Any]:
    spec = _read_attributes(space).get("space")
    if not isinstance(spec, dict):
        raise StoreError(f"{space / 'zarr.json'} is damaged: it holds no spec of a space")
    return spec


def _read_attributes(folder: Path) -> dict[str, Any]:
    try:
        own = json.loads((folder / "zarr.json").read_bytes())["attributes"].get("feature_cache")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{folder / 'zarr.json'} is damaged: no attributes in it") from error
    return own if isinstance(own, dict) else {}


def _write_group_json(folder: Path, attributes: Mapping[str, JSON]) -> None:
    if not (folder / "zarr.json").exists():
        group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
        _write_text(folder / "zarr.json", json.dumps(group, indent=2))


def _write_text(file: Path, text: str) -> None:
    temporary = file.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        with open(temporary, "w", encoding="utf-8") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(file.parent)


@contextmanager
def _reading(place: Path) -> Iterator[None]:
    """Turn what the system says of a failed read into an error of ours."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"can't read {error.filename or place}: {error.strerror or error}"
        ) from error


@contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Turn what the system says of a failed write into an error of ours."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ReadOnlyCacheError(
                f"no permission to write in {place} ({error.strerror}); "
                "name a folder you can write, or open the cache with mode='r'"
            ) from error
        raise StoreError(
            f"can't write in {place}: {error.strerror or error}; free some space or name another "
            "folder. What was committed before is untouched"
        ) from error
