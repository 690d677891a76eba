"""From a grid of embeddings and an instance mask to one vector a region.

The grid spans the frame: pixel row ``y`` lies in grid row ``floor(y * (gh / H))``, columns alike.
A stack ``(Z, H, W)`` has one grid a slice, and a region's pixels count over all slices.

Notes
-----
Names, the mapping of pixels to cells, and normalisation before aggregation (after it for
``nearest_patch``) follow ``pretrained_features.py`` of trackastra-pretrained-feats 0.0.2, whose
results these match where they are right. Differences: bounding boxes index ``[row, column]``, cells
come from the same mapping in every mode, and the median of an even number is the mean of the middle
two.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .errors import FrameError, UnknownNameError
from .hashing import mask_labels

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]
Votes: TypeAlias = sparse.csr_array
"""(N regions, K cells): how much each cell counts for each region; no row is empty."""

_Scalar = TypeVar("_Scalar", bound=np.generic)
_EPSILON = np.float32(1e-8)
_LOOKUP_LIMIT = 1 << 24
_DENSE_VOTES_A_PIXEL = 32
"""Up to so many pairs of region and cell a pixel, counting all pairs is faster than sorting."""
_DENSE_VOTES = 1 << 24
"""More pairs are never counted at once: 128 MB."""
_BLOCK = 1 << 22
"""Pixels counted at once."""
_ORDINARY = 2.0**-20, 2.0**60
"""Vectors whose largest number is beyond are scaled before their length is taken in float32."""


@dataclass(frozen=True, slots=True)
class Regions:
    """The pixels of one mask, told apart by region.

    Attributes
    ----------
    labels : (N,) int32, ascending
    shape : (Z, H, W); Z is 1 for a single frame
    index : (P,) int64
        For each foreground pixel, the row of its label in `labels`.
    places : (P,) int64
        Where each of these pixels lies in the flattened (Z, H, W).
    """

    labels: NDArray[np.int32]
    shape: tuple[int, int, int]
    index: Ints
    places: Ints

    @classmethod
    def of_mask(cls, mask: NDArray[np.generic], labels: NDArray[np.int32] | None = None) -> Regions:
        """Sort a mask's pixels by region.

        Parameters
        ----------
        mask : (H, W) or (Z, H, W), integer; 0 is background
        labels : (N,) int32, ascending, optional
            The regions wanted, by default all in the mask. One without a pixel stays, empty;
            pixels with other labels are left out.
        """
        stack: NDArray[np.int32] = _as_stack(mask_labels(mask))
        places = np.flatnonzero(stack != 0)  # faster than of the integers
        values = stack.reshape(-1)[places]
        wanted = _distinct(values) if labels is None else labels
        index = _rows_of(values, wanted)
        if labels is not None:
            inside = index >= 0
            places, index = places[inside], index[inside]
        return cls(wanted, stack.shape, index, places)

    @property
    def pixels(self) -> Ints:
        """(3, P) int64, (z, y, x) of each foreground pixel."""
        rows, columns = np.divmod(self.places, self.shape[2])
        return np.stack([*np.divmod(rows, self.shape[1]), columns])

    @property
    def sizes(self) -> Ints:
        """(N,) int64, pixels of each region."""
        return np.bincount(self.index, minlength=len(self.labels))

    def centroids(self) -> NDArray[np.float64]:
        """(N, 3) float64, (z, y, x): mean pixel of each region, NaN for an empty one."""
        sums = [np.bincount(self.index, axis, minlength=len(self.labels)) for axis in self.pixels]
        with np.errstate(invalid="ignore"):
            return np.stack(sums, axis=-1) / self.sizes[:, None]


def region_labels(mask: NDArray[np.generic]) -> NDArray[np.int32]:
    """List the labels of a mask's regions: (N,) int32, ascending, without background."""
    values = mask_labels(mask).reshape(-1)
    return _distinct(values[values != 0])


