"""A draw: one sampled augmentation, in canonical form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import DrawError, FrameError
from ..hashing import DIGEST_BYTES, JSON, Digest
from ..spec import UNIT_RANGE, Bounds
from .geometry import D4, Affine, Elastic, Scale
from .intensity import Blur, Brightness, Contrast, Noise
from .operation import Operation, Shape, field_names

if TYPE_CHECKING:
    import torch

_Label = TypeVar("_Label", bound=np.integer)

OPERATIONS: Mapping[str, type[Operation]] = {
    kind.name: kind for kind in (D4, Scale, Affine, Elastic, Brightness, Contrast, Blur, Noise)
}
"""Every kind of operation by the name it has in JSON."""


@dataclass(frozen=True, slots=True)
class Draw:
    """One sampled augmentation: operations in order, every parameter explicit.

    It maps frames, masks and points alike. It is kept in canonical form, and equal to every draw
    with the same: identities vanish; flips and quarter turns that meet become one `D4`, which
    stands before brightness, contrast and blur (they commute to the bit). So equal JSON means
    equal pixels, and draws known to give equal pixels have equal JSON.

    Parameters
    ----------
    operations : iterable of Operation
        First to last; none is the identity.

    Raises
    ------
    DrawError
        If one is not an `Operation`.

    Examples
    --------
    >>> from feature_cache.augment import hflip, quarter_turn, vflip
    >>> draw = Draw.of(hflip(), Brightness(1.12), quarter_turn(2), Scale(1.0))
    >>> draw.to_json()
    [{'name': 'd4', 'element': 'flip_vertical'}, {'name': 'brightness', 'factor': 1.12}]
    >>> draw == Draw.of(vflip(), Brightness(1.12))
    True
    """

    operations: tuple[Operation, ...] = ()
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "operations", canonical(self.operations))
        object.__setattr__(self, "_hash", hash(self.operations))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Draw], tuple[tuple[Operation, ...]]]:
        return Draw, (self.operations,)  # a hash is another in each process

    @classmethod
    def of(cls, *operations: Operation) -> Draw:
        """Make a draw of operations, first to last."""
        return cls(operations)

    @classmethod
    def from_json(cls, value: object) -> Draw:
        """Make the draw that `to_json` wrote, or one written by hand.

        Raises
        ------
        DrawError
            If it isn't a list, or an operation's name or a parameter is unknown, missing or not
            allowed.
        """
        if not isinstance(value, list | tuple):
            raise DrawError(f"the draw is {value!r}: expected a list of operations")
        return cls(
            tuple(_operation_from_json(item, f"operation {i}") for i, item in enumerate(value))
        )

    def to_json(self) -> list[JSON]:
        """List the operations, as they enter a key."""
        return [operation.to_json() for operation in self.operations]

    @property
    def is_identity(self) -> bool:
        """Whether the draw leaves every pixel as it is."""
        return not self.operations

    @property
    def needs_digests(self) -> bool:
        """Whether `apply` needs the frames' content digests (there is noise)."""
        return any(operation.needs_digests for operation in self.operations)

    def check_bounds(self, bounds: Bounds | None, what: str = "these frames") -> None:
        """Check that the draw means something for frames within `bounds`.

        Flips, turns, resampling and blur do for any; brightness, contrast and noise for 0..1.

        Parameters
        ----------
        bounds : (float, float) or None
            None for any.
        what : str
            Whose frames they are, for the error.

        Raises
        ------
        DrawError
            Names the operations.
        """
        needing = [operation.name for operation in self.operations if operation.needs_unit_range]
        if needing and bounds != UNIT_RANGE:
            found = "as loaded" if bounds is None else f"in {bounds[0]:g}..{bounds[1]:g}"
            raise DrawError(
                f"the draw has {' and '.join(needing)}, for pixels in 0..1, and those of {what} "
                f"are {found}: leave these operations out (as the policy 'geometric' does), or "
                "normalise by percentiles"
            )

    def apply(
        self,
        frames: torch.Tensor,
        *,
        digests: Sequence[Digest] | None = None,
        bounds: Bounds | None = UNIT_RANGE,
    ) -> torch.Tensor:
        """Apply the draw to frames, on their device.

        Each frame's result is the same in every batch, with any number of threads.

        Parameters
        ----------
        frames : (B, H, W) float32
            Never changed; the result may share its memory.
        digests : sequence of 16 bytes, optional
            The content digest of each frame (`feature_cache.hashing.frame_digest`).
        bounds : (float, float) or None
            What the pixels are within, `feature_cache.Normalization.range`; None for any.

        Returns
        -------
        torch.Tensor
            (B, H', W') float32 within the bounds, or 0 where it is outside the frame; contiguous
            where the draw is not the identity.

        Raises
        ------
        TypeError
            If the frames are not float32.
        FrameError
            If their shape is not (B, H, W).
        DrawError
            If the draw has noise and there is not one digest a frame; as `check_bounds`.
        """
        import torch

        self.check_bounds(bounds)

        if frames.dtype != torch.float32:
            raise TypeError(f"frames have dtype {frames.dtype}: expected torch.float32")
        if frames.ndim != 3 or 0 in frames.shape[1:]:
            raise FrameError(f"frames have shape {tuple(frames.shape)}: expected (B, H, W)")
        each = _checked_digests(digests, len(frames)) if self.needs_digests else ()
        device = frames.device
        if device.type == "mps":  # has no float64
            frames = frames.cpu()
        for operation in self.operations:
            frames = operation.apply(frames, each, bounds)
        return frames.to(device)

    def apply_mask(self, mask: NDArray[_Label]) -> NDArray[_Label]:
        """Apply the draw's geometry to a mask, nearest neighbour; outside the frame is 0.

        Parameters
        ----------
        mask : (H, W) integer
            Never changed; the result may share its memory.

        Returns
        -------
        ndarray
            (H', W') of the same dtype.

        Raises
        ------
        TypeError
            If the mask's labels are not integers.
        FrameError
            If its shape is not (H, W).
        """
        if mask.dtype.kind not in "bui":
            raise TypeError(
                f"the mask has dtype {mask.dtype}: expected integer labels; whole numbers become "
                "such by .astype(int)"
            )
        if mask.ndim != 2 or mask.size == 0:
            raise FrameError(f"the mask has shape {mask.shape}: expected (H, W), none of them 0")
        for operation in self.operations:
            mask = operation.apply_mask(mask)
        return mask

    def apply_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Apply the draw's geometry to masks, as `apply_mask` does, on their device.

        Parameters
        ----------
        rows : (Z, H, W), integer
            `feature_cache.regions.Regions.rows`, or masks of one shape. Never changed; the result
            may share its memory.

        Returns
        -------
        torch.Tensor
            (Z, H', W') uint8 for uint8, else int32.

        Raises
        ------
        TypeError
            If they are not integers.
        FrameError
            If their shape is not (Z, H, W).
        """
        import torch

        if rows.is_floating_point() or rows.is_complex():
            raise TypeError(f"the rows have dtype {rows.dtype}: expected integers")
        if rows.ndim != 3 or 0 in rows.shape:
            raise FrameError(f"the rows have shape {tuple(rows.shape)}: expected (Z, H, W)")
        rows = rows if rows.dtype == torch.uint8 else rows.int()
        for operation in self.operations:
            rows = operation.apply_rows(rows)
        return rows

    def map_points(self, points: ArrayLike, shape: Shape) -> NDArray[np.float64]:
        """Map points to where the draw puts them; they may fall outside the result.

        Parameters
        ----------
        points : (N, 2) float
            (y, x) in pixels of the frame as loaded; whole numbers are pixel centres.
        shape : (H, W)
            Of the frame as loaded.

        Returns
        -------
        ndarray
            (N, 2) float64, (y, x) in pixels of the result.

        Raises
        ------
        FrameError
            If the points are not finite numbers of shape (N, 2), or `shape` is not one.
        """
        mapped = np.array(points, dtype=np.float64)
        if mapped.ndim != 2 or mapped.shape[1] != 2 or not np.isfinite(mapped).all():
            raise FrameError(
                f"points of shape {mapped.shape}: expected finite numbers of shape (N, 2)"
            )
        shape = _checked_shape(shape)
        for operation in self.operations:
            mapped = operation.map_points(mapped, shape)
            shape = operation.output_shape(shape)
        return mapped

    def output_shape(self, shape: Shape) -> Shape:
        """Give the shape (H', W') that a frame of shape (H, W) gets.

        Raises
        ------
        FrameError
            If `shape` is not two positive integers.
        """
        shape = _checked_shape(shape)
        for operation in self.operations:
            shape = operation.output_shape(shape)
        return shape

    def matrix(self, shape: Shape) -> NDArray[np.float64] | None:
        """Give the map of points as one matrix, where it has one.

        Parameters
        ----------
        shape : (H, W)
            Of the frame as loaded.

        Returns
        -------
        ndarray or None
            (3, 3) float64, acting on (y, x, 1); None if there is an elastic part.

        Raises
        ------
        FrameError
            If `shape` is not two positive integers.
        """
        shape, total = _checked_shape(shape), np.eye(3)
        for operation in self.operations:
            matrix = operation.matrix(shape)
            if matrix is None:
                return None
            total = matrix @ total
            shape = operation.output_shape(shape)
        return total

    def jacobians(self, points: ArrayLike, shape: Shape) -> NDArray[np.float64]:
        """Give the draw's linear part at each point, which turns and stretches a region there.

        Parameters
        ----------
        points : (N, 2) float
            As in `map_points`.
        shape : (H, W)
            Of the frame as loaded.

        Returns
        -------
        ndarray
            (N, 2, 2) float64, (y, x) to (y, x); the matrix's upper left part where there is one,
            else central differences over one pixel.

        Raises
        ------
        FrameError
            As in `map_points`.
        """
        at = self.map_points(points, shape)
        matrix = self.matrix(shape)
        if matrix is not None:
            return np.broadcast_to(matrix[:2, :2], (len(at), 2, 2))
        start = np.array(points, dtype=np.float64)
        steps = [
            self.map_points(start + step, shape) - self.map_points(start - step, shape)
            for step in 0.5 * np.eye(2)
        ]
        return np.stack(steps, axis=2)


def canonical(operations: Iterable[Operation]) -> tuple[Operation, ...]:
    """Bring operations into canonical form; the pixels stay the same to the bit."""
    kept: list[Operation] = []
    for i, operation in enumerate(operations):
        if not isinstance(operation, Operation):
            raise DrawError(
                f"operation {i} of the draw is {operation!r}: expected an Operation such as "
                "hflip() or Scale(0.9) (Draw.from_json reads JSON)"
            )
        simple = operation.simplify()
        if isinstance(simple, D4):
            _merge_turn(kept, simple)
        elif simple is not None:
            kept.append(simple)
    return tuple(kept)


def _merge_turn(kept: list[Operation], turn: D4) -> None:
    """Put `turn` as far forward as it commutes, into the element that stands there."""
    place = len(kept)
    while place and kept[place - 1].commutes_with_d4:
        place -= 1
    before = kept[place - 1] if place else None
    if not isinstance(before, D4):
        kept.insert(place, turn)
        return
    merged = before.then(turn).simplify()
    kept[place - 1 : place] = [] if merged is None else [merged]


def _operation_from_json(value: object, where: str = "operation") -> Operation:
    """Build the operation that `Operation.to_json` wrote.

    Raises
    ------
    DrawError
        If the name is unknown, a parameter is unknown, missing or not allowed.
    """
    if not isinstance(value, Mapping):
        raise DrawError(f"{where} is {value!r}: expected an object such as {{'name': 'd4', ...}}")
    name = value.get("name")
    kind = OPERATIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise DrawError(f"{where} has the name {name!r}: expected one of {', '.join(OPERATIONS)}")
    known = field_names(kind)
    given = {key: item for key, item in value.items() if key != "name"}
    if set(given) != set(known):
        raise DrawError(
            f"{where} ({name}) has the parameters {', '.join(map(str, given)) or 'none'}: "
            f"expected {', '.join(known)}"
        )
    return kind(**given)


def _checked_digests(digests: Sequence[Digest] | None, count: int) -> Sequence[Digest]:
    """Give `digests` if there is one of 16 bytes for each of `count` frames.

    Raises
    ------
    DrawError
        If not.
    """
    if digests is None:
        raise DrawError(
            "the draw has noise, which depends on each frame: pass digests=, one a frame"
        )
    if len(digests) != count:
        raise DrawError(f"digests has {len(digests)} digests for {count} frames: expected one each")
    for i, digest in enumerate(digests):
        if not isinstance(digest, bytes) or len(digest) != DIGEST_BYTES:
            raise DrawError(f"digests[{i}] is {digest!r}: expected {DIGEST_BYTES} bytes")
    return digests


def _checked_shape(shape: Shape) -> Shape:
    sizes = tuple(shape)
    if len(sizes) != 2 or not all(isinstance(n, int | np.integer) and n > 0 for n in sizes):
        raise FrameError(f"the shape is {shape!r}: expected (H, W), both positive integers")
    return int(sizes[0]), int(sizes[1])


IDENTITY = Draw()
"""The draw that changes nothing."""
