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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from .errors import FrameError, UnknownNameError
from .forks import cached_property
from .hashing import mask_labels

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]
Points: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.unsignedinteger[Any]]
GridShape: TypeAlias = tuple[int, int, int]
"""(Z, gh, gw)."""

_Label = TypeVar("_Label", bound=np.integer)
EPSILON = np.float32(1e-8)
ORDINARY = 2.0**-20, 2.0**60
"""Vectors whose largest number is beyond are scaled before their length is taken in float32."""
_ORDINARY_LENGTH = 2.0**-8, 2.0**60
"""Vectors of such a length, and of up to 2**24 numbers, have a largest one within `ORDINARY`."""
_MEDIAN_NUMBERS = 1 << 17
"""Numbers that are sorted at once."""


class Drawing(Protocol):
    """What maps masks and points alike: a draw."""

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""

    def apply_mask(self, mask: NDArray[_Label]) -> NDArray[_Label]:
        """Map a mask (H, W), nearest neighbour."""

    def map_points(self, points: Points, shape: tuple[int, int]) -> Points:
        """Map points (N, 2), (y, x) in pixels of a frame of shape (H, W)."""

    def output_shape(self, shape: tuple[int, int]) -> tuple[int, int]:
        """Give the shape (H', W') that a frame of shape (H, W) gets."""


@dataclass(frozen=True, eq=False)
class Regions:
    """The regions of one mask, numbered in the order of their labels; one for all of its draws.

    Attributes
    ----------
    labels : (N,) int32, ascending
    rows : (Z, H, W), the smallest unsigned integers; Z is 1 for a single frame
        0 for background, 1 for the first label, and so on.
    missing : callable, optional
        Gives (N, 2) or (N, 3) float64, (y, x) or (z, y, x): where each region lies of which the
        mask may have no pixel.
    """

    labels: NDArray[np.int32]
    rows: Rows
    missing: Callable[[], Points] | None = None

    @classmethod
    def of_mask(
        cls,
        mask: NDArray[np.generic],
        labels: NDArray[np.int32] | None = None,
        centroids: Points | None = None,
    ) -> Regions:
        """Find a mask's regions.

        Parameters
        ----------
        mask : (H, W) or (Z, H, W), integer; 0 is background
        labels : (N,) int32, ascending, optional
            The regions wanted, by default all in the mask. One without a pixel stays, empty;
            pixels with other labels are left out.
        centroids : (N, 2) or (N, 3) float64, optional
            Where a region lies that has no pixel.

        Raises
        ------
        FrameError
            Labels that don't ascend, or are background; not one finite centroid for each.
        """
        stack = mask_labels(mask)
        stack = stack[None] if stack.ndim == 2 else stack
        if labels is not None:
            labels = np.asarray(labels)
            if labels.ndim != 1 or (labels[:1] < 1).any() or (labels[1:] <= labels[:-1]).any():
                raise FrameError("labels must be positive, and ascend: such as np.unique(mask)[1:]")
        values, lengths = _runs_of_values(stack)
        wanted = _distinct(values) if labels is None else labels
        known = np.isin(values, wanted)
        rows = np.where(known, np.searchsorted(wanted, values) + 1, 0)
        numbered = np.repeat(rows.astype(np.min_scalar_type(len(wanted))), lengths)
        if centroids is not None and len(centroids) != len(wanted):
            raise FrameError(f"{len(centroids)} centroids for {len(wanted)} regions: give one each")
        missing = None if centroids is None else lambda: centroids
        return cls(wanted, numbered.reshape(stack.shape), missing)

    @property
    def shape(self) -> GridShape:
        """(Z, H, W)."""
        z, height, width = self.rows.shape
        return z, height, width

    def drawn(self, draw: Drawing) -> Regions:
        """Map the regions by a draw; one of which nothing is left lies where its centroid goes."""
        if draw.is_identity:
            return self
        rows = np.stack([draw.apply_mask(plane) for plane in self.rows])
        return Regions(self.labels, rows, lambda: self._mapped_centroids(draw))

    def _mapped_centroids(self, draw: Drawing) -> Points:
        mapped = draw.map_points(self.centroids[:, 1:], self.shape[1:])
        return np.column_stack([self.centroids[:, 0], mapped])

    def cells_of_centroids(self, draw: Drawing, grid: GridShape) -> Ints:
        """Give the number of the grid cell under each region's mapped centroid: (N,) int64."""
        shape = self.shape[0], *draw.output_shape(self.shape[1:])
        return _cells(self._mapped_centroids(draw).T, shape, grid)

    @cached_property
    def centroids(self) -> Points:
        """(N, 3) float64, (z, y, x): mean pixel of each region, NaN for an empty one."""
        runs = _Runs.of(self.rows, np.zeros(self.shape[2], bool))
        return runs.centroids(self.shape, len(self.labels))


