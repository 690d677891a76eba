"""Commands that load a backbone: warm, explain."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import FeatureCacheError
from .options import (
    BackboneOption,
    CacheOption,
    DetectionsOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    NoMemoOption,
    PolicyOption,
    PoolingOption,
    SeedOption,
    WeightsOption,
)
from .output import make_bar

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..cache import FeatureCache

MOVIES = typer.Argument(metavar="MOVIE…", help="Folders of frames, such as data/01.")


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
    layer: LayersOption = [],
    no_memo: NoMemoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the features of movies that are not in the cache yet.

    Example: feature-cache warm data/01 data/02 --cache features --backbone efficientnet-lite0
    """
    from ..augment import Augmentations
    from ..warm import open_movies, plan_warm, run_warm

    augmentations = Augmentations(policy, copies, seed)
    model, pooled = _load(backbone, weights, device, pooling, dtype, codec)
    opened, failures = open_movies(movies, detections if pooled else None)
    if not opened:
        raise _NoMovieError("; ".join(failure.reason for failure in failures))
    store = _open_cache(cache, codec, layer)
    with make_bar("hashing", sum(map(len, opened))) as bar:
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
    with make_bar("computing", plan.missing) as bar:
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


def _open_cache(root: Path, codec: str, layers: Sequence[str] = ()) -> FeatureCache:
    """Open a cache for warming; one that can only be read will do where nothing is missing."""
    from ..cache import FeatureCache
    from ..errors import ReadOnlyCacheError

    try:
        return FeatureCache(root, codec=codec, layers=layers)
    except ReadOnlyCacheError as error:
        if not (root / "zarr.json").exists():
            raise
        logging.getLogger(__name__).info("%s", error)
        return FeatureCache(root, "r", codec, layers=layers)


def _load(
    backbone: str,
    weights: str | None,
    device: str | None,
    pooling: str,
    dtype: str,
    codec: str = "raw",
) -> tuple[Backbone, str | None]:
    """Load a backbone, and find mistakes in names before anything is read or written."""
    from ..backbones import load_backbone
    from ..errors import UnknownNameError
    from ..spec import SpaceSpec
    from ..store import CODECS

    model, pooled = load_backbone(backbone, weights, device), None if pooling == "none" else pooling
    if codec not in CODECS:
        raise UnknownNameError("codec", codec, CODECS)
    SpaceSpec(model.spec, pooled, dtype)
    return model, pooled


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
    layer: LayersOption = [],
    no_memo: NoMemoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say why each record of a movie is in the cache or not. Computes nothing.

    Example: feature-cache explain data/01 --cache features --backbone efficientnet-lite0 --copy 9
    """
    from ..augment import Augmentations
    from ..cache import FeatureCache
    from ..errors import MovieError
    from ..movies import Movie

    augmentations = Augmentations(policy, copies=copy, seed=seed)
    model, pooled = _load(backbone, weights, None, pooling, dtype)
    opened = Movie.open(movie, detections if pooled else None)
    frames = range(len(opened)) if frame is None else [frame]
    if frame is not None and frame not in range(len(opened)):
        raise MovieError(f"{movie} has no frame {frame}: expected 0 to {len(opened) - 1}")
    features = FeatureCache(cache, "r", layers=layer).movie(
        opened.frames, opened.masks, model, pooling=pooled, dtype=dtype, name=opened.name
    )
    explanations = features.explain(augmentations, copy, frames)
    if as_json:
        typer.echo(json.dumps([explanation.to_json() for explanation in explanations]))
    else:
        for explanation in explanations:
            typer.echo(str(explanation))
