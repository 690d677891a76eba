"""A cache in an object store: its spaces and packs, read, fetched and sent."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any

from ...errors import (
    CorruptRecordError,
    NotACacheError,
    StoreError,
    UnknownNameError,
    importing,
)
from ...key import Keys
from ..array import ArrayFile
from ..files import TEMPORARY_PREFIX, group_text, make_folders, writing
from ..pack import check_pack
from ..pack_contents import read_keys
from ..pack_table import NO_PACKS, PackTable, encode_table, parse_table, read_rows
from ..space import PACK_NAME
from ..store import FORMAT_VERSION, ROOT_TEXT, TAG, check_version, own_attributes
from ..url import HUB, READ_ONLY, SCHEMES, WRITABLE, find_folder, parse_url
from ..writer import install_pack
from .hugging_face import HubObjects
from .layout import (
    GROUP,
    check_same,
    is_safe,
    pack_files,
    pack_prefix,
    packs_prefix,
    parse_spec,
)
from .objects import Objects
from .streams import Progress, cut, each, make_files, tell

_KINDS = (*WRITABLE[:-1], "file:///absolute/path", f"{' or '.join(READ_ONLY)} (as a layer)")
_OBJECTS_AT_ONCE = 8
_OWN_NAMES = {"CACHEDIR.TAG", "spaces", "tables", "zarr.json"}
_log = logging.getLogger(__name__)


def open_remote(url: str, **options: Any) -> Remote:
    """Name a remote; nothing is asked of it yet.

    Parameters
    ----------
    url : str
        ``s3://bucket/prefix``, ``gs://…``, ``az://…``, ``hf://datasets/owner/name/folder``, or
        ``file:///folder``; ``https://…`` of what was pushed to any of them, only as a layer.
    **options
        For obstore's ``from_url``, or huggingface_hub's ``HfApi``; credentials and endpoints that
        are not given come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT_URL``,
        ``HF_TOKEN``, …).

    Returns
    -------
    Remote

    Raises
    ------
    UnknownNameError
        For another scheme.
    MissingDependencyError
        If obstore, or huggingface_hub, is not installed.
    StoreError
        For a folder that is not written as ``file://`` URL, or such a URL that names none of this
        host.
    TypeError
        For what is no text.
    """
    if not isinstance(url, str | os.PathLike):
        raise TypeError(f"url is a {type(url).__name__}: expected such as 's3://bucket/prefix'")
    url = os.fspath(url)
    if parse_url(url) is None and url and (url[0] in "/.~" or Path(url).is_dir()):
        raise StoreError(
            f"{url} is a folder in the place of a URL: write {find_folder(url).as_uri()}"
        )
    if not url.startswith(SCHEMES):
        raise UnknownNameError("kind of remote", url, _KINDS)
    package, extra = ("huggingface_hub", "hub") if url.startswith(HUB) else ("obstore", "remote")
    with importing(package, f"the remote {url}", f"pip install 'feature-cache[{extra}]'"):
        import_module(package)
    return Remote(url, options)


class Remote:
    """A cache in an object store; made by `open_remote`.

    Whatever can't be read or written there, or here, is a StoreError.

    Parameters
    ----------
    url : str
    options : mapping
        As for `open_remote`.

    Attributes
    ----------
    place : str
        The URL, which opens it again.
    folder : Path or None
        Where it is, if it is a folder (``file://``).
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self._objects = (HubObjects if url.startswith(HUB) else Objects)(url, options)
        self.url = self.place = self._objects.url
        self.options = self._objects.options
        self.folder = self._objects.folder

    def __repr__(self) -> str:
        """Leave out the options, which may hold secrets."""
        return f"Remote({self.url!r})"

    def __getstate__(self) -> tuple[str, dict[str, Any]]:
        """Leave out the client: another process opens its own."""
        return self.url, self.options

    def __setstate__(self, state: tuple[str, dict[str, Any]]) -> None:
        """Start without a client."""
        self.__init__(*state)  # type: ignore[misc]

    @property
    def is_listed(self) -> bool:
        """Whether it says what is in it; a plain web server does not."""
        return self._objects.is_listed

    def check_writable(self) -> None:
        """Raise StoreError where nothing can be sent: to a plain web server."""
        self._objects.check_listed("write to")

    def spaces(self) -> dict[str, dict[str, Any]]:
        """Give the specs of all spaces, as JSON, by name; StoreError for one that is none."""
        names = [path.rpartition("/")[2] for path in self._objects.list_level("spaces")[0]]
        for name in names:
            if not is_safe(name):
                raise StoreError(
                    f"{self.url}/spaces holds {name!r}, which is no name of a space: remove it"
                )
        texts = {name: self._objects.get(f"spaces/{name}/{GROUP}") for name in sorted(names)}
        return {
            name: parse_spec(text, f"{self.url}/spaces/{name}", name)
            for name, text in texts.items()
            if text is not None
        }

    def pack_names(self, space: str) -> list[str]:
        """List the complete packs of a space, sorted."""
        return sorted(self.pack_sizes(space))

    def pack_sizes(self, space: str) -> dict[str, int]:
        """Give the bytes of each complete pack of a space, by name."""
        if not self._objects.is_listed:
            table = self.table(space).proved()
            return dict(zip(table.names, table.sizes.tolist(), strict=True))
        packs: dict[str, dict[str, int]] = {}
        for path, size in self._objects.list_all(f"{packs_prefix(space)}/"):
            pack, _, name = path.partition("/")
            if PACK_NAME.fullmatch(pack):
                packs.setdefault(pack, {})[name] = size
        return {pack: sum(all_.values()) for pack, all_ in packs.items() if GROUP in all_}

    def table(self, space: str) -> PackTable:
        """Fetch names, keys and sizes of the packs of a space as of the last push."""
        try:
            data = self._objects.get(f"tables/{packs_prefix(space).split('/')[1]}")
            return NO_PACKS if data is None else parse_table(data)
        except ValueError as error:
            _log.info("the table of %s in %s is not used: %s", space, self.url, error)
            return NO_PACKS

    def renew_table(self, space: str, packs_folder: Path) -> None:
        """Write the table of a space anew, where it lacks packs that are here and there."""
        there, old = set(self.pack_names(space)), self.table(space)
        kept = old.choose(there).proved()
        rows = read_rows(packs_folder / name for name in sorted(there - set(kept.names)))
        if rows or len(kept.names) < len(old.names):
            self._objects.put(f"tables/{space}", encode_table(kept.extended(rows)))

    def read_keys(self, space: str, pack: str) -> Keys:
        """Fetch the keys of a pack, (n, 16) uint8; CorruptRecordError where they are damaged."""
        prefix = pack_prefix(space, pack)
        with tempfile.TemporaryDirectory(prefix="feature_cache-") as folder:
            try:
                self._bring_chunk(prefix, Path(folder))
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
        """
        prefix = pack_prefix(space, pack)
        objects = self._pack_objects(prefix)
        temporary = packs_folder / f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}"
        with writing(packs_folder):
            try:
                make_files(temporary, objects)
                pieces = [piece for item in objects.items() for piece in cut(*item)]
                each(partial(self._fetch, prefix, temporary, progress), pieces, _OBJECTS_AT_ONCE)
                self._check_fetched(temporary, pack, prefix)
                install_pack(temporary, packs_folder / pack)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return sum(objects.values())

    def push_pack(self, space: str, pack: Path, *, progress: Progress | None = None) -> int | None:
        """Verify a pack and send it; it appears there with its last object.

        Parameters
        ----------
        space : str
            Its space, which `create` made there.
        pack : Path
        progress : callable, optional

        Returns
        -------
        int or None
            Bytes sent; None where the pack is there already.

        Raises
        ------
        CorruptRecordError
            If the pack is damaged; nothing is sent.
        FileNotFoundError
            If the pack is gone.
        """
        prefix = pack_prefix(space, pack.name)
        check_pack(pack, pack.name)
        files = {**pack_files(pack), GROUP: pack / GROUP}  # which has no files where it is gone now
        sizes = {name: file.stat().st_size for name, file in files.items()}
        group = files.pop(GROUP)
        if self._objects.size(f"{prefix}/{GROUP}") is not None:
            # Another push came first: its arrays stay, which may have another codec.
            return None
        sent = {f"{prefix}/{name}": file for name, file in files.items()}
        self._objects.put_files(sent, progress)
        self._check_sent(prefix, {name: sizes[name] for name in files})
        self._objects.put_new(f"{prefix}/{GROUP}", group.read_bytes())
        tell(progress, sizes[GROUP])
        return sum(sizes.values())

    def version(self) -> int | None:
        """Give the format version of the cache there; None where nothing is.

        Raises
        ------
        NotACacheError
            If there is something else.
        CacheVersionError
            If a newer version of feature_cache wrote it.
        """
        if self.folder is not None and not self.folder.exists():
            return None
        text = self._objects.get(GROUP)
        if text is not None:
            return check_version(own_attributes(text, f"{self.url}/{GROUP}"), self.url, "place")
        if not self._objects.is_listed:
            return None
        folders, objects = self._objects.list_level("")
        if foreign := {*folders, *objects} - _OWN_NAMES:
            raise NotACacheError(
                f"{self.url} is not a feature cache (it holds {min(foreign)!r}); name another place"
            )
        return None

    def create(self, spaces: Mapping[str, Mapping[str, Any]]) -> None:
        """Make the cache and spaces, by name and spec, where they are missing.

        StoreError where a space there has another spec.
        """
        self.check_writable()
        version = self.version()
        if self.folder is not None:
            with writing(self.folder, is_new=version is None):
                for space in ("", *map(packs_prefix, spaces)):
                    make_folders(self.folder / space)
        if version is None:
            self._objects.put_new("CACHEDIR.TAG", TAG.encode())
            self._objects.put_new(GROUP, ROOT_TEXT.encode())
        elif version < FORMAT_VERSION:
            self._objects.put(GROUP, ROOT_TEXT.encode())
        for name in check_same(self.spaces(), spaces, self.url):
            for folder in ("spaces", packs_prefix(name)):
                self._objects.put_new(f"{folder}/{GROUP}", group_text({}).encode())
            text = group_text({"feature_cache": {"space": dict(spaces[name])}})
            self._objects.put_new(f"spaces/{name}/{GROUP}", text.encode())

    def _pack_objects(self, prefix: str) -> dict[str, int]:
        """Give the sizes of a complete pack's objects by name, each name a safe relative path."""
        if not self._objects.is_listed:
            return self._named_objects(prefix)
        objects = dict(self._objects.list_all(f"{prefix}/"))
        if GROUP not in objects:
            raise self._lacking(f"{prefix}/{GROUP}")
        folders = {str(folder) for name in objects for folder in PurePosixPath(name).parents}
        for name in objects:
            # In an object store one name may be an object's and a folder's: here it can't be both.
            if name in folders or not all(map(is_safe, name.split("/"))):
                raise CorruptRecordError(
                    f"{self.url}/{prefix} holds an object {name!r}, which no pack has"
                )
        return objects

    def _named_objects(self, prefix: str) -> dict[str, int]:
        """Give the sizes of the objects of which the metadata of a pack speak."""
        names = [GROUP]
        with tempfile.TemporaryDirectory(prefix="feature_cache-") as folder:
            for array in ("features", "index"):
                if not self._bring(prefix, Path(folder), f"{array}/{GROUP}"):
                    raise self._lacking(f"{prefix}/{array}/{GROUP}")
                found = ArrayFile.read(Path(folder, array))
                files = [found.chunk_file(*index) for index in found.file_indices()]
                names += [f"{array}/{GROUP}", *(str(file.relative_to(folder)) for file in files)]
        sizes: dict[str, int] = {}
        for name in names:
            # At the first that is missing: metadata that lie may name a million.
            if (size := self._objects.size(f"{prefix}/{name}")) is None:
                raise self._lacking(f"{prefix}/{name}")
            sizes[name] = size
        return sizes

    def _bring_chunk(self, prefix: str, folder: Path) -> None:
        """Fetch the array that the keys are in: ``keys``, in packs of version 1 to 3."""
        for name in ("index", "keys"):
            if self._bring(prefix, folder, f"{name}/{GROUP}"):
                array = ArrayFile.read(folder / name)
                chunk = str(array.chunk_file(*(0 for _ in array.shape)).relative_to(folder))
                if not self._bring(prefix, folder, chunk):
                    raise self._lacking(f"{prefix}/{chunk}")
                return
        raise self._lacking(f"{prefix}/index/{GROUP}")

    def _bring(self, prefix: str, folder: Path, name: str) -> bool:
        """Fetch a small object into a folder; tell whether it is there."""
        data = self._objects.get(f"{prefix}/{name}")
        if data is not None:
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
        return data is not None

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
        there = dict(self._objects.list_all(f"{prefix}/"))
        for name, size in sizes.items():
            if there.get(name) != size:
                raise StoreError(
                    f"{self.url}/{prefix}/{name} has {there.get(name, 'no')} bytes, {size} were "
                    "sent: another process sends the same pack with another codec; push again"
                )
        # Before `zarr.json` is put: after a crash it would name a pack of empty files.
        self._objects.settle(f"{prefix}/{name}" for name in sizes)

    def _fetch(
        self, prefix: str, folder: Path, progress: Progress | None, piece: tuple[str, int, int]
    ) -> None:
        name, start, length = piece
        data = self._objects.get_piece(f"{prefix}/{name}", start, length)
        if data is None:
            raise self._lacking(f"{prefix}/{name}")
        with open(folder / name, "r+b") as file:
            file.seek(start)
            file.write(data)
        tell(progress, len(data))
