"""A linear linker: which of the candidates is a cell's parent, by a weighted sum of likenesses.

The weights are those of a conditional logit (McFadden, 1974) with a ridge: of all weights they make
the true parents most likely among their candidates. Fitted on one half of the time, tested on the
other, both ways. What the linker sees of a space of features are two numbers a pair, cosine and
distance of standardised vectors, so that a wide space has no more to fit than a narrow one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

from .cells import Floats
from .links import Links

Terms = Callable[[Links, NDArray[np.bool_]], Floats]
"""Gives (P, K), what the linker sees of each pair; may learn from the links marked (L,)."""
_BLOCK = 1 << 24
"""Bytes of vectors compared at once."""


def compare_distances(links: Links, known: NDArray[np.bool_]) -> Floats:
    """Give the distance of each pair, as it is."""
    return np.linalg.norm(links.offsets, axis=1, keepdims=True)


def compare_places(links: Links, known: NDArray[np.bool_]) -> Floats:
    """Give the distance of each pair, less the drift of the movie; of stacks, along z too."""
    offsets = links.offsets.copy()
    for movie in np.unique(links.movies):
        learned = known & (links.movies == movie) & (links.found >= 0)
        offsets[(links.movies == movie)[links.owners]] -= _drift(
            links.offsets[links.found[learned]], links.units[learned]
        )
    distance = np.linalg.norm(offsets, axis=1)
    return np.column_stack([distance, *np.abs(offsets[:, :-2].T)])


def _drift(moved: Floats, units: NDArray[np.int64]) -> Floats:
    """Give the mean motion of cells, as far as it surely is the same from frame to frame."""
    frames = [moved[units == unit].mean(axis=0) for unit in np.unique(units)]
    if len(frames) < 2:
        return np.zeros(moved.shape[1])
    mean, error = np.mean(frames, axis=0), np.var(frames, axis=0, ddof=1) / len(frames)
    return mean * np.clip(1 - 4 * error / np.maximum(mean**2, 1e-12), 0, 1)  # 0 within 2 errors


def compare_shapes(shapes: Floats) -> Terms:
    """Compare shapes (N, S): likeness, and how each measure changes."""

    def compare(links: Links, known: NDArray[np.bool_]) -> Floats:
        scaled = _standardize(shapes, links, known)
        changes = scaled[links.later[links.owners]] - scaled[links.earlier]
        return np.column_stack([_liken(scaled, links), changes, changes**2])

    return compare


def compare_features(features: NDArray[np.float32]) -> Terms:
    """Compare features (N, C): cosine and distance."""

    def compare(links: Links, known: NDArray[np.bool_]) -> Floats:
        return _liken(_standardize(features, links, known), links)

    return compare


def _standardize(
    vectors: NDArray[np.floating], links: Links, known: NDArray[np.bool_]
) -> NDArray[np.floating]:
    """Scale each dimension by its mean and deviation among the cells of the links known."""
    sample = vectors[links.later[known]]
    deviation = sample.std(axis=0)
    least = 0.01 * np.sqrt(np.mean(deviation**2))  # a dimension that hardly varies is rounding
    return (vectors - sample.mean(axis=0)) / np.maximum(deviation, least or 1.0)


def _liken(vectors: NDArray[np.floating], links: Links) -> Floats:
    """Give cosine and distance of each pair: (P, 2)."""
    squares = np.einsum("ij,ij->i", vectors, vectors).astype(np.float64)
    later, earlier = links.later[links.owners], links.earlier
    size = max(1, _BLOCK // (vectors.shape[1] * vectors.itemsize))
    blocks = [slice(start, start + size) for start in range(0, len(earlier), size)]
    products = np.concatenate(
        [np.einsum("ij,ij->i", vectors[later[one]], vectors[earlier[one]]) for one in blocks]
    )
    lengths = np.sqrt(squares[later] * squares[earlier])
    distances = np.sqrt(np.maximum(squares[later] + squares[earlier] - 2.0 * products, 0))
    return np.column_stack([products / np.maximum(lengths, 1e-12), distances])


def find_parents(links: Links, terms: Sequence[Terms]) -> Floats:
    """Link each half by what the other teaches; give for each cell whether its parent is found.

    Returns
    -------
    (L,) float64
        1 where the parent is first among the candidates, a part of it where several are.
    """
    hits = np.zeros(len(links))
    for known in (links.is_early, ~links.is_early):
        seen = np.column_stack([compare(links, known) for compare in terms])
        chosen = known[links.owners]
        deviation = seen[chosen].std(axis=0)
        scaled = (seen - seen[chosen].mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)
        scores = scaled @ _fit(scaled, links, known & (links.found >= 0))
        hits[~known] = _score(scores, links)[~known]
    return hits


def find_nearest(links: Links) -> Floats:
    """Give for each cell whether its parent is the nearest candidate: (L,), as `find_parents`."""
    return _score(-np.linalg.norm(links.offsets, axis=1), links)


def _fit(seen: Floats, links: Links, known: NDArray[np.bool_]) -> Floats:
    """Fit the weights of the terms (P, K) on the links marked: (K,); of none, zeros."""
    if not known.any():
        return np.zeros(seen.shape[1])
    counts = np.diff(links.starts)
    pairs = seen[known[links.owners]]
    first = np.cumsum([0, *counts[known][:-1]])
    truth = links.found[known] - links.starts[:-1][known] + first
    owners = np.repeat(np.arange(len(first)), counts[known])
    wanted = pairs[truth].sum(axis=0)

    def loss(weights: Floats) -> tuple[float, Floats]:
        scores = pairs @ weights
        scores -= np.maximum.reduceat(scores, first)[owners]
        odds = np.exp(scores)
        sums = np.add.reduceat(odds, first)
        value = np.log(sums).sum() - scores[truth].sum() + weights @ weights / 2
        return float(value), (odds / sums[owners]) @ pairs - wanted + weights

    return minimize(loss, np.zeros(seen.shape[1]), jac=True, method="L-BFGS-B").x


def _score(scores: Floats, links: Links) -> Floats:
    best = np.maximum.reduceat(scores, links.starts[:-1])
    is_best = scores >= (best - 1e-9 * np.maximum(1, np.abs(best)))[links.owners]
    ties = np.add.reduceat(is_best.astype(np.float64), links.starts[:-1])
    return np.where(links.found >= 0, is_best[links.found] / ties, 0.0)
