"""Cached features for training: any dataset whose samples name timepoints and labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from .cache import MovieFeatures
from .errors import FrameError, MissingRecordError
from .key import Record

OnMiss = Literal["compute", "error"]
Sample = dict[str, Any]


@dataclass(frozen=True)
class TokenFeatures:
    """Looks up the feature vectors of tokens, each a (timepoint, label) of a movie.

    Parameters
    ----------
    movies : sequence of MovieFeatures
    on_miss : str
        ``"compute"`` computes what is missing, in this process; ``"error"`` raises.
    batch_size : int
        Frames embedded at once.
    """

    movies: Sequence[MovieFeatures]
    on_miss: OnMiss = "compute"
    batch_size: int = 8

    def __call__(self, movie: int, timepoints: Tensor, labels: Tensor) -> Tensor:
        """Give the features of some tokens of one movie.

        Parameters
        ----------
        movie : int
            Number of the movie.
        timepoints : (N,) int64
            Frames of the movie as it was given to the cache.
        labels : (N,) int64
            Labels in the masks of these frames.

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
        features = self.movies[movie]
        times = timepoints.numpy()
        wanted = labels.numpy()
        result = torch.empty(len(times), features.spec.backbone.width)
        used = np.unique(times).tolist()
        for t, record in zip(used, self._records(features, used), strict=True):
            tokens = np.flatnonzero(times == t)
            rows = _find_rows(record, wanted[tokens], features, t)
            result[tokens] = torch.from_numpy(record.features[rows]).float()
        return result

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
    on_miss, batch_size
        As `TokenFeatures`.
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        movies: Sequence[MovieFeatures],
        movie_of: Callable[[int], int] | None = None,
        *,
        on_miss: OnMiss = "compute",
        batch_size: int = 8,
    ) -> None:
        if movie_of is None and len(movies) != 1:
            raise ValueError(f"{len(movies)} movies: pass movie_of, from a sample to its movie")
        self.dataset, self.movie_of = dataset, movie_of
        self.tokens = TokenFeatures(movies, on_miss, batch_size)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        """Give a sample with ``pretrained_feats`` (N, C) float32; errors as `TokenFeatures`."""
        sample = self.dataset[index]
        movie = 0 if self.movie_of is None else self.movie_of(index)
        features = self.tokens(movie, sample["timepoints"], sample["labels"])
        return {**sample, "pretrained_feats": features}
