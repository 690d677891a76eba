"""How a draw changes what a sample says of its tokens' places and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augment import Draw
from .errors import FrameError

Doubles: TypeAlias = NDArray[np.float64]


def map_coords(coords: Tensor, draw: Draw, shape: tuple[int, int]) -> Tensor:
    """Move tokens to where a draw puts them.

    Parameters
    ----------
    coords : (N, 1 + ndim) float32, (t, y, x) or (t, z, y, x) in pixels; not changed
    draw : Draw
    shape : (H, W)
        Of the frame that the draw was applied to.

    Returns
    -------
    (N, 1 + ndim) float32

    Raises
    ------
    FrameError
        Places that are no finite numbers.
    """
    moved, affine = coords.numpy().copy(), _affine(draw, shape)
    points = moved[:, -2:].astype(np.float64)
    if affine is None:
        points = draw.map_points(points, shape)
    elif not math.isfinite(points.sum()):  # of float32, it doesn't overflow
        raise FrameError("tokens are at places that are no finite numbers")
    else:
        linear, shift = affine
        points = points @ linear
        points += shift
    moved[:, -2:] = points
    return torch.from_numpy(moved)


@lru_cache(maxsize=1 << 12)
def _affine(draw: Draw, shape: tuple[int, int]) -> tuple[Doubles, Doubles] | None:
    """Give a draw's map of points, where it is one: (2, 2) from the right, and (2,) to add."""
    matrix = draw.matrix(shape)
    return None if matrix is None else (matrix[:2, :2].T.copy(), matrix[:2, 2].copy())


def map_shallow(
    features: Tensor, columns: Sequence[str], coords: Tensor, draw: Draw, shape: tuple[int, int]
) -> Tensor:
    """Change shallow features as a draw stretches and turns the regions they describe.

    Parameters
    ----------
    features : (N, F) float32; not changed
    columns : sequence of str
        What each column is, F names; an inertia tensor is ``ndim * ndim`` columns of that name.
    coords : (N, 1 + ndim) float32
        Where the regions are, before the draw.
    draw, shape
        As `map_coords`.

    Returns
    -------
    (N, F) float32

    Notes
    -----
    With the draw's linear part J at a region, areas grow by ``|det J|``, diameters by its root of
    order ndim, and second moments C of the pixels become ``J C J^T``; scikit-image's inertia tensor
    is ``tr(C) 1 - C``.
    """
    columns, ndim = tuple(columns), coords.shape[1] - 1
    if _affine(draw, shape) is None:
        jacobians = draw.jacobians(coords[:, -2:].numpy(), shape)
        factors, turns = _plan_shallow(jacobians, columns, ndim)
    else:
        factors, turns = _plan_affine(draw, shape, columns, ndim)
    before = features.numpy().astype(np.float64)
    mapped = before * factors
    if "inertia_tensor" in columns:
        first = columns.index("inertia_tensor")
        block = slice(first, first + ndim**2)
        np.einsum("nf,nfg->ng", before[:, block], turns, out=mapped[:, block])
    return torch.from_numpy(mapped.astype(np.float32))


@lru_cache(maxsize=1 << 12)
def _plan_affine(
    draw: Draw, shape: tuple[int, int], columns: tuple[str, ...], ndim: int
) -> tuple[Doubles, Doubles]:
    """Plan for a draw that is the same everywhere, once."""
    return _plan_shallow(draw.jacobians([[0.0, 0.0]], shape), columns, ndim)


def _plan_shallow(
    jacobians: Doubles, columns: tuple[str, ...], ndim: int
) -> tuple[Doubles, Doubles]:
    """Give factors (n, F) of the columns, and maps (n, D, D) of flat inertia tensors."""
    growth = np.abs(np.linalg.det(jacobians))
    powers = {"area": 1.0, "equivalent_diameter_area": 1 / ndim}
    factors = growth[:, None] ** [powers.get(name, 0.0) for name in columns]
    each = np.eye(ndim**2).reshape(1, -1, ndim, ndim)
    turns = _map_inertia(each, jacobians[:, None]).reshape(len(jacobians), -1, ndim**2)
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
