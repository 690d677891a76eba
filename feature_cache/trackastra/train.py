"""Train or fine-tune Trackastra's models out of a configuration: ``feature-cache train``.

The model folder is <outdir>/<name>; Trackastra.from_folder loads it, and
feature_cache.trackastra.cached_inference tracks with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import tifffile
import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from trackastra.data import collate_sequence_padding
from trackastra.model import TrackingTransformer
from trackastra.utils import seed

from ..augment import Augmentations
from ..backbones import load_backbone
from ..cache import FeatureCache
from ..errors import BackboneError, FeatureCacheError, importing
from ..movies import ReadOptions, read_image
from ..output_files import check_folder
from ..spec import SpaceSpec
from ..train_options import (
    ARCHITECTURE,
    PRETRAINED,
    PRETRAINED_ARCHITECTURE,
    check_training,
    copies_of,
    data_options,
    parse_training,
)
from .collation import collate
from .ctc_source import folders_of
from .datamodule import CachedDataModule
from .lazy_arrays import count_masks
from .model_features import ModelFeatures, check_resumed, find_model
from .patching import replaced
from .seeds import mix_seeds
from .training import BestModel, TrackingModule, make_model


def parse_options(
    words: Sequence[str] | None = None, prog: str | None = None
) -> argparse.Namespace:
    """Read the options; end with what is wrong, say what is ignored."""
    options = parse_training(sys.argv[1:] if words is None else words, prog=prog)
    for name, why in options.ignored.items():
        print(f"ignored: {name}" + f" ({why})" * bool(why), file=sys.stderr)
    try:
        check_training(options)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    return options


PLAIN_WIDTHS = {
    2: {"none": 0, "wrfeat": 7, "regionprops": 7, "regionprops2": 6,
        "patch_regionprops": 261},
    3: {"none": 0, "wrfeat": 12, "regionprops2": 11, "patch_regionprops": 264},
}  # fmt: skip
"""How many of Trackastra's own features a sample has, by its axes and their name."""


def choose_model(options: argparse.Namespace, width: int, props: str | None) -> Any:
    """Make a model, or load the one to fine-tune; its architecture must be what was asked for."""
    own = None if width else PLAIN_WIDTHS[options.ndim].get(options.features)
    if not width and own is None:
        raise ValueError(f"--features {options.features}: there are none such for --ndim 3")
    sizes: dict[str, Any] = {
        "pretrained_feat_dim": width,
        "additional_props": props,
        "feat_dim": own,
    }
    asked = {**ARCHITECTURE, **(PRETRAINED_ARCHITECTURE if width else {})}
    given = {name: getattr(options, name) for name in asked if getattr(options, name) is not None}
    if options.model is None:
        defaults = {name: default for name, (_, default) in asked.items()}
        return make_model(options.ndim, **sizes, **{**defaults, **given})
    model = TrackingTransformer.from_folder(find_model(options.model), map_location="cpu")
    expected: Any = make_model(options.ndim, **sizes).config
    given |= {name: expected[name] for name in ("coord_dim", "feat_dim")}
    given |= {"pretrained_feat_dim": width} if width else {}
    unlike = [
        f"{name} {model.config.get(name)}, asked {value}"
        for name, value in given.items()
        if model.config.get(name) != value
    ]
    if unlike or ("pretrained_feat_dim" in model.config) != bool(width):
        raise ValueError(
            f"the model {options.model} doesn't fit these options; it has "
            f"{'; '.join(unlike) or 'pretrained features'}: change the options, or leave them out"
        )
    return model


def check_architecture(folder: Path, model: Any) -> None:
    """Raise ValueError where a folder holds a model of another architecture."""
    file = folder / "config.yaml"
    before = yaml.safe_load(file.read_text()) if file.exists() else {}
    unlike = [
        f"{name} {before[name]}, asked {model.config[name]}"
        for name in {**ARCHITECTURE, **PRETRAINED_ARCHITECTURE}
        if name in before and before[name] != model.config.get(name)
    ]
    if unlike:
        raise ValueError(
            f"{folder} holds a model of another architecture: it has {'; '.join(unlike)}; pass the "
            "same, or another --name"
        )


def name_features(options: argparse.Namespace, backbone: Any) -> ModelFeatures | None:
    """Name the features of this training in full."""
    if backbone is None:
        return None
    return ModelFeatures.of(
        SpaceSpec(backbone.spec, options.pretrained_feats_mode),
        backbone,
        options.pretrained_feats_additional_props,
        options.rotate_features,
    )


def compare_start(options: argparse.Namespace, features: ModelFeatures | None) -> None:
    """Say where fine-tuning goes on from a model of other features."""
    try:
        folder = None if options.model is None else Path(options.model).expanduser()
        before = None if folder is None else ModelFeatures.of_folder(folder)
        unlike = before.unlike(features) if before is not None and features is not None else []
    except BackboneError as error:
        unlike = [str(error)]
    for line in unlike:
        print(f"{options.model} was trained on other features: {line}", file=sys.stderr)


