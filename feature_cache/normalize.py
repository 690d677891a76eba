"""From a frame's pixels as stored to those that a backbone sees: the range between percentiles.

A percentile needs two order statistics, not a sorted frame: integers of up to 16 bits are counted,
other pixels are partitioned. The numbers are those of `numpy.percentile` to the bit.

Notes
-----
The percentiles, and clipping, are those of ``percentile_norm`` in trackastra-pretrained-feats
0.0.2, which works in place and gives NaN for a constant frame.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import FrameError
from .hashing import frame_pixels
from .spec import Normalization

if TYPE_CHECKING:
    import torch

Pixels: TypeAlias = NDArray[np.float32]

_BLOCK = 1 << 19
"""Pixels counted at once: 4 MB of integers."""
_SAMPLE = 1 << 10
"""So many pixels are looked at before a frame of real numbers is taken for one of integers."""


class ConstantFrameWarning(UserWarning):
    """A frame of one intensity: normalised to zeros."""


def normalize(
    frame: NDArray[np.generic], normalization: Normalization, where: str = "the frame"
) -> Pixels:
    """Map a frame's pixels to the range of a normalisation, in a new array.

    Parameters
    ----------
    frame : (H, W) or (Z, H, W), bool, integer or float
        As stored, or as float32, which gives the same; not changed.
    normalization : Normalization
    where : str
        What to call the frame in a warning or an error.

    Returns
    -------
    same shape, float32
        Between minimum and maximum where the two percentiles are equal, as in a frame of few
        small bright cells on black; all zeros, with a `ConstantFrameWarning`, where these are.

    Raises
    ------
    FrameError, FrameTypeError
        The pixels are too far apart for float32; as `feature_cache.hashing.frame_digest`.
    """
    pixels = frame_pixels(frame, where)
    if normalization.name == "none":
        return pixels
    low, high = _percentiles(frame, pixels, normalization)
    if not high > low:
        low, high = pixels.min(), pixels.max()
    if check_bounds(low, high, where, stacklevel=3):
        return np.zeros_like(pixels)
    with np.errstate(over="ignore"):  # an outlier's infinity is clipped to 0 or 1
        pixels -= low
        pixels /= high - low
    return np.clip(pixels, np.float32(0), np.float32(1), out=pixels)


def check_bounds(low: np.float32, high: np.float32, where: str, *, stacklevel: int = 2) -> bool:
    """Tell whether a frame, whose pixels `low` and `high` become 0 and 1, is constant; warn if so.

    Raises
    ------
    FrameError
        They are too far apart for float32.
    """
    if high == low:
        message = f"{where} is constant: it is normalised to zeros"
        warnings.warn(message, ConstantFrameWarning, stacklevel=stacklevel + 1)
        return True
    with np.errstate(over="ignore"):
        span = high - low
    if not np.isfinite(span):
        raise FrameError(
            f"{where} goes from {low:.4g} to {high:.4g}, too far for float32: rescale its pixels"
        )
    return False


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a percentile lies among sorted pixels: between two ranks, at a fraction."""

    below: int
    above: int
    fraction: float

    @classmethod
    def of(cls, percentile: float, count: int) -> _Place:
        position = (count - 1) * (percentile / 100)
        below = min(math.floor(position), count - 1)
        return cls(below, min(below + 1, count - 1), position - below)

    def between(self, below: Any, above: Any, widen: Callable[[Any], Any]) -> Any:
        """Interpolate two float32 numbers as `numpy.percentile` does: from the nearer, in double.

        Their difference is of float32. They may be arrays or tensors, which `widen` makes double.
        """
        step = widen(above - below)
        if self.fraction >= 0.5:
            return widen(above) - step * (1 - self.fraction)
        return widen(below) + step * self.fraction


def _places(normalization: Normalization, count: int) -> tuple[_Place, _Place]:
    return _Place.of(normalization.low, count), _Place.of(normalization.high, count)


def _percentiles(
    frame: NDArray[np.generic], pixels: Pixels, normalization: Normalization
) -> tuple[np.float32, np.float32]:
    places = _places(normalization, pixels.size)
    ranks = sorted({rank for place in places for rank in (place.below, place.above)})
    integers = _small_integers(np.asarray(frame), pixels)
    found = _select(pixels, ranks) if integers is None else _count(integers, ranks)
    with np.errstate(over="ignore", invalid="ignore"):  # what is too far apart is told later
        low, high = (
            np.float32(p.between(found[p.below], found[p.above], np.float64)) for p in places
        )
    return low, high


