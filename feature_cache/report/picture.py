"""One frame beside its embedding, as pixels: for a file, and for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from .outlines import draw_edges
from .thumbnails import Bytes, resize_to, shrink_image, to_bytes

if TYPE_CHECKING:
    from .colours import Palette
    from .frame_pictures import FrameView

_Scalar = TypeVar("_Scalar", bound=np.generic)
_OUTLINE = (255, 216, 77)
_GAP = 4
_SMALLEST = 512
"""Frames with a shorter longest side are enlarged by a whole factor, so that outlines are fine."""


def compose_picture(view: FrameView, palette: Palette | None) -> Bytes:
    """Draw a frame with its outlines, and its embedding to the right, where it is stored.

    Parameters
    ----------
    view : FrameView
    palette : Palette or None
        None where nothing is stored.

    Returns
    -------
    (H, W, 3) uint8
    """
    factor = max(1, _SMALLEST // max(view.image.shape))
    grey = _enlarge(to_bytes(view.image), factor)
    left = np.repeat(grey[..., None], 3, axis=2)
    mask = None if view.mask is None else _enlarge(view.mask, factor)
    if mask is not None:
        left[draw_edges(mask)] = _OUTLINE
    right = _draw_embedding(view, mask, palette, grey.shape)
    if right is None:
        return left
    gap = np.full((len(left), _GAP, 3), 255, np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def _draw_embedding(
    view: FrameView,
    mask: NDArray[np.integer] | None,
    palette: Palette | None,
    shape: tuple[int, ...],
) -> Bytes | None:
    if palette is None:
        return None
    if view.grid is not None:
        return resize_to(palette.colour(view.grid), (shape[0], shape[1]))
    if view.regions is None or view.regions.labels is None or mask is None:
        return None
    table = np.zeros((len(view.regions.labels) + 1, 3), np.uint8)
    table[1:] = palette.colour(view.regions.features)
    rows = np.searchsorted(view.regions.labels, mask) + 1
    known = np.isin(mask, view.regions.labels)
    return table[np.where(known, rows, 0)]


def _enlarge(image: NDArray[_Scalar], factor: int) -> NDArray[_Scalar]:
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def draw_in_terminal(picture: Bytes, columns: int) -> str:
    """Write a picture as half blocks in 24-bit colours, two pixels a character.

    Parameters
    ----------
    picture : (H, W, 3) uint8
    columns : int
        At most so many characters a line.
    """
    factor = max(1, -(-picture.shape[1] // columns))
    small = np.rint(shrink_image(picture, factor)).astype(int)
    if len(small) % 2:
        small = np.concatenate([small, np.zeros_like(small[:1])])
    lines = (
        "".join(_half_block(*pair) for pair in zip(upper, lower, strict=True))
        for upper, lower in zip(small[::2].tolist(), small[1::2].tolist(), strict=True)
    )
    return "".join(f"{line}\x1b[0m\n" for line in lines)


def _half_block(upper: list[int], lower: list[int]) -> str:
    above, below = (";".join(map(str, colour)) for colour in (upper, lower))
    return f"\x1b[38;2;{above};48;2;{below}m▀"
