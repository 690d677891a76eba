"""Which movies a cache knows, and which of their copies it holds: from provenance alone."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from ..hashing import JSON, canonical_json
from ..movies import Source
from ..movies.check import summarize
from ..spec import Context
from ..store import Asked, Space, record_regions, record_sources
from .warm_command import WarmOptions, quote_movie

_ORIGIN = re.compile(r"copy (\d+) of seed (\d+) \((.+)\)")
_IDENTITY = "[]"
_ALONE = Context()
_Place: TypeAlias = tuple[str, str]
"""A movie's name, and what tells it from others of that name; empty where it came from no file."""


@dataclass(frozen=True, slots=True)
class SeenByModel:
    """What a backbone sees of a movie: each frame, or each window in time.

    Attributes
    ----------
    frames : frozenset of int
        Numbers that stand for the pixels seen.
    pairs : frozenset of (int, int)
        The same with that of the mask.
    """

    frames: frozenset[int]
    pairs: frozenset[tuple[int, int]]

    @classmethod
    def of(cls, seen: Iterable[tuple[int, int | None]]) -> SeenByModel:
        """Sort what is seen with a mask or without."""
        seen = frozenset(seen)
        pairs = frozenset((frame, mask) for frame, mask in seen if mask is not None)
        return cls(frozenset(frame for frame, _ in seen), pairs)

    def expected(self, masked: bool) -> int:
        """Count the records that a copy has in a space when it is complete."""
        if not masked:
            return len(self.frames)
        return len(self.pairs) + len(self.frames - {frame for frame, _ in self.pairs})


@dataclass(frozen=True, slots=True)
class KnownMovie:
    """A movie as provenance names it: what it is made of, not where it lies now.

    Attributes
    ----------
    names : tuple of str
        All names under which these very frames and masks were computed, sorted.
    slots : int
        Files, or frame numbers where frames came from no file.
    versions : int
        Slots whose pixels or mask the cache has seen in more than one version; each version
        counts by itself in `Coverage`.
    source : Source or None
        How it was opened; None where the frames came from no file, so that no command warms them.
    contents : mapping of Context to SeenByModel
        By what backbones see around a frame.
    regions : (int, float, int) or None
        Least, median and most regions of a frame; None where no record of the movie itself has any.
    wanted : mapping of str to frozenset of str
        By space, the draws that were asked for.
    """

    names: tuple[str, ...]
    slots: int
    versions: int
    source: Source | None
    contents: Mapping[Context, SeenByModel]
    regions: tuple[int, float, int] | None = None
    wanted: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def cover(self, context: Context, masked: bool) -> tuple[frozenset[Any], int | None]:
        """Give what a complete copy holds, and how many records these are, if that is known."""
        alone = self.contents[_ALONE]
        if masked and not alone.pairs:
            return frozenset(), None
        own = self.contents.get(context, alone)
        # Of windows only those are known that were computed, where the movie wasn't asked for.
        expected = max(own.expected(masked), alone.expected(masked))
        return own.pairs if masked else own.frames, expected


@dataclass(frozen=True, slots=True, order=True)
class CopyGroup:
    """Copies that one command makes.

    Attributes
    ----------
    rank : int
        The movies themselves come first, then numbered copies, then any other draws.
    policy : str
        Empty for the movies themselves and for draws that are no numbered copies.
    seed : int
    """

    rank: int
    policy: str = ""
    seed: int = 0

    @property
    def label(self) -> str:
        """Name it for people."""
        return ("original", f"seed {self.seed} ({self.policy})", "other draws")[self.rank]


@dataclass(frozen=True, slots=True)
class Column:
    """A copy.

    Attributes
    ----------
    group : CopyGroup
    number : int
        Of the copy, in its group.
    draw : str
        Canonical JSON of its operations.
    """

    group: CopyGroup
    number: int
    draw: str


@dataclass(frozen=True, slots=True)
class Coverage:
    """Movies x copies of one space.

    Attributes
    ----------
    space : str
    spec : mapping
    columns : tuple of Column
        Sorted by group and number.
    counts : tuple of tuple of int
        For each movie, how many of its records each copy has.
    expected : tuple of int or None
        For each movie, how many there would be; None where the space wants masks, and the movie
        was never seen with any.
    wanted : tuple of tuple of bool
        For each movie, whether each copy was asked for: also where some of it is there, and of
        movies of which nobody noted what was asked for.
    """

    space: str
    spec: Mapping[str, Any]
    columns: tuple[Column, ...]
    counts: tuple[tuple[int, ...], ...]
    expected: tuple[int | None, ...]
    wanted: tuple[tuple[bool, ...], ...]

    def command(self, group: CopyGroup, cache: str) -> str | None:
        """Give the command that warms all copies of a group, with ``{movie}`` in it."""
        if group.rank == 2 or group.policy == "a policy of its own":
            return None
        copies = max((c.number for c in self.columns if c.group == group), default=0)
        return WarmOptions.of_spec(self.spec, cache, copies, group.seed, group.policy).text