def make_data(
    options: argparse.Namespace, cache: FeatureCache | None, backbone: Any, window: int
) -> CachedDataModule:
    """Make the data module; without a backbone, of Trackastra's own features alone."""
    copies = copies_of(vars(options))
    return CachedDataModule(
        input_train=options.input_train,
        input_val=options.input_val,
        cachedir=None,
        augment=options.augment,
        distributed=options.distributed,
        dataset_kwargs={**data_options(options), "window_size": window},
        sampler_kwargs={
            "batch_size": options.batch_size,
            "n_pool": options.n_pool_sampler,
            "num_samples": options.train_samples,
            "weight_by_ndivs": options.weight_by_ndivs,
            "weight_by_dataset": options.weight_by_dataset,
        },
        loader_kwargs={
            "batch_size": options.batch_size,
            "num_workers": options.num_workers,
            "persistent_workers": options.num_workers > 0,
            "pin_memory": on_gpu(options),
            "collate_fn": collate_sequence_padding if backbone is None else collate,
        },
        cache=cache,
        backbone=backbone,
        pooling=options.pretrained_feats_mode,
        augmentations=Augmentations(options.policy, copies=copies, seed=options.seed)
        if copies
        else None,
        additional_props=options.pretrained_feats_additional_props,
        rotate_features=options.rotate_features,
        warm=options.warm and backbone is not None,
        seed=options.seed,
    )


class SeedEpochs(Callback):
    """Makes what a model draws a function of seed, epoch and rank: the same after a resume."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed torch's generators."""
        torch.manual_seed(mix_seeds("epoch", self.seed, trainer.current_epoch, trainer.global_rank))


class CheckMovies(Callback):
    """Ends where a movie gives no windows: upstream's samplers would not say which."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at all movies."""
        check_movies(trainer.datamodule)  # type: ignore[attr-defined]


def check_movies(module: Any) -> None:
    """Raise ValueError for a movie that gives no windows, MovieError for one without masks."""
    for data in [part for split in module.datasets.values() for part in split.datasets]:
        folders_of(data)
        if not data.windows:
            raise ValueError(
                f"{data.root} has {count_masks(data.gt_masks)} frames: expected at least the "
                f"{data.window_size} of a window; pass a smaller --window, or leave the movie out"
            )


def _open_wandb(options: argparse.Namespace) -> WandbLogger:
    """Begin a run of Weights & Biases before anything is computed: it may need a login."""
    with importing("wandb", "--logger wandb", "pip install wandb"):
        from wandb.errors import Error

    logger = WandbLogger(options.name, project=options.wandb_project)
    try:
        _ = logger.experiment
    except Error as error:
        raise ValueError(
            f"--logger wandb can't begin: {error} Or set WANDB_MODE=offline, or take --logger csv"
        ) from error
    return logger


def make_trainer(options: argparse.Namespace, folder: Path, train_args: dict[str, Any]) -> Trainer:
    """Make Lightning's trainer, with all that writes."""
    loggers: dict[str, Any] = {
        "tensorboard": lambda: TensorBoardLogger(folder, name="tb"),
        "csv": lambda: CSVLogger(folder, name="csv"),
        "wandb": lambda: _open_wandb(options),
        "none": lambda: False,
    }
    kind = "none" if options.dry else options.logger
    patience = options.epochs // 6 if options.patience is None else options.patience
    callbacks: list[Callback] = [CheckMovies(), SeedEpochs(options.seed)]
    if not options.dry:
        checkpoints = ModelCheckpoint(folder / "checkpoints", monitor="val_loss", save_last=True)
        callbacks += [BestModel(folder, train_args), checkpoints]
    if patience:
        callbacks.append(EarlyStopping("val_loss", patience=patience))
    if kind != "none":
        callbacks.append(LearningRateMonitor(logging_interval="epoch"))
    gpu = on_gpu(options)
    return Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=torch.cuda.device_count() if gpu and options.distributed else 1,
        strategy="ddp" if options.distributed else "auto",
        precision="16-mixed" if gpu and options.mixedp else 32,
        logger=loggers[kind](),
        enable_checkpointing=not options.dry,
        max_epochs=options.epochs,
        callbacks=callbacks,
        log_every_n_steps=1,
    )


def on_gpu(options: argparse.Namespace) -> bool:
    """Tell whether it trains on a GPU."""
    return options.device == "cuda" and torch.cuda.is_available()


