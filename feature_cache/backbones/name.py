"""A backbone's name with its options: ``facebook/dinov2-base?input_size=518&dtype=bfloat16``."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import quote, unquote

from ..errors import BackboneError, UnknownNameError
from ..spec import Context

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
_BOOLS = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
_OWN = 4
"""Parameters of every factory before those of its own: name, weights, device, dtype."""


@dataclass(frozen=True, slots=True)
class OptionInfo:
    """What can be said of a backbone behind the ``?`` of its name.

    Attributes
    ----------
    name : str
    kinds : tuple
        What its value may be: types, ``(H, W)`` pairs as ``tuple``, `Context`, words, None.
    default : object
    """

    name: str
    kinds: tuple[Any, ...]
    default: object

    @property
    def words(self) -> tuple[str, ...]:
        """The values that can be listed."""
        words = [kind for kind in self.kinds if isinstance(kind, str)]
        return tuple(words) or (("true", "false") if bool in self.kinds else ())

    @property
    def expected(self) -> str:
        """Name the values for people."""
        names = {int: "a whole number", tuple: "HEIGHTxWIDTH", float: "a number"}
        names |= {bool: "true or false", str: "a text", NoneType: "none"}
        names |= {Context: "FRAMES_BEFORE,FRAMES_AFTER"}
        told = [names[kind] for kind in self.kinds if kind in names and kind is not NoneType]
        return " or ".join(told or [", ".join(self.words)])

    def read(self, text: str, backbone: str) -> Any:
        """Read a value.

        Raises
        ------
        BackboneError
            It is none of this kind.
        UnknownNameError
            It is none of the words.
        """
        for kind in self.kinds:
            value = _read_as(kind, text)
            if value is not _NOTHING:
                return value
        raise self._refuse(text, backbone)

    def check(self, value: object, backbone: str) -> None:
        """Refuse a value that was given in Python; errors as `read`."""
        if not any(_is_of(kind, value) for kind in self.kinds):
            raise self._refuse(value, backbone)

    def _refuse(self, value: object, backbone: str) -> Exception:
        if all(isinstance(kind, str) or kind is NoneType for kind in self.kinds):
            return UnknownNameError(f"{self.name} of {backbone}", str(value), self.words)
        example = "" if self.default is None else f", such as {write_value(self.default)}"
        return BackboneError(
            f"option {self.name}={value} of {backbone}: expected {self.expected}{example}"
        )


ANY_OPTION = OptionInfo("", (int, float, bool, NoneType, str), None)
"""What is read as what it looks like, where a factory doesn't say."""
_NOTHING = object()


def _read_as(kind: Any, text: str) -> Any:
    """Read a text as one kind of value; `_NOTHING` where it is none."""
    if kind is str or text == kind:
        return text
    if kind is bool:
        return _BOOLS.get(text.lower(), _NOTHING)
    if kind is NoneType:
        return None if text.lower() == "none" else _NOTHING
    try:
        if kind is Context:
            before, after = map(int, text.split(","))
            return Context(before, after)
        if kind is tuple:
            height, width = map(int, text.lower().split("x"))
            return height, width
        return kind(text) if kind in (int, float) else _NOTHING
    except ValueError:
        return _NOTHING


def _is_of(kind: Any, value: object) -> bool:
    """Tell whether a value is of one kind."""
    if isinstance(kind, str):
        return isinstance(value, str) and value == kind
    if kind in (int, float):
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        return whole or (kind is float and isinstance(value, float) and math.isfinite(value))
    also = {tuple: (tuple, list), Context: (tuple, list), str: (str, os.PathLike)}
    return isinstance(value, also.get(kind, kind))


def write_value(value: object) -> str:
    """Write an option's value as it stands in a name."""
    if isinstance(value, tuple | list):
        if isinstance(value, Context):
            return f"{value.before},{value.after}"
        return ("x" if isinstance(value[0], int) else ",").join(map(str, value))
    return (
        "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )


def split_name(text: str) -> tuple[str, dict[str, str]]:
    """Split a name from its options.

    Raises
    ------
    BackboneError
        An option has no value, or comes twice.

    Examples
    --------
    >>> split_name("facebook/dinov2-base?input_size=518&dtype=bfloat16")
    ('facebook/dinov2-base', {'input_size': '518', 'dtype': 'bfloat16'})
    """
    name, _, rest = text.partition("?")
    told: dict[str, str] = {}
    for part in filter(None, rest.split("&")):
        option, equals, value = part.partition("=")
        if not (option and equals and value) or option in told:
            what = "comes twice" if option in told else "has no value"
            raise BackboneError(
                f"option {option!r} of the backbone {text!r} {what}: expected "
                "NAME?OPTION=VALUE&OPTION=VALUE"
            )
        told[option] = unquote(value)
    return name, told


def join_name(name: str, options: Mapping[str, object]) -> str:
    """Write a name with options, as `split_name` reads it.

    Examples
    --------
    >>> join_name("timm/test_vit", {"layer": 2, "input_size": (96, 160)})
    'timm/test_vit?layer=2&input_size=96x160'
    """
    told = (f"{key}={quote(write_value(value), safe='/:,.')}" for key, value in options.items())
    joined = "&".join(told)
    return f"{name}?{joined}" if joined else name


def name_with_dtype(text: str, dtype: str | None) -> str:
    """Add a compute dtype to a name, where there is one."""
    return text if dtype is None else f"{text}{'&' if '?' in text else '?'}dtype={dtype}"


def options_of_factory(factory: Callable[..., object]) -> tuple[OptionInfo, ...] | None:
    """List the options of what makes a backbone, ``weights`` and ``dtype`` first.

    None where it takes any, and so says of none what it may be.
    """
    parameters = inspect.signature(factory).parameters
    common = (
        OptionInfo("weights", (str,), None),
        OptionInfo("dtype", COMPUTE_DTYPES, "float32"),
        OptionInfo("tile", (int, NoneType), None),
        OptionInfo("halo", (int, NoneType), None),
    )
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    is_class = isinstance(factory, type)
    maker = inspect.getattr_static(factory, "__init__") if is_class else factory
    try:
        hints = get_type_hints(maker)
    except NameError:  # of another package, which imports its types for type checkers alone
        hints = {}
    own = (
        OptionInfo(p.name, tuple(_kinds_of(hints.get(p.name), p.default)), p.default)
        for p in list(parameters.values())[_OWN:]
    )
    return (*common, *own)


def _kinds_of(hint: Any, default: object) -> Iterator[Any]:
    if hint is None:
        hint = str if default is None else type(default)
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) is tuple:
        yield tuple
    elif get_args(hint):
        for part in get_args(hint):
            yield from _kinds_of(part, default)
    else:
        yield hint