@dataclass
class _Seen:
    """What provenance says of what has one name, and is opened from one place."""

    source: Source | None = None
    wanted: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    contents: dict[Context, set[tuple[int, int | None]]] = field(
        default_factory=lambda: defaultdict(set)
    )
    slots: dict[tuple[str, str], set[tuple[int, int | None]]] = field(
        default_factory=lambda: defaultdict(set)
    )

    def add(self, slot: tuple[str, str], frame: int, mask: int | None) -> None:
        self.contents[_ALONE].add((frame, mask))
        self.slots[slot].add((frame, mask))

    def join(self, other: _Seen) -> None:
        for context, seen in other.contents.items():
            self.contents[context] |= seen
        for slot, seen in other.slots.items():
            self.slots[slot] |= seen
        for space, draws in other.wanted.items():
            self.wanted[space] |= draws

    @property
    def versions(self) -> int:
        return sum(
            len({frame for frame, _ in seen}) > 1 or len({m for _, m in seen} - {None}) > 1
            for seen in self.slots.values()
        )


@dataclass
class _Held:
    """What one space holds, by draw: numbers of what was seen, or of that and masks."""

    spec: Mapping[str, Any]
    context: Context
    cells: dict[str, set[Any]] = field(default_factory=lambda: defaultdict(set))
    origins: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))


def find_coverage(
    spaces: Iterable[Space], asked: Iterable[Asked] = ()
) -> tuple[list[KnownMovie], list[Coverage]]:
    """Find which movies a cache knows, and which of their copies it holds.

    A record counts by the content of its frame and mask, whatever movie it was computed for, as
    it does when it is looked up. No movie needs to be there.

    Parameters
    ----------
    spaces : iterable of Space
        Of `feature_cache.store.Store.spaces`.
    asked : iterable of Asked
        Movies and copies that people asked for: a record says only for whom it was computed.

    Returns
    -------
    movies : list of KnownMovie
        Sorted by name.
    coverage : list of Coverage
        One for each space; rows as in `movies`.
    """
    survey = _Survey()
    held = {space.name: survey.read(space) for space in spaces}
    for movie in asked:
        survey.add(movie, held)
    movies = survey.movies()
    return movies, [_cover(name, space, movies) for name, space in held.items()]


