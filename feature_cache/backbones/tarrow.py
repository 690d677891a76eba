"""The dense backbone of a time arrow network (TAP), trained by its user."""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

from torch import Tensor, nn

from ..errors import BackboneError, UnknownNameError, importing
from ..forks import cached_property
from ..spec import BackboneSpec, Normalization
from .base import TorchBackbone, load_into, seeded
from .checkpoint import read_tensors
from .preprocessing import scale_by_percentiles

_INSTALL = "pip install git+https://github.com/weigertlab/tarrow"
_PERCENTILES = (1.0, 99.8)
_WIDTHS = MappingProxyType({"unet": 32, "unet_16fmaps": 16, "fpn_resnet": 16})
_KWARGS, _STATE = "model_kwargs.yaml", "model_state.pt"


class TimeArrow(TorchBackbone):
    """Features of each pixel from the backbone of a ``TimeArrowNet``.

    Parameters
    ----------
    name : str
        ``"weigertlab/tarrow"``.
    weights : str or Path
        The model's folder, as tarrow writes it: ``model_kwargs.yaml`` and ``model_state.pt``.
        There are no published weights to take by default. ``"random:<seed>"`` makes a "unet".
    device, dtype
        As `TorchBackbone`.

    Notes
    -----
    Gallusser et al., 2023; weigertlab/tarrow at commit 259b5d1. Backbones whose output has the
    size of their input are taken: ``unet`` (32 channels), ``unet_16fmaps`` and ``fpn_resnet`` (16).

    Frames are scaled as ``tarrow.utils.normalize`` scales them, percentile 1 to 0 and 99.8 to 1
    without clipping, each frame by its own: the extractor of trackastra-pretrained-feats 0.0.2
    takes the percentiles of the whole movie, so that a frame's features depend on the others.
    """

    def _describe(self, weights: str) -> BackboneSpec:
        return self._make_spec(
            weights,
            layer=self.architecture,
            width=_WIDTHS[self.architecture],
            stride=1,
            channels="single",
            normalization=Normalization("percentile", 0, 100),
            extra={"percentiles": list(_PERCENTILES), "clipped": False},
        )

    @cached_property
    def architecture(self) -> str:
        """Which of tarrow's backbones the model's folder names."""
        kwargs = {"backbone": "unet"} if self._seed() is not None else self._kwargs()
        channels = kwargs.get("n_input_channels", 1)
        if channels != 1:
            raise BackboneError(
                f"the model in {self.weights} takes {channels} channels: frames here have one"
            )
        architecture = str(kwargs.get("backbone", "unet"))
        if architecture not in _WIDTHS:
            raise UnknownNameError("pixel-wise backbone of tarrow", architecture, _WIDTHS)
        return architecture

    def _folder(self) -> Path:
        if self.weights is None:
            raise BackboneError(
                f"{self.name} has no weights of its own: pass weights=<folder of a trained model, "
                f"with {_KWARGS} and {_STATE}>, or weights='random:<seed>'"
            )
        return Path(self.weights)

    def _kwargs(self) -> dict[str, Any]:
        import yaml

        file = self._folder() / _KWARGS
        try:
            kwargs = yaml.safe_load(file.read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise BackboneError(
                f"can't read {file} ({error}): name the folder that tarrow wrote, with {_KWARGS} "
                f"and {_STATE}"
            ) from error
        if not isinstance(kwargs, dict):
            raise BackboneError(f"{file} holds a {type(kwargs).__name__}, expected named arguments")
        return kwargs

    def _weights_file(self) -> Path | None:
        return None if self._seed() is not None else self._folder() / _STATE

    def _build(self) -> nn.Module:
        with importing("tarrow", f"the backbone {self.name!r}", _INSTALL):
            from tarrow.models.backbones import get_backbone
        with seeded(self._seed() or 0):
            network, _ = get_backbone(self.architecture, n_input=1)
        file = self._weights_file()
        if file is not None:
            load_into(network, read_tensors(file, ("backbone.",)), file)
        return cast(nn.Module, network)

    def _as_input(self, images: Tensor) -> Tensor:
        return scale_by_percentiles(images, *_PERCENTILES)[:, None]

    def _forward(self, inputs: Tensor) -> Tensor:
        return cast(Tensor, self.module(inputs)).permute(0, 2, 3, 1)
