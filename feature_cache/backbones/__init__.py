"""The left wing: models that turn frames into grids. Knows torch, and nothing of zarr."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import BackboneError, UnknownNameError
from .catalogue import BACKBONES, BackboneInfo

if TYPE_CHECKING:
    from .base import Backbone

__all__ = ["ENTRY_POINTS", "BackboneInfo", "list_backbones", "load_backbone"]

ENTRY_POINTS = "feature_cache.backbones"
"""Group of entry points by which other packages add backbones."""


def list_backbones() -> list[BackboneInfo]:
    """List the backbones that `load_backbone` knows: ours, then those of other packages.

    Another package adds one by an entry point of the group ``feature_cache.backbones``: its name
    is the backbone's, or a prefix ending in ``"/"`` for a family; its object is called as
    ``factory(name, weights, device, dtype, **options)`` and gives a `Backbone`. It can't replace
    one of ours.
    """
    return [*BACKBONES, *map(_describe_entry, entry_points(group=ENTRY_POINTS))]


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
    factory = find_factory(name)
    _check_options(name, factory, options)
    backbone = factory(name, weights, device, dtype, **options)
    if not callable(getattr(backbone, "embed", None)):
        raise BackboneError(f"{factory} gave no backbone for {name!r}: it has no embed()")
    return cast("Backbone", backbone)


def find_factory(name: str) -> Callable[..., object]:
    """Give what makes a backbone of this name; errors as `load_backbone`."""
    known = list_backbones()
    info = next((info for info in known if info.fits(name)), None)
    if info is None:
        names = [info.name for info in known]
        raise UnknownNameError("backbone", name, names, "feature-cache backbones")
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
