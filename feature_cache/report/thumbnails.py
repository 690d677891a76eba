"""Small pictures: shrinking, colouring, encoding."""

from __future__ import annotations

import base64
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


def shrink_factor(shape: tuple[int, int], longest: int) -> int:
    """Give the whole number by which a frame is shrunk, so that no side is longer."""
    return max(1, -(-max(shape) // longest))


def shrink_image(image: NDArray[Any], factor: int) -> NDArray[np.float32]:
    """Average blocks of `factor` x `factor` pixels, smaller ones at the lower and right edges.

    Parameters
    ----------
    image : (H, W) or (H, W, C)
    factor : int

    Returns
    -------
    (ceil(H / factor), ceil(W / factor)) or the same with C, float32
    """
    rows, columns = (np.arange(0, length, factor) for length in image.shape[:2])
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float64), rows, 0), columns, 1)
    heights = np.diff(np.append(rows, image.shape[0]))
    widths = np.diff(np.append(columns, image.shape[1]))
    counts = np.outer(heights, widths)
    return (sums / counts.reshape(*counts.shape, *(1,) * (image.ndim - 2))).astype(np.float32)


def to_bytes(image: NDArray[Any]) -> Bytes:
    """Turn pixels in 0..1 into (…) uint8."""
    return np.clip(np.rint(np.asarray(image, np.float32) * 255), 0, 255).astype(np.uint8)


def resize_to(image: Bytes, shape: tuple[int, int]) -> Bytes:
    """Repeat or drop pixels so that a grid (gh, gw, …) spans a frame: (H, W, …)."""
    rows, columns = (
        (np.arange(wanted) * have) // wanted
        for wanted, have in zip(shape, image.shape[:2], strict=True)
    )
    return image[np.ix_(rows, columns)]


def data_uri(image: Bytes, *, lossless: bool = False) -> str:
    """Write a picture (H, W) or (H, W, 3) as the address of an ``img``: WebP, or PNG."""
    encoded: bytes | bytearray
    if lossless:
        kind, encoded = "png", encode_png(image)
    else:
        rgb = image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
        kind, encoded = (
            "webp",
            imagecodecs.webp_encode(np.ascontiguousarray(rgb), level=75, lossless=False),
        )
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def encode_png(image: Bytes) -> bytes:
    """Write a picture (H, W) or (H, W, 3) as PNG."""
    return bytes(imagecodecs.png_encode(np.ascontiguousarray(image)))
