"""The report as one page of HTML, with all that it needs in it."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import importing
from ..hashing import JSON
from ..units import count_text, size_text, time_text
from .colours import Directions, Palette
from .coverage import Coverage, KnownMovie
from .frame_pictures import FrameView, Strip
from .health import AGES
from .outlines import trace_outlines
from .overview import Report
from .thumbnails import data_uri, shrink_factor, shrink_image, to_bytes
from .warm_command import quote_movie

if TYPE_CHECKING:
    from jinja2 import Environment

LONGEST_SIDE = 640
"""Of a frame in the page, in pixels."""

MOST_REGIONS = 4000
"""Of a strip that can be compared: the page holds their vectors, 256 bytes each."""

_TEMPLATES = Path(__file__).parent / "templates"
_UNITS = 2
"""Of a path for each pixel that is shown."""


def render_page(report: Report, strips: Sequence[Strip] = ()) -> str:
    """Write a report as HTML. It loads nothing, and names are never taken as markup.

    Parameters
    ----------
    report : Report
    strips : sequence of Strip
        Of `feature_cache.report.look_at`; of each, up to `MOST_REGIONS` regions can be compared.

    Raises
    ------
    MissingDependencyError
        The extra ``report`` is not installed.
    """
    environment = load_templates()
    script = (_TEMPLATES / "script.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    return environment.get_template("report.html").render(
        report=report,
        ages=AGES,
        coverage=_coverage_json(report),
        first_space=_fullest(report.coverage),
        most_bytes=max((space.bytes for space in report.spaces), default=0),
        strips=[_Drawing(strip).page_strip() for strip in strips],
        script=script,
        script_digest=base64.b64encode(digest).decode(),
        style=load_style(),
    )


def load_style() -> str:
    """Read the style of our pages."""
    return (_TEMPLATES / "style.css").read_text(encoding="utf-8")


@cache
def load_templates() -> Environment:
    """Make what fills in our pages; MissingDependencyError without the extra ``report``."""
    with importing("jinja2", "the report", 'pip install "feature-cache[report]"'):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    loader = FileSystemLoader(_TEMPLATES)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    environment.filters |= {
        "pretty": lambda value: json.dumps(value, indent=2),
        "share": lambda part, whole: f"{100 * part / (whole or 1):.1f}%",
        "size": size_text,
        "time": time_text,
    }
    return environment


def _fullest(coverage: Sequence[Coverage]) -> int:
    """Choose the space that is shown first: that with most copies."""
    sizes = [(len(one.columns), -i) for i, one in enumerate(coverage)]
    return -max(sizes)[1] if sizes else 0


def _coverage_json(report: Report) -> JSON:
    return {
        "movies": [
            {
                "names": movie.names,
                "frames": movie.slots,
                "versions": movie.versions,
                "regions": movie.regions,
                "argument": _argument_of(movie),
            }
            for movie in report.movies
        ],
        "spaces": [
            {
                "counts": one.counts,
                "expected": one.expected,
                "wanted": one.wanted,
                "groups": list(_groups_json(one, str(report.root))),
            }
            for one in report.coverage
        ],
    }


def _argument_of(movie: KnownMovie) -> str | None:
    """Write a movie as the command ``warm`` takes it; None where it can't be told that."""
    source = movie.source
    return None if source is None or source.downscale_spatial != 1 else quote_movie(source)


def _groups_json(coverage: Coverage, root: str) -> Iterator[JSON]:
    for group, columns in groupby(coverage.columns, lambda column: column.group):
        yield {
            "label": group.label,
            "copies": group.rank > 0,
            "command": coverage.command(group, root),
            "columns": [{"label": str(c.number), "draw": c.draw} for c in columns],
        }


@dataclass(frozen=True, slots=True)
class _PageRegion:
    """A region as the page draws it; its row is that of its vector."""

    label: int
    path: str
    row: int | None
    colour: str


@dataclass(frozen=True, slots=True)
class _PageFrame:
    """A frame as the page draws it, in units of its paths."""

    number: int
    caption: str
    width: float
    height: float
    image: str
    grid: str
    stored: bool
    regions: tuple[_PageRegion, ...]

    @property
    def outlines(self) -> str:
        return "".join(region.path for region in self.regions)


@dataclass(frozen=True, slots=True)
class _PageStrip:
    """A strip as the page draws it."""

    title: str
    note: str
    missing: str
    command: str
    frames: tuple[_PageFrame, ...]
    likeness: JSON


