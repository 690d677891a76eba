"""Commands that draw: report, show."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..output_files import check_file, write_file
from .options import (
    COPIES,
    FEATURES,
    AxesOption,
    CacheOption,
    ChannelOption,
    ComputeDtypeOption,
    DetectionsOption,
    DtypeOption,
    LayersOption,
    MasksOption,
    NoMemoOption,
    PolicyOption,
    PoolingOption,
    SeedOption,
    WeightsOption,
    complete_backbone,
    refuse_without,
)
from .output import count_text, make_bar, size_text

if TYPE_CHECKING:
    from ..cache import FeatureCache
    from ..movies import Source
    from ..report import Choice, Strip
    from ..store.maintenance import Finding

_MOST_FRAMES = 24
AnyBackboneOption = Annotated[
    str | None,
    typer.Option(
        help="Whose features; default: the only one that is stored.",
        autocompletion=complete_backbone,
        rich_help_panel=FEATURES,
    ),
]
CopyOption = Annotated[
    int, typer.Option(min=0, help="Show this augmented copy.", rich_help_panel=COPIES)
]


_DRAWN = (
    *("frames", "backbone", "weights", "pooling", "detections", "masks", "channel", "axes"),
    *("compute_dtype", "dtype", "copy", "seed", "policy", "layer"),
)
"""Options of `report` that say how a movie is drawn."""


def report(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(metavar="OUT.html", help="The page to write.")],
    cache: CacheOption,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare all records with their checksums, too.")
    ] = False,
    movie: Annotated[
        list[str], typer.Option(help="Draw frames of this movie. May be repeated.")
    ] = [],
    frames: Annotated[
        int, typer.Option(min=1, max=_MOST_FRAMES, help="How many, from its middle.")
    ] = 6,
    backbone: AnyBackboneOption = None,
    weights: WeightsOption = None,
    pooling: PoolingOption = "mean_patches_exact",
    detections: DetectionsOption = "TRA",
    masks: MasksOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    compute_dtype: ComputeDtypeOption = None,
    dtype: DtypeOption = "float16",
    copy: CopyOption = 0,
    seed: SeedOption = 0,
    policy: PolicyOption = "default",
    layer: LayersOption = [],
    no_memo: NoMemoOption = False,
) -> None:
    """Write one page of HTML: what a cache holds, its use and health. Computes nothing.

    Exit status 0 when the page is written, also where --verify finds damage; 1 when a --movie is
    left out of it.

    Example: feature-cache report cache.html --cache features
    """
    from ..backbones.name import name_with_dtype
    from ..cache import FeatureCache
    from ..movies import Source
    from ..report import Choice, render_page, survey_cache
    from ..report.page import load_templates

    refuse_without(context, "movie", _DRAWN)
    check_file(out)
    load_templates()  # what is missing for the page is said before all is verified
    opened = FeatureCache(cache, "r", layers=layer)
    strips: list[Strip] = []
    failed: dict[str, str] = {}
    if movie:
        pooled = _pooling_of(pooling)
        name = name_with_dtype(backbone or _only_backbone(opened), compute_dtype)
        choice = Choice(name, weights, pooled, dtype, policy, seed, copy)
        if masks is not None and len(movie) > 1:
            raise typer.BadParameter("--masks is for one --movie")
        sources = [
            Source(path, detections, masks=masks, channel=channel, axes=axes) for path in movie
        ]
        strips, failed = _look_at_all(opened, sources, choice, frames)
    findings = _verify(cache) if verify else None
    page = render_page(survey_cache(opened.store, findings), strips)
    write_file(out, page)
    typer.echo(f"{out}, {size_text(len(page))}")
    if findings:
        found = count_text(len(findings), "problem")
        typer.echo(f"{found} found: see the page, or run feature-cache verify", err=True)
    for path, reason in failed.items():
        typer.echo(f"left out: {path}: {reason}", err=True)
    if failed:
        raise typer.Exit(1)


def _verify(cache: Path) -> list[Finding]:
    from ..store import maintenance

    with make_bar("verifying", maintenance.count_packs(cache), "pack") as bar:
        found = maintenance.verify(cache, progress=bar.update)
    return [finding for finding in found if finding.is_wrong]


def _only_backbone(cache: FeatureCache) -> str:
    from ..hashing import canonical_json
    from ..report.warm_command import WarmOptions
    from ..spec import TABLES

    found = {
        canonical_json(space.spec["backbone"]): space.spec
        for space in cache.spaces()
        if space.spec["backbone"]["layer"] != TABLES
    }
    names = sorted({str(spec["backbone"]["name"]) for spec in found.values()})
    if len(found) > 1:  # layers, say: each has a name of its own
        names = sorted({WarmOptions.of_spec(spec, "").backbone for spec in found.values()})
    if len(names) != 1:
        raise typer.BadParameter(f"name a --backbone; stored: {', '.join(names) or 'none'}")
    return names[0]


def _pooling_of(name: str) -> str | None:
    return None if name == "none" else name


def _look_at_all(
    cache: FeatureCache, movies: Sequence[Source], choice: Choice, frames: int
) -> tuple[list[Strip], dict[str, str]]:
    """Look at each movie; say why for those that can't be read."""
    from ..errors import FrameError, MovieError
    from ..report import look_at

    strips, failed = [], {}
    for source in movies:
        try:
            strips.append(look_at(cache, source, choice, frames))
        except (MovieError, FrameError) as error:
            failed[source.path] = str(error)
    return strips, failed


