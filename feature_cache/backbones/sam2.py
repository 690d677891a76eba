"""SAM 2 and SAM 2.1: grids of the image encoder, or of its features with the memory of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import BackboneError, UnknownNameError, importing
from ..spec import BackboneSpec, Context
from .base import TorchBackbone, load_checkpoint, load_into, seeded
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
    context : (int, int)
        Of how many frames before the image embedding has the memory, and 0: SAM 2 looks back. Its
        video model is trained with 6. By default none.

    Notes
    -----
    sam2 1.1.0: ``SAM2ImagePredictor.set_image`` and ``SAM2Transforms``. The image embedding is the
    last level of the feature pyramid plus ``no_mem_embed``, the high-resolution level its first,
    after ``conv_s0`` of the mask decoder.

    With a context, the window goes through ``SAM2Base.track_step`` as a video whose first frame was
    given an empty mask (``SAM2VideoPredictor.add_new_mask``) and that is propagated without any
    other prompt: each frame's memory is encoded with the mask that is predicted there. The grid is
    the output of the memory attention at the last frame, ``pix_feat_with_mem``. The predictor keeps
    memories in bfloat16, and this does not.
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
        context: Context = Context(),  # noqa: B008
    ) -> None:
        super().__init__(name, weights, device, dtype)
        if name not in NAMES:
            raise UnknownNameError("backbone of SAM 2", name, NAMES)
        self.input_size = check_input_size(input_size, 32, name)
        self.resize = "bilinear-antialias" if antialias else "bilinear"
        self.standardize = standardize
        self.context = Context(*context)
        if any(self.context):
            self._check_context()

    def _check_context(self) -> None:
        """Refuse what SAM 2's memory does not do."""
        reason = "frames after" if self.context.after else ""
        reason = reason or ("/highres, which has no memory" if self._is_highres else "")
        height, width = self.input_size
        reason = reason or (f"an input size of {height}x{width}" if height != width else "")
        if reason or self.context.before < 0:
            raise BackboneError(
                f"context={self.context.before},{self.context.after} of {self.name} with "
                f"{reason or 'fewer than no frames'}: expected frames before and 0 after, such as "
                "context=2,0, the image embedding and a square input"
            )

    @property
    def _model(self) -> str:
        return self.name.removesuffix("/highres")

    @property
    def _is_highres(self) -> bool:
        return self.name.endswith("/highres")

    def _describe(self, weights: str) -> BackboneSpec:
        highres, scaled = self._is_highres, self.standardize
        remembers = any(self.context)
        layer = "backbone_fpn[0], conv_s0" if highres else "backbone_fpn[-1]"
        return self._make_spec(
            weights,
            layer="memory_attention" if remembers else layer,
            width=32 if highres else 256,
            stride=4 if highres else 16,
            input_size=self.input_size,
            resize=self.resize,
            mean=IMAGENET_MEAN if scaled else (0.0, 0.0, 0.0),
            std=IMAGENET_STD if scaled else (1.0, 1.0, 1.0),
            extra={"memory": "empty mask"} if remembers else {"no_mem_embed": not highres},
            context=self.context,
        )

    def _weights_purpose(self) -> str:
        whole = ", all of it" if any(self.context) else ""
        return f"{super()._weights_purpose()}{whole}"

    def _own_weights(self) -> Path:
        return hub_file(self._model, published_files(self._model)[1])

    def _build(self) -> nn.Module:
        file = self._weights_file()
        state = load_checkpoint(file) if file is not None else None
        with seeded(self._seed() or 0):
            network = _build_upstream(
                self._model, self.input_size[0] if any(self.context) else None
            )
        if state is not None:
            load_into(network, state, file)
        return network if any(self.context) else _ImageEncoder(network)

    def _as_input(self, images: Tensor) -> Tensor:
        inputs = super()._as_input(images.flatten(0, -3))
        return inputs.view(*images.shape[:-2], *inputs.shape[1:])

    def _forward(self, inputs: Tensor) -> Tensor:
        if any(self.context):
            return self._remember(inputs)
        module = cast(_ImageEncoder, self.module)
        levels = module.image_encoder(inputs)["backbone_fpn"]
        if self._is_highres:
            return cast(Tensor, module.conv_s0(levels[0])).permute(0, 2, 3, 1)
        return cast(Tensor, levels[-1]).permute(0, 2, 3, 1) + module.no_mem_embed

    def _remember(self, inputs: Tensor) -> Tensor:
        """Map windows (B, T, 3, H, W) to grids of their last frames."""
        network: Any = self.module
        seen: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        count = inputs.shape[1]
        for t, images in enumerate(inputs.unbind(1)):
            found = network.forward_image(images)
            _, features, places, sizes = network._prepare_backbone_features(found)
            step = {"frame_idx": t, "is_init_cond_frame": t == 0, "num_frames": count}
            if t == count - 1:
                break
            kind = "non_cond_frame_outputs" if t else "cond_frame_outputs"
            seen[kind][t] = network.track_step(
                **step, current_vision_feats=features, current_vision_pos_embeds=places,
                feat_sizes=sizes, point_inputs=None, output_dict=seen,
                mask_inputs=None if t else torch.zeros_like(images[:, :1]),
            )  # fmt: skip
        grid = network._prepare_memory_conditioned_features(
            **step, current_vision_feats=features[-1:], current_vision_pos_embeds=places[-1:],
            feat_sizes=sizes[-1:], output_dict=seen,
        )  # fmt: skip
        return cast(Tensor, grid).permute(0, 2, 3, 1)


class _ImageEncoder(nn.Module):
    """What of SAM 2 has a part in the grids; only this is kept, and enters the key."""

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.image_encoder = network.image_encoder
        self.no_mem_embed = network.no_mem_embed
        self.conv_s0 = network.sam_mask_decoder.conv_s0


def _build_upstream(model: str, size: int | None) -> nn.Module:
    """Build the network of the package's own configuration, with random weights.

    The file is read as it is, as Hydra's ``compose`` depends on the state of the process.
    """
    with importing("sam2", f"the backbone {model!r}", SAM2_INSTALL):
        import sam2
        from hydra.utils import instantiate
        from omegaconf import OmegaConf
    file = Path(sam2.__path__[0]) / published_files(model)[0]
    config = OmegaConf.load(file).model
    config.image_size = size or config.image_size
    return cast(nn.Module, instantiate(config, _recursive_=True))
