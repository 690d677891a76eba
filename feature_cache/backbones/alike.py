"""Backbones as specs describe them: loaded again, with the options that a spec tells."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..spec import BackboneSpec
from . import find_factory, load_backbone

if TYPE_CHECKING:
    from .base import Backbone


def load_alike(
    spec: BackboneSpec, weights: str | Path | None = None, device: str | None = None
) -> Backbone:
    """Load the backbone that a spec describes, as far as a spec tells; compare the specs then.

    Parameters
    ----------
    spec : BackboneSpec
        It names the weights by their digest alone.
    weights, device
        As `load_backbone`.

    Raises
    ------
    As `load_backbone`.
    """
    options = options_of(spec, find_factory(spec.name))
    return load_backbone(spec.name, weights, device, spec.dtype, **options)


def options_of(spec: BackboneSpec, factory: Callable[..., object]) -> dict[str, Any]:
    """Give the options with which a factory makes a backbone of this spec.

    They are those that have a field's name, or that of an extra term; a class that has others says
    so itself, by a class method of this name.
    """
    own: Callable[[BackboneSpec], dict[str, Any]] | None = getattr(factory, "options_of", None)
    if own is not None:
        return own(spec)
    told = {
        **spec.extra,
        "layer": spec.layer,
        "stride": spec.stride,
        "input_size": spec.input_size,
        "standardize": any(spec.mean),
        "antialias": spec.resize.endswith("-antialias"),
    }
    options = list(inspect.signature(factory).parameters)[4:]
    return {name: told[name] for name in options if name in told}
