"""Movies as commands name, open and show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from .output import count_text

if TYPE_CHECKING:
    from ..movies import Movie, Row, Source
    from ..warm import Failure

MOVIES = typer.Argument(
    metavar="[MOVIE…]",
    help="Folders of frames such as data/01, patterns, lists (.txt, .yaml), or a training "
    "configuration of Trackastra.",
)


def find_movies(
    words: Sequence[str], detections: Sequence[str | None], options: Mapping[str, Any]
) -> tuple[list[tuple[Source, Movie]], list[Failure]]:
    """Open the movies that words name; give those with where each is from, and what failed."""
    from ..warm import Failure
    from ..warm.sources import find_sources, open_sources

    found, failures = find_sources(words, detections, options)
    count = len({source.path for source in found})
    if options["masks"] is not None and count > 1:
        raise typer.BadParameter(
            f"--masks is for one movie, and {count} are named; put a pattern in quotes, or give "
            "each movie of a list its own (masks: …)"
        )
    opened, unopened = open_sources(found)
    failures += unopened
    if not opened and not failures:
        failures.append(Failure(" ".join(words), "the lists given name no movie", 1))
    return opened, failures


def pairs_text(frames: int, rows: Sequence[Row]) -> str:
    """Say which frames and masks belong together, given the first and last rows of a movie."""
    if not rows:
        return "no frames"
    text = f"{count_text(frames, 'frame')}, {_from_to([row.frame for row in rows])}"
    masks = [row.mask for row in rows if row.mask is not None]
    if not masks:
        return f"{text}, no masks"
    return f"{text} with {'masks' if frames > 1 else 'mask'} {_from_to(masks)}"


def _from_to(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} … {names[-1]}"
