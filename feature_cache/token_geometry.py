"""How a draw changes what a sample says of its tokens' places and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augment import Draw
from .errors import FrameError

Doubles: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Placed:
    """Tokens of a sample, and the draw that moves them."""

    coords: Tensor
    """(N, 1 + ndim) float32, (t, y, x) or (t, z, y, x) in pixels."""
    features: Tensor
    """(N, F) float32. Shallow features."""
    draw: Draw
    shape: tuple[int, int]
    """(H, W). Of the frame that the draw is applied to."""


def map_tokens(samples: Sequence[Placed], columns: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Move tokens to where draws put them, and change what is said of the shapes of their regions.

    Several samples at once cost little more than one, and each gets what it gets alone.

    Parameters
    ----------
    samples : sequence of Placed
        Of as many dimensions and features; not changed.
    columns : sequence of str
        What each shallow feature is, F names; an inertia tensor is ``ndim * ndim`` columns of that
        name.

    Returns
    -------
    list of ((N, 1 + ndim) float32, (N, F) float32)
        Coordinates and shallow features of each sample.

    Raises
    ------
    FrameError
        Places that are no finite numbers.

    Notes
    -----
    With the draw's linear part J at a region, areas grow by ``|det J|``, diameters by its root of
    order ndim, and second moments C of the pixels become ``J C J^T``; scikit-image's inertia tensor
    is ``tr(C) 1 - C``.
    """
    if not samples:
        return []
    columns, counts = tuple(columns), [len(one.coords) for one in samples]
    moved = torch.cat([one.coords for one in samples])
    changed = torch.cat([one.features for one in samples])
    places = moved.numpy()[:, -2:]
    # of float32, the sum doesn't overflow
    points = places.astype(np.float64)
    if not math.isfinite(points.sum()):
        raise FrameError("tokens are at places that are no finite numbers")
    maps = _maps_of(samples, columns)
    y, x = points.T
    places[:, 0] = maps[:, 0] * y + maps[:, 1] * x + maps[:, 2]
    places[:, 1] = maps[:, 3] * y + maps[:, 4] * x + maps[:, 5]
    if columns:
        values, end = changed.numpy(), _POINT + len(columns)
        before = values.astype(np.float64)
        values[:] = before * maps[:, _POINT:end]
        if "inertia_tensor" in columns:
            first, size = columns.index("inertia_tensor"), columns.count("inertia_tensor")
            block, turns = slice(first, first + size), maps[:, end:].reshape(len(maps), size, size)
            values[:, block] = np.einsum("nf,nfg->ng", before[:, block], turns)
    return list(zip(torch.split(moved, counts), torch.split(changed, counts), strict=True))


_POINT = 6
"""Numbers of a map of points: two rows of a matrix (2, 3)."""


def _maps_of(samples: Sequence[Placed], columns: tuple[str, ...]) -> Doubles:
    """Give the map of each token: (N, K), of points, then factors, then turns of inertia."""
    maps, rows, first = [], [], 0
    for one in samples:
        n, ndim = len(one.coords), one.coords.shape[1] - 1
        same = _same_map(one.draw, one.shape, columns, ndim)
        maps.append(_local_maps(one, columns, ndim) if same is None else same)
        rows.append(np.arange(first, first + n) if same is None else np.full(n, first))
        first += len(maps[-1])
    return np.concatenate(maps).take(np.concatenate(rows), axis=0)


@lru_cache(maxsize=1 << 12)
def _same_map(
    draw: Draw, shape: tuple[int, int], columns: tuple[str, ...], ndim: int
) -> Doubles | None:
    """Give the map, (1, K), of a draw that is the same everywhere; None for any other."""
    matrix = draw.matrix(shape)
    return None if matrix is None else _pack(matrix[None, :2], columns, ndim)


def _local_maps(sample: Placed, columns: tuple[str, ...], ndim: int) -> Doubles:
    """Give the map, (N, K), of each token, by the draw's linear part there."""
    points = sample.coords.numpy()[:, -2:].astype(np.float64)
    linear = sample.draw.jacobians(points, sample.shape)
    shift = sample.draw.map_points(points, sample.shape)[..., None] - linear @ points[..., None]
    return _pack(np.concatenate([linear, shift], axis=2), columns, ndim)


def _pack(matrices: Doubles, columns: tuple[str, ...], ndim: int) -> Doubles:
    """Put side by side matrices (n, 2, 3) and how shallow features change, a row for each."""
    parts = [matrices, *_plan_shallow(matrices[..., :2], columns, ndim)]
    # not -1: there may be no token
    flat = [part.reshape(len(part), math.prod(part.shape[1:])) for part in parts]
    return np.concatenate(flat, axis=1)


def _plan_shallow(
    jacobians: Doubles, columns: tuple[str, ...], ndim: int
) -> tuple[Doubles, Doubles]:
    """Give factors (n, F) of the columns, and maps (n, D, D) of flat inertia tensors."""
    growth = np.abs(np.linalg.det(jacobians))
    powers = {"area": 1.0, "equivalent_diameter_area": 1 / ndim}
    factors = growth[:, None] ** [powers.get(name, 0.0) for name in columns]
    each = np.eye(ndim**2).reshape(1, -1, ndim, ndim)
    turns = _map_inertia(each, jacobians[:, None]).reshape(len(jacobians), ndim**2, ndim**2)
    return factors, turns


def _map_inertia(tensors: Doubles, jacobians: Doubles) -> Doubles:
    """Map (..., ndim, ndim) inertia tensors; a draw leaves the z axis alone."""
    ndim = tensors.shape[-1]
    one = np.eye(ndim)
    linear = np.broadcast_to(one, (*jacobians.shape[:-2], ndim, ndim)).copy()
    linear[..., -2:, -2:] = jacobians
    moments = _trace(tensors) / (ndim - 1) * one - tensors
    moved = linear @ moments @ linear.swapaxes(-2, -1)
    return _trace(moved) * one - moved


def _trace(matrices: Doubles) -> Doubles:
    return np.trace(matrices, axis1=-2, axis2=-1)[..., None, None]


def rotate_features(features: Tensor, coords: Tensor, shape: tuple[int, int]) -> Tensor:
    """Turn pairs of feature dimensions by angles from the tokens' y and x.

    Dimensions 0 and 1 turn by ``2 pi y / H``, 2 and 3 by ``2 pi x / W``, and so on in turn; a last
    odd one stays. Lengths do not change.

    Parameters
    ----------
    features : (N, C) float32; not changed
    coords : (N, 1 + ndim) float32, the last two columns (y, x) in pixels
    shape : (H, W)

    Returns
    -------
    (N, C) float32

    Notes
    -----
    What Trackastra's pull request 61 calls ``rotate_features``, after RoPE (Su et al. 2021). That
    of trackastra-pretrained-feats uses one of the two angles for all pairs; here both are used.
    """
    pairs = features.shape[1] // 2
    angles = 2 * math.pi * coords[:, -2:] / torch.tensor(shape, dtype=coords.dtype)
    turns = angles.repeat(1, -(-pairs // 2))[:, :pairs]
    cos, sin = torch.cos(turns), torch.sin(turns)
    rotated = features.clone()
    one, two = features[:, 0 : 2 * pairs : 2], features[:, 1 : 2 * pairs : 2]
    rotated[:, 0 : 2 * pairs : 2] = one * cos - two * sin
    rotated[:, 1 : 2 * pairs : 2] = one * sin + two * cos
    return rotated
