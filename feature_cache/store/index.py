"""Where each key's record is: the keys of all packs of a space, merged in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..forks import cached_property
from ..hashing import DIGEST_BYTES
from ..key import Keys

_NO_KEYS: Keys = np.empty((0, DIGEST_BYTES), np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """Some keys, as two halves, sorted, and where each of them is."""

    high: NDArray[np.uint64]
    low: NDArray[np.uint64]
    pack: NDArray[np.int32]
    row: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.high)

    @classmethod
    def merge(cls, runs: Iterable[_Run]) -> _Run:
        """Give one run with the keys of several."""
        high, low, pack, row = (
            np.concatenate(columns)
            for columns in zip(*((r.high, r.low, r.pack, r.row) for r in runs), strict=True)
        )
        # Stable, as lexsort is: of several packs that hold a key, the first stays first.
        order = np.argsort(high, kind="stable")  # linear where the parts are sorted already
        if (high[order][1:] == high[order][:-1]).any():
            order = np.lexsort((low, high))
        return cls(high[order], low[order], pack[order], row[order])

    def drop(self, numbers: NDArray[np.int32]) -> _Run:
        """Give each pack the number that it has now, and leave out those that have -1."""
        pack = numbers[self.pack]
        kept = pack >= 0
        return _Run(self.high[kept], self.low[kept], pack[kept], self.row[kept])

    def find_into(
        self,
        pack: NDArray[np.int32],
        row: NDArray[np.int32],
        high: NDArray[np.uint64],
        low: NDArray[np.uint64],
    ) -> None:
        """Fill in where keys are that have not been found yet."""
        if not len(self):
            return
        last = len(self) - 1
        place = np.searchsorted(self.high, high)
        at = np.minimum(place, last)
        while (going := (place <= last) & (self.high[at] == high) & (pack < 0)).any():
            hit = going & (self.low[at] == low)
            pack[hit], row[hit] = self.pack[at[hit]], self.row[at[hit]]
            place = place + 1
            at = np.minimum(place, last)


# No slots: `cached_property` keeps its value in the instance.
@dataclass(frozen=True, eq=False)
class Index:
    """An immutable table from keys to (pack, row).

    Adding or dropping packs gives a new index, so a reader that holds one is never disturbed.
    The keys lie in sorted runs, each at least twice as long as the next, so that adding a pack
    costs little however many records there are.
    """

    packs: tuple[str, ...] = ()
    _runs: tuple[_Run, ...] = ()

    def __len__(self) -> int:
        """Count the different keys."""
        return self._count

    @cached_property
    def _count(self) -> int:
        if not self._runs:
            return 0
        run = self._runs[0] if len(self._runs) == 1 else _Run.merge(self._runs)
        same = (run.high[1:] == run.high[:-1]) & (run.low[1:] == run.low[:-1])
        return len(run) - int(np.count_nonzero(same))

    def add(self, packs: Mapping[str, Keys]) -> Index:
        """Give the index with more packs, by name."""
        counts = np.array([len(keys) for keys in packs.values()], np.int64)
        return self.extend([*packs], counts, np.concatenate([_NO_KEYS, *packs.values()]))

    def extend(self, names: Sequence[str], counts: NDArray[np.int64], keys: Keys) -> Index:
        """Give the index with more packs: their names, numbers of records, and all their keys."""
        if not names:
            # The same object: to `Space.find` another one means that something came or went.
            return self
        parts = [_run_of(keys, counts, len(self.packs))]
        runs = [*self._runs]
        size = len(keys)
        while runs and len(runs[-1]) < 2 * size:
            size += len(runs[-1])
            # In front: their packs are older than the new ones.
            parts.insert(0, runs.pop())
        return Index((*self.packs, *names), (*runs, _Run.merge(parts)))

    def drop(self, names: set[str]) -> Index:
        """Give the index without the packs named."""
        if names.isdisjoint(self.packs):
            return self
        kept = [i for i, name in enumerate(self.packs) if name not in names]
        numbers = np.full(len(self.packs), -1, np.int32)
        numbers[kept] = np.arange(len(kept), dtype=np.int32)
        runs = tuple(run.drop(numbers) for run in self._runs)
        return Index(tuple(self.packs[i] for i in kept), runs)

    def counts(self) -> NDArray[np.int64]:
        """Count the records of each of `packs`: (p,) int64."""
        counted = [np.bincount(run.pack, minlength=len(self.packs)) for run in self._runs]
        return np.sum(counted, axis=0, dtype=np.int64) if counted else np.zeros(0, np.int64)

    def packs_of(self, keys: Keys) -> list[str]:
        """Name the packs where `find` finds some keys."""
        numbers = np.unique(self.find(keys)[0])
        return [self.packs[number] for number in numbers.tolist() if number >= 0]

    def holders(self, keys: Keys) -> list[str]:
        """Name all packs that hold one of some keys, also those that another pack holds too."""
        high, low = _halves(keys)
        wanted = set(zip(high.tolist(), low.tolist(), strict=True))
        found = set[int]()
        for run in self._runs:
            rows = np.flatnonzero(np.isin(run.high, high))
            pairs = zip(run.high[rows].tolist(), run.low[rows].tolist(), strict=True)
            numbers = zip(run.pack[rows].tolist(), pairs, strict=True)
            found.update(number for number, pair in numbers if pair in wanted)
        return [self.packs[number] for number in sorted(found)]

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
        high, low = _halves(keys)
        pack, row = np.full(len(high), -1, np.int32), np.full(len(high), -1, np.int32)
        for run in self._runs:
            run.find_into(pack, row, high, low)
        return pack, row


def _halves(keys: Keys) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """Read each key as two numbers that sort as its bytes do."""
    halves = np.ascontiguousarray(keys).view(">u8").reshape(-1, 2).astype(np.uint64)
    return halves[:, 0], halves[:, 1]


def _run_of(keys: Keys, counts: NDArray[np.int64], first: int) -> _Run:
    """Give the keys of packs that are numbered from `first` on, not sorted yet."""
    high, low = _halves(keys)
    pack = np.repeat(np.arange(first, first + len(counts), dtype=np.int32), counts)
    row = np.arange(len(high)) - np.repeat(np.cumsum(counts) - counts, counts)
    return _Run(high, low, pack, row.astype(np.int32))