def _small_integers(frame: NDArray[np.generic], pixels: Pixels) -> NDArray[np.integer] | None:
    """Give a frame's pixels as integers of up to 16 bits; None if they are others."""
    if frame.dtype.kind in "bui" and frame.dtype.itemsize <= 2:
        return frame.view(np.uint8) if frame.dtype.kind == "b" else frame  # type: ignore[return-value]
    flat = pixels.reshape(-1)
    sample = flat[:: max(1, flat.size // _SAMPLE)]
    if not np.array_equal(np.floor(sample), sample):
        return None
    kind = np.uint16 if flat.min() >= 0 else np.int16
    limits = np.iinfo(kind)
    if not limits.min <= flat.min() <= flat.max() <= limits.max:
        return None
    integers = flat.astype(kind)
    return integers if np.array_equal(integers, flat) else None


def _count(integers: NDArray[np.integer], ranks: Sequence[int]) -> dict[int, np.float32]:
    """Give the numbers of some ranks among integers of few values, by their exact histogram."""
    flat = integers.reshape(-1)
    low, high = int(flat.min()), int(flat.max())
    counts = np.zeros(high - low + 1, np.int64)
    for start in range(0, flat.size, _BLOCK):
        steps = np.subtract(flat[start : start + _BLOCK], low, dtype=np.intp)
        counts += np.bincount(steps, minlength=len(counts))
    values = low + np.searchsorted(np.cumsum(counts), ranks, side="right")
    return dict(zip(ranks, values.astype(np.float32), strict=True))


def _select(pixels: Pixels, ranks: Sequence[int]) -> dict[int, np.float32]:
    """Give the numbers of some ranks, ascending, among any pixels."""
    found: dict[int, np.float32] = {}
    rest = pixels.flatten()
    for rank in reversed(ranks):
        if rank == len(rest) - 1:
            found[rank] = rest.max()
        else:
            rest.partition(rank)
            found[rank], rest = rest[rank], rest[:rank]
    return found


@dataclass(frozen=True, slots=True)
class Normalized:
    """Frames normalised on a device, and what is to be told of them once it is known there.

    Attributes
    ----------
    pixels : (B, H, W) or (B, Z, H, W) float32
        Meaningless for a frame that `check` refuses.
    bounds : (B, 2) float32, or None
        Which pixels of each frame became 0 and 1; None where the normalisation changes nothing.
    """

    pixels: torch.Tensor
    bounds: torch.Tensor | None

    def check(self, where: Sequence[str]) -> None:
        """Warn and raise as `normalize` does, of each frame by its name; waits for the device."""
        if self.bounds is not None:
            for (low, high), name in zip(self.bounds.cpu().numpy(), where, strict=True):
                check_bounds(low, high, name, stacklevel=3)


def normalize_on(frames: torch.Tensor, normalization: Normalization) -> Normalized:
    """Normalise frames as `normalize` does, on the device where they lie, without waiting for it.

    Parameters
    ----------
    frames : (B, H, W) or (B, Z, H, W), bool, integer or float
        As stored; finite as float32, which whoever digested them knows. Not changed.
    normalization : Normalization

    Returns
    -------
    Normalized
        Same numbers as of `normalize`, frame by frame: `Normalized.check` says what is wrong.
    """
    import torch

    pixels = frames.float() + 0.0  # -0.0 is 0.0
    if normalization.name == "none":
        return Normalized(pixels, None)
    shape, flat = pixels.shape, pixels.flatten(1)
    last = flat.shape[1] - 1
    places = _places(normalization, flat.shape[1])
    ranks = sorted({0, last, *(rank for place in places for rank in (place.below, place.above))})
    countable = frames.dtype.itemsize <= 2 and not frames.is_floating_point()
    found = _count_on(frames.flatten(1), ranks) if countable else _sort_on(flat, ranks)
    low, high = (p.between(found[p.below], found[p.above], torch.Tensor.double) for p in places)
    bounds = torch.stack([low, high], dim=1).float()
    apart = bounds[:, 1:] > bounds[:, :1]
    bounds = torch.where(apart, bounds, torch.stack([found[0], found[last]], dim=1))
    span = bounds[:, 1:] - bounds[:, :1]
    span = torch.where(span == 0, torch.ones_like(span), span)
    unit = flat.sub_(bounds[:, :1]).div_(span).clamp_(0.0, 1.0)
    return Normalized(unit.view(shape), bounds)


def _count_on(frames: torch.Tensor, ranks: Sequence[int]) -> dict[int, torch.Tensor]:
    """Give the numbers (B,) of some ranks among the integers (B, P) of up to 16 bits."""
    import torch

    bins = 1 << 8 * frames.dtype.itemsize
    low = 0 if frames.dtype == torch.bool else torch.iinfo(frames.dtype).min
    first = torch.arange(len(frames), device=frames.device, dtype=torch.int32)[:, None] * bins
    places = (frames.to(torch.int32) - low + first).view(-1)
    ones = torch.ones((), dtype=torch.int32, device=frames.device).expand_as(places)
    counts = torch.zeros(len(frames) * bins, dtype=torch.int32, device=frames.device)
    reached = counts.index_add_(0, places, ones).view(-1, bins).cumsum(dim=1)
    return {rank: ((reached <= rank).sum(dim=1) + low).float() for rank in ranks}


def _sort_on(pixels: torch.Tensor, ranks: Sequence[int]) -> dict[int, torch.Tensor]:
    """Give the numbers (B,) of some ranks among any pixels (B, P)."""
    ordered = pixels.sort(dim=1).values
    return {rank: ordered[:, rank] for rank in ranks}
