"""Why was this a hit, or a miss? The difference with the nearest space and record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from .hashing import JSON, canonical_json
from .spec import describe, differences, short_text

if TYPE_CHECKING:
    from .store import Asked


@dataclass(frozen=True, slots=True)
class Explanation:
    """Why one frame's record was found, or not.

    Attributes
    ----------
    what : str
        The frame.
    key : str
        Hex key of its record.
    hit : bool
    reason : str
        For a miss, what differs from the nearest that is stored, asked against stored.
    """

    what: str
    key: str
    hit: bool
    reason: str

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        return asdict(self)

    def __str__(self) -> str:
        """Write one line for people."""
        return f"{'hit ' if self.hit else 'miss'} {self.what}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Stored:
    """A space as it is on disk: its spec, the sources of its records, and what was asked for.

    Attributes
    ----------
    spec : mapping
    sources : sequence of mapping
        As the records say: for whoever stored them first.
    name : str
        Of the space.
    asked : sequence of Asked
        Movies that were asked for, in this space among others.
    """

    spec: Mapping[str, Any]
    sources: Sequence[Mapping[str, Any]]
    name: str = ""
    asked: Sequence[Asked] = ()

    def was_asked(self, source: Mapping[str, Any]) -> bool:
        """Tell whether this very record was asked for."""
        return any(movie.asked_for(self.name)(source) for movie in self.asked)

    def frames_of(self, movie: str) -> Iterator[tuple[str, str]]:
        """Give place and digest of a movie's frames as records name them, and as asked for."""
        for row in self.sources:
            if row.get("movie") == movie:
                yield _place(row), str(row.get("frame_digest"))
        there = {row.get("frame_digest") for row in self.sources}
        for asked in self.asked:
            if asked.movie == movie:
                yield from ((place, frame) for place, frame, _ in asked.frames if frame in there)


def _place(source: Mapping[str, Any]) -> str:
    return str(source.get("file") or source.get("frame"))


def explain_miss(
    spec: Mapping[str, Any],
    source: Mapping[str, Any],
    spaces: Sequence[Stored],
    copies_present: Sequence[int],
    *,
    is_known: bool = False,
) -> str:
    """Say how a request differs from the nearest that is stored.

    Parameters
    ----------
    spec : mapping
        The space that was asked for, as JSON.
    source : mapping
        The record that was asked for: `MovieFeatures.provenance`.
    spaces : sequence of Stored
        All there are.
    copies_present : sequence of int
        Which copies of the same augmentations are stored for this frame.
    is_known : bool
        Whether other frames of the movie are stored, whatever its name.
    """
    asked = canonical_json(spec)
    own = [s for s in spaces if canonical_json(s.spec) == asked]
    for stored in own:
        reason = _nearest_record(source, stored, copies_present)
        if reason:
            return reason
    others = [s for s in spaces if canonical_json(s.spec) != asked]
    same_frame = [s for s in others if _matching(s.sources, source, "frame_digest")]
    nearest = min(
        same_frame or others, key=lambda s: len(list(differences(s.spec, spec))), default=None
    )
    if own and not same_frame:
        movie = source["movie"]
        named = movie and any(True for stored in own for _ in stored.frames_of(movie))
        what = (
            "only other frames of this movie were"
            if is_known or named
            else "neither this frame nor this movie was ever"
        )
        return f"{what} computed with this backbone and pooling"
    if nearest is None:
        return "the cache is empty"
    listed = "; ".join(_differences(nearest.spec, spec))
    stands = "this frame is stored" if same_frame else "nothing is stored"
    where = "in" if same_frame else "with this spec; nearest is"
    return f"{stands} {where} the space {describe(nearest.spec)!r}, where {listed}"


def _differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> Sequence[str]:
    """List what differs; of another backbone its name alone, from which the rest follows."""
    names = [spec["backbone"]["name"] for spec in (stored, asked)]
    if names[0] != names[1]:
        return [f"the backbone is another: {names[0]} stored, {names[1]} asked"]
    return [*differences(stored, asked)]


def _nearest_record(source: Mapping[str, Any], stored: Stored, copies: Sequence[int]) -> str:
    """Describe the nearest record of the same space; empty if none is near."""
    if stored.was_asked(source):
        return "it was asked for, and was not computed yet, or gc has let go of it"
    sources = stored.sources
    same = _matching(sources, source, "frame_digest", "mask_digest")
    if same and all(row.get("window") != source.get("window") for row in same):
        return "the frames around it, which the backbone sees with it, differ from those stored"
    if same:
        return _other_draw(source, same, copies)
    same = _matching(sources, source, "frame_digest")
    if same:
        found = short_text(same[-1]["mask_digest"])
        return f"labels differ from the mask stored with this frame: {found} stored, " + (
            f"{short_text(source['mask_digest'])} asked"
        )
    named = stored.frames_of(source["movie"]) if source["movie"] else ()
    before = [frame for place, frame in named if place == _place(source)]
    if before:
        found = short_text(before[-1])
        return f"pixels differ from the record stored for this frame before: {found} stored, " + (
            f"{short_text(source['frame_digest'])} asked"
        )
    return ""


def _other_draw(
    source: Mapping[str, Any], same: Sequence[Mapping[str, Any]], copies: Sequence[int]
) -> str:
    if source["origin"] and copies:
        told = f"{_ranges(copies)} were"
        if not any(copies):
            others = {str(row.get("origin") or "").partition(" of ")[2] for row in same} - {""}
            also = f", and copies of {', '.join(sorted(others))}" if others else ""
            told = f"the movie itself was{also}"
        return f"{source['origin']} was never warmed ({told})"
    asked = canonical_json(source["draw"])
    stored = sorted({canonical_json(row["draw"]) for row in same}, key=len)
    return f"draw differs: {', '.join(stored[:3])} stored, {asked} asked"


def _matching(
    sources: Sequence[Mapping[str, Any]], source: Mapping[str, Any], *fields: str
) -> list[Mapping[str, Any]]:
    return [row for row in sources if all(row.get(f) == source[f] for f in fields)]


def _ranges(numbers: Sequence[int]) -> str:
    """Write numbers as ranges: 0-3, 7."""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{p[0]}-{p[-1]}" if len(p) > 1 else str(p[0]) for p in parts)
