"""SAM 2 and SAM 2.1: grids of the image encoder, without prompts, memory or decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..errors import MissingDependencyError, UnknownNameError
from ..spec import BackboneSpec
from .base import TorchBackbone, load_checkpoint, load_into, resize_frames, seeded
from .catalogue import SAM2_INSTALL
from .hub import hub_file
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, check_input_size
from .weights import SAM2_SIZES, published_files

NAMES = tuple(
    f"facebook/{version}-hiera-{size}{layer}"
    for version in ("sam2.1", "sam2")
    for layer in ("", "/highres")
    for size in SAM2_SIZES
)
"""Every name of the family, smallest first."""


class SAM2(TorchBackbone):
    """Grids of SAM 2's image encoder.

    Parameters
    ----------
    name, weights, device, dtype
        As `TorchBackbone`; by default the checkpoint of the hub's repository of that name.
        A name ending in ``/highres`` gives the finest level that the mask decoder sees, stride 4
        and 32 channels, instead of the image embedding, stride 16 and 256 channels.
    input_size : int or (height, width)
        What frames are resized to, multiples of 32; 1024 is the model's own.
    antialias : bool
        Whether that resize smooths frames that it shrinks. SAM2's own predictor does,
        trackastra-pretrained-feats does not (the default here); it makes no difference to frames
        of at most `input_size`.
    standardize : bool
        Whether ImageNet's mean is subtracted and its deviation divided by, as SAM 2 was trained.
        trackastra-pretrained-feats leaves it out, and so does the default: its numbers.

    Notes
    -----
    sam2 1.1.0: ``SAM2ImagePredictor.set_image`` and ``SAM2Transforms``. The image embedding is the
    last level of the feature pyramid plus ``no_mem_embed``, the high-resolution level its first,
    after ``conv_s0`` of the mask decoder.
    """

    def __init__(
        self,
        name: str = "facebook/sam2.1-hiera-tiny",
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        input_size: int | tuple[int, int] = 1024,
        antialias: bool = False,
        standardize: bool = False,
    ) -> None:
        super().__init__(name, weights, device, dtype)
        if name not in NAMES:
            raise UnknownNameError("backbone of SAM 2", name, NAMES)
        self.input_size = check_input_size(input_size, 32, name)
        self.resize = "bilinear-antialias" if antialias else "bilinear"
        self.standardize = standardize

    @property
    def _model(self) -> str:
        return self.name.removesuffix("/highres")

    @property
    def _is_highres(self) -> bool:
        return self.name.endswith("/highres")

    def _describe(self, weights: str) -> BackboneSpec:
        highres, scaled = self._is_highres, self.standardize
        return self._make_spec(
            weights,
            layer="backbone_fpn[0], conv_s0" if highres else "backbone_fpn[-1]",
            width=32 if highres else 256,
            stride=4 if highres else 16,
            input_size=self.input_size,
            resize=self.resize,
            mean=IMAGENET_MEAN if scaled else (0.0, 0.0, 0.0),
            std=IMAGENET_STD if scaled else (1.0, 1.0, 1.0),
            extra={"no_mem_embed": not highres},
        )

    def _own_weights(self) -> Path:
        return hub_file(self._model, published_files(self._model)[1])

    def _build(self) -> nn.Module:
        file = self._weights_file()
        state = load_checkpoint(file) if file is not None else None
        with seeded(self._seed() or 0):
            network = _build_upstream(self._model)
        if state is not None:
            load_into(network, state, file)
        return _ImageEncoder(network)

    def _as_input(self, images: Tensor) -> Tensor:
        return super()._as_input(resize_frames(images, self.input_size, self.resize))

    def _forward(self, inputs: Tensor) -> Tensor:
        module = cast(_ImageEncoder, self.module)
        levels = module.image_encoder(inputs)["backbone_fpn"]
        if self._is_highres:
            return cast(Tensor, module.conv_s0(levels[0])).permute(0, 2, 3, 1)
        return cast(Tensor, levels[-1]).permute(0, 2, 3, 1) + module.no_mem_embed


class _ImageEncoder(nn.Module):
    """What of SAM 2 has a part in the grids; only this is kept, and enters the key."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.image_encoder = network.image_encoder
        self.no_mem_embed = network.no_mem_embed
        self.conv_s0 = network.sam_mask_decoder.conv_s0


def _build_upstream(model: str) -> nn.Module:
    """Build the network of the package's own configuration, with random weights.

    The file is read as it is, as Hydra's ``compose`` depends on the state of the process.
    """
    try:
        import sam2
        from hydra.utils import instantiate
        from omegaconf import OmegaConf
    except ImportError as error:
        raise MissingDependencyError("sam2", f"the backbone {model!r}", SAM2_INSTALL) from error
    file = Path(sam2.__path__[0]) / published_files(model)[0]
    return cast(nn.Module, instantiate(OmegaConf.load(file).model, _recursive_=True))
