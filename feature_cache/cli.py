"""The command ``feature-cache``: a thin shell over the library.

Exit status: 0 done, 1 part of it failed, 2 wrong use or nothing could be done.
"""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .errors import FeatureCacheError

if TYPE_CHECKING:
    from .backbones.base import Backbone
    from .cache import FeatureCache

app = typer.Typer(
    name="feature-cache",
    help="A content-hashed cache of foundation-model features for training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)

CacheOption = Annotated[
    Path, typer.Option("--cache", envvar="FEATURE_CACHE_DIR", help="The cache's folder.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BackboneOption = Annotated[str, typer.Option(help="See: feature-cache backbones.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="A checkpoint file, or random:<seed>; default: the model's own."),
]
PoolingOption = Annotated[
    str, typer.Option(help="How a region's vector is made; 'none' keeps grids.")
]
DetectionsOption = Annotated[str, typer.Option(help="Where the masks are.")]
DtypeOption = Annotated[str, typer.Option(help="Storage: float16 or float32.")]
SeedOption = Annotated[int, typer.Option(help="Of the augmented copies.")]
PolicyOption = Annotated[
    str, typer.Option(help="Of the copies: none, flips, geometric, intensity or default.")
]
MOVIES = typer.Argument(metavar="MOVIE…", help="Folders of frames, such as data/01.")


def main() -> None:
    """Run the command line; errors of ours become one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.showwarning = _show_warning
    try:
        app()
    except FeatureCacheError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)


@app.command()
def warm(
    movies: Annotated[list[str], MOVIES],
    cache: CacheOption,
    backbone: BackboneOption,
    weights: WeightsOption = None,
    pooling: PoolingOption = "mean_patches_exact",
    detections: DetectionsOption = "TRA",
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: the best.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Frames embedded at once.")] = 8,
    dtype: DtypeOption = "float16",
    codec: Annotated[str, typer.Option(help="Storage: raw, zstd or blosc.")] = "raw",
    copies: Annotated[int, typer.Option(help="Augmented copies, beside the movie itself.")] = 0,
    seed: SeedOption = 0,
    policy: PolicyOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Compute the features of movies that are not in the cache yet.

    Example: feature-cache warm data/01 data/02 --cache features --backbone efficientnet-lite0
    """
    from .augment import Augmentations
    from .warm import open_movies, plan_warm, run_warm

    augmentations = Augmentations(policy, copies, seed)
    model, pooled = _load(backbone, weights, device, pooling, dtype, codec)
    opened, failures = open_movies(movies, detections if pooled else None)
    if not opened:
        raise _NoMovieError("; ".join(failure.reason for failure in failures))
    store = _open_cache(cache, codec)
    with _bar("hashing", sum(map(len, opened))) as bar:
        plan = plan_warm(
            store,
            opened,
            model,
            pooling=pooled,
            dtype=dtype,
            augmentations=augmentations,
            failures=failures,
            progress=bar.update,
        )
    with _bar("computing", plan.missing) as bar:
        report = run_warm(plan, batch_size=batch_size, progress=bar.update)
    store.counter.save()
    for failure in report.failures:
        typer.echo(f"failed: {failure.reason}", err=True)
    if as_json:
        typer.echo(json.dumps(report.to_json()))
    else:
        typer.echo(
            f"{report.planned} records: {report.present} were there, {report.computed} computed, "
            f"{report.failed} failed, {report.seconds:.1f} s"
        )
    if report.failed:
        raise typer.Exit(1 if report.present + report.computed else 2)


class _NoMovieError(FeatureCacheError):
    """No movie could be opened."""


def _open_cache(root: Path, codec: str) -> FeatureCache:
    """Open a cache for warming; one that can only be read will do where nothing is missing."""
    from .cache import FeatureCache
    from .errors import ReadOnlyCacheError

    try:
        return FeatureCache(root, codec=codec)
    except ReadOnlyCacheError as error:
        if not (root / "zarr.json").exists():
            raise
        logging.getLogger(__name__).info("%s", error)
        return FeatureCache(root, "r", codec)


def _load(
    backbone: str,
    weights: str | None,
    device: str | None,
    pooling: str,
    dtype: str,
    codec: str = "raw",
) -> tuple[Backbone, str | None]:
    """Load a backbone, and find mistakes in names before anything is read or written."""
    from .backbones import load_backbone
    from .errors import UnknownNameError
    from .spec import SpaceSpec
    from .store import CODECS

    model, pooled = load_backbone(backbone, weights, device), None if pooling == "none" else pooling
    if codec not in CODECS:
        raise UnknownNameError("codec", codec, CODECS)
    SpaceSpec(model.spec, pooled, dtype)
    return model, pooled


def _bar(what: str, total: int) -> Any:
    from tqdm import tqdm

    return tqdm(
        total=total, desc=what, unit="frame", file=sys.stderr, disable=not total or not sys.stderr
    )


@app.command()
def explain(
    movie: Annotated[str, typer.Argument(metavar="MOVIE", help="A folder of frames.")],
    cache: CacheOption,
    backbone: BackboneOption,
    weights: WeightsOption = None,
    pooling: PoolingOption = "mean_patches_exact",
    detections: DetectionsOption = "TRA",
    dtype: DtypeOption = "float16",
    copy: Annotated[int, typer.Option(help="Explain this augmented copy.")] = 0,
    seed: SeedOption = 0,
    policy: PolicyOption = "default",
    frame: Annotated[int | None, typer.Option(help="Only this frame.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say why each record of a movie is in the cache or not. Computes nothing.

    Example: feature-cache explain data/01 --cache features --backbone efficientnet-lite0 --copy 9
    """
    from .augment import Augmentations
    from .cache import FeatureCache
    from .errors import MovieError
    from .movies import Movie

    augmentations = Augmentations(policy, copies=copy, seed=seed)
    model, pooled = _load(backbone, weights, None, pooling, dtype)
    opened = Movie.open(movie, detections if pooled else None)
    frames = range(len(opened)) if frame is None else [frame]
    if frame is not None and frame not in range(len(opened)):
        raise MovieError(f"{movie} has no frame {frame}: expected 0 to {len(opened) - 1}")
    features = FeatureCache(cache, "r").movie(
        opened.frames, opened.masks, model, pooling=pooled, dtype=dtype, name=opened.name
    )
    explanations = features.explain(augmentations, copy, frames)
    if as_json:
        typer.echo(json.dumps([explanation.to_json() for explanation in explanations]))
    else:
        for explanation in explanations:
            typer.echo(str(explanation))


@app.command()
def inspect(
    what: Annotated[
        str, typer.Argument(help="Beginning of a space's or pack's name, or of a record's key.")
    ],
    cache: CacheOption,
) -> None:
    """Show one space, pack or record in full, as JSON.

    Example: feature-cache inspect efficientnet --cache features
    """
    from .store import Store
    from .store import inspect as look

    typer.echo(json.dumps(look(Store(cache, "r"), what), indent=2))


@app.command("ls")
def list_spaces(cache: CacheOption, as_json: JsonOption = False) -> None:
    """List the spaces of a cache: one for each backbone, pooling and dtype."""
    from .store import Store

    rows = [
        {
            "space": space.path.name,
            "backbone": space.spec["backbone"]["name"],
            "pooling": (space.spec["pooling"] or {}).get("name", "none"),
            "dtype": space.spec["dtype"],
            "records": len(space),
            "packs": len(space.pack_names()),
            "bytes": space.disk_bytes(),
        }
        for space in Store(cache, "r").spaces()
    ]
    _print_table(rows, as_json)


@app.command()
def stats(cache: CacheOption, as_json: JsonOption = False) -> None:
    """Count what is in a cache, and how it was used by all processes so far."""
    from .cache import FeatureCache

    counts = FeatureCache(cache, "r").stats(lifetime=True)
    if as_json:
        typer.echo(json.dumps(counts))
        return
    for name, value in counts.items():
        typer.echo(f"{name:<9} {_size(value) if name == 'bytes' else f'{value:,}'}")


@app.command()
def backbones(as_json: JsonOption = False) -> None:
    """List the backbones, and how to install those that are not."""
    from .backbones import list_backbones

    rows = [
        {
            "name": info.name,
            "width": info.width,
            "stride": info.stride,
            "input": info.input,
            "licence": info.licence,
            "installed": "yes" if info.installed else info.install,
        }
        for info in list_backbones()
    ]
    _print_table(rows, as_json)


def _print_table(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        typer.echo("nothing here yet")
        return
    texts = [[_cell(name, value) for name, value in row.items()] for row in rows]
    lines = [list(rows[0]), *texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (text.ljust(width) for text, width in zip(line, widths, strict=True))
        typer.echo("  ".join(cells).rstrip())


def _cell(name: str, value: object) -> str:
    if name == "bytes" and isinstance(value, int):
        return _size(value)
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _size(count: int) -> str:
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


if __name__ == "__main__":
    main()
