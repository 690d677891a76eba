"""A batch of samples whose features are rows of one padded tensor."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import is_
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .cache import MovieFeatures
from .errors import FrameError
from .key import Record
from .store import Span

Sample = dict[str, Any]
Found = Span | Sequence[Record]
"""The records of a sample's frames: side by side, or each of them."""
_COPIED_BY_ONE_THREAD = 1 << 15  # numbers; torch's at::internal::GRAIN_SIZE


class Batch(list[Sample]):
    """Samples whose ``pretrained_feats`` are views of one tensor, so that none need be copied.

    Parameters
    ----------
    samples : iterable of dict
    features : (B, N, C) float32
        Sample i has the rows ``features[i, :n_i]``; the others are zero.
    """

    def __init__(self, samples: Iterable[Sample], features: Tensor) -> None:
        super().__init__(samples)
        self._features = features
        self._views = [sample["pretrained_feats"] for sample in self]

    @property
    def features(self) -> Tensor | None:
        """The tensor, (B, N, C) float32; None where samples or their features were exchanged."""
        views = [sample.get("pretrained_feats") for sample in self]
        same = len(views) == len(self._views) and all(map(is_, views, self._views))
        return self._features if same else None


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of a sample, by frame.

    Attributes
    ----------
    movie : MovieFeatures
    labels : (N,) int64
        In the order of frames.
    times : tuple of int
        The frames, ascending.
    bounds : tuple of int
        Frame i has the labels bounds[i] to bounds[i + 1].
    order : (N,) int, or None
        Which of the sample's tokens each label is, where these are not in the order of frames.
    """

    movie: MovieFeatures
    labels: NDArray[np.int64]
    times: tuple[int, ...]
    bounds: tuple[int, ...]
    order: NDArray[np.intp] | None = None

    @classmethod
    def of(
        cls, movie: MovieFeatures, times: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> Tokens:
        """Group the tokens (N,), (N,) of a sample.

        Raises
        ------
        ValueError, TypeError
            They are no integers, not as many, or not in one row.
        FrameError
            The movie has no such timepoint.
        """
        for name, given in (("timepoints", times), ("labels", labels)):
            if given.ndim != 1 or (given.size and given.dtype.kind not in "iu"):
                raise TypeError(
                    f"{name} are {given.dtype} of shape {given.shape}: expected integers (N,)"
                )
        if len(times) != len(labels):
            raise ValueError(f"{len(times)} timepoints and {len(labels)} labels: expected as many")
        frames, bounds = _group(times)
        order = None
        if any(after <= before for before, after in pairwise(frames)):
            # stable: within a frame labels stay in the sample's order, which is mostly the record's
            order = np.argsort(times, kind="stable")
            labels = labels[order]
            frames, bounds = _group(times[order])
        if frames and not 0 <= frames[0] <= frames[-1] < len(movie):
            wrong = frames[0] if frames[0] < 0 else frames[-1]
            raise FrameError(
                f"timepoint {wrong} is none of {movie.name or 'the movie'}, "
                f"whose {len(movie)} frames are counted from 0: are dataset and cache of one movie?"
            )
        return cls(movie, labels, frames, bounds, order)

    def select(self, found: Found) -> NDArray[np.floating[Any]]:
        """Give the features of the tokens, (N, C), from the records of the frames.

        Raises
        ------
        FrameError
            A label is not in the mask of its frame.
        """
        features = self._select_all(found) if isinstance(found, Span) else None
        if features is None:
            records = found.records() if isinstance(found, Span) else found
            places = [slice(*bounds) for bounds in pairwise(self.bounds)]
            features = np.concatenate([
                _select_rows(record, self.labels[place], self.movie, t)
                for t, place, record in zip(self.times, places, records, strict=True)
            ])  # fmt: skip
        if self.order is None:
            return features
        ordered = np.empty_like(features)
        ordered[self.order] = features
        return ordered

    def write(self, found: Found, rows: Tensor) -> None:
        """Write the features of the tokens into rows of a batch, and zeros into those left.

        FrameError for a label that is not in the mask of its frame.
        """
        if self.times:
            _cast(self.select(found), rows)
        if len(self.labels) < len(rows):
            rows[len(self.labels) :] = 0

    def _select_all(self, span: Span) -> NDArray[np.floating[Any]] | None:
        """Give the features from a span at once, if it has these tokens."""
        if span.offsets is None or span.labels is None:
            return None
        offsets = span.offsets.tolist()
        if tuple(offsets) == self.bounds and (span.labels == self.labels).all():
            return span.features
        known, asked = _number(span.labels, offsets), _number(self.labels, self.bounds)
        # labels of a record ascend, and so do the numbers of frame and label together
        rows = known.searchsorted(asked)
        if not len(known) or (known.take(rows, mode="clip") != asked).any():
            return None
        if (self.labels >> 32).any():  # its number is that of a label of another frame
            return None
        return span.features.take(rows, axis=0)


def _number(labels: NDArray[np.integer[Any]], bounds: Sequence[int]) -> NDArray[np.int64]:
    """Give labels of several frames one after the other a number each, by frame and label."""
    counts = [end - start for start, end in pairwise(bounds)]
    return np.repeat(np.arange(len(counts)) << 32, counts) + labels


def _group(times: NDArray[np.int64]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Give the runs of equal times, and where they begin and end."""
    if not len(times):
        return (), (0,)
    bounds = [0, *((times[1:] != times[:-1]).nonzero()[0] + 1).tolist(), len(times)]
    return tuple(times[bounds[:-1]].tolist()), tuple(bounds)


