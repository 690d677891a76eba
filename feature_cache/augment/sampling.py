"""Numerics on pixels, written so that no bit depends on batch size, threads or device.

Everything here is elementwise float32 multiplication and addition (correctly rounded wherever
they run) or an exact integer sum. Some library kernels are not: on a CPU, torchvision's contrast
changes its last bit with the number of threads and with the batch (the order of a float sum), its
blur with the batch (another convolution is chosen), and on a GPU a convolution may run in TF32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..spec import Bounds

if TYPE_CHECKING:
    import torch

Source: TypeAlias = tuple[Any, Any]
"""Where pixels come from: y and x, float64, each of a shape that broadcasts to theirs."""
FindSource: TypeAlias = "Callable[[torch.Tensor, torch.Tensor], Source]"
"""Gives the source of pixels whose coordinates are y (H', 1) and x (1, W')."""

_Label = TypeVar("_Label", bound=np.generic)
_FIXED_POINT = 2.0**30
_STRIP_PIXELS = 1 << 16
"""Pixels that a CPU computes at once: what comes between stays in its cache."""


def divide(numbers: Any, divisor: float) -> Any:
    """Divide an array or a tensor; by a plain number, a GPU would multiply with its inverse."""
    if isinstance(numbers, np.ndarray):
        return numbers / divisor
    return numbers / numbers.new_full((), divisor)


def upload(array: NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Bring an array to a device; to a GPU from pinned memory, without waiting for it."""
    import torch

    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def clamp(frames: torch.Tensor, bounds: Bounds | None) -> torch.Tensor:
    """Clamp means of pixels to what the pixels are in: their weights' sum may be an ulp above 1."""
    return frames if bounds is None else frames.clamp_(*bounds)


def sample_bilinear(frames: torch.Tensor, find: FindSource, bounds: Bounds | None) -> torch.Tensor:
    """Sample frames (B, H, W) float32 between their pixels, in their shape; beyond a frame is 0.

    The source is computed on their device; of its coordinates, whole numbers are pixel centres.
    Frames and result are within `bounds`.
    """
    _, height, width = frames.shape
    total, flat = frames.new_zeros(frames.shape), frames.flatten(1)
    y, x = _coordinates((height, width), frames.device)
    for lines in _strips(frames):
        source = find(y[lines], x)
        rows, columns = _taps(source[0], height), _taps(source[1], width)
        for first, weight_y in [(row * width, weight) for row, weight in rows]:
            for column, weight_x in columns:
                place = first + column
                taken = flat.index_select(1, place.view(-1)).view(-1, *place.shape)
                total[:, lines].add_(taken.mul_(weight_y * weight_x))
    return clamp(total, bounds)


def _strips(frames: torch.Tensor) -> Iterator[slice]:
    """Give the lines that are computed at once: on a GPU all."""
    count, height, width = frames.shape
    on_cpu = frames.device.type == "cpu"
    lines = max(1, _STRIP_PIXELS // max(1, count * width)) if on_cpu else height
    for start in range(0, height, lines):
        yield slice(start, start + lines)


def _taps(source: torch.Tensor, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Give the two pixels around each coordinate along one axis, and their weights."""
    low = source.floor()
    upper_weight = source - low
    taps = []
    for index, weight in ((low, 1.0 - upper_weight), (low + 1.0, upper_weight)):
        inside = (index >= 0) & (index < size)
        taps.append((index.clamp(0, size - 1).long(), weight.mul(inside).float()))
    return taps


def nearest_places(find: FindSource, shape: tuple[int, int]) -> NDArray[np.integer[Any]]:
    """Find the pixel nearest to each source; of two the one below or to the right.

    Returns
    -------
    ndarray
        (H, W) integers: places in the flattened mask, its size for what comes from outside.
    """
    import torch

    places = _places(find(*_coordinates(shape, torch.device("cpu"))), shape).numpy()
    return places.astype(np.int32 if places.size < 2**31 else np.int64)


def sample_nearest(mask: NDArray[_Label], places: NDArray[np.integer[Any]]) -> NDArray[_Label]:
    """Take a mask's labels from `nearest_places`; 0 outside it."""
    return np.append(mask, mask.dtype.type(0)).take(places)


def sample_nearest_on(rows: torch.Tensor, find: FindSource) -> torch.Tensor:
    """Sample (Z, H, W) integers as `sample_nearest` does, on their device."""
    import torch

    depth, height, width = rows.shape
    places = _places(find(*_coordinates((height, width), rows.device)), (height, width))
    padded = torch.cat([rows.flatten(1), rows.new_zeros((depth, 1))], dim=1)
    return padded.index_select(1, places.view(-1)).view(rows.shape)


def _places(source: Source, shape: tuple[int, int]) -> torch.Tensor:
    import torch

    y, x = (axis.add(0.5).floor_() for axis in source)
    inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1])
    places = y.clamp(0, shape[0] - 1).mul_(shape[1]).add_(x.clamp(0, shape[1] - 1))
    return torch.where(inside, places.long(), shape[0] * shape[1])


