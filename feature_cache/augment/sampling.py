"""Numerics on pixels, written so that no bit depends on batch size, threads or device.

Everything here is elementwise float32 multiplication and addition (correctly rounded wherever
they run) or an exact integer sum. Some library kernels are not: on a CPU, torchvision's contrast
changes its last bit with the number of threads and with the batch (the order of a float sum), its
blur with the batch (another convolution is chosen), and on a GPU a convolution may run in TF32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..spec import Bounds

if TYPE_CHECKING:
    import torch

Coordinates: TypeAlias = NDArray[np.float64]
Source: TypeAlias = "tuple[Coordinates, Coordinates]"
"""Where each pixel of a result comes from: y and x, each of a shape that broadcasts to (H', W')."""

_Label = TypeVar("_Label", bound=np.generic)
_FIXED_POINT = 2.0**30


def clamp(frames: torch.Tensor, bounds: Bounds | None) -> torch.Tensor:
    """Clamp means of pixels to what the pixels are in: their weights' sum may be an ulp above 1."""
    return frames if bounds is None else frames.clamp_(*bounds)


def sample_bilinear(frames: torch.Tensor, source: Source, bounds: Bounds | None) -> torch.Tensor:
    """Sample frames between their pixels; beyond a frame is 0.

    Parameters
    ----------
    frames : (B, H, W) float32
    source : (H', W') each
        Pixel coordinates; whole numbers are pixel centres.
    bounds : (float, float) or None
        Which frames and result are within; None for any.

    Returns
    -------
    torch.Tensor
        (B, H', W') float32 on the frames' device.
    """
    import torch

    def put(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.tensor(array, device=frames.device)

    rows = [(put(i), put(w)) for i, w in _taps(source[0], frames.shape[1])]
    columns = [(put(i), put(w)) for i, w in _taps(source[1], frames.shape[2])]
    shape = np.broadcast_shapes(source[0].shape, source[1].shape)
    total = frames.new_zeros((len(frames), *shape))
    for y, weight_y in rows:
        for x, weight_x in columns:
            total.add_(frames[:, y, x].mul_(weight_y * weight_x))
    return clamp(total, bounds)


def _taps(source: Coordinates, size: int) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Give the two pixels around each coordinate along one axis, and their weights."""
    low = np.floor(source)
    upper_weight = source - low
    taps = []
    for index, weight in ((low, 1.0 - upper_weight), (low + 1.0, upper_weight)):
        weight = np.where((index >= 0) & (index < size), weight, 0.0)
        inside = np.clip(index, 0, size - 1).astype(np.int64)
        taps.append((inside, weight.astype(np.float32)))
    return taps


def sample_nearest(mask: NDArray[_Label], source: Source) -> NDArray[_Label]:
    """Sample a mask at the nearest pixel (of two, the one below or to the right); 0 outside it.

    Parameters
    ----------
    mask : (H, W) integer
    source : (H', W') each
        Pixel coordinates; whole numbers are pixel centres.

    Returns
    -------
    ndarray
        (H', W'), the mask's dtype.
    """
    index = [np.floor(axis + 0.5) for axis in source]
    inside = [(i >= 0) & (i < size) for i, size in zip(index, mask.shape, strict=True)]
    y, x = (
        np.clip(i, 0, size - 1).astype(np.int64) for i, size in zip(index, mask.shape, strict=True)
    )
    labels = mask[y, x]
    labels[~(inside[0] & inside[1])] = 0
    return labels


def change_contrast(frames: torch.Tensor, factor: float) -> torch.Tensor:
    """Blend each frame with its own mean: ``factor * frame + (1 - factor) * mean``, in 0..1.

    The formula of torchvision's ``adjust_contrast``; the mean is an exact sum of pixels in steps
    of 2**-30.
    """
    import torch

    steps = frames.mul(_FIXED_POINT).round_().to(torch.int64)
    totals = steps.sum(dim=(1, 2)).tolist()
    pixels = frames.shape[1] * frames.shape[2] * _FIXED_POINT
    offsets = [(1.0 - factor) * (total / pixels) for total in totals]
    offset = torch.tensor(offsets, dtype=torch.float32, device=frames.device)
    return frames.mul(factor).add_(offset[:, None, None]).clamp_(0.0, 1.0)


def blur(frames: torch.Tensor, weights: list[float], bounds: Bounds | None) -> torch.Tensor:
    """Convolve frames with a symmetric separable kernel, mirrored at the border.

    Half of the result filters rows first, half columns first, so that it commutes with every flip
    and quarter turn to the last bit.

    Parameters
    ----------
    frames : (B, H, W) float32
    weights : list of float
        The kernel from its centre outwards.
    bounds : (float, float) or None
        Which frames and result are within; None for any.
    """
    rows_first = _blur_axis(_blur_axis(frames, weights, 1), weights, 2)
    columns_first = _blur_axis(_blur_axis(frames, weights, 2), weights, 1)
    return clamp(rows_first.add_(columns_first).mul_(0.5), bounds)


def _blur_axis(frames: torch.Tensor, weights: list[float], axis: int) -> torch.Tensor:
    import torch

    size, radius = frames.shape[axis], len(weights) - 1
    mirrored = np.pad(np.arange(size), radius, mode="reflect")
    padded = frames.index_select(axis, torch.tensor(mirrored, device=frames.device))
    total = frames.mul(weights[0])
    for distance, weight in enumerate(weights[1:], start=1):
        before = padded.narrow(axis, radius - distance, size)
        after = padded.narrow(axis, radius + distance, size)
        total.add_(before.add(after).mul_(weight))
    return total


class BSplineField:
    """A smooth displacement field: cubic B-splines over a lattice of random displacements.

    Being weighted means of the lattice's values, no displacement is larger than `amplitude`; the
    field's slope along an axis is at most ``2 * amplitude / spacing``. Beyond the frame it goes
    on as at the border.

    Parameters
    ----------
    shape : (H, W)
    amplitude, spacing : float
        Pixels.
    uniforms : callable
        ``uniforms(n)`` gives n numbers in 0..1.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        amplitude: float,
        spacing: float,
        uniforms: Callable[[int], NDArray[np.float64]],
    ) -> None:
        self._shape, self._spacing = shape, spacing
        knots = [int((size - 1) / spacing) + 4 for size in shape]
        values = uniforms(2 * knots[0] * knots[1]).reshape(2, *knots)
        self._lattice = (values * 2.0 - 1.0) * amplitude

    def __call__(self, y: Coordinates, x: Coordinates) -> Source:
        """Give the displacements in y and x at points whose coordinates broadcast together."""
        rows, weights_y = self._basis(y, 0)
        columns, weights_x = self._basis(x, 1)
        dy = dx = np.zeros(np.broadcast_shapes(y.shape, x.shape))
        for i, weight_y in enumerate(weights_y):
            for j, weight_x in enumerate(weights_x):
                weight = weight_y * weight_x
                dy = dy + weight * self._lattice[0, rows + i, columns + j]
                dx = dx + weight * self._lattice[1, rows + i, columns + j]
        return dy, dx

    def _basis(
        self, coordinate: Coordinates, axis: int
    ) -> tuple[NDArray[np.int64], tuple[Coordinates, ...]]:
        """Give the first of four knots, and the four cubic basis functions, at each coordinate."""
        place = np.clip(coordinate, 0, self._shape[axis] - 1) / self._spacing
        knot = np.floor(place)
        t = place - knot
        s = 1.0 - t
        weights = (
            s * s * s / 6.0,
            (4.0 - 6.0 * t * t + 3.0 * t * t * t) / 6.0,
            (4.0 - 6.0 * s * s + 3.0 * s * s * s) / 6.0,
            t * t * t / 6.0,
        )
        return knot.astype(np.int64), weights
