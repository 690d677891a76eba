"""Where each key's record is: the keys of all packs of a space, merged in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..key import Keys


@dataclass(frozen=True, slots=True, eq=False)
class Index:
    """An immutable table from keys to (pack, row), sorted by key.

    Adding or dropping packs gives a new index, so a reader that holds one is never disturbed.
    """

    packs: tuple[str, ...] = ()
    _high: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    _low: NDArray[np.uint64] = field(default_factory=lambda: np.empty(0, np.uint64))
    _pack: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    _row: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def __len__(self) -> int:
        """Count the different keys."""
        same = (self._high[1:] == self._high[:-1]) & (self._low[1:] == self._low[:-1])
        return len(self._high) - int(np.count_nonzero(same))

    def add(self, packs: Mapping[str, Keys]) -> Index:
        """Give the index with more packs, by name."""
        if not packs:
            return self
        numbers = range(len(self.packs), len(self.packs) + len(packs))
        halves = [np.ascontiguousarray(keys).view(">u8").reshape(-1, 2) for keys in packs.values()]
        parts = list(zip(numbers, halves, strict=True))
        high = np.concatenate([self._high, *(h[:, 0] for _, h in parts)]).astype(np.uint64)
        low = np.concatenate([self._low, *(h[:, 1] for _, h in parts)]).astype(np.uint64)
        pack = np.concatenate([self._pack, *(np.full(len(h), n, np.int32) for n, h in parts)])
        row = np.concatenate([self._row, *(np.arange(len(h), dtype=np.int32) for _, h in parts)])
        return Index((*self.packs, *packs), *_sorted(high, low, pack, row))

    def drop(self, names: set[str]) -> Index:
        """Give the index without the packs named."""
        if names.isdisjoint(self.packs):
            return self
        kept = [i for i, name in enumerate(self.packs) if name not in names]
        renumbered = np.full(len(self.packs), -1, np.int32)
        renumbered[kept] = np.arange(len(kept), dtype=np.int32)
        pack = renumbered[self._pack]
        rows = pack >= 0
        columns = self._high[rows], self._low[rows], pack[rows], self._row[rows]
        return Index(tuple(self.packs[i] for i in kept), *columns)

    def find(self, keys: Keys) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Locate many keys at once.

        Parameters
        ----------
        keys : (m, 16) uint8

        Returns
        -------
        pack, row : (m,) int32 each
            Numbers in `packs` and rows there; -1 where there is no such key.
        """
        wanted = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
        high, low = wanted[:, 0], wanted[:, 1]
        pack, row = np.full(len(wanted), -1, np.int32), np.full(len(wanted), -1, np.int32)
        if not len(self._high):
            return pack, row
        place = np.searchsorted(self._high, high)
        at = np.minimum(place, len(self._high) - 1)
        while (going := (place < len(self._high)) & (self._high[at] == high) & (pack < 0)).any():
            hit = going & (self._low[at] == low)
            pack[hit], row[hit] = self._pack[at[hit]], self._row[at[hit]]
            place = place + 1
            at = np.minimum(place, len(self._high) - 1)
        return pack, row


def _sorted(
    high: NDArray[np.uint64],
    low: NDArray[np.uint64],
    pack: NDArray[np.int32],
    row: NDArray[np.int32],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32]]:
    order = np.argsort(high, kind="stable")
    if (high[order][1:] == high[order][:-1]).any():
        order = np.lexsort((low, high))
    return high[order], low[order], pack[order], row[order]