def _coordinates(shape: tuple[int, int], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    y, x = (torch.arange(length, dtype=torch.float64, device=device) for length in shape)
    return y[:, None], x[None]


def change_contrast(frames: torch.Tensor, factor: float) -> torch.Tensor:
    """Blend each frame with its own mean: ``factor * frame + (1 - factor) * mean``, in 0..1.

    The formula of torchvision's ``adjust_contrast``; the mean is an exact sum of pixels in steps
    of 2**-30.
    """
    import torch

    totals = torch.zeros(len(frames), dtype=torch.int64, device=frames.device)
    for lines in _strips(frames):
        steps = frames[:, lines].mul(_FIXED_POINT).round_().to(torch.int64)
        totals += steps.sum(dim=(1, 2))
    means = divide(totals.double(), frames.shape[1] * frames.shape[2] * _FIXED_POINT)
    offset = means.mul(1.0 - factor).float()
    return frames.mul(factor).add_(offset[:, None, None]).clamp_(0.0, 1.0)


def blur(frames: torch.Tensor, weights: list[float], bounds: Bounds | None) -> torch.Tensor:
    """Convolve frames with a symmetric separable kernel, mirrored at the border.

    Half of the result filters rows first, half columns first, so that it commutes with every flip
    and quarter turn to the last bit. The weights are the kernel's from its centre outwards; frames
    (B, H, W) float32 and result are within `bounds`.
    """
    import torch

    radius, result = len(weights) - 1, frames.new_empty(frames.shape)
    padded = _mirror(_mirror(frames, radius, 1), radius, 2)
    for lines in _strips(frames):
        block = padded[:, lines.start : lines.stop + 2 * radius]
        rows_first = _convolve(_convolve(block, weights, 1), weights, 2)
        columns_first = _convolve(_convolve(block, weights, 2), weights, 1)
        torch.add(rows_first, columns_first, out=result[:, lines]).mul_(0.5)
    return clamp(result, bounds)


def _mirror(frames: torch.Tensor, radius: int, axis: int) -> torch.Tensor:
    """Put so many mirrored lines before and after an axis; the border itself stands once."""
    import torch

    size = frames.shape[axis]
    if radius < size:
        first, last = (frames.narrow(axis, at, radius) for at in (1, size - 1 - radius))
        return torch.cat([first.flip(axis), frames, last.flip(axis)], dim=axis)
    mirrored = np.pad(np.arange(size), radius, mode="reflect")  # to and fro in a narrow frame
    return frames.index_select(axis, upload(mirrored, frames.device))


def _convolve(padded: torch.Tensor, weights: list[float], axis: int) -> torch.Tensor:
    """Convolve along an axis, which loses the lines that were put before and after it."""
    import torch

    radius = len(weights) - 1
    size = padded.shape[axis] - 2 * radius
    total = padded.narrow(axis, radius, size).mul(weights[0])
    pair = torch.empty_like(total)
    for distance, weight in enumerate(weights[1:], start=1):
        left = padded.narrow(axis, radius - distance, size)
        right = padded.narrow(axis, radius + distance, size)
        total.add_(torch.add(left, right, out=pair).mul_(weight))
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

    def __call__(self, y: Any, x: Any) -> Source:
        """Give the displacements in y and x at points whose coordinates broadcast together.

        Arrays for arrays. Tensors (H, 1) and (1, W) for tensors.
        """
        rows, weights_y = self._basis(y, 0)
        columns, weights_x = self._basis(x, 1)
        values = self._values(rows, columns)
        dy = dx = y * 0.0 + x * 0.0
        for i, weight_y in enumerate(weights_y):
            for j, weight_x in enumerate(weights_x):
                weight, (value_y, value_x) = weight_y * weight_x, values(i, j)
                dy = dy + weight * value_y
                dx = dx + weight * value_x
        return dy, dx

    def _values(self, rows: Any, columns: Any) -> Callable[[int, int], Any]:
        """Give what finds the lattice's values (2, ...) so many rows and columns further on."""
        if isinstance(rows, np.ndarray):
            return lambda i, j: self._lattice[:, rows + i, columns + j]
        lattice = upload(self._lattice, rows.device)
        lines = [lattice.index_select(2, columns[0] + j) for j in range(4)]
        return lambda i, j: lines[j].index_select(1, rows[:, 0] + i)

    def _basis(self, coordinate: Any, axis: int) -> tuple[Any, tuple[Any, ...]]:
        """Give the first of four knots, and the four cubic basis functions, at each coordinate."""
        place = divide(coordinate.clip(0, self._shape[axis] - 1), self._spacing)
        knot = np.floor(place) if isinstance(place, np.ndarray) else place.floor()
        t = place - knot
        s = 1.0 - t
        weights = (
            divide(s * s * s, 6.0),
            divide(4.0 - 6.0 * t * t + 3.0 * t * t * t, 6.0),
            divide(4.0 - 6.0 * s * s + 3.0 * s * s * s, 6.0),
            divide(t * t * t, 6.0),
        )
        return knot.astype(np.int64) if isinstance(knot, np.ndarray) else knot.long(), weights
