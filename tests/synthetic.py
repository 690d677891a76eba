"""Small made-up movies."""

from __future__ import annotations

import numpy as np


def make_movie(
    frames: int = 6, height: int = 48, width: int = 64, cells: int = 5, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw bright squares that move: uint16 frames, uint16 masks, tracks."""
    rng = np.random.default_rng(seed)
    images = rng.integers(100, 400, (frames, height, width)).astype(np.uint16)
    masks = np.zeros((frames, height, width), np.uint16)
    rows = rng.permutation(cells) * (height // cells)
    for label, row in enumerate(rows, start=1):
        column, size = int(rng.integers(0, width // 3)), int(rng.integers(4, 1 + height // cells))
        for t in range(frames):
            place = np.s_[t, row : row + size, column + t : column + t + size]
            masks[place] = label
            images[place] += rng.integers(500, 900, images[place].shape).astype(np.uint16)
    tracks = np.array([[label, 0, frames - 1, 0] for label in range(1, cells + 1)])
    return images, masks, tracks
