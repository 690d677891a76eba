"""Trackastra's training data, built once and then opened from the cache: `load_ctc`.

What upstream's own code makes of a movie (regions with their shallow features, matching, lineage,
windows) is kept as one record of a space, beside the features: a few arrays, by the digests of
frames, masks and tracks, the options, and the versions of the packages that compute it.
"""

from __future__ import annotations

import logging
import os
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache as memoize
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import networkx as nx
import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from trackastra.data import data as _ctc

from ..cache import FeatureCache
from ..engine import Failure
from ..engine.commit import versions
from ..errors import (
    FeatureCacheError,
    MissingRecordError,
    MovieError,
    MovieNotFoundError,
    NoMasksError,
)
from ..hashing import (
    DIGEST_BYTES,
    JSON,
    Digest,
    digest_json,
    frame_digest,
    mask_digest,
)
from ..spec import TABLES, BackboneSpec, Normalization, SpaceSpec, differences
from ..store import NewRecord, Space, record_sources
from ..train_options import ARCHITECTURE, data_options
from .ctc_options import check_options
from .lazy_arrays import Stack, order_tracks
from .model_features import find_model
from .training_data_inputs import Inputs, find_detections, missing_detections
from .training_data_tables import Arrays, Detections, from_record, to_record

START_NAME = "trackastra-start"
"""What the space of these records has in the place of a backbone."""
REVISION = 1
"""Goes up when other tables are made of the same movie."""

PACKAGES = ("trackastra", "scikit-image", "scipy", "numpy")
WORTH_FRAMES = 64
"""So many frames that are to be built are worth processes of their own."""
_LOOK_SECONDS = 0.5
_FAILS = FeatureCacheError, ValueError, OSError
"""What upstream and we say of a movie that can't be loaded."""
_log = logging.getLogger(__name__)


def load_ctc(
    root: str | os.PathLike[str], cache: FeatureCache | str | os.PathLike[str], **options: Any
) -> Any:
    """Load Trackastra's training data of a movie: ``CTCData(root, **options)``, kept in a cache.

    Gives the same samples. The first time, upstream's code builds it, which takes about 0.25 s a
    frame, while others who want the same wait; from then on its tables are read from the cache.
    Whatever changes a number (a frame, where intensities enter; a mask, a track, an option, a
    version of what computes) makes it built anew. Frames, masks and association matrices are made
    when they are used, and frames and masks let go again: ``data.det_masks`` and the like are no
    arrays, but can be used as such.

    Parameters
    ----------
    root : path
        As for ``CTCData``: ``01``, ``01_GT/TRA``, or a folder with ``img`` and ``TRA`` in it.
    cache : FeatureCache or path
        One that can only be read is read; what it lacks is then built each time.
    **options
        Of ``CTCData``.

    Returns
    -------
    CTCData

    Raises
    ------
    MovieNotFoundError
        There is no such folder.
    MovieError, FrameError
        A frame or mask can't be read, or changed meanwhile. When a mask is read later, FrameError
        too.
    StoreError
        The disk is full.
    ValueError, FileNotFoundError, …
        As ``CTCData``.
    """
    if not isinstance(root, str | os.PathLike):
        raise TypeError(f"root is a {type(root).__name__}: expected one movie's folder")
    root = Path(root).expanduser()
    if not root.is_dir():
        if root.is_file():
            raise MovieNotFoundError(
                f"{root} is a file: Trackastra's data are folders of one TIFF a timepoint, with "
                "tracks; feature_cache.movies.write_movie writes such a folder"
            )
        raise MovieNotFoundError(f"no movie at {root}: no such folder")
    return _load_data(root, _open(cache), options, build=True)


def load_all(
    movies: Sequence[tuple[str | os.PathLike[str], Mapping[str, Any]]],
    cache: FeatureCache | str | os.PathLike[str],
) -> list[Any]:
    """Load several movies, each with its options, as `load_ctc`; build those that miss in parallel.

    Several processes build where there are several cores, and enough to do. Errors as `load_ctc`.
    """
    cache = _open(cache)
    missing = []
    loaded: list[Any] = [None] * len(movies)
    for i, (root, options) in enumerate(movies):
        try:
            loaded[i] = _load_data(root, cache, options, build=False)
        except MissingTrainingDataError as error:
            missing.append((i, error.frames))
    jobs = min(len(missing), joblib.cpu_count())
    enough = sum(frames for _, frames in missing) >= WORTH_FRAMES
    if jobs > 1 and enough and cache.store.mode == "a":
        tasks = (joblib.delayed(_build)(*movies[i], cache) for i, _ in missing)
        joblib.Parallel(jobs)(tasks)
    for i, _ in missing:
        root, options = movies[i]
        # what those processes built is read; what was not, or could not be kept, is built here
        loaded[i] = _load_data(root, cache, options, build=True)
    return loaded


