"""Models of transformers that are known by name: what their repositories say of them.

So that they can be built without a network, and what comes from there is compared with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from .preprocessing import IMAGENET_MEAN, IMAGENET_STD

_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True, slots=True)
class Known:
    """A repository's ``config.json`` and preprocessing, as far as they decide the grid."""

    config: Mapping[str, Any]
    """``model_type`` and what differs from its defaults."""
    width: int
    stride: int
    """Width and stride are those of the last layer."""
    input: str
    licence: str
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    """Mean and deviation are empty where the model has no processor and scales for itself."""
    resample: str = "bilinear"
    """Of the model's processor."""


def vit_size(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """Say how large a vision transformer is, in the words of transformers."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


def _vit(hidden: int, layers: int, heads: int, ratio: float = 4, **more: Any) -> dict[str, Any]:
    size = vit_size(hidden, layers, heads)
    return {**size, "intermediate_size": int(hidden * ratio), **more}


_GATED: dict[str, Any] = {"use_gated_mlp": True, "hidden_act": "silu"}
_DINOV3 = {
    "vits16": _vit(384, 12, 6),
    "vits16plus": _vit(384, 12, 6, **_GATED),
    "vitb16": _vit(768, 12, 12),
    "vitl16": _vit(1024, 24, 16),
    "vith16plus": _vit(1280, 32, 20, **_GATED),
    "vit7b16": _vit(4096, 40, 32, 2, query_bias=False, value_bias=False, **_GATED),
}
_CONVNEXT = {
    "tiny": ((3, 3, 9, 3), (96, 192, 384, 768)),
    "small": ((3, 3, 27, 3), (96, 192, 384, 768)),
    "base": ((3, 3, 27, 3), (128, 256, 512, 1024)),
    "large": ((3, 3, 27, 3), (192, 384, 768, 1536)),
}
_SIGLIP2 = {
    "base-patch16": (16, (224, 256, 384, 512), _vit(768, 12, 12)),
    "large-patch16": (16, (256, 384, 512), _vit(1024, 24, 16)),
    "so400m-patch14": (14, (224, 384), _vit(1152, 27, 16, 4304 / 1152)),
    "so400m-patch16": (16, (256, 384, 512), _vit(1152, 27, 16, 4304 / 1152)),
}
_IJEPA = {
    "vith14_1k": (14, 224, _vit(1280, 32, 16)),
    "vith14_22k": (14, 224, _vit(1280, 32, 16)),
    "vith16_1k": (16, 448, _vit(1280, 32, 16)),
    "vitg16_22k": (16, 224, _vit(1408, 40, 16, 6144 / 1408)),
}

KNOWN: Mapping[str, Known] = MappingProxyType(
    {
        f"facebook/dinov3-{size}-pretrain-lvd1689m": Known(
            {"model_type": "dinov3_vit", "num_register_tokens": 4, **config},
            width=config["hidden_size"],
            stride=16,
            input="224x224",
            licence="DINOv3 License, gated",
        )
        for size, config in _DINOV3.items()
    }
    | {
        f"facebook/dinov3-convnext-{size}-pretrain-lvd1689m": Known(
            {"model_type": "dinov3_convnext", "depths": depths, "hidden_sizes": sizes},
            width=sizes[-1],
            stride=32,
            input="native size",
            licence="DINOv3 License, gated",
        )
        for size, (depths, sizes) in _CONVNEXT.items()
    }
    | {
        "facebook/sam3": Known(
            {"model_type": "sam3_vision_model"},
            width=1024,
            stride=14,
            input="1008x1008",
            licence="SAM License, gated",
            mean=_HALF,
            std=_HALF,
        ),
        "nvidia/C-RADIOv4-H": Known(
            {"model_type": "radio"},
            width=1280,
            stride=16,
            input="224x224",
            licence="NVIDIA Open Model License",
            mean=(),
            std=(),
        ),
    }
    | {
        f"google/siglip2-{size}-{pixels}": Known(
            {
                "model_type": "siglip_vision_model", "patch_size": patch, "image_size": pixels,
                **config,
            },
            width=config["hidden_size"],
            stride=patch,
            input=f"{pixels}x{pixels}",
            licence="Apache-2.0",
            mean=_HALF,
            std=_HALF,
        )
        for size, (patch, sides, config) in _SIGLIP2.items()
        for pixels in sides
    }
    | {
        f"facebook/ijepa_{size}": Known(
            {"model_type": "ijepa", "patch_size": patch, "image_size": pixels, **config},
            width=config["hidden_size"],
            stride=patch,
            input=f"{pixels}x{pixels}",
            licence="CC-BY-NC-4.0 (non-commercial)",
        )
        for size, (patch, pixels, config) in _IJEPA.items()
    }
)  # fmt: skip
"""By repository. Sizes: ``convert_…_to_hf.py`` of each model in huggingface/transformers."""
