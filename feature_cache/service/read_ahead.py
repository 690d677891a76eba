"""Reading ahead of a DataLoader: the device works while the optimiser does."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from numbers import Integral
from typing import Any, Protocol


class Prefetching(Protocol):
    """A dataset that can have records computed before they are asked for."""

    def prefetch(self, indices: Iterable[int]) -> None:
        """Have the records of coming samples computed in the background; waits for none."""


class ReadAhead:
    """A batch sampler that tells a dataset which batches come.

    Whatever they miss is computed in the background, by the process that iterates the DataLoader,
    whatever order the batches are in. That process hashes the frames when they first come; it waits
    for nothing else. A cache that is warm is left alone.

    Parameters
    ----------
    batch_sampler : iterable of list of int
        Such as torch's `BatchSampler` or Trackastra's `BalancedBatchSampler`. It draws that much
        earlier. All else that it has (``set_epoch``, ``sampler``, its length) is had here too.
    dataset : dataset with ``prefetch``
        What `wrap` gives, or a `CachedFeatureDataset`. Where it has augmented copies, only after
        its ``set_epoch``.
    batches : int
        How far to look ahead.

    Examples
    --------
    >>> class Loud:
    ...     def prefetch(self, indices):
    ...         print("coming:", indices)
    >>> batches = iter(ReadAhead([[0, 1], [2, 3], [4, 5]], Loud(), batches=1))
    >>> next(batches)
    coming: [0, 1]
    coming: [2, 3]
    [0, 1]
    """

    def __init__(
        self, batch_sampler: Iterable[list[int]], dataset: Prefetching, *, batches: int = 8
    ) -> None:
        if batches < 1:
            raise ValueError(f"batches {batches}: expected 1 or more")
        self.batch_sampler, self.dataset, self.batches = batch_sampler, dataset, batches

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.batch_sampler)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[list[int]]:
        """Give the batches as they are, each some time after it was drawn."""
        coming = deque[list[int]]()
        drawn: Iterable[Any] = self.batch_sampler
        for batch in drawn:
            if isinstance(batch, Integral):
                raise TypeError(
                    f"batch_sampler gives the index {batch}: expected batches, each a list of "
                    "indices; put the sampler in torch's BatchSampler(sampler, batch_size, "
                    "drop_last)"
                )
            self.dataset.prefetch(batch)
            coming.append(batch)
            if len(coming) > self.batches:
                yield coming.popleft()
        yield from coming

    def __getattr__(self, name: str) -> Any:
        """Give what the batch sampler has."""
        if name == "batch_sampler":  # of an object that is being unpickled
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)