def _distinct(values: NDArray[np.int32]) -> NDArray[np.int32]:
    if values.size and int(values.max()) < _LOOKUP_LIMIT:
        return np.flatnonzero(np.bincount(values)).astype(np.int32)
    return np.unique(values)


def _rows_of(values: NDArray[np.int32], labels: NDArray[np.int32]) -> Ints:
    """Give the row of each value among ascending labels: (P,) int64, -1 where it is none."""
    if not values.size or not labels.size:
        return np.full(len(values), -1, np.int64)
    highest = int(max(values.max(), labels[-1]))
    if highest < _LOOKUP_LIMIT:
        table = np.full(highest + 1, -1, np.int64)
        table[labels] = np.arange(len(labels))
        return table[values]
    rows = np.minimum(np.searchsorted(labels, values), len(labels) - 1)
    return np.where(labels[rows] == values, rows, -1)


def pool(
    grid: NDArray[np.floating],
    mask: NDArray[np.generic],
    mode: str,
    *,
    labels: NDArray[np.int32] | None = None,
    centroids: NDArray[np.float64] | None = None,
) -> Floats:
    """Pool a frame's grid into one vector a region.

    Parameters
    ----------
    grid : (gh, gw, C), or (Z, gh, gw, C) for a stack, float
        Embeddings; the grid spans the frame that `mask` labels.
    mask : (H, W) or (Z, H, W), integer; 0 is background
    mode : str
        One of `POOLINGS`.
    labels : (N,) int32, ascending, optional
        The regions wanted; by default those in the mask.
    centroids : (N, 2) or (N, 3) float64, (y, x) or (z, y, x) in pixels of `mask`, optional
        Where a region lies that has no pixel: it takes the cell under this point (the nearest
        cell of the frame, when the point lies outside).

    Returns
    -------
    (N, C) float32, in the order of `labels`

    Raises
    ------
    UnknownNameError
        No such mode.
    FrameError
        Grid and mask don't fit, or a region has neither a pixel nor a centroid.

    Examples
    --------
    >>> import numpy as np
    >>> mask = np.array([[1, 1, 0, 2]] * 4)
    >>> grid = np.arange(8, dtype=np.float32).reshape(2, 2, 2) + 1
    >>> np.allclose(pool(grid, mask, "nearest_patch"), [[0.447, 0.894], [0.6, 0.8]], atol=1e-3)
    True
    """
    return pool_regions(grid, Regions.of_mask(mask, labels), mode, centroids=centroids)


def pool_regions(
    grid: NDArray[np.floating],
    regions: Regions,
    mode: str,
    *,
    centroids: NDArray[np.float64] | None = None,
) -> Floats:
    """Pool a grid as `pool` does, over the regions of a mask that are known already."""
    steps = _steps(mode)
    stack = grid[None] if grid.ndim == 3 else grid
    if stack.ndim != 4 or stack.shape[0] != regions.shape[0]:
        raise FrameError(
            f"a grid of shape {grid.shape} does not belong to a mask of {regions.shape[0]} slices: "
            "expected (gh, gw, C) for (H, W), or (Z, gh, gw, C) for (Z, H, W)"
        )
    votes = _fill_empty(steps.vote(regions, stack.shape[:3]), regions, stack.shape[:3], centroids)
    return steps.aggregate(votes, _unit_vectors(stack, votes))


def _as_stack(array: NDArray[_Scalar]) -> NDArray[_Scalar]:
    return array[None] if array.ndim == 2 else array


def _cells(points: NDArray[np.generic], regions: Regions, grid: tuple[int, ...]) -> Ints:
    """Find the number of the grid cell under each point (3, P), (z, y, x), clipped to the frame."""
    axes = [
        _cells_along(axis, length, cells)
        for axis, length, cells in zip(points, regions.shape, grid, strict=True)
    ]
    return np.ravel_multi_index(tuple(axes), grid).astype(np.int64)


