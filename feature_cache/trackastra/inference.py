"""Tracking on cached features: Trackastra's inference embeds only what is new."""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakSet

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm
from trackastra.data import wrfeat as _wrfeat
from trackastra.model import model_api as _api

from ..backbones import load_backbone
from ..backbones.from_spec import is_named, load_alike
from ..cache import FeatureCache, MovieFeatures, check_batch_size
from ..dataset import TokenFeatures
from ..errors import BackboneError, MovieError, importing
from ..hashing import Digest, digest_json
from ..movies import Movie, Series
from ..store import Usage
from ..token_geometry import rotate_features as rotate
from ..train_options import MODEL_INSTALL, MODEL_PACKAGE
from .model_features import ModelFeatures, check_equal
from .shallow import check_props, measure_regions

if TYPE_CHECKING:
    from ..backbones.base import Backbone


class CachedFeatureExtractor:
    """A movie's cached features, where Trackastra's inference wants a ``FeatureExtractor``.

    In the place of that of trackastra-pretrained-feats, for ``trackastra.data.get_features``.
    `cached_inference` makes one for each movie that is tracked.

    Parameters
    ----------
    movie : MovieFeatures
        Of the frames as loaded, not normalised, and of the masks to be tracked.
    additional_features : str, optional
        The shallow features beside them: a key of `SHALLOW_FEATURES`.
    rotate_features : bool
        Turn pairs of dimensions by angles from the regions' centroids, as
        `feature_cache.token_geometry.rotate_features`: what `wrap` does in training.
    batch_size : int
        Frames embedded at once.
    keep_grids : bool
        As `MovieFeatures.warm`.
    progress : bool
        Whether a bar on stderr counts the frames to embed, where that is a terminal.

    Raises
    ------
    UnknownNameError
        No such set of shallow features.
    ValueError
        A `batch_size` below 1.
    """

    def __init__(
        self,
        movie: MovieFeatures,
        *,
        additional_features: str | None = None,
        rotate_features: bool = False,
        batch_size: int = 8,
        keep_grids: bool = False,
        progress: bool = True,
    ) -> None:
        check_props(additional_features, "pretrained_feats_additional_props")
        check_batch_size(batch_size)
        self.movie, self.additional_features = movie, additional_features
        self.rotate_features, self.batch_size = rotate_features, batch_size
        self.keep_grids, self.progress = keep_grids, progress
        self._tokens = TokenFeatures([movie], on_miss="error", progress=False)

    def precompute_image_embeddings(self, images: Sequence[Any]) -> None:
        """Compute and commit the records that are missing.

        Parameters
        ----------
        images : (T, ...) array
            As Trackastra normalised them: only their number counts.

        Raises
        ------
        MovieError
            Another number of images than the movie has frames.
        As `FeatureCache.get_or_compute`.
        """
        if len(images) != len(self.movie):
            raise MovieError(
                f"{len(images)} images, and {self.movie.name or 'the movie'} of this extractor has "
                f"{len(self.movie)} frames: expected the same"
            )
        absent = np.flatnonzero(~self.movie.contains()).tolist()
        if not absent:
            return
        self.movie.cache.counter.add(Usage(misses=len(absent)))
        shown = None if self.progress else True
        with tqdm(
            total=len(absent), desc="Computing embeddings", leave=False, disable=shown
        ) as bar:
            self.movie.compute(
                absent,
                batch_size=self.batch_size,
                keep_grids=self.keep_grids,
                progress=bar.update,
            )

    def extract_embedding(
        self,
        masks: NDArray[Any],
        timepoints: NDArray[np.integer[Any]],
        labels: NDArray[np.integer[Any]],
        coords: NDArray[np.floating[Any]],
    ) -> tuple[NDArray[np.intp], Tensor]:
        """Give the features of some regions, row for row.

        Parameters
        ----------
        masks : (..., H, W)
            The movie's, of these timepoints: only their height and width count.
        timepoints : (N,) int
            Frames of the movie.
        labels : (N,) int
        coords : (N, 2) or (N, 3) float32
            Centroids, the last two columns (y, x) in pixels.

        Returns
        -------
        counts : (T,) int
            How many regions each timepoint has.
        features : (N, C) float32

        Raises
        ------
        MissingRecordError
            A record is not there: call `precompute_image_embeddings` first.
        FrameError
            A label is not in the movie's mask of its frame.
        """
        features = self._tokens(0, torch.as_tensor(timepoints), torch.as_tensor(labels))
        if self.rotate_features:
            height, width = masks.shape[-2:]
            features = rotate(features, torch.as_tensor(coords), (height, width))
        return np.unique(timepoints, return_counts=True)[1], features

    def describe(self, detections: Any, imgs: Any, ndim: int) -> list[Any]:
        """Describe the regions of each frame, as ``trackastra.data.get_features`` does.

        Unlike it also in 3D, and without additional features.

        Parameters
        ----------
        detections, imgs : (T, H, W) or (T, Z, H, W), NumPy or Dask
            The movie's masks, and its frames as Trackastra normalised them.
        ndim : int
            Of the model's coordinates; 2D frames count as one slice where it is 3.

        Returns
        -------
        list of trackastra.data.WRFeatures
        """
        self.precompute_image_embeddings(imgs)
        masks, images = (_wrfeat._check_dimensions(array, ndim) for array in (detections, imgs))
        return [
            self._describe_frame(np.asarray(mask), np.asarray(image), t)
            for t, (mask, image) in enumerate(zip(masks, images, strict=True))
        ]

    def _describe_frame(self, mask: NDArray[Any], image: NDArray[Any], t: int) -> Any:
        regions = measure_regions(mask, image, t, self.additional_features)
        _, features = self.extract_embedding(
            mask[None], regions.timepoints, regions.labels, regions.coords
        )
        regions.features["pretrained_feats"] = features.numpy()
        # Without a single shallow feature, Trackastra would make a tensor of None.
        regions.features["none"] = np.empty((len(regions), 0), np.float32)
        return regions


