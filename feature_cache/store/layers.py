"""Layers: a space that is written, over the same space of caches that are only read."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NotACacheError, StoreError
from ..key import Keys, Record
from ..spec import SpaceSpec
from .files import TEMPORARY_PREFIX, make_folder, make_folders, writing
from .pack import check_pack
from .process import join
from .remote import Remote, RemoteSpace, open_remote
from .space import Space
from .store import Store
from .url import parse_url, url_folder
from .writer import install_pack

_log = logging.getLogger(__name__)


class FolderLayer:
    """A space of another cache folder.

    Parameters
    ----------
    space : Space
        In mode ``"r"``.
    promote : bool
        Whether a pack of which a record was read is copied into the writable cache.
    """

    def __init__(self, space: Space, *, promote: bool) -> None:
        self.space, self.promote = space, promote

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Tell which records it has."""
        return self.space.contains(keys)

    def find(self, keys: Keys, top: Space) -> list[Record | None]:
        """Read records, verified; None where there is none."""
        records = self.space.find(keys)
        if self.promote:
            found = keys[[record is not None for record in records]]
            for name in self.space.packs_of(found):
                promote_pack(self.space.packs_folder / name, top)
        return records


def open_layers(places: Iterable[str | os.PathLike[str]]) -> tuple[Store | Remote, ...]:
    """Open caches below, by path or URL, to be read.

    Raises
    ------
    StoreError
        One of them is no cache, or can't be opened.
    TypeError
        It is no list of places.
    """
    try:
        if isinstance(places, str | os.PathLike):
            raise TypeError
        named = [os.fspath(place) for place in places]
    except TypeError:
        raise TypeError(
            f"layers is {places!r}: expected a list of folders and URLs, such as ['shared']"
        ) from None
    return tuple(_open_layer(place) for place in named)


def _open_layer(place: str) -> Store | Remote:
    url = parse_url(place)
    if url is None or url_folder(url) is not None:
        return Store(place, "r")
    remote = open_remote(url)
    if remote.version() is None:
        raise NotACacheError(f"there is no feature cache at {url}; check the address")
    return remote


def layer_space(
    top: Space, spec: SpaceSpec, below: Sequence[Store | Remote], *, promote: bool
) -> Space:
    """Give a space with the same space of caches below under it."""
    layers: list[FolderLayer | RemoteSpace] = []
    for cache in below:
        try:
            if isinstance(cache, Store):
                layers.append(FolderLayer(cache.space(spec), promote=promote))
            else:
                layers.append(RemoteSpace(cache, spec.folder_name))
        except StoreError as error:
            _log.warning("the layer %s is left out: %s", cache.place, error)
    return LayeredSpace(top, layers) if layers else top


class LayeredSpace(Space):
    """A space whose records may also be in layers below it, the upper ones first.

    A layer that can't be read, or whose record is damaged, is a miss with a warning in the log; it
    never stops a read from what is below, or a write.
    """

    def __init__(self, top: Space, layers: Sequence[FolderLayer | RemoteSpace]) -> None:
        super().__init__(top.path, top.spec, top.mode)
        self.layers = tuple(layers)

    def __reduce__(self) -> tuple[Any, ...]:
        """Leave out what is open."""
        return type(self), (Space(self.path, self.spec, self.mode), self.layers)

    @property
    def folders(self) -> tuple[Space, ...]:
        """Give this space, and the same of folders below it."""
        below = (layer.space for layer in self.layers if isinstance(layer, FolderLayer))
        return (self, *below)

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Tell which keys have a record here or below: (m,) bool."""
        found = super().contains(keys)
        for layer in self.layers:
            absent = np.flatnonzero(~found)
            if not len(absent):
                break
            try:
                found[absent] = layer.contains(keys[absent])
            except StoreError as error:
                _log.warning("a layer is left out: %s", error)
        return found

    def find(self, keys: Keys) -> list[Record | None]:
        """Read records from here or below, verified; None where there is none."""
        records = super().find(keys)
        for layer in self.layers:
            absent = [i for i, record in enumerate(records) if record is None]
            if not absent:
                break
            try:
                below = layer.find(keys[absent], self)
            except StoreError as error:
                _log.warning("a layer is left out: %s", error)
                continue
            for i, record in zip(absent, below, strict=True):
                records[i] = record
        return records


def promote_pack(source: Path, top: Space) -> None:
    """Copy a pack of a lower cache into a writable one; where that fails, say so and go on."""
    target = top.packs_folder / source.name
    if target.is_dir() or top.mode == "r":
        return
    try:
        top.create()
        with writing(top.path):
            copy_pack(source, target, join(top.root).name)
        top.refresh()
    except StoreError as error:
        # Also where that cache has merged it away meanwhile: its records were read all the same.
        _log.warning("%s is not copied to %s: %s", source, top.path, error)


def copy_pack(source: Path, target: Path, writer: str) -> None:
    """Copy a pack as a whole, verified.

    Raises
    ------
    CorruptRecordError
        The copy is damaged; it is not committed.
    OSError
        It can't be written.
    """
    temporary = target.with_name(f"{TEMPORARY_PREFIX}{writer}-{secrets.token_hex(8)}")
    make_folder(temporary)
    try:
        for file in source.rglob("*"):
            if file.is_file() and not file.is_symlink():
                copy = temporary / file.relative_to(source)
                make_folders(copy.parent, temporary)
                shutil.copyfile(file, copy)
        check_pack(temporary, target.name)
        install_pack(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
