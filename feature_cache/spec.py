"""What is the same for all records of a space: backbone, normalisation, pooling, dtype.

Everything here is frozen, becomes canonical JSON, and comes back from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

from .errors import UnknownNameError
from .hashing import JSON, Digest, canonical_json, digest_json
from .pooling import pooling_revision

KEY_VERSION = 2
"""Part of every key; goes up when the same request would give other keys or other numbers."""

STORAGE_DTYPES = ("float16", "float32")
TABLES = "tables"
"""The layer of a space that holds no features, but what else is made of movies once."""

Bounds: TypeAlias = tuple[float, float]
UNIT_RANGE: Bounds = (0.0, 1.0)
_PERCENTILE_REVISION = 2
"""2: where the percentiles are equal, minimum and maximum take their place."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """How a frame's pixels become those that a backbone sees, float32, before the draw.

    Parameters
    ----------
    name : str
        ``"percentile"``: between two percentiles of the frame, clipped to 0..1. ``"none"``: as
        loaded, in any range.
    low, high : float
        The percentiles, 0 to 100; the defaults are trackastra-pretrained-feats'.
    """

    name: str = "percentile"
    low: float = 1.0
    high: float = 99.8

    def __post_init__(self) -> None:
        if self.name not in ("percentile", "none"):
            raise UnknownNameError("normalisation", self.name, ("percentile", "none"))
        if not 0 <= self.low < self.high <= 100:
            raise ValueError(
                f"percentiles {self.low} and {self.high}: expected 0 <= low < high <= 100"
            )

    @property
    def range(self) -> Bounds | None:
        """What all pixels are in, before the draw and after it; None for any range."""
        return None if self.name == "none" else UNIT_RANGE

    def to_json(self) -> dict[str, JSON]:
        """Give name, range and, where they matter, the constants."""
        if self.name == "none":
            return {"name": "none", "range": None}
        constants = {"low": float(self.low), "high": float(self.high)}
        revision = _PERCENTILE_REVISION
        return {"name": self.name, "revision": revision, **constants, "range": list(UNIT_RANGE)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Normalization:
        """Build the normalisation that `to_json` wrote.

        Raises
        ------
        TypeError
            If it is one of another version of this package.
        """
        made = cls(**{name: plain[name] for name in ("name", "low", "high") if name in plain})
        if made.to_json() != plain:
            raise TypeError(f"normalisation {dict(plain)}: expected {made.to_json()}")
        return made


class Context(NamedTuple):
    """How many frames before and after a frame a backbone sees with it."""

    before: int = 0
    after: int = 0

    def window(self, t: int, count: int) -> list[int]:
        """Give the frames that are seen for frame `t` of a movie of `count`.

        They are those next to it in the movie, whatever time lies between; beyond its ends the
        nearest is repeated.

        Examples
        --------
        >>> Context(2, 1).window(1, 10)
        [0, 0, 1, 2]
        """
        around = range(t - self.before, t + self.after + 1)
        return [min(max(s, 0), count - 1) for s in around]


@dataclass(frozen=True, slots=True)
class BackboneSpec:
    """All that decides which grid a backbone gives for a frame.

    Parameters
    ----------
    name : str
        As users write it, such as ``"efficientnet-lite0"``.
    revision : int
        The adapter's own number; goes up when its numbers change.
    weights : str
        Hex digest over names, dtypes, shapes and bytes of the state dict.
    layer : str
        Which features of the network.
    width : int
        C, channels of the grid.
    stride : int
        Pixels of the (resized) input for each grid cell.
    input_size : tuple of two ints, or None
        (H, W) that frames are resized to; None leaves them as they are.
    resize : str
        Interpolation of that resize; ``"none"`` where there is none.
    channels : str
        How one channel becomes the network's, such as ``"repeat-3"``.
    mean, std : tuples of float
        Subtracted from, and dividing, each channel after the normalisation.
    dtype : str
        Of the computation, such as ``"float32"``.
    normalization : Normalization
    extra : mapping of str to JSON
        Any further terms; a copy is taken, which can't be changed.
    context : (int, int)
        How many frames before and after each the backbone sees with it. Where there are any,
        `Backbone.embed` gets windows (B, T, H, W), all under one draw, and their content is in
        the key.

    Raises
    ------
    ValueError
        A context that is none.
    """

    name: str
    revision: int
    weights: str
    layer: str
    width: int
    stride: int
    input_size: tuple[int, int] | None = None
    resize: str = "none"
    channels: str = "repeat-3"
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    dtype: str = "float32"
    normalization: Normalization = field(default_factory=Normalization)
    extra: Mapping[str, JSON] = field(default_factory=dict, hash=False)
    context: Context = field(default_factory=Context)

    def __post_init__(self) -> None:
        for name in ("input_size", "mean", "std", "extra"):
            object.__setattr__(self, name, _freeze(getattr(self, name)))
        if [type(count) for count in self.context] != [int, int] or min(self.context) < 0:
            raise ValueError(f"context {self.context}: expected frames before and after, from 0 on")
        object.__setattr__(self, "context", Context(*self.context))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as JSON: a mapping that can't be changed has no pickle."""
        return type(self).from_json, (self.to_json(),)

    def to_json(self) -> dict[str, JSON]:
        """Give every field, nested ones as their own JSON."""
        plain: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        plain["normalization"] = self.normalization.to_json()
        plain["mean"] = [float(value) for value in self.mean]
        plain["std"] = [float(value) for value in self.std]
        plain["input_size"] = list(self.input_size) if self.input_size else None
        plain["extra"] = _thaw(self.extra)
        context = plain.pop("context")
        return {**plain, "context": list(context)} if any(context) else plain

    @property
    def is_standardized(self) -> bool:
        """Whether anything is subtracted, or anything but 1 divided by."""
        return any(self.mean) or any(deviation != 1 for deviation in self.std)

    @property
    def digest(self) -> Digest:
        """16 bytes that stand for the whole spec: how servers and clients name a backbone."""
        return digest_json(self.to_json())

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> BackboneSpec:
        """Build the spec that `to_json` wrote.

        Raises
        ------
        TypeError
            If a field is missing or unknown.
        """
        size = plain["input_size"]
        changed = {
            "normalization": Normalization.from_json(plain["normalization"]),
            "mean": tuple(plain["mean"]),
            "std": tuple(plain["std"]),
            "input_size": (size[0], size[1]) if size else None,
            "context": Context(*plain.get("context", ())),
        }
        return cls(**{**plain, **changed})


