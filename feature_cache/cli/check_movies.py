"""The command that looks whether movies are what they should be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .movies import MOVIES, find_movies, pairs_text
from .options import (
    FEATURES,
    MOVIE,
    AxesOption,
    ChannelOption,
    JsonOption,
    ManyDetectionsOption,
    MasksOption,
    complete_backbone,
)
from .output import align_table, regions_text
from .progress import RunProgress

if TYPE_CHECKING:
    from ..movies import Movie, MovieCheck, Row
    from ..spec import BackboneSpec
    from ..warm import Failure

FramesOnlyOption = Annotated[
    bool, typer.Option("--frames-only", help="Look for no masks.", rich_help_panel=MOVIE)
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="Read three frames of each movie, and no tracks.")
]
TableOption = Annotated[
    bool, typer.Option("--table", help="List the frame and the mask of every time.")
]


CheckedBackboneOption = Annotated[
    str | None,
    typer.Option(
        help="Whether its grid tells the regions apart, too.",
        autocompletion=complete_backbone,
        rich_help_panel=FEATURES,
    ),
]


def check(
    movies: Annotated[list[str], MOVIES],
    detections: ManyDetectionsOption = ["TRA"],
    masks: MasksOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    backbone: CheckedBackboneOption = None,
    frames_only: FramesOnlyOption = False,
    quick: QuickOption = False,
    table: TableOption = False,
    as_json: JsonOption = False,
) -> None:
    """Look whether movies are what they should be, and say what to do where not.

    Names the frame and mask that belong together, and the least, median and most regions a frame.

    Exit status: 1 something is wrong, 2 nothing could be looked at.

    Example: feature-cache check data/01 data/02 --detections TRA
    """
    if frames_only and masks is not None:
        raise typer.BadParameter("--frames-only and --masks: choose one")
    options = {"masks": masks, "channel": channel, "axes": axes}
    wanted: list[str | None] = [None] if frames_only else [*detections]
    found, failures = find_movies(movies, wanted, options)
    specs = _specs_of(backbone)
    checked = [*_check_all([movie for _, movie in found], quick, specs), *map(_unopened, failures)]
    if as_json:
        typer.echo(json.dumps([one.to_json() for one in checked]))
    else:
        _print(checked, table)
    if not any(one.found.looked for one in checked):
        raise typer.Exit(2)
    if any(one.found.problems for one in checked):
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Checked:
    """What was found of a movie, and what belongs together in it."""

    found: MovieCheck
    rows: Sequence[Row] = ()

    @property
    def times(self) -> list[int]:
        return [row.time for row in self.rows if row.time is not None]

    def to_json(self) -> dict[str, Any]:
        pairs = [asdict(row) for row in self.rows]
        return {**self.found.to_json(), "times": self.times, "pairs": pairs}

    def to_row(self) -> dict[str, object]:
        found, times = self.found, self.times
        whole = found.looked == found.frames
        return {
            "movie": found.movie,
            "frames": found.frames if whole else f"{found.looked:,} of {found.frames:,}",
            "times": f"{times[0]} to {times[-1]}" if times else None,
            "shape": "x".join(map(str, found.shape)) or None,
            "dtype": found.dtype or None,
            "regions, least / median / most": found.regions and regions_text(found.regions),
            "problems": len(found.problems),
        }

    def details(self, table: bool) -> Iterator[str]:
        if self.rows:
            yield pairs_text(len(self.rows), self.rows)
        if self.rows and table:
            yield from align_table([asdict(row) for row in self.rows])
        yield from map(str, self.found.problems)


def _specs_of(backbone: str | None) -> Sequence[BackboneSpec]:
    """Give the specs of a backbone's layers, whose weights need not be there."""
    from ..backbones.from_spec import describe_all

    return () if backbone is None else describe_all(backbone)


def _check_all(
    movies: Sequence[Movie], quick: bool, specs: Sequence[BackboneSpec]
) -> list[_Checked]:
    from ..movies.check import QUICK_FRAMES

    frames = sum(min(len(movie), QUICK_FRAMES) if quick else len(movie) for movie in movies)
    with RunProgress("checking", frames, "frame") as progress:
        return [
            _Checked(
                _add_cells(movie.check(quick=quick, progress=progress.update), movie, specs),
                movie.table(),
            )
            for movie in movies
        ]


def _add_cells(found: MovieCheck, movie: Movie, specs: Sequence[BackboneSpec]) -> MovieCheck:
    """Add a problem for each grid whose cells are larger than the regions."""
    from ..movies import Problem
    from ..warm.small_regions import say_small_regions

    texts = [text for spec in specs if (text := say_small_regions(movie, spec))]
    problems = [Problem("regions smaller than a cell", text) for text in texts]
    return replace(found, problems=(*found.problems, *problems))


def _unopened(failure: Failure) -> _Checked:
    from ..movies import MovieCheck, Problem

    return _Checked(
        MovieCheck(failure.what, 0, problems=(Problem("can't be opened", failure.reason),))
    )


def _print(checked: Sequence[_Checked], table: bool) -> None:
    head, *lines = align_table([one.to_row() for one in checked])
    typer.echo(head)
    for line, one in zip(lines, checked, strict=True):
        typer.echo(line)
        for text in one.details(table):
            typer.echo(f"  {text}")
