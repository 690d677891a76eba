"""One space of a remote, read through: packs come here when their records are wanted."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from ...errors import CorruptRecordError, StoreError
from ...forks import Lock
from ...key import Keys, Record
from ..index import Index
from ..process import join
from ..space import Space
from .connection import enter_process
from .remote import Remote
from .streams import PACKS_AT_ONCE, each

_KEYS_AT_ONCE = 32
_FEW_PACKS = 2
_log = logging.getLogger(__name__)


class RemoteSpace:
    """One space of a remote, of which packs are fetched when their records are wanted.

    May be shared by threads. The keys of its packs are remembered in memory. They are fetched once,
    and looked for again when a key is missing, at most every `refresh_seconds`. A remote that can't
    be read has nothing for as long: each try may take a minute.

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
        self._lock = Lock()

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
        enter_process(self.remote.url)  # obstore never answers in a forked child
        with self._lock, self._left_out_if_it_fails():
            self._refresh()

    @contextmanager
    def _left_out_if_it_fails(self) -> Iterator[None]:
        try:
            yield
        except StoreError:
            self._index, self._refreshed = Index(), time.monotonic()
            raise

    def _refresh(self) -> None:
        there = self.remote.version() is not None
        names = set(self.remote.pack_names(self.name)) if there else set()
        known = set(self._index.packs)
        new = names - known - self._damaged
        index = self._index.drop(known - names)
        if len(new) > _FEW_PACKS or not self.remote.is_listed:
            table = self.remote.table(self.name).choose(new).proved()
            index = index.extend(table.names, table.counts, table.keys)
            new -= set(table.names)
        found = self._read_keys(sorted(new))
        added = {name: keys for name, keys in found.items() if keys is not None}
        self._index = index.add(added)
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
        # Again, as another pack may hold what a damaged one did.
        while names := self._absent_packs(keys, packs_folder):
            results = each(partial(self._pull, packs_folder, writer), names, PACKS_AT_ONCE)
            failed = {name for name in results if name is not None}
            with self._lock:
                self._damaged |= failed
                self._index = self._index.drop(failed)
            fetched += len(names) - len(failed)
        return fetched

    def find(self, keys: Keys, top: Space) -> list[Record | None]:
        """Bring packs into a space here, verified, and read the records there; None for others."""
        top.create()
        with self._left_out_if_it_fails():
            self.fetch(keys, top.packs_folder, writer=join(top.root).name)
        # Of this folder alone: `top.find` would ask this layer again.
        return Space.find(top, keys)

    def _absent_packs(self, keys: Keys, packs_folder: Path) -> list[str]:
        names = self._index.packs_of(keys)
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

        return dict(each(read, names, _KEYS_AT_ONCE))
