"""Cached features in Trackastra's training data: `wrap`, and the datasets that it makes."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from torch.utils.data import ConcatDataset
from trackastra.data import data as _ctc

from ..augment import Augmentations, Draw
from ..backbones import load_backbone
from ..batch import Batch
from ..cache import FeatureCache, MovieFeatures
from ..dataset import (
    Copies,
    OnMiss,
    TokenFeatures,
    Unfinished,
    check_pooling,
    finish,
    warm_tokens,
)
from ..errors import UnknownNameError
from ..movies import Source
from ..movies.check import check_movie
from ..token_geometry import Placed, map_tokens
from ..token_geometry import rotate_features as rotate
from .ctc_source import folders_of, frames_of, load_data, masks_of, owners_of
from .seeds import Randomness
from .shallow import Props, check_props, columns_of, exchange_shallow

if TYPE_CHECKING:
    from ..backbones.base import Backbone

Geometry = Literal["map", "keep"]


@dataclass(frozen=True)
class _Extras:
    """What a `CachedCTCData` adds to the samples of its `CTCData`."""

    tokens: TokenFeatures
    movie_of: tuple[int, ...]
    frames_of: tuple[range, ...]
    shape: tuple[int, int]
    columns: tuple[str, ...] | None
    rotate_features: bool
    before: int
    """How many samples the members have that come before it."""

    def draw_of(self, copy: int) -> Draw | None:
        """Give the draw that maps the samples of a copy; None where they stay as they are."""
        if self.tokens.copies is None or self.columns is None:
            return None
        draw = self.tokens.copies.draws[copy]
        return None if draw.is_identity else draw


@dataclass(slots=True)
class _Window:
    """A window's sample without its features: of which movie and copy."""

    extras: _Extras
    movie: int
    copy: int
    sample: dict[str, Any]

    def begin(self) -> Unfinished:
        """Give it as what only lacks its features."""
        extras, sample, turn = self.extras, self.sample, None
        if extras.tokens.copies is not None:
            sample["copy"] = self.copy
        if extras.rotate_features:
            turn = partial(rotate, coords=sample["coords"], shape=extras.shape)
        return extras.tokens.begin(sample, self.movie, self.copy, turn)


def _finish(windows: Sequence[_Window]) -> Batch:
    """Map the geometry of windows as their copies' draws map frames, and look up their features."""
    groups: dict[tuple[Any, ...], list[tuple[_Window, Placed]]] = {}
    for window in windows:
        extras, sample = window.extras, window.sample
        if (draw := extras.draw_of(window.copy)) is not None:
            placed = Placed(sample["coords0"], sample["features"], draw, extras.shape)
            alike = extras.columns, placed.coords.shape[1]
            groups.setdefault(alike, []).append((window, placed))
    for (columns, _), group in groups.items():
        mapped = map_tokens([placed for _, placed in group], columns)
        for (window, placed), (coords, features) in zip(group, mapped, strict=True):
            sample = window.sample
            sample["coords"] = sample["coords"] + (coords - placed.coords)
            sample["coords0"], sample["features"] = coords, features
    return finish([window.begin() for window in windows])


class PlacedCTCData(_ctc.CTCData):  # type: ignore[misc]
    """A `CTCData` whose samples are a function of their place in an epoch's draws."""

    def __init__(self, ctc_data: Any) -> None:
        self.__dict__.update(ctc_data.__dict__)
        self.randomness = Randomness(self)

    def __getitem__(self, n: int, return_dense: bool | None = None) -> dict[str, Any]:
        """Give window `n` as `CTCData` does; cropped and augmented as its place says.

        ValueError where ``max_tokens`` leaves nothing of it.
        """
        try:
            with self.randomness.of(n):
                sample: dict[str, Any] = super().__getitem__(n, return_dense)
        except IndexError as error:
            self._check_tokens(n, error)
            raise
        return sample

    def _check_tokens(self, n: int, error: IndexError) -> None:
        """Raise where that came of clipping a window whose first frame alone is too much."""
        times = self.windows[n]["timepoints"]
        first = int((times == times[:1]).sum())
        if self.max_tokens and first >= self.max_tokens:
            raise ValueError(
                f"{self.root}: max_tokens is {self.max_tokens}, and a frame of window {n} has "
                f"{first} cells: expected more tokens than a frame has cells; raise max_tokens"
            ) from error

    def fix_samples(self, seed: int) -> None:
        """Make each sample a function of its index: its crop, and what upstream augments."""
        self.randomness.seed = seed


