"""A frame with its mask, read once for all draws and spaces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from ..errors import FrameError
from ..forks import Lock
from ..hashing import Digest, digest_bytes
from ..key import window_digest
from ..normalize import normalize
from ..regions import Regions
from ..spec import Normalization


@dataclass(slots=True, eq=False, weakref_slot=True)
class Frame:
    """One frame to compute records of.

    Parameters
    ----------
    pixels : (H, W) or (Z, H, W), bool, integer or float
        As stored.
    mask : same shape, int32; None where only grids are wanted
    digest : bytes, 16
        Of the pixels.
    where : str
        What to call the frame in an error.
    window : tuple of Frame
        Where the backbone sees others with it: all that it sees, in order, without masks.

    Raises
    ------
    FrameError
        Those of a window differ in shape.
    """

    pixels: NDArray[Any]
    mask: NDArray[np.int32] | None
    digest: Digest
    where: str
    window: tuple[Frame, ...] = ()
    image: NDArray[np.float32] | None = field(default=None, init=False)
    on_device: Any = field(default=None, init=False)
    """What of it lies on the device, where it is computed there."""
    _regions: Regions | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        for other in self.window:
            if other.pixels.shape != self.pixels.shape:
                raise FrameError(
                    f"{self.where} has shape {self.pixels.shape} and {other.where}, which the "
                    f"backbone sees with it, {other.pixels.shape}: expected the same"
                )

    @property
    def seen(self) -> tuple[Frame, ...]:
        """The frames whose pixels the backbone sees: those of the window, or this one."""
        return self.window or (self,)

    @property
    def seen_digest(self) -> Digest:
        """What stands in keys for the pixels that the backbone sees."""
        return window_digest([frame.digest for frame in self.seen])

    @property
    def shape(self) -> tuple[int, int]:
        """(H, W)."""
        return self.pixels.shape[-2], self.pixels.shape[-1]

    @property
    def depth(self) -> int:
        """How many slices it has."""
        return 1 if self.pixels.ndim == 2 else len(self.pixels)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels that it needs: a frame that is seen more than once counts once."""
        pixels = {id(frame): frame.pixels.nbytes for frame in self.seen}
        return sum(pixels.values()) + (0 if self.mask is None else self.mask.nbytes)

    def normalized(self, normalization: Normalization) -> NDArray[np.float32]:
        """Normalise the pixels, once: (Z, H, W) float32. FrameError where that can't be."""
        normalized = self.image  # which another thread may let go
        if normalized is None:
            image = normalize(self.pixels, normalization, self.where)
            normalized = self.image = image[None] if image.ndim == 2 else image
        return normalized

    def regions(self) -> Regions:
        """Sort the mask's pixels by region, once.

        Raises
        ------
        FrameError
            There is no mask.
        """
        # without a lock: two threads that come at once make the same
        if self._regions is None:
            if self.mask is None:
                raise FrameError(f"{self.where} has no mask, and pooling needs one")
            self._regions = Regions.of_mask(self.mask)
        return self._regions

    def slice_digests(self) -> list[Digest]:
        """Give one digest a slice, so that noise differs from slice to slice."""
        if self.pixels.ndim == 2:
            return [self.digest]
        return [digest_bytes(self.digest, z.to_bytes(4, "big")) for z in range(self.depth)]


class Decoded:
    """Frames of a movie for windows, which share them: each is read once while any is in use."""

    def __init__(self) -> None:
        self._frames = WeakValueDictionary[int, Frame]()
        self._locks: dict[int, Lock] = {}

    def __reduce__(self) -> tuple[type[Decoded], tuple[()]]:
        """Pickle as empty: another process reads its own."""
        return type(self), ()

    def take(self, numbers: list[int], read: Callable[[int], Frame]) -> tuple[Frame, ...]:
        """Give frames; those that nobody has are read."""
        return tuple(self._take(number, read) for number in numbers)

    def _take(self, number: int, read: Callable[[int], Frame]) -> Frame:
        # a lock for each frame: who wants the same one waits for it, others read theirs meanwhile
        with self._locks.setdefault(number, Lock()):
            frame = self._frames.get(number)
            if frame is None:
                # the local name holds it: of the dictionary alone it would be gone at once
                frame = self._frames[number] = read(number)
            return frame
