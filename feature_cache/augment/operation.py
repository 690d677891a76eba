"""What every operation of a draw is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, ClassVar, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from ..hashing import JSON, Digest
from ..spec import UNIT_RANGE, Bounds
from .parameters import Allowed

if TYPE_CHECKING:
    from torch import Tensor

Shape: TypeAlias = tuple[int, int]
Points: TypeAlias = NDArray[np.float64]
Label = TypeVar("Label", bound=np.generic)


class Operation(ABC):
    """One step of a draw, with every parameter explicit.

    What is not overridden is the identity: an operation on intensities leaves shapes, masks and
    points alone.
    """

    __slots__ = ()
    name: ClassVar[str]
    allowed: ClassVar[Mapping[str, Allowed]] = {}
    commutes_with_d4: ClassVar[bool] = False
    """Whether pixels are the same to the bit before and after any flip or quarter turn."""
    needs_digests: ClassVar[bool] = False
    """Whether `apply` depends on each frame's content digest."""
    needs_unit_range: ClassVar[bool] = False
    """Whether `apply` means anything for frames in 0..1 alone."""

    def __post_init__(self) -> None:
        for field, allowed in self.allowed.items():
            value = allowed.check(f"{self.name} {field}", getattr(self, field))
            object.__setattr__(self, field, value)

    def to_json(self) -> dict[str, JSON]:
        """Give name and parameters, as they enter a key."""
        names = field_names(type(self))
        return {"name": self.name, **{field: getattr(self, field) for field in names}}

    def simplify(self) -> Operation | None:
        """Give the canonical operation with the same pixels; None if there is nothing to do."""
        return self

    def output_shape(self, shape: Shape) -> Shape:
        """Give the shape that a frame of shape (H, W) gets."""
        return shape

    def matrix(self, shape: Shape) -> NDArray[np.float64] | None:
        """Give the (3, 3) map of points (y, x, 1); None if it isn't affine."""
        return np.eye(3)

    def map_points(self, points: Points, shape: Shape) -> Points:
        """Map points (N, 2), (y, x) in pixels of a frame of shape (H, W)."""
        matrix = self.matrix(shape)
        if matrix is None:
            raise NotImplementedError(f"{type(self).__name__} has neither a matrix nor map_points")
        y, x = points[:, 0], points[:, 1]
        return np.stack([row[0] * y + row[1] * x + row[2] for row in matrix[:2]], axis=1)

    def apply_mask(self, mask: NDArray[Label]) -> NDArray[Label]:
        """Map a mask (H, W), nearest neighbour."""
        return mask

    def apply_rows(self, rows: Tensor) -> Tensor:
        """Map (Z, H, W) integers as `apply_mask` does, on their device."""
        return rows

    @abstractmethod
    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        """Map frames (B, H, W) float32 within `bounds`; `digests` is used where `needs_digests`."""


@cache
def field_names(kind: type[Operation]) -> tuple[str, ...]:
    """Give the names of an operation's parameters."""
    return tuple(field.name for field in fields(kind))  # type: ignore[arg-type]
