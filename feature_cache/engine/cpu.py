"""From frames to records with all but draws and network on the CPU, to compare others with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..augment import Draw
from ..backbones.base import TorchBackbone, mixes_sizes
from ..backbones.network_state import undisturbed
from ..backbones.several_layers import Layers
from ..errors import BackboneError
from ..key import Record
from ..pooling import pool_frame
from ..spec import BackboneSpec, SpaceSpec
from .frame import Frame

if TYPE_CHECKING:
    from ..backbones.base import Backbone

Grids: TypeAlias = dict[BackboneSpec, Any]
"""What is made of a frame: a grid, here or on a device, for each layer of the backbone."""


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A frame under one draw, which goes through the backbone once for all its records.

    Attributes
    ----------
    specs : tuple of SpaceSpec
        The spaces of these records.
    """

    frame: Frame
    draw: Draw
    specs: tuple[SpaceSpec, ...]
    shape: tuple[int, int] = field(init=False)
    """(H, W) that the backbone sees."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.draw.output_shape(self.frame.shape))

    @property
    def modes(self) -> list[str]:
        """The poolings of its records, each once."""
        return list(dict.fromkeys(s.pooling for s in self.specs if s.pooling is not None))

    def by_layer(self) -> dict[BackboneSpec, Embedding]:
        """Give, for each layer of the backbone, what is wanted of its grid."""
        layers = dict.fromkeys(spec.backbone for spec in self.specs)
        return {
            layer: replace(self, specs=tuple(s for s in self.specs if s.backbone == layer))
            for layer in layers
        }


class Plain:
    """Normalises and pools on the CPU; draws on the device of the backbone, and waits for it.

    Parameters
    ----------
    backbone : Backbone or Layers
    specs : tuple of BackboneSpec
        Of its layers.
    """

    def __init__(self, backbone: Backbone | Layers, specs: tuple[BackboneSpec, ...]) -> None:
        self.backbone, self.specs, self.spec = backbone, specs, specs[0]
        self.device = torch.device(getattr(backbone, "device", "cpu"))

    def prepare(self, frame: Frame) -> None:
        """Normalise a frame, once for all its draws. FrameError where that can't be."""
        for one in frame.seen:
            one.normalized(self.spec.normalization)

    def draw(self, batch: Sequence[Embedding]) -> list[DrawnFrames]:
        """Draw what can go through the backbone together.

        Raises
        ------
        BackboneError
            The pixels are beyond what the normalisation promises.
        """
        with undisturbed(self.device):
            groups = draw_groups(batch, self._images_of, self.spec)
            for group in groups:
                self._check_range(group.images, group.first)
            return groups

    def embed(self, groups: Sequence[DrawnFrames]) -> list[Grids]:
        """Embed what is drawn, as one batch.

        Returns
        -------
        list of dict of BackboneSpec to (gh, gw, C), or (Z, gh, gw, C) for stacks, float32

        Raises
        ------
        BackboneError
            The embedding has a wrong shape, or NaN.
        """
        with undisturbed(self.device):
            found = embed_groups(self.backbone, self.specs, groups)
        return [
            stacks
            for group, layers in zip(groups, found, strict=True)
            for stacks in split_stacks(
                {spec: self._bring(grids, spec, group) for spec, grids in layers.items()},
                group.members,
            )
        ]

    def _bring(self, grids: torch.Tensor, spec: BackboneSpec, group: DrawnFrames) -> Any:
        here = grids.cpu()
        if not torch.isfinite(here.sum()):  # cheap, and never finite where one of them is not
            check_finite(torch.isfinite(here).flatten(1).all(dim=1), spec, group.members)
        return here.numpy()

    def _images_of(self, frames: Sequence[Frame]) -> torch.Tensor:
        rule = self.spec.normalization
        images = torch.from_numpy(np.concatenate([frame.normalized(rule) for frame in frames]))
        # before the draw too, which may clip to the range and hide it
        self._check_range(images, frames[0])
        return images.to(self.device)

    def _check_range(self, images: torch.Tensor, first: Frame) -> None:
        if self.spec.normalization.range is not None:
            check_range(torch.stack(torch.aminmax(images)), self.spec, first.where)

    def make_records(self, embedding: Embedding, grid: Any) -> list[Record]:
        """Make a frame's records of its grid, one for each space: pooled, rounded and checked.

        Raises
        ------
        BackboneError
            A number does not fit the storage dtype.
        FrameError
            There is no mask, and a pooling needs one.
        """
        frame, modes = embedding.frame, embedding.modes
        pooled: dict[str | None, NDArray[np.floating[Any]]] = {None: grid}
        if modes:
            found = pool_frame(grid, frame.regions(), embedding.draw, modes)
            pooled.update(zip(modes, found, strict=True))
        return [_make_record(pooled[spec.pooling], spec, frame) for spec in embedding.specs]


def _make_record(features: NDArray[np.floating[Any]], spec: SpaceSpec, frame: Frame) -> Record:
    # what is too large becomes infinity, which is looked for next
    with np.errstate(over="ignore"):
        stored = features.astype(spec.dtype)
    if not np.isfinite(stored).all():
        raise too_large(float(np.abs(features).max()), spec, frame)
    return Record(stored, None if spec.pooling is None else frame.regions().labels)


def too_large(largest: float, spec: SpaceSpec, frame: Frame) -> BackboneError:
    """Give the error for a number that the storage dtype can't hold."""
    return BackboneError(
        f"an embedding of {frame.where} reaches {largest:.4g}, too large for storage dtype "
        f"{spec.dtype}: use dtype float32"
    )