def warm_training_data(
    training: Namespace, cache: FeatureCache | str | os.PathLike[str]
) -> tuple[int, tuple[Failure, ...]]:
    """Build the training data of a configuration that a cache lacks.

    Gives of how many movies, and those that failed; the others are built.

    The configuration is from `feature_cache.train_options.parse_training`.

    Raises
    ------
    BackboneError
        The model that is named is none, or not there.
    """
    cache, window = _open(cache), training.window
    if window is None and training.model is not None:
        window = yaml.safe_load((find_model(training.model) / "config.yaml").read_text())["window"]
    options = {**data_options(training), "window_size": window or ARCHITECTURE["window"][1]}
    roots = dict.fromkeys([*training.input_train, *training.input_val])
    space = cache.space(training_data_spec())
    space.refresh()
    before = len(space)
    failures = []
    try:
        load_all([(root, options) for root in roots], cache)
    except _FAILS:
        for root in roots:  # by itself: what is built already is read
            try:
                load_all([(root, options)], cache)
            except _FAILS as error:
                failures.append(Failure(f"training data of {root}", str(error), 0))
    space.refresh()
    return len(space) - before, tuple(failures)


def _build(root: str | os.PathLike[str], options: Mapping[str, Any], cache: FeatureCache) -> None:
    _load_data(root, cache, options, build=True)


def _open(cache: FeatureCache | str | os.PathLike[str]) -> FeatureCache:
    return cache if isinstance(cache, FeatureCache) else FeatureCache(cache)


class MissingTrainingDataError(MissingRecordError):
    """The tables of a movie are not in the cache, and not to be built now."""

    frames = 0


def training_data_spec() -> SpaceSpec:
    """Give the space of these records, for the versions that are installed."""
    return SpaceSpec(
        BackboneSpec(
            START_NAME, REVISION, "none", TABLES, width=1, stride=1, channels="none",
            normalization=Normalization("none"),
            extra={package: _version(package) for package in PACKAGES},
        ),
        pooling=None,
        dtype="float16",
    )  # fmt: skip


@memoize
def _version(package: str) -> str:
    return version(package)


def _load_data(
    root: str | os.PathLike[str], cache: FeatureCache, options: Mapping[str, Any], *, build: bool
) -> Any:
    data = _Loader(root, cache, options, build=build)
    for name in [name for name in vars(data) if name.startswith("_own_")]:
        delattr(data, name)
    data.__class__ = _ctc.CTCData
    return data


