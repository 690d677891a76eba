"""How a draw changes what a sample says of its tokens' places and shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .augment import Draw

SHALLOW = ("equivalent_diameter_area", "area", "inertia_tensor")
"""The shallow features that a draw's geometry changes; intensities and ``border_dist`` stay."""


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
    """
    moved = coords.clone()
    points = draw.map_points(coords[:, -2:].numpy(), shape)
    moved[:, -2:] = torch.from_numpy(points).to(coords.dtype)
    return moved


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
    if not len(features):
        return features
    jacobians = draw.jacobians(coords[:, -2:].numpy(), shape)
    growth = np.abs(np.linalg.det(jacobians))
    ndim = coords.shape[1] - 1
    mapped = features.numpy().astype(np.float64)
    names = np.array(columns)
    mapped[:, names == "area"] *= growth[:, None]
    mapped[:, names == "equivalent_diameter_area"] *= growth[:, None] ** (1 / ndim)
    inertia = names == "inertia_tensor"
    if inertia.any():
        tensors = mapped[:, inertia].reshape(-1, ndim, ndim)
        mapped[:, inertia] = _map_inertia(tensors, jacobians).reshape(len(mapped), -1)
    return torch.from_numpy(mapped).to(features.dtype)


def _map_inertia(
    tensors: NDArray[np.float64], jacobians: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Map (N, ndim, ndim) inertia tensors; a draw leaves the z axis alone."""
    ndim = tensors.shape[1]
    one = np.eye(ndim)
    linear = np.tile(one, (len(tensors), 1, 1))
    linear[:, -2:, -2:] = jacobians
    moments = _trace(tensors) / (ndim - 1) * one - tensors
    moved = linear @ moments @ linear.swapaxes(1, 2)
    return _trace(moved) * one - moved


def _trace(matrices: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.trace(matrices, axis1=1, axis2=2)[:, None, None]


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
