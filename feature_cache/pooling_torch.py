"""Pooling on the device where the grid lies: the meaning of `feature_cache.pooling`, as tensors.

Votes are counted exactly, of some regions for all cells at once. Sums are taken in float64, so
that no setting of lower precision reaches them; maxima and medians choose among unit vectors. The
numbers are those of `pool_frame` within `feature_cache.rounding`, not to the bit. The host waits
for the device only for maxima and medians (how many votes there are), never for a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from .errors import FrameError
from .forks import cached_property
from .pooling import EPSILON, ORDINARY, steps_of
from .regions import GridShape

_VOTES_AT_ONCE = 1 << 24
"""Pairs of region and cell that are counted at once: 128 MB as float64."""
_NUMBERS_AT_ONCE = 1 << 24
"""Numbers that become float64 at once, and that are sorted at once for medians."""


def pool_on(grid: Tensor, rows: Tensor, fallback: Tensor, modes: Sequence[str]) -> list[Tensor]:
    """Pool the grid of a frame under a draw in several ways at once, on its device.

    Parameters
    ----------
    grid : (gh, gw, C), or (Z, gh, gw, C) for a stack, float
        Embeddings of the drawn frame, on a device that has float64.
    rows : (Z, H', W'), integer, on the same device; Z is 1 for a single frame
        `Regions.rows` under the draw: 0 is background.
    fallback : (N,) int64, on the same device
        `Regions.cells_of_centroids`: the cell for a region of which the draw leaves no pixel.
    modes : sequence of str
        Of `POOLINGS`.

    Returns
    -------
    list of (N, C) float32, on the same device
        One for each mode.

    Raises
    ------
    UnknownNameError
        No such mode.
    FrameError
        The grid has another number of slices than `rows`.
    """
    steps = [steps_of(mode) for mode in modes]
    stack = grid[None] if grid.ndim == 3 else grid
    if stack.ndim != 4 or stack.shape[0] != rows.shape[0]:
        raise FrameError(
            f"a grid of shape {tuple(grid.shape)} does not belong to a mask of {rows.shape[0]} "
            "slices: expected (gh, gw, C) for (H, W), or (Z, gh, gw, C) for (Z, H, W)"
        )
    z, height, width, channels = stack.shape
    units = _unit_vectors(stack.reshape(-1, channels))
    parts = list(_ballots(rows, fallback, (z, height, width)))
    none = units.new_empty((0, channels))
    return [
        torch.cat(
            [none, *(_AGGREGATES[s.aggregate](getattr(part, s.vote), units) for part in parts)]
        )
        for s in steps
    ]


class _Ballot:
    """The votes of some regions for the cells of a grid: (n, K) integers, no line all 0.

    Parameters
    ----------
    rows : (Z, H, W) int32
        1 to n for the regions, 0 for all else.
    fallback : (n,) int64
        The cell for a region without a pixel.
    grid : (Z, gh, gw)
    """

    def __init__(self, rows: Tensor, fallback: Tensor, grid: GridShape) -> None:
        self._rows, self._fallback, self._grid = rows, fallback, grid

    @cached_property
    def _pixels(self) -> Tensor:
        z, y, x = (
            _cells_along(self._range(length), length, cells)
            for length, cells in zip(self._rows.shape, self._grid, strict=True)
        )
        lines = (z[:, None] * self._grid[1] + y) * self._grid[2]
        return self._tally(lines[:, :, None] + x, math.prod(self._grid))

    @property
    def by_pixel(self) -> Tensor:
        """Each pixel votes for the cell under it."""
        return self._with_missing(self._pixels)

    @property
    def by_centroid(self) -> Tensor:
        """The cell under the mean pixel."""
        depth, height, width = self._rows.shape
        line = torch.arange(depth * height, device=self._rows.device).view(depth, height, 1)
        of_lines = self._tally(line, depth * height).view(-1, depth, height)
        of_columns = self._tally(self._range(width).long(), width)
        sizes = of_columns.sum(dim=1)
        sums = of_lines.sum(dim=2), of_lines.sum(dim=1), of_columns
        cells = torch.zeros_like(self._fallback)
        for counts, length, number in zip(sums, self._rows.shape, self._grid, strict=True):
            mean = (counts * self._range(length)).sum(dim=1) / sizes
            cells = cells * number + _cells_along(mean.nan_to_num(), length, number)
        votes = of_columns.new_zeros((len(cells), math.prod(self._grid)))
        return self._with_missing(votes.scatter_(1, cells[:, None], (sizes > 0).int()[:, None]))

    @property
    def by_box(self) -> Tensor:
        """Each cell between the first and the last that a pixel lies in, along each axis."""
        there = self._pixels.view(-1, *self._grid) > 0
        within = torch.ones_like(there)
        for axis, others in (1, (2, 3)), (2, (1, 3)), (3, (1, 2)):
            along = there.any(dim=others[1], keepdim=True).any(dim=others[0], keepdim=True)
            begun = along.cumsum(dim=axis) > 0
            ends = along.flip(axis).cumsum(dim=axis).flip(axis) > 0
            within &= begun & ends
        return self._with_missing(within.view(len(there), -1).int())

    def _range(self, length: int) -> Tensor:
        return torch.arange(length, dtype=torch.float64, device=self._rows.device)

    def _tally(self, kinds: Tensor, number: int) -> Tensor:
        """Count each region's pixels of each kind, which broadcasts to (Z, H, W): (n, number)."""
        pairs = (self._rows.long() * number + kinds).view(-1)
        counts = pairs.new_zeros((len(self._fallback) + 1) * number, dtype=torch.int32)
        ones = counts.new_ones(()).expand_as(pairs)
        return counts.index_add_(0, pairs, ones).view(-1, number)[1:]

    def _with_missing(self, votes: Tensor) -> Tensor:
        empty = (votes.sum(dim=1, keepdim=True) == 0).int()
        return votes.scatter_add(1, self._fallback[:, None], empty)


