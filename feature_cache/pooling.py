"""From a grid of embeddings and an instance mask to one vector a region.

Which cells count for which region is said by `feature_cache.regions`.

Notes
-----
Names, the mapping of pixels to cells, and normalisation before aggregation (after it for
``nearest_patch``) follow ``pretrained_features.py`` of trackastra-pretrained-feats 0.0.2, whose
results these match where they are right. Differences: bounding boxes index ``[row, column]``, cells
come from the same mapping in every mode, and the median of an even number is the mean of the middle
two.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .errors import FrameError, UnknownNameError
from .regions import Ballot, Drawing, Floats, Ints, Regions, Votes

EPSILON = np.float32(1e-8)
ORDINARY = 2.0**-20, 2.0**60
"""Vectors whose largest number is beyond are scaled before their length is taken in float32."""
_ORDINARY_LENGTH = 2.0**-8, 2.0**60
"""Vectors of such a length, and of up to 2**24 numbers, have a largest one within `ORDINARY`."""
_MEDIAN_NUMBERS = 1 << 17
"""Numbers that are sorted at once."""


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
    [pooled] = pool_regions(grid, Regions.of_mask(mask, labels, centroids), [mode])
    return pooled


def pool_frame(
    grid: NDArray[np.floating], regions: Regions, draw: Drawing, modes: Sequence[str]
) -> list[Floats]:
    """Pool the grid of a frame under a draw in several ways at once; errors as `pool`.

    The grid is that of the drawn frame, and the regions are those of its mask before the draw: of
    one frame for all of its draws. Gives (N, C) float32 for each mode, in the order of the regions'
    labels. One of which the draw leaves no pixel takes the cell under its mapped centroid.
    """
    return pool_regions(grid, regions.drawn(draw), modes)


def pool_regions(
    grid: NDArray[np.floating], regions: Regions, modes: Sequence[str]
) -> list[Floats]:
    """Pool as `pool_frame` does, over regions that are drawn already (`Regions.drawn`)."""
    steps = [steps_of(mode) for mode in modes]
    stack = grid[None] if grid.ndim == 3 else grid
    if stack.ndim != 4 or stack.shape[0] != regions.shape[0]:
        raise FrameError(
            f"a grid of shape {grid.shape} does not belong to a mask of {regions.shape[0]} slices: "
            "expected (gh, gw, C) for (H, W), or (Z, gh, gw, C) for (Z, H, W)"
        )
    if not len(regions.labels):
        return [np.empty((0, stack.shape[3]), np.float32) for _ in modes]
    ballot = Ballot(regions, stack.shape[:3])
    votes = [getattr(ballot, step.vote) for step in steps]
    units, places = _unit_vectors(stack, votes)
    return [
        _AGGREGATES[step.aggregate](v, place, units)
        for step, v, place in zip(steps, votes, places, strict=True)
    ]


def _unit_vectors(stack: NDArray[np.floating], votes: Sequence[Votes]) -> tuple[Floats, list[Ints]]:
    """Give the vectors of length 1 (U, C) of all cells that have a vote, and each vote's place."""
    place = np.zeros(math.prod(stack.shape[:3]), np.int64)
    for each in votes:
        place[each.cells] = 1
    cells = np.flatnonzero(place)
    place[cells] = np.arange(len(cells))
    vectors = stack.reshape(-1, stack.shape[-1])[cells].astype(np.float32, copy=False)
    lengths = _lengths(vectors)
    if not ((lengths >= _ORDINARY_LENGTH[0]) & (lengths <= _ORDINARY_LENGTH[1])).all():
        vectors = _scale_extremes(vectors)
        lengths = _lengths(vectors)
    vectors /= lengths + EPSILON
    return vectors, [place[each.cells] for each in votes]


def _lengths(vectors: Floats) -> Floats:
    """(U, 1); infinity or 0 for vectors of huge or tiny numbers."""
    with np.errstate(over="ignore"):
        return np.sqrt(np.add.reduce(vectors * vectors, axis=-1, keepdims=True))


def _scale_extremes(vectors: Floats) -> Floats:
    """Scale vectors of huge or tiny numbers by powers of two, which leaves their direction."""
    largest = np.abs(vectors).max(axis=-1, keepdims=True, initial=0)
    ordinary = ((largest >= ORDINARY[0]) & (largest <= ORDINARY[1])) | (largest == 0)
    return np.ldexp(vectors, np.where(ordinary, 0, -np.frexp(largest)[1]))


