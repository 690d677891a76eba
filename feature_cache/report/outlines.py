"""Outlines of the regions of a mask, for SVG and for pixels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

_TURNS = ((0, 1), (1, 0), (0, -1), (-1, 0))
"""Steps (y, x) along the sides of a pixel, clockwise: the region lies to the right."""


def trace_outlines(mask: NDArray[np.integer], scale: float) -> dict[int, str]:
    """Trace the regions of a mask as paths of SVG.

    An outline goes through the middles of the pixels' sides, so that corners are cut.

    Parameters
    ----------
    mask : (H, W) integer, 0 is background
    scale : float
        Units of the path for each pixel.

    Returns
    -------
    dict of int to str
        The attribute ``d`` of each label's path, holes included.
    """
    paths = {}
    for label, place in _find_boxes(mask):
        corner = np.array([place[0].start, place[1].start])
        loops = _trace_loops(np.pad(mask[place] == label, 1))
        paths[label] = "".join(_write_loop((loop + corner - 1) * scale) for loop in loops)
    return paths


def _find_boxes(mask: NDArray[np.integer]) -> Iterator[tuple[int, tuple[slice, slice]]]:
    labels, compact = np.unique(mask, return_inverse=True)
    compact = compact.reshape(mask.shape) + (0 if labels[:1] == 0 else 1)
    known = labels[labels != 0].tolist()
    boxes = ndimage.find_objects(compact.astype(np.int32), len(known))
    yield from zip(known, boxes, strict=True)


def _trace_loops(inside: NDArray[np.bool_]) -> Iterator[NDArray[np.float64]]:
    """Follow the boundary of a region with empty margins: (n, 2) middles of sides, (y, x)."""
    sides = _list_sides(inside)
    while sides:
        (y, x), turns = next(iter(sides.items()))
        turn, loop = next(iter(turns)), []
        while turn in sides.get((y, x), ()):
            sides[y, x].discard(turn)
            if not sides[y, x]:
                del sides[y, x]
            dy, dx = _TURNS[turn]
            loop.append((y + dy / 2, x + dx / 2))
            y, x = y + dy, x + dx
            ahead = sides.get((y, x), set())
            turn = next((t % 4 for t in (turn + 1, turn, turn - 1) if t % 4 in ahead), -1)
        yield np.array(loop)


def _list_sides(inside: NDArray[np.bool_]) -> dict[tuple[int, int], set[int]]:
    """List the sides between region and background: corner where one begins, and its direction."""
    sides: dict[tuple[int, int], set[int]] = {}
    corners = ((0, 0), (0, 1), (1, 1), (1, 0))
    beyond = ((-1, 0), (0, 1), (1, 0), (0, -1))
    for turn, (corner, step) in enumerate(zip(corners, beyond, strict=True)):
        edge = inside & ~np.roll(inside, (-step[0], -step[1]), axis=(0, 1))
        for y, x in np.argwhere(edge).tolist():
            sides.setdefault((y + corner[0], x + corner[1]), set()).add(turn)
    return sides


def _write_loop(points: NDArray[np.float64]) -> str:
    """Write a closed line in whole units, without points on straight lines."""
    whole = np.rint(points).astype(int)
    whole = whole[(whole != np.roll(whole, 1, axis=0)).any(axis=1)]
    before, after = whole - np.roll(whole, 1, axis=0), np.roll(whole, -1, axis=0) - whole
    whole = whole[before[:, 0] * after[:, 1] != before[:, 1] * after[:, 0]]
    if len(whole) < 3:
        return ""
    steps = np.diff(whole, axis=0)
    lines = " ".join(f"{x} {y}" for y, x in steps.tolist())
    return f"M{whole[0, 1]} {whole[0, 0]}l{lines}z"


def draw_edges(mask: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Mark the pixels of regions that touch another region or the background: (H, W) bool."""
    padded = np.pad(mask, 1, mode="edge")
    centre = padded[1:-1, 1:-1]
    others = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    touches: NDArray[np.bool_] = np.logical_or.reduce([centre != other for other in others])
    return touches & (centre != 0)