class CachedCTCData(PlacedCTCData):
    """A `CTCData` whose samples carry ``pretrained_feats`` (N, C) float32. Made by `wrap`.

    It stands wherever the dataset that it was made from does: in samplers, `ConcatDataset`,
    pickles, and DataLoader workers.
    """

    def __init__(self, ctc_data: Any, extras: _Extras, props: Props | None) -> None:
        super().__init__(ctc_data)
        self.feature_cache_extras, self.additional_props = extras, props

    def __getitem__(self, n: int, return_dense: bool | None = None) -> dict[str, Any]:
        """Give window `n` as `CTCData` does, with the features of its tokens, row for row.

        Where there are augmented copies, the sample names its own as ``copy``.

        Raises
        ------
        MissingRecordError
            A record is missing and may not be computed here.
        ValueError
            ``max_tokens`` leaves nothing of the window.
        """
        return _finish([self.window(n, return_dense)])[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give the windows of a batch, their features read together; a DataLoader calls it.

        They are equal to those given one by one, and `collate` need not copy their features.
        Errors as one by one, and ValueError for features of different width.
        """
        return _finish([self.window(n) for n in indices])

    def window(self, n: int, return_dense: bool | None = None) -> _Window:
        """Give window `n` of its copy, with neither features nor the copy's geometry yet."""
        sample = super().__getitem__(n, return_dense)
        if self.additional_props is None:
            sample["features"] = sample["features"][:, :0]
        extras = self.feature_cache_extras
        copy = extras.tokens.choose(n, extras.before)
        return _Window(extras, extras.movie_of[n], copy, sample)

    def set_epoch(self, epoch: int) -> None:
        """Choose other copies, as `feature_cache.dataset.Copies.set_epoch`."""
        self.feature_cache_extras.tokens.set_epoch(epoch)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Have the records of coming windows computed in the background; waits for none.

        As `feature_cache.CachedFeatureDataset.prefetch`.
        """
        extras = self.feature_cache_extras
        for n in indices:
            extras.tokens.prefetch(n, extras.movie_of[n], extras.frames_of[n], extras.before)

    def warm(self) -> int:
        """Compute all that is missing, in every copy; give the number of records computed."""
        return warm_tokens(self.all_tokens)

    @property
    def all_tokens(self) -> list[TokenFeatures]:
        """What looks up its features."""
        return [self.feature_cache_extras.tokens]


class CachedConcatDataset(ConcatDataset[dict[str, Any]]):
    """Several `CachedCTCData`, one after the other. Made by `wrap`."""

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give the windows of a batch, of several members, as `CachedCTCData` does."""
        return _finish([data.window(n) for data, n in map(self._locate, indices)])

    def _locate(self, index: int) -> tuple[CachedCTCData, int]:
        """Give the member of a sample, and the sample's index there."""
        index = index + len(self) if index < 0 else index
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self.cumulative_sizes, index)
        before = self.cumulative_sizes[number - 1] if number else 0
        return cast(CachedCTCData, self.datasets[number]), index - before

    def set_epoch(self, epoch: int) -> None:
        """Choose other copies in all of them."""
        for dataset in self.datasets:
            dataset.set_epoch(epoch)  # type: ignore[attr-defined]

    def prefetch(self, indices: Iterable[int]) -> None:
        """Have the records of coming windows computed in the background; waits for none."""
        for data, n in map(self._locate, indices):
            data.prefetch([n])

    def warm(self) -> int:
        """Compute all that is missing in all of them; give the number of records computed."""
        return warm_tokens(self.all_tokens)

    @property
    def all_tokens(self) -> list[TokenFeatures]:
        """What looks up the features of each."""
        return [tokens for one in self.datasets for tokens in cast(CachedCTCData, one).all_tokens]


