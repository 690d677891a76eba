"""Arrays of a `CTCData` that are made when they are used: frames, masks, association matrices.

Trackastra decompresses any ``_CompressedArray`` where it needs the numbers, so these stand where
its own compressed arrays do. They can be used as arrays, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lz4.frame
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist
from trackastra.data import data as _ctc
from trackastra.utils import normalize

from ..errors import FrameError
from ..hashing import Digest, frame_digest, mask_digest
from ..movies import Images, Series

HELD_BYTES = 128 << 20
"""Frames and masks that a process keeps decoded, at most."""


class _Held:
    """Images used last, by kind and digest; of this process."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._images: dict[str, NDArray[Any]] = {}

    def get(self, name: str, read: Callable[[], NDArray[Any]]) -> NDArray[Any]:
        # Without a lock, which a fork could leave taken: each step is one of the interpreter's.
        # taken out here and put in last: the order is that of use
        image = self._images.pop(name, None)
        if image is None:
            image = read()
            image.flags.writeable = False
        self._images[name] = image
        for old in list(self._images):
            if sum(one.nbytes for one in list(self._images.values())) <= self._max_bytes:
                break
            self._images.pop(old, None)
        return image


_held = _Held(HELD_BYTES)


@dataclass(frozen=True)
class Hashed:
    """Images of a folder, and what each of them was when the tables were made."""

    images: Series
    digests: tuple[Digest, ...]

    def read(self, t: int, digest: Callable[[NDArray[Any]], Digest]) -> NDArray[Any]:
        """Read one; FrameError where it is another by now."""
        image = self.images[t]
        if digest(image) != self.digests[t]:
            raise FrameError(
                f"{self.images.name_of(t)} of {self.images.place} changed since the training data "
                "were loaded: load them anew"
            )
        return image


@dataclass(frozen=True)
class MaskFrames:
    """Masks as `CTCData` holds them, read one by one; silver truth is merged into them.

    With `planes`, 2D masks become (1, H, W).
    """

    own: Hashed
    silver: Hashed | None
    planes: bool

    def __getitem__(self, t: int) -> NDArray[np.int32]:
        mask = _held.get(self.name(t), lambda: self._read(t))
        return mask[None] if self.planes and mask.ndim == 2 else mask

    def name(self, t: int) -> str:
        """Say which mask it is, by its contents."""
        return "mask " + " ".join(s.digests[t].hex() for s in (self.own, self.silver) if s)

    def _read(self, t: int) -> NDArray[np.int32]:
        mask = self.own.read(t, mask_digest)
        if self.silver is not None:
            return np.maximum(mask, self.silver.read(t, mask_digest))
        return np.ascontiguousarray(mask)

    @property
    def series(self) -> Series:
        """The same masks, as movies have them."""
        own, over = self.own.images, None if self.silver is None else self.silver.images.source
        return Series(own.source, own.times, own.downscale, over, labels=True)


@dataclass(frozen=True)
class ImageFrames:
    """Frames as `CTCData` holds them: normalised, and where it compresses, emptied outside masks.

    With `planes`, 2D frames become (1, H, W). `features` is that of the `CTCData`.
    """

    frames: Hashed
    planes: bool
    emptied: MaskFrames | None
    features: str

    def __getitem__(self, t: int) -> NDArray[np.float32]:
        emptied = "" if self.emptied is None else self.emptied.name(t)
        name = f"frame {self.frames.digests[t].hex()} {self.planes} {self.features} {emptied}"
        return _held.get(name, lambda: self._read(t))

    def _read(self, t: int) -> NDArray[np.float32]:
        image = normalize(self.frames.read(t, frame_digest).astype(np.float32))
        image = image[None] if self.planes and image.ndim == 2 else image
        if self.emptied is not None:
            image = _ctc._compress_img_mask_preproc(image, self.emptied[t], self.features)
        return image


@dataclass(frozen=True)
class NoFrames:
    """Zeros, which `CTCData` has where its features need no frames."""

    masks: MaskFrames

    def __getitem__(self, t: int) -> NDArray[np.int32]:
        return np.zeros_like(self.masks[t])


class Late:
    """An array that is made when it is used, each time anew."""

    def __init__(self, shape: tuple[int, ...], dtype: Any) -> None:
        self._shape, self._dtype = shape, np.dtype(dtype).type

    def decompress(self) -> NDArray[Any]:
        """Make it."""
        raise NotImplementedError

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self._shape

    @property
    def ndim(self) -> int:
        """Its axes."""
        return len(self._shape)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Its dtype."""
        return np.dtype(self._dtype)

    def __len__(self) -> int:
        """Give the length of its first axis."""
        return self._shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        """Make it, for NumPy."""
        return self.decompress() if dtype is None else self.decompress().astype(dtype)

    def __getitem__(self, place: Any) -> Any:
        """Make it, and give a part."""
        return self.decompress()[place]

    def astype(self, dtype: Any) -> NDArray[Any]:
        """Make it, in another dtype."""
        return self.decompress().astype(dtype)

    def copy(self) -> NDArray[Any]:
        """Make it."""
        return self.decompress()


class Compressed(Late, _ctc._CompressedArray):  # type: ignore[misc]
    """One that Trackastra decompresses where it needs the numbers."""

    @property
    def _data(self) -> bytes:
        return lz4.frame.compress(self.decompress())


class Stack(Compressed):
    """Frames or masks of a movie, (T, …), at some times: each is read when it is used.

    They are `MaskFrames`, `ImageFrames` or `NoFrames`; the shape is that of one.
    """

    def __init__(self, frames: Any, times: range, shape: tuple[int, ...], dtype: Any) -> None:
        super().__init__((len(times), *shape), dtype)
        self.frames, self.times = frames, times

    def decompress(self) -> NDArray[Any]:
        """Read them all."""
        made = np.empty(self._shape, self._dtype)
        for i, t in enumerate(self.times):
            made[i] = self.frames[t]
        return made

    def frame(self, i: int) -> NDArray[Any]:
        """Read one: may be kept by others, and can't be written."""
        return self.frames[self.times[i]]

    def part(self, start: int, stop: int) -> Stack:
        """Give consecutive ones; reads none."""
        return Stack(self.frames, self.times[start:stop], self._shape[1:], self._dtype)

    def __getitem__(self, place: Any) -> Any:
        """Read one, several as a `Stack`, or any part."""
        if isinstance(place, int | np.integer):
            return self.frame(int(place)).copy()
        if isinstance(place, slice):
            return Stack(self.frames, self.times[place], self._shape[1:], self._dtype)
        return self.decompress()[place]