@contextmanager
def cached_inference(
    cache: FeatureCache | str | os.PathLike[str],
    *,
    backbone: Backbone | str | None = None,
    weights: str | Path | None = None,
    dtype: str | None = None,
    keep_grids: bool = False,
    batch_size: int = 8,
    progress: bool = True,
) -> Iterator[FeatureCache]:
    """Let every ``Trackastra`` model of pretrained features track on cached ones.

    Inside, ``track`` and ``track_from_disk`` compute only what is not in the cache: nothing for a
    movie that was tracked, warmed or trained on with the same masks; one frame where one has
    changed. Where masks have changed, their frames are embedded again, unless their grids are in
    the cache (by `keep_grids`, or ``feature-cache warm --dense``): then they are only pooled.
    Models without pretrained features track as ever.

    Frames are hashed as they are handed to Trackastra, before it normalises the movie: hand them
    over as loaded. ``track_from_disk`` reads what `Movie.open` does, and refuses frames and masks
    whose names are not of the same times.

    A model's folder names the features of its training in full. Tracking has the same, or is
    refused: backbone, weights, layer, options, normalisation, pooling, storage dtype, shallow
    features, rotation. Folders of older trainings, and of trackastra-pretrained-feats, name a model
    and a pooling: they are taken at their word, with a warning that says what is not known.

    Parameters
    ----------
    cache : FeatureCache or path
    backbone : Backbone or str, optional
        By default that of the model's training, loaded by `load_backbone` on the model's device
        when it is first needed, once in this context.
    weights : str or Path, optional
        Of a backbone that is loaded by name, as `load_backbone`; by default those that training
        loaded.
    dtype : str, optional
        Storage dtype; by default that of training, or float16 where that is not known.
    keep_grids : bool
        Keep the float32 grids of the frames that are embedded, so that other masks of them need no
        embedding.
    batch_size : int
        Frames embedded at once.
    progress : bool
        Whether a bar on stderr counts the frames to embed, where that is a terminal.

    Yields
    ------
    FeatureCache

    Raises
    ------
    MissingDependencyError, BrokenDependencyError
        The package trackastra-pretrained-feats is not installed, or can't be imported.
    ValueError
        `weights` for a backbone that is loaded, or a `batch_size` below 1.
    In ``track``: as `FeatureCache.get_or_compute`, `load_backbone` and `CachedFeatureExtractor`;
    BackboneError also where the model was trained on other features; says what differs.

    Warns
    -----
    UserWarning
        In ``track``, once for each model: its folder does not name its features in full.

    Notes
    -----
    It counts for the thread (or asyncio task) that entered it; contexts may be nested, and the
    innermost counts. A thread that is started inside has to enter a context of its own, or run in
    a copy of this one's (`contextvars.copy_context`). Trackastra's functions are replaced as long
    as any thread is inside.

    Beyond upstream, tracking honours ``rotate_features`` of the training, works without additional
    features and in 3D, and with windows of a single region.

    Examples
    --------
    >>> from trackastra.model import Trackastra  # doctest: +SKIP
    >>> model = Trackastra.from_folder(folder, device="cpu")  # doctest: +SKIP
    >>> with cached_inference("features"):  # doctest: +SKIP
    ...     graph, tracked = model.track(frames, masks, mode="greedy")
    """
    with importing(MODEL_PACKAGE, "tracking with pretrained features", MODEL_INSTALL):
        import trackastra_pretrained_feats  # noqa: F401  Trackastra hides why it isn't there
    if weights is not None and backbone is not None and not isinstance(backbone, str):
        raise ValueError("weights are for a backbone that is loaded by name; this one has its own")
    check_batch_size(batch_size)
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
    inference = _Inference(cache, backbone, weights, dtype, keep_grids, batch_size, progress)
    with _replaced:
        token = _active.set(inference)
        try:
            yield cache
        finally:
            _active.reset(token)