def _cells_along(points: NDArray[Any], length: int, cells: int) -> Ints:
    return np.clip((points * (cells / length)).astype(np.int64), 0, cells - 1)


@lru_cache(maxsize=4)
def _cells_of_pixels(shape: tuple[int, int, int], grid: tuple[int, int, int]) -> Ints:
    """Give the number of the grid cell under every pixel: (Z * H * W,) int64."""
    axes = [_cells_along(np.arange(n), n, cells) for n, cells in zip(shape, grid, strict=True)]
    cells = np.ravel_multi_index(np.ix_(*axes), grid).astype(np.int64).reshape(-1)
    cells.flags.writeable = False
    return cells


def _tally(rows: Ints, cells: Ints, regions: Regions, grid: tuple[int, ...]) -> Votes:
    shape = len(regions.labels), int(np.prod(grid))
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(rows), _BLOCK)]
    if shape[0] * shape[1] > min(_DENSE_VOTES_A_PIXEL * len(rows), _DENSE_VOTES):
        votes = sparse.csr_array(shape, dtype=np.float32)
        for block in blocks:
            ones = np.ones(len(rows[block]), np.float32)
            part = sparse.csr_array((ones, (rows[block], cells[block])), shape=shape)
            part.sum_duplicates()
            votes = votes + part
        return votes
    counts = np.zeros(shape[0] * shape[1], np.int64)
    for block in blocks:
        counts += np.bincount(rows[block] * shape[1] + cells[block], minlength=len(counts))
    filled = np.flatnonzero(counts)
    bounds = np.searchsorted(filled, np.arange(shape[0] + 1) * shape[1])
    return sparse.csr_array(
        (counts[filled].astype(np.float32), filled % shape[1], bounds), shape=shape
    )


def _vote_by_pixel(regions: Regions, grid: tuple[int, int, int]) -> Votes:
    cells = _cells_of_pixels(regions.shape, grid)[regions.places]
    return _tally(regions.index, cells, regions, grid)


def _vote_by_centroid(regions: Regions, grid: tuple[int, int, int]) -> Votes:
    rows = np.flatnonzero(regions.sizes)
    return _tally(rows, _cells(regions.centroids()[rows].T, regions, grid), regions, grid)


def _vote_by_box(regions: Regions, grid: tuple[int, int, int]) -> Votes:
    low = np.full((3, len(regions.labels)), np.iinfo(np.int64).max)
    high = np.full((3, len(regions.labels)), -1)
    for axis, pixels in enumerate(regions.pixels):
        np.minimum.at(low[axis], regions.index, pixels)
        np.maximum.at(high[axis], regions.index, pixels)
    rows = np.flatnonzero(regions.sizes)
    first = np.stack(np.unravel_index(_cells(low[:, rows], regions, grid), grid), axis=-1)
    last = np.stack(np.unravel_index(_cells(high[:, rows], regions, grid), grid), axis=-1)
    boxes = [_box_cells(a, b, grid) for a, b in zip(first, last, strict=True)]
    counts = [len(box) for box in boxes]
    cells = np.concatenate(boxes) if boxes else np.empty(0, np.int64)
    return _tally(np.repeat(rows, counts), cells, regions, grid)


def _box_cells(first: Ints, last: Ints, grid: tuple[int, ...]) -> Ints:
    spans = [np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]
    return np.ravel_multi_index(np.ix_(*spans), grid).reshape(-1).astype(np.int64)


def _fill_empty(
    votes: Votes,
    regions: Regions,
    grid: tuple[int, ...],
    centroids: NDArray[np.float64] | None,
) -> Votes:
    empty = np.flatnonzero(np.diff(votes.indptr) == 0)
    if not len(empty):
        return votes
    if centroids is None:
        raise FrameError(
            f"the mask has no pixel of label {regions.labels[empty[0]]} and its centroid is not "
            "given: pass centroids, or ask only for labels in the mask"
        )
    points = centroids[empty]
    if points.shape[1] == 2:
        points = np.column_stack([np.zeros(len(points)), points])
    return votes + _tally(empty, _cells(points.T, regions, grid), regions, grid)


