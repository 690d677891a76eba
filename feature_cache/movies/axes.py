"""What each axis of an array means, and how one image is taken out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MovieError
from .images import LABELS_ALONE, Images, ReadOptions

_LETTERS = "TCZYXS"
_NAMES = {
    "T": ("t", "time", "times", "timepoint", "timepoints", "frame", "frames"),
    "C": ("c", "ch", "channel", "channels"),
    "Z": ("z", "depth", "plane", "planes", "slice", "slices"),
    "Y": ("y", "row", "rows", "height"),
    "X": ("x", "col", "cols", "column", "columns", "width"),
    "S": ("s", "sample", "samples", "rgb"),
}
_LETTER_OF = {name: letter for letter, names in _NAMES.items() for name in names}
_CHANNELS = "CS"
_NONE = "_"
"""In place of a letter: an axis of length 1 that means nothing."""
_MOST_CHANNELS, _NO_CHANNELS_BELOW = 4, 16
"""A last axis of so few behind two of so many is no X; behind shorter ones it may be."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the images of a movie are in an array of 3 to 6 axes."""

    axes: str
    """The letter of each axis, of ``TCZYXS``: T, Y and X, and what else there is; ``_`` for one
    of length 1 that means nothing."""
    shape: tuple[int, ...]
    """Of the whole array."""
    channel: int = 0
    """The one taken of an axis C or S."""
    keep_z: bool = False
    """Whether a Z of one slice stays."""

    def __str__(self) -> str:
        """Say what decides the pixels; for recipes."""
        return f"axes {self.axes}, channel {self.channel}{', Z kept' if self.keep_z else ''}"

    def __len__(self) -> int:
        """Count the timepoints."""
        return self._length("T")

    def _length(self, letter: str) -> int:
        return self.shape[self.axes.index(letter)]

    @property
    def image_axes(self) -> str:
        """The axes of an image as it is given: YX or ZYX."""
        has_z = "Z" in self.axes and (self.keep_z or self._length("Z") > 1)
        return "ZYX" if has_z else "YX"

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of an image, (H, W) or (Z, H, W)."""
        return tuple(map(self._length, self.image_axes))

    def take(self, array: Any, t: int) -> Any:
        """Index `array` (anything of this shape) by time `t`: an image in the axes as stored."""
        places = {"T": range(len(self))[t]}
        places |= {c: min(self.channel, self._length(c) - 1) for c in _CHANNELS if c in self.axes}
        if "Z" not in self.image_axes:
            places["Z"] = 0
        places[_NONE] = 0
        index = [places.get(axis, slice(None)) for axis in self.axes]
        while isinstance(index[-1], slice):
            index.pop()
        return array[tuple(index)]

    def arrange(self, image: NDArray[Any]) -> NDArray[Any]:
        """Turn what `take` gave to (H, W) or (Z, H, W)."""
        stored = [axis for axis in self.axes if axis in self.image_axes]
        return image.transpose([stored.index(axis) for axis in self.image_axes])


@dataclass(frozen=True, eq=False)
class LaidOut(Images):
    """Images that are in one array, as a layout says."""

    layout: Layout

    def __len__(self) -> int:
        return len(self.layout)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return self.layout.image_shape


def plan_layout(
    shape: Sequence[int],
    names: Sequence[object] | None,
    options: ReadOptions,
    where: str,
    *,
    keep_z: bool = False,
) -> Layout:
    """Decide what the axes of an array are.

    What `options` says counts, then `names`, such as ``("time", "y", "x")``, if any of them is
    known; an array without either is (T, Y, X) or (T, Z, Y, X), of which a Z of one slice stays if
    `keep_z`.

    Raises
    ------
    MovieError
        No time axis, several channels and none chosen, or axes that make no movie.
    """
    shape = tuple(map(int, shape))
    if options.axes is not None:
        axes = _told_axes(options, shape, where)
    elif names and are_known(names):
        axes = _named_axes(names, shape, where)
    elif len(shape) in (3, 4):
        layout = Layout("TYX" if len(shape) == 3 else "TZYX", shape, keep_z=keep_z)
        _check_x(layout, where)
        _choose_channel(layout, options, where)
        return layout
    else:
        raise MovieError(
            f"{where} has shape {shape} and does not name its axes: expected (T, Y, X) or "
            "(T, Z, Y, X); say what they are, such as axes='TCYX' (--axes TCYX)"
        )
    _check_axes(axes, shape, where)
    layout = Layout(axes, shape)
    return Layout(axes, shape, _choose_channel(layout, options, where))


def ends_in_channels(shape: Sequence[int]) -> bool:
    """Tell whether the last axis of an array without names is too short to be X."""
    return (
        len(shape) > 2 and shape[-1] <= _MOST_CHANNELS and min(shape[-3:-1]) >= _NO_CHANNELS_BELOW
    )


def channel_hint(frame: tuple[int, ...], mask: tuple[int, ...]) -> str:
    """Say what to do where a frame seems to have channels that its mask hasn't; empty elsewhere."""
    for inside, array, file in (
        (frame[:-1], "frames[..., 0]", "TYXC"),
        (frame[1:], "frames[:, 0]", "TCYX"),
    ):
        if len(frame) == 3 and inside == mask:
            return (
                f"; if these are {frame[0 if file == 'TCYX' else -1]} channels, a frame has one: "
                f"of an array pass {array}, of a file say axes={file!r} and channel=0 (--axes "
                f"{file} --channel 0)"
            )
    return ""


