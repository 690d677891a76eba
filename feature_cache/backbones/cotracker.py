"""CoTracker3: the feature network, or what it knows of points that it tracks in a window."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import BackboneError, FrameError, importing
from ..spec import BackboneSpec, Context
from .base import TorchBackbone, load_checkpoint, load_into, seeded
from .hub import hub_file
from .preprocessing import check_input_size
from .weights import COTRACKER_CHECKPOINT, COTRACKER_COPY

INSTALL = 'pip install "git+https://github.com/facebookresearch/co-tracker"'
_RANGES = MappingProxyType({"0..1": (0.0, 1.0), "-1..1": (0.5, 0.5)})
_COARSEST = 16
_WINDOW = 60
"""Frames that ``scaled_offline.pth`` was trained with."""


class CoTracker(TorchBackbone):
    """Feature maps of CoTracker3 (offline), at the frame's own size, L2-normalised in each cell.

    With a context, what the tracker knows of points instead: one in each cell of the frame is
    tracked through the window, and its token at that frame is the cell's vector.

    Its licence, CC-BY-NC-4.0, does not allow commercial use.

    Parameters
    ----------
    name, weights, device, dtype
        As `TorchBackbone`; by default ``scaled_offline.pth``, from torch.hub's cache or the hub's
        repository ``facebook/cotracker3``.
    input_range : str, optional
        ``"0..1"`` feeds the normalised frame as trackastra-pretrained-feats does, and is the
        default; ``"-1..1"`` twice that less one, as CoTracker was trained, and is the default with
        a context.
    context : (int, int)
        Through how many frames before and after each its points are tracked; by default none.
    input_size : int or (height, width), optional
        With a context: what frames are resized to, multiples of 32. By default (384, 512), as
        CoTracker was trained. There is a point every 8 pixels of it.

    Notes
    -----
    facebookresearch/co-tracker at 82e02e8: ``BasicEncoder`` in ``cotracker/models/core/cotracker/
    blocks.py`` and its use in ``cotracker3_offline.py``. The network interpolates its levels to
    ``(H // 4, W // 4)`` with corners aligned, so the grid spans the frame.

    With a context, ``CoTrackerThreeOffline.forward`` runs on the window, resized with corners
    aligned as ``CoTrackerPredictor`` does. A token is what ``updateformer`` gives to its heads in
    the last of four iterations, from which they read where the point goes and whether it is seen.
    """

    def __init__(
        self,
        name: str = "facebookresearch/co-tracker",
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        input_range: Literal["0..1", "-1..1"] | None = None,
        context: Context = Context(),  # noqa: B008
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(name, weights, device, dtype)
        self.context = Context(*context)
        self.input_range = input_range or ("-1..1" if any(self.context) else "0..1")
        if input_size is not None and not any(self.context):
            raise BackboneError(
                f"{name} sees frames at their own size: leave out input_size, or name a context"
            )
        self.input_size = None
        if any(self.context):
            self.input_size = check_input_size(input_size or (384, 512), 32, name)

    def _describe(self, weights: str) -> BackboneSpec:
        mean, std = _RANGES[self.input_range]
        scale = {"mean": (mean,) * 3, "std": (std,) * 3}
        told = {"input_range": self.input_range}
        if not any(self.context):
            extra = {**told, "cells": "l2"}
            return self._make_spec(weights, layer="fnet", width=128, stride=4, extra=extra, **scale)
        return self._make_spec(
            weights, layer="updateformer", width=384, stride=8, input_size=self.input_size,
            resize="bilinear-corners", extra=told, context=self.context, **scale,
        )  # fmt: skip

    def _weights_purpose(self) -> str:
        whole = ", all of it" if any(self.context) else ""
        return f"{super()._weights_purpose()}{whole}"

    def _own_weights(self) -> Path:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / COTRACKER_CHECKPOINT
        return cached if cached.is_file() else hub_file("facebook/cotracker3", COTRACKER_CHECKPOINT)

    def _build(self) -> nn.Module:
        if any(self.context):
            return self._build_tracker()
        with seeded(self._seed() or 0):
            encoder = cast(
                nn.Module,
                _find(self.name, "blocks", "BasicEncoder")(input_dim=3, output_dim=128, stride=4),
            )
        file = self._weights_file()
        if file is not None:
            load_into(encoder, _select_encoder(load_checkpoint(file), file), file)
        return encoder

    def _build_tracker(self) -> nn.Module:
        with _import_unseeded():
            make = _find(self.name, "cotracker3_offline", "CoTrackerThreeOffline")
        with seeded(self._seed() or 0):
            network = make(stride=4, corr_radius=3, window_len=_WINDOW)
        file = self._weights_file()
        if file is not None:
            load_into(network, load_checkpoint(file), file)
        return _Tracker(network)

    def _check_frames(self, images: Tensor) -> None:
        super()._check_frames(images)
        height, width = images.shape[-2:]
        if self.input_size is None and max(height, width) <= _COARSEST:
            raise FrameError(
                f"frames of {height}x{width} pixels for {self.name}: its "
                f"coarsest level has cells of {_COARSEST} pixels, and needs at least two"
            )

    def _as_input(self, images: Tensor) -> Tensor:
        if self.input_size is None:
            return super()._as_input(images)
        flat = images.flatten(0, 1)[:, None]
        resized = nn.functional.interpolate(
            flat, self.input_size, mode="bilinear", align_corners=True
        )
        return super()._as_input(resized[:, 0]).view(*images.shape[:2], 3, *self.input_size)

    def _forward(self, inputs: Tensor) -> Tensor:
        if any(self.context):
            return cast(Tensor, self.module(inputs, self.context.before, self.spec.stride))
        grid = cast(Tensor, self.module(inputs)).permute(0, 2, 3, 1).float()
        return grid / grid.square().sum(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()


class _Tracker(nn.Module):
    """The tracker, and what it knows of points."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        self._tokens: Tensor | None = None
        network.updateformer.flow_head.register_forward_pre_hook(self._hear)

    def _hear(self, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        [self._tokens] = given

    def forward(self, inputs: Tensor, t: int, stride: int) -> Tensor:
        """Track a point from the middle of each cell of frame `t` of windows (B, T, 3, H, W).

        One window after the other: upstream's code takes no more at once.
        """
        rows, columns = (
            (torch.arange(length // stride, device=inputs.device) + 0.5) * stride - 0.5
            for length in inputs.shape[-2:]
        )
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points = torch.stack([torch.full_like(x, t), x, y], dim=-1)
        videos = torch.split((inputs + 1) / 2 * 255, 1)
        tokens = [self._track(video, points.view(1, -1, 3))[:, :, t] for video in videos]
        return torch.cat(tokens).view(len(inputs), *x.shape, -1)

    def _track(self, video: Tensor, queries: Tensor) -> Tensor:
        self.network(video, queries)
        tokens, self._tokens = self._tokens, None
        if tokens is None:
            raise BackboneError("CoTracker3 gave no tokens: its updateformer has no flow_head")
        return tokens


def _select_encoder(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Take the feature network's weights out of the whole tracker's."""
    chosen = {n.removeprefix("fnet."): t for n, t in state.items() if n.startswith("fnet.")}
    if not chosen:
        raise BackboneError(f"{file} has no weights 'fnet.…': it is no checkpoint of CoTracker3")
    return chosen


def _find(name: str, module: str, kind: str) -> Any:
    """Give a class of upstream's."""
    with importing("cotracker", f"the backbone {name!r}", INSTALL), _hub_copy_importable():
        found = import_module(f"cotracker.models.core.cotracker.{module}")
    return getattr(found, kind)


@contextmanager
def _import_unseeded() -> Iterator[None]:
    """Import upstream's module, which seeds the generators of all devices, and leave them alone."""
    seed_all, torch.manual_seed = torch.manual_seed, torch.default_generator.manual_seed
    try:
        with seeded(0):
            yield
    finally:
        torch.manual_seed = seed_all


@contextmanager
def _hub_copy_importable() -> Iterator[None]:
    """Let the copy that torch.hub keeps be imported, where the package is not installed."""
    folder = Path(torch.hub.get_dir()) / COTRACKER_COPY
    if find_spec("cotracker") is not None or not folder.is_dir():
        yield
        return
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
