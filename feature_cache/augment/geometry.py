"""Operations that move pixels: flips and quarter turns, scale, affine, elastic."""

# ruff: noqa: D102 -- what overrides a method of Operation is documented there

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..errors import DrawError
from ..hashing import Digest
from ..spec import UNIT_RANGE, Bounds
from .bounded_cache import Kept
from .operation import Label, Operation, Points, Shape
from .parameters import SEED, Allowed, Stream
from .sampling import (
    BSplineField,
    FindSource,
    Source,
    clamp,
    divide,
    nearest_places,
    sample_bilinear,
    sample_nearest,
    sample_nearest_on,
    upload,
)

if TYPE_CHECKING:
    from torch import Tensor

FOLD_RATIO = 8
"""An elastic amplitude is at most the smoothing by this, so that the field can be inverted."""

_nearest = Kept(256 << 20)
"""Where a mask's pixels come from, for the draws of the movies at hand."""
_Planes = TypeVar("_Planes", NDArray[Any], "Tensor")
_INVERSION_STEPS = 40
_STRIP = 32
"""Lines that are transposed at once."""

_ELEMENTS = {
    "identity": (False, False, False),
    "flip_horizontal": (False, False, True),
    "flip_vertical": (False, True, False),
    "rotate_90": (True, True, False),
    "rotate_180": (False, True, True),
    "rotate_270": (True, False, True),
    "transpose": (True, False, False),
    "transverse": (True, True, True),
}
"""Each element as: swap the axes, then mirror y, then mirror x."""
_ELEMENT_NAMES = {steps: name for name, steps in _ELEMENTS.items()}


@dataclass(frozen=True, slots=True)
class D4(Operation):
    """One of the 8 flips and quarter turns of a rectangle; exact in pixels, masks and points.

    Parameters
    ----------
    element : str
        ``"identity"``; ``"flip_horizontal"`` (left and right change places), ``"flip_vertical"``;
        ``"rotate_90"``, ``"rotate_180"``, ``"rotate_270"`` (counterclockwise as displayed with y
        down, as `numpy.rot90`); ``"transpose"`` (over the main diagonal: y and x change places),
        ``"transverse"`` (over the other one).

    Raises
    ------
    DrawError
        For any other element.
    """

    element: str

    name: ClassVar[str] = "d4"

    def __post_init__(self) -> None:
        if not isinstance(self.element, str) or self.element not in _ELEMENTS:
            raise DrawError(
                f"d4 element is {self.element!r}: expected one of {', '.join(_ELEMENTS)}"
            )

    def then(self, other: D4) -> D4:
        """Give the element that does this one and then `other`."""
        swap, mirror_y, mirror_x = _ELEMENTS[self.element]
        swap_next, next_y, next_x = _ELEMENTS[other.element]
        if swap_next:
            mirror_y, mirror_x = mirror_x, mirror_y
        return D4(_ELEMENT_NAMES[swap != swap_next, mirror_y != next_y, mirror_x != next_x])

    def simplify(self) -> Operation | None:
        return None if self.element == "identity" else self

    def output_shape(self, shape: Shape) -> Shape:
        return (shape[1], shape[0]) if _ELEMENTS[self.element][0] else shape

    def matrix(self, shape: Shape) -> NDArray[np.float64]:
        swap, *mirrors = _ELEMENTS[self.element]
        matrix = np.eye(3)[[1, 0, 2]] if swap else np.eye(3)
        for axis, size in enumerate(self.output_shape(shape)):
            if mirrors[axis]:
                matrix[axis] *= -1.0
                matrix[axis, 2] = size - 1.0
        return matrix + 0.0

    def apply_mask(self, mask: NDArray[Label]) -> NDArray[Label]:
        swap, *mirrors = _ELEMENTS[self.element]
        swapped = np.empty(mask.shape[::-1], mask.dtype) if swap else mask
        mapped = _transpose(mask, swapped) if swap else mask
        axes = tuple(axis for axis, mirror in enumerate(mirrors) if mirror)
        return np.ascontiguousarray(np.flip(mapped, axes))

    def apply_rows(self, rows: Tensor) -> Tensor:
        swap, *mirrors = _ELEMENTS[self.element]
        if swap and rows.device.type == "cpu":
            rows = _transpose(rows, rows.new_empty(rows.transpose(1, 2).shape))
        elif swap:
            rows = rows.transpose(1, 2)
        return rows.flip([axis + 1 for axis, mirror in enumerate(mirrors) if mirror]).contiguous()

    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        return self.apply_rows(frames)


def _transpose(planes: _Planes, swapped: _Planes) -> _Planes:
    """Swap the last two axes strip by strip, as suits a processor's cache."""
    for start in range(0, planes.shape[-2], _STRIP):
        lines = slice(start, start + _STRIP)
        swapped[..., lines] = planes[..., lines, :].swapaxes(-1, -2)
    return swapped


def hflip() -> D4:
    """Give the flip that changes left and right (x becomes W - 1 - x)."""
    return D4("flip_horizontal")


