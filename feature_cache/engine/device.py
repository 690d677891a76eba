"""From frames to records on the device of the backbone: only what is stored comes back.

A frame is uploaded as it is stored, from pinned memory, and normalised there by the thread that
reads it, on a stream of its own. All else is put on one other stream, whichever thread asks for it:
draws, network, pooling, rounding, and the copy back, for which the thread that makes the records
waits. `OnDevice` owns both streams. What a frame has on the device is its
``on_device``, and goes with it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..backbones.network_state import undisturbed
from ..errors import FrameError
from ..key import Record
from ..normalize import normalize_on
from ..pooling_torch import pool_on
from ..spec import BackboneSpec, SpaceSpec
from .cpu import (
    DrawnFrames,
    Embedding,
    Grids,
    check_finite,
    check_range,
    count_slices,
    draw_groups,
    embed_groups,
    split_stacks,
    too_large,
)
from .frame import Frame

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..backbones.several_layers import Layers

PLAIN = "FEATURE_CACHE_PLAIN"
"""Set to 1, all but draws and network is computed on the CPU; to 0, on any device there is."""


def is_plain(device: object) -> bool:
    """Tell whether frames are normalised and pooled on the CPU: everywhere but on CUDA."""
    chosen = os.environ.get(PLAIN, "")
    return chosen != "0" if chosen else torch.device(str(device)).type != "cuda"


@dataclass(slots=True, eq=False)
class DeviceImage:
    """A frame on the device: (Z, H, W) float32 normalised, and (Z, H, W) rows of its regions."""

    pixels: torch.Tensor
    rows: torch.Tensor | None


@dataclass(slots=True, eq=False)
class DeviceGrid:
    """A frame's grid on the device, and what is to be checked before anything of it is stored.

    Attributes
    ----------
    grid : (gh, gw, C) or (Z, gh, gw, C) float32
    seen : (2,) float32
        The least and the largest pixel of the batch, as the backbone saw them.
    where : str
        Names the first frame of the batch.
    """

    grid: torch.Tensor
    seen: torch.Tensor
    where: str


class OnDevice:
    """Computes all on the device of the backbone.

    Parameters
    ----------
    backbone : Backbone or Layers
    specs : tuple of BackboneSpec
        Of its layers.
    """

    def __init__(self, backbone: Backbone | Layers, specs: tuple[BackboneSpec, ...]) -> None:
        self.backbone, self.specs, self.spec = backbone, specs, specs[0]
        self.device = torch.device(getattr(backbone, "device", "cpu"))
        self._has_streams = self.device.type == "cuda"
        self._uploads, self._computing = (
            torch.cuda.Stream(self.device) if self._has_streams else None  # type: ignore[no-untyped-call]
            for _ in range(2)
        )

    @contextmanager
    def _on(self, stream: Any) -> Iterator[None]:
        """Put what follows on a stream, with nothing of what the process has set."""
        with (
            undisturbed(self.device),
            nullcontext() if stream is None else torch.cuda.stream(stream),
        ):
            yield

    def prepare(self, frame: Frame) -> None:
        """Upload a frame and normalise it there, once for all its draws; waits for its upload.

        Raises
        ------
        FrameError
            The pixels are too far apart for float32.
        """
        # without a lock: two windows that share a frame may both upload it, and either will do
        if frame.on_device is not None:
            return
        for one in frame.window:
            self.prepare(one)
        rows = None if frame.mask is None else self._pin(frame.regions().rows)
        with self._on(self._uploads):
            # before `_upload`, whose wait for the stream is then for this copy as well
            put = None if rows is None else rows.to(self.device, non_blocking=True)
            frame.on_device = DeviceImage(self._upload(frame), put)

    def _upload(self, frame: Frame) -> torch.Tensor:
        """Upload a frame's pixels and normalise them, unless its window has them: (Z, H, W)."""
        if frame.window:
            # for the rows of the mask: the pixels were waited for when the window was prepared
            self._wait()
            image: DeviceImage = frame.window[self.spec.context.before].on_device
            return image.pixels
        stored = self._pin(frame.pixels if frame.pixels.ndim == 3 else frame.pixels[None])
        normalized = normalize_on(
            stored.to(self.device, non_blocking=True)[None], self.spec.normalization
        )
        self._wait()
        normalized.check([frame.where])
        return normalized.pixels[0]

    def _pin(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """Copy an array of any layout and byte order to where the device reads it by itself."""
        native = torch.from_numpy(np.empty(0, array.dtype.newbyteorder("=")))
        pinned = torch.empty(array.shape, dtype=native.dtype, pin_memory=self._has_streams)
        pinned.numpy()[...] = array
        return pinned

    def _wait(self) -> None:
        """Wait for the stream that is in use; without the option, a core would spin meanwhile."""
        if self._has_streams:
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record()
            event.synchronize()

    def draw(self, batch: Sequence[Embedding]) -> list[DrawnFrames]:
        """Draw as `Plain.draw`; the pixels are checked with the records."""
        with self._on(self._computing):
            return draw_groups(batch, self._images_of, self.spec)

    def embed(self, groups: Sequence[DrawnFrames]) -> list[Grids]:
        """Embed what is drawn, as one batch; waits for nothing."""
        with self._on(self._computing):
            found = embed_groups(self.backbone, self.specs, groups)
            return [
                {spec: DeviceGrid(stack, seen, group.first.where) for spec, stack in stacks.items()}
                for group, layers in zip(groups, found, strict=True)
                for seen in [torch.stack(torch.aminmax(group.images))]
                for stacks in split_stacks(
                    {spec: grids.to(self.device) for spec, grids in layers.items()}, group.members
                )
            ]

    def _images_of(self, frames: Sequence[Frame]) -> torch.Tensor:
        return torch.cat([self._image_of(frame).pixels for frame in frames])

    def _image_of(self, frame: Frame) -> DeviceImage:
        self.prepare(frame)
        image: DeviceImage = frame.on_device
        if self._has_streams:  # its memory was taken on the stream of the uploads
            for tensor in (image.pixels, image.rows):
                if tensor is not None:
                    tensor.record_stream(torch.cuda.current_stream(self.device))
        return image

    def make_records(self, embedding: Embedding, found: DeviceGrid) -> list[Record]:
        """Make a frame's records of its grid; waits until they are here.

        Raises
        ------
        BackboneError
            NaN, a number that does not fit the storage dtype, or pixels out of range.
        FrameError
            There is no mask, and a pooling needs one.
        """
        frame, modes, grid = embedding.frame, embedding.modes, found.grid
        fallback = None
        if modes:
            depth, height, width = (grid if grid.ndim == 4 else grid[None]).shape[:3]
            cells = frame.regions().cells_of_centroids(embedding.draw, (depth, height, width))
            fallback = self._pin(np.asarray(cells, np.int64))
        with self._on(self._computing):
            finite = torch.isfinite(grid).flatten(-3).all(dim=-1).view(-1)
            pooled: dict[str | None, torch.Tensor] = {None: grid}
            if fallback is not None:
                rows = embedding.draw.apply_rows(self._rows_of(frame))
                put = fallback.to(self.device, non_blocking=True)
                pooled.update(zip(modes, pool_on(grid, rows, put, modes), strict=True))
            stored = {s: pooled[s.pooling].to(_DTYPES[s.dtype]) for s in embedding.specs}
            # what is to be checked comes back with the records: one wait for all of it
            checks = [finite.to(torch.float32), found.seen, *map(_reach, stored.values())]
            here = [self._bring(tensor) for tensor in (torch.cat(checks), *stored.values())]
            self._wait()
        self._check(here[0], found, embedding, stored, pooled)
        return [  # copied: pinned memory is scarce, and the grids of a batch are one tensor
            Record(array.numpy().copy(), None if spec.pooling is None else frame.regions().labels)
            for spec, array in zip(stored, here[1:], strict=True)
        ]

    def fetch(self, embedding: Embedding, found: DeviceGrid) -> NDArray[np.float32]:
        """Give a frame's grid as `Plain.embed` does: for who pools it without the device."""
        with self._on(self._computing):
            grid, seen = found.grid.cpu(), found.seen.cpu()
        check_range(seen, self.spec, found.where)
        check_finite(torch.isfinite(grid).flatten(-3).all(dim=-1).view(-1), self.spec, [embedding])
        return grid.numpy()

    def _rows_of(self, frame: Frame) -> torch.Tensor:
        rows = self._image_of(frame).rows
        if rows is None:
            raise FrameError(f"{frame.where} has no mask, and pooling needs one")
        return rows

    def _bring(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy to pinned memory, without waiting."""
        if not self._has_streams:
            return tensor.contiguous()
        here = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return here.copy_(tensor, non_blocking=True)

    def _check(
        self,
        checks: torch.Tensor,
        found: DeviceGrid,
        embedding: Embedding,
        stored: dict[SpaceSpec, torch.Tensor],
        pooled: dict[str | None, torch.Tensor],
    ) -> None:
        depth = count_slices([embedding])
        check_range(checks[depth : depth + 2], self.spec, found.where)
        check_finite(checks[:depth] > 0, self.spec, [embedding])
        for spec, fits in zip(stored, checks[depth + 2 :].tolist(), strict=True):
            if not fits:
                largest = float(pooled[spec.pooling].abs().max())
                raise too_large(largest, spec, embedding.frame)


def _reach(tensor: torch.Tensor) -> torch.Tensor:
    """Tell, as (1,) float32, whether all of a tensor is finite."""
    return torch.isfinite(tensor).all().to(torch.float32)[None]


_DTYPES = {"float16": torch.float16, "float32": torch.float32}