class _Survey:
    """Reads provenance; digests and draws become numbers and texts that are kept once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._draws: dict[str, str] = {}
        self._seen: dict[_Place, _Seen] = defaultdict(_Seen)
        self._regions: dict[tuple[int, int], int] = {}

    def read(self, space: Space) -> _Held:
        context = Context(*space.spec["backbone"].get("context", _ALONE))
        held = _Held(space.spec, context)
        masked = space.spec["pooling"] is not None
        originals: dict[bytes, tuple[int, int]] = {}
        for key, source in record_sources(space):
            if not isinstance(source.get("frame_digest"), str):
                continue
            frame, mask = self._number(source["frame_digest"]), None
            if isinstance(source.get("mask_digest"), str):
                mask = self._number(source["mask_digest"])
            file = source.get("file")
            slot = ("file", str(file)) if file else ("number", str(source.get("frame")))
            seen = self._seen[_place_of(str(source.get("movie") or ""), source.get("source"))]
            seen.add(slot, frame, mask)
            if seen.source is None and isinstance(source.get("source"), dict):
                seen.source = Source.from_json(source["source"])
            pixels = frame
            if any(context):
                pixels = self._number(" ".join(source["window"]))
                seen.contents[context].add((pixels, mask))
            draw = self._draw(source.get("draw", []))
            held.cells[draw].add((pixels, mask) if masked else pixels)
            held.origins[draw].add(str(source.get("origin") or ""))
            if masked and mask is not None and draw == _IDENTITY:
                originals[key] = (frame, mask)
        if originals.values() - self._regions.keys():
            found = record_regions(space)
            self._regions |= {originals[key]: count for key, count in found if key in originals}
        return held

    def add(self, asked: Asked, held: Mapping[str, _Held]) -> None:
        """Take in a movie and its copies as they were asked for."""
        seen = self._seen[_place_of(asked.movie, asked.source)]
        masks = [None if mask is None else self._number(mask) for _, _, mask in asked.frames]
        for (place, frame, _), mask in zip(asked.frames, masks, strict=True):
            slot = ("number", place) if place.isdecimal() else ("file", place)
            seen.add(slot, self._number(frame), mask)
        frames = [frame for _, frame, _ in asked.frames]
        for context in {one.context for one in held.values()} - {_ALONE}:
            for t, mask in enumerate(masks):
                window = " ".join(frames[s] for s in context.window(t, len(frames)))
                seen.contents[context].add((self._number(window), mask))
        if seen.source is None and asked.source is not None:
            seen.source = Source.from_json(dict(asked.source))
        for space, draws in asked.wanted.items():
            seen.wanted[space].update(draws)
            for draw, origin in draws.items() if space in held else ():
                held[space].cells[draw].update(())
                held[space].origins[draw].add(origin)

    def _number(self, digest: str) -> int:
        return self._numbers.setdefault(digest, len(self._numbers))

    def _draw(self, operations: JSON) -> str:
        text = repr(operations)
        if text not in self._draws:
            self._draws[text] = canonical_json(operations)
        return self._draws[text]

    def movies(self) -> list[KnownMovie]:
        same: dict[frozenset[tuple[Context, SeenByModel]], list[_Place]] = defaultdict(list)
        for place, seen in self._by_place().items():
            made_of = {context: SeenByModel.of(pairs) for context, pairs in seen.contents.items()}
            same[frozenset(made_of.items())].append(place)
        found = [self._movie(sorted(places), dict(made_of)) for made_of, places in same.items()]
        counts = Counter(name for movie in found for name in movie.names)
        told = [_tell_apart(movie) if counts[movie.names[0]] > 1 else movie for movie in found]
        return sorted(told, key=lambda movie: movie.names)

    def _by_place(self) -> Mapping[_Place, _Seen]:
        """Give what was seen; what came from no file with the one movie of its name that did."""
        for name in [name for name, place in self._seen if not place]:
            others = [one for one in self._seen if one[0] == name and one[1]]
            if len(others) == 1:
                self._seen[others[0]].join(self._seen.pop((name, "")))
        return self._seen

    def _movie(
        self, places: Sequence[_Place], contents: Mapping[Context, SeenByModel]
    ) -> KnownMovie:
        names, pairs = sorted({name for name, _ in places}), contents[_ALONE].pairs
        first, wanted = self._seen[places[0]], dict[str, frozenset[str]]()
        for place in places:
            for space, draws in self._seen[place].wanted.items():
                wanted[space] = wanted.get(space, frozenset()) | draws
        source = first.source
        if source is None and all(kind == "file" for kind, _ in first.slots):
            source = _guess_source(names[0], bool(pairs))
        regions = summarize([self._regions[pair] for pair in pairs if pair in self._regions])
        slots, versions = len(first.slots), first.versions
        return KnownMovie(tuple(names), slots, versions, source, contents, regions, wanted)


def _place_of(name: str, source: Any) -> _Place:
    """Tell movies of one name apart, parts of one aside: by file and channel, if from any."""
    if not isinstance(source, dict):
        return name, ""
    told = (source.get(one) for one in ("path", "channel", "downscale_spatial"))
    return name, " ".join(map(str, told))


def _tell_apart(movie: KnownMovie) -> KnownMovie:
    """Add to names that several movies have how each is opened."""
    if movie.source is None:
        return movie
    size = movie.source.downscale_spatial
    how = quote_movie(movie.source) + (f", downscaled by {size}" if size != 1 else "")
    return replace(movie, names=tuple(f"{name} ({how})" for name in movie.names))


def _guess_source(name: str, masked: bool) -> Source:
    """Take a movie's name apart: what was written before 0.2 says no more."""
    path, _, detections = name.rpartition(" ")
    named = masked and path and "/" not in detections
    return Source(path, detections) if named else Source(name)


def _cover(name: str, held: _Held, movies: Sequence[KnownMovie]) -> Coverage:
    masked = held.spec["pooling"] is not None
    columns = _find_columns(held.origins)
    cells = [held.cells[column.draw] for column in columns]
    covered = [movie.cover(held.context, masked) for movie in movies]
    counts = tuple(tuple(len(contents & cell) for cell in cells) for contents, _ in covered)
    wanted = tuple(
        tuple(
            count > 0 or not movie.wanted or column.draw in movie.wanted.get(name, ())
            for column, count in zip(columns, own, strict=True)
        )
        for movie, own in zip(movies, counts, strict=True)
    )
    expected = tuple(expected for _, expected in covered)
    return Coverage(name, held.spec, columns, counts, expected, wanted)


def _find_columns(origins: Mapping[str, Iterable[str]]) -> tuple[Column, ...]:
    """Sort draws into groups; those that are no numbered copies are numbered here."""
    columns, others = [], []
    for draw, names in origins.items():
        copies = [found for name in names if (found := _ORIGIN.fullmatch(name))]
        if draw == _IDENTITY:
            columns.append(Column(CopyGroup(0), 0, draw))
        elif copies:
            named = min(copies, key=lambda found: (found[3], int(found[2]), int(found[1])))
            group = CopyGroup(1, named[3], int(named[2]))
            columns.append(Column(group, int(named[1]), draw))
        else:
            others.append(draw)
    columns += [Column(CopyGroup(2), i, draw) for i, draw in enumerate(sorted(others), start=1)]
    return tuple(sorted(columns, key=lambda column: (column.group, column.number)))