def _unit_vectors(stack: NDArray[np.floating], votes: Votes) -> Floats:
    """(votes.nnz, C) float32: the vector of length 1 for each vote."""
    cells, place = np.unique(votes.indices, return_inverse=True)
    vectors = _scale_extremes(stack.reshape(-1, stack.shape[-1])[cells].astype(np.float32))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True) + _EPSILON
    return vectors[place]


def _scale_extremes(vectors: Floats) -> Floats:
    """Scale vectors of huge or tiny numbers by powers of two, which leaves their direction."""
    largest = np.abs(vectors).max(axis=-1, keepdims=True, initial=0)
    ordinary = ((largest >= _ORDINARY[0]) & (largest <= _ORDINARY[1])) | (largest == 0)
    if ordinary.all():
        return vectors
    return np.ldexp(vectors, np.where(ordinary, 0, -np.frexp(largest)[1]))


def _mean(votes: Votes, vectors: Floats) -> Floats:
    owners = sparse.csr_array(
        (votes.data, np.arange(votes.nnz), votes.indptr), shape=(votes.shape[0], votes.nnz)
    )
    return np.asarray(owners @ vectors, np.float32) / votes.sum(axis=1, dtype=np.float32)[:, None]


def _max(votes: Votes, vectors: Floats) -> Floats:
    if not votes.shape[0]:
        return vectors[:0]
    return np.maximum.reduceat(vectors, votes.indptr[:-1], axis=0)


def _median(votes: Votes, vectors: Floats) -> Floats:
    pooled = np.empty((votes.shape[0], vectors.shape[1]), np.float32)
    for row, (start, stop) in enumerate(zip(votes.indptr[:-1], votes.indptr[1:], strict=True)):
        pooled[row] = _weighted_median(vectors[start:stop], votes.data[start:stop])
    return pooled


def _weighted_median(vectors: Floats, weights: Floats) -> Floats:
    """(C,): the median of (K, C) vectors, each standing there `weights` times."""
    order = np.argsort(vectors, axis=0, kind="stable")
    ranked = np.take_along_axis(vectors, order, axis=0)
    reached = np.cumsum(weights[order], axis=0, dtype=np.float64)
    half = reached[-1] / 2
    lower = np.take_along_axis(ranked, (reached < half).sum(axis=0)[None], axis=0)[0]
    upper = np.take_along_axis(ranked, (reached <= half).sum(axis=0)[None], axis=0)[0]
    return (lower + upper) / np.float32(2)


@dataclass(frozen=True, slots=True)
class _Steps:
    vote: Callable[[Regions, tuple[int, int, int]], Votes]
    aggregate: Callable[[Votes, Floats], Floats]
    revision: int = 1


_MODES = MappingProxyType(
    {
        "nearest_patch": _Steps(_vote_by_centroid, _mean),
        "mean_patches_exact": _Steps(_vote_by_pixel, _mean),
        "max_patches_exact": _Steps(_vote_by_pixel, _max),
        "median_patches_exact": _Steps(_vote_by_pixel, _median),
        "mean_patches_bbox": _Steps(_vote_by_box, _mean),
        "max_patches_bbox": _Steps(_vote_by_box, _max),
        "median_patches_bbox": _Steps(_vote_by_box, _median),
    }
)

POOLINGS = tuple(_MODES)
"""The names of all poolings."""


def pooling_revision(mode: str) -> int:
    """Give the number that changes whenever a pooling's results do.

    Raises
    ------
    UnknownNameError
        No such mode.
    """
    return _steps(mode).revision


def _steps(mode: str) -> _Steps:
    if mode not in _MODES:
        raise UnknownNameError("pooling", mode, POOLINGS)
    return _MODES[mode]