def vflip() -> D4:
    """Give the flip that changes top and bottom (y becomes H - 1 - y)."""
    return D4("flip_vertical")


def quarter_turn(turns: int = 1) -> D4:
    """Give `turns` quarter turns, counterclockwise as displayed with y down, as `numpy.rot90`.

    Raises
    ------
    DrawError
        If `turns` is not an integer.
    """
    number = Allowed(-(2**31), 2**31, "integer").check("quarter_turn turns", turns)
    return D4(("identity", "rotate_90", "rotate_180", "rotate_270")[int(number) % 4])


@dataclass(frozen=True, slots=True)
class Scale(Operation):
    """Resize the whole frame: (H, W) becomes (H * factor, W * factor), rounded, at least 1.

    The predecessor's meaning (its ``RandomScale`` without ``preserve_size``, as its pipelines use
    it): the frame itself gets smaller and its field of view stays, nothing is cropped or padded.
    Pixels are areas, the frame's edges stay its edges: ``y' = (y + 0.5) * H' / H - 0.5``. Frames
    are resized by `torch.nn.functional.interpolate`, ``bilinear``, ``align_corners=False``, without
    antialiasing; masks as by its ``nearest-exact``. Unlike the predecessor's, the mask takes the
    same map (its ``nearest`` was half a pixel off), and sizes round half up (it cut off).

    Parameters
    ----------
    factor : float
        0.1 to 10.
    """

    factor: float

    name: ClassVar[str] = "scale"
    allowed: ClassVar[Mapping[str, Allowed]] = {"factor": Allowed(0.1, 10.0)}

    def simplify(self) -> Operation | None:
        return None if self.factor == 1.0 else self

    def output_shape(self, shape: Shape) -> Shape:
        height, width = (max(1, math.floor(size * self.factor + 0.5)) for size in shape)
        return height, width

    def matrix(self, shape: Shape) -> NDArray[np.float64]:
        matrix = np.eye(3)
        for axis, (size, new) in enumerate(zip(shape, self.output_shape(shape), strict=True)):
            matrix[axis, axis] = new / size
            matrix[axis, 2] = 0.5 * new / size - 0.5
        return matrix

    def apply_mask(self, mask: NDArray[Label]) -> NDArray[Label]:
        shape = _shape_of(mask)
        rows, columns = map(_nearest_exact, shape, self.output_shape(shape))
        return mask.take(rows, axis=0).take(columns, axis=1)

    def apply_rows(self, rows: Tensor) -> Tensor:
        shape = _shape_of(rows)
        y, x = map(_nearest_exact, shape, self.output_shape(shape))
        chosen = rows.index_select(1, upload(y, rows.device))
        return chosen.index_select(2, upload(x, rows.device))

    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        import torch.nn.functional as functional

        shape = self.output_shape(_shape_of(frames))
        resized = functional.interpolate(frames[:, None], shape, mode="bilinear")
        return clamp(resized[:, 0], bounds)


def _nearest_exact(size: int, new: int) -> NDArray[np.int64]:
    """Give the pixel that each of `new` takes, as torch's ``nearest-exact``, rounding and all."""
    scale = np.float32(size) / np.float32(new)
    index = np.floor((np.arange(new, dtype=np.float32) + np.float32(0.5)) * scale)
    return np.minimum(index.astype(np.int64), size - 1)


class Warp(Operation):
    """An operation that keeps the shape and takes each pixel from anywhere in the frame."""

    __slots__ = ()

    @abstractmethod
    def source(self, shape: Shape) -> FindSource:
        """Tell where the pixels of a result come from, in a frame of shape (H, W)."""

    def apply_mask(self, mask: NDArray[Label]) -> NDArray[Label]:
        shape = _shape_of(mask)
        places = _nearest.get((self, shape), lambda: nearest_places(self.source(shape), shape))
        return sample_nearest(mask, places)

    def apply_rows(self, rows: Tensor) -> Tensor:
        return sample_nearest_on(rows, self.source(_shape_of(rows)))

    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        return sample_bilinear(frames, self.source(_shape_of(frames)), bounds)