def region_labels(mask: NDArray[np.generic]) -> NDArray[np.int32]:
    """List the labels of a mask's regions: (N,) int32, ascending, without background."""
    return _distinct(_runs_of_values(mask_labels(mask))[0])


def _runs_of_values(array: NDArray[np.int32]) -> tuple[NDArray[np.int32], Ints]:
    """Give value and length of each run of equal values in a flattened array."""
    flat = array.reshape(-1)
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    return flat[starts], np.diff(starts, append=flat.size)


def _distinct(values: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.unique(values[values != 0])


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
    ballot = _Ballot(regions, stack.shape[:3])
    votes = [getattr(ballot, step.vote) for step in steps]
    units, places = _unit_vectors(stack, votes)
    return [
        _AGGREGATES[step.aggregate](v, place, units)
        for step, v, place in zip(steps, votes, places, strict=True)
    ]


class Votes(NamedTuple):
    """How much each cell counts for each region, sorted by region, then cell."""

    bounds: Ints
    """(N + 1,) int64. The votes of region i are those from ``bounds[i]`` to ``bounds[i + 1]``,
    at least one."""
    cells: Ints
    """(V,) int64."""
    weights: Floats
    """(V,) float32."""


class _Ballot:
    """The votes of a mask's regions for the cells of a grid, by pixel, centroid or box."""

    def __init__(self, regions: Regions, grid: GridShape) -> None:
        self._regions, self._grid, self._count = regions, grid, len(regions.labels)

    @cached_property
    def _along(self) -> list[Ints]:
        """Which cells the pixels lie in, along each axis."""
        sizes = zip(self._regions.shape, self._grid, strict=True)
        return [_cells_along(np.arange(length), length, cells) for length, cells in sizes]

    @cached_property
    def _runs(self) -> _Runs:
        return _Runs.of(self._regions.rows, np.diff(self._along[2], prepend=-1) != 0)

    @cached_property
    def _pixels(self) -> tuple[Ints, Ints, Ints]:
        """Row and cell (both ascending) and number of pixels of each pair that is there."""
        runs, (z, y, x), cells = self._runs, self._along, math.prod(self._grid)
        lines = (z[:, None] * self._grid[1] + y).reshape(-1) * self._grid[2]
        line, column = np.divmod(runs.start, self._regions.shape[2])
        # Region, cell and pixels of a run fit in 64 bits for whatever fits into memory.
        bits = self._regions.shape[2].bit_length()
        packed = ((runs.row * cells + lines[line] + x[column]) << bits) | runs.length
        packed.sort()
        pair = packed >> bits
        first = np.flatnonzero(np.diff(pair, prepend=-1))
        counts = np.add.reduceat(packed & ((1 << bits) - 1), first) if len(first) else first
        return *np.divmod(pair[first], cells), counts

    @cached_property
    def by_pixel(self) -> Votes:
        """Each pixel votes for the cell under it."""
        return self._with_missing(*self._pixels)

    @cached_property
    def by_centroid(self) -> Votes:
        """The cell under the mean pixel."""
        rows = np.unique(self._runs.row)
        centroids = self._runs.centroids(self._regions.shape, self._count)[rows]
        cells = _cells(centroids.T, self._regions.shape, self._grid)
        return self._with_missing(rows, cells, np.ones_like(rows))

    @cached_property
    def by_box(self) -> Votes:
        """Each cell between the first and the last that a pixel lies in, along each axis."""
        rows, cells, _ = self._pixels
        rows, first = np.unique(rows, return_index=True)
        if not len(rows):
            return self._with_missing(rows, rows, rows)
        axes = np.unravel_index(cells, self._grid)
        low = np.stack([np.minimum.reduceat(axis, first) for axis in axes])
        sides = np.stack([np.maximum.reduceat(axis, first) for axis in axes]) - low + 1
        counts = sides.prod(axis=0)
        owner = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]
        steps = np.stack(
            [
                within // (sides[1] * sides[2])[owner],
                within // sides[2][owner] % sides[1][owner],
                within % sides[2][owner],
            ]
        )
        cells = np.ravel_multi_index(tuple(low[:, owner] + steps), self._grid)
        return self._with_missing(rows[owner], cells, np.ones_like(cells))

    def _with_missing(self, rows: Ints, cells: Ints, counts: Ints) -> Votes:
        """Add one vote for each region without a pixel: for the cell under its centroid."""
        bounds = np.searchsorted(rows, np.arange(self._count + 1))
        missing = np.flatnonzero(bounds[1:] == bounds[:-1])
        if len(missing):
            cells = np.insert(cells, bounds[missing], self._cells_of_missing(missing))
            counts = np.insert(counts, bounds[missing], 1)
            bounds = bounds + np.searchsorted(missing, np.arange(self._count + 1))
        return Votes(bounds, cells, counts.astype(np.float32))

    def _cells_of_missing(self, missing: Ints) -> Ints:
        if self._regions.missing is None:
            raise FrameError(
                f"the mask has no pixel of label {self._regions.labels[missing[0]]} and its "
                "centroid is not given: pass centroids, or ask only for labels in the mask"
            )
        points = self._regions.missing()[missing]
        if not np.isfinite(points).all():
            raise FrameError("a region without a pixel has a centroid that is no finite number")
        if points.shape[1] == 2:
            points = np.column_stack([np.zeros(len(points)), points])
        return _cells(points.T, self._regions.shape, self._grid)


