"""Several layers of one network, from one forward pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor

from ..errors import BackboneError
from ..spec import BackboneSpec
from .base import Frozen, TorchBackbone

if TYPE_CHECKING:
    from .base import Backbone


class LayeredBackbone(TorchBackbone):
    """A backbone that gives any of its network's layers, or several of one forward pass."""

    def _forward(self, inputs: Tensor) -> Tensor:
        [grid] = self._forward_layers(inputs, [self])
        return grid

    @abstractmethod
    def _forward_layers(self, inputs: Tensor, members: Sequence[TorchBackbone]) -> list[Tensor]:
        """Map the network's input to a grid (B, gh, gw, C) for the layer of each member."""


class Layers(Frozen):
    """Backbones that differ in their layer alone, and share a network and its forward passes.

    Each gives the numbers that it gives alone, under the same spec: so what is computed together is
    found by whoever asks for one of them. Warming takes it (`plan_warm`, ``feature-cache warm``);
    whoever wants one kind of features has to choose.

    Parameters
    ----------
    members : sequence of LayeredBackbone
        Made alike, but for their layer; the first one's network is used.
    """

    def __init__(self, members: Sequence[Backbone]) -> None:
        first, *others = members
        if not isinstance(first, LayeredBackbone):
            raise BackboneError(
                f"{first.spec.name} gives one layer at a time: name it once for each"
            )
        own = [one for one in others if isinstance(one, LayeredBackbone)]
        for one in own:
            one.share(first)
        self.members = tuple({one.describe(""): one for one in (first, *own)}.values())
        self.name, self.device, self.weights = first.name, first.device, first.weights

    @property
    def specs(self) -> tuple[BackboneSpec, ...]:
        """The spec of each."""
        return tuple(one.spec for one in self.members)

    @property
    def spec(self) -> NoReturn:
        """Raise BackboneError: there are several."""
        layers = ", ".join(spec.layer for spec in self.specs)
        raise BackboneError(
            f"{self.name} is named with several layers ({layers}): name one here; "
            "feature-cache warm, and plan_warm, take several"
        )

    def check(self) -> None:
        """Check the network, as `TorchBackbone.check`."""
        for one in self.members:
            one.check()

    def embed(self, frames: Tensor) -> list[Tensor]:
        """Embed frames (B, H, W) float32 into grids (B, gh, gw, C) float32, one for each spec."""
        return [grids for [grids] in self.embed_parts([frames])]

    def embed_parts(self, parts: Sequence[Tensor]) -> list[list[Tensor]]:
        """Give what `TorchBackbone.embed_parts` gives, for each spec."""
        first, found = self.members[0], {}
        for one in self.members:
            images = one.take_images(parts)
        with first.computing():
            for alike in self._see_alike(images):
                inputs = alike[0].make_inputs(images)
                for one, grids in zip(alike, first._forward_layers(inputs, alike), strict=True):
                    found[one.spec] = one.split(grids.float(), images)
        return [found[spec] for spec in self.specs]

    def _see_alike(self, images: Sequence[Tensor]) -> list[list[LayeredBackbone]]:
        """Sort members by the size of what the network sees: some round sizes up to whole cells."""
        groups: dict[object, list[LayeredBackbone]] = {}
        shapes = [torch.empty_like(part, device="meta") for part in images]
        for one in self.members:
            size: object = one.spec.input_size
            if size is None:
                size = tuple(one.make_inputs([shape]).shape for shape in shapes)
            groups.setdefault(size, []).append(one)
        return list(groups.values())


def specs_of(backbone: Backbone | Layers) -> tuple[BackboneSpec, ...]:
    """Give the specs of what one embedding by a backbone gives: one, or one a layer."""
    return backbone.specs if isinstance(backbone, Layers) else (backbone.spec,)
