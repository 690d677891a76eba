"""Large frames in tiles: a grid finer than the network's own, with memory by the tile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import BackboneError
from ..forks import cached_property
from ..spec import BackboneSpec
from .base import Frozen, name_subclass
from .preprocessing import round_up
from .several_layers import Layers

if TYPE_CHECKING:
    from .base import Backbone

HALO_SHARE = 8
"""Where no halo is named, it is this part of the tile."""
_REVISION = 1
"""Goes up when the same tile and halo would give other windows, or other cells of them."""


class Tiled(Frozen):
    """A backbone that sees a frame in tiles, each with a halo that is left out of the grid.

    A frame of at most one tile gives what the backbone gives alone. Of a larger one, the windows
    (tile and halo) are of one size, and lie within the frame; a cell is taken from the window
    whose tile holds its centre, where it lies at most half a cell from its place.

    Parameters
    ----------
    backbone : Backbone
    tile : int
        Pixels, at most, of a side of what each window adds to the grid.
    halo : int, optional
        Pixels that a window has more on each side, as far as there are some; an eighth of `tile`
        by default.
    """

    def __init__(self, backbone: Backbone | Layers, tile: int, halo: int | None = None) -> None:
        if isinstance(backbone, Layers):
            raise BackboneError(f"{backbone.name}: name tile= with one layer at a time")
        halo = tile // HALO_SHARE if halo is None else halo
        if tile < 1 or halo < 0:
            raise BackboneError(f"tile={tile} and halo={halo}: expected pixels, at least 1 and 0")
        self.backbone, self.tile, self.halo = backbone, tile, halo
        self.weights = getattr(backbone, "weights", None)
        self.device = getattr(backbone, "device", torch.device("cpu"))

    @cached_property
    def spec(self) -> BackboneSpec:
        """The backbone's, with tile and halo."""
        return self.add_terms(self.backbone.spec)

    def describe(self, weights: str) -> BackboneSpec:
        """Give the spec with weights of such a digest, as `TorchBackbone.describe`."""
        describe: Any = getattr(self.backbone, "describe", None)
        inner = self.backbone.spec if describe is None else describe(weights)
        return self.add_terms(replace(inner, weights=weights))

    def add_terms(self, spec: BackboneSpec) -> BackboneSpec:
        """Give the backbone's spec tile and halo.

        Raises
        ------
        BackboneError
            It has such terms already, which these would hide.
        """
        terms = {"tile": self.tile, "halo": self.halo, "tiling": _REVISION}
        if hidden := terms.keys() & spec.extra.keys():
            raise BackboneError(
                f"{spec.name} has {', '.join(sorted(hidden))} in its spec already: tile a backbone "
                "once, and call terms of your own otherwise"
            )
        own = name_subclass(type(self), "add_terms")
        return replace(spec, extra={**spec.extra, **terms, **own})

    def embed(self, frames: Tensor) -> Tensor:
        """Embed frames (B, H, W) float32 into grids (B, gh, gw, C) float32. Errors as the backbone.

        One window of all frames after the other, so that memory does not grow with their size.
        """
        if max(frames.shape[-2:]) <= self.tile:
            return self.backbone.embed(frames)
        step = self.spec.stride if self.spec.input_size is None else 1
        frames = _extend(torch.as_tensor(frames), step)
        height, width = frames.shape[-2:]
        axes = [cut_axis(length, self.tile, self.halo, step) for length in (height, width)]
        strips = []
        for rows in axes[0]:
            parts = []
            for columns in axes[1]:
                part = self.backbone.embed(frames[..., rows.slice, columns.slice])
                parts.append(
                    part[:, rows.choose(height, part.shape[1]).to(part.device)][
                        :, :, columns.choose(width, part.shape[2]).to(part.device)
                    ]
                )
            strips.append(torch.cat(parts, dim=2))
        return torch.cat(strips, dim=1)


@dataclass(frozen=True, slots=True)
class Window:
    """What a backbone sees along one axis, and the part of it that goes into the grid."""

    start: int
    length: int
    """Pixels that are seen, from `start` on."""
    own: tuple[int, int]
    """Pixels whose cells are taken, from and to."""

    @property
    def slice(self) -> slice:
        """The pixels that are seen."""
        return slice(self.start, self.start + self.length)

    def choose(self, length: int, cells: int) -> Tensor:
        """Give the cells (n,) of this window for those of the whole grid whose centres it owns.

        The frame is of this length. The whole grid has as many cells a pixel as the window's.
        """
        count = max(1, round(length * cells / self.length))
        centres = (torch.arange(count, dtype=torch.float64) + 0.5) * length / count
        own = centres[(centres >= self.own[0]) & (centres < self.own[1])]
        within = (own - self.start) * cells / self.length
        return within.long().clamp(0, cells - 1)


def cut_axis(length: int, tile: int, halo: int, step: int = 1) -> list[Window]:
    """Cut an axis into windows of one size, which begin at multiples of a step.

    Its length is one too, where there are several windows.

    Examples
    --------
    >>> [(w.start, w.length, w.own) for w in cut_axis(100, 40, 10)]
    [(0, 54, (0, 33)), (23, 54, (33, 66)), (46, 54, (66, 100))]
    >>> [(w.start, w.length, w.own) for w in cut_axis(40, 40, 10)]
    [(0, 40, (0, 40))]
    """
    count = -(-length // tile)
    if count == 1:
        return [Window(0, length, (0, length))]
    bounds = [length * i // count // step * step for i in range(count + 1)]
    margin = -(-halo // step) * step
    size = min(length, max(b - a for a, b in pairwise(bounds)) + 2 * margin)
    return [
        Window(max(0, min(low - margin, length - size)), size, (low, high))
        for low, high in pairwise(bounds)
    ]


def _extend(frames: Tensor, step: int) -> Tensor:
    """Repeat the last pixels of frames, so that whole cells span them."""
    height, width = frames.shape[-2:]
    rows, columns = round_up((height, width), step)
    beyond = (0, columns - width, 0, rows - height)
    if not any(beyond):
        return frames
    extended = nn.functional.pad(frames.flatten(0, -3)[:, None], beyond, mode="replicate")
    return extended.view(*frames.shape[:-2], *extended.shape[-2:])


def pixels_of_cell(spec: BackboneSpec, shape: Sequence[int]) -> tuple[float, float]:
    """Estimate how many pixels of frames (H, W) a cell of the grid spans.

    Examples
    --------
    >>> spec = BackboneSpec("any", 1, "", "", width=8, stride=16, input_size=(1024, 1024))
    >>> pixels_of_cell(spec, (4096, 2048))
    (64.0, 32.0)
    """
    height, width = shape[-2:]
    tile, halo = spec.extra.get("tile"), spec.extra.get("halo")
    if isinstance(tile, int) and isinstance(halo, int):
        height, width = (cut_axis(length, tile, halo)[0].length for length in (height, width))
    if spec.input_size is None:
        return float(spec.stride), float(spec.stride)
    if spec.extra.get("fit") == "pad":
        height = width = max(height, width)
    rows, columns = (length / spec.stride for length in spec.input_size)
    return height / rows, width / columns