@dataclass(frozen=True, slots=True)
class Affine(Warp):
    """Shear, then scale, then rotate about the frame's centre, then shift, within the frame.

    The shape stays; what comes from outside the frame is 0 (background in the mask). The centre
    is ``((H - 1) / 2, (W - 1) / 2)``.

    Parameters
    ----------
    degrees : float
        Counterclockwise as displayed with y down, -180 to 180; 90 is `quarter_turn` on a square.
    shear_degrees : float
        x grows by ``tan(shear_degrees)`` a pixel of y, -60 to 60.
    scale : float
        0.1 to 10, about the centre.
    shift_y, shift_x : float
        Fractions of the frame's height and width, -1 to 1; positive is down and right.
    """

    degrees: float = 0.0
    shear_degrees: float = 0.0
    scale: float = 1.0
    shift_y: float = 0.0
    shift_x: float = 0.0

    name: ClassVar[str] = "affine"
    allowed: ClassVar[Mapping[str, Allowed]] = {
        "degrees": Allowed(-180.0, 180.0),
        "shear_degrees": Allowed(-60.0, 60.0),
        "scale": Allowed(0.1, 10.0),
        "shift_y": Allowed(-1.0, 1.0),
        "shift_x": Allowed(-1.0, 1.0),
    }

    def simplify(self) -> Operation | None:
        if (self.shear_degrees, self.scale, self.shift_y, self.shift_x) != (0.0, 1.0, 0.0, 0.0):
            return self
        if abs(self.degrees) == 180.0:
            return D4("rotate_180")
        return None if self.degrees == 0.0 else self

    def _linear(self) -> NDArray[np.float64]:
        # Twelve decimals: machines differ in the last bits of a sine, and pixels must not.
        angle, shear = math.radians(self.degrees), math.radians(self.shear_degrees)
        cos, sin, tan = (
            round(value, 12) for value in (math.cos(angle), math.sin(angle), math.tan(shear))
        )
        return self.scale * np.array([[cos - sin * tan, -sin], [sin + cos * tan, cos]])

    def matrix(self, shape: Shape) -> NDArray[np.float64]:
        (a, b), (c, d) = self._linear()
        (center_y, center_x), (shift_y, shift_x) = self._center_and_shift(shape)
        return np.array(
            [
                [a, b, center_y + shift_y - (a * center_y + b * center_x)],
                [c, d, center_x + shift_x - (c * center_y + d * center_x)],
                [0.0, 0.0, 1.0],
            ]
        )

    def _center_and_shift(self, shape: Shape) -> tuple[tuple[float, float], tuple[float, float]]:
        center = ((shape[0] - 1) / 2, (shape[1] - 1) / 2)
        return center, (self.shift_y * shape[0], self.shift_x * shape[1])

    def source(self, shape: Shape) -> FindSource:
        (a, b), (c, d) = self._linear()
        determinant = a * d - b * c
        (center_y, center_x), (shift_y, shift_x) = self._center_and_shift(shape)

        def find(y: Any, x: Any) -> Source:
            y, x = y - (center_y + shift_y), x - (center_x + shift_x)
            source_y = divide(d * y - b * x, determinant) + center_y
            return source_y, divide(a * x - c * y, determinant) + center_x

        return find


@dataclass(frozen=True, slots=True)
class Elastic(Warp):
    """Displace pixels by a smooth random field, the same for every frame of one shape.

    Cubic B-splines over a lattice of displacements, uniform in -amplitude to amplitude (the
    free-form deformation of Rueckert et al., IEEE TMI 18, 1999). Each pixel of the result comes
    from where it is plus the field there; points take the inverse. What comes from outside the
    frame is 0.

    Parameters
    ----------
    amplitude : float
        Bound of a displacement in y and in x, in pixels, 0 to smoothing / 8: then nothing folds,
        and the inversion halves its error with each of its 40 steps (below ``2**-40`` of the
        amplitude in the end).
    smoothing : float
        Distance of the lattice's points in pixels, 2 to 10,000.
    seed : int
        0 to 2**63 - 1.
    """

    amplitude: float
    smoothing: float
    seed: int = 0

    name: ClassVar[str] = "elastic"
    allowed: ClassVar[Mapping[str, Allowed]] = {
        "amplitude": Allowed(0.0, 10_000.0 / FOLD_RATIO),
        "smoothing": Allowed(2.0, 10_000.0),
        "seed": SEED,
    }

    def __post_init__(self) -> None:
        Operation.__post_init__(self)
        most = self.smoothing / FOLD_RATIO
        if self.amplitude > most:
            raise DrawError(
                f"elastic amplitude is {self.amplitude!r} with smoothing {self.smoothing!r}: "
                f"expected a number from 0 to smoothing / {FOLD_RATIO} = {most!r}, "
                "beyond which the frame could fold"
            )

    def simplify(self) -> Operation | None:
        return None if self.amplitude == 0.0 else self

    def matrix(self, shape: Shape) -> None:
        return None

    def map_points(self, points: Points, shape: Shape) -> Points:
        displace = self._field(shape)
        y, x = points[:, 0], points[:, 1]
        for _ in range(_INVERSION_STEPS):
            dy, dx = displace(y, x)
            y, x = points[:, 0] - dy, points[:, 1] - dx
        return np.stack([y, x], axis=1)

    def _field(self, shape: Shape) -> BSplineField:
        stream = Stream(["elastic", self.seed])
        return BSplineField(shape, self.amplitude, self.smoothing, stream.uniforms)

    def source(self, shape: Shape) -> FindSource:
        displace = self._field(shape)

        def find(y: Any, x: Any) -> Source:
            dy, dx = displace(y, x)
            return y + dy, x + dx

        return find


def _shape_of(array: Tensor | NDArray[np.generic]) -> Shape:
    return int(array.shape[-2]), int(array.shape[-1])