class _Loader(_ctc.CTCData):  # type: ignore[misc]
    """A `CTCData` that takes its tables from a cache; once loaded, it is no more than that."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        cache: FeatureCache,
        options: Mapping[str, Any],
        *,
        build: bool,
    ) -> None:
        check_options(options)
        self._own_cache, self._own_options, self._own_build = cache, dict(options), build
        self._own_detections: list[Detections] = []
        self._own_n_divs: list[int] | None = None
        self._own_tracks: pd.DataFrame | None = None
        super().__init__(root=os.fspath(root), **options)

    def _load(self) -> list[dict[str, Any]]:
        return self._recall(super()._load)

    def _load_wrfeat(self) -> list[dict[str, Any]]:
        return self._recall(super()._load_wrfeat)

    def _recall(self, build: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """Take the tables from the cache, or have them built there; give the windows."""
        if self.gt_mask_folder is None:
            raise missing_detections(self.root, self.detection_folders[:1])
        names = list(self.gt_mask_folder.glob("*.tif"))
        self.start_frame, self.end_frame = (int(len(names) * part) for part in self.slice_pct)
        if names and self.start_frame == self.end_frame:
            raise MovieError(
                f"{self.gt_mask_folder} has {len(names)} frames, and none of them is in slice_pct "
                f"{self.slice_pct}: take a larger part"
            )
        self._own_inputs = Inputs.of(self)
        counts = {place: len(one.digests) for place, one in self._own_inputs.hashed.items()}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{count} in {place}" for place, count in counts.items())
            raise MovieError(f"{self.root} has images {found}: expected as many of each")
        cache, spec = self._own_cache, training_data_spec()
        key = digest_json([spec.digest.hex(), self._own_inputs.to_json(self._own_options)])
        space, keys = cache.space(spec), np.frombuffer(key, np.uint8).reshape(1, DIGEST_BYTES)
        record = space.read(keys)[0]
        if record is None and not self._own_build:
            error = MissingTrainingDataError(f"the tables of {self.root} are not in {cache!r}")
            error.frames = len(self._own_inputs.hashed[self.gt_mask_folder].digests)
            raise error
        if record is not None:
            for name in self.detection_folders:
                if find_detections(self, name) is None:
                    self._guess_det_folder(self.root, name)  # says that it is left out
            return self._adopt(*from_record(record))
        if cache.store.mode == "r":
            return self._build(build, space, None)
        with _claimed(cache, f"{key.hex()}.start", lambda: bool(space.contains(keys)[0])) as mine:
            if mine:
                return self._build(build, space, key)
        # built by another meanwhile; where it can't be read, it is built here and not kept
        record = space.read(keys)[0]
        return (
            self._build(build, space, None) if record is None else self._adopt(*from_record(record))
        )

    def _build(
        self, build: Callable[[], list[dict[str, Any]]], space: Space, key: Digest | None
    ) -> list[dict[str, Any]]:
        """Build it by upstream's code; keep its tables where they give back the same."""
        _log.info("building the training data of %s: %s", self.root, self._explain(space))
        built = build()
        n_divs = super()._get_ndivs(built)
        facts, arrays = self._describe(n_divs)
        again = self._adopt(arrays, facts, keep=False)
        unlike = _first_difference(built, again)
        if unlike:
            _log.warning(
                "the training data of %s are not kept: %s; are its tracks a forest, and is this "
                "trackastra 0.5.5 or 0.5.6?", self.root, unlike,
            )  # fmt: skip
            return built
        if key is not None:
            entry = NewRecord(key, to_record(arrays, facts), self._provenance())
            space.write([entry], versions(), self._own_cache.codec)
        return self._adopt(arrays, facts)

    def _describe(self, n_divs: Sequence[int]) -> tuple[dict[str, JSON], Arrays]:
        """Give the tables of what was built."""
        arrays: Arrays = {
            "n_divs": np.asarray(n_divs, np.int64),
            "gt_labels": self.gt_labels,
            "gt_timepoints": self.gt_timepoints,
            "track_index": self.gt_track_df.index.to_numpy(np.int64),
            **{f"track {name}": column.to_numpy() for name, column in self.gt_track_df.items()},
            "nodes": np.asarray(list(self.gt_graph), np.int64),
            "edges": np.asarray(list(self.gt_graph.edges), np.int64).reshape(-1, 2),
        }
        for number, detections in enumerate(self._own_detections):
            arrays |= detections.to_arrays(number)
        facts: dict[str, JSON] = {
            "shape": list(self.gt_masks.shape[1:]),
            "detections": len(self._own_detections),
        }
        return facts, arrays

    def _adopt(
        self, arrays: Arrays, facts: Mapping[str, Any], *, keep: bool = True
    ) -> list[dict[str, Any]]:
        """Take up tables as upstream's code would have left them; give the windows."""
        inputs, shape = self._own_inputs, tuple(facts["shape"])
        truth = inputs.masks_of(inputs.truth, shape, self)
        images = inputs.images_of(truth, shape, self)
        masks: dict[str, Stack] = {}
        properties: dict[str, Any] = {}
        windows: list[dict[str, Any]] = []
        for number, (name, folder) in enumerate(inputs.detections):
            same = folder == inputs.truth
            masks[name] = truth if same else inputs.masks_of(folder, shape, self)
            detections = Detections.from_arrays(arrays, number)
            properties[name] = detections.properties(listed=self.features != "wrfeat")
            windows += detections.windows(self, images, masks[name])
        if keep:
            self.gt_masks, self.imgs, self.det_masks = truth, images, masks
            self.properties_by_time, self._own_n_divs = properties, arrays["n_divs"].tolist()
            self.gt_labels, self.gt_timepoints = arrays["gt_labels"], arrays["gt_timepoints"]
            columns = {n[6:]: a for n, a in arrays.items() if n.startswith("track ")}
            self.gt_track_df = pd.DataFrame(columns, arrays["track_index"])
            self.gt_graph = nx.DiGraph()
            self.gt_graph.add_nodes_from(arrays["nodes"].tolist())
            self.gt_graph.add_edges_from(arrays["edges"].tolist())
        return windows

    def _explain(self, space: Space) -> str:
        """Say how this differs from the nearest that is kept of the same movie."""
        asked = self._own_inputs.to_json(self._own_options)
        kept = [s["inputs"] for _, s in record_sources(space) if s.get("movie") == str(self.root)]
        unlike: list[list[str]] = [
            list(differences(one, asked)) for one in kept if isinstance(one, dict)
        ]
        unlike.sort(key=len)
        return "; ".join(unlike[0]) if unlike else "none of this movie are kept"

    def _provenance(self) -> dict[str, JSON]:
        own: dict[str, JSON] = {"inputs": self._own_inputs.to_json(self._own_options)}
        return {"movie": str(self.root), "origin": "training data", "draw": [], **own}

    # What upstream's code calls

    def _guess_mask_folder(self, root: Path, truth: Path) -> Path:
        folder: Path
        try:
            folder = super()._guess_mask_folder(root, truth)
        except ValueError as error:
            raise NoMasksError(
                f"{root} has no ground truth: looked for {root}_GT/TRA and {root}/TRA; put masks "
                "and man_track.txt there, or train on other detections alone (use_gt=False, "
                "detection_folders=[…])"
            ) from error
        return folder

    def _check_dimensions(self, x: NDArray[Any]) -> NDArray[Any]:
        if self.ndim == 2 and x.ndim == 4:
            raise MovieError(
                f"{self.root} has images of shape {x.shape[1:]}: expected (H, W), as ndim is 2; "
                "for a movie of volumes pass ndim=3"
            )
        checked: NDArray[Any] = super()._check_dimensions(x)
        return checked

    def _load_tracklet_links(self, folder: Path) -> pd.DataFrame:
        # once: what upstream reads must be what the key stands for
        if self._own_tracks is None:
            try:
                self._own_tracks = super()._load_tracklet_links(folder)
            except ValueError as error:
                raise MovieError(
                    f"{folder / 'man_track.txt'} can't be read: {error}; expected label, first and "
                    "last frame, and parent in each line"
                ) from error
        return self._own_tracks.copy()

    def _load_tiffs(self, folder: Path, dtype: Any = None) -> NDArray[Any]:
        images: NDArray[Any] = super()._load_tiffs(folder, dtype)
        digest = frame_digest if dtype == np.float32 else mask_digest
        known = self._own_inputs.hashed[folder].digests
        # the pixels that upstream reads must be those that the key stands for
        for t, (image, expected) in enumerate(zip(images, known, strict=True)):
            if digest(image) != expected:
                raise MovieError(
                    f"image {t} of {folder} changed while it was loaded, or tifffile reads it in "
                    "another way: load it again, or write it as a plain TIFF"
                )
        return images

    def _build_windows_wrfeat(
        self, features: Sequence[Any], det_masks: Any, matching: Any
    ) -> list[dict[str, Any]]:
        labels, times, coords = (
            np.concatenate([getattr(one, name) for one in features])
            for name in ("labels", "timepoints", "coords")
        )
        shallow = {
            name: np.concatenate([one[name] for one in features]) for name in features[0].features
        }
        self._take((labels, times, coords), shallow, len(det_masks), matching)
        built: list[dict[str, Any]] = super()._build_windows_wrfeat(features, det_masks, matching)
        return built

    def _build_windows(
        self, det_folder: Any, det_masks: Any, labels: Any, ts: Any, coords: Any, matching: Any
    ) -> list[dict[str, Any]]:
        self._take((labels, ts, coords), {}, len(det_masks), matching)
        built: list[dict[str, Any]] = super()._build_windows(
            det_folder, det_masks, labels, ts, coords, matching
        )
        return built

    def _take(self, tables: Any, features: Any, count: int, matching: Any) -> None:
        order = order_tracks(self.gt_graph)
        self._own_detections.append(Detections.of(tables, features, count, matching, order))

    def _get_ndivs(self, windows: Any) -> list[int]:
        return super()._get_ndivs(windows) if self._own_n_divs is None else self._own_n_divs

    def _compress_data(self) -> None:
        if self._own_n_divs is None:
            super()._compress_data()