class AssociationLinks(Late):
    """The association matrix (N, N) of a window: which detections are of one line of descent.

    Cropped as Trackastra crops, ``links[rows][:, rows]``, it is made of these alone.

    Parameters
    ----------
    first, last : (N,) int32
        The part of the order of descent that a detection's track and its descendants take, from
        `order_tracks`; -1 for both where it matches no track.
    """

    def __init__(self, first: NDArray[np.int32], last: NDArray[np.int32]) -> None:
        super().__init__((len(first), len(first)), bool)
        self._first, self._last = first, last

    def decompress(self) -> NDArray[np.bool_]:
        """Make it: (N, N) bool, true where parts overlap, as one then lies in the other."""
        return (self._first[:, None] < self._last) & (self._first < self._last[:, None])

    def __getitem__(self, place: Any) -> Any:
        """Give rows that are not made yet, or make it and give a part."""
        if isinstance(place, np.ndarray) and place.ndim == 1 and place.dtype.kind == "i":
            return _Rows(self, place)
        return super().__getitem__(place)

    def crop(self, rows: NDArray[np.integer[Any]]) -> AssociationLinks:
        """Give the matrix of some detections."""
        return AssociationLinks(self._first[rows], self._last[rows])


class _Rows(Late):
    """Rows of `AssociationLinks`; of the same columns, they are `AssociationLinks` again."""

    def __init__(self, links: AssociationLinks, rows: NDArray[np.integer[Any]]) -> None:
        super().__init__((len(rows), len(links)), bool)
        self._links, self._rows = links, rows

    def decompress(self) -> NDArray[np.bool_]:
        made: NDArray[np.bool_] = self._links.decompress()[self._rows]
        return made

    def __getitem__(self, place: Any) -> Any:
        # the very same array, as upstream crops: another would have to be compared
        if isinstance(place, tuple) and len(place) == 2 and place[1] is self._rows:
            return self._links.crop(self._rows)[place[0]]
        return super().__getitem__(place)


class Distances(Compressed):
    """What `CTCData` takes for associations under ``sanity_dist``."""

    def __init__(self, coords: NDArray[Any]) -> None:
        super().__init__((len(coords), len(coords)), np.float64)
        self._coords = coords

    def decompress(self) -> NDArray[np.float64]:
        """Make it: (N, N) float64."""
        return np.exp(-0.01 * cdist(self._coords, self._coords))


def order_tracks(graph: Any) -> dict[int, tuple[int, int]]:
    """Order the tracks of a forest, from parent to child, the descendants of each right after it.

    Gives each track's own number, and the first number after its last descendant.

    Examples
    --------
    >>> import networkx
    >>> order_tracks(networkx.DiGraph([(1, 2), (1, 3), (3, 4)]))
    {2: (1, 2), 4: (3, 4), 3: (2, 4), 1: (0, 4)}
    """
    order: dict[int, tuple[int, int]] = {}
    firsts: dict[int, int] = {}
    for root in [node for node, parents in graph.in_degree() if parents == 0]:
        waiting = [root]
        while waiting:
            node = waiting[-1]
            if node in firsts:
                waiting.pop()
                order.setdefault(node, (firsts[node], len(firsts)))
            else:
                firsts[node] = len(firsts)
                waiting += [child for child in reversed(list(graph[node])) if child not in firsts]
    return order


class HeldMasks(Images):
    """The masks that a `CTCData` holds: as they are, or compressed.

    Those that it compressed as a whole are compressed one by one here, when they are first used.
    """

    def __init__(self, held: Any, *, planar: bool) -> None:
        self._held, self._planar = held, planar
        self._apart: list[bytes] | None = None

    def __len__(self) -> int:
        return count_masks(self._held)

    def __getitem__(self, t: int) -> NDArray[Any]:
        mask = self._read(t)
        return mask[0] if self._planar and mask.ndim == 3 and len(mask) == 1 else mask

    def _read(self, t: int) -> NDArray[Any]:
        held = self._held
        if not isinstance(held, _ctc._CompressedArray):
            return held[t]
        if self._apart is None:
            self._apart = [lz4.frame.compress(np.ascontiguousarray(m)) for m in held.decompress()]
        mask = np.frombuffer(lz4.frame.decompress(self._apart[t]), held._dtype)
        return mask.reshape(held._shape[1:])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a mask."""
        held = self._held
        compressed = isinstance(held, _ctc._CompressedArray)
        shape = tuple(held._shape if compressed else held.shape)[1:]
        return shape[1:] if self._planar and len(shape) == 3 and shape[0] == 1 else shape


def count_masks(held: Any) -> int:
    """Count the masks of a series that may be compressed."""
    return int(held._shape[0] if isinstance(held, _ctc._CompressedArray) else len(held))