def wrap(
    ctc_data: Any,
    cache: FeatureCache | str | os.PathLike[str],
    backbone: Backbone | str,
    *,
    pooling: str = "mean_patches_exact",
    augmentations: Augmentations | None = None,
    geometry: Geometry = "map",
    additional_props: Props | None = "regionprops2",
    rotate_features: bool = False,
    dtype: str = "float16",
    on_miss: OnMiss = "compute",
    batch_size: int = 8,
    progress: bool = True,
    dataset_options: Mapping[str, Any] | None = None,
) -> Any:
    """Let a Trackastra dataset yield cached features.

    Reads frames and masks once, to hash them; what is missing is computed when a sample needs it,
    in this process, also for DataLoader workers (or all at once by ``.warm()``).

    Parameters
    ----------
    ctc_data : CTCData, or a ConcatDataset of these; or a movie, or its path
        Not changed. Features of its masks as it holds them, for its frames as they are on disk.
        Of a movie in the folders of the Cell Tracking Challenge, the `CTCData` is loaded here, by
        `load_ctc`.
    cache : FeatureCache or path
    backbone : Backbone or str
        A name is loaded by `load_backbone`.
    pooling : str
        One of `feature_cache.pooling.POOLINGS`.
    augmentations : Augmentations, optional
        Each sample has the features of one augmented copy (0 to ``copies``), chosen as
        `feature_cache.dataset.Copies` says; call ``.set_epoch`` at the start of each epoch. Leave
        it out for validation: copy 0.
    geometry : str
        ``"map"``: a sample's coordinates, areas, diameters and inertia tensors are mapped as its
        copy's draw maps the frame, on top of what `CTCData` itself augmented. ``"keep"``: they
        stay. Intensities and ``border_dist`` always stay as measured on the frame as loaded, and so
        do dense images and masks.
    additional_props : str or None
        The shallow features in ``features``: a key of `SHALLOW_FEATURES`, or None for (N, 0).
    rotate_features : bool
        Turn pairs of dimensions by angles from ``coords``, as
        `feature_cache.token_geometry.rotate_features`. Done when a sample is read, not stored.
    dtype : str
        Storage dtype.
    on_miss, batch_size, progress
        As `feature_cache.dataset.TokenFeatures`.
    dataset_options : mapping, optional
        What `CTCData` is given beside the movie, such as ``{"window_size": 4}``; for a movie only.

    Returns
    -------
    CachedCTCData, or a ConcatDataset of these

    Raises
    ------
    TypeError
        `ctc_data` is something else.
    MovieError, FrameError
        No detections; frames that can't be read or don't belong to the masks.
    UnknownNameError
        No such pooling, dtype, geometry, `on_miss` or set of shallow features.
    ValueError
        The dataset's own shallow features can't be exchanged or mapped.
    """
    check_words(geometry, on_miss)
    check_props(additional_props)
    check_pooling(pooling)
    cache = cache if isinstance(cache, FeatureCache) else FeatureCache(cache)
    backbone = load_backbone(backbone) if isinstance(backbone, str) else backbone
    ctc_data = load_data(ctc_data, dataset_options or {}, cache)
    concat = isinstance(ctc_data, ConcatDataset)
    members: list[Any] = ctc_data.datasets if concat else [ctc_data]
    for data in members:
        mapped = augmentations is not None and geometry == "map"
        _check_dataset(data, additional_props, mapped=mapped)
    before = list(accumulate(map(len, members), initial=0))
    copies = Copies(augmentations, before[-1]) if augmentations is not None else None

    def wrap_one(data: Any, before: int) -> CachedCTCData:
        folders = folders_of(data)
        unique = list(dict.fromkeys(folders))
        movies = [
            _bind(data, name, cache, backbone, pooling=pooling, dtype=dtype) for name in unique
        ]
        columns = columns_of(additional_props, data.ndim) if geometry == "map" else None
        extras = _Extras(
            TokenFeatures(movies, copies, on_miss, batch_size, progress),
            owners_of(data, folders),
            tuple(range(w["t1"], w["t1"] + data.window_size) for w in data.windows),
            (movies[0].frames.shape[-2], movies[0].frames.shape[-1]),
            columns,
            rotate_features,
            before,
        )
        cached = CachedCTCData(data, extras, additional_props)
        cached.feat_dim = len(columns_of(additional_props, data.ndim))
        if additional_props in ("regionprops_small", "regionprops"):
            cached.windows = exchange_shallow(data, folders, additional_props)
        return cached

    wrapped = list(map(wrap_one, members, before))
    return CachedConcatDataset(wrapped) if concat else wrapped[0]


def check_words(geometry: str, on_miss: str) -> None:
    """Raise UnknownNameError for a word that `wrap` doesn't know."""
    for option, word, kind in (("geometry", geometry, Geometry), ("on_miss", on_miss, OnMiss)):
        if word not in get_args(kind):
            raise UnknownNameError(option, word, get_args(kind))


def _check_dataset(data: Any, props: str | None, *, mapped: bool) -> None:
    if not isinstance(data, _ctc.CTCData) or isinstance(data, CachedCTCData):
        raise TypeError(
            f"wrap takes a CTCData or a flat ConcatDataset of these, not a {type(data).__name__}; "
            "for other datasets there is feature_cache.CachedFeatureDataset"
        )
    if data.features != "wrfeat" and (mapped or props != "regionprops2"):
        raise ValueError(
            f"the shallow features of a CTCData with features={data.features!r} can't be exchanged "
            "or mapped: load it with features='wrfeat', or leave additional_props as it is and "
            "use geometry='keep'"
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
    frames = frames_of(data)
    masks = masks_of(data, folder, planar=len(frames.shape) == 2)
    movie = cache.movie(
        frames, masks, backbone, pooling=pooling, dtype=dtype, name=f"{data.root} {folder}"
    )
    part = data.slice_pct, data.downscale_temporal, data.downscale_spatial
    movie.source = Source(str(data.root), folder, *part)
    if not movie.contains().all() and movie.images_read:
        check_movie(movie.name, movie.frames, masks, quick=True).log_problems()
    return movie