def _ballots(rows: Tensor, fallback: Tensor, grid: GridShape) -> Iterator[_Ballot]:
    """Give so many regions at once that their votes fit into memory."""
    rows, widest = rows.int(), max(math.prod(grid), rows.shape[0] * rows.shape[1], rows.shape[2])
    at_once = max(1, _VOTES_AT_ONCE // widest)
    for start in range(0, len(fallback), at_once):
        part = fallback[start : start + at_once]
        inside = (rows > start) & (rows <= start + len(part))
        yield _Ballot(torch.where(inside, rows - start, 0), part, grid)


def _cells_along(points: Tensor, length: int, cells: int) -> Tensor:
    return (points * (cells / length)).long().clamp_(0, cells - 1)


def _unit_vectors(vectors: Tensor) -> Tensor:
    """Give (K, C) float32 vectors of length 1, as on the CPU: huge and tiny ones are scaled."""
    return torch.cat(
        [_scale_to_1(part.double()) for part in torch.split(vectors, _at_once(vectors))]
    )


def _at_once(vectors: Tensor) -> int:
    return max(1, _NUMBERS_AT_ONCE // max(1, vectors.shape[1]))


def _scale_to_1(vectors: Tensor) -> Tensor:
    largest = vectors.abs().amax(dim=1, keepdim=True)
    ordinary = ((largest >= ORDINARY[0]) & (largest <= ORDINARY[1])) | (largest == 0)
    exponent = torch.where(ordinary, 0, -torch.frexp(largest).exponent)
    vectors = vectors * torch.exp2(exponent.double())
    return (vectors / (vectors.norm(dim=1, keepdim=True) + float(EPSILON))).float()


def _mean(votes: Tensor, units: Tensor) -> Tensor:
    some = _at_once(units)
    parts = zip(torch.split(votes, some, dim=1), torch.split(units, some), strict=True)
    total = sum(part.double() @ vectors.double() for part, vectors in parts)
    return (total / votes.sum(dim=1, keepdim=True)).float()


def _max(votes: Tensor, units: Tensor) -> Tensor:
    _, cells = votes.nonzero(as_tuple=True)
    lengths = (votes > 0).sum(dim=1)
    return torch.segment_reduce(units[cells], "max", lengths=lengths, axis=0, unsafe=True)


def _median(votes: Tensor, units: Tensor) -> Tensor:
    regions, cells = votes.nonzero(as_tuple=True)
    weights = votes[regions, cells]
    at_once = max(1, _NUMBERS_AT_ONCE // len(regions))
    medians = [
        _weighted_medians(regions, units[cells, start : start + at_once], weights, votes)
        for start in range(0, units.shape[1], at_once)
    ]
    return torch.cat(medians, dim=1)


def _weighted_medians(regions: Tensor, vectors: Tensor, weights: Tensor, votes: Tensor) -> Tensor:
    """Give the medians (n, C) of vectors (V, C), which are in the order of their regions (V,)."""
    order = vectors.argsort(dim=0)
    order = order.gather(0, regions[order].argsort(dim=0, stable=True))
    ranked = vectors.gather(0, order)
    first = (votes > 0).sum(dim=1).cumsum(dim=0) - (votes > 0).sum(dim=1)
    totals = votes.sum(dim=1)
    before = (totals.cumsum(dim=0) - totals)[regions, None]
    reached = 2 * (weights[order].cumsum(dim=0) - before)
    lower, upper = (
        torch.zeros((len(votes), vectors.shape[1]), dtype=torch.int64, device=votes.device)
        .index_add_(0, regions, short.long())
        .add_(first[:, None])
        for short in (reached < totals[regions, None], reached <= totals[regions, None])
    )
    return (ranked.gather(0, lower) + ranked.gather(0, upper)) / 2


_AGGREGATES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = MappingProxyType(
    {"mean": _mean, "max": _max, "median": _median}
)
