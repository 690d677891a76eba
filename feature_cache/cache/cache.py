"""FeatureCache: a directory of features, and all that can be asked of it."""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING

from ..augment import IDENTITY, Draw
from ..errors import DrawError, UnknownNameError
from ..explain import Explanation
from ..hashing import Digest
from ..key import Record
from ..spec import SpaceSpec
from ..store import CODECS, Counter, Mode, Space, Store
from .movie import Images, MovieFeatures

if TYPE_CHECKING:
    from ..backbones.base import Backbone


class FeatureCache:
    """A directory of features, computed once and read at the speed of memory.

    Equal keys mean equal numbers: a record is found by the content of frame and mask and by all
    that changes its numbers, never by a name. Safe to share between processes, and to pickle or
    fork. A record is in the cache when it is committed as a whole, never before.

    Parameters
    ----------
    root : path
        The cache's folder.
    mode : str
        ``"a"`` reads and writes, and makes the folder where there is none; ``"r"`` only reads.
    codec : str
        How new features are stored: ``"raw"`` (mapped, fastest), ``"zstd"`` or ``"blosc"``
        (smaller). All are lossless and none is in a key.

    Raises
    ------
    StoreError
        `NotACacheError`, `CacheVersionError` or `ReadOnlyCacheError`, as the folder is.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from feature_cache import FeatureCache
    >>> from feature_cache.testing import FakeBackbone
    >>> frames = np.random.default_rng(0).random((2, 32, 32))
    >>> masks = np.zeros((2, 32, 32), int); masks[:, 4:9, 4:9] = 7
    >>> cache = FeatureCache(tempfile.mkdtemp())
    >>> [record] = cache.get_or_compute(frames[:1], masks[:1], FakeBackbone(dim=4))
    >>> record.features.shape, record.labels.tolist()
    ((1, 4), [7])
    """

    def __init__(self, root: str | os.PathLike[str], mode: Mode = "a", codec: str = "raw") -> None:
        if codec not in CODECS:
            raise UnknownNameError("codec", codec, CODECS)
        self.store = Store(root, mode)
        self.codec = codec
        self._spaces: dict[Digest, Space] = {}
        self.counter = Counter(self.store)
        weakref.finalize(self, self.counter.save)

    def __repr__(self) -> str:
        """Show root and mode."""
        return f"FeatureCache({str(self.store.root)!r}, mode={self.store.mode!r})"

    def __reduce__(self) -> tuple[type, tuple[str, Mode, str]]:
        """Open the same folder elsewhere; the counters belong to this process."""
        return type(self), (str(self.store.root), self.store.mode, self.codec)

    def space(self, spec: SpaceSpec) -> Space:
        """Give the space of a spec, opened once."""
        digest = spec.digest
        if digest not in self._spaces:
            self._spaces[digest] = self.store.space(spec)
        return self._spaces[digest]

    def movie(
        self,
        frames: Images,
        masks: Images | None,
        backbone: Backbone,
        *,
        pooling: str | None = "mean_patches_exact",
        draw: Draw | None = None,
        dtype: str = "float16",
        name: str = "",
    ) -> MovieFeatures:
        """Bind a movie to a space of this cache; reads, hashes and computes nothing yet.

        Parameters as `get_or_compute`; `name` is how errors and provenance call the movie.
        """
        if draw is not None and not isinstance(draw, Draw):
            raise DrawError(
                f"draw is a {type(draw).__name__}: expected a Draw, such as Augmentations().draw(1)"
            )
        return MovieFeatures(
            self, frames, masks, backbone, SpaceSpec(backbone.spec, pooling, dtype),
            draw or IDENTITY, name,
        )  # fmt: skip

    def get_or_compute(
        self,
        frames: Images,
        masks: Images | None,
        backbone: Backbone,
        *,
        pooling: str | None = "mean_patches_exact",
        draw: Draw | None = None,
        dtype: str = "float16",
        batch_size: int = 8,
    ) -> list[Record]:
        """Give one record a frame, in order; compute and commit what is missing.

        A hit touches no model. The numbers of a hit and of a miss are the same.

        Parameters
        ----------
        frames : (T, H, W) or (T, Z, H, W), or a sequence of such frames
            Bool, integer or float, as loaded; not changed.
        masks : as `frames`, integer labels, 0 is background; None where `pooling` is None
        backbone : Backbone
        pooling : str or None
            One of `feature_cache.pooling.POOLINGS`; None gives grids.
        draw : Draw, optional
            The augmentation, by default none.
        dtype : str
            Storage dtype: ``"float16"`` or ``"float32"``.
        batch_size : int
            Frames embedded at once.

        Returns
        -------
        list of Record

        Raises
        ------
        FrameError, MovieError
            Pixels that are no numbers; frames and masks that don't fit.
        UnknownNameError
            No such pooling or dtype.
        BackboneError
            The embedding is not usable; nothing wrong is stored.
        MissingRecordError
            Something is missing, and the cache is read-only.
        StoreError
            The cache can't be read or written.
        """
        movie = self.movie(frames, masks, backbone, pooling=pooling, draw=draw, dtype=dtype)
        return movie.get_or_compute(batch_size=batch_size)

    def get(
        self,
        frames: Images,
        masks: Images | None,
        backbone: Backbone,
        *,
        pooling: str | None = "mean_patches_exact",
        draw: Draw | None = None,
        dtype: str = "float16",
    ) -> list[Record | None]:
        """Give what is in the cache, None where there is nothing; compute nothing.

        Parameters and errors as `get_or_compute`.
        """
        return self.movie(frames, masks, backbone, pooling=pooling, draw=draw, dtype=dtype).get()

    def contains(
        self,
        frames: Images,
        masks: Images | None,
        backbone: Backbone,
        *,
        pooling: str | None = "mean_patches_exact",
        draw: Draw | None = None,
        dtype: str = "float16",
    ) -> list[bool]:
        """Tell for each frame whether its record is there. Parameters as `get_or_compute`."""
        movie = self.movie(frames, masks, backbone, pooling=pooling, draw=draw, dtype=dtype)
        return [bool(there) for there in movie.contains()]

    def explain(
        self,
        frames: Images,
        masks: Images | None,
        backbone: Backbone,
        *,
        pooling: str | None = "mean_patches_exact",
        draw: Draw | None = None,
        dtype: str = "float16",
        name: str = "",
    ) -> list[Explanation]:
        """Say for each frame why its record is there or not; compute nothing.

        Parameters as `get_or_compute`; `name` is the movie's, as it was when it was warmed. For a
        copy of `Augmentations` there is `MovieFeatures.explain`.
        """
        movie = self.movie(
            frames, masks, backbone, pooling=pooling, draw=draw, dtype=dtype, name=name
        )
        return movie.explain()

    def stats(self, *, lifetime: bool = False) -> dict[str, int]:
        """Count what is in the cache, and how it was used.

        Parameters
        ----------
        lifetime : bool
            Count hits, misses and computed records of all processes that ever used the cache,
            instead of those of this object in this process.

        Returns
        -------
        dict
            ``spaces``, ``records``, ``packs``, ``bytes`` (on disk), and in records ``hits``,
            ``misses``, ``computed``.
        """
        self.counter.save()
        spaces = self.store.spaces()
        usage = self.store.total_usage() if lifetime else self.counter.total
        return {
            "spaces": len(spaces),
            "records": sum(map(len, spaces)),
            "packs": sum(len(space.pack_names()) for space in spaces),
            "bytes": sum(space.disk_bytes() for space in spaces),
            **usage.to_json(),
        }
