"""What there is and what is missing: movies x copies x spaces."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import ceil
from typing import TYPE_CHECKING, cast

import numpy as np

from ..augment import Augmentations
from ..backbones.several_layers import Layers, specs_of
from ..backbones.tiles import pixels_of_cell
from ..cache import FeatureCache, MovieFeatures, Progress, grid_spec
from ..engine import Failure, Tally
from ..errors import MovieError, UnknownNameError
from ..forks import cached_property
from ..hashing import JSON, Digest
from ..key import Keys
from ..movies import Given, Movie, Row, Source
from ..spec import SpaceSpec
from ..store import Asked
from .frame_rates import recall_rate
from .small_regions import say_small_regions
from .sources import open_sources
from .stored_grids import StoredGrids

if TYPE_CHECKING:
    from ..backbones.base import Backbone

UNIT_EMBEDDINGS = 64
"""Frames and copies of a unit: what a worker is given at once, at least."""

DENSE = ("none", "original", "all")
"""Of what to keep grids too: nothing, the movies themselves, all copies."""

_RECORD_BYTES = 600
"""About what a record takes beside its features: key, offsets, checksum, provenance."""


_log = logging.getLogger(__name__)

Spot = tuple[int, int]
"""Numbers of a copy and of a space."""


@dataclass(frozen=True, slots=True)
class Task:
    """The missing records of one movie."""

    copies: tuple[MovieFeatures, ...]
    """The movie under each draw; hashed."""
    specs: tuple[SpaceSpec, ...]
    wanted: Mapping[int, tuple[Spot, ...]]
    """Frames, each with the copies and spaces of which its record is missing."""
    grids: frozenset[tuple[int, int]] = frozenset()
    """Frames and copies whose grid is stored, in float32."""

    @property
    def movie(self) -> MovieFeatures:
        """The movie itself."""
        return self.copies[0]

    @property
    def records(self) -> int:
        """Count the missing records."""
        return sum(map(len, self.wanted.values()))

    @property
    def embeddings(self) -> int:
        """Count the frames that must go through the backbone."""
        return sum(
            len({copy for copy, space in spots if not self._is_pooled(t, copy, space)})
            for t, spots in self.wanted.items()
        )

    def _is_pooled(self, t: int, copy: int, space: int) -> bool:
        return (t, copy) in self.grids and self.specs[space].pooling is not None

    def views(self) -> Mapping[Spot, MovieFeatures]:
        """Give the movie under each draw in each of its spaces."""
        return {
            (number, space): copy.in_space(spec)
            for number, copy in enumerate(self.copies)
            for space, spec in enumerate(self.specs)
        }

    def units(self, embeddings: int = UNIT_EMBEDDINGS) -> Iterator[Unit]:
        """Cut the work into runs of missing frames, each of about so many embeddings."""
        ordered = sorted(self.wanted.items())
        frames = max(1, embeddings // len(self.copies))
        for start in range(0, len(ordered), frames):
            yield Unit(self, tuple(ordered[start : start + frames]))


@dataclass(frozen=True, slots=True)
class Unit:
    """A part of a task that is done at once."""

    task: Task
    wanted: tuple[tuple[int, tuple[Spot, ...]], ...]
    """Each frame, with the copies and spaces of which its record is missing."""

    @property
    def records(self) -> int:
        """Count the records to compute."""
        return sum(len(spots) for _, spots in self.wanted)

    @property
    def where(self) -> str:
        """Name the frames for people."""
        first, last = self.wanted[0][0], self.wanted[-1][0]
        origin = self.task.movie.origin if len(self.task.copies) == 1 else ""
        copies = f", {origin}" if origin else ""
        return f"frames {first} to {last} of {self.task.movie.name}{copies}"

    def keys(self) -> list[Digest]:
        """Give the keys of its records."""
        views = self.task.views()
        return [views[spot].key(t) for t, spots in self.wanted for spot in spots]

    def missing(self) -> Unit:
        """Give what of it is not in the cache now."""
        asked: dict[Spot, list[int]] = defaultdict(list)
        for t, spots in self.wanted:
            for spot in spots:
                asked[spot].append(t)
        views = self.task.views()
        absent: set[tuple[int, Spot]] = set()
        for spot, frames in asked.items():
            there = views[spot].contains(frames)
            absent.update((t, spot) for t, found in zip(frames, there, strict=True) if not found)
        rest = ((t, tuple(s for s in spots if (t, s) in absent)) for t, spots in self.wanted)
        return Unit(self.task, tuple((t, spots) for t, spots in rest if spots))


@dataclass(frozen=True, slots=True)
class PlanRow:
    """What a plan says of one movie's copy in one space, in records.

    Attributes
    ----------
    movie, space : str
    copy : int
    present, missing : int
        Records of equal keys count once, where they come first.
    from_grids : int
        Of those missing, how many need no model.
    bytes : int or None
        To be written, about; None where the number of regions isn't known.
    """

    movie: str
    copy: int
    space: str
    present: int
    missing: int
    from_grids: int
    bytes: int | None

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class PlannedMovie:
    """Which frames and masks of a movie belong together: the first and the last of its pairs."""

    movie: str
    frames: int
    pairs: tuple[Row, ...]

    @classmethod
    def of(cls, movie: Movie) -> PlannedMovie:
        """Take the ends of a movie's table."""
        rows = movie.table()
        return cls(movie.name, len(rows), tuple(rows if len(rows) < 2 else (rows[0], rows[-1])))

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        pairs = [asdict(row) for row in self.pairs]
        return {"movie": self.movie, "frames": self.frames, "pairs": pairs}


