"""Remotes: whole packs in an object store, in the layout that they have on disk.

::

    <url>/CACHEDIR.TAG  zarr.json                     format version
      spaces/<space>/zarr.json                        the space's full spec
      spaces/<space>/packs/<pack>/                    see `feature_cache.store.pack`

An object store has no rename: a pack is there when its group's ``zarr.json`` is, which is sent
after all its other objects. Equal names mean equal records, so only missing packs are moved, and
what was moved before a run was killed is not moved again. Nothing is believed that comes from a
remote: names are checked before they become paths, and every record of a pack before it is
committed.

Whatever runs obstore can't be used in a process forked after that: it would wait forever. So a
remote is pickled without its client, and says so in such a process.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import unquote, urlsplit

import numpy as np

from ..errors import (
    CacheVersionError,
    CorruptRecordError,
    MissingDependencyError,
    NotACacheError,
    StoreError,
    UnknownNameError,
)
from ..hashing import canonical_json, digest_json
from ..key import Keys
from .files import (
    TEMPORARY_PREFIX,
    group_text,
    list_folder,
    make_folder,
    reading,
    share_tree,
    share_with_group,
    sync_folder,
    sync_tree,
    tree_bytes,
    writing,
)
from .index import Index
from .pack import Pack, check_metadata, install_pack, read_keys
from .process import join
from .space import Mode, Space
from .store import FORMAT_VERSION, ROOT_TEXT, TAG, Store

if TYPE_CHECKING:
    from obstore.store import ObjectStore

SCHEMES = ("s3://", "gs://", "az://", "file://")
PIECE_BYTES = 8 << 20
"""What is asked for, or sent, in one request."""

_SMALL_BYTES = 1 << 28
_PACKS_AT_ONCE = 4
_OBJECTS_AT_ONCE = 8
_KEYS_AT_ONCE = 32
_VARIABLES = {"s3": "AWS_", "gs": "GOOGLE_", "az": "AZURE_"}
_CLIENT_KEYS = (
    "allow_http",
    "allow_invalid_certificates",
    "connect_timeout",
    "http1_only",
    "http2_only",
    "pool_idle_timeout",
    "pool_max_idle_per_host",
    "proxy_ca_certificate",
    "proxy_excludes",
    "proxy_url",
    "read_timeout",
    "timeout",
    "user_agent",
)
_CLIENT_OPTIONS = {"connect_timeout": "5s", "timeout": "60s"}
_RETRIES = {"max_retries": 5, "retry_timeout": timedelta(seconds=60)}
_OWN_NAMES = {"CACHEDIR.TAG", "spaces", "zarr.json"}
_PACK_NAME = re.compile(r"[0-9a-f]{32}")
_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")
_GROUP = "zarr.json"
_KEY_OBJECTS = ("keys/zarr.json", "keys/c/0/0")
_log = logging.getLogger(__name__)
_first_process: int | None = None

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], object]
"""Is told of each number of bytes just moved."""


def check_pack(folder: Path, name: str) -> None:
    """Verify a whole pack: metadata, name, and the checksum of every record.

    Parameters
    ----------
    folder : Path
        The pack, perhaps under a temporary name.
    name : str
        The name it should have.

    Raises
    ------
    CorruptRecordError
        If a bit is not as it was written.
    FileNotFoundError
        If the pack is gone.
    """
    check_metadata(folder)
    pack = Pack(folder, name)
    for row in range(len(pack)):
        pack.record(row)


def open_remote(url: str, **options: Any) -> Remote:
    """Name a remote; nothing is asked of it yet.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``, ``gs://…``, ``az://…``, or ``file:///folder``.
    **options
        For obstore's ``from_url``; credentials and endpoints that are not given come from the
        environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``, ``AWS_ALLOW_HTTP``, …).

    Returns
    -------
    Remote

    Raises
    ------
    UnknownNameError
        For another scheme.
    MissingDependencyError
        If obstore is not installed.
    StoreError
        For a ``file://`` URL that names no folder of this host.
    """
    if not url.startswith(SCHEMES):
        raise UnknownNameError("kind of remote", url, SCHEMES)
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        install = "pip install 'feature-cache[remote]'"
        raise MissingDependencyError("obstore", f"the remote {url}", install) from error
    return Remote(url, options)


class Remote:
    """A cache in an object store; made by `open_remote`.

    Parameters
    ----------
    url : str
    options : mapping
        As for `open_remote`.

    Attributes
    ----------
    folder : Path or None
        Where it is, if it is a folder (``file://``).
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url, self.options = url.rstrip("/"), dict(options)
        self.folder = _url_folder(url)
        self._client: ObjectStore | None = None

    def __repr__(self) -> str:
        """Leave out the options, which may hold secrets."""
        return f"Remote({self.url!r})"

    def __getstate__(self) -> tuple[str, dict[str, Any]]:
        """Leave out the client: another process opens its own."""
        return self.url, self.options

    def __setstate__(self, state: tuple[str, dict[str, Any]]) -> None:
        """Start without a client."""
        self.__init__(*state)  # type: ignore[misc]

    def spaces(self) -> dict[str, dict[str, Any]]:
        """Give the specs of all spaces, as JSON, by name.

        Raises
        ------
        StoreError
            For a name that is none of a space, a spec that is not the one its name says, or a
            remote that can't be read.
        """
        names = [path.rpartition("/")[2] for path in self._list_level("spaces")[0]]
        for name in names:
            if not _is_safe(name):
                raise StoreError(
                    f"{self.url}/spaces holds {name!r}, which is no name of a space: remove it"
                )
        texts = {name: self._get(f"spaces/{name}/{_GROUP}") for name in sorted(names)}
        return {
            name: _parse_spec(text, f"{self.url}/spaces/{name}", name)
            for name, text in texts.items()
            if text is not None
        }

    def pack_names(self, space: str) -> list[str]:
        """List the complete packs of a space, sorted.

        Raises
        ------
        StoreError
            If the remote can't be read.
        """
        return sorted(self.pack_sizes(space))

    def pack_sizes(self, space: str) -> dict[str, int]:
        """Give the bytes of each complete pack of a space, by name.

        Raises
        ------
        StoreError
            If the remote can't be read.
        """
        packs: dict[str, dict[str, int]] = {}
        for path, size in self._list(f"{_packs_prefix(space)}/"):
            pack, _, name = path.partition("/")
            if _PACK_NAME.fullmatch(pack):
                packs.setdefault(pack, {})[name] = size
        return {pack: sum(all_.values()) for pack, all_ in packs.items() if _GROUP in all_}

    def read_keys(self, space: str, pack: str) -> Keys:
        """Fetch the keys of a pack, checked by their CRC: (n, 16) uint8.

        Raises
        ------
        CorruptRecordError
            If they are not there, or not what was written.
        StoreError
            If the remote can't be read.
        """
        prefix = _pack_prefix(space, pack)
        with tempfile.TemporaryDirectory(prefix="feature_cache-") as folder:
            for name in _KEY_OBJECTS:
                data = self._get(f"{prefix}/{name}")
                if data is None:
                    raise self._lacking(f"{prefix}/{name}")
                file = Path(folder, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
            try:
                return read_keys(Path(folder))
            except CorruptRecordError as error:
                raise CorruptRecordError(f"damaged keys in {self.url}/{prefix}: {error}") from error

    def pull_pack(
        self,
        space: str,
        pack: str,
        packs_folder: Path,
        *,
        progress: Progress | None = None,
        writer: str = "",
    ) -> int:
        """Fetch a pack into a folder, where it appears when all of it was verified.

        Parameters
        ----------
        space, pack : str
        packs_folder : Path
            The space's ``packs`` folder here; it must exist.
        progress : callable, optional
        writer : str
            This process, in the temporary name; see `feature_cache.store.process`.

        Returns
        -------
        int
            Bytes fetched.

        Raises
        ------
        CorruptRecordError
            If the pack is not complete there, or not what was written; it is not committed.
        StoreError
            If the remote can't be read, or the folder not written.
        """
        prefix = _pack_prefix(space, pack)
        objects = self._pack_objects(prefix)
        temporary = packs_folder / f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}"
        with writing(packs_folder):
            try:
                _make_files(temporary, objects)
                pieces = [piece for item in objects.items() for piece in _pieces(*item)]
                _each(partial(self._fetch, prefix, temporary, progress), pieces, _OBJECTS_AT_ONCE)
                self._check_fetched(temporary, pack, prefix)
                install_pack(temporary, packs_folder / pack)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return sum(objects.values())

    def push_pack(self, space: str, pack: Path, *, progress: Progress | None = None) -> int:
        """Verify a pack and send it; it appears there with its last object.

        Parameters
        ----------
        space : str
            Its space, which `create` made there.
        pack : Path
        progress : callable, optional

        Returns
        -------
        int
            Bytes sent.

        Raises
        ------
        CorruptRecordError
            If the pack is damaged; nothing is sent.
        FileNotFoundError
            If the pack is gone.
        StoreError
            If the remote can't be written.
        """
        prefix = _pack_prefix(space, pack.name)
        check_pack(pack, pack.name)
        files = _pack_files(pack)
        sizes = {name: file.stat().st_size for name, file in files.items()}
        group = files.pop(_GROUP)
        _each(partial(self._send, prefix, progress), files.items(), _OBJECTS_AT_ONCE)
        self._check_sent(prefix, {name: sizes[name] for name in files})
        self._put_new(f"{prefix}/{_GROUP}", group.read_bytes())
        _tell(progress, sizes[_GROUP])
        return sum(sizes.values())

    def version(self) -> int | None:
        """Give the format version of the cache there; None where nothing is.

        Raises
        ------
        NotACacheError
            If there is something else.
        CacheVersionError
            If a newer version of feature_cache wrote it.
        StoreError
            If the remote can't be read.
        """
        if self.folder is not None and not self.folder.exists():
            return None
        text = self._get(_GROUP)
        if text is not None:
            return self._parse_version(text)
        folders, objects = self._list_level("")
        if foreign := {*folders, *objects} - _OWN_NAMES:
            raise NotACacheError(
                f"{self.url} is not a feature cache (it holds {min(foreign)!r}); name another place"
            )
        return None

    def create(self, spaces: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the cache and spaces there, where they are missing.

        Parameters
        ----------
        spaces : mapping of str to JSON
            Names and specs.

        Raises
        ------
        StoreError
            If a space there has another spec, or the remote can't be written.
        """
        version = self.version()
        if self.folder is not None:
            with writing(self.folder):
                for space in ("", *map(_packs_prefix, spaces)):
                    make_folder(self.folder / space)
        if version is None:
            self._put_new("CACHEDIR.TAG", TAG.encode())
            self._put_new(_GROUP, ROOT_TEXT.encode())
        elif version < FORMAT_VERSION:
            self._put(_GROUP, ROOT_TEXT.encode())
        for name in _check_same(self.spaces(), spaces, self.url):
            for folder in ("spaces", _packs_prefix(name)):
                self._put_new(f"{folder}/{_GROUP}", group_text({}).encode())
            text = group_text({"feature_cache": {"space": dict(spaces[name])}})
            self._put_new(f"spaces/{name}/{_GROUP}", text.encode())

    def _open(self) -> ObjectStore:
        if self._client is None or _first_process != os.getpid():
            _enter_process(self.url)
            with self._talking("open"):
                self._client = _connect(self.url, self.options)
        return self._client

    def _parse_version(self, text: bytes) -> int:
        version = _own_attributes(text, f"{self.url}/{_GROUP}").get("format_version")
        if type(version) is not int:
            raise NotACacheError(
                f"{self.url} is a Zarr group, but no feature cache; name another place"
            )
        if version > FORMAT_VERSION:
            raise CacheVersionError(
                f"{self.url} has format version {version}, this feature_cache reads up to "
                f"{FORMAT_VERSION}: upgrade feature-cache, or name another place"
            )
        return version

    def _pack_objects(self, prefix: str) -> dict[str, int]:
        """Give the sizes of a complete pack's objects by name, each name a safe relative path."""
        objects = dict(self._list(f"{prefix}/"))
        if _GROUP not in objects:
            raise self._lacking(f"{prefix}/{_GROUP}")
        folders = {name.rpartition("/")[0] for name in objects}
        for name in objects:
            if name in folders or not all(map(_is_safe, name.split("/"))):
                raise CorruptRecordError(
                    f"{self.url}/{prefix} holds an object {name!r}, which no pack has"
                )
        return objects

    def _lacking(self, name: str) -> CorruptRecordError:
        return CorruptRecordError(f"{self.url}/{name} is missing from a pack")

    def _check_fetched(self, folder: Path, pack: str, prefix: str) -> None:
        try:
            check_pack(folder, pack)
        except CorruptRecordError as error:
            raise CorruptRecordError(
                f"damaged, not taken: {self.url}/{prefix} ({error}); remove it there, and push it "
                "again from where it is whole"
            ) from error

    def _check_sent(self, prefix: str, sizes: Mapping[str, int]) -> None:
        there = dict(self._list(f"{prefix}/"))
        for name, size in sizes.items():
            if there.get(name) != size:
                raise StoreError(
                    f"{self.url}/{prefix}/{name} has {there.get(name, 'no')} bytes, {size} were "
                    "sent: another process sends the same pack with another codec; push again"
                )
        self._settle(prefix)

    def _settle(self, name: str) -> None:
        """Make what was put durable, and open to its group, where the remote is a folder."""
        if self.folder is None:
            return
        path = self.folder / name
        with writing(path):
            share_with_group(path)
            if path.is_dir():
                share_tree(path)
                sync_tree(path)
            else:
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
            sync_folder(path.parent)

    def _send(self, prefix: str, progress: Progress | None, item: tuple[str, Path]) -> None:
        import obstore

        name, file = item
        path = f"{prefix}/{name}"
        small = file.stat().st_size <= PIECE_BYTES
        data = file.read_bytes() if small else _read_pieces(file, progress)
        with self._talking("write", path):
            obstore.put(self._open(), path, data, chunk_size=PIECE_BYTES, max_concurrency=2)
        if isinstance(data, bytes):
            _tell(progress, len(data))

    def _put_new(self, name: str, data: bytes) -> None:
        """Put an object where there is none; one that is there has the same meaning, and stays."""
        from obstore.exceptions import AlreadyExistsError, NotSupportedError

        try:
            self._put(name, data, mode="create")
        except StoreError as error:
            if isinstance(error.__cause__, NotSupportedError):
                self._put(name, data)
            elif not isinstance(error.__cause__, AlreadyExistsError):
                raise

    def _put(
        self, name: str, data: bytes, mode: Literal["create", "overwrite"] = "overwrite"
    ) -> None:
        import obstore

        with self._talking("write", name):
            obstore.put(self._open(), name, data, mode=mode)
        self._settle(name)

    def _fetch(
        self, prefix: str, folder: Path, progress: Progress | None, piece: tuple[str, int, int]
    ) -> None:
        import obstore

        name, start, length = piece
        path = f"{prefix}/{name}"
        with self._talking("read", path):
            try:
                data = obstore.get_range(self._open(), path, start=start, length=length)
            except FileNotFoundError as error:
                raise self._lacking(path) from error
        with open(folder / name, "r+b") as file:
            file.seek(start)
            file.write(data)
        _tell(progress, len(data))

    def _get(self, name: str) -> bytes | None:
        """Read a small object; None where there is none."""
        import obstore

        with self._talking("read", name):
            try:
                found = obstore.get(self._open(), name)
            except FileNotFoundError:
                return None
            if found.meta["size"] > _SMALL_BYTES:
                raise ValueError(f"it has {found.meta['size']} bytes, expected {_SMALL_BYTES}")
            return found.bytes().to_bytes()

    def _list(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the names of all objects below a prefix, relative to it, and their sizes."""
        import obstore

        with self._talking("list", prefix):
            for part in obstore.list(self._open(), prefix, chunk_size=1000):
                for meta in part:
                    if meta["path"].startswith(prefix):
                        yield meta["path"].removeprefix(prefix), meta["size"]

    def _list_level(self, prefix: str) -> tuple[list[str], list[str]]:
        """Give the paths of folders and of objects right below a prefix."""
        import obstore

        with self._talking("list", prefix):
            found = obstore.list_with_delimiter(self._open(), prefix or None)
        return list(found["common_prefixes"]), [meta["path"] for meta in found["objects"]]

    @contextmanager
    def _talking(self, doing: str, name: str = "") -> Iterator[None]:
        """Turn what obstore says into an error of ours."""
        from obstore.exceptions import BaseError

        try:
            yield
        except StoreError:
            raise
        except (BaseError, OSError, ValueError, TypeError) as error:
            place = f"{self.url}/{name}".rstrip("/")
            raise StoreError(
                f"can't {doing} {place}: {_reason(error)}; check the address, the credentials and "
                "the network, and run it again: what was moved stays"
            ) from error


def _url_folder(url: str) -> Path | None:
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    if parts.netloc or not parts.path.strip("/"):
        raise StoreError(f"{url} names no folder of this host: expected file:///path/of/folder")
    return Path(unquote(parts.path))


def _connect(url: str, options: Mapping[str, Any]) -> ObjectStore:
    from obstore.store import from_url

    asked = dict(options)
    if not url.startswith("file:"):
        given = {key: asked.pop(key) for key in _CLIENT_KEYS if key in asked}
        given = {**_environment(url), **asked.get("client_options", {}), **given}
        asked["client_options"] = {**_CLIENT_OPTIONS, **given}
        asked["retry_config"] = {**_RETRIES, **asked.get("retry_config", {})}
    return from_url(url, **asked)


def _environment(url: str) -> dict[str, str]:
    """Read the client's options from the environment, which obstore does only if none are given."""
    prefix = _VARIABLES[url.partition(":")[0]]
    names = {key: f"{prefix}{key.upper()}" for key in _CLIENT_KEYS}
    return {key: os.environ[name] for key, name in names.items() if name in os.environ}


def _enter_process(url: str) -> None:
    """Refuse a process that was forked from one where obstore ran: a call would never return."""
    global _first_process
    if _first_process not in (None, os.getpid()):
        raise StoreError(
            f"can't open {url} in process {os.getpid()}: it was forked from one that had opened a "
            "remote; start processes with 'spawn', or pull first"
        )
    _first_process = os.getpid()


def _reason(error: Exception) -> str:
    """Give what obstore says in one line, without answers in full and without signed queries."""
    text = str(error).split("\n\nDebug source")[0]
    said = re.search(r"<Message>(.*?)</Message>", text, re.DOTALL)
    head = re.sub(r"\?\S*", "", text.split("<")[0]).strip(" :\n")
    return " ".join(f"{head}: {said[1]}".split() if said else head.split())


def _is_safe(name: str) -> bool:
    """Tell whether a name from outside may become a part of a path."""
    return _PART.fullmatch(name) is not None and ".." not in name


def _packs_prefix(space: str) -> str:
    if not _is_safe(space):
        raise StoreError(
            f"{space!r} is no name of a space: expected letters, digits, '.', '_', '-'"
        )
    return f"spaces/{space}/packs"


def _pack_prefix(space: str, pack: str) -> str:
    if not _PACK_NAME.fullmatch(pack):
        raise StoreError(f"{pack!r} is no name of a pack: expected 32 hex digits")
    return f"{_packs_prefix(space)}/{pack}"


def _pack_files(pack: Path) -> dict[str, Path]:
    """Give a pack's files by name; what a system leaves there (``.nfs…``) is none of them."""
    files = {str(file.relative_to(pack)): file for file in pack.rglob("*") if file.is_file()}
    return {name: files[name] for name in sorted(files) if all(map(_is_safe, name.split("/")))}


def _own_attributes(text: bytes, where: str) -> dict[str, Any]:
    try:
        own = json.loads(text)["attributes"].get("feature_cache")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"{where} is damaged: no attributes in it") from error
    return own if isinstance(own, dict) else {}


def _parse_spec(text: bytes, where: str, name: str) -> dict[str, Any]:
    spec = _own_attributes(text, f"{where}/{_GROUP}").get("space")
    try:
        digest = digest_json(spec).hex()[:8]
    except TypeError:
        digest = ""
    if not isinstance(spec, dict) or not name.endswith(f"-{digest}"):
        raise StoreError(f"{where}/{_GROUP} is damaged: it holds another spec than its name says")
    return spec


def _make_files(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "wb") as opened:
            opened.truncate(size)


def _pieces(name: str, size: int) -> Iterator[tuple[str, int, int]]:
    for start in range(0, size, PIECE_BYTES):
        yield name, start, min(PIECE_BYTES, size - start)


def _read_pieces(file: Path, progress: Progress | None) -> Iterator[bytes]:
    with open(file, "rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            yield piece
            _tell(progress, len(piece))


def _tell(progress: Progress | None, count: int) -> None:
    if progress is not None:
        progress(count)


def _each(act: Callable[[T], R], items: Iterable[T], at_once: int) -> list[R]:
    """Do something with many items at once; the first error cancels those not begun."""
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(act, item) for item in items]
        try:
            return [future.result() for future in as_completed(futures)]
        finally:
            for future in futures:
                future.cancel()


@dataclass(frozen=True, slots=True)
class PackPlace:
    """A pack that one side has.

    Attributes
    ----------
    space, name : str
    bytes : int
        Of all its files.
    """

    space: str
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What a `push` or `pull` is to move.

    Attributes
    ----------
    spaces : mapping of str to JSON
        Names and specs.
    packs : tuple of PackPlace
        Those that the other side lacks.
    present : int
        Packs that it has.
    """

    spaces: Mapping[str, Mapping[str, Any]]
    packs: tuple[PackPlace, ...]
    present: int

    @property
    def bytes(self) -> int:
        """Sum up what is to be moved."""
        return sum(place.bytes for place in self.packs)


@dataclass(frozen=True, slots=True)
class TransferFailure:
    """A pack that was not moved as it is damaged."""

    space: str
    name: str
    error: CorruptRecordError


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a `push` or `pull` did.

    Attributes
    ----------
    packs, bytes : int
        Moved by this call.
    present : int
        Packs that the other side had.
    failures : tuple of TransferFailure
        Damaged packs, by space and name; they were not moved.
    """

    packs: int
    bytes: int
    present: int
    failures: tuple[TransferFailure, ...] = ()


def find_missing(
    here: Mapping[str, Collection[str]], there: Mapping[str, Collection[str]]
) -> dict[str, list[str]]:
    """Name the packs of each space that are here and not there, sorted.

    Examples
    --------
    >>> find_missing({"a": ["1", "2"], "b": ["3"]}, {"a": ["1"]})
    {'a': ['2'], 'b': ['3']}
    """
    return {space: sorted(set(packs) - set(there.get(space, ()))) for space, packs in here.items()}


def plan_push(root: Path, remote: Remote, *, spaces: Sequence[str] | None = None) -> TransferPlan:
    """Plan what `push` is to send; nothing is changed.

    Parameters
    ----------
    root : Path
        A cache.
    remote : Remote
    spaces : sequence of str, optional
        Names; all by default.

    Returns
    -------
    TransferPlan

    Raises
    ------
    UnknownNameError
        For a space that is not in the cache.
    StoreError
        If one of the sides is no cache, or can't be read.
    """
    with reading(root):
        chosen = _choose(_local_spaces(root), spaces)
        here = {name: _local(root, name, spec).pack_names() for name, spec in chosen.items()}
        there = (
            {name: remote.pack_names(name) for name in chosen}
            if remote.version() is not None
            else {}
        )
        missing = find_missing(here, there)
        places = [
            PackPlace(space, name, tree_bytes(root / _pack_prefix(space, name)))
            for space, names in missing.items()
            for name in names
        ]
    return TransferPlan(chosen, tuple(places), sum(map(len, here.values())) - len(places))


def push(
    root: Path,
    remote: Remote,
    *,
    spaces: Sequence[str] | None = None,
    plan: TransferPlan | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Send the packs that a remote lacks, each of them verified.

    A pack appears there with its last object. Killed or cut off, another call goes on with what is
    missing; when all is there, nothing is sent.

    Parameters
    ----------
    root : Path
        A cache.
    remote : Remote
    spaces : sequence of str, optional
        Names; all by default.
    plan : TransferPlan, optional
        By `plan_push`, which this calls itself otherwise.
    progress : callable, optional
        Is told of each number of bytes just sent, by one thread at a time.

    Returns
    -------
    TransferReport
        Damaged packs are not sent and stand under ``failures``.

    Raises
    ------
    UnknownNameError
        For a space that is not in the cache.
    StoreError
        If one of the sides is no cache or a newer one, or can't be read or written.
    """
    plan = plan or plan_push(root, remote, spaces=spaces)
    remote.create(plan.spaces)

    def send(place: PackPlace, told: Progress) -> int | None:
        folder = root / _pack_prefix(place.space, place.name)
        with reading(folder):
            try:
                return remote.push_pack(place.space, folder, progress=told)
            except FileNotFoundError:
                _log.info("%s is gone since the push was planned", folder)
                return None

    return _transfer(plan, send, progress)


def plan_pull(root: Path, remote: Remote, *, spaces: Sequence[str] | None = None) -> TransferPlan:
    """Plan what `pull` is to fetch; nothing is changed.

    Parameters
    ----------
    root : Path
        A cache, or none yet.
    remote : Remote
    spaces : sequence of str, optional
        Names; all by default.

    Returns
    -------
    TransferPlan

    Raises
    ------
    UnknownNameError
        For a space that is not in the remote.
    StoreError
        If the remote is no cache or a newer one, or can't be read.
    """
    if remote.version() is None:
        raise NotACacheError(f"there is no feature cache at {remote.url}; check the address")
    chosen = _choose(remote.spaces(), spaces)
    sizes = {space: remote.pack_sizes(space) for space in chosen}
    with reading(root):
        local = [_local(root, name, spec) for name, spec in chosen.items()]
        here = {space.name: {*space.pack_names(), *space.retired_names()} for space in local}
        missing = find_missing(sizes, here)
    places = [
        PackPlace(space, name, sizes[space][name])
        for space, names in missing.items()
        for name in names
    ]
    return TransferPlan(chosen, tuple(places), sum(map(len, sizes.values())) - len(places))


def pull(
    root: Path,
    remote: Remote,
    *,
    spaces: Sequence[str] | None = None,
    plan: TransferPlan | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Fetch the packs that a cache lacks; each is verified as a whole before it is committed.

    Killed or cut off, another call goes on with what is missing; when all is here, nothing is
    fetched.

    Parameters
    ----------
    root : Path
        A cache, made where there is none.
    remote : Remote
    spaces : sequence of str, optional
        Names; all by default.
    plan : TransferPlan, optional
        By `plan_pull`, which this calls itself otherwise.
    progress : callable, optional
        Is told of each number of bytes just fetched, by one thread at a time.

    Returns
    -------
    TransferReport
        Packs that are damaged there are not committed and stand under ``failures``.

    Raises
    ------
    UnknownNameError
        For a space that is not in the remote.
    StoreError
        If one of the sides is no cache or a newer one, or can't be read or written.
    """
    plan = plan or plan_pull(root, remote, spaces=spaces)
    Store(root)
    for space in _check_same(_local_spaces(root), plan.spaces, str(root)):
        _local(root, space, plan.spaces[space], "a").create()
    writer = join(root).name

    def fetch(place: PackPlace, told: Progress) -> int:
        packs_folder = root / _packs_prefix(place.space)
        return remote.pull_pack(place.space, place.name, packs_folder, progress=told, writer=writer)

    return _transfer(plan, fetch, progress)


def _transfer(
    plan: TransferPlan,
    move: Callable[[PackPlace, Progress], int | None],
    progress: Progress | None,
) -> TransferReport:
    lock = threading.Lock()

    def told(count: int) -> None:
        with lock:
            _tell(progress, count)

    def attempt(place: PackPlace) -> int | TransferFailure | None:
        try:
            return move(place, told)
        except CorruptRecordError as error:
            return TransferFailure(place.space, place.name, error)

    results = _each(attempt, plan.packs, _PACKS_AT_ONCE)
    moved = [result for result in results if isinstance(result, int)]
    failures = [result for result in results if isinstance(result, TransferFailure)]
    failures.sort(key=lambda failure: (failure.space, failure.name))
    return TransferReport(len(moved), sum(moved), plan.present, tuple(failures))


def _choose(
    known: Mapping[str, Mapping[str, Any]], names: Sequence[str] | None
) -> dict[str, Mapping[str, Any]]:
    for name in names or ():
        if name not in known:
            raise UnknownNameError("space", name, known)
    return {name: known[name] for name in (known if names is None else names)}


def _check_same(
    there: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]], where: str
) -> list[str]:
    """Name the spaces that are missing; those that are there must have the same specs."""
    for name in wanted.keys() & there.keys():
        if canonical_json(there[name]) != canonical_json(wanted[name]):
            raise StoreError(f"the space {name} in {where} has another spec than the one to come")
    return sorted(wanted.keys() - there.keys())


def _local_spaces(root: Path) -> dict[str, dict[str, Any]]:
    Store(root, "r")
    spaces = {}
    with reading(root / "spaces"):
        for name in list_folder(root / "spaces"):
            file = root / "spaces" / name / _GROUP
            if file.exists():
                spaces[name] = _parse_spec(file.read_bytes(), str(file.parent), name)
    return spaces


def _local(root: Path, name: str, spec: Mapping[str, Any], mode: Mode = "r") -> Space:
    return Space(root / "spaces" / name, spec, mode)


class RemoteSpace:
    """One space of a remote, of which packs are fetched when their records are wanted.

    May be shared by threads. The keys of its packs are remembered in memory. They are fetched once,
    and looked for again when a key is missing, at most every `refresh_seconds`.

    Parameters
    ----------
    remote : Remote
    name : str
        The space's; it need not be there.
    refresh_seconds : float
    """

    def __init__(self, remote: Remote, name: str, *, refresh_seconds: float = 30.0) -> None:
        self.remote, self.name, self.refresh_seconds = remote, name, refresh_seconds
        self._index, self._refreshed = Index(), -float("inf")
        self._damaged: frozenset[str] = frozenset()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Count the records known since the last refresh."""
        return len(self._index)

    def __getstate__(self) -> tuple[Remote, str, float]:
        """Leave out the index: another process fetches its own."""
        return self.remote, self.name, self.refresh_seconds

    def __setstate__(self, state: tuple[Remote, str, float]) -> None:
        """Start with no keys."""
        remote, name, seconds = state
        self.__init__(remote, name, refresh_seconds=seconds)  # type: ignore[misc]

    def contains(self, keys: Keys) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Tell which keys have a record in the remote: (m,) bool.

        Raises
        ------
        StoreError
            If the remote is no cache or a newer one, or can't be read.
        """
        found = self._index.find(keys)[0] >= 0
        if not found.all() and time.monotonic() - self._refreshed >= self.refresh_seconds:
            self.refresh()
            found = self._index.find(keys)[0] >= 0
        return found

    def refresh(self) -> None:
        """Take in packs that came, and let go of packs that went, since the last time.

        Raises
        ------
        StoreError
            If the remote is no cache or a newer one, or can't be read.
        """
        _enter_process(self.remote.url)  # in a fork, the lock may be held for ever
        with self._lock:
            self._refresh()

    def _refresh(self) -> None:
        there = self.remote.version() is not None
        names = set(self.remote.pack_names(self.name)) if there else set()
        known = set(self._index.packs)
        found = self._read_keys(sorted(names - known - self._damaged))
        added = {name: keys for name, keys in found.items() if keys is not None}
        self._index = self._index.drop(known - names).add(added)
        self._damaged = (self._damaged & names) | (found.keys() - added.keys())
        self._refreshed = time.monotonic()

    def fetch(self, keys: Keys, packs_folder: Path, *, writer: str = "") -> int:
        """Pull the packs that hold some keys, verified.

        A pack that is damaged there is logged and its records count as missing, unless another
        pack has them.

        Parameters
        ----------
        keys : (m, 16) uint8
        packs_folder : Path
            The space's ``packs`` folder here; it must exist.
        writer : str
            As for `Remote.pull_pack`.

        Returns
        -------
        int
            Packs that were fetched.

        Raises
        ------
        StoreError
            If the remote can't be read, or the folder not written.
        """
        self.contains(keys)
        fetched = 0
        while names := self._absent_packs(keys, packs_folder):
            results = _each(partial(self._pull, packs_folder, writer), names, _PACKS_AT_ONCE)
            failed = {name for name in results if name is not None}
            with self._lock:
                self._damaged |= failed
                self._index = self._index.drop(failed)
            fetched += len(names) - len(failed)
        return fetched

    def _absent_packs(self, keys: Keys, packs_folder: Path) -> list[str]:
        index = self._index
        numbers = np.unique(index.find(keys)[0])
        names = [index.packs[number] for number in numbers.tolist() if number >= 0]
        return [name for name in names if not (packs_folder / name).is_dir()]

    def _pull(self, packs_folder: Path, writer: str, name: str) -> str | None:
        """Fetch one pack; give its name if it is damaged."""
        try:
            self.remote.pull_pack(self.name, name, packs_folder, writer=writer)
        except CorruptRecordError as error:
            _log.warning("%s; its records count as missing", error)
            return name
        return None

    def _read_keys(self, names: Sequence[str]) -> dict[str, Keys | None]:
        def read(name: str) -> tuple[str, Keys | None]:
            try:
                return name, self.remote.read_keys(self.name, name)
            except CorruptRecordError as error:
                _log.warning("%s; its records count as missing", error)
                return name, None

        return dict(_each(read, names, _KEYS_AT_ONCE))
