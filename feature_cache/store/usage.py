"""Hits, misses and computed records: counted by each process, kept in the cache."""

from __future__ import annotations

import logging
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import StoreError

if TYPE_CHECKING:
    from .store import Store

_log = logging.getLogger(__name__)
_SAVE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Usage:
    """How a cache was used, in records."""

    hits: int = 0
    misses: int = 0
    computed: int = 0

    def __add__(self, other: Usage) -> Usage:
        """Sum up field by field."""
        return Usage(
            self.hits + other.hits, self.misses + other.misses, self.computed + other.computed
        )

    def to_json(self) -> dict[str, int]:
        """Give the counters by name."""
        return {"hits": self.hits, "misses": self.misses, "computed": self.computed}


class Counter:
    """Counts one process's hits, misses and computed records, and keeps them in the store.

    Kept every few seconds while counting, when asked, and when the cache object or the process
    ends; never in a read-only store. A forked child counts its own.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._restart()

    def _restart(self) -> None:
        self._process, self._total = os.getpid(), Usage()
        self._name = f"{self._process}-{secrets.token_hex(8)}"
        self._saved_at, self._saved = time.monotonic(), Usage()

    @property
    def total(self) -> Usage:
        """What this process counted so far."""
        if self._process != os.getpid():
            self._restart()
        return self._total

    def add(self, usage: Usage) -> None:
        """Count more."""
        self._total = self.total + usage
        if time.monotonic() - self._saved_at > _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Keep the counters in the store; where that fails, say so in the log and go on."""
        total, self._saved_at = self.total, time.monotonic()
        if self._store.mode == "r" or total == self._saved or not self._store.root.exists():
            return
        try:
            self._store.save_usage(self._name, total)
            self._saved = total
        except StoreError as error:
            _log.warning("hits and misses are not kept: %s", error)
