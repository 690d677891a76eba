"""Whether a backbone's grid tells the regions of a movie apart."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..backbones.tiles import HALO_SHARE, pixels_of_cell
from ..errors import MovieError
from ..movies import Movie
from ..spec import BackboneSpec


def say_small_regions(movie: Movie, spec: BackboneSpec) -> str | None:
    """Say that regions are smaller than a cell of a grid, and what mends it; None where not.

    Reads the mask in the middle of the movie. Where that can't be read, it says nothing: whoever
    computes says what is wrong with it.
    """
    try:
        mask = None if movie.masks is None else np.asarray(movie.masks[len(movie) // 2])
    except (MovieError, OSError, IndexError):
        return None
    across = None if mask is None else _measure_regions(mask)
    if mask is None or across is None:
        return None
    rows, columns = pixels_of_cell(spec, mask.shape)
    if across >= max(rows, columns):
        return None
    mend = "a layer of a finer grid, if it has one"
    if spec.input_size is not None:
        window = across * max(spec.input_size) / spec.stride
        mend = f"tile={int(window / (1 + 2 / HALO_SHARE))} behind its name, or {mend}"
    return (
        f"regions of {movie.name or 'the movie'} are about {across:.0f} pixels across, and a cell "
        f"of the grid of {spec.name} spans {rows:.0f}x{columns:.0f}: several regions share one; "
        f"name {mend}"
    )


def _measure_regions(mask: NDArray[np.int32]) -> float | None:
    """Give the median of the regions' roots of area, in one slice; None where there is none."""
    plane = mask if mask.ndim == 2 else mask[len(mask) // 2]
    areas = np.unique(plane[plane > 0], return_counts=True)[1]
    return float(np.sqrt(np.median(areas))) if len(areas) else None