def show(
    movie: Annotated[str, typer.Argument(metavar="MOVIE", help="A folder of frames.")],
    cache: CacheOption,
    frame: Annotated[int, typer.Option(help="Which frame, counted from 0.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The picture's file, a PNG.")
    ] = None,
    backbone: AnyBackboneOption = None,
    weights: WeightsOption = None,
    pooling: PoolingOption = "mean_patches_exact",
    detections: DetectionsOption = "TRA",
    masks: MasksOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    compute_dtype: ComputeDtypeOption = None,
    dtype: DtypeOption = "float16",
    copy: CopyOption = 0,
    seed: SeedOption = 0,
    policy: PolicyOption = "default",
    layer: LayersOption = [],
    no_memo: NoMemoOption = False,
) -> None:
    """Draw one frame beside its embedding, as a picture. Computes nothing.

    Exit status 1 where its record is not in the cache.
    Example: feature-cache show data/01 --cache features --frame 3
    """
    from ..backbones.name import name_with_dtype
    from ..cache import FeatureCache
    from ..movies import Source
    from ..report import Choice, compose_picture, draw_in_terminal, fit_palette, look_at
    from ..report.thumbnails import encode_png

    file = output or Path(_default_name(movie, frame, copy))
    _check_apart(file, movie)
    check_file(file)
    opened = FeatureCache(cache, "r", layers=layer)
    pooled = _pooling_of(pooling)
    name = name_with_dtype(backbone or _only_backbone(opened), compute_dtype)
    choice = Choice(name, weights, pooled, dtype, policy, seed, copy)
    source = Source(movie, detections, masks=masks, channel=channel, axes=axes)
    strip = look_at(opened, source, choice, [frame])
    if strip.missing:
        typer.echo(
            f"error: frame {frame} of {strip.movie} is not in the cache: {strip.space} "
            f"has no record of it; to warm it: {strip.command}",
            err=True,
        )
        raise typer.Exit(1)
    picture = compose_picture(strip.frames[0], fit_palette(strip))
    write_file(file, encode_png(picture))
    if _has_colours():
        columns, _ = shutil.get_terminal_size()
        typer.echo(draw_in_terminal(picture, columns), nl=False)
    typer.echo(str(file))


def _check_apart(file: Path, movie: str) -> None:
    """Refuse a picture among the frames of a movie, which is no movie then."""
    from ..movies.formats import image_folder, is_pattern

    place = Path(movie).expanduser()
    frames = place.parent if is_pattern(place) else image_folder(place)
    if file.absolute().parent.resolve() == frames.resolve():
        raise typer.BadParameter(
            f"{file} would lie among the frames of {movie}: name another place (--output)"
        )


def _default_name(movie: str, frame: int, copy: int) -> str:
    stem = f"{Path(movie).absolute().name}-frame-{frame}"
    return f"{stem}-copy-{copy}.png" if copy else f"{stem}.png"


def _has_colours() -> bool:
    """Tell whether someone looks, at a terminal with 24-bit colours."""
    said = os.environ.get("COLORTERM", "")
    return sys.stdout.isatty() and said in ("truecolor", "24bit") and "NO_COLOR" not in os.environ