def check_range(seen: torch.Tensor, spec: BackboneSpec, where: str) -> None:
    """Check that the least and the largest pixel are within what the normalisation promises."""
    low, high = seen.tolist()
    bounds = spec.normalization.range
    if bounds is not None and not bounds[0] <= low <= high <= bounds[1]:
        raise BackboneError(
            f"{where}, or a frame of its batch, has pixels from {low:.6g} to {high:.6g} for "
            f"{spec.name}: its normalisation promises {bounds[0]:g} to {bounds[1]:g}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class DrawnFrames:
    """Frames of one size under one draw, drawn at once.

    Attributes
    ----------
    members : sequence of Embedding
    images : (B, H', W'), or windows (B, T, H', W'), float32
        What the backbone sees of them.
    """

    members: Sequence[Embedding]
    images: torch.Tensor

    @property
    def first(self) -> Frame:
        """The first frame."""
        return self.members[0].frame


def draw_groups(
    batch: Sequence[Embedding],
    images_of: Callable[[Sequence[Frame]], torch.Tensor],
    spec: BackboneSpec,
) -> list[DrawnFrames]:
    """Draw the frames of a batch; in its order.

    Parameters
    ----------
    batch : sequence of Embedding
    images_of : callable
        Gives frames of one size, normalised and on the device: (B, H, W) float32.
    spec : BackboneSpec
    """
    groups = []
    # neighbours only, as `choose_batch` has put together what goes together
    for (draw, _), group in groupby(batch, key=lambda each: (each.draw, each.frame.shape)):
        members = list(group)
        frames = seen = [each.frame for each in members]
        if any(spec.context):
            # windows overlap, and each frame is drawn once
            seen = list(dict.fromkeys(chain.from_iterable(frame.seen for frame in frames)))
        images = images_of(seen)
        if not draw.is_identity:
            digests = list(chain.from_iterable(frame.slice_digests() for frame in seen))
            images = draw.apply(images, digests=digests, bounds=spec.normalization.range)
        groups.append(DrawnFrames(members, _join_windows(images, seen, frames, spec)))
    return groups


def _join_windows(
    images: torch.Tensor, seen: Sequence[Frame], frames: Sequence[Frame], spec: BackboneSpec
) -> torch.Tensor:
    """Give each slice of frames its window (B, T, H, W), where the backbone sees any."""
    if not any(spec.context):
        return images
    slices = torch.split(images, [frame.depth for frame in seen])
    of_frame = dict(zip(seen, slices, strict=True))
    windows = (torch.stack([of_frame[one] for one in frame.seen], dim=1) for frame in frames)
    return torch.cat(list(windows))


def embed_groups(
    backbone: Backbone | Layers, specs: Sequence[BackboneSpec], groups: Sequence[DrawnFrames]
) -> list[dict[BackboneSpec, torch.Tensor]]:
    """Embed groups in one pass: the grids (B, gh, gw, C) float32 of each, by layer.

    Raises
    ------
    BackboneError
        A wrong shape.
    """
    images = [group.images for group in groups]
    if isinstance(backbone, Layers):
        found = backbone.embed_parts(images)
    elif isinstance(backbone, TorchBackbone) and mixes_sizes(backbone):
        found = [backbone.embed_parts(images)]
    else:
        counts = [len(part) for part in images]
        grids = backbone.embed(images[0] if len(images) == 1 else torch.cat(images))
        whole = torch.as_tensor(grids).float()
        check_shape(whole, sum(counts), specs[0], groups[0].first)
        found = [list(torch.split(whole, counts))]
    for spec, layer in zip(specs, found, strict=True):
        for own, group in zip(layer, groups, strict=True):
            check_shape(own, len(group.images), spec, group.first)
    return [dict(zip(specs, layers, strict=True)) for layers in zip(*found, strict=True)]


def check_shape(grids: torch.Tensor, count: int, spec: BackboneSpec, first: Frame) -> None:
    """Check that there is a grid for each slice."""
    if grids.ndim != 4 or grids.shape[0] != count or grids.shape[3] != spec.width:
        raise BackboneError(
            f"{spec.name} gave shape {tuple(grids.shape)} for {count} frames from {first.where} "
            f"on: expected ({count}, gh, gw, {spec.width})"
        )


def check_finite(finite: torch.Tensor, spec: BackboneSpec, batch: Sequence[Embedding]) -> None:
    """Check that no grid has NaN or infinity; (slices,) bool."""
    if not finite.all():
        bad = int((~finite).nonzero()[0])
        owners = np.repeat(range(len(batch)), [each.frame.depth for each in batch])
        advice = "look at the frame" if spec.dtype == "float32" else "try dtype float32"
        raise BackboneError(
            f"{spec.name} gave NaN or infinity for {batch[owners[bad]].frame.where} (compute dtype "
            f"{spec.dtype}): nothing of it is stored; {advice}"
        )


def split_stacks(layers: Mapping[BackboneSpec, Any], batch: Sequence[Embedding]) -> list[Grids]:
    """Give each frame its grid, or the grids of its slices, by layer."""
    ends = np.cumsum([each.frame.depth for each in batch]).tolist()
    starts = [0, *ends[:-1]]
    return [
        {
            spec: slices[start] if each.frame.pixels.ndim == 2 else slices[start:end]
            for spec, slices in layers.items()
        }
        for each, start, end in zip(batch, starts, ends, strict=True)
    ]


def count_slices(batch: Sequence[Embedding]) -> int:
    """Count the slices of a batch's frames."""
    return sum(each.frame.depth for each in batch)
