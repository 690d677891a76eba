"""Packs are sent to a remote as they are committed."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from ..cache import FeatureCache
from ..engine import Failure
from ..errors import StoreError
from ..store import Space, remote
from ..store.files import tree_bytes

_log = logging.getLogger(__name__)


class Pushing:
    """Sends the packs of a cache to a remote: at once those that it lacks, then each new one.

    A pack that can't be sent stays in the cache, and is sent when `finish` is called, or by the
    next one of these. May be shared by threads. The remote is named as for `FeatureCache.push`.

    Raises
    ------
    StoreError
        The remote can't be written, or is no cache.
    UnknownNameError, MissingDependencyError
        There is no such kind of remote, or obstore is not installed.
    """

    def __init__(self, cache: FeatureCache, url: str) -> None:
        self.url, self._root = url, cache.store.root
        self._remote = remote.open_remote(url)
        self._behind = False
        remote.push(self._root, self._remote)

    def send(self, packs: Iterable[tuple[Space, Path]]) -> None:
        """Send packs just committed; where that fails, say so in the log and go on."""
        found = list(packs)
        places = (
            remote.PackPlace(space.name, pack.name, tree_bytes(pack)) for space, pack in found
        )
        spaces = {space.name: space.spec for space, _ in found}
        try:
            plan = remote.TransferPlan(spaces, tuple(places), 0)
            remote.push(self._root, self._remote, plan=plan)
        except StoreError as error:
            _log.warning("%d packs wait to be sent: %s", len(found), error)
            self._behind = True

    def finish(self, *, everything: bool = False) -> list[Failure]:
        """Send what could not be sent before, or `everything` that the remote lacks.

        Returns
        -------
        list of Failure
            What is in the cache, and not in the remote.
        """
        if not (self._behind or everything):
            return []
        # before the push: what another thread can't send meanwhile is for the next time
        self._behind = False
        try:
            sent = remote.push(self._root, self._remote)
        except StoreError as error:
            self._behind = True
            reason = f"what is computed is in the cache, and not all of it there: {error}"
            return [Failure(self.url, f"{reason}; run the same again, or feature-cache push", 0)]
        return [
            Failure(f"{pack.space}/{pack.name}", f"it is not sent: {pack.error}", 0)
            for pack in sent.failures
        ]
