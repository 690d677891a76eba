"""Records computed again and compared: the only way to find wrong numbers with a right checksum."""

from __future__ import annotations

import json
import logging
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .augment import Draw
from .backbones.from_spec import load_alike
from .engine import Decoded, Frame, Model, compute_each
from .errors import (
    BackboneError,
    CorruptRecordError,
    FeatureCacheError,
    MovieError,
    MovieNotFoundError,
)
from .hashing import (
    JSON,
    Digest,
    canonical_json,
    frame_digest,
    frame_pixels,
    mask_digest,
    mask_labels,
)
from .key import Record, record_key
from .movies import Movie, Source
from .rounding import difference, rounding_bound
from .spec import KEY_VERSION, TABLES, BackboneSpec, SpaceSpec, describe, differences
from .store import Pack, Space, read_provenance
from .store.maintenance import Finding, name_source
from .store.pack_contents import read_keys

if TYPE_CHECKING:
    from .backbones.base import Backbone

Progress = Callable[[int], None]
"""Called with the number of records just dealt with."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Records of one pack that are to be computed again."""

    space: Space
    pack: str
    rows: tuple[int, ...]


@dataclass(slots=True)
class Recomputed:
    """What computing again has shown.

    Attributes
    ----------
    agree : int
        Records whose numbers are those stored, up to rounding (`feature_cache.rounding`).
    wrong : list of Finding
        One for each record whose numbers are not.
    unknown : Counter of (str, str)
        Records that could not be compared, by what is gone or changed (``"movie"``, ``"weights"``,
        ``"record"``; ``"error"`` where computing failed) and the reason.
    """

    agree: int = 0
    wrong: list[Finding] = field(default_factory=list)
    unknown: Counter[tuple[str, str]] = field(default_factory=Counter)

    def to_json(self) -> dict[str, JSON]:
        """Give all counts by name."""
        unknown: list[JSON] = [
            {"what": what, "reason": reason, "records": count}
            for (what, reason), count in self.unknown.most_common()
        ]
        return {"agree": self.agree, "wrong": len(self.wrong), "unknown": unknown}

    def __str__(self) -> str:
        """Say it in one line."""
        unknown = self.unknown.total()
        text = f"{self.agree + len(self.wrong) + unknown:,} records computed again: "
        text += f"{self.agree:,} agree, {len(self.wrong):,} differ"
        kinds = Counter[str]()
        for (what, _), count in self.unknown.items():
            kinds[what] += count
        parts = [f"{count:,} {_UNKNOWN[what]}" for what, count in sorted(kinds.items())]
        return ", ".join([text, *parts])


_UNKNOWN = {
    "movie": "can't be compared, as their movie is gone or changed",
    "weights": "can't be compared, as their weights are gone or changed",
    "record": "are gone or damaged",
    "error": "can't be computed",
}


def choose_records(spaces: Sequence[Space], count: int | None, seed: int = 0) -> list[Chosen]:
    """Choose records at random, as many of one space as of another; all copies of each that is.

    Spaces of tables, which no backbone computes, are left out.

    Parameters
    ----------
    spaces : sequence of Space
        Refreshed.
    count : int or None
        How many records; None for all.
    seed : int
        Another one chooses others.

    Raises
    ------
    ValueError
        A count below 1.
    """
    if count is not None and count < 1:
        raise ValueError(f"{count} records to compute again: expected 1 or more")
    spaces = [space for space in spaces if space.spec["backbone"]["layer"] != TABLES]
    held = [_list_keys(space) for space in spaces]
    sizes = [len({key for keys in packs.values() for key in keys}) for packs in held]
    shares = sizes if count is None else _share(count, sizes)
    rng = np.random.default_rng(seed)
    chosen = []
    for space, packs, size, share in zip(spaces, held, sizes, shares, strict=True):
        numbers: dict[bytes, int] = {}
        wanted = set(rng.choice(size, share, replace=False).tolist()) if size else set()
        for name, keys in packs.items():
            places = [numbers.setdefault(key, len(numbers)) for key in keys]
            rows = tuple(row for row, number in enumerate(places) if number in wanted)
            if rows:
                chosen.append(Chosen(space, name, rows))
    return chosen


def _list_keys(space: Space) -> dict[str, list[bytes]]:
    """Give the keys of each pack; what is damaged is for `verify`."""
    found = {}
    for name in space.walk_packs():
        try:
            found[name] = [key.tobytes() for key in read_keys(space.packs_folder / name)]
        except (FileNotFoundError, CorruptRecordError) as error:
            _log.warning("%s: its records are not computed again", error)
    return found


