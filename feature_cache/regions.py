"""The regions of a mask, and how much each cell of a grid counts for each of them.

The grid spans the frame: pixel row ``y`` lies in grid row ``floor(y * (gh / H))``, columns alike.
A stack ``(Z, H, W)`` has one grid a slice, and a region's pixels count over all slices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from .errors import FrameError
from .forks import cached_property
from .hashing import mask_labels

Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]
Points: TypeAlias = NDArray[np.float64]
Rows: TypeAlias = NDArray[np.unsignedinteger[Any]]
GridShape: TypeAlias = tuple[int, int, int]
"""(Z, gh, gw)."""
_Label = TypeVar("_Label", bound=np.integer)


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


def _runs_of_values(array: NDArray[np.int32]) -> tuple[NDArray[np.int32], Ints]:
    """Give value and length of each run of equal values in a flattened array."""
    flat = array.reshape(-1)
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
    return flat[starts], np.diff(starts, append=flat.size)


def _distinct(values: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.unique(values[values != 0])


class Votes(NamedTuple):
    """How much each cell counts for each region, sorted by region, then cell."""

    bounds: Ints
    """(N + 1,) int64. The votes of region i are those from ``bounds[i]`` to ``bounds[i + 1]``,
    at least one."""
    cells: Ints
    """(V,) int64."""
    weights: Floats
    """(V,) float32."""


class Ballot:
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
