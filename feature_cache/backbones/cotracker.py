"""CoTracker3: the feature network alone, frame by frame."""

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

from ..errors import BackboneError, FrameError, MissingDependencyError, UnknownNameError
from ..spec import BackboneSpec
from .base import TorchBackbone, load_checkpoint, load_into, seeded
from .hub import hub_file
from .weights import COTRACKER_CHECKPOINT, COTRACKER_COPY

INSTALL = 'pip install "git+https://github.com/facebookresearch/co-tracker"'
_RANGES = MappingProxyType({"0..1": (0.0, 1.0), "-1..1": (0.5, 0.5)})
_COARSEST = 16


class CoTracker(TorchBackbone):
    """Feature maps of CoTracker3 (offline), at the frame's own size, L2-normalised in each cell.

    Its licence, CC-BY-NC-4.0, does not allow commercial use.

    Parameters
    ----------
    name, weights, device, dtype
        As `TorchBackbone`; by default ``scaled_offline.pth``, from torch.hub's cache or the hub's
        repository ``facebook/cotracker3``.
    input_range : str
        ``"0..1"`` (default) feeds the normalised frame as trackastra-pretrained-feats does;
        ``"-1..1"`` twice that less one, as CoTracker was trained.

    Notes
    -----
    facebookresearch/co-tracker at 82e02e8: ``BasicEncoder`` in ``cotracker/models/core/cotracker/
    blocks.py`` and its use in ``cotracker3_offline.py``. The network interpolates its levels to
    ``(H // 4, W // 4)`` with corners aligned, so the grid spans the frame.
    """

    def __init__(
        self,
        name: str = "facebookresearch/co-tracker",
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        input_range: Literal["0..1", "-1..1"] = "0..1",
    ) -> None:
        super().__init__(name, weights, device, dtype)
        if input_range not in _RANGES:
            raise UnknownNameError("input range of CoTracker", input_range, _RANGES)
        self.input_range = input_range

    def _describe(self, weights: str) -> BackboneSpec:
        mean, std = _RANGES[self.input_range]
        return self._make_spec(
            weights,
            layer="fnet",
            width=128,
            stride=4,
            mean=(mean,) * 3,
            std=(std,) * 3,
            extra={"input_range": self.input_range, "cells": "l2"},
        )

    def _own_weights(self) -> Path:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / COTRACKER_CHECKPOINT
        return cached if cached.is_file() else hub_file("facebook/cotracker3", COTRACKER_CHECKPOINT)

    def _build(self) -> nn.Module:
        with seeded(self._seed() or 0):
            encoder = cast(
                nn.Module, _encoder_class(self.name)(input_dim=3, output_dim=128, stride=4)
            )
        file = self._weights_file()
        if file is not None:
            load_into(encoder, _select_encoder(load_checkpoint(file), file), file)
        return encoder

    def _check_frames(self, images: Tensor) -> None:
        super()._check_frames(images)
        if max(images.shape[1:]) <= _COARSEST:
            raise FrameError(
                f"frames of {images.shape[1]}x{images.shape[2]} pixels for {self.name}: its "
                f"coarsest level has cells of {_COARSEST} pixels, and needs at least two"
            )

    def _forward(self, inputs: Tensor) -> Tensor:
        grid = cast(Tensor, self.module(inputs)).permute(0, 2, 3, 1).float()
        return grid / grid.square().sum(dim=-1, keepdim=True).clamp(min=1e-12).sqrt()


def _select_encoder(state: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Take the feature network's weights out of the whole tracker's."""
    chosen = {n.removeprefix("fnet."): t for n, t in state.items() if n.startswith("fnet.")}
    if not chosen:
        raise BackboneError(f"{file} has no weights 'fnet.…': it is no checkpoint of CoTracker3")
    return chosen


def _encoder_class(name: str) -> Any:
    try:
        with _hub_copy_importable():
            blocks = import_module("cotracker.models.core.cotracker.blocks")
    except ImportError as error:
        raise MissingDependencyError("cotracker", f"the backbone {name!r}", INSTALL) from error
    return blocks.BasicEncoder


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
