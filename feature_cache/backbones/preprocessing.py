"""What becomes of a frame before a network sees it: its size, and the range of its pixels."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

from ..errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def check_input_size(size: int | tuple[int, int], multiple: int, name: str) -> tuple[int, int]:
    """Give an input size as (H, W).

    Raises
    ------
    BackboneError
        It is no positive multiple of the network's patch.
    """
    pair: Any = tuple(size) if isinstance(size, tuple | list) else (size, size)
    if len(pair) != 2 or any(
        not isinstance(n, Integral) or int(n) < multiple or int(n) % multiple for n in pair
    ):
        raise BackboneError(
            f"input size {size!r} of {name}: expected a whole number of pixels, or (H, W), each a "
            f"multiple of {multiple} and at least {multiple}"
        )
    return int(pair[0]), int(pair[1])


def round_up(shape: Sequence[int], stride: int) -> tuple[int, int]:
    """Give the least (H, W) of whole cells in which a shape fits."""
    height, width = (-(-length // stride) * stride for length in shape)
    return height, width


def scale_by_percentiles(frames: Tensor, low: float, high: float) -> Tensor:
    """Scale each frame linearly: its percentile `low` to 0, `high` to 1; nothing is clipped.

    Parameters
    ----------
    frames : (B, H, W) float32
    low, high : float
        0 to 100, with linear interpolation as NumPy's ``percentile``.

    Returns
    -------
    (B, H, W) float32
        A frame whose two percentiles are equal is scaled from its minimum to its maximum; zeros
        where these are.
    """
    ranked = frames.flatten(1).sort(dim=1).values
    bottom, top = (_percentile(ranked, q)[:, None, None] for q in (low, high))
    least, most = (ranked[:, place, None, None] for place in (0, -1))
    is_flat = bottom == top
    bottom, top = least.where(is_flat, bottom), most.where(is_flat, top)
    spread = top - bottom
    scaled = (frames - bottom) / spread.where(spread > 0, 1.0)
    return scaled.where(spread > 0, 0.0)


def _percentile(ranked: Tensor, q: float) -> Tensor:
    place = q / 100 * (ranked.shape[1] - 1)
    below = int(place)
    above = min(below + 1, ranked.shape[1] - 1)
    return ranked[:, below].lerp(ranked[:, above], place - below)
