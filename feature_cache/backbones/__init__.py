"""The left wing: models that turn frames into grids. Knows torch, and nothing of zarr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import BackboneError, UnknownNameError, find_nearest
from .catalogue import BACKBONES, BackboneInfo
from .name import ANY_OPTION, OptionInfo, join_name, options_of_factory, split_name

if TYPE_CHECKING:
    from .base import Backbone

__all__ = [
    "ENTRY_POINTS",
    "BackboneInfo",
    "OptionInfo",
    "list_backbones",
    "list_options",
    "load_backbone",
]

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
        One of `list_backbones`. Options may follow, as ``"timm/test_vit?layer=2&dtype=bfloat16"``:
        all that follows here but `device`, typed as `list_options` says. ``layer=A,B`` makes
        `Layers`, several from one forward pass, which `plan_warm` takes. ``tile=1024&halo=128``
        makes `Tiled`, which sees large frames in parts.
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
        An option has no such value, or is given twice, in the name and here. Another package's
        entry point can't be loaded, or gives no backbone.
    TypeError
        The name is no text.
    """
    if not isinstance(name, str):
        raise TypeError(
            f"name is a {type(name).__name__}: expected a backbone's name, such as "
            "'efficientnet-lite0'"
        )
    bare, told = split_name(name)
    factory = find_factory(bare)
    given = {"weights": weights, "dtype": dtype, **options}
    given = {option: value for option, value in given.items() if value is not None}
    for option in told.keys() & given.keys():
        raise BackboneError(
            f"{option} of {bare} is given twice: {told[option]} in its name, and "
            f"{given[option]!r} beside it; leave one out"
        )
    if "," in told.get("layer", ""):
        from .several_layers import Layers

        names = [join_name(bare, {**told, "layer": one}) for one in told["layer"].split(",")]
        members = [load_backbone(n, weights, device, dtype, **options) for n in names]
        return cast("Backbone", Layers(members))
    wanted = {**options, **_read_options(bare, factory, told, {**given, **options})}
    weights, dtype = wanted.pop("weights", weights), wanted.pop("dtype", dtype)
    tile, halo = wanted.pop("tile", None), wanted.pop("halo", None)
    backbone = factory(bare, weights, device, dtype, **wanted)
    if not callable(getattr(backbone, "embed", None)):
        raise BackboneError(f"{factory} gave no backbone for {bare!r}: it has no embed()")
    if tile is None and halo is not None:
        raise BackboneError(f"{bare} has halo={halo} and no tile: name both, or none")
    if tile is None:
        return cast("Backbone", backbone)
    from .tiles import Tiled

    return Tiled(cast("Backbone", backbone), tile, halo)


def list_options(name: str) -> tuple[OptionInfo, ...]:
    """List what a backbone's name may be followed by, with kinds and defaults.

    Raises
    ------
    As `load_backbone`, where there is no such backbone.
    """
    return options_of_factory(find_factory(split_name(name)[0])) or ()


def find_factory(name: str) -> Callable[..., object]:
    """Give what makes a backbone of this bare name; errors as `load_backbone`."""
    # ours first: looking for those of other packages reads what all packages say of themselves
    found = (info for known in (lambda: BACKBONES, list_backbones) for info in known())
    info = next((info for info in found if info.fits(name)), None)
    if info is None:
        names = [info.name for info in list_backbones()]
        listing = f"feature-cache backbones; or name it {' or '.join(_name_elsewhere(name))}"
        raise UnknownNameError("backbone", name, names, listing)
    try:
        factory = EntryPoint(info.name, info.factory, ENTRY_POINTS).load()
    except (ImportError, AttributeError) as error:
        raise BackboneError(
            f"the backbone {info.name!r} can't be loaded from {info.factory}: {error}"
        ) from error
    return cast("Callable[..., object]", factory)


def _name_elsewhere(name: str) -> Iterator[str]:
    """Say how transformers and timm would name a model."""
    yield f"transformers/{name}" if name.count("/") == 1 else "transformers/<repository>"
    model = name.rpartition("/")[2].casefold().replace("-", "_")
    try:
        models = import_module("timm").list_models()
    except ImportError:
        models = []
    close = find_nearest(model, models) or find_nearest(max(model.split("_"), key=len), models)
    yield f"timm/{close[0]}" if close else "timm/<model>"


def _read_options(
    name: str, factory: Callable[..., object], told: Mapping[str, str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Read the options in a name; those given beside it must be known, too."""
    options = options_of_factory(factory)
    if options is None:
        return {option: ANY_OPTION.read(text, name) for option, text in told.items()}
    known = {option.name: option for option in options}
    for option in (*told, *given):
        if option not in known:
            listing = f"feature-cache backbones {name}"
            raise UnknownNameError(f"option of {name}", option, known, listing)
    for option, value in given.items():
        known[option].check(value, name)
    return {option: known[option].read(text, name) for option, text in told.items()}