def _check_x(layout: Layout, where: str) -> None:
    axes, shape = layout.axes, layout.shape
    if ends_in_channels(shape):
        colour = "axes='TYXC' (--axes TYXC) and a channel, or " if len(shape) == 4 else ""
        raise MovieError(
            f"{where} has shape {shape}, whose last axis looks like channels: say what its axes "
            f"are, {colour}axes={axes!r} (--axes {axes}) if that is X"
        )


def _told_axes(options: ReadOptions, shape: tuple[int, ...], where: str) -> str:
    """Give each axis the letter that was told; axes of length 1 may be left out."""
    letters, every = str(options.axes).upper(), range(len(shape))
    ways = [letters]
    if options.labels:
        ways.append(letters.replace("C", ""))  # the same goes with frames, which have channels
    for told in ways:
        for places in (every, [place for place in every if shape[place] > 1]):
            if len(told) == len(places) and set(told) <= set(_LETTERS):
                letter_at = dict(zip(places, told, strict=True))
                return "".join(letter_at.get(place, _NONE) for place in every)
    raise MovieError(
        f"axes {options.axes!r} don't fit {where}, which has shape {shape}: expected a letter of "
        f"{_LETTERS} for each axis, such as 'TYX'"
    )


def _named_axes(names: Sequence[object], shape: tuple[int, ...], where: str) -> str:
    letters = [_letter(name) for name in names]
    if len(letters) == len(shape):
        letters = [
            letter or (_NONE if length == 1 else "")
            for letter, length in zip(letters, shape, strict=True)
        ]
    if not all(letters) or len(letters) != len(shape):
        raise MovieError(
            f"{where} has shape {shape} and calls its axes {', '.join(map(str, names))}: expected "
            "t, c, z, y or x for each; say what they are, such as axes='TCYX' (--axes TCYX)"
        )
    return "".join(letters)


def are_known(names: Sequence[object] | None) -> bool:
    """Tell whether any of an array's axes has a name that means something here."""
    return any(map(_letter, names or ()))


def _letter(name: object) -> str:
    return _LETTER_OF.get(str(name).lower(), "")


def _check_axes(axes: str, shape: tuple[int, ...], where: str) -> None:
    letters = axes.replace(_NONE, "")
    if "T" not in letters:
        told = "T" + axes[1:]
        raise MovieError(
            f"{where} has axes {axes} (shape {shape}) and no time: a movie has several "
            f"timepoints; if one of them is time in truth, say so: axes={told!r} (--axes {told})"
        )
    if len(set(letters)) < len(letters) or not {"Y", "X"} <= set(letters):
        raise MovieError(
            f"{where} has axes {axes} (shape {shape}): expected T, Y and X, each once; say what "
            "they are, such as axes='TYX' (--axes TYX)"
        )


def _choose_channel(layout: Layout, options: ReadOptions, where: str) -> int:
    """Give the channel to take: the one there is, or the one that was asked for."""
    lengths = [layout._length(axis) for axis in _CHANNELS if axis in layout.axes]
    several = [length for length in lengths if length > 1]
    if len(several) > 1:
        raise MovieError(
            f"{where} has channels that are in colour (axes {layout.axes}, shape {layout.shape}): "
            "convert them to one value a pixel"
        )
    count = max(several, default=1)
    if options.channel is None:
        if count > 1:
            way = LABELS_ALONE if options.labels else "choose one, such as channel=0 (--channel 0)"
            raise MovieError(
                f"{where} has {count} channels (axes {layout.axes}, shape {layout.shape}): {way}"
            )
        return 0
    if count == 1 and options.labels:
        return 0  # the same option goes with frames, which have channels
    if not 0 <= options.channel < count:
        raise MovieError(
            f"{where} has {count} channel{'s' * (count > 1)}, and channel {options.channel} was "
            f"asked for: expected 0 to {count - 1}"
        )
    return options.channel


def check_image(image: NDArray[Any], where: str) -> NDArray[Any]:
    """Give an image (H, W) or (Z, H, W) of real numbers back; anything else is a MovieError."""
    if image.dtype.kind not in "buif" or image.ndim not in (2, 3):
        raise MovieError(
            f"{where} has dtype {np.dtype(image.dtype).name} and shape {image.shape}: expected "
            "real numbers, (H, W) or (Z, H, W)"
        )
    return image