def _share(count: int, sizes: Sequence[int]) -> list[int]:
    """Divide evenly; what a small space hasn't got, the larger ones give."""
    shares, left = [0] * len(sizes), count
    order = sorted(range(len(sizes)), key=sizes.__getitem__)
    for place, i in enumerate(order):
        shares[i] = min(sizes[i], left // (len(order) - place))
        left -= shares[i]
    return shares


def recompute(
    chosen: Sequence[Chosen],
    *,
    backbones: Sequence[Backbone] = (),
    weights: Sequence[str] = (),
    device: str | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Recomputed:
    """Compute records again from their movies, and compare the numbers. Changes nothing.

    Parameters
    ----------
    chosen : sequence of Chosen
    backbones : sequence of Backbone
        Used for the spaces whose backbone they are; others are loaded as their specs say.
    weights : sequence of str
        Checkpoints, or ``random:<seed>``, to try for those that are loaded; then the models' own.
    device : str, optional
        As `load_backbone`.
    batch_size : int
        Frames embedded at once.
    progress : callable, optional

    Raises
    ------
    StoreError
        The cache can't be read.
    """
    comparison = _Comparison(_Models(backbones, weights, device), batch_size, progress)
    for one in chosen:
        comparison.of_pack(one)
    return comparison.found


@dataclass(frozen=True, slots=True)
class _Row:
    """A record, as its pack says where it is from."""

    key: bytes
    record: Record
    source: Mapping[str, Any]

    @property
    def name(self) -> str:
        return name_source(self.source)


def _order(row: _Row) -> str:
    """Bring records of one movie and draw together."""
    return canonical_json([row.source.get(name) for name in ("source", "movie", "draw")])


class _Comparison:
    """Compares pack after pack, each movie and draw of it at once."""

    def __init__(self, models: _Models, batch_size: int, progress: Progress | None) -> None:
        self.models, self.batch_size, self.progress = models, batch_size, progress
        self.found, self._open = Recomputed(), lru_cache(maxsize=32)(_open_movie)

    def of_pack(self, chosen: Chosen) -> None:
        """Compare records of one pack."""
        try:
            spec, model = self.models.find(chosen.space.spec)
            rows = list(self._read_rows(chosen))
        except BackboneError as error:
            reason = f"{describe(chosen.space.spec)}: {error}"
            self._leave("weights", reason, len(chosen.rows))
        except (FileNotFoundError, CorruptRecordError) as error:
            self._leave("record", str(error), len(chosen.rows))
        else:
            folder = chosen.space.packs_folder / chosen.pack
            for _, group in groupby(sorted(rows, key=_order), _order):
                self._of_movie(folder, list(group), spec, model)

    def _read_rows(self, chosen: Chosen) -> Iterator[_Row]:
        """Read records of a pack; those that are damaged are left."""
        pack = Pack(chosen.space.packs_folder / chosen.pack)
        sources = read_provenance(pack.path)["records"]
        sources += [{}] * (len(pack) - len(sources))
        for row in chosen.rows:
            try:
                record = pack.record(row)
            except (FileNotFoundError, CorruptRecordError) as error:
                self._leave("record", str(error), 1)
            else:
                yield _Row(pack.keys[row].tobytes(), record, sources[row])

    def _of_movie(self, pack: Path, rows: Sequence[_Row], spec: SpaceSpec, model: Model) -> None:
        try:
            how = {name: rows[0].source.get(name) for name in ("source", "movie")}
            movie = self._open(canonical_json(how), spec.pooling is not None)
            draw = Draw.from_json(rows[0].source.get("draw"))
        except FeatureCacheError as error:
            self._leave("movie", str(error), len(rows))
            return
        taken, decoded = deque[_Row](), Decoded()
        frames = self._frames(movie, draw, rows, spec, taken, decoded)
        for _, record in compute_each(frames, model, spec, draw, self.batch_size):
            row = taken.popleft()
            if isinstance(record, FeatureCacheError):
                self._leave("error", str(record), 1)
            else:
                self._compare(pack, row, record, spec)

    def _frames(
        self,
        movie: Movie,
        draw: Draw,
        rows: Sequence[_Row],
        spec: SpaceSpec,
        taken: deque[_Row],
        decoded: Decoded,
    ) -> Iterator[Frame]:
        """Read the frames of records; those that are others by now are left."""
        for row in rows:
            try:
                frame, key = _read_frame(movie, row, spec, draw, decoded)
            except FeatureCacheError as error:
                self._leave("movie", str(error), 1)
                continue
            if key != row.key:
                self._leave("movie", f"{movie.name} has other pixels or labels by now", 1)
                continue
            taken.append(row)
            yield frame

    def _compare(self, pack: Path, row: _Row, again: Record, spec: SpaceSpec) -> None:
        apart, bound = difference(row.record, again), rounding_bound(spec)
        if apart <= bound:
            self.found.agree += 1
        else:
            self.found.wrong.append(_describe(pack, row, apart, bound))
        self._tell(1)

    def _leave(self, what: str, reason: str, count: int) -> None:
        self.found.unknown[what, reason] += count
        self._tell(count)

    def _tell(self, count: int) -> None:
        if self.progress is not None:
            self.progress(count)


def _open_movie(text: str, masked: bool) -> Movie:
    """Open the movie of a record again, from what its writer said.

    Errors as `Movie.open`; MovieNotFoundError also where the movie was never in files.
    """
    told = json.loads(text)
    if told["source"] is not None:
        how = {**told["source"], **({} if masked else {"detections": None, "masks": None})}
        try:
            return Source.from_json(how).open()
        except TypeError as error:
            raise MovieError(f"{how} is no way to open a movie here: {error}") from error
    if not told["movie"]:
        raise MovieNotFoundError("what was computed from arrays can't be read again")
    path, _, detections = str(told["movie"]).rpartition(" ")
    try:
        return Movie.open(path, detections=detections if masked else None)
    except MovieError as error:
        with suppress(MovieError):  # a name without detections
            return Movie.open(str(told["movie"]), detections="TRA" if masked else None)
        raise error


def _read_frame(
    movie: Movie, row: _Row, spec: SpaceSpec, draw: Draw, decoded: Decoded
) -> tuple[Frame, Digest]:
    """Read the frame of a record, and give the key that it has now; the memo is not asked."""

    def read_pixels(t: int) -> Frame:
        pixels = frame_pixels(movie.frames[t], row.name)
        return Frame(pixels, None, frame_digest(pixels), row.name)

    t, context = _find_frame(movie, row.source), spec.backbone.context
    seen = decoded.take(context.window(t, len(movie)), read_pixels)
    own, mask = seen[context.before], None
    if spec.pooling is not None and movie.masks is not None:
        mask = mask_labels(movie.masks[t], row.name)
    frame = Frame(own.pixels, mask, own.digest, row.name, seen if any(context) else ())
    masked = None if mask is None else mask_digest(mask)
    return frame, record_key(spec.digest, frame.seen_digest, masked, draw)


def _find_frame(movie: Movie, source: Mapping[str, Any]) -> int:
    """Find a frame by its file's name, where it has one; else by its number."""
    t, file = source.get("frame"), source.get("file")
    if type(t) is int and 0 <= t < len(movie) and file in ("", None, movie.frames.name_of(t)):
        return t
    for other in range(len(movie)) if file else ():
        if movie.frames.name_of(other) == file:
            return other
    raise MovieError(f"{movie.name} has no frame {file or t} any more")


def _describe(pack: Path, row: _Row, apart: float, bound: float) -> Finding:
    how = (
        f"its numbers are up to {apart:.3g} of the largest in a vector from those computed again, "
        f"and rounding explains {bound:.3g}"
    )
    if not math.isfinite(apart):
        how = "its labels, shape or dtype are others than those computed again"
    message = (
        f"record {row.key.hex()} ({row.name}) is wrong, though its checksum is right: {how}; "
        "repair sets it aside, and keeps the others of its pack"
    )
    details: dict[str, JSON] = {
        "movie": row.source.get("movie"),
        "frame": row.source.get("frame"),
        "draw": row.source.get("draw"),
        "difference": apart if math.isfinite(apart) else None,
        "bound": bound,
    }
    return Finding("wrong", pack, message, (row.name,), row.key.hex(), details)


class _Models:
    """The backbones of spaces, each loaded once; or why there is none."""

    def __init__(
        self, given: Sequence[Backbone], weights: Sequence[str], device: str | None
    ) -> None:
        self._given, self._device = given, device
        self._weights: list[str | None] = [*weights, None]
        self._found: dict[str, tuple[SpaceSpec, Model] | BackboneError] = {}

    def find(self, plain: Mapping[str, Any]) -> tuple[SpaceSpec, Model]:
        """Give a space's spec and what computes for it; BackboneError where there is no such."""
        name = canonical_json(plain)
        if name not in self._found:
            try:
                spec = _read_spec(plain)
                self._found[name] = spec, Model(self._load(spec.backbone), (spec.backbone,))
            except BackboneError as error:
                self._found[name] = error
        found = self._found[name]
        if isinstance(found, BackboneError):
            raise found
        return found

    def _load(self, spec: BackboneSpec) -> Backbone:
        for backbone in self._given:
            if backbone.spec == spec:
                return backbone
        reason = ""
        for weights in self._weights:
            try:
                loaded = load_alike(spec, weights, self._device)
                unlike = list(differences(spec.to_json(), loaded.spec.to_json(), _WORDS))
            except FeatureCacheError as error:
                unlike = [str(error)]
            if not unlike:
                return loaded
            reason = f"with {weights or 'its own weights'}: {'; '.join(unlike)}"
        raise BackboneError(reason)


_WORDS = ("when it was computed", "now")


def _read_spec(plain: Mapping[str, Any]) -> SpaceSpec:
    """Build a space's spec from what its folder holds; the same comes back from it."""
    version = plain.get("key_version")
    if version != KEY_VERSION:
        raise BackboneError(f"key version {version}, and this feature_cache has {KEY_VERSION}")
    try:
        pooling = plain["pooling"] and plain["pooling"]["name"]
        spec = SpaceSpec(BackboneSpec.from_json(plain["backbone"]), pooling, plain["dtype"])
    except (KeyError, TypeError, ValueError, LookupError) as error:
        raise BackboneError(f"its spec is none of this feature_cache: {error}") from error
    unlike = list(differences(plain, spec.to_json(), _WORDS))
    if unlike:
        raise BackboneError("; ".join(unlike))
    return spec