@dataclass
class _Inference:
    """What was asked of one `cached_inference`, and the backbones it has loaded."""

    cache: FeatureCache
    backbone: Backbone | str | None
    weights: str | Path | None
    dtype: str | None
    keep_grids: bool
    batch_size: int
    progress: bool
    _loaded: dict[Digest, Backbone] = field(default_factory=dict)
    _warned: WeakSet[Any] = field(default_factory=WeakSet)

    def extractor_for(self, model: Any, imgs: Any, masks: Any) -> CachedFeatureExtractor:
        """Make the extractor of a movie for a `Trackastra` model."""
        args = model.train_args
        trained = ModelFeatures.of_model(args)
        dtype = self.dtype or ("float16" if trained is None else trained.space["dtype"])
        backbone = self._backbone_for(args, trained, model.device)
        movie = self.cache.movie(
            imgs, masks, backbone, pooling=args["pretrained_feats_mode"], dtype=dtype
        )
        props = args.get("pretrained_feats_additional_props", trained and trained.additional_props)
        rotated = bool(args.get("rotate_features", trained and trained.rotate_features))
        if trained is None:
            self._warn(model, backbone)
        else:
            now = ModelFeatures.of(movie.spec, backbone, props, rotated)
            check_equal(
                trained, now, "the model was trained on other features", "pass the backbone and "
                "weights of its training to cached_inference, or train it again",
            )  # fmt: skip
        _check_width(model.transformer, backbone)
        return CachedFeatureExtractor(
            movie,
            additional_features=props,
            rotate_features=rotated,
            batch_size=self.batch_size,
            keep_grids=self.keep_grids,
            progress=self.progress,
        )

    def _backbone_for(
        self, args: Mapping[str, Any], trained: ModelFeatures | None, device: str
    ) -> Backbone:
        if self.backbone is not None and not isinstance(self.backbone, str):
            return self.backbone
        spec = None if trained is None else trained.backbone
        name = self.backbone or (args["pretrained_feats_model"] if spec is None else spec.name)
        alike = spec if spec is not None and is_named(spec, name) else None
        wanted = digest_json([name, device, alike and alike.to_json()])
        if wanted not in self._loaded:
            if alike is None or trained is None:
                self._loaded[wanted] = load_backbone(name, self.weights, device)
            else:
                weights = self.weights or trained.weights
                self._loaded[wanted] = load_alike(alike, weights, device)
        return self._loaded[wanted]

    def _warn(self, model: Any, backbone: Backbone) -> None:
        """Say what can't be compared."""
        if model not in self._warned:
            self._warned.add(model)
            warnings.warn(
                "the model's folder does not name its features in full, as training with "
                f"feature_cache writes them now: whether {backbone.spec.name} has the weights, "
                "layer, options, normalisation and storage dtype of its training is not known; "
                "only the width is compared",
                stacklevel=2,
            )


