"""FeatureCache: a directory of features, and all that can be asked of it."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..augment import IDENTITY, Draw
from ..engine import Progress
from ..errors import ReadOnlyCacheError
from ..explain import Explanation
from ..key import Record
from ..movies import Given, Movie
from ..recompute import choose_records
from ..recompute import recompute as compute_again
from ..spec import SpaceSpec
from ..store import maintenance, read_runs, remote, sum_usage
from .folder import OpenCache
from .movie_features import MovieFeatures

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..store.maintenance import CompactReport, Finding, GarbagePlan
    from ..store.remote import TransferReport


_log = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _say_what_nearest_costs() -> None:
    """Warn once a process."""
    _log.warning(
        "nearest_patch takes the one cell under each region's centre: on an annotated movie of a "
        "bacterial colony it found 10 to 14 of 100 parents fewer than mean_patches_exact, which "
        "costs no more"
    )


class FeatureCache(OpenCache):
    """A directory of features, computed once and read at the speed of memory.

    Equal keys mean equal numbers: a record is found by the content of frame and mask and by all
    that changes its numbers, never by a name. Safe to share between processes, and to pickle or
    fork. A record is in the cache when it is committed as a whole, never before.

    Parameters
    ----------
    root : path
        The cache's folder, also as ``file://`` URL.
    mode : str
        ``"a"`` reads and writes, and makes the folder where there is none; ``"r"`` only reads.
    codec : str
        How new features are stored: ``"raw"`` (fastest), ``"zstd"`` or ``"blosc"``
        (smaller). All are lossless and none is in a key.
    layers : sequence of path or URL
        Caches below, which are only read, the first one first: other folders, or what `push`
        wrote to ``s3://…``, ``gs://…``, ``az://…`` or ``hf://datasets/…``, also as read by
        ``https://…``; the packs of these are brought here when they are needed.
    promote : bool
        Whether packs of folders in `layers` are brought here too when they are read.
    create : bool
        Whether the folder is made in mode ``"a"`` where there is none.

    Raises
    ------
    StoreError
        `NotACacheError`, `CacheVersionError` or `ReadOnlyCacheError`, as the folders are.

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

    def movie(
        self,
        frames: Given,
        masks: Given = None,
        backbone: Backbone | None = None,
        *,
        pooling: str | None = "mean_patches_exact",
        draw: Draw | None = None,
        dtype: str = "float16",
        name: str = "",
    ) -> MovieFeatures:
        """Bind a movie to a space of this cache; reads, hashes and computes nothing yet.

        Parameters as `get_or_compute`; `name` is how errors and provenance call the movie, by
        default as it calls itself. A frame of an array is hashed once: bind an array anew that was
        changed in place.
        """
        if isinstance(backbone, str):
            raise TypeError(
                f"backbone is the name {backbone!r}: expected a backbone; load it once, by "
                f"load_backbone({backbone!r})"
            )
        if backbone is None:
            raise TypeError("no backbone was given: pass backbone=load_backbone(name)")
        if isinstance(backbone, type):
            raise TypeError(
                f"backbone is the class {backbone.__name__}: expected a backbone; make an instance "
                f"of it, {backbone.__name__}(…)"
            )
        if not hasattr(backbone, "spec"):
            raise TypeError(
                f"backbone is a {type(backbone).__name__}: expected a backbone, which has spec and "
                "embed; pass frames, masks and backbone in this order"
            )
        if pooling == "nearest_patch":
            _say_what_nearest_costs()
        spec = SpaceSpec(backbone.spec, pooling, dtype)
        given = Movie.of(frames, masks, detections=None if pooling is None else "TRA")
        return MovieFeatures(
            self, given.frames, given.masks, backbone, spec,
            IDENTITY if draw is None else draw, name or given.name, source=given.source,
        )  # fmt: skip

    def get_or_compute(
        self,
        frames: Given,
        masks: Given = None,
        backbone: Backbone | None = None,
        *,
        pooling: str | None = "mean_patches_exact",
        draw: Draw | None = None,
        dtype: str = "float16",
        batch_size: int | None = 8,
        keep_grids: bool = False,
    ) -> list[Record]:
        """Give one record a frame, in order; compute and commit what is missing.

        A hit touches no model. The numbers of a hit and of a miss are the same.

        Parameters
        ----------
        frames : Movie, path, or images (T, H, W) or (T, Z, H, W)
            An array of any kind, or a sequence of frames: bool, integer or float, as loaded; not
            changed. A path is opened by `Movie.open`.
        masks : as `frames`, integer labels, 0 is background; optional
            By default those of the movie, or at the path; not used where `pooling` is None.
        backbone : Backbone
        pooling : str or None
            One of `feature_cache.pooling.POOLINGS`; None gives grids.
        draw : Draw, optional
            The augmentation, by default none.
        dtype : str
            Storage dtype: ``"float16"`` or ``"float32"``.
        batch_size, keep_grids
            As `MovieFeatures.compute`.

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
        return movie.get_or_compute(batch_size=batch_size, keep_grids=keep_grids)

    def get(
        self,
        frames: Given,
        masks: Given = None,
        backbone: Backbone | None = None,
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
        frames: Given,
        masks: Given = None,
        backbone: Backbone | None = None,
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
        frames: Given,
        masks: Given = None,
        backbone: Backbone | None = None,
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
            instead of those of this object in this process. Hits in DataLoader workers are there:
            a worker counts its own, and keeps them every few seconds and when it ends.

        Returns
        -------
        dict
            ``spaces``, ``records``, ``packs``, ``bytes`` (on disk), in records ``hits``,
            ``misses`` and ``computed``, and of features ``bytes_read`` and ``bytes_written``.
        """
        self.counter.save()
        spaces = self.store.spaces()
        usage = sum_usage(read_runs(self.store.root)) if lifetime else self.counter.total
        return {
            "spaces": len(spaces),
            "records": sum(map(len, spaces)),
            "packs": sum(len(space.pack_names()) for space in spaces),
            "bytes": sum(space.disk_bytes() for space in spaces),
            **usage.to_json(),
        }

    # Keeping it well

    def verify(
        self,
        *,
        repair: bool = False,
        deep: bool = False,
        recompute: int | Literal["all"] | None = None,
        backbones: Sequence[Backbone] = (),
        seed: int = 0,
    ) -> list[Finding]:
        """Look at every file, and compare every record with its checksum.

        Parameters
        ----------
        repair : bool
            Move what is damaged or unknown to ``quarantine/``, and remove left-overs.
        deep : bool
            Also compare with what zarr-python reads.
        recompute : int or "all", optional
            Compute that many records again, chosen at random in all spaces, and compare the
            numbers. A warning in the log counts those whose movie or weights are gone or changed;
            `feature_cache.recompute` says more.
        backbones : sequence of Backbone
            For `recompute`, where the names and the models' own weights do not say them all.
        seed : int
            Another one chooses other records.

        Returns
        -------
        list of Finding
            What is not as it should be, or was not before the repair, and what killed processes
            left (`Finding.is_wrong` tells them apart); empty where there is nothing.

        Raises
        ------
        StoreError
            The cache can't be read, or can't be repaired.
        ValueError
            A number of records below 1.
        """
        findings = maintenance.verify(self.store.root, deep=deep)
        if repair:
            maintenance.repair(self.store.root, findings)
        if recompute is None:
            return findings
        chosen = choose_records(
            self.store.spaces(), None if recompute == "all" else recompute, seed
        )
        again = compute_again(chosen, backbones=backbones)
        if again.unknown:
            _log.warning("%s", again)
        if repair:
            maintenance.repair(self.store.root, again.wrong)
            # packs went to quarantine without these open spaces being told
            for space in self._spaces.values():
                space.refresh()
        return findings + again.wrong

    def gc(
        self,
        *,
        max_bytes: int | None = None,
        max_age_seconds: float | None = None,
        spaces: Collection[str] = (),
        dry_run: bool = True,
        max_seconds: float | None = None,
    ) -> GarbagePlan:
        """Let go of what was not used for longest, and of left-overs.

        Parameters
        ----------
        max_bytes : int, optional
            Keep no more than this on the disk, as du counts: the most recently used, and before
            it what running processes read in the last day.
        max_age_seconds : float, optional
            Keep nothing that was not used for longer.
        spaces : collection of str, optional
            Beginnings of the names of the spaces to look at, by default all.
        dry_run : bool
            Only say what would go, which is the default.
        max_seconds : float, optional
            Stop after about so long; what is left is for the next time.

        Returns
        -------
        GarbagePlan
            What goes, and what stays.
        """
        self.counter.save()
        plan = maintenance.plan_gc(
            self.store, max_bytes=max_bytes, max_age_seconds=max_age_seconds, spaces=spaces
        )
        if not dry_run:
            maintenance.run_gc(self.store, plan, max_seconds=max_seconds)
        return plan

    def compact(self) -> list[CompactReport]:
        """Merge small packs, drop records that are there twice; one report for each space.

        Readers in this and other processes go on undisturbed.

        Raises
        ------
        StoreError
            The cache can't be read or written.
        """
        return [maintenance.compact_space(space) for space in self.store.spaces()]

    def push(self, url: str, *, progress: Progress | None = None) -> TransferReport:
        """Copy the packs that an object store or another folder lacks to it, verified.

        Parameters
        ----------
        url : str
            ``s3://…``, ``gs://…``, ``az://…`` or ``file://…``, with credentials as obstore finds
            them; or ``hf://datasets/…``.
        progress : callable, optional
            Called with the number of bytes just sent.
        """
        return remote.push(self.store.root, remote.open_remote(url), progress=progress)

    def pull(self, url: str, *, progress: Progress | None = None) -> TransferReport:
        """Copy the packs that are missing here from where they were pushed to; as `push`."""
        return remote.pull(self.store.root, remote.open_remote(url), progress=progress)

    def pin(self, what: str) -> None:
        """Keep a space, pack, record or movie from `gc`, by the beginning of its name or key."""
        maintenance.add_pin(self.store, what)

    def unpin(self, what: str) -> None:
        """Take back `pin`."""
        maintenance.remove_pin(self.store, what)


def open_to_fill(
    root: str | os.PathLike[str], codec: str = "raw", layers: Sequence[str] = ()
) -> FeatureCache:
    """Open a cache to fill it; one that can only be read will do where nothing is missing."""
    try:
        return FeatureCache(root, codec=codec, layers=layers)
    except ReadOnlyCacheError as error:
        if not (Path(root) / "zarr.json").exists():
            raise
        _log.info("%s", error)
        return FeatureCache(root, "r", codec, layers=layers)
