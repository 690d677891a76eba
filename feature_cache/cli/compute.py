"""Commands that load a backbone: warm, explain."""

from __future__ import annotations

import json
import logging
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FeatureCacheError, MovieNotFoundError
from ..output_files import check_file, write_file
from .movies import MOVIES, find_movies, pairs_text
from .options import (
    COMPUTING,
    COPIES,
    FEATURES,
    OUTPUT,
    AxesOption,
    BackboneOption,
    BatchOption,
    CacheOption,
    ChannelOption,
    CodecOption,
    ComputeDtypeOption,
    DetectionsOption,
    DtypeOption,
    JsonOption,
    LayersOption,
    ManyDetectionsOption,
    MasksOption,
    NoMemoOption,
    PolicyOption,
    PoolingOption,
    SeedOption,
    WeightsOption,
    complete,
    complete_backbone,
    complete_pooling,
    parse_batch_size,
    refuse_without,
    size_option,
)
from .output import count_text, print_table, regions_text, size_text
from .progress import LogFile, RunProgress, show_failures

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..cache import FeatureCache
    from ..warm import Failure, Recipe, WarmPlan, WarmReport

PoolingsOption = Annotated[
    list[str],
    typer.Option(
        help="How a region's vector is made; 'none' keeps grids. May be repeated.",
        autocompletion=complete_pooling,
        rich_help_panel=FEATURES,
    ),
]
GridsBackboneOption = Annotated[
    str | None,
    typer.Option(
        help="See feature-cache backbones; options behind it, as NAME?dtype=bfloat16.",
        autocompletion=complete_backbone,
        rich_help_panel=FEATURES,
    ),
]
DenseOption = Annotated[
    str,
    typer.Option(
        help="Keep grids too, in float32: none, original or all (copies).",
        autocompletion=complete(lambda: ("none", "original", "all")),
        rich_help_panel=FEATURES,
    ),
]
FromGridsOption = Annotated[
    bool,
    typer.Option(
        "--from-grids", help="Pool from stored grids; load no model.", rich_help_panel=FEATURES
    ),
]
CopiesOption = Annotated[
    int, typer.Option(help="How many, beside the movie itself.", rich_help_panel=COPIES)
]
CopyOption = Annotated[
    int, typer.Option(help="Explain this augmented copy.", rich_help_panel=COPIES)
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        help="Such as cuda:0 or cuda:0,cuda:1; default: the best.", rich_help_panel=COMPUTING
    ),
]
SchedulerOption = Annotated[
    str | None,
    typer.Option(
        help="Of a running Dask cluster, such as tcp://node:8786.", rich_help_panel=COMPUTING
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Processes to start here, one for each GPU.", rich_help_panel=COMPUTING
    ),
]
MaxSizeOption = Annotated[
    int | None,
    size_option("Stop before the cache takes more, such as 500G.", rich_help_panel=OUTPUT),
]
PushOption = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Send what is committed there: s3://…, file://…",
        rich_help_panel=OUTPUT,
    ),
]
LogOption = Annotated[
    Path | None, typer.Option(help="Append what happens to this file.", rich_help_panel=OUTPUT)
]
ReportOption = Annotated[
    Path | None, typer.Option(help="Write the outcome there, as JSON.", rich_help_panel=OUTPUT)
]