def _check_width(transformer: Any, backbone: Backbone) -> None:
    width, expected = backbone.spec.width, transformer.config.get("pretrained_feat_dim", 0)
    if width != expected:
        raise BackboneError(
            f"{backbone.spec.name} gives {width} features a region, and this model was trained on "
            f"{expected}: pass the backbone of its training to cached_inference"
        )


_active: ContextVar[_Inference | None] = ContextVar("cached_inference", default=None)


class _Pending:
    """What ``Trackastra.track`` has for an extractor until its ``_predict`` gets the frames."""


def _choose_extractor(theirs: Any) -> Any:
    """Stand in for the class ``FeatureExtractor``, of which Trackastra uses one method."""

    class Extractors:
        @staticmethod
        def from_model_name(*args: Any, **kwargs: Any) -> Any:
            if _active.get() is None:
                return theirs.from_model_name(*args, **kwargs)
            return _Pending()

    return Extractors


def _bind_movie(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Have ``Trackastra._predict`` take features of its frames as they are handed to it."""

    @functools.wraps(theirs)
    def predict(model: Any, imgs: Any, masks: Any, *args: Any, **kwargs: Any) -> Any:
        inference = _active.get()
        if inference is None or not isinstance(model.feature_extractor, _Pending):
            return theirs(model, imgs, masks, *args, **kwargs)
        try:
            model.feature_extractor = inference.extractor_for(model, imgs, masks)
            with whole_batches(model.transformer):
                return theirs(model, imgs, masks, *args, **kwargs)
        finally:
            model.feature_extractor = None

    return predict


def _read_movie(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Have ``Trackastra.track_from_disk`` read what `Movie.open` reads, paired by time."""

    @functools.wraps(theirs)
    def track_from_disk(
        model: Any, imgs_path: Path, masks_path: Path, *args: Any, **kwargs: Any
    ) -> Any:
        if _active.get() is None:
            return theirs(model, imgs_path, masks_path, *args, **kwargs)
        movie = Movie.open(imgs_path, masks_path)
        model.imgs_path, model.masks_path = imgs_path, masks_path
        stored = (movie.frames.source, cast(Series, movie.masks).source)
        frames, masks = (np.stack([images[t] for t in range(len(movie))]) for images in stored)
        return model.track(frames, masks, *args, **kwargs)

    return track_from_disk


def _describe_regions(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """Have ``get_features``, as ``Trackastra._predict`` calls it, describe regions as we do."""

    @functools.wraps(theirs)
    def get_features(**kwargs: Any) -> Any:
        extractor = kwargs["feature_extractor"]
        if not isinstance(extractor, CachedFeatureExtractor):
            return theirs(**kwargs)
        return extractor.describe(kwargs["detections"], kwargs["imgs"], kwargs["ndim"])

    return get_features


@contextmanager
def whole_batches(transformer: nn.Module) -> Iterator[None]:
    """Let a model take batches of one window, and windows of one region.

    It squeezes its projected features, to remove an axis in front, and any other of length 1 goes
    with it.
    """
    hook = transformer.get_submodule("ptfeat_norm").register_forward_hook(
        lambda module, inputs, output: output.as_subclass(_Batch)
    )
    try:
        yield
    finally:
        hook.remove()


class _Batch(Tensor):
    """(B, N, C), or (1, B, N, C), whose `squeeze` is (B, N, C)."""

    def squeeze(self) -> Tensor:  # type: ignore[override]
        return self.as_subclass(Tensor).reshape(self.shape[-3:])


class _Replaced:
    """Our functions in the place of Trackastra's, from the first thread's entry to the last's exit.

    They ask `_active` what to do, so other threads don't notice.
    """

    def __init__(self) -> None:
        self._lock, self._users, self._undo = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._replace(_api, "FeatureExtractor", _choose_extractor)
                self._replace(_api, "get_features", _describe_regions)
                self._replace(_api.Trackastra, "_predict", _bind_movie)
                self._replace(_api.Trackastra, "track_from_disk", _read_movie)
            self._users += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo.close()

    def _replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        theirs = getattr(owner, name)
        setattr(owner, name, make(theirs))
        self._undo.callback(setattr, owner, name, theirs)


_replaced = _Replaced()