def _freeze(value: Any) -> Any:
    if isinstance(value, Mapping):
        return MappingProxyType({key: _freeze(item) for key, item in value.items()})
    return tuple(map(_freeze, value)) if isinstance(value, list | tuple) else value


def _thaw(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _thaw(item) for key, item in value.items()}
    return list(map(_thaw, value)) if isinstance(value, tuple) else value


@dataclass(frozen=True, slots=True)
class SpaceSpec:
    """All that is the same for the records of one space.

    Parameters
    ----------
    backbone : BackboneSpec
    pooling : str or None
        One of `feature_cache.pooling.POOLINGS`; None keeps whole grids.
    dtype : str
        Storage dtype, ``"float16"`` or ``"float32"``.

    Raises
    ------
    UnknownNameError
        For a pooling or dtype that does not exist.
    """

    backbone: BackboneSpec
    pooling: str | None = "mean_patches_exact"
    dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.dtype not in STORAGE_DTYPES:
            raise UnknownNameError("storage dtype", self.dtype, STORAGE_DTYPES)
        if self.pooling is not None:
            pooling_revision(self.pooling)

    def to_json(self) -> dict[str, JSON]:
        """Give the full spec, as it stands in the space's attributes."""
        pooling: JSON = None
        if self.pooling is not None:
            pooling = {"name": self.pooling, "revision": pooling_revision(self.pooling)}
        return {
            "key_version": KEY_VERSION,
            "backbone": self.backbone.to_json(),
            "pooling": pooling,
            "dtype": self.dtype,
        }

    @property
    def digest(self) -> Digest:
        """16 bytes that stand for the whole spec."""
        return digest_json(self.to_json())

    @property
    def folder_name(self) -> str:
        """Name of the space's folder: readable, and the beginning of the digest."""
        return f"{self.slug}-{self.digest.hex()[:8]}"

    @property
    def slug(self) -> str:
        """A readable name, safe as a folder's."""
        parts = (self.backbone.name, self.pooling or "grid", self.dtype)
        return "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.") for part in parts)


def describe(spec: Mapping[str, Any]) -> str:
    """Name a space, given as JSON, in one line for people."""
    backbone, pooling = spec["backbone"], spec["pooling"]
    return f"{backbone['name']} {pooling['name'] if pooling else 'grid'} {spec['dtype']}"


def differences(
    stored: JSON, asked: JSON, words: tuple[str, str] = ("stored", "asked"), where: str = ""
) -> Iterator[str]:
    """Compare two specs, or any JSON, field by field; one line for each that differs.

    Parameters
    ----------
    stored, asked : JSON
    words : (str, str)
        What the first and the second are called.
    where : str
        The field that these are.
    """
    if isinstance(stored, Mapping) and isinstance(asked, Mapping):
        for name in sorted({*stored, *asked}):
            inner = f"{where}.{name}" if where else name
            yield from differences(stored.get(name), asked.get(name), words, inner)
    elif canonical_json(stored) != canonical_json(asked):
        label = where.removeprefix("backbone.")
        verb = "differ" if label in ("weights", "channels") else "differs"
        found, wanted = short_text(stored), short_text(asked)
        yield f"{label} {verb}: {found} {words[0]}, {wanted} {words[1]}"


def short_text(value: JSON) -> str:
    """Write a value, and of a digest only its beginning."""
    if isinstance(value, str) and len(value) == 32:
        return f"xxh3 {value[:8]}…"
    return value if isinstance(value, str) else canonical_json(value)