class _Runs(NamedTuple):
    """Runs of neighbouring pixels of one region, none of them over a border."""

    row: Ints
    """(R,) int64. Of the region, from 0."""
    start: Ints
    """(R,) int64. Where its first pixel lies in the flattened (Z, H, W)."""
    length: Ints
    """(R,) int64."""

    @classmethod
    def of(cls, rows: Rows, borders: NDArray[np.bool_]) -> _Runs:
        """Find the runs in (Z, H, W) row numbers; borders (W,) are columns where runs begin."""
        flat, starting = rows.reshape(-1), np.logical_and(rows, borders)
        starting.reshape(-1)[1:] |= flat[1:] != flat[:-1]
        starting[..., 0] = True
        start = np.flatnonzero(starting)
        row = flat[start]
        length = np.diff(start, append=rows.size)
        inside = np.flatnonzero(row)
        return cls(row[inside].astype(np.int64) - 1, start[inside], length[inside])

    def starts(self, shape: GridShape) -> Ints:
        """(3, R), (z, y, x) of each run's first pixel."""
        line, x = np.divmod(self.start, shape[2])
        return np.stack([*np.divmod(line, shape[1]), x])

    def centroids(self, shape: GridShape, count: int) -> Points:
        """(count, 3) float64, (z, y, x): mean pixel of each region, NaN for an empty one."""
        z, y, x = self.starts(shape)
        last = self.length - 1
        sums = (z * self.length, y * self.length, x * self.length + last * self.length // 2)
        sizes = np.bincount(self.row, self.length, minlength=count)
        with np.errstate(invalid="ignore"):
            return (
                np.stack([np.bincount(self.row, s, minlength=count) for s in sums], axis=-1)
                / sizes[:, None]
            )


def _cells(points: NDArray[Any], shape: GridShape, grid: GridShape) -> Ints:
    """Give the number of the grid cell under each point (3, P), (z, y, x), clipped to the frame."""
    axes = [_cells_along(*along) for along in zip(points, shape, grid, strict=True)]
    return np.ravel_multi_index(tuple(axes), grid)


def _cells_along(points: NDArray[Any], length: int, cells: int) -> Ints:
    return np.clip((points * (cells / length)).astype(np.int64), 0, cells - 1)


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
    """Give what a pooling does; UnknownNameError for none."""
    if mode not in [*_MODES]:  # a list, as what is no mode may have no hash
        raise UnknownNameError("pooling", mode, POOLINGS)
    return _MODES[mode]
