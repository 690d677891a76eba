"""Cached features for training: any dataset whose samples name timepoints and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .augment import Augmentations, Draw
from .cache import MovieFeatures, check_batch_size
from .errors import DrawError, FrameError, MissingRecordError, UnknownNameError
from .hashing import digest_json
from .key import Record

OnMiss = Literal["compute", "error"]
Sample = dict[str, Any]


def choose_copy(seed: int, epoch: int, index: int, copies: int) -> int:
    """Give the copy, 0 to `copies`, that a sample uses: a function of its arguments alone."""
    digest = digest_json(["copy", seed, epoch, int(index)])
    return int.from_bytes(digest[:8], "big") % (copies + 1)


def _no_epoch() -> Tensor:
    epoch = torch.full((), -1, dtype=torch.int64)
    epoch.share_memory_()  # type: ignore[no-untyped-call]
    return epoch


@dataclass(frozen=True)
class Copies:
    """Which augmented copy each sample uses.

    After `set_epoch`, a function of (seed, epoch, index), so the same for any number of workers and
    ranks; before, drawn from torch's generator, which a DataLoader seeds in each worker.

    Parameters
    ----------
    augmentations : Augmentations
    """

    augmentations: Augmentations
    _epoch: Tensor = field(default_factory=_no_epoch)

    def __post_init__(self) -> None:
        if not isinstance(self.augmentations, Augmentations):
            raise DrawError(
                f"augmentations is {self.augmentations!r}: expected an Augmentations, such as "
                'Augmentations("default", copies=3, seed=0)'
            )

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; DataLoader workers that are already running see it too."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch}: expected 0 or more")
        self._epoch.fill_(epoch)

    def choose(self, index: int) -> int:
        """Give the copy that sample `index` uses."""
        copies, epoch = self.augmentations.copies, int(self._epoch)
        if epoch < 0:
            return int(torch.randint(copies + 1, ()))
        return choose_copy(self.augmentations.seed, epoch, index, copies)

    @cached_property
    def draws(self) -> tuple[Draw, ...]:
        """The draw of each copy."""
        return self.augmentations.draws()

    def of_movie(self, movie: MovieFeatures) -> list[MovieFeatures]:
        """Give each copy of a movie."""
        name_of = self.augmentations.name_of
        return [movie.with_draw(draw, name_of(k)) for k, draw in enumerate(self.draws)]


@dataclass(frozen=True)
class TokenFeatures:
    """Looks up the feature vectors of tokens, each a (timepoint, label) of a movie.

    Parameters
    ----------
    movies : sequence of MovieFeatures
    copies : Copies, optional
        The augmented copies there are of each movie; without, there is only the movie itself.
    on_miss : str
        ``"compute"`` computes what is missing, in this process; ``"error"`` raises.
    batch_size : int
        Frames embedded at once.
    """

    movies: Sequence[MovieFeatures]
    copies: Copies | None = None
    on_miss: OnMiss = "compute"
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.on_miss not in get_args(OnMiss):
            raise UnknownNameError("on_miss", self.on_miss, get_args(OnMiss))
        check_batch_size(self.batch_size)

    def __call__(self, movie: int, timepoints: Tensor, labels: Tensor, copy: int = 0) -> Tensor:
        """Give the features of some tokens of one movie.

        Parameters
        ----------
        movie : int
            Number of the movie.
        timepoints : (N,) int64
            Frames of the movie as it was given to the cache.
        labels : (N,) int64
            Labels in the masks of these frames.
        copy : int
            Number of the augmented copy; 0 is the movie itself.

        Returns
        -------
        (N, C) float32

        Raises
        ------
        MissingRecordError
            A record is missing and may not be computed here.
        FrameError
            A label is not in the mask of its frame.
        """
        features = self.variants[movie][copy]
        times = timepoints.numpy()
        wanted = labels.numpy()
        result = torch.empty(len(times), features.spec.backbone.width)
        used = np.unique(times).tolist()
        for t, record in zip(used, self._records(features, used), strict=True):
            tokens = np.flatnonzero(times == t)
            rows = _find_rows(record, wanted[tokens], features, t)
            result[tokens] = torch.from_numpy(record.features[rows]).float()
        return result

    @cached_property
    def variants(self) -> list[list[MovieFeatures]]:
        """Each movie in each of its copies."""
        if self.copies is None:
            return [[movie] for movie in self.movies]
        return [self.copies.of_movie(movie) for movie in self.movies]

    def warm(self) -> int:
        """Compute all that is missing, in every copy; give the number of records computed."""
        copies = [copy for variants in self.variants for copy in variants]
        return sum(copy.warm(batch_size=self.batch_size) for copy in copies)

    def _records(self, movie: MovieFeatures, times: list[int]) -> list[Record]:
        records = movie.get(times)
        absent = [t for t, record in zip(times, records, strict=True) if record is None]
        if absent:
            self._check_may_compute(movie, absent)
            movie.compute(absent, batch_size=self.batch_size)
            records = movie.space.read(movie.keys(times))
        return [movie.expect(t, record) for t, record in zip(times, records, strict=True)]

    def _check_may_compute(self, movie: MovieFeatures, absent: list[int]) -> None:
        if self.on_miss == "compute" and get_worker_info() is None:
            return
        reason = "on_miss is 'error'" if self.on_miss == "error" else "this is a DataLoader worker"
        raise MissingRecordError(
            f"{len(absent)} records, first {movie.where(absent[0])}, are not in {movie.cache!r} "
            f"and are not computed here ({reason}): warm the cache first (feature-cache warm, or "
            "warm() of the dataset), or use num_workers=0"
        )


def _find_rows(
    record: Record, labels: NDArray[np.int64], movie: MovieFeatures, t: int
) -> NDArray[np.intp]:
    """Find the row of each label: (n,) int, in a record whose labels ascend."""
    if record.labels is None:
        raise FrameError("whole grids have no rows for labels: choose a pooling")
    rows = np.searchsorted(record.labels, labels)
    known = rows < len(record.labels)
    known[known] = record.labels[rows[known]] == labels[known]
    if not known.all():
        raise FrameError(
            f"label {labels[~known][0]} is not in the mask of {movie.where(t)}, which has "
            f"{len(record.labels)} labels: do dataset and cache use the same masks?"
        )
    return rows


class CachedFeatureDataset(Dataset[Sample]):
    """A dataset whose samples get the cached features of their tokens.

    Parameters
    ----------
    dataset : map-style dataset
        Its samples are dicts with ``timepoints`` (N,) and ``labels`` (N,), integer tensors.
    movies : sequence of MovieFeatures
        See `FeatureCache.movie`.
    movie_of : callable, optional
        From a sample's index to the number of its movie; needed where there are several.
    augmentations : Augmentations, optional
        Each sample then has the features of one augmented copy, and names it as ``copy``.
    on_miss, batch_size
        As `TokenFeatures`.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        movies: Sequence[MovieFeatures],
        movie_of: Callable[[int], int] | None = None,
        *,
        augmentations: Augmentations | None = None,
        on_miss: OnMiss = "compute",
        batch_size: int = 8,
    ) -> None:
        if movie_of is None and len(movies) != 1:
            raise ValueError(f"{len(movies)} movies: pass movie_of, from a sample to its movie")
        self.dataset, self.movie_of = dataset, movie_of
        self.copies = Copies(augmentations) if augmentations is not None else None
        self.tokens = TokenFeatures(movies, self.copies, on_miss, batch_size)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        """Give a sample with ``pretrained_feats`` (N, C) float32; errors as `TokenFeatures`."""
        sample = dict(self.dataset[index])
        movie = 0 if self.movie_of is None else self.movie_of(index)
        copy = 0
        if self.copies is not None:
            copy = sample["copy"] = self.copies.choose(index)
        sample["pretrained_feats"] = self.tokens(
            movie, sample["timepoints"], sample["labels"], copy
        )
        return sample

    def set_epoch(self, epoch: int) -> None:
        """Choose other copies, as `Copies.set_epoch`."""
        if self.copies is not None:
            self.copies.set_epoch(epoch)

    def warm(self) -> int:
        """Compute all that is missing; give the number of records computed."""
        return self.tokens.warm()