def _mean(votes: Votes, place: Ints, vectors: Floats) -> Floats:
    shape = len(votes.bounds) - 1, len(vectors)
    weighted = sparse.csr_array((votes.weights, place, votes.bounds), shape=shape)
    totals: Floats = np.add.reduceat(votes.weights, votes.bounds[:-1])
    return np.asarray(weighted @ vectors, np.float32) / totals[:, None]


def _max(votes: Votes, place: Ints, vectors: Floats) -> Floats:
    return np.maximum.reduceat(vectors[place], votes.bounds[:-1], axis=0)


def _median(votes: Votes, place: Ints, vectors: Floats) -> Floats:
    """Take weighted medians, of all regions with about as many votes at once."""
    ranked, sizes = _ranked(vectors), np.diff(votes.bounds)
    widths = 1 << np.ceil(np.log2(sizes)).astype(np.int64)
    pooled = np.empty((len(sizes), vectors.shape[1]), np.float32)
    for width in np.unique(widths):
        regions = np.flatnonzero(widths == width)
        at_once = max(1, _MEDIAN_NUMBERS // int(width * vectors.shape[1]))
        for part in np.split(regions, range(at_once, len(regions), at_once)):
            there = np.arange(width) < sizes[part, None]
            chosen = np.where(there, votes.bounds[part, None] + np.arange(width), 0)
            cells = np.where(there, place[chosen], len(vectors))
            weights = np.where(there, votes.weights[chosen], np.float32(0))
            pooled[part] = _weighted_medians(ranked, cells, weights, vectors)
    return pooled


def _ranked(vectors: Floats) -> Ints:
    """Give (C, U + 1) multiples of 2**32 in the order of (U, C) numbers, the last one highest."""
    bits = (vectors.T + np.float32(0)).view(np.int32)  # -0.0 is 0.0
    ascending = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    ranked = np.full((vectors.shape[1], len(vectors) + 1), np.iinfo(np.int32).max, np.int64)
    ranked[:, :-1] = ascending
    return ranked << 32


def _weighted_medians(ranked: Ints, cells: Ints, weights: Floats, vectors: Floats) -> Floats:
    """(n, C): medians of the vectors of (n, K) cells, each standing there `weights` times.

    Of equal numbers the first stands first, as in a stable sort: zeros have signs.
    """
    keys = ranked.take(cells, axis=1)
    keys |= np.arange(cells.shape[1])
    keys.sort(axis=2)
    keys &= 0xFFFFFFFF
    regions, channels = np.arange(len(cells)), np.arange(len(ranked))[:, None]
    reached = weights.astype(np.float64).take(keys + regions[:, None] * cells.shape[1])
    np.cumsum(reached, axis=2, out=reached)
    half = reached[..., -1:] / 2
    lower, upper = (
        vectors[cells[regions, np.take_along_axis(keys, first, axis=2)[..., 0]], channels]
        for first in (
            (reached >= half).argmax(axis=2, keepdims=True),
            (reached > half).argmax(axis=2, keepdims=True),
        )
    )
    return (lower + upper).T / np.float32(2)


_AGGREGATES: Mapping[str, Callable[[Votes, Ints, Floats], Floats]] = MappingProxyType(
    {"mean": _mean, "max": _max, "median": _median}
)


@dataclass(frozen=True, slots=True)
class Steps:
    """What a pooling does: who votes for which cells, and how their vectors become one."""

    vote: str
    aggregate: str
    revision: int = 1


_MODES = MappingProxyType(
    {
        "nearest_patch": Steps("by_centroid", "mean"),
        "mean_patches_exact": Steps("by_pixel", "mean"),
        "max_patches_exact": Steps("by_pixel", "max"),
        "median_patches_exact": Steps("by_pixel", "median"),
        "mean_patches_bbox": Steps("by_box", "mean"),
        "max_patches_bbox": Steps("by_box", "max"),
        "median_patches_bbox": Steps("by_box", "median"),
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
    return steps_of(mode).revision


def steps_of(mode: str) -> Steps:
    """Give what a pooling does; UnknownNameError for none, TypeError for what is no name."""
    if not isinstance(mode, str):
        raise TypeError(
            f"pooling is {mode!r}: expected one name, such as 'mean_patches_exact'; several in one "
            "run are for plan_warm"
        )
    if mode not in _MODES:
        raise UnknownNameError("pooling", mode, POOLINGS)
    return _MODES[mode]
