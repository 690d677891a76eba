"""Backbones as specs describe them: loaded again, with the options that a spec tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FeatureCacheError
from ..spec import BackboneSpec
from . import find_factory, load_backbone
from .name import join_name, split_name
from .several_layers import Layers

if TYPE_CHECKING:
    from .base import Backbone


def load_alike(
    spec: BackboneSpec, weights: str | Path | None = None, device: str | None = None
) -> Backbone:
    """Load the backbone that a spec describes, as far as a spec tells; compare the specs then.

    It names the weights by their digest alone. All else, errors too, as `load_backbone`.
    """
    options = options_of(spec, find_factory(spec.name))
    return load_backbone(spec.name, weights, device, spec.dtype, **options)


def options_of(spec: BackboneSpec, factory: Callable[..., object]) -> dict[str, Any]:
    """Give the options with which a factory makes a backbone of this spec.

    They are those that have a field's name, or that of an extra term; a class that has others says
    so itself, by a class method of this name.
    """
    tiles = {name: spec.extra[name] for name in ("tile", "halo") if name in spec.extra}
    seen = {"context": spec.context} if any(spec.context) else {}
    own: Callable[[BackboneSpec], dict[str, Any]] | None = getattr(factory, "options_of", None)
    if own is not None:
        return {**own(spec), **tiles}
    told = {
        **spec.extra,
        "layer": spec.layer,
        "stride": spec.stride,
        "input_size": spec.input_size,
        "standardize": spec.is_standardized,
        "antialias": spec.resize.endswith("-antialias"),
    }
    options = list(inspect.signature(factory).parameters)[4:]
    return {**{name: told[name] for name in options if name in told}, **seen, **tiles}


def name_in_full(spec: BackboneSpec) -> str:
    """Write the name of a spec's backbone, with the options that are not its defaults.

    The bare name where that can't be told, as its package is not installed.
    """
    try:
        factory = find_factory(spec.name)
        plain = _describe(load_backbone(spec.name), spec.weights)
        defaults, told = ({"dtype": s.dtype, **options_of(s, factory)} for s in (plain, spec))
    except FeatureCacheError:
        return spec.name
    differing = {name: told[name] for name in told if told[name] != defaults.get(name)}
    return join_name(spec.name, differing)


def is_named(spec: BackboneSpec, text: str) -> bool:
    """Tell whether a spec is that of a name: with its options, or any where none are told.

    Errors as `load_backbone`.
    """
    name, told = split_name(text)
    if name != spec.name or not told:
        return name == spec.name
    made = load_backbone(text)
    return spec == (made.spec if "weights" in told else _describe(made, spec.weights))


def describe_all(text: str) -> tuple[BackboneSpec, ...]:
    """Give the specs of a name's layers, but for the weights, which need not be there.

    Errors as `load_backbone`.
    """
    backbone: Backbone | Layers = load_backbone(text)
    members = backbone.members if isinstance(backbone, Layers) else (backbone,)
    return tuple(_describe(one, "") for one in members)


def _describe(backbone: Backbone, weights: str) -> BackboneSpec:
    """Give a backbone's spec with weights that need not be there."""
    describe: Callable[[str], BackboneSpec] | None = getattr(backbone, "describe", None)
    return replace(backbone.spec, weights=weights) if describe is None else describe(weights)
