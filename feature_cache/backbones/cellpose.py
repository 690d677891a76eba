"""Cellpose-SAM's readout, before it is shuffled into flows and cell probability."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from ..errors import BackboneError
from ..spec import BackboneSpec, Normalization
from .base import load_into, seeded
from .checkpoint import read_tensors
from .hub import hub_file
from .preprocessing import scale_by_percentiles
from .sam import ENCODER_SIZES, build_encoder, name_in_transformers
from .transformers import HubBackbone
from .weights import cellpose_file

_INPUT, _PATCH, _WIDTH = 256, 8, 192
_PERCENTILES = (1.0, 99.0)
_UNUSED = ("W2", "diam_mean", "diam_labels")


class CellposeSam(HubBackbone):
    """The 192 numbers that Cellpose-SAM gives for each 8 x 8 pixels.

    Parameters
    ----------
    name : str
        ``"mouseland/cellpose-sam"``.
    weights : str, Path or None
        None takes the file in cellpose's own folder (``CELLPOSE_LOCAL_MODELS_PATH``, by default
        ``~/.cellpose/models``), else the hub's; a path is a checkpoint as cellpose 4 saves it.
    device, dtype
        As `HubBackbone`. cellpose itself computes in bfloat16 by default.
    checkpoint : str
        Which of the hub's: ``"cpsam"`` (default) or ``"cpsam_v2"``, the default of cellpose 4.2.

    Notes
    -----
    Pachitariu et al., 2025. The network is ``cellpose.vit.CPSAM`` (``cellpose.vit_sam.Transformer``
    before 4.2): SAM's large encoder with patches of 8 pixels and global attention everywhere, and
    a readout of 3 x 8 x 8. It is built here from transformers' SAM, since importing cellpose turns
    on TensorFloat-32 for the whole process.

    Frames are scaled as ``cellpose.transforms.normalize99`` scales them, percentile 1 to 0 and 99
    to 1 without clipping, and stretched to 256 x 256, as the extractor of
    trackastra-pretrained-feats 0.0.2 does. That extractor never loads weights into the network:
    its numbers are random and can't be had again.
    """

    def __init__(
        self,
        name: str = "mouseland/cellpose-sam",
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        checkpoint: Literal["cpsam", "cpsam_v2"] = "cpsam",
    ) -> None:
        super().__init__(name, weights, device, dtype)
        self.checkpoint = checkpoint

    def _describe(self, weights: str) -> BackboneSpec:
        return self._make_spec(
            weights,
            layer="readout",
            width=_WIDTH,
            stride=_PATCH,
            input_size=(_INPUT, _INPUT),
            resize="bilinear",
            normalization=Normalization("percentile", 0, 100),
            extra={"percentiles": list(_PERCENTILES), "clipped": False},
        )

    def _own_weights(self) -> Path:
        file = cellpose_file(self.checkpoint)
        return file if file.is_file() else hub_file(self.name, self.checkpoint)

    def _build(self) -> nn.Module:
        encoder = build_encoder(self.name, ENCODER_SIZES["large"], self._seed())
        with seeded(self._seed() or 0):
            network = _CellposeNetwork(encoder)
        file = self._weights_file()
        if file is not None:
            tensors = read_tensors(file, ("module.", ""))
            if "encoder.cls_token" in tensors:
                raise BackboneError(
                    f"{file} is not of Cellpose-SAM's network but of cellpose's CPDINO, which only "
                    "cellpose 4.2.0 and later has, with facebookresearch's dinov3 beside it, and "
                    "which is not among our backbones: expected cpsam or cpsam_v2, or for DINOv3 "
                    "by itself facebook/dinov3-vitl16-pretrain-lvd1689m"
                )
            state = {_network_name(n): t for n, t in tensors.items() if n not in _UNUSED}
            load_into(network, state, file)
        return network

    def _as_input(self, images: Tensor) -> Tensor:
        return super()._as_input(scale_by_percentiles(images, *_PERCENTILES))

    def _forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.module(inputs))


class _CellposeNetwork(nn.Module):
    """SAM's encoder, changed as cellpose changes it, and the readout."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        patches, cells = encoder.patch_embed, _INPUT // _PATCH
        weight, bias = patches.projection.weight, patches.projection.bias
        patches.projection = nn.Conv2d(3, weight.shape[0], kernel_size=_PATCH, stride=_PATCH)
        with torch.no_grad():
            patches.projection.weight.copy_(weight[:, :, ::2, ::2])
            patches.projection.bias.copy_(bias)
        patches.image_size = (_INPUT, _INPUT)
        step = encoder.pos_embed.shape[1] // cells
        encoder.pos_embed = nn.Parameter(encoder.pos_embed.detach()[:, ::step, ::step])
        for layer in encoder.layers:
            layer.window_size = 0
        self.encoder = encoder
        self.out = nn.Conv2d(256, _WIDTH, kernel_size=1)

    def forward(self, images: Tensor) -> Tensor:
        """Map (B, 3, 256, 256) to (B, 32, 32, 192)."""
        readout: Tensor = self.out(self.encoder(images).last_hidden_state)
        return readout.permute(0, 2, 3, 1)


def _network_name(name: str) -> str:
    if name.startswith("encoder."):
        return "encoder." + name_in_transformers(name.removeprefix("encoder."))
    return name