@dataclass(frozen=True, slots=True)
class WarmPlan:
    """What there is and what is missing, in records; records of equal keys count once."""

    cache: FeatureCache
    tasks: tuple[Task, ...]
    present: int
    failures: tuple[Failure, ...]
    rows: tuple[PlanRow, ...] = field(default=(), repr=False)
    rate: float | None = None
    """Frames a second, of the last run of this backbone on such a device."""
    movies: tuple[PlannedMovie, ...] = field(default=(), repr=False)
    originals: tuple[tuple[SpaceSpec, Keys], ...] = field(default=(), repr=False)
    """Keys of the movies themselves, (m, 16) uint8 each, in a space that pools."""
    asked: tuple[Asked, ...] = field(default=(), repr=False)
    """What is asked for, for those who look at the cache later."""

    @property
    def missing(self) -> int:
        """Count the records to compute."""
        return sum(task.records for task in self.tasks)

    @property
    def planned(self) -> int:
        """Count all records that were asked for."""
        return self.present + self.missing + sum(failure.records for failure in self.failures)

    @property
    def from_grids(self) -> int:
        """Count the records to compute that need no model."""
        return sum(row.from_grids for row in self.rows)

    @property
    def bytes(self) -> int | None:
        """Estimate the bytes to be written; None where no movie tells its number of regions."""
        known = [(row.bytes, row.missing) for row in self.rows if row.missing]
        sure = [(size, missing) for size, missing in known if size is not None]
        if known and not sure:
            return None
        counted = sum(missing for _, missing in sure)
        unknown = self.missing - counted
        total = sum(size for size, _ in sure)
        return total + (total * unknown // counted if counted else 0)

    @property
    def seconds(self) -> float | None:
        """Estimate the time on one device; None where this backbone never ran on such a one."""
        return None if self.rate is None else sum(t.embeddings for t in self.tasks) / self.rate

    def units(self, embeddings: int = UNIT_EMBEDDINGS) -> list[Unit]:
        """Cut all the work into runs of missing frames, as `Task.units`."""
        return [unit for task in self.tasks for unit in task.units(embeddings)]

    def to_json(self) -> dict[str, JSON]:
        """Give counts, rows and failures."""
        return {
            "planned": self.planned,
            "present": self.present,
            "missing": self.missing,
            "from_grids": self.from_grids,
            "estimated_bytes": self.bytes,
            "estimated_seconds": None if self.seconds is None else round(self.seconds, 1),
            "failed": sum(failure.records for failure in self.failures),
            "movies": [movie.to_json() for movie in self.movies],
            "rows": [row.to_json() for row in self.rows],
            "errors": [failure.to_json() for failure in self.failures],
        }


def plan_warm(
    cache: FeatureCache,
    movies: Iterable[Source | Given],
    backbone: Backbone | Layers,
    *,
    pooling: str | Sequence[str | None] | None = "mean_patches_exact",
    dtype: str = "float16",
    augmentations: Augmentations | None = None,
    without_copies: Collection[Source] = (),
    dense: str = "none",
    failures: Iterable[Failure] = (),
    progress: Progress | None = None,
) -> WarmPlan:
    """Find what is missing. Hashes frames and masks; computes nothing, leaves the cache as it is.

    Reads those whose digests the memo doesn't know, several at once, and remembers these.

    Parameters
    ----------
    cache, dtype
        As `FeatureCache.get_or_compute`.
    movies : iterable of Movie, Source, path, or pair of arrays (frames, masks)
        A cluster wants movies in files.
    backbone : Backbone or Layers
        Of several layers, each is a space of its own, from one embedding. Or `StoredGrids`: then
        what has no stored grid is a failure.
    pooling : str, None or a sequence of these
        Several are computed from one embedding.
    augmentations : Augmentations, optional
        Copies to warm beside the movies themselves.
    without_copies : collection of Source
        Movies of which there are no copies, such as those of validation.
    dense : str
        One of `DENSE`: of what to keep grids too, in float32.
    failures : iterable of Failure
        What failed before, such as movies that could not be opened.
    progress : callable, optional
        Called with the number of frames just hashed.

    Raises
    ------
    UnknownNameError
        No such pooling, dtype or value of `dense`.
    """
    if dense not in DENSE:
        raise UnknownNameError("value of dense", dense, DENSE)
    poolings = [pooling] if pooling is None or isinstance(pooling, str) else list(pooling)
    layers = specs_of(backbone)
    specs = tuple(dict.fromkeys(SpaceSpec(s, name, dtype) for s in layers for name in poolings))
    copies = augmentations or Augmentations("none", copies=0)
    planner = _Planner(cache, backbone, specs, dense, list(failures))
    for movie in _open_all(movies, planner.failures):
        none = movie.source is not None and movie.source in without_copies
        planner.add(movie, Augmentations("none", copies=0) if none else copies, progress)
    return planner.plan()


def bind_movie(
    cache: FeatureCache, movie: Movie, backbone: Backbone | Layers, specs: Sequence[SpaceSpec]
) -> MovieFeatures:
    """Bind a movie to one of its spaces, with masks where any of them pools."""
    pooled = next((spec for spec in specs if spec.pooling is not None), specs[0])
    one = backbone.members[0] if isinstance(backbone, Layers) else backbone
    features = cache.movie(movie, None, one, pooling=pooled.pooling, dtype=pooled.dtype)
    return replace(features, backbone=cast("Backbone", backbone))


def _open_all(movies: Iterable[Source | Given], failures: list[Failure]) -> Iterator[Movie]:
    for given in movies:
        if isinstance(given, Movie):
            yield given
        elif isinstance(given, Source | str | os.PathLike):
            source = given if isinstance(given, Source) else Source(os.fspath(given))
            opened, failed = open_sources([source])
            failures += failed
            yield from (movie for _, movie in opened)
        elif isinstance(given, tuple) and len(given) == 2:
            yield Movie.of(*given)
        else:
            raise TypeError(
                f"movies holds a {type(given).__name__}: expected movies, paths, sources, or "
                "pairs of arrays (frames, masks)"
            )


class _Planner:
    """Collects tasks, movie by movie."""

    def __init__(
        self,
        cache: FeatureCache,
        backbone: Backbone | Layers,
        specs: tuple[SpaceSpec, ...],
        dense: str,
        failures: list[Failure],
    ) -> None:
        self.cache, self.backbone, self.specs = cache, backbone, specs
        self.dense, self.failures = dense, failures
        self.grids = tuple(map(grid_spec, specs_of(backbone)))
        self.tasks: list[Task] = []
        self.rows: list[PlanRow] = []
        self.present = 0
        self.movies: list[PlannedMovie] = []
        self.originals: list[tuple[SpaceSpec, Keys]] = []
        self.asked: list[Asked] = []
        self._seen: set[Digest] = set()

    def plan(self) -> WarmPlan:
        return WarmPlan(
            self.cache, tuple(self.tasks), self.present, tuple(self.failures), tuple(self.rows),
            recall_rate(self.backbone), tuple(self.movies), tuple(self.originals),
            tuple(self.asked),
        )  # fmt: skip

    def add(self, movie: Movie, draws: Augmentations, progress: Progress | None) -> None:
        specs = [self._specs_of(number) for number in range(draws.copies + 1)]
        self.movies.append(PlannedMovie.of(movie))
        try:
            features = bind_movie(self.cache, movie, self.backbone, self.specs)
        except MovieError as error:
            records = len(movie) * sum(map(len, specs))
            self.failures.append(Failure(movie.name, str(error), records))
            return
        tally = Tally()
        good = features.hash_frames(range(len(movie)), tally, sum(map(len, specs)), progress)
        self.failures += tally.failures
        sizes, before = _Sizes(movie), len(self.tasks)
        copies = [
            features.with_draw(draw, draws.name_of(number))
            for number, draw in enumerate(draws.draws())
        ]
        every = tuple(dict.fromkeys(spec for group in specs for spec in group))
        wanted: dict[int, list[Spot]] = defaultdict(list)
        grids: set[tuple[int, int]] = set()
        for number, copy in enumerate(copies):
            missing, stored = self._add_copy(copy, specs[number], number, good, sizes)
            grids.update((t, number) for t in stored)
            for spec, frames in zip(specs[number], missing, strict=True):
                for t in frames:
                    wanted[t].append((number, every.index(spec)))
        if wanted:
            spots = {t: tuple(wanted[t]) for t in sorted(wanted)}
            self.tasks.append(Task(tuple(copies), every, spots, frozenset(grids)))
        pooled = [spec for spec in self.specs if spec.pooling is not None]
        if pooled:
            self.originals.append((pooled[0], features.in_space(pooled[0]).keys(good)))
        pairs = list(zip(copies, specs, strict=True))
        by_space = {s: features.texts_of(one for one, some in pairs if s in some) for s in every}
        if features.name:
            self.asked.append(features.asked(by_space))
        # only where images were read anyway: a plan that recalls all digests opens none
        if len(self.tasks) > before and features.images_read:
            self._look_at(movie if pooled else replace(movie, masks=None))

    def _look_at(self, movie: Movie) -> None:
        """Log what is wrong with a movie that is to be computed, and with its regions."""
        movie.check(quick=True).log_problems()
        texts = (say_small_regions(movie, layer) for layer in specs_of(self.backbone))
        for text in filter(None, texts):
            _log.warning("%s", text)

    def _specs_of(self, copy: int) -> tuple[SpaceSpec, ...]:
        wanted = self.dense == "all" or (self.dense == "original" and copy == 0)
        return tuple(dict.fromkeys((*self.specs, *self.grids))) if wanted else self.specs

    def _add_copy(
        self,
        copy: MovieFeatures,
        specs: tuple[SpaceSpec, ...],
        number: int,
        good: list[int],
        sizes: _Sizes,
    ) -> tuple[list[tuple[int, ...]], frozenset[int]]:
        """Count one copy; give its missing frames for each space, and whose grids are stored."""
        views = [copy.in_space(spec) for spec in specs]
        new = [self._unseen(view, good) for view in views]
        found = [view.contains(frames) for view, frames in zip(views, new, strict=True)]
        missing = [
            tuple(np.asarray(frames, int)[~there].tolist())
            for frames, there in zip(new, found, strict=True)
        ]
        stored = self._stored_grids(copy, sorted({t for frames in missing for t in frames}))
        if isinstance(self.backbone, StoredGrids):
            missing = self._leave_out(copy, missing, stored)
        for spec, there, frames in zip(specs, found, missing, strict=True):
            pooled = spec.pooling is not None
            from_grids = len(stored.intersection(frames)) if pooled else 0
            size = sizes.estimate(spec, len(frames))
            row = (copy.name, number, spec.folder_name, int(there.sum()), len(frames))
            self.rows.append(PlanRow(*row, from_grids, size))
            self.present += int(there.sum())
        return missing, stored

    def _unseen(self, view: MovieFeatures, frames: list[int]) -> list[int]:
        """Give one frame for each key that is not seen yet."""
        # reversed: of several frames with one key the first is kept
        first = {view.key(t): t for t in reversed(frames) if view.key(t) not in self._seen}
        self._seen.update(first)
        return sorted(first.values())

    def _stored_grids(self, copy: MovieFeatures, frames: list[int]) -> frozenset[int]:
        if not frames:
            return frozenset()
        there = np.all([copy.in_space(spec).contains(frames) for spec in self.grids], axis=0)
        return frozenset(np.asarray(frames)[there].tolist())

    def _leave_out(
        self, copy: MovieFeatures, missing: list[tuple[int, ...]], stored: Collection[int]
    ) -> list[tuple[int, ...]]:
        """Keep what can be computed from stored grids; the rest is a failure."""
        kept = [tuple(t for t in frames if t in stored) for frames in missing]
        left = sum(map(len, missing)) - sum(map(len, kept))
        if left:
            reason = (
                f"{left} records of {copy.name}, {copy.origin}, can't be pooled: no float32 grid "
                "is stored for them; warm with --dense, or without --from-grids"
            )
            self.failures.append(Failure(copy.name, reason, left))
        return kept


class _Sizes:
    """Estimates bytes from what can be known of a movie without reading its pixels."""

    def __init__(self, movie: Movie) -> None:
        self.movie = movie

    def estimate(self, spec: SpaceSpec, records: int) -> int | None:
        """Estimate the bytes of some records; None where that can't be known."""
        if not records:
            return 0
        row = spec.backbone.width * np.dtype(spec.dtype).itemsize
        count: float | None = self._cells(spec)
        if spec.pooling is not None:
            count, row = self._regions, row + 4  # of its label
        return None if count is None else int(records * (count * row + _RECORD_BYTES))

    def _cells(self, spec: SpaceSpec) -> int | None:
        if self._shape is None:
            return None
        slices = self._shape[0] if len(self._shape) > 2 else 1
        rows, columns = pixels_of_cell(spec.backbone, self._shape)
        return slices * ceil(self._shape[-2] / rows) * ceil(self._shape[-1] / columns)

    @cached_property
    def _shape(self) -> tuple[int, ...] | None:
        """A frame's, read without its pixels."""
        try:
            return self.movie.frames.shape
        except MovieError:
            return None

    @cached_property
    def _regions(self) -> float | None:
        """Tracks in man_track.txt that are alive, on average."""
        if self.movie.detection_folder is None or not len(self.movie):
            return None
        try:
            tracks = self.movie.tracks
        except (MovieError, OSError):
            return None
        alive = (tracks[:, 2] - tracks[:, 1] + 1).sum()
        return float(alive) / max(1, int(tracks[:, 2].max(initial=0)) + 1)