@contextmanager
def _claimed(cache: FeatureCache, name: str, is_done: Callable[[], bool]) -> Iterator[bool]:
    """Claim what is to be built, or wait until another process has: tell whether it is ours."""
    claims = cache.store.claims
    told = False
    # a second thread of this process is not given it either, and waits like others
    while not claims.take([name])[0]:
        if not told:
            _log.info("waiting for training data that %s builds", claims.holder(name) or "another")
            told = True
        time.sleep(_LOOK_SECONDS)
        if is_done():
            yield False
            return
    try:
        # looked at once more: it may have been built between the first look and the claim
        yield not is_done()
    finally:
        claims.release([name])


def _first_difference(
    built: Sequence[Mapping[str, Any]], again: Sequence[Mapping[str, Any]]
) -> str:
    """Say where windows differ from others; empty where they don't."""
    if len(built) != len(again):
        return f"{len(built)} windows are {len(again)}"
    for number, (one, other) in enumerate(zip(built, again, strict=True)):
        pairs = {name: (one[name], other[name]) for name in one if name not in ("img", "mask")}
        if "wrfeat" in pairs:
            feats = pairs.pop("wrfeat")
            pairs |= {name: (feats[0][name], feats[1][name]) for name in feats[0].features}
        for name, (left, right) in pairs.items():
            if not np.array_equal(np.asarray(left), np.asarray(right)):
                return f"{name} of window {number} is not what was built"
    return ""
