"""Each cell with the cells of an earlier frame that it may come from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import KDTree

from ..errors import MovieError
from .cells import Cells, Floats

REACH_SHARE, REACH_MARGIN = 0.99, 1.25
"""Candidates are looked for as far as this share of all parents is away, and by this farther."""
MOST_CANDIDATES = 64
"""Of a cell: the nearest."""
MOST_CELLS = 20_000
"""So many cells of all movies are looked at, spread evenly; more tell no more."""


@dataclass(frozen=True, slots=True)
class Links:
    """Cells with a known parent, each with its candidates; rows count the cells of all movies.

    Attributes
    ----------
    later : (L,) int64
        Rows of the cells.
    starts : (L + 1,) int64
        Cell i has the candidates starts[i] to starts[i + 1].
    earlier : (P,) int64
        Rows of the candidates.
    found : (L,) int64
        Which pair, 0 to P, is that of the parent; -1 where it is beyond reach.
    units : (L,) int64
        Which frame of which movie each cell is in: what intervals are drawn from.
    is_early : (L,) bool
        Whether it is in the half that is early in its movie.
    offsets : (P, ndim) float64
        From each candidate to the cell, as parts of the reach.
    movies : (L,) int64
    """

    later: NDArray[np.int64]
    starts: NDArray[np.int64]
    earlier: NDArray[np.int64]
    found: NDArray[np.int64]
    units: NDArray[np.int64]
    is_early: NDArray[np.bool_]
    offsets: Floats
    movies: NDArray[np.int64]

    def __len__(self) -> int:
        """Count the cells."""
        return len(self.later)

    @property
    def owners(self) -> NDArray[np.int64]:
        """Which cell, 0 to L, each pair is of: (P,)."""
        return np.repeat(np.arange(len(self)), np.diff(self.starts))

    @property
    def chance(self) -> float:
        """The share that is found by choosing any candidate."""
        return float(np.mean((self.found >= 0) / np.diff(self.starts)))


def link_movies(movies: Sequence[Cells], step: int) -> Links:
    """Find the candidates of the cells of movies, `step` frames before.

    Raises
    ------
    MovieError
        There are too few links to fit on one half and to test on the other.
    """
    ends = np.cumsum([0, *map(len, movies)])
    pairs = [cells.find_links(step) for cells in movies]
    total = sum(len(later) for later, _ in pairs)
    every = -(-total // MOST_CELLS)
    linked = [one for one in zip(movies, pairs, ends[:-1], strict=True) if len(one[1][0])]
    parts = [
        _link_movie(cells, later[::every], earlier[::every], step, number, int(first))
        for number, (cells, (later, earlier), first) in enumerate(linked)
    ]
    early = sum(int(part.is_early.sum()) for part in parts)
    if not 0 < early < sum(map(len, parts)):
        raise MovieError(
            f"{total} links at step {step}, in too few frames: a linker is fitted on one half of "
            "the time and tested on the other; give more or longer movies, or a smaller step"
        )
    return _join(parts)


def _link_movie(
    cells: Cells, later: NDArray[np.intp], parents: NDArray[np.intp], step: int, number: int,
    first: int,
) -> Links:  # fmt: skip
    far = np.linalg.norm(cells.places[later] - cells.places[parents], axis=1)
    reach = max(float(np.quantile(far, REACH_SHARE)) * REACH_MARGIN, 1.0)
    candidates: list[NDArray[np.int64]] = []
    for t in np.unique(cells.frames[later]):
        before = np.flatnonzero(cells.frames == t - step)
        asked = cells.places[later[cells.frames[later] == t]]
        _, near = KDTree(cells.places[before]).query(
            asked, k=range(1, min(MOST_CANDIDATES, len(before)) + 1), distance_upper_bound=reach
        )
        # The nearest is a candidate, however far: nobody is without.
        nearest = KDTree(cells.places[before]).query(asked)[1]
        near[:, 0] = np.where(near[:, 0] < len(before), near[:, 0], nearest)
        candidates += [before[row[row < len(before)]] for row in near]
    starts = np.cumsum([0, *map(len, candidates)])
    earlier = np.concatenate(candidates)
    owners = np.repeat(np.arange(len(later)), np.diff(starts))
    hits = np.flatnonzero(earlier == parents[owners])
    found = np.full(len(later), -1)
    found[owners[hits]] = hits
    return Links(
        later=later + first,
        starts=starts,
        earlier=earlier + first,
        found=found,
        units=cells.frames[later],
        is_early=_first_half(cells.frames[later], number),
        offsets=(cells.places[later][owners] - cells.places[earlier]) / reach,
        movies=np.full(len(later), number),
    )


def _first_half(frames: NDArray[np.int64], number: int) -> NDArray[np.bool_]:
    """Tell for links in the order of frames which are in the first half, cut between frames.

    Of movies with links in one frame each, every second is.
    """
    cuts = np.flatnonzero(np.diff(frames)) + 1
    if not len(cuts):
        return np.full(len(frames), number % 2 == 0)
    cut = cuts[np.abs(2 * cuts - len(frames)).argmin()]
    return np.arange(len(frames)) < cut


def _join(parts: Sequence[Links]) -> Links:
    """Count pairs and frames on from movie to movie."""
    pairs = np.cumsum([0, *(len(part.earlier) for part in parts)])
    firsts = list(zip(parts, pairs.tolist(), strict=False))
    movies = np.concatenate([part.movies for part in parts])
    frames = np.concatenate([part.units for part in parts])
    _, units = np.unique(np.stack([movies, frames]), axis=1, return_inverse=True)
    return Links(
        later=np.concatenate([part.later for part in parts]),
        starts=np.concatenate([*(part.starts[:-1] + first for part, first in firsts), pairs[-1:]]),
        earlier=np.concatenate([part.earlier for part in parts]),
        found=np.concatenate(
            [np.where(part.found < 0, -1, part.found + first) for part, first in firsts]
        ),
        units=units.ravel(),
        is_early=np.concatenate([part.is_early for part in parts]),
        offsets=np.concatenate([part.offsets for part in parts]),
        movies=movies,
    )
