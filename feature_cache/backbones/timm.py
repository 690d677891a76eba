"""Any model of timm that has feature maps or tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import BackboneError, UnknownNameError, find_nearest, importing
from ..forks import cached_property
from ..hashing import JSON
from ..spec import BackboneSpec
from .base import ROUND_UP, TorchBackbone, load_checkpoint, seeded
from .hub import hub_file
from .preprocessing import check_input_size
from .several_layers import LayeredBackbone

_INSTALL = 'pip install "feature-cache[timm]"'


class Timm(LayeredBackbone):
    """Intermediate features of a model of timm.

    Parameters
    ----------
    name : str
        ``timm/`` and the model's name, such as ``"timm/convnext_atto.d2_in1k"``; without a tag it
        is the default one. ``timm/hf-hub:<repository>`` is a model of timm that lies on the hub.
    weights, device, dtype
        As `TorchBackbone`; by default timm's own pretrained weights. A path is a checkpoint in any
        form that the model reads.
    layer : int
        Index into the model's intermediate features, from either end. The last (default) of a
        convolutional model is coarse, stride 32 as a rule; -2 has half of it.
    input_size : int or (height, width), optional
        What frames are resized to. By default the model's own size, for models made for one;
        otherwise frames keep theirs, but for the rounding up to a whole number of cells that
        makes the grid span the frame.

    Notes
    -----
    timm's ``forward_intermediates``: class and register tokens are dropped, patch tokens become a
    grid. The final norm is applied to a vision transformer's last layer (as ``forward_features``
    does), and to no other. Mean, deviation and interpolation (antialiased) are those of the
    model's ``pretrained_cfg``.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        layer: int = -1,
        input_size: int | tuple[int, int] | None = None,
    ) -> None:
        super().__init__(name, weights, device, dtype)
        self.input_size = None if input_size is None else check_input_size(input_size, 1, name)
        self.layer = layer

    @classmethod
    def options_of(cls, spec: BackboneSpec) -> dict[str, Any]:
        """Give the options of a spec, which names the layer as the model does."""
        with torch.device("meta"):
            network = cls(spec.name)._create()
        layers = [level["module"] for level in getattr(network, "feature_info", [])]
        layer = {"layer": layers.index(spec.layer)} if spec.layer in layers else {}
        return {"input_size": spec.input_size, **layer}

    @cached_property
    def _plan(self) -> _Plan:
        """What the architecture says, from a model without weights."""
        with torch.device("meta"):
            network = self._create()
        return _plan(self.name, network, self.layer, self.input_size)

    def _describe(self, weights: str) -> BackboneSpec:
        plan, hub = self._plan, self._hub_config if self._repository else {}
        built: dict[str, JSON] = {
            name: hub[name] for name in ("architecture", "model_args") if name in hub
        }
        return self._make_spec(weights, extra={"norm": plan.norm, **built}, **plan.terms)

    def _weights_purpose(self) -> str:
        return f"{super()._weights_purpose()}, input {self.input_size}"

    def _pretrained_cfg(self) -> Any:
        timm = _import_timm(self.name)
        try:
            return timm.get_pretrained_cfg(self._model)
        except RuntimeError as error:  # a tag that is none
            tags = timm.list_pretrained(f"{self._model.partition('.')[0]}.*")
            raise UnknownNameError("model of timm", self._model, tags) from error

    def _own_weights(self) -> Path:
        if self._repository:
            return hub_file(self._repository, "model.safetensors")
        config = self._pretrained_cfg()
        repo = getattr(config, "hf_hub_id", None)
        if not repo:
            raise BackboneError(
                f"timm has no weights for {self.name} on the hub: pass weights=<path of a "
                "checkpoint> or weights='random:<seed>'"
            )
        return hub_file(repo, config.hf_hub_filename or "model.safetensors")

    @property
    def _repository(self) -> str:
        """The hub's repository, where the name is ``timm/hf-hub:<repository>``."""
        _, prefix, repository = self.name.partition("hf-hub:")
        return repository if prefix else ""

    @cached_property
    def _hub_config(self) -> dict[str, Any]:
        """What a repository says of its model: ``architecture``, ``pretrained_cfg``."""
        file = hub_file(self._repository, "config.json")
        config = json.loads(file.read_bytes())
        if "architecture" not in config:
            raise BackboneError(
                f"{self._repository} holds no model of timm ({file} names no architecture): try "
                f"transformers/{self._repository}"
            )
        return cast("dict[str, Any]", config)

    @property
    def _model(self) -> str:
        if self._repository:
            return str(self._hub_config["architecture"])
        return self.name.removeprefix("timm/")

    def _build(self) -> nn.Module:
        file = self._weights_file()
        if file is not None:
            network = self._create_with(load_checkpoint(file), file)
        else:
            with seeded(self._seed() or 0):
                network = self._create()
        network.reset_classifier(0)  # type: ignore[operator]
        return network

    def _create(self, **options: Any) -> nn.Module:
        timm = _import_timm(self.name)
        name = self._model
        if not timm.is_model(name):
            close = find_nearest(name, timm.list_models(), 5)
            raise UnknownNameError("model of timm", name, (*close, "all of timm.list_models()"))
        known = self._pretrained_cfg()
        if self.input_size is not None and _has_own_size(known):
            options["img_size"] = self.input_size
        if self._repository:
            options = {**self._hub_config.get("model_args", {}), **options}
            overlay = {**self._hub_config.get("pretrained_cfg", {}), "hf_hub_id": self._repository}
            options["pretrained_cfg_overlay"] = overlay | options.get("pretrained_cfg_overlay", {})
        try:
            return cast(nn.Module, timm.create_model(name, **options))
        except TypeError as error:
            raise BackboneError(f"{self.name} can't take another input_size: {error}") from error

    def _create_with(self, state: dict[str, Tensor], file: Path) -> nn.Module:
        """Build the model from a checkpoint, which timm converts where it is in another form."""
        config = self._pretrained_cfg()
        head = config.classifier if isinstance(config.classifier, str) else "head"
        classes = len(state[f"{head}.weight"]) if f"{head}.weight" in state else 0
        overlay = {"state_dict": state, "num_classes": classes}
        try:
            network = self._create(
                pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes
            )
        except (RuntimeError, KeyError) as error:
            said = shorten(str(error), 200, placeholder=" …")
            raise BackboneError(
                f"{file} does not fit {self.name}: {said}; name a checkpoint of this model"
            ) from error
        network.pretrained_cfg.pop("state_dict", None)  # type: ignore[operator,union-attr]
        return network

    def _forward_layers(self, inputs: Tensor, members: Sequence[TorchBackbone]) -> list[Tensor]:
        plans = [cast(Timm, one)._plan for one in members]
        grids = read_levels(self.module, inputs, [plan.index for plan in plans])
        return [
            cast(Tensor, self.module.norm(grid) if plan.norm else grid)  # type: ignore[operator]
            for plan, grid in zip(plans, grids, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class _Plan:
    """Which level of a model, whether its final norm is applied, and what that says in a spec."""

    index: int
    norm: bool
    terms: Mapping[str, Any]


def read_levels(network: Any, inputs: Tensor, levels: Sequence[int]) -> list[Tensor]:
    """Run a model of timm, and give grids (B, gh, gw, C) of its levels."""
    indices = sorted(levels)
    found = network.forward_intermediates(
        inputs, indices=indices, stop_early=True, intermediates_only=True
    )
    return [found[indices.index(level)].permute(0, 2, 3, 1) for level in levels]


def _plan(name: str, network: Any, layer: int, input_size: tuple[int, int] | None) -> _Plan:
    levels = list(getattr(network, "feature_info", []))
    if not levels or not hasattr(network, "forward_intermediates"):
        raise BackboneError(f"{name} has no intermediate features that timm can give")
    if not -len(levels) <= layer < len(levels):
        raise UnknownNameError(f"layer of {name}", str(layer), map(str, range(len(levels))))
    index = layer % len(levels)
    config, level = network.pretrained_cfg, levels[index]
    own = _has_own_size(config) or hasattr(network, "patch_embed")
    size = input_size or (tuple(config["input_size"][1:]) if own else None)
    if size is not None and (size[0] % level["reduction"] or size[1] % level["reduction"]):
        raise BackboneError(f"{name}: input_size {size} is no multiple of {level['reduction']}")
    rule = config["interpolation"] if config["interpolation"] != "random" else "bicubic"
    terms = {
        "layer": level["module"],
        "width": level["num_chs"],
        "stride": level["reduction"],
        "input_size": size,
        "resize": f"{rule}-antialias" if size is not None else f"{ROUND_UP}bilinear",
        "mean": tuple(config["mean"]),
        "std": tuple(config["std"]),
    }
    is_normed = hasattr(network, "num_prefix_tokens") and index == len(levels) - 1
    return _Plan(index, is_normed, terms)


def _has_own_size(config: Any) -> bool:
    """Whether a model is made for one input size."""
    read = config.get if isinstance(config, dict) else lambda key: getattr(config, key)
    return bool(read("fixed_input_size"))


def _import_timm(name: str) -> ModuleType:
    with importing("timm", f"the backbone {name!r}", _INSTALL):
        return import_module("timm")
