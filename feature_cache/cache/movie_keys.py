"""The keys of one movie's records: what is read and hashed for them."""

from __future__ import annotations

import contextvars
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from ..augment import IDENTITY, Draw
from ..engine import PART_FAILS, Decoded, Failure, Frame, Progress, Tally
from ..errors import DrawError, FrameError, MovieError
from ..hashing import (
    DIGEST_BYTES,
    JSON,
    Digest,
    canonical_json,
    frame_digest,
    frame_pixels,
    mask_digest,
    mask_labels,
)
from ..key import Keys, record_key, window_digest
from ..memo import Fingerprint, Memo
from ..movies import Series, Source
from ..movies.axes import channel_hint
from ..spec import KEY_VERSION, SpaceSpec
from ..store import Asked, Space, add_asked
from ..system import count_cores
from .folder import OpenCache
from .recent_frames import Recent

if TYPE_CHECKING:
    from ..backbones.base import Backbone


@dataclass(eq=False)
class MovieKeys:
    """The keys of one movie's records in one space under one draw.

    Frames and masks are read once, when the keys are first asked for, and again where something
    is missing. Digests of files are remembered, and files that the memo knows are read only where
    something is missing.

    Attributes
    ----------
    frames, masks : Series, Series or None
        Of the movie; masks only where the space pools.
    source : Source or None
        How the movie is opened; None for arrays.
    name, origin : str
        How people call the movie, and where the draw comes from (such as ``"copy 3 of seed 0"``);
        for errors and provenance, in no key.
    memo : Memo
        Closed by itself when the last frame is hashed.
    images_read : int
        How many frames and masks were read to be hashed: those whose digests were not remembered.
    recent : Recent or None
        What was read to be hashed and is computed next.
    wanted : dict of str to str
        The copies that are asked for, as `texts_of` gives them.
    """

    cache: OpenCache
    frames: Series
    masks: Series | None
    backbone: Backbone
    spec: SpaceSpec
    draw: Draw = IDENTITY
    name: str = ""
    origin: str = ""
    source: Source | None = None
    memo: Memo = field(default_factory=Memo, repr=False)
    images_read: int = field(default=0, repr=False)
    recent: Recent | None = field(default=None, repr=False)
    wanted: dict[str, str] = field(default_factory=dict, repr=False)
    _digests: dict[int, tuple[Digest, Digest | None]] = field(default_factory=dict, repr=False)
    _keys: dict[int, Digest] = field(default_factory=dict, repr=False)
    _space: Space | None = field(default=None, repr=False)
    _about: dict[str, JSON] | None = field(default=None, repr=False)
    _decoded: Decoded = field(default_factory=Decoded, repr=False)

    def __post_init__(self) -> None:
        """Check what can be checked without reading."""
        if not isinstance(self.draw, Draw):
            raise DrawError(
                f"draw is a {type(self.draw).__name__}: expected a Draw, such as "
                "Augmentations().draw(1)"
            )
        self._space_digest = self.spec.digest
        backbone, normalization = self.spec.backbone.name, self.spec.backbone.normalization
        what = f"{backbone} (normalisation {normalization.name!r})"
        self.draw.check_bounds(normalization.range, what)
        if self.spec.pooling is None:
            self.masks = None
        elif self.masks is None:
            raise MovieError(
                f"pooling {self.spec.pooling!r} needs masks: pass them, or pooling=None for grids"
            )
        elif len(self.masks) != len(self.frames):
            raise MovieError(
                f"{self.name or 'the movie'} has {len(self.frames)} frames and "
                f"{len(self.masks)} masks: expected as many masks as frames"
            )

    def __len__(self) -> int:
        """Count the frames."""
        return len(self.frames)

    def with_draw(self, draw: Draw, origin: str = "") -> Self:
        """Give the same movie under another draw; what is hashed stays hashed.

        Raises
        ------
        DrawError
            It is none, or gives pixels beyond what the backbone takes.
        """
        return replace(self, draw=draw, origin=origin, _keys={}, _about=None)

    def in_space(self, spec: SpaceSpec) -> Self:
        """Give the same movie in another space; what is hashed stays hashed."""
        digests = self._digests
        if spec.pooling is None:
            digests = {t: (frame, None) for t, (frame, _) in digests.items()}
        return replace(self, spec=spec, _digests=digests, _keys={}, _space=None)

    def know(self, digests: Mapping[int, tuple[Digest, Digest | None]]) -> None:
        """Take digests of frames and masks that another process made of the same files."""
        self._digests.update(digests)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the open space: another process opens its own."""
        return {**self.__dict__, "_space": None, "recent": None}

    @property
    def space(self) -> Space:
        """The space in the store, shared by all movies of one spec."""
        # Not a cached_property: Python 3.11 locks it, for good in a child forked meanwhile.
        if self._space is None:
            self._space = self.cache.space(self.spec)
        return self._space

    def digests(self, t: int) -> tuple[Digest, Digest | None]:
        """Give the digests of frame `t` and of its mask; reads what the memo doesn't know.

        Raises
        ------
        FrameError, MovieError
            The frame can't be read, or holds NaN; frame and mask don't fit.
        """
        # without a lock: two threads that hash one frame find the same
        if t not in self._digests:
            frame = self._fingerprint(t, "frame", partial(self._hash_frame, t))
            if self.masks is None:
                self._digests[t] = frame.digest, None
            else:
                hash_mask = partial(self._hash_mask, self.masks, t, frame.shape)
                mask = self._fingerprint(t, "mask", hash_mask)
                self._check_shapes(t, frame.shape, mask.shape)
                self._digests[t] = frame.digest, mask.digest
            if len(self._digests) >= len(self):
                self.memo.close()
                if self.wanted and self.name and self.cache.store.mode != "r":
                    add_asked(self.cache.store.root, self.asked({self.spec: self.wanted}))
        return self._digests[t]

    def _fingerprint(self, t: int, kind: str, compute: Callable[[], Fingerprint]) -> Fingerprint:
        images = self.frames if kind == "frame" else self.masks
        place = None if images is None else in_files(images, t, kind)
        return compute() if place is None else self.memo.fingerprint(compute=compute, **place)

    def _hash_frame(self, t: int) -> Fingerprint:
        frame = self._read_image(self.frames, t)
        return Fingerprint(frame_digest(frame, self.where(t)), np.shape(frame))

    def _hash_mask(self, masks: Series, t: int, shape: tuple[int, ...]) -> Fingerprint:
        mask = self._read_image(masks, t)
        self._check_shapes(t, shape, np.shape(mask))
        return Fingerprint(mask_digest(mask, self.where(t, "mask")), np.shape(mask))

    def _read_image(self, images: Series, t: int) -> Any:
        """Read a frame or mask to hash it."""
        image = images[t]
        self.images_read += 1
        # only what was decoded from files: an array of the user's may change until it is computed
        if self.recent is not None and isinstance(image, np.ndarray) and images.files_of(t):
            self.recent.keep(images, t, image)
        return image

    def _take_image(self, images: Series, t: int) -> Any:
        """Read a frame or mask to compute it, if it was not read to be hashed just now."""
        image = None if self.recent is None else self.recent.take(images, t)
        # decoded here, and `take` gives it once: nobody else can change it
        if image is not None and image.flags.owndata:
            return image
        image = images[t] if image is None else image
        # A copy: an array that changes later must not change what was compared with the digests.
        return image.copy() if isinstance(image, np.ndarray) else image

    def numbers(self, indices: Iterable[int] | None = None) -> list[int]:
        """Give the numbers of frames, by default of all; a negative one counts from the end.

        Raises
        ------
        IndexError
            There is no such frame.
        TypeError
            They are no list of whole numbers.
        """
        every = range(len(self))
        try:
            wanted = list(every if indices is None else map(operator.index, indices))
        except TypeError as error:
            raise TypeError(
                f"indices is {indices!r}: expected a list of frames' numbers, such as [0, 1]"
            ) from error
        for t in wanted:
            if not -len(every) <= t < len(every):
                what = self.name or "the movie"
                raise IndexError(f"frame {t} of {what}, which has {len(every)} frames")
        return [every[t] for t in wanted]

    def window(self, t: int) -> list[int]:
        """Give the frames that the backbone sees for frame `t`: mostly that one alone."""
        return self.spec.backbone.context.window(range(len(self))[t], len(self))

    def digests_seen(self, indices: Iterable[int]) -> dict[int, tuple[Digest, Digest | None]]:
        """Give the `digests` of all that the backbone sees for some frames."""
        return {s: self.digests(s) for t in indices for s in self.window(t)}

    def seen_digest(self, t: int) -> Digest:
        """Give the digest of what the backbone sees for frame `t`.

        FrameError or MovieError where a frame can't be read, or its mask doesn't fit.
        """
        return window_digest([self.digests(s)[0] for s in self.window(t)])

    def key(self, t: int) -> Digest:
        """Give the key of frame `t`'s record: 16 bytes.

        FrameError or MovieError where a frame can't be read, or its mask doesn't fit.
        """
        if t not in self._keys:
            mask = self.digests(t)[1]
            self._keys[t] = record_key(self._space_digest, self.seen_digest(t), mask, self.draw)
        return self._keys[t]

    def keys(self, indices: Sequence[int] | None = None) -> Keys:
        """Give the keys of some frames, by default all: (n, 16) uint8.

        FrameError or MovieError where a frame can't be read, or its mask doesn't fit.
        """
        joined = b"".join(map(self.key, self.numbers(indices)))
        return np.frombuffer(joined, np.uint8).reshape(-1, DIGEST_BYTES)

    def contains(self, indices: Sequence[int] | None = None) -> NDArray[np.bool_]:
        """Tell for some frames, by default all, whether their records are there: (n,) bool."""
        return self.space.contains(self.keys(indices))

    def hash_frames(
        self,
        indices: Sequence[int],
        tally: Tally,
        records: int = 1,
        progress: Progress | None = None,
    ) -> list[int]:
        """Hash frames and masks, several at once; give those whose keys are known by now.

        Parameters
        ----------
        indices : sequence of int
        tally : Tally
            Takes the failures.
        records : int
            How many a frame that fails stands for.
        progress : callable, optional
            Called with the number of frames just hashed.
        """
        return list(self.hash_each(indices, tally, records, progress))

    def hash_each(
        self,
        indices: Iterable[int],
        tally: Tally,
        records: int,
        progress: Progress | None = None,
    ) -> Iterator[int]:
        """Give the frames of `hash_frames` as they come."""

        def hash_one(t: int) -> Exception | None:
            try:
                self.digests(t)
            except PART_FAILS as error:
                return error
            return None

        frames = dict.fromkeys(indices)
        seen = list(dict.fromkeys(s for t in frames for s in self.window(t)))
        results = zip(seen, self._map_unknown(hash_one, seen), strict=True)
        errors: dict[int, Exception | None] = {}
        for t in frames:
            window = self.window(t)
            while any(s not in errors for s in window):
                s, errors[s] = next(results)
                if progress is not None and s in frames:
                    progress(1)
            found = (errors[s] for s in (t, *window))  # its own first
            error = next((one for one in found if one is not None), None)
            if error is None:
                yield t
            else:
                tally.fail(Failure(self.where(t), str(error), records), error, t)

    def _map_unknown(
        self, hash_one: Callable[[int], Exception | None], frames: Sequence[int]
    ) -> Iterator[Exception | None]:
        """Call a function for each frame in order; by several threads where much is to be read."""
        if all(t in self._digests for t in frames[1:]):
            yield from map(hash_one, frames)
            return
        threads = max(4, count_cores())
        with self.memo, ThreadPoolExecutor(threads, "feature_cache hash") as readers:
            yield hash_one(frames[0])  # alone: it opens the memo's pages, which the others share
            for first in range(1, len(frames), 4 * threads):  # no further than is asked for
                some = frames[first : first + 4 * threads]
                # a thread of a pool doesn't inherit `no_memo`, which is a context variable
                contexts = [contextvars.copy_context() for _ in some]
                yield from readers.map(lambda context, t: context.run(hash_one, t), contexts, some)

    def read(self, t: int) -> Frame:
        """Read frame `t`, its mask and what else is seen, to compute it; FrameError if changed."""
        window: tuple[Frame, ...] = ()
        if any(self.spec.backbone.context):
            window = self._decoded.take(self.window(t), self._read_pixels)
            own = window[self.spec.backbone.context.before]
        else:
            own = self._read_pixels(t)
        if self.masks is None and not window:
            return own
        mask = None
        if self.masks is not None:
            mask = mask_labels(self._take_image(self.masks, t), self.where(t, "mask"))
            if mask_digest(mask) != self.digests(t)[1]:
                raise self._changed(t)
            self._check_shapes(t, own.pixels.shape, mask.shape)
        return Frame(own.pixels, mask, own.digest, own.where, window)

    def _read_pixels(self, t: int) -> Frame:
        given = self._take_image(self.frames, t)
        pixels, digest = frame_pixels(given, self.where(t)), self.digests(t)[0]
        # hashed again: the digest may be the memo's, and the file another by now
        if frame_digest(pixels) != digest:
            raise self._changed(t)
        is_small = isinstance(given, np.ndarray) and given.dtype.kind in "bui"
        return Frame(given if is_small else pixels, None, digest, self.where(t))

    def _changed(self, t: int) -> FrameError:
        """Let the memo forget frame `t` and its mask: a digest from it may be wrong."""
        # written at once: the next run must not recall it either
        with self.memo as memo:
            for images, kind in ((self.frames, "frame"), (self.masks, "mask")):
                place = None if images is None else in_files(images, t, kind)
                if place is not None:
                    memo.forget(**place)
        return FrameError(f"{self.where(t)} changed since it was hashed: open the movie anew")

    @staticmethod
    def texts_of(copies: Iterable[MovieKeys]) -> dict[str, str]:
        """Give the draw of each copy as canonical JSON, and where it comes from."""
        return {canonical_json(copy.draw.to_json()): copy.origin for copy in copies}

    def want(self, copies: Iterable[MovieKeys]) -> None:
        """Say which copies are asked for, for the cache to note when the last frame is hashed."""
        self.wanted.update(self.texts_of(copies))

    def asked(self, wanted: Mapping[SpaceSpec, Mapping[str, str]]) -> Asked:
        """Say what is asked for, by space as `texts_of`; of frames that are hashed."""
        frames = []
        for t, (frame, mask) in sorted(self._digests.items()):
            place = self.frames.name_of(t) if self.frames.place else str(t)
            frames.append((place, frame.hex(), None if mask is None else mask.hex()))
        source = None if self.source is None else self.source.absolute().to_json()
        spaces = {spec.folder_name: dict(draws) for spec, draws in wanted.items()}
        return Asked(self.name, source, tuple(frames), spaces)

    def provenance(self, t: int) -> dict[str, JSON]:
        """Say where the record of frame `t` comes from."""
        frame, mask = self.digests(t)
        if self._about is None:
            self._about = {
                "movie": self.name,
                "source": None if self.source is None else self.source.absolute().to_json(),
                "draw": self.draw.to_json(),
                "origin": self.origin,
            }
        told = {
            **self._about,
            "frame": t,
            "file": self.frames.name_of(t) if self.frames.place else "",
            "frame_digest": frame.hex(),
            "mask_digest": mask.hex() if mask is not None else None,
        }
        if any(self.spec.backbone.context):
            told["window"] = [self.digests(s)[0].hex() for s in self.window(t)]
        return told

    def _check_shapes(self, t: int, frame: tuple[int, ...], mask: tuple[int, ...]) -> None:
        if frame != mask:
            raise MovieError(
                f"{self.where(t)} has shape {frame} and its mask {mask}: expected the same"
                f"{channel_hint(frame, mask)}"
            )

    def where(self, t: int, kind: str = "frame") -> str:
        """Name a frame (or its mask) for people."""
        images = self.frames if kind == "frame" else self.masks
        place = f"{kind} {t} of {self.name}" if self.name else f"{kind} {t}"
        return f"{place} ({images.name_of(t)})" if images is not None and images.place else place


def in_files(images: Series, t: int, kind: str) -> dict[str, Any] | None:
    """Give files, purpose and part for the memo; None for what it can't remember."""
    files = images.files_of(t)
    if not files:
        return None
    purpose = f"{kind}, key version {KEY_VERSION}, {images.recipe}"
    return {"files": files, "purpose": purpose, "part": images.part_of(t)}
