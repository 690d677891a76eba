"""Commands of a tracker's life: train, track."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import (
    AxesOption,
    CacheOption,
    ChannelOption,
    DetectionsOption,
    JsonOption,
    MasksOption,
    WeightsOption,
)
from .output import print_table


def train(context: typer.Context) -> None:
    """Train or fine-tune Trackastra on cached features, out of a CONFIG as for its train.py.

    The options are Trackastra's; feature-cache train --help lists them all.

    Example: feature-cache train train.yaml --cache features --epochs 100
    """
    from ..trackastra.train import main

    main(context.args, "feature-cache train")


def track(
    movie: Annotated[str, typer.Argument(metavar="MOVIE", help="A folder, or a stack.")],
    cache: CacheOption,
    model: Annotated[str, typer.Option(help="A model's folder, or one of Trackastra's by name.")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where tracks are written; default: beside the movie."),
    ] = None,
    mode: Annotated[str, typer.Option(help="Of linking: greedy, greedy_nodiv or ilp.")] = "greedy",
    threshold: Annotated[
        float,
        typer.Option(min=0, max=1, help="The least weight of a link that the greedy modes take."),
    ] = 0.5,
    weights: WeightsOption = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda; default: the best.")] = None,
    detections: DetectionsOption = "TRA",
    masks: MasksOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Track the cells of a movie by a trained model, on cached features of the model's own kind.

    Writes masks and tracks as in the Cell Tracking Challenge, and tracks.zarr (GEFF); where the
    movie has tracks of its own, the two are compared.

    Example: feature-cache track data/01 --model runs/hela --cache features
    """
    from ..movies import Movie
    from ..trackastra.track import track_movie

    opened = Movie.open(movie, masks, channel, axes, detections=None if masks else detections)
    folder = output or opened.root.with_name(f"{opened.root.name}_RES")
    found = track_movie(
        opened, model, cache, folder, mode=mode, threshold=threshold, weights=weights, device=device
    )
    if as_json:
        typer.echo(json.dumps(found))
        return
    left = found["unlinked"]
    rest = f"; {left:,} cells have no link, and are left out (--threshold)" if left else ""
    typer.echo(f"{found['tracks']:,} tracks of {found['cells']:,} cells: {folder}{rest}")
    if found["scores"]:
        print_table([{k: f"{v:.4g}" for k, v in found["scores"].items()}], False)
