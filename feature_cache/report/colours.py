"""Embeddings as colours, and as vectors small enough for a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

GREY = 128
"""Each of red, green and blue where a component says nothing."""

_MOST_ROWS = 20_000
_CONSTANT = 1e-6
"""Spreads below this, of vectors of length 1, are rounding."""


@dataclass(frozen=True, slots=True)
class Palette:
    """The first three principal components of some vectors, as red, green and blue.

    Attributes
    ----------
    mean : (C,) float32
    axes : (C, 3) float32
        Columns of zeros where there are fewer components.
    low, high : (3,) float32
        What becomes 0 and 255.
    """

    mean: Floats
    axes: Floats
    low: Floats
    high: Floats

    @classmethod
    def fit(cls, parts: Sequence[NDArray[Any]]) -> Palette:
        """Find the components of vectors, each brought to length 1 first.

        The same vectors give the same palette: a component's sign is that of its largest entry.

        Parameters
        ----------
        parts : sequence of (…, C) floats
            At least one; of many vectors, every n-th counts.

        Raises
        ------
        ValueError
            There is no part, or their C differ.
        """
        rows = np.concatenate([normalize_rows(part) for part in parts])
        rows = rows[:: -(-len(rows) // _MOST_ROWS) or 1]
        mean = rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1], np.float32)
        axes = _principal_axes(rows - mean)
        projected = (rows - mean) @ axes
        if not len(rows):
            return cls(mean, axes, *np.zeros((2, 3), np.float32))
        low, high = np.percentile(projected, (1, 99), axis=0).astype(np.float32)
        return cls(mean, axes, low, high)

    def colour(self, vectors: NDArray[Any]) -> Bytes:
        """Give each vector (…, C) its colour: (…, 3) uint8."""
        rows = (normalize_rows(vectors) - self.mean) @ self.axes
        span = self.high - self.low
        flat = span < _CONSTANT
        scaled = (rows - self.low) / np.where(flat, 1, span) * 255
        levels = np.where(flat, GREY, np.clip(scaled, 0, 255))
        return levels.round().astype(np.uint8).reshape(*np.shape(vectors)[:-1], 3)


def normalize_rows(vectors: NDArray[Any]) -> Floats:
    """Bring vectors (…, C) to length 1: (n, C) float32; a zero stays zero."""
    rows: Floats = np.asarray(vectors, np.float32).reshape(-1, np.shape(vectors)[-1])
    squares = np.einsum("ij,ij->i", rows, rows)[:, None]
    return rows / np.maximum(np.sqrt(squares), np.finfo(np.float32).tiny)


def _principal_axes(centred: Floats, count: int = 3) -> Floats:
    """Give the directions of largest variance, (C, count), zeros where there are fewer."""
    values, vectors = np.linalg.eigh(centred.T.astype(np.float64) @ centred)
    axes = vectors[:, ::-1][:, :count]
    largest = np.abs(axes).argmax(axis=0)
    signs = np.sign(axes[largest, np.arange(axes.shape[1])])
    axes = axes * np.where(values[::-1][:count] > _CONSTANT**2, signs, 0)
    return np.pad(axes, ((0, 0), (0, count - axes.shape[1]))).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Directions:
    """Vectors of length 1, shortened and rounded to bytes; their dot products are cosines.

    Attributes
    ----------
    numbers : (n, K) int8
    scale : float
        The cosine of two rows is their dot product times this.
    error : float
        By how much a cosine is off at most, among all pairs.
    """

    numbers: NDArray[np.int8]
    scale: float
    error: float

    @classmethod
    def of(cls, vectors: NDArray[Any], width: int = 256) -> Directions:
        """Shorten vectors to their main directions.

        Parameters
        ----------
        vectors : (n, C) floats
        width : int
            K, at most.
        """
        rows = normalize_rows(vectors)
        _, directions = np.linalg.eigh(rows.T.astype(np.float64) @ rows)
        short = rows @ directions[:, ::-1][:, :width].astype(np.float32)
        step = float(np.abs(short).max(initial=0.0)) / 127 or 1.0
        numbers = np.rint(short / step).astype(np.int8)
        return cls(numbers, step * step, _largest_error(rows, numbers, step))


def _largest_error(rows: Floats, numbers: NDArray[np.int8], step: float) -> float:
    """Compare all cosines with what the bytes give, some rows at a time."""
    rounded = numbers.astype(np.float32) * step
    parts = (slice(i, i + 512) for i in range(0, len(rows), 512))
    return max(
        (float(np.abs(rows[p] @ rows.T - rounded[p] @ rounded.T).max()) for p in parts), default=0.0
    )
