"""Claims and commits: what is computed is written now and then, as whole packs."""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..hashing import JSON, Digest
from ..key import Record
from ..store import Entry, Space, Usage

if TYPE_CHECKING:
    from .cache import FeatureCache
    from .movie import MovieFeatures

COMMIT_BYTES = 64 << 20
COMMIT_SECONDS = 30.0

Pending: TypeAlias = dict[Digest, tuple[Space, Entry]]


class Commits:
    """Claims records of any space, collects those computed, and commits them.

    As a context, it commits what there is and gives up its claims at the end. Claims may be taken
    and given up by any thread.

    Attributes
    ----------
    pending : dict
        What is collected, by key.
    since : float
        When the first of them came, by `time.monotonic`.
    """

    def __init__(self, cache: FeatureCache) -> None:
        self.cache, self.pending = cache, Pending()
        self.bytes, self.since = 0, time.monotonic()
        self._claims = cache.store.claims
        self._claimed: set[Digest] = set()
        self._lock = threading.Lock()

    def __enter__(self) -> Commits:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def claim(self, keys: Sequence[Digest]) -> list[bool]:
        """Claim records to compute; tell for each whether it is this object's to do."""
        won = self._claims.take(key.hex() for key in keys)
        with self._lock:
            self._claimed.update(key for key, mine in zip(keys, won, strict=True) if mine)
        return won

    def release(self, keys: Iterable[Digest]) -> None:
        """Give up claims, of those that are this object's."""
        with self._lock:
            mine = self._claimed.intersection(keys)
            self._claimed -= mine
        self._claims.release(key.hex() for key in mine)

    def add(self, view: MovieFeatures, t: int, record: Record) -> bool:
        """Take a record of frame `t` just computed, to be committed when that is due.

        Returns
        -------
        bool
            Whether there is room for it.
        """
        self.collect(view.space, Entry(view.key(t), record, view.provenance(t)))
        return True

    def collect(self, space: Space, entry: Entry) -> None:
        """Take a record as `add` does; one that waits already is passed over."""
        if entry.key in self.pending:
            return
        if not self.pending:
            self.since = time.monotonic()
        self.pending[entry.key] = space, entry
        self.bytes += entry.record.features.nbytes
        self.cache.counter.add(Usage(computed=1))

    def due(self, seconds: float | None = None) -> bool:
        """Tell whether to commit: there are many bytes, or they wait for so long."""
        waited = time.monotonic() - self.since
        longest = COMMIT_SECONDS if seconds is None else seconds
        return bool(self.pending) and (self.bytes >= COMMIT_BYTES or waited >= longest)

    def flush(self) -> None:
        """Commit what was added. Errors as `Space.write`: it is then let go."""
        self._write(self._take())

    def _take(self) -> Pending:
        pending, self.pending, self.bytes = self.pending, Pending(), 0
        return pending

    def _write(self, pending: Pending) -> list[tuple[Space, Path]]:
        """Commit records, a space after the other; give the packs."""
        packs: list[tuple[Space, Path]] = []
        try:
            for space in dict.fromkeys(space for space, _ in pending.values()):
                entries = [entry for one, entry in pending.values() if one is space]
                names = space.write(entries, versions(), self.cache.codec)
                packs += [(space, space.packs_folder / name) for name in names]
                size = sum(entry.record.features.nbytes for entry in entries)
                self.cache.counter.add(Usage(bytes_written=size))
        finally:
            self.release(pending)
        return packs

    def close(self) -> None:
        """Commit what is collected, and give up all claims."""
        try:
            self.flush()
        finally:
            self.release(set(self._claimed))


def versions() -> dict[str, JSON]:
    """Say who writes: for people who ask where a record comes from."""
    from importlib.metadata import PackageNotFoundError, version

    def installed() -> Iterator[tuple[str, JSON]]:
        for package in ("feature-cache", "torch", "zarr", "numpy"):
            try:
                yield package, version(package)
            except PackageNotFoundError:
                continue

    return {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "host": platform.node(),
        "versions": dict(installed()),
    }