def choose_folder(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """Give the model folder, and the checkpoint to go on from."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S_") if options.timestamp else ""
    folder = options.outdir / f"{stamp}{options.name}"
    last = folder / "checkpoints" / "last.ckpt"
    if not folder.exists():
        return folder, None
    if not options.resume:
        raise ValueError(f"{folder} exists: pass --resume true to go on there, or another --name")
    return folder, last if last.exists() else None


def train(options: argparse.Namespace) -> str:
    """Train; say what there is at the end, in the first rank of several.

    Raises
    ------
    ValueError
        A movie, or the options, are no use.
    BackboneError
        The folder's model was trained on other features.
    FloatingPointError
        Most batches of an epoch gave NaN, or all of the validation: no model was kept.
    """
    seed(options.seed)
    folder, checkpoint = choose_folder(options)
    check_folder(folder)
    backbone, props = None, "regionprops2"
    if options.features in PRETRAINED:
        device = None if on_gpu(options) else "cpu"
        backbone = load_backbone(options.pretrained_feats_model, options.weights, device)
        props = options.pretrained_feats_additional_props
    features = name_features(options, backbone)
    check_resumed(folder, features)
    model = choose_model(options, backbone.spec.width if backbone else 0, props)
    check_architecture(folder, model)
    compare_start(options, features)
    module = TrackingModule(
        model,
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        delta_cutoff=options.delta_cutoff,
        division_weight=options.div_upweight,
        feature_dropout=options.feature_dropout,
    )
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    done = 0 if checkpoint is None else count_epochs(checkpoint)
    cache = None if options.cache is None else FeatureCache(options.cache)
    data = make_data(options, cache, backbone, model.config["window"])
    read = partial(read_image, options=ReadOptions(labels=True))
    with replaced(tifffile, "imread", read):  # upstream's names no file that is damaged
        if options.only_prechecks:
            data.setup("fit")
            check_movies(data)
            return f"all is well: {len(data.datasets['train'])} windows to train on"
        if done >= options.epochs:
            kept = _describe_kept(options, folder)
            return f"nothing to do: {done} of {options.epochs} epochs are done; {kept}"
        trainer = make_trainer(options, folder, {**plain, **model.config})
        if checkpoint is not None:
            print(f"going on from {checkpoint}")
        finished = _fit(trainer, module, data, checkpoint)
    if cache is not None and backbone is not None and trainer.is_global_zero:
        print(f"features computed here: {cache.counter.total.computed:,} records")
    # the other ranks need not know the folder, whose name may have a time
    return _end(trainer, options, folder, finished) if trainer.is_global_zero else ""


def _fit(trainer: Trainer, module: LightningModule, data: Any, checkpoint: Path | None) -> bool:
    """Train; tell whether it came to an end."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint)
    except (KeyboardInterrupt, SystemExit, RuntimeError) as error:
        # Lightning makes SystemExit of signals; torch RuntimeError, where workers got them too
        if isinstance(error, RuntimeError) and not trainer.received_sigterm:
            raise
        if not trainer.is_global_zero:
            sys.exit(130)
        return False
    return True


def _end(trainer: Trainer, options: argparse.Namespace, folder: Path, finished: bool) -> str:
    """Say what a training left; FloatingPointError where that is no model."""
    kept, epochs = _describe_kept(options, folder), trainer.current_epoch
    if not finished:
        done = f"interrupted in epoch {epochs}, after {trainer.global_step} steps"
        print(f"{done}; kept: {kept}", file=sys.stderr)
        sys.exit(130)
    if not options.dry and not (folder / "model.pt").exists():
        raise FloatingPointError(kept)
    if epochs < options.epochs:
        why = "the validation loss got no better, or is no number (--patience)"
        return f"{kept}; ended after {epochs} of {options.epochs} epochs, as {why}"
    return kept


def count_epochs(file: Path) -> int:
    """Count the epochs of a checkpoint; ValueError where it is damaged."""
    try:
        return int(torch.load(file, map_location="cpu", weights_only=False)["epoch"]) + 1
    except (OSError, EOFError, RuntimeError, LookupError, UnpicklingError) as error:
        raise ValueError(
            f"can't go on from {file}: it is damaged ({type(error).__name__}); take another "
            "--name, or remove it to begin anew"
        ) from error


def _describe_kept(options: argparse.Namespace, folder: Path) -> str:
    if options.dry:
        return "nothing (--dry)"
    last = folder / "checkpoints" / "last.ckpt"
    goes_on = f", and {last}, from which --resume goes on" if last.exists() else ""
    if not (folder / "model.pt").exists():
        return f"no model, as no epoch has a validation loss that is a number{goes_on}"
    return f"model: {folder}"


def main(words: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Train, from a command line; what goes wrong becomes one line."""
    options = parse_options(words, prog)
    try:
        said = train(options)
    except (
        FeatureCacheError, FloatingPointError, ValueError, OSError, yaml.YAMLError,
        torch.OutOfMemoryError,
    ) as error:  # fmt: skip
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError):
            text = f"{text.splitlines()[0]} Take a smaller --batch_size, --crop_size or --window"
        if text.startswith("Caught "):  # in a DataLoader worker, and its traceback
            text = text.strip().splitlines()[-1]
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    if said:
        print(said)