def _select_rows(
    record: Record, labels: NDArray[np.int64], movie: MovieFeatures, t: int
) -> NDArray[np.floating[Any]]:
    """Give the features of some labels: (n, C), from a record whose labels ascend."""
    if record.labels is None:
        raise FrameError("whole grids have no rows for labels: choose a pooling")
    if len(labels) == len(record.labels) and (labels == record.labels).all():
        return record.features
    rows = np.searchsorted(record.labels, labels)
    known = rows < len(record.labels)
    known[known] = record.labels[rows[known]] == labels[known]
    if not known.all():
        raise FrameError(
            f"label {labels[~known][0]} is not in the mask of {movie.where(t)}, which has "
            f"{len(record.labels)} labels: do dataset and cache use the same masks?"
        )
    return record.features[rows]


def begin_batch(tokens: Sequence[Tokens]) -> Tensor:
    """Make room for the features of some samples: (B, N, C) float32, N that of the longest.

    Raises
    ------
    ValueError
        Features of different width.
    """
    widths = {one.movie.spec.backbone.width: one.movie.spec.backbone.name for one in tokens}
    if len(widths) > 1:
        names = ", ".join(f"{width} ({name})" for width, name in widths.items())
        raise ValueError(
            f"the samples of a batch have features of different widths: {names}; "
            "use one backbone for all movies, or batches of one sample"
        )
    longest = max((len(one.labels) for one in tokens), default=0)
    return torch.empty(len(tokens), longest, *(widths or (0,)))


def _cast(features: NDArray[np.floating[Any]], rows: Tensor) -> None:
    """Write (n, C) features into the first of some rows, in pieces that torch copies in one thread.

    It shares larger ones among threads, which then wait for one another wherever cores are busy.
    """
    writeable = features.flags.writeable
    source = torch.from_numpy(features if writeable else np.asarray(_Readable(features)))
    if torch.get_num_threads() == 1:
        rows[: len(features)] = source
        return
    size = max(1, (_COPIED_BY_ONE_THREAD - 1) // max(1, rows.shape[1]))
    for start in range(0, len(features), size):
        piece = source[start : start + size]
        rows[start : start + len(piece)] = piece


class _Readable:
    """An array whose view says that it can be written: torch warns of those that can't.

    It is only read.
    """

    def __init__(self, array: NDArray[Any]) -> None:
        described = dict(array.__array_interface__)
        described["data"] = (described["data"][0], False)
        self.array, self.__array_interface__ = array, described
