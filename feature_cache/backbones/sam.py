"""Segment Anything's image encoder: Meta's weights and micro-sam's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast, get_args

import torch
from torch import Tensor, nn

from ..errors import BackboneError, UnknownNameError
from ..spec import BackboneSpec
from .base import load_into, resize_frames, seeded, standardize
from .checkpoint import check_config, read_tensors
from .known import vit_size
from .transformers import HubBackbone, import_transformers
from .weights import micro_sam_file

_INPUT, _PATCH = 1024, 16
_RESIZE = "bilinear-antialias"
Fit: TypeAlias = Literal["pad", "stretch"]
_POSITION_STD = 0.02

ENCODER_SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "base": {**vit_size(768, 12, 12), "global_attn_indexes": (2, 5, 8, 11)},
        "large": {**vit_size(1024, 24, 16), "global_attn_indexes": (5, 11, 17, 23)},
        "huge": {**vit_size(1280, 32, 16), "global_attn_indexes": (7, 15, 23, 31)},
    }
)

_ORIGINAL_NAMES = MappingProxyType(
    {
        r"^patch_embed\.proj\.": "patch_embed.projection.",
        r"^blocks\.(\d+)\.norm([12])\.": r"layers.\1.layer_norm\2.",
        r"^blocks\.": "layers.",
        r"^neck\.0\.": "neck.conv1.",
        r"^neck\.1\.": "neck.layer_norm1.",
        r"^neck\.2\.": "neck.conv2.",
        r"^neck\.3\.": "neck.layer_norm2.",
    }
)


class SegmentAnything(HubBackbone):
    """The image encoder of Segment Anything, up to and with its neck.

    Parameters
    ----------
    name : str
        ``"facebook/sam-vit-{base,large,huge}"``.
    weights : str, Path or None
        As `HubBackbone`; a checkpoint may have the names of transformers' ``SamModel`` or of the
        original segment_anything.
    device, dtype, standardize
        As `HubBackbone`.
    fit : str
        ``"pad"`` (default): the longer side becomes 1024 pixels, the shorter one in proportion,
        and the rest of the square is zero, as SAM was trained; the grid is cut to the frame, 64
        cells long. ``"stretch"``: both sides become 1024 pixels, a grid of 64 x 64.

    Notes
    -----
    Kirillov et al., 2023; sizes from ``segment_anything/build_sam.py``. Preprocessing as
    transformers' ``SamImageProcessor``. The extractor of trackastra-pretrained-feats 0.0.2 takes
    the padded grid for the frame's: for a frame that isn't square it reads features of the wrong
    place, or of the padding. For a square one its numbers are those of the default here: it gives
    the model pixels in 0..1; ``standardize=True`` gives what SAM was trained on.

    The cut rounds to whole cells, so that pixel and cell disagree by half a cell at most, at the
    far end of the shorter side.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        fit: Fit = "pad",
        standardize: bool = False,
    ) -> None:
        super().__init__(name, weights, device, dtype, standardize=standardize)
        if fit not in get_args(Fit):
            raise UnknownNameError(f"fit of {name}", fit, get_args(Fit))
        self.fit = fit

    def _describe(self, weights: str) -> BackboneSpec:
        return self._make_spec(
            weights,
            layer="neck",
            width=256,
            stride=_PATCH,
            input_size=(_INPUT, _INPUT),
            resize=_RESIZE,
            mean=self.mean,
            std=self.std,
            extra={"fit": self.fit},
        )

    def _size(self) -> Mapping[str, Any]:
        return ENCODER_SIZES[self.name.removeprefix("facebook/sam-vit-")]

    def _build(self) -> nn.Module:
        network = build_encoder(self.name, self._size(), self._seed())
        file = self._weights_file()
        if file is not None:
            check_config(file.parent, self._size(), self.name, "vision_config")
            tensors = read_tensors(file, ("vision_encoder.", "image_encoder."))
            load_into(network, {name_in_transformers(n): t for n, t in tensors.items()}, file)
        return network

    def _as_input(self, images: Tensor) -> Tensor:
        if self.fit == "stretch":
            return super()._as_input(images)
        height, width = fit_longest(images.shape[-2], images.shape[-1])
        content = standardize(resize_frames(images, (height, width), _RESIZE), self.mean, self.std)
        return nn.functional.pad(content, (0, _INPUT - width, 0, _INPUT - height))

    def _crop(self, grids: Tensor, shape: tuple[int, int]) -> Tensor:
        if self.fit == "stretch":
            return grids
        rows, columns = map(_cells, fit_longest(*shape))
        return grids[:, :rows, :columns]

    def _forward(self, inputs: Tensor) -> Tensor:
        features: Tensor = self.module(inputs).last_hidden_state
        return features.permute(0, 2, 3, 1)


def fit_longest(height: int, width: int) -> tuple[int, int]:
    """Scale a frame's size so that its longer side is 1024, as SAM's ``ResizeLongestSide``.

    Examples
    --------
    >>> fit_longest(700, 1100)
    (652, 1024)
    """
    scale = _INPUT / max(height, width)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def _cells(length: int) -> int:
    return max(1, int(length / _PATCH + 0.5))


class MicroSam(SegmentAnything):
    """Segment Anything's image encoder with the weights of micro-sam.

    Parameters
    ----------
    name : str
        ``"microsam/"`` and one of micro-sam's generalists that is a vision transformer of SAM, such
        as ``"microsam/vit_b_lm"`` or ``"microsam/vit_l_em_organelles"`` (its ``vit_t_…`` are none).
    weights : str, Path or None
        None takes the file in micro-sam's own cache (``MICROSAM_CACHEDIR``); a path is a
        checkpoint, as micro-sam downloads or exports it.
    device, dtype, fit
        As `SegmentAnything`.
    standardize : bool
        True by default: micro-sam's own preprocessing does so.

    Notes
    -----
    Archit et al., 2025. micro-sam, and the extractor of trackastra-pretrained-feats 0.0.2 that
    calls it, round pixels to 8 bits before and after they resize; here they stay float32, which
    changes an embedding by about a hundredth.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        fit: Fit = "pad",
        standardize: bool = True,
    ) -> None:
        super().__init__(name, weights, device, dtype, fit=fit, standardize=standardize)

    def _size(self) -> Mapping[str, Any]:
        sizes = {"vit_b": "base", "vit_l": "large", "vit_h": "huge"}
        return ENCODER_SIZES[sizes[self.name.removeprefix("microsam/")[:5]]]

    def _own_weights(self) -> Path:
        model = self.name.removeprefix("microsam/")
        file = micro_sam_file(model)
        if not file.is_file():
            raise BackboneError(
                f"no weights of {self.name} at {file}: let micro_sam download them "
                f"(micro_sam.util.get_sam_model({model!r})), or pass weights=<path of a checkpoint>"
            )
        return file


def build_encoder(name: str, size: Mapping[str, Any], seed: int | None) -> nn.Module:
    """Build the image encoder; with a seed, none of its weights is zero or nearly so."""
    transformers = import_transformers(name)
    config = transformers.SamVisionConfig(**size, initializer_range=0.02)
    with seeded(seed or 0):
        encoder = cast(nn.Module, transformers.SamVisionModel(config).vision_encoder)
        if seed is not None:
            with torch.no_grad():
                for parameter in (p for n, p in encoder.named_parameters() if "pos" in n):
                    parameter.normal_(std=_POSITION_STD)
    return encoder


def name_in_transformers(name: str) -> str:
    """Give a tensor of the original segment_anything's image encoder the name transformers uses."""
    for pattern, replacement in _ORIGINAL_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name
