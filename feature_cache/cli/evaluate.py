"""The command evaluate: which features tell these cells apart."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..output_files import check_file, write_file
from .movies import MOVIES, find_movies
from .options import (
    COMPUTING,
    FEATURES,
    OUTPUT,
    AxesOption,
    BatchOption,
    CacheOption,
    ChannelOption,
    DetectionsOption,
    DtypeOption,
    JsonOption,
    MasksOption,
    NoMemoOption,
    complete_backbone,
    complete_pooling,
    parse_batch_size,
)
from .output import align_table
from .progress import RunProgress, show_failures

if TYPE_CHECKING:
    from ..evaluation import Evaluation, Step


def evaluate(
    movies: Annotated[list[str], MOVIES],
    cache: CacheOption,
    backbone: Annotated[
        list[str],
        typer.Option(
            help="With options behind it, as NAME?layer=stride-8. May be repeated.",
            autocompletion=complete_backbone,
            rich_help_panel=FEATURES,
        ),
    ],
    layer: Annotated[
        list[str],
        typer.Option(
            help="Compare each backbone at this layer. May be repeated.", rich_help_panel=FEATURES
        ),
    ] = [],
    pooling: Annotated[
        list[str],
        typer.Option(
            help="How a region's vector is made. May be repeated.",
            autocompletion=complete_pooling,
            rich_help_panel=FEATURES,
        ),
    ] = ["mean_patches_exact"],
    step: Annotated[
        list[int],
        typer.Option(min=1, help="Link to so many frames before. May be repeated."),
    ] = [1],
    no_random: Annotated[
        bool,
        typer.Option(
            "--no-random",
            help="Leave out each network with random weights.",
            rich_help_panel=FEATURES,
        ),
    ] = False,
    detections: DetectionsOption = "TRA",
    masks: MasksOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="Such as cuda:0; default: the best.", rich_help_panel=COMPUTING),
    ] = None,
    batch_size: BatchOption = "auto",
    dtype: DtypeOption = "float16",
    page: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.html", help="Write a page with a plot, too.", rich_help_panel=OUTPUT
        ),
    ] = None,
    below: Annotated[
        list[str],
        typer.Option(
            envvar="FEATURE_CACHE_LAYERS",
            help="A cache below, only read: a folder, or a pushed-to URL. May be repeated.",
        ),
    ] = [],
    no_memo: NoMemoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say which features tell the cells of movies apart, before any training.

    The share of cells whose parent, by man_track.txt or else by overlap, is found among those
    within reach: by position; by position and shape; by features alone; by features with what of
    position and shape finds most. What is embedded for it is in the cache afterwards.

    Example: feature-cache evaluate data/01 --cache features --backbone efficientnet-lite0
    --step 1 --step 4
    """
    from ..cache import open_to_fill
    from ..errors import MovieError
    from ..evaluation import evaluate as compare

    check_file(page)
    if page is not None:
        from ..report.page import load_templates

        load_templates()  # what is missing for the page is said before anything is computed
    options = {"masks": masks, "channel": channel, "axes": axes}
    opened, failures = find_movies(movies, [detections], options)
    if not opened:
        raise MovieError("; ".join(failure.reason for failure in failures))
    found = compare(
        [movie for _, movie in opened],
        backbone,
        open_to_fill(cache, layers=below) if below else cache,  # made when all else is in order
        layers=layer,
        poolings=pooling,
        steps=step,
        random_weights=not no_random,
        device=device,
        dtype=dtype,
        batch_size=parse_batch_size(batch_size),
        progress=lambda name, records: RunProgress(name, records),
    )
    if page is not None:
        from ..report import render_evaluation

        write_file(page, render_evaluation(found))
    if as_json:
        typer.echo(json.dumps(found.to_json()))
    else:
        _show(found)
    show_failures(tuple(failures))
    if failures:
        raise typer.Exit(1)


def _show(found: Evaluation) -> None:
    for movie, truth in found.movies.items():
        why = "; there is no man_track.txt" if truth == "overlap" else ""
        typer.echo(f"{movie}: links from {truth}{why}")
    for step in found.steps:
        typer.echo(f"\n{step.describe()}")
        for line in align_table(list(_rows(step))):
            typer.echo(line)
        typer.echo(step.verdict)
    typer.echo(f"\n{found.verdict}")


def _rows(step: Step) -> Iterator[dict[str, Any]]:
    simple = (
        ("position", step.position, None),
        ("position and shape", step.shape, step.shape_gain),
    )
    for name, share, gain in simple:
        yield {
            "features": name,
            "pooling": "-",
            "alone": "-",
            "combined": str(share),
            "gain": None if gain is None else gain.signed(),
            "s a frame": None,
            "bytes a frame": None,
        }
    for score in step.ranking:
        setup = score.setup
        yield {
            "features": setup.features,
            "pooling": setup.pooling,
            "alone": f"{score.alone.value:.3f}",
            "combined": str(score.combined),
            "gain": score.gain.signed(),
            "s a frame": None if setup.seconds is None else f"{setup.seconds:.3g}",
            "bytes a frame": round(setup.bytes),
        }
