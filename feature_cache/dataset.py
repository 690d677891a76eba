"""Cached features for training: any dataset whose samples name timepoints and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .augment import Augmentations, Draw
from .batch import Batch, Sample, Tokens, begin_batch
from .cache import MovieFeatures, check_batch_size, warm_movies
from .errors import DrawError, FrameError, MissingRecordError, UnknownNameError
from .forks import cached_property
from .hashing import DIGEST_BYTES, Digest, digest_json
from .key import Record
from .pooling import pooling_revision
from .service import Misses, StandIn, check_writable
from .store import Space, Usage

OnMiss = Literal["compute", "error"]


def check_pooling(pooling: str | None) -> None:
    """Raise where a pooling gives no rows for labels: UnknownNameError, or FrameError for none."""
    if pooling is None:
        raise FrameError(
            "pooling is None, and whole grids have no rows for labels: choose a pooling, such as "
            "'mean_patches_exact'"
        )
    pooling_revision(pooling)


def choose_copy(seed: int, epoch: int, index: int, copies: int, *more: int) -> int:
    """Give the copy, 0 to `copies`, that a sample uses: a function of its arguments alone."""
    digest = digest_json(["copy", seed, epoch, int(index), *more])
    return int.from_bytes(digest[:8], "big") % (copies + 1)


class Drawn(int):
    """An index of a dataset that also says where it comes in an epoch's draws.

    What our samplers give: a sample is then a function of these alone, for any number of workers.

    Attributes
    ----------
    seed : int
        Of the sampler.
    place : (int, int, int)
        Epoch, position in the epoch's draws of a rank, and that rank.
    """

    seed: int
    place: tuple[int, int, int]

    def __new__(cls, index: int, seed: int, place: tuple[int, int, int]) -> Drawn:
        """Make it."""
        made = super().__new__(cls, index)
        made.seed, made.place = seed, place
        return made

    def __sub__(self, other: int) -> Drawn:
        """Give the index in a part that begins at `other`, such as torch's ConcatDataset asks."""
        return Drawn(int(self) - other, self.seed, self.place)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle all of it."""
        return Drawn, (int(self), self.seed, self.place)


@dataclass(frozen=True)
class Copies:
    """Which augmented copy each sample uses.

    Of an index that one of our samplers has `Drawn`, a function of (seed, epoch, position, rank).
    Of any other index, after `set_epoch`, a function of (seed, epoch, index, how often it came in
    the epoch before); before, drawn anew each time from torch's generator, which a DataLoader
    seeds in each worker. So a sample that comes often has many copies.

    Parameters
    ----------
    augmentations : Augmentations
    samples : int
        How many there are; without, it is not counted how often one comes.
    """

    augmentations: Augmentations
    samples: int = 0
    _shared: Tensor = field(init=False, repr=False, compare=False)
    """The epoch, -1 before the first, and how often each sample came in it, int32."""

    def __post_init__(self) -> None:
        if not isinstance(self.augmentations, Augmentations):
            raise DrawError(
                f"augmentations is {self.augmentations!r}: expected an Augmentations, such as "
                'Augmentations("default", copies=3, seed=0)'
            )
        shared = torch.zeros(1 + self.samples, dtype=torch.int32)
        shared[0] = -1
        self.__setstate__({**self.__dict__, "_shared": shared})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Share epoch and counts with workers to come, in pickled and deep copies as well."""
        self.__dict__.update(state)
        self._shared.share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch; DataLoader workers that are already running see it too."""
        if epoch < 0:
            raise ValueError(f"epoch {epoch}: expected 0 or more")
        self._shared[0] = epoch
        self._shared[1:] = 0

    def choose(self, index: int, before: int = 0, *, ahead: bool = False) -> int:
        """Give the copy that a sample uses.

        Parameters
        ----------
        index : int or Drawn
        before : int
            How many samples others have that share these copies, before those of `index`.
        ahead : bool
            Whether it is only looked at: the sample comes later.
        """
        seed, copies = self.augmentations.seed, self.augmentations.copies
        if isinstance(index, Drawn):
            epoch, position, rank = index.place
            return choose_copy(seed, epoch, position, copies, rank)
        epoch = int(self._shared[0])
        if epoch < 0:
            return int(torch.randint(copies + 1, ()))
        if not self.samples:
            return choose_copy(seed, epoch, index, copies)
        # Without a lock: of two workers at the same moment, both may count the same.
        count = self._shared[1 + (before + index) % self.samples]
        times = int(count)
        if not ahead:
            # in place, in shared memory: all workers see it
            count += 1
        return choose_copy(seed, epoch, index, copies, *([times] if times else []))

    @property
    def count(self) -> int:
        """How many copies there are, beside the movie itself."""
        return self.augmentations.copies

    def knows(self, index: int) -> bool:
        """Tell whether the copy of a sample is known before it is asked for."""
        return isinstance(index, Drawn) or int(self._shared[0]) >= 0

    @cached_property
    def draws(self) -> tuple[Draw, ...]:
        """The draw of each copy."""
        return self.augmentations.draws()

    def of_movie(self, movie: MovieFeatures) -> list[MovieFeatures]:
        """Give each copy of a movie."""
        name_of = self.augmentations.name_of
        return [movie.with_draw(draw, name_of(k)) for k, draw in enumerate(self.draws)]


@dataclass(frozen=True, eq=False)
class TokenFeatures:
    """Looks up the feature vectors of tokens, each a (timepoint, label) of a movie.

    Parameters
    ----------
    movies : sequence of MovieFeatures
    copies : Copies, optional
        The augmented copies there are of each movie; without, there is only the movie itself.
    on_miss : str
        ``"compute"`` has what is missing computed, with the frames after it: in the process that
        made this object, also for DataLoader workers, or by a ``feature-cache serve``.
        ``"error"`` raises.
    batch_size : int
        Frames embedded at once.
    progress : bool
        Whether a line on stderr says how far the cache has filled, where that is a terminal.

    Notes
    -----
    A pickle holds no weights: what is missing is computed where the object was made.
    """

    movies: Sequence[MovieFeatures]
    copies: Copies | None = None
    on_miss: OnMiss = "compute"
    batch_size: int = 8
    progress: bool = True

    def __post_init__(self) -> None:
        if self.on_miss not in get_args(OnMiss):
            raise UnknownNameError("on_miss", self.on_miss, get_args(OnMiss))
        check_batch_size(self.batch_size)
        for movie in self.movies:
            check_pooling(movie.spec.pooling)
            movie.want([movie] if self.copies is None else self.copies.of_movie(movie))
        if self.on_miss == "compute":
            self._misses.open()

    def __getstate__(self) -> dict[str, Any]:
        """Leave out weights, and what is of this process."""
        kept = {f: getattr(self, f) for f in self.__dataclass_fields__}
        movies = [replace(m, backbone=StandIn(m.spec.backbone)) for m in self.movies]
        inherited = self._misses.addresses() if self.on_miss == "compute" else ()
        return {**kept, "movies": movies, "_inherited": inherited}

    @cached_property
    def _misses(self) -> Misses:
        writable = [m for m in self.movies if m.cache.store.mode != "r"]
        records = sum(map(len, writable)) * (1 + (self.copies.count if self.copies else 0))
        caches = [(m.cache, m.backbone) for m in writable]
        inherited = self.__dict__.get("_inherited", ())
        return Misses(caches, records, progress=self.progress, inherited=inherited)

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
        tokens = {"timepoints": timepoints, "labels": labels}
        features: Tensor = finish([self.begin(tokens, movie, copy)])[0]["pretrained_feats"]
        return features

    def begin(
        self,
        sample: Sample,
        movie: int,
        copy: int = 0,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> Unfinished:
        """Give a sample that lacks only the features of its tokens; nothing is looked up yet.

        Parameters
        ----------
        sample : dict
            With ``timepoints`` and ``labels``; these, `movie` and `copy` are as in a call.
        change : callable, optional
            What is done to the features, (N, C) to (N, C), in the end.
        """
        for name in ("timepoints", "labels"):
            if not isinstance(sample.get(name), Tensor):
                found = type(sample[name]).__name__ if name in sample else "none"
                raise TypeError(
                    f"a sample has {name} that are {found}: expected a tensor of integers "
                    "(N,), one for each cell"
                )
        times, labels = sample["timepoints"].numpy(), sample["labels"].numpy()
        return Unfinished(
            sample, self, Tokens.of(self.variants[movie][copy], times, labels), change
        )

    @cached_property
    def variants(self) -> list[list[MovieFeatures]]:
        """Each movie in each of its copies."""
        if self.copies is None:
            return [[movie] for movie in self.movies]
        return [self.copies.of_movie(movie) for movie in self.movies]

    def warm(self) -> int:
        """Compute all that is missing, in every copy; give the number of records computed."""
        return warm_tokens([self])

    def choose(self, index: int, before: int = 0) -> int:
        """Give the copy that a sample uses, as `Copies.choose`; 0 where there are none."""
        return 0 if self.copies is None else self.copies.choose(index, before)

    def foresees(self, index: int) -> bool:
        """Tell whether the records of a coming sample are known, and computed if need be."""
        return self.on_miss == "compute" and (self.copies is None or self.copies.knows(index))

    def prefetch(self, index: int, movie: int, times: Sequence[int], before: int = 0) -> None:
        """Have the records of a coming sample computed in the background; waits for nothing.

        Where they aren't foreseen, or too much waits already, nothing is done.

        Parameters
        ----------
        index, before : int
            As `Copies.choose`.
        movie : int
            As in a call.
        times : sequence of int
            Frames of the movie.
        """
        if not self.foresees(index):
            return
        copy = 0 if self.copies is None else self.copies.choose(index, before, ahead=True)
        self._misses.prefetch(self.variants[movie][copy], times, batch_size=self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose other copies, as `Copies.set_epoch`."""
        if self.copies is not None:
            self.copies.set_epoch(epoch)

    def complete(self, movie: MovieFeatures, lookups: Sequence[Lookup]) -> None:
        """Count what was found of one of the `variants`, and get what was not. Errors as a call."""
        found = [one for one in lookups if one.record is not None]
        absent = sorted((one for one in lookups if one.record is None), key=lambda one: one.t)
        size = sum(one.uses * one.record.features.nbytes for one in found if one.record)
        self.count(movie, sum(one.uses for one in found), size)
        if absent:
            for one, record in zip(absent, self._fetch(movie, [a.t for a in absent]), strict=True):
                one.record = record
            # the first use of each is counted by `Misses.fetch`, as a hit where it was on its way
            self.count(movie, sum(one.uses - 1 for one in absent))

    def _fetch(self, movie: MovieFeatures, absent: Sequence[int]) -> list[Record]:
        if self.on_miss == "error":
            movie.cache.counter.add(Usage(misses=len(absent)))
            raise MissingRecordError(
                f"{len(absent)} records, first {movie.where(absent[0])}, are not in "
                f"{movie.cache!r} and are not computed here (on_miss is 'error'): warm the cache "
                "first (feature-cache warm, or warm() of the dataset)"
            )
        check_writable(movie, absent)
        fresh: dict[int, Record] = {}
        # The pixels of all that is asked for at once are held in memory together.
        for start in range(0, len(absent), self.batch_size):
            part = absent[start : start + self.batch_size]
            fresh |= self._misses.fetch(movie, part, batch_size=self.batch_size)
        return [movie.expect(t, fresh[t]) for t in absent]

    def count(self, movie: MovieFeatures, hits: int, nbytes: int = 0) -> None:
        """Count hits; misses are counted where it is known whether they are on their way."""
        movie.cache.counter.add(Usage(hits=hits, bytes_read=nbytes))
        self._misses.hits += hits


