"""DINOv2 and Hiera, as the package transformers has them."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from ..errors import importing
from ..hashing import Digest
from ..spec import BackboneSpec
from .base import TorchBackbone, load_into, seeded, state_dict_digest
from .checkpoint import check_config, read_tensors
from .hub import hub_file
from .known import vit_size
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, check_input_size

_COMMON = ("hidden_act", "layer_norm_eps")


def import_transformers(purpose: str) -> Any:
    """Import the package transformers; errors as `feature_cache.errors.importing`."""
    install = 'pip install "feature-cache[transformers]"'
    with importing("transformers", f"the backbone {purpose!r}", install):
        return import_module("transformers")


class HubBackbone(TorchBackbone):
    """A backbone whose own weights are ``model.safetensors`` of the hub's repository of its name.

    Parameters
    ----------
    name, device, dtype
        As `TorchBackbone`.
    weights : str, Path or None
        None takes the hub's cached file, or downloads it; a path is a checkpoint file or a folder
        as ``save_pretrained`` writes it.
    standardize : bool
        Whether to subtract ImageNet's mean, and divide by its standard deviation, after the
        frame's own normalisation.
    """

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        standardize: bool = False,
    ) -> None:
        super().__init__(name, weights, device, dtype)
        self.mean: tuple[float, ...] = IMAGENET_MEAN if standardize else ()
        self.std: tuple[float, ...] = IMAGENET_STD if standardize else ()

    def _own_weights(self) -> Path:
        return hub_file(self.name, "model.safetensors")


class _Stretched(HubBackbone):
    """A model of transformers that takes frames stretched to one size.

    Notes
    -----
    As the extractors of trackastra-pretrained-feats 0.0.2 feed them: both sides brought to the
    input size with bicubic, antialiased interpolation, and pixels in 0..1 as they are
    (``do_normalize=False``). The models' own processors crop the centre, which loses cells at the
    border; and they standardise: ``standardize=True`` gives the models what they were trained on.
    """

    sizes: ClassVar[Mapping[str, Mapping[str, Any]]]
    patch: ClassVar[int]
    default_size: ClassVar[int]
    prefixes: ClassVar[tuple[str, ...]]
    ignored: ClassVar[tuple[str, ...]] = ("classifier.",)

    def __init__(
        self,
        name: str,
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        *,
        input_size: int | tuple[int, int] | None = None,
        standardize: bool = False,
    ) -> None:
        super().__init__(name, weights, device, dtype, standardize=standardize)
        wanted = self.default_size if input_size is None else input_size
        self.input_size = check_input_size(wanted, self.patch, name)

    def _describe(self, weights: str) -> BackboneSpec:
        return self._make_spec(
            weights,
            layer="last_hidden_state",
            width=self._width(),
            stride=self.patch,
            input_size=self.input_size,
            resize="bicubic-antialias",
            mean=self.mean,
            std=self.std,
        )

    def _width(self) -> int:
        return int(self.sizes[self.name]["hidden_size"])

    def _build(self) -> nn.Module:
        with seeded(self._seed() or 0):
            network = self._make(import_transformers(self.name))
        file = self._weights_file()
        if file is not None:
            expected = {key: getattr(network.config, key) for key in _COMMON}
            check_config(file.parent, {**self.sizes[self.name], **expected}, self.name)
            tensors = read_tensors(file, (*self.prefixes, ""))
            given = {_hub_name(n): t for n, t in tensors.items() if not n.startswith(self.ignored)}
            named = {_hub_name(name): name for name in network.state_dict()}
            state = {named.get(name, name): tensor for name, tensor in given.items()}
            load_into(network, state, file)
        return network

    @abstractmethod
    def _make(self, transformers: Any) -> nn.Module:
        """Build the network of this name's configuration, with random weights."""

    def _digest_network(self, network: nn.Module) -> Digest:
        state = network.state_dict()
        return state_dict_digest({_hub_name(name): tensor for name, tensor in state.items()})

    def _as_grid(self, tokens: Tensor) -> Tensor:
        height, width = (length // self.patch for length in self.input_size)
        return tokens.reshape(len(tokens), height, width, -1)


_ATTENTION = MappingProxyType(
    {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    | {"o_proj": "output.dense"}
)


def _hub_name(name: str) -> str:
    """Give a tensor of DINOv2 the name it has on the hub, which transformers 5 changes."""
    return re.sub(
        r"\.attention\.([qkvo]_proj)\.", lambda m: f".attention.{_ATTENTION[m[1]]}.", name
    )


_DINOV2_SIZES = MappingProxyType(
    {
        "small": vit_size(384, 12, 6),
        "base": vit_size(768, 12, 12),
        "large": vit_size(1024, 24, 16),
        "giant": {**vit_size(1536, 40, 24), "use_swiglu_ffn": True},
    }
)


class DinoV2(_Stretched):
    """Patch tokens of DINOv2, without the CLS token and the registers.

    Parameters
    ----------
    name : str
        ``"facebook/dinov2-{small,base,large,giant}"`` or ``"facebook/dinov2-with-registers-…"``.
    weights, device, dtype, standardize
        As `HubBackbone`.
    input_size : int or (H, W)
        What frames are stretched to, a multiple of 14; 224 by default, a grid of 16 x 16.

    Notes
    -----
    Oquab et al., 2023; Darcet et al., 2023. Sizes from the ``config.json`` of each repository:
    patches of 14, position embeddings for 518 x 518, which transformers interpolates.
    """

    sizes = MappingProxyType(
        {f"facebook/dinov2-{size}": config for size, config in _DINOV2_SIZES.items()}
        | {
            f"facebook/dinov2-with-registers-{size}": {**config, "num_register_tokens": 4}
            for size, config in _DINOV2_SIZES.items()
        }
    )
    patch = 14
    default_size = 224
    prefixes = ("dinov2.", "dinov2_with_registers.")

    def _make(self, transformers: Any) -> nn.Module:
        config = {"image_size": 518, "patch_size": self.patch, **self.sizes[self.name]}
        if self._registers():
            network = transformers.Dinov2WithRegistersModel(
                transformers.Dinov2WithRegistersConfig(**config)
            )
        else:
            network = transformers.Dinov2Model(transformers.Dinov2Config(**config))
        return cast(nn.Module, network)

    def _registers(self) -> int:
        return int(self.sizes[self.name].get("num_register_tokens", 0))

    def _forward(self, inputs: Tensor) -> Tensor:
        tokens: Tensor = self.module(pixel_values=inputs).last_hidden_state
        return self._as_grid(tokens[:, 1 + self._registers() :])


def _hiera_sizes(
    embed_dim: int, heads: int, depths: tuple[int, int, int, int]
) -> Mapping[str, Any]:
    return {
        "embed_dim": embed_dim,
        "num_heads": tuple(heads * 2**stage for stage in range(4)),
        "depths": depths,
    }


class Hiera(_Stretched):
    """The last stage of Hiera.

    Parameters
    ----------
    name : str
        ``"facebook/hiera-{tiny,small,base,base-plus,large,huge}-224-hf"``.
    weights, device, dtype, standardize
        As `HubBackbone`.
    input_size : int or (H, W)
        What frames are stretched to, a multiple of 32; 672 by default, a grid of 21 x 21.

    Notes
    -----
    Ryali et al., 2023; sizes from ``hiera/hiera.py`` of facebookresearch/hiera. The position
    embeddings are the trained ones for 224 x 224, interpolated to the input size by transformers.
    The extractor of trackastra-pretrained-feats 0.0.2 makes a ``HieraModel(config)`` and never
    loads weights into it: its numbers are random, other ones in every process, and can't be had
    again.
    """

    sizes = MappingProxyType(
        {
            "facebook/hiera-tiny-224-hf": _hiera_sizes(96, 1, (1, 2, 7, 2)),
            "facebook/hiera-small-224-hf": _hiera_sizes(96, 1, (1, 2, 11, 2)),
            "facebook/hiera-base-224-hf": _hiera_sizes(96, 1, (2, 3, 16, 3)),
            "facebook/hiera-base-plus-224-hf": _hiera_sizes(112, 2, (2, 3, 16, 3)),
            "facebook/hiera-large-224-hf": _hiera_sizes(144, 2, (2, 6, 36, 4)),
            "facebook/hiera-huge-224-hf": _hiera_sizes(256, 4, (2, 6, 36, 4)),
        }
    )
    patch = 32
    default_size = 672
    prefixes = ("hiera.",)
    ignored = ("classifier.", "pooler.", "decoder.")

    def _width(self) -> int:
        return 8 * int(self.sizes[self.name]["embed_dim"])

    def _make(self, transformers: Any) -> nn.Module:
        config = transformers.HieraConfig(**self.sizes[self.name])
        return cast(nn.Module, transformers.HieraModel(config, add_pooling_layer=False))

    def _forward(self, inputs: Tensor) -> Tensor:
        output = self.module(pixel_values=inputs, interpolate_pos_encoding=True)
        return self._as_grid(output.last_hidden_state)
