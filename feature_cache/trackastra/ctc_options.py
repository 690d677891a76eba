"""Options of `CTCData`: what each has to be, said before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import Any

from trackastra.data.data import _PROPERTIES, CTCData

from ..errors import UnknownNameError

DEFAULTS: Mapping[str, Any] = {
    one.name: one.default
    for one in signature(CTCData.__init__).parameters.values()
    if one.default is not Parameter.empty and one.name != "root"
}
"""All that there are, and what each is where it is not given."""


def check_options(options: Mapping[str, Any]) -> None:
    """Say of an option that `CTCData` can't work with what was expected.

    Raises
    ------
    ValueError
        A value is not what it has to be.
    UnknownNameError
        There is no such option, which `CTCData` would pass over, or no such features.
    """
    for name in options:
        if name not in DEFAULTS:
            raise UnknownNameError("option of CTCData", name, DEFAULTS)
    given = {**DEFAULTS, **options}
    for name, (is_one, expected) in _EXPECTED.items():
        if not is_one(given[name]):
            raise ValueError(f"{name} is {given[name]!r}: expected {expected}")
    axes = given["ndim"]
    _check_crop(given["crop_size"], axes)
    known = ("none", "wrfeat", *_PROPERTIES[axes])
    if given["features"] not in known:
        raise UnknownNameError(f"features of {axes}D movies", given["features"], known)
    most = 3 if given["features"] == "wrfeat" else 4
    if not _from(0, most)(given["augment"]):
        raise ValueError(f"augment is {given['augment']!r}: expected a level from 0 to {most}")


def _check_crop(crop: Any, axes: int) -> None:
    sizes = [crop] if isinstance(crop, Integral) else crop
    fits = isinstance(sizes, Sequence) and len(sizes) in (1, axes, 2 * axes)
    if crop is not None and not (fits and all(map(_from(1), sizes))):
        raise ValueError(
            f"crop_size is {crop!r}: expected a whole number from 1 on, or {axes} or {2 * axes} of "
            f"them, as the movie has {axes} axes (ndim)"
        )


def _from(least: int, most: float = float("inf")) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, Integral) and least <= int(value) <= most


def _is_list(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and len(value) > 0 and all(isinstance(one, str) for one in value)


def _is_part(value: Any) -> bool:
    pair = isinstance(value, Sequence) and len(value) == 2
    return pair and all(isinstance(one, Real) for one in value) and 0 <= value[0] < value[1] <= 1


_EXPECTED: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "ndim": (_from(2, 3), "2 or 3"),
    "detection_folders": (_is_list, "a list of names, such as ['TRA']"),
    "window_size": (_from(2), "a whole number from 2 on"),
    "max_tokens": (lambda n: n is None or _from(0)(n), "None or a whole number from 0 on"),
    "slice_pct": (_is_part, "two numbers with 0 <= from < to <= 1"),
    "downscale_spatial": (_from(1), "a whole number from 1 on"),
    "downscale_temporal": (_from(1), "a whole number from 1 on"),
}