def warm(
    context: typer.Context,
    movies: Annotated[list[str], MOVIES],
    cache: CacheOption,
    backbone: GridsBackboneOption = None,
    weights: WeightsOption = None,
    pooling: PoolingsOption = ["mean_patches_exact"],
    detections: ManyDetectionsOption = ["TRA"],
    masks: MasksOption = None,
    channel: ChannelOption = None,
    axes: AxesOption = None,
    device: DeviceOption = None,
    compute_dtype: ComputeDtypeOption = None,
    batch_size: BatchOption = "auto",
    dtype: DtypeOption = "float16",
    codec: CodecOption = "raw",
    copies: CopiesOption = 0,
    seed: SeedOption = 0,
    policy: PolicyOption = "default",
    dense: DenseOption = "none",
    from_grids: FromGridsOption = False,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what is missing.")] = False,
    scheduler: SchedulerOption = None,
    local_workers: WorkersOption = None,
    max_size: MaxSizeOption = None,
    push: PushOption = None,
    log: LogOption = None,
    report: ReportOption = None,
    layer: LayersOption = [],
    no_memo: NoMemoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Compute the features of movies that are not in the cache yet.

    Example: feature-cache warm data/01 data/02 --cache features --backbone efficientnet-lite0
    """
    from ..augment import Augmentations
    from ..backbones.name import name_with_dtype
    from ..cache import open_to_fill
    from ..train_options import find_training
    from ..warm import WarmReport, plan_warm

    check_file(report)
    training = find_training(movies)
    refuse_without(context, "copies", () if training else ("policy", "seed"))
    if backbone is None and not from_grids and (lost := [*filter(_is_lost, movies)]):
        raise MovieNotFoundError(f"no such file: {lost[0]}")  # before a backbone is asked for
    if training is not None:
        said = _said_by(training, backbone if from_grids else "")
        for name in said:
            source = context.get_parameter_source(name)
            if source is not None and source.name != "DEFAULT":
                said[name] = context.params[name]
        if said["backbone"] is None and not from_grids:
            built, unbuilt = _build_training(training, cache, plan)
            _show_report(WarmReport(0, 0, 0, 0.0, unbuilt), as_json, report, built)
            return
        backbone, weights, pooling, copies, seed, policy = said.values()
    named = backbone and name_with_dtype(backbone, compute_dtype)
    where = _Where(named, weights, device, scheduler, local_workers)
    where.check(from_grids, dense)
    at_once = parse_batch_size(batch_size)
    augmentations = Augmentations(policy, copies, seed)
    poolings = [None if name == "none" else name for name in pooling]
    with LogFile(log):
        store, model = _open(cache, codec, layer, where, from_grids)
        _check_names(model, poolings, dtype, codec, dense)
        _check_remote(push)
        masked = any(name is not None for name in poolings)
        options = {"masks": masks if masked else None, "channel": channel, "axes": axes}
        opened, failures = find_movies(movies, detections if masked else [None], options)
        if not opened:
            raise _NoMovieError("; ".join(failure.reason for failure in failures))
        frames = sum(len(movie) for _, movie in opened)
        if store is None and plan:
            store = _open_to_plan(context, cache, codec, layer)
        store = store or open_to_fill(cache, codec, layer)
        apart = set() if training is None else {*training.input_val} - {*training.input_train}
        with RunProgress("hashing", frames, "frame") as progress:
            work = plan_warm(
                store,
                [source for source, _ in opened],
                model,
                pooling=poolings,
                dtype=dtype,
                augmentations=augmentations,
                without_copies=[
                    one for one, _ in opened if str(Path(one.path).expanduser()) in apart
                ],
                dense=dense,
                failures=failures,
                progress=progress.update,
            )
        if plan:
            _show_plan(work, as_json, report)
        else:
            done = _run(work, where, model, at_once, max_size, push)
            store.counter.save()
            if training is not None and store.store.mode == "a":
                _, unbuilt = _build_training(training, cache, plan)
                done = replace(done, failures=(*done.failures, *unbuilt))
            _show_report(done, as_json, report)


def _said_by(training: Namespace, backbone: str | None) -> dict[str, Any]:
    """Give what a training's configuration says of the options of `warm`, in their order."""
    from ..train_options import PRETRAINED, copies_of

    named = training.pretrained_feats_model if training.features in PRETRAINED else None
    return {
        "backbone": backbone or named,
        "weights": training.weights,
        "pooling": [training.pretrained_feats_mode],
        "copies": copies_of(vars(training)),
        "seed": training.seed,
        "policy": training.policy,
    }


def _build_training(training: Namespace, root: Path, plan: bool) -> tuple[int, tuple[Failure, ...]]:
    """Build the training data of a configuration that the cache lacks; where trackastra is.

    Gives of how many movies, and what failed: what was computed before is told all the same.
    """
    from ..warm import Failure

    if plan or find_spec("trackastra") is None:
        return 0, ()
    try:
        from ..trackastra.training_data import warm_training_data

        count, failures = warm_training_data(training, root)
    except FeatureCacheError as error:
        return 0, (Failure("training data", str(error), 0),)
    typer.echo(f"training data of {count_text(count, 'movie')} built", err=True)
    return count, failures


def _is_lost(word: str) -> bool:
    file = Path(word).expanduser()
    return file.suffix.lower() in (".yaml", ".yml") and not file.exists()


@dataclass(frozen=True)
class _Where:
    """By which name a backbone is loaded, and where it computes."""

    backbone: str | None
    weights: str | None
    device: str | None
    scheduler: str | None
    local_workers: int | None

    def check(self, from_grids: bool, dense: str) -> None:
        if self.backbone is None and not from_grids:
            raise typer.BadParameter("name a --backbone, or pool --from-grids")
        if self.backbone is None and self.weights is not None:
            raise typer.BadParameter("--weights of which network? Name its --backbone, too")
        if from_grids and dense != "none":
            raise typer.BadParameter("--from-grids reads grids, --dense makes them: choose one")
        if self.scheduler is not None and self.local_workers is not None:
            raise typer.BadParameter("--scheduler and --local-workers: choose one")
        if self.scheduler is not None and len(self.devices) > 1:
            raise typer.BadParameter("several devices: workers of a cluster have one each")

    @property
    def workers(self) -> int | None:
        """How many to start: one a device, where several are named; None for this process."""
        several = len(self.devices) if len(self.devices) > 1 else None
        return self.local_workers or several

    @property
    def is_cluster(self) -> bool:
        return self.scheduler is not None or self.workers is not None

    @property
    def devices(self) -> list[str]:
        return self.device.split(",") if self.device else []

    def recipe(self) -> Recipe:
        from ..warm import Recipe

        return Recipe(str(self.backbone), self.weights, self.device)

    def load(self) -> Backbone:
        return self.recipe().load()


def _open(
    root: Path, codec: str, layers: Sequence[str], where: _Where, from_grids: bool
) -> tuple[FeatureCache | None, Backbone]:
    """Find what stands for the backbone; only stored grids need the cache for that."""
    if not from_grids:
        return None, where.load()
    from ..backbones.name import join_name, split_name
    from ..cache import FeatureCache, open_to_fill
    from ..warm import StoredGrids

    FeatureCache(root, "r")
    cache, named = open_to_fill(root, codec, layers), where.backbone
    if named is not None and where.weights is not None:
        name, told = split_name(named)
        named = join_name(name, {**told, "weights": where.weights})
    return cache, StoredGrids.find(cache, named)


def _run(
    plan: WarmPlan,
    where: _Where,
    model: Backbone,
    batch_size: int | None,
    max_bytes: int | None,
    push: str | None,
) -> WarmReport:
    from ..warm import StoredGrids, run_warm

    stored = isinstance(model, StoredGrids)
    for failure in plan.failures:
        logging.getLogger("feature_cache.warm").info("failed: %s", failure.reason)
    with RunProgress("computing", plan.missing) as progress:
        if where.is_cluster and plan.missing:
            from ..warm.cluster import open_client, run_on_cluster

            _quiet_dask()
            with open_client(where.scheduler, where.workers) as client:
                return run_on_cluster(
                    plan,
                    None if stored else where.recipe(),
                    client,
                    batch_size=batch_size,
                    progress=progress.update,
                    failed=progress.fail,
                    max_bytes=max_bytes,
                    push=push,
                )
        return run_warm(
            plan,
            batch_size=batch_size,
            progress=progress.update,
            failed=progress.fail,
            max_bytes=max_bytes,
            push=push,
        )


def _quiet_dask() -> None:
    """Leave out how the parts of Dask come and go; its warnings are shown."""
    import_module("distributed")  # which sets the level itself
    logging.getLogger("distributed").setLevel(logging.WARNING)


def _show_plan(plan: WarmPlan, as_json: bool, report: Path | None) -> None:
    text = json.dumps(plan.to_json())
    _write_report(report, text)
    if as_json:
        typer.echo(text)
    else:
        for movie in plan.movies:
            typer.echo(f"{movie.movie}: {pairs_text(movie.frames, movie.pairs)}")
        print_table(_sum_copies(plan), False)
        known = plan.bytes
        size = "an unknown number of bytes" if known is None else f"about {size_text(known)}"
        grids = f" ({plan.from_grids:,} from stored grids)" if plan.from_grids else ""
        typer.echo(
            f"{count_text(plan.planned, 'record')}: {plan.present:,} are there, "
            f"{plan.missing:,} missing{grids}, {size} to be written"
        )
    if plan.failures:
        show_failures(() if as_json else plan.failures)
        raise typer.Exit(1)


def _sum_copies(plan: WarmPlan) -> list[dict[str, object]]:
    """Give a row for each movie and space."""
    rows: dict[tuple[str, str], dict[str, object]] = {}
    for row in plan.rows:
        kept = rows.get((row.movie, row.space))
        counts = (row.present, row.missing, row.from_grids, row.bytes)
        if kept is None:
            kept = {"movie": row.movie, "space": row.space, "copies": 0}
            kept |= {"present": 0, "missing": 0, "from_grids": 0, "bytes": 0}
            rows[row.movie, row.space] = kept
        # not counted: parts or channels of a movie have its name
        kept["copies"] = max(int(str(kept["copies"])), row.copy + 1)
        for name, count in zip(("present", "missing", "from_grids", "bytes"), counts, strict=True):
            before = kept[name]
            kept[name] = None if count is None or before is None else int(str(before)) + count
    return list(rows.values())


def _show_report(report: WarmReport, as_json: bool, file: Path | None, built: int = 0) -> None:
    text = json.dumps(report.to_json())
    _write_report(file, text)
    show_failures(report.failures)
    if as_json:
        typer.echo(text)
    else:
        typer.echo(
            f"{count_text(report.planned, 'record')}: {report.present:,} were there, "
            f"{report.computed:,} computed, {report.failed:,} failed, {report.seconds:.1f} s"
            f"{_regions_of(report)}"
        )
    if report.failures:
        raise typer.Exit(1 if report.present + report.computed + built else 2)


def _regions_of(report: WarmReport) -> str:
    if report.regions is None:
        return ""
    return f"; regions a frame: {regions_text(report.regions)} (least / median / most)"


def _write_report(file: Path | None, text: str) -> None:
    if file is None:
        return
    write_file(file, f"{text}\n")


class _NoMovieError(FeatureCacheError):
    """No movie could be opened."""


def _open_to_plan(
    context: typer.Context, root: Path, codec: str, layers: Sequence[str]
) -> FeatureCache:
    """Open a cache to look at; where there is none yet, an empty one elsewhere stands for it."""
    from ..cache import FeatureCache
    from ..errors import NotACacheError
    from ..store.files import list_folder

    try:
        return FeatureCache(root, "r", codec, layers=layers)
    except NotACacheError:
        if root.is_file() or list_folder(root):
            raise
    elsewhere = context.with_resource(TemporaryDirectory())
    return FeatureCache(elsewhere, codec=codec, layers=layers)


def _check_names(
    model: Backbone,
    poolings: Sequence[str | None],
    dtype: str,
    codec: str = "raw",
    dense: str = "none",
) -> None:
    """Find mistakes in names before anything is read or written."""
    from ..backbones.several_layers import specs_of
    from ..errors import UnknownNameError
    from ..spec import SpaceSpec
    from ..store import CODECS
    from ..warm import DENSE

    if codec not in CODECS:
        raise UnknownNameError("codec", codec, CODECS)
    if dense not in DENSE:
        raise UnknownNameError("value of dense", dense, DENSE)
    for pooling in poolings:
        SpaceSpec(specs_of(model)[0], pooling, dtype)


def _check_remote(url: str | None) -> None:
    """Find that nothing can be sent to a URL before anything is computed."""
    from ..store.remote import open_remote

    if url is not None:
        open_remote(url).check_writable()


def explain(
    movie: Annotated[str, typer.Argument(metavar="MOVIE", help="A folder of frames.")],
    cache: CacheOption,
    backbone: BackboneOption,
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
    frame: Annotated[int | None, typer.Option(help="Only this frame, counted from 0.")] = None,
    layer: LayersOption = [],
    no_memo: NoMemoOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say why each record of a movie is in the cache or not. Computes nothing.

    Example: feature-cache explain data/01 --cache features --backbone efficientnet-lite0 --copy 9
    """
    from ..augment import Augmentations
    from ..backbones import load_backbone
    from ..backbones.name import name_with_dtype
    from ..cache import FeatureCache
    from ..errors import MovieError
    from ..movies import Movie

    augmentations = Augmentations(policy, copies=copy, seed=seed)
    model = load_backbone(name_with_dtype(backbone, compute_dtype), weights)
    pooled = None if pooling == "none" else pooling
    _check_names(model, [pooled], dtype)
    opened = Movie.open(
        movie,
        masks if pooled else None,
        channel,
        axes,
        detections=detections if pooled else None,
    )
    frames = range(len(opened)) if frame is None else [frame]
    if frame is not None and frame not in range(len(opened)):
        raise MovieError(f"{movie} has no frame {frame}: expected 0 to {len(opened) - 1}")
    features = FeatureCache(cache, "r", layers=layer).movie(
        opened, None, model, pooling=pooled, dtype=dtype
    )
    explanations = features.explain(augmentations, copy, frames)
    if as_json:
        typer.echo(json.dumps([explanation.to_json() for explanation in explanations]))
    else:
        for explanation in explanations:
            typer.echo(str(explanation))