def warm_tokens(tokens: Sequence[TokenFeatures]) -> int:
    """Compute all that is missing of several, in one run; give the number of records computed.

    Raises
    ------
    As `feature_cache.FeatureCache.get_or_compute`.
    """
    batch_size = max((one.batch_size for one in tokens), default=1)
    movies = [copies for one in tokens for copies in one.variants]
    return warm_movies(movies, batch_size=batch_size)


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A sample that lacks the features of its tokens; made by `TokenFeatures.begin`."""

    sample: Sample
    source: TokenFeatures
    tokens: Tokens
    change: Callable[[Tensor], Tensor] | None = None


@dataclass(slots=True, eq=False)
class Lookup:
    """A record that samples of a batch need: frame `t` of `movie`, whoever asked first."""

    source: TokenFeatures
    movie: MovieFeatures
    t: int
    uses: int = 0
    record: Record | None = None


def finish(unfinished: Sequence[Unfinished]) -> Batch:
    """Give each sample ``pretrained_feats`` (N, C) float32, all in one padded tensor.

    Each record is looked up and read once, and what is missing is asked for together, movie by
    movie and copy by copy. Errors as `TokenFeatures`, and ValueError for features of different
    width.
    """
    padded = begin_batch([one.tokens for one in unfinished])
    apart = []
    for one, rows in zip(unfinished, padded, strict=True):
        # Read and copied one after the other, they take the same memory again.
        span = one.tokens.movie.span(one.tokens.times)
        if span is None:
            apart.append((one, rows))
        else:
            one.source.count(one.tokens.movie, len(span), span.features.nbytes)
            one.tokens.write(span, rows)
    for (one, rows), records in zip(apart, _look_up([one for one, _ in apart]), strict=True):
        one.tokens.write(records, rows)
    samples = []
    for one, rows in zip(unfinished, padded, strict=True):
        features = rows[: len(one.tokens.labels)]
        if one.change is not None:
            features.copy_(one.change(features))
        samples.append({**one.sample, "pretrained_feats": features})
    return Batch(samples, padded)


def _look_up(unfinished: Sequence[Unfinished]) -> list[list[Record]]:
    """Give, for each sample, the record of each frame."""
    spaces: dict[Space, dict[Digest, Lookup]] = {}
    needed = [_need(one, spaces.setdefault(one.tokens.movie.space, {})) for one in unfinished]
    for space, lookups in spaces.items():
        keys = np.frombuffer(b"".join(lookups), np.uint8).reshape(-1, DIGEST_BYTES)
        groups: dict[tuple[TokenFeatures, MovieFeatures], list[Lookup]] = {}
        for lookup, record in zip(lookups.values(), space.read(keys), strict=True):
            lookup.record = record
            groups.setdefault((lookup.source, lookup.movie), []).append(lookup)
        for (source, movie), group in groups.items():
            source.complete(movie, group)
    return [cast(list[Record], [one.record for one in row]) for row in needed]


def _need(unfinished: Unfinished, lookups: dict[Digest, Lookup]) -> list[Lookup]:
    """Take the frames of a sample into the lookups of its space."""
    movie, row = unfinished.tokens.movie, []
    for t in unfinished.tokens.times:
        key = movie.key(t)
        lookup = lookups.get(key)
        if lookup is None:
            lookup = lookups[key] = Lookup(unfinished.source, movie, t)
        lookup.uses += 1
        row.append(lookup)
    return row


def _check_movies(given: object) -> None:
    wrong = "movies", given
    if isinstance(given, Sequence) and not isinstance(given, str):
        others = (n for n, one in enumerate(given) if not isinstance(one, MovieFeatures))
        if (n := next(others, None)) is None:
            return
        wrong = f"movies[{n}]", given[n]
    raise TypeError(
        f"{wrong[0]} is a {type(wrong[1]).__name__}: expected a list of what FeatureCache.movie "
        "gives, such as [cache.movie(frames, masks, backbone)]"
    )


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
    frames_of : callable, optional
        From a sample's index to its timepoints, for `prefetch`; without, samples are loaded for it.
    on_miss, batch_size, progress
        As `TokenFeatures`.

    Raises
    ------
    TypeError
        `movies` holds anything else.
    ValueError
        Several movies without `movie_of`.

    Examples
    --------
    >>> import tempfile, torch
    >>> import numpy as np
    >>> from feature_cache import CachedFeatureDataset, FeatureCache
    >>> from feature_cache.testing import FakeBackbone
    >>> frames = np.random.default_rng(0).random((3, 32, 32), np.float32)
    >>> masks = np.zeros((3, 32, 32), np.int32)
    >>> masks[:, 4:12, 4:12], masks[:, 20:28, 20:28] = 1, 2
    >>> cells = {"timepoints": torch.tensor([0, 0, 2]), "labels": torch.tensor([1, 2, 1])}
    >>> cache = FeatureCache(tempfile.mkdtemp())
    >>> data = CachedFeatureDataset([cells], [cache.movie(frames, masks, FakeBackbone())])
    >>> data[0]["pretrained_feats"].shape[0]
    3
    """

    def __init__(
        self,
        dataset: Dataset[Sample],
        movies: Sequence[MovieFeatures],
        movie_of: Callable[[int], int] | None = None,
        *,
        augmentations: Augmentations | None = None,
        frames_of: Callable[[int], Sequence[int]] | None = None,
        on_miss: OnMiss = "compute",
        batch_size: int = 8,
        progress: bool = True,
    ) -> None:
        _check_movies(movies)
        if not movies:
            raise ValueError("movies is empty: expected what FeatureCache.movie gives, of each")
        if movie_of is None and len(movies) != 1:
            raise ValueError(f"{len(movies)} movies: pass movie_of, from a sample to its movie")
        self.dataset, self.movie_of, self.frames_of = dataset, movie_of, frames_of
        samples = len(dataset) if isinstance(dataset, Sized) else 0
        copies = Copies(augmentations, samples) if augmentations is not None else None
        self.tokens = TokenFeatures(movies, copies, on_miss, batch_size, progress)

    def __len__(self) -> int:
        """Count the samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Sample:
        """Give a sample with ``pretrained_feats`` (N, C) float32; errors as `TokenFeatures`."""
        return finish([self._begin(index)])[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        """Give the samples of a batch, their features read together; a DataLoader calls it.

        They are equal to those given one by one. Errors as `finish`.
        """
        return finish([self._begin(index) for index in indices])

    def _begin(self, index: int) -> Unfinished:
        sample = self.dataset[index]
        if not isinstance(sample, Mapping):
            raise TypeError(
                f"sample {index} is a {type(sample).__name__}: expected a dict with timepoints and "
                "labels"
            )
        sample = dict(sample)
        movie = 0 if self.movie_of is None else self.movie_of(index)
        count = len(self.tokens.movies)
        if movie not in range(count):
            raise ValueError(f"movie_of({index}) is {movie!r}: expected 0 to {count - 1}")
        copy = self.tokens.choose(index)
        if self.tokens.copies is not None:
            sample["copy"] = copy
        return self.tokens.begin(sample, movie, copy)

    def prefetch(self, indices: Iterable[int]) -> None:
        """Have the records of coming samples computed in the background; waits for none.

        Where there are augmented copies, only of what our samplers draw, or after `set_epoch`:
        otherwise the copy of a sample isn't known. What doesn't fit in a bounded queue is passed
        over.
        """
        for index in filter(self.tokens.foresees, indices):
            movie = 0 if self.movie_of is None else self.movie_of(index)
            self.tokens.prefetch(index, movie, self._frames_of(index))

    def _frames_of(self, index: int) -> list[int]:
        if self.frames_of is not None:
            return [int(t) for t in self.frames_of(index)]
        return [int(t) for t in self.dataset[index]["timepoints"].unique()]

    def set_epoch(self, epoch: int) -> None:
        """Choose other copies, as `Copies.set_epoch`."""
        self.tokens.set_epoch(epoch)

    def warm(self) -> int:
        """Compute all that is missing; give the number of records computed."""
        return self.tokens.warm()