class _Drawing:
    """Turns a strip into what the page needs, with one palette and one set of directions."""

    def __init__(self, strip: Strip) -> None:
        self.strip = strip
        self.palette = fit_palette(strip)
        self._compared = list(_choose_compared(strip.frames))
        stored = [view.regions.features for view in self._compared if view.regions is not None]
        self._directions = Directions.of(np.concatenate(stored)) if stored else None
        counts = [len(features) for features in stored]
        starts = np.cumsum([0, *counts])[:-1].tolist() if counts else []
        numbers = [view.number for view in self._compared]
        self._starts = dict(zip(numbers, starts, strict=True))

    def page_strip(self) -> _PageStrip:
        strip, absent = self.strip, len(self.strip.missing)
        return _PageStrip(
            title=f"{strip.movie}, {strip.copy}" if strip.copy else strip.movie,
            note=" · ".join(self._notes()),
            missing=f"{absent} of {len(strip.frames)} records shown are not in the cache.",
            command=strip.command if absent else "",
            frames=tuple(map(self._draw_frame, strip.frames)),
            likeness=self._likeness(),
        )

    def _notes(self) -> Iterator[str]:
        yield self.strip.space
        if self.strip.slice is not None:
            yield f"slice {self.strip.slice[0] + 1} of {self.strip.slice[1]}"
        if self._directions is not None:
            rows = len(self._directions.numbers)
            yield f"cosines of {rows:,} regions, within {self._directions.error:.3f}"
            if left := sum(v.regions is not None for v in self.strip.frames) - len(self._compared):
                yield f"{left} frames are too many to be compared"

    def _likeness(self) -> JSON:
        if self._directions is None:
            return None
        numbers = self._directions.numbers
        return {
            "vectors": base64.b64encode(numbers.tobytes()).decode(),
            "width": numbers.shape[1],
            "scale": self._directions.scale,
            "frames": [
                {"number": view.number, "labels": _labels_of(view).tolist()}
                for view in self._compared
            ],
        }

    def _draw_frame(self, view: FrameView) -> _PageFrame:
        height, width = view.image.shape
        factor = shrink_factor((height, width), LONGEST_SIDE)
        scale = _UNITS / factor
        grid = ""
        if view.grid is not None and self.palette is not None:
            grid = data_uri(self.palette.colour(view.grid), lossless=True)
        return _PageFrame(
            number=view.number,
            caption=_describe(view),
            width=round(width * scale, 2),
            height=round(height * scale, 2),
            image=data_uri(to_bytes(shrink_image(view.image, factor))),
            grid=grid,
            stored=view.regions is not None,
            regions=tuple(self._draw_regions(view, scale)),
        )

    def _draw_regions(self, view: FrameView, scale: float) -> Iterator[_PageRegion]:
        if view.mask is None:
            return
        labels, start = _labels_of(view).tolist(), self._starts.get(view.number)
        rows = {label: row for row, label in enumerate(labels)}
        colours = self._colours(view)
        for label, path in trace_outlines(view.mask, scale).items():
            row = rows.get(label)
            colour = "" if row is None else colours[row]
            place = None if row is None or start is None else start + row
            yield _PageRegion(label, path, place, colour)

    def _colours(self, view: FrameView) -> list[str]:
        if view.regions is None or self.palette is None:
            return []
        rgb = self.palette.colour(view.regions.features)
        return [f"#{colour.tobytes().hex()}" for colour in rgb]


def fit_palette(strip: Strip) -> Palette | None:
    """Find one palette for all that is stored of a strip; None where nothing is."""
    parts: list[NDArray[Any]] = []
    for view in strip.frames:
        parts += [view.grid] if view.grid is not None else []
        parts += [view.regions.features] if view.regions is not None else []
    return Palette.fit(parts) if parts else None


def _choose_compared(views: Sequence[FrameView]) -> Iterator[FrameView]:
    """Give the frames with regions, as long as these are not too many."""
    total = 0
    for view in views:
        if view.regions is None:
            continue
        total += len(_labels_of(view))
        if total > MOST_REGIONS:
            return
        yield view


def _labels_of(view: FrameView) -> NDArray[np.int32]:
    if view.regions is None or view.regions.labels is None:
        return np.zeros(0, np.int32)
    return view.regions.labels


def _describe(view: FrameView) -> str:
    parts = [f"Frame {view.number}", view.file]
    if view.regions is not None:
        parts.append(count_text(len(_labels_of(view)), "region"))
    if view.grid is not None:
        parts.append("grid {}×{}".format(*view.grid.shape))
    return " · ".join(parts)
