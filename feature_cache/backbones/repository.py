"""Any vision model of transformers that gives patch tokens or feature maps, by its repository."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from ..errors import BackboneError, UnknownNameError
from ..forks import cached_property
from ..hashing import digest_json
from ..spec import BackboneSpec
from .base import ROUND_UP, TorchBackbone, load_checkpoint, seeded
from .checkpoint import as_json, check_config
from .hub import hub_file
from .known import KNOWN
from .preprocessing import check_input_size
from .several_layers import LayeredBackbone
from .transformers import import_transformers

Fpn: TypeAlias = Literal["fpn-0", "fpn-1", "fpn-2", "fpn-3"]
_RESAMPLE = MappingProxyType({2: "bilinear", 3: "bicubic"})
_PARTS = ("detector_config", "vision_config")
"""Where the vision model stands in a larger model's configuration, one in the other."""
_NOTES = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Of a configuration, what decides no number here."""
_SCALES = ("image_mean", "image_std")
_TOKENS = (
    *("cls_token", "class_embedding", "distillation_token"),
    *("register_tokens", "cls_register_token"),
)
"""Parameters that are tokens before those of the patches."""


class Repository(LayeredBackbone):
    """Patch tokens or feature maps of a model of transformers, without class and register tokens.

    Parameters
    ----------
    name : str
        ``transformers/`` and the hub's repository, such as ``"transformers/google/siglip2-…"``;
        or one of those that are known by their own name, such as ``"facebook/dinov3-…"``.
    weights : str, Path or None
        None takes the hub's cached file, or downloads it; a path is a checkpoint file, or a folder
        as ``save_pretrained`` writes it, whose ``config.json`` counts.
    device, dtype
        As `TorchBackbone`.
    layer : int or str
        Which block or stage, from either end. Of the last one (default) the grid is what the model
        itself gives on, after its final norm; no other is normalised. Models with a feature
        pyramid, as SAM 3, also have ``"fpn-0"`` (finest) to ``"fpn-3"``.
    input_size : int or (height, width), optional
        What frames are resized to. By default the model's own size; convolutional models take
        frames as they are, rounded up to whole cells.
    standardize : bool
        Whether mean and deviation of the model's processor are subtracted and divided by.
    revision : str, optional
        Branch, tag or commit of the repository. The key has a digest of the weights, in any case.

    Notes
    -----
    Built, loaded and named by transformers' own ``from_pretrained``; what a checkpoint has beside
    the vision model is left out. The grid is read off the model's output, whose size is compared
    with its configuration: what is neither patch tokens nor maps is refused.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        layer: int | Fpn = -1,
        input_size: int | tuple[int, int] | None = None,
        standardize: bool = True,
        revision: str | None = None,
    ) -> None:
        super().__init__(name, weights, device, dtype)
        self.layer, self.standardize, self.revision_of_hub = layer, standardize, revision
        self.input_size = None if input_size is None else check_input_size(input_size, 1, name)

    @classmethod
    def options_of(cls, spec: BackboneSpec) -> dict[str, Any]:
        """Give the options of a spec."""
        kind, _, number = spec.layer.partition(".")
        layer: Any = int(number) if number else -1 if kind == "last_hidden_state" else kind
        size = spec.input_size
        return {"layer": layer, "input_size": size, "standardize": spec.is_standardized}

    @property
    def _repository(self) -> str:
        return self.name.removeprefix("transformers/")

    # What the model is

    @cached_property
    def _plain_config(self) -> Mapping[str, Any]:
        """What the repository says of the model."""
        known = KNOWN.get(self._repository)
        return self._read_json("config.json") if known is None else as_json(known.config)

    @cached_property
    def _config(self) -> Any:
        """The configuration of the vision model."""
        transformers = import_transformers(self.name)
        try:
            config = transformers.AutoConfig.for_model(**self._plain_config)
        except (KeyError, ValueError, TypeError) as error:
            raise BackboneError(
                f"transformers {transformers.__version__} does not know the model of "
                f"{self._repository}: {str(error).splitlines()[0]}; try a newer one, or "
                "timm/<model>"
            ) from error
        for part in _PARTS:
            config = getattr(config, part, config)
        if hasattr(config, "vision_use_head"):
            config.vision_use_head = False
        return config

    @cached_property
    def _preprocessing(self) -> tuple[tuple[float, ...], tuple[float, ...], str]:
        """Mean, deviation and interpolation of the model's processor."""
        known = KNOWN.get(self._repository)
        if known is not None:
            return known.mean, known.std, known.resample
        try:
            plain: Any = self._read_json("preprocessor_config.json")
        except BackboneError:
            plain = self._read_json("processor_config.json").get("image_processor")
        if not isinstance(plain, dict):
            raise BackboneError(f"the processor_config.json of {self.name} has no image_processor")
        scaled = plain.get("do_normalize", True)
        mean, std = (tuple(plain.get(key) or ()) if scaled else () for key in _SCALES)
        if scaled and self.standardize and not (mean and std):
            raise BackboneError(
                f"the processor of {self.name} standardises, and names no mean and deviation: "
                "expected image_mean and image_std; pass ?standardize=false to go without"
            )
        return mean, std, _RESAMPLE.get(plain.get("resample", 3), "bicubic")

    def _read_json(self, file: str) -> Mapping[str, Any]:
        folder = None if self.weights is None or self._seed() is not None else Path(self.weights)
        path = folder / file if folder is not None and folder.is_dir() else None
        path = path or hub_file(self._repository, file, self.revision_of_hub)
        try:
            plain = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise BackboneError(f"can't read {path}: {error}") from error
        if not isinstance(plain, dict):
            raise BackboneError(f"{path} holds a {type(plain).__name__}: expected names and values")
        return plain

    @cached_property
    def _outline(self) -> Any:
        """The model without weights."""
        with torch.device("meta"):
            return self._create().eval()

    @cached_property
    def _tokens(self) -> int:
        """Count the tokens before those of the patches."""
        return sum(
            parameter.numel() // parameter.shape[-1]
            for name, parameter in self._outline.named_parameters()
            if name.rpartition(".")[2] in _TOKENS
        )

    @cached_property
    def _terms(self) -> dict[str, Any]:
        """What of the spec the model and its processor decide."""
        network = self._outline
        own = _pair(getattr(self._config, "image_size", None))
        size = self.input_size or own or (256, 256)
        try:
            with torch.no_grad():
                [grid] = self._read(
                    network, torch.empty((1, 3, *size), device="meta"), [self.layer]
                )
        except (RuntimeError, ValueError, TypeError) as error:
            if isinstance(error, BackboneError):
                raise
            said = shorten(str(error), 200, placeholder=" …")
            raise BackboneError(f"{self.name} can't embed images of {size}: {said}") from error
        is_native = self.input_size is None and not hasattr(network.config, "patch_size")
        is_native = is_native and not hasattr(network.config, "backbone_config")
        mean, std, rule = self._preprocessing
        return {
            "width": grid.shape[3],
            "stride": size[0] // grid.shape[1],
            "input_size": None if is_native else size,
            "resize": f"{ROUND_UP}bilinear" if is_native else f"{rule}-antialias",
            "mean": mean if self.standardize else (),
            "std": std if self.standardize else (),
        }

    def _describe(self, weights: str) -> BackboneSpec:
        terms, settings = self._terms, {}
        if self._repository not in KNOWN:  # which decide numbers, and may be others at any time
            told = self._plain_config
            for part in _PARTS:
                told = told.get(part, told)
            told = {k: v for k, v in told.items() if k not in _NOTES}
            settings = {"config": digest_json(told).hex()}
        return self._make_spec(weights, layer=self._name_layer(), extra=settings, **terms)

    def _name_layer(self) -> str:
        if isinstance(self.layer, str):
            return self.layer
        count = self._depth
        if not -count <= self.layer < count:
            numbers = map(str, range(count))
            raise UnknownNameError(f"layer of {self.name}", str(self.layer), numbers)
        last = self.layer in (-1, count - 1)
        return "last_hidden_state" if last else f"hidden_states.{self.layer % count}"

    # Its weights

    def _own_weights(self) -> Path:
        return hub_file(self._repository, "model.safetensors", self.revision_of_hub)

    def _create(self) -> Any:
        auto, config = import_transformers(self.name).AutoModel, self._config
        try:
            return auto.from_config(config, dtype=torch.float32, add_pooling_layer=False)
        except TypeError:
            return auto.from_config(config, dtype=torch.float32)

    def _build(self) -> nn.Module:
        file = self._weights_file()
        known = KNOWN.get(self._repository)
        if file is not None and known is not None:
            check_config(file.parent, known.config, self.name)
        with seeded(self._seed() or 0), _quietly():
            network = self._create()
            if file is not None:
                network = self._fill(type(network), load_checkpoint(file), file)
        with suppress(ImportError):  # what transformers puts into a network when it is first run
            import_module("transformers.utils.output_capturing").maybe_install_capturing_hooks(
                network
            )
        return cast(nn.Module, network)

    def _fill(self, kind: Any, state: dict[str, Tensor], file: Path) -> Any:
        """Load a checkpoint as transformers does; it must have all of the vision model."""
        state = _cut_prefix(state, self._outline.state_dict())
        # not the dtype that the configuration notes, which is in no key
        options = {"config": self._config, "dtype": torch.float32}
        options |= {"state_dict": state, "output_loading_info": True}
        if "add_pooling_layer" in inspect.signature(kind.__init__).parameters:
            options["add_pooling_layer"] = False
        try:
            network, info = kind.from_pretrained(None, **options)
        except (RuntimeError, ValueError) as error:
            raise BackboneError(f"{file} does not fit {self.name}: {error}") from error
        lacking = [*info["missing_keys"], *info["mismatched_keys"]]
        if lacking:
            raise BackboneError(
                f"{file} does not fit {self.name}: {len(lacking)} of {len(network.state_dict())} "
                f"tensors are missing or of another shape, first {lacking[0]!r}"
            )
        return network.float()

    # From frames to grids

    def _forward_layers(self, inputs: Tensor, members: Sequence[TorchBackbone]) -> list[Tensor]:
        return self._read(self.module, inputs, [cast(Repository, one).layer for one in members])

    def _read(self, network: Any, inputs: Tensor, layers: Sequence[int | str]) -> list[Tensor]:
        """Run a network, and read grids (B, gh, gw, C) off its output."""
        output = network(**self._arguments(network, inputs, layers))
        size = inputs.shape[2:]
        return [self._as_grid(self._choose(output, layer), size, layer) for layer in layers]

    def _arguments(
        self, network: Any, inputs: Tensor, layers: Sequence[int | str]
    ) -> dict[str, Any]:
        known = inspect.signature(network.forward).parameters
        arguments: dict[str, Any] = {"pixel_values": inputs}
        if self._is_staged or any(isinstance(layer, int) for layer in layers):
            arguments["output_hidden_states"] = True
        own = _pair(getattr(self._config, "image_size", None))
        if "interpolate_pos_encoding" in known and own != tuple(inputs.shape[2:]):
            arguments["interpolate_pos_encoding"] = True
        if "spatial_shapes" in known:
            arguments |= _as_patches(inputs, self._config.patch_size)
        return arguments

    @property
    def _is_staged(self) -> bool:
        return not hasattr(self._config, "num_hidden_layers")

    @property
    def _depth(self) -> int:
        config = getattr(self._config, "backbone_config", self._config)
        return int(getattr(config, "num_hidden_layers", 0) or len(config.depths))

    def _choose(self, output: Any, layer: int | str) -> Tensor:
        """Take a layer of a model's output: (B, N, C), (B, C, h, w) or (B, h, w, C)."""
        if isinstance(layer, str):
            levels = getattr(output, "fpn_hidden_states", None) or ()
            names = [f"fpn-{level}" for level in range(len(levels))]
            if layer not in names:
                raise UnknownNameError(f"layer of {self.name}", layer, [*names, "-1"])
            return cast(Tensor, levels[names.index(layer)])
        if layer in (-1, self._depth - 1) and not self._is_staged:
            return cast(Tensor, output.last_hidden_state)
        return cast(Tensor, output.hidden_states[layer % self._depth - self._depth])

    def _as_grid(self, found: Tensor, size: Sequence[int], layer: int | str) -> Tensor:
        """Give (B, gh, gw, C) of maps, or of tokens less those of class and registers."""
        tokens = self._tokens
        if found.ndim == 4:
            config = getattr(self._config, "backbone_config", self._config)
            is_first = isinstance(layer, str) or found.shape[3] != getattr(config, "hidden_size", 0)
            return found.permute(0, 2, 3, 1) if is_first else found
        stride = round(math.sqrt(size[0] * size[1] / max(1, found.shape[1] - tokens)))
        rows, columns = (length // stride for length in size)
        if found.ndim != 3 or found.shape[1] != tokens + rows * columns:
            raise BackboneError(
                f"layer {layer} of {self.name} has shape {tuple(found.shape)} for images of "
                f"{tuple(size)}: neither maps nor one token a patch; try another layer, or "
                "timm/<model>"
            )
        return found[:, tokens:].reshape(len(found), rows, columns, -1)


def _pair(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else None


def _cut_prefix(state: dict[str, Tensor], wanted: Mapping[str, object]) -> dict[str, Tensor]:
    """Give the part of a larger model's checkpoint that is this model's, by its names."""
    last = list(wanted)[-1]
    prefixes = sorted(name.removesuffix(last) for name in state if name.endswith(f".{last}"))
    if last in state or not prefixes:
        return state
    chosen = max(prefixes, key=lambda prefix: sum(f"{prefix}{name}" in state for name in wanted))
    return {n.removeprefix(chosen): t for n, t in state.items() if n.startswith(chosen)}


def _as_patches(inputs: Tensor, patch: int) -> dict[str, Tensor]:
    """Cut images into rows of patches, as models of any shape of images (NaFlex) take them."""
    rows, columns = (length // patch for length in inputs.shape[2:])
    cells = inputs.reshape(*inputs.shape[:2], rows, patch, columns, patch)
    patches = cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
    shape = torch.tensor([[rows, columns]] * len(inputs))
    mask = torch.ones(patches.shape[:2], dtype=torch.int64, device=inputs.device)
    return {"pixel_values": patches, "spatial_shapes": shape, "pixel_attention_mask": mask}


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what transformers says of tensors beside the vision model, and its bars, away."""
    logging = import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
