"""Train or fine-tune Trackastra on cached features; the options are those of its own train.py.

Example:
  python scripts/train_trackastra.py -c train.yaml --cache features --epochs 100

with a train.yaml in Trackastra's own format, such as

  name: hela
  input_train: [movies/hela/01]
  input_val: [movies/hela/02]
  features: pretrained_feats_aug
  pretrained_feats_model: facebook/sam2.1-hiera-base-plus
  pretrained_n_augs: 3
  window: 4

The model folder is <outdir>/<name>; Trackastra.from_folder loads it, and
feature_cache.trackastra.cached_inference tracks with it. What stands on the command line counts
before what stands in the file.
"""

from __future__ import annotations

import argparse
import logging
import sys
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import configargparse
import tifffile
import torch
import yaml
from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from trackastra.data import collate_sequence_padding
from trackastra.data.distributed import BalancedDataModule
from trackastra.model import TrackingTransformer
from trackastra.model.pretrained import download_pretrained
from trackastra.utils import none_or_str, seed, str2bool

from feature_cache import Augmentations, FeatureCache, load_backbone
from feature_cache.augment.policy import PRESETS
from feature_cache.errors import BackboneError, FeatureCacheError
from feature_cache.movies import ReadOptions, read_image
from feature_cache.pooling import POOLINGS
from feature_cache.spec import SpaceSpec
from feature_cache.trackastra import (
    BestModel,
    CachedDataModule,
    TrackingModule,
    collate,
    make_model,
)
from feature_cache.trackastra.held import folders_of
from feature_cache.trackastra.late import count_masks
from feature_cache.trackastra.model_features import ModelFeatures, check_resumed
from feature_cache.trackastra.patching import replaced
from feature_cache.trackastra.shallow import SHALLOW_FEATURES

logger = logging.getLogger("train_trackastra")

ARCHITECTURE: dict[str, tuple[Any, Any]] = {  # option: type, default where training from scratch
    "d_model": (int, 256),
    "window": (int, 10),
    "num_encoder_layers": (int, 6),
    "num_decoder_layers": (int, 6),
    "pos_embed_per_dim": (int, 32),
    "feat_embed_per_dim": (int, 8),
    "dropout": (float, 0.0),
    "spatial_pos_cutoff": (int, 256),
    "attn_positional_bias": (str, "rope"),
    "attn_positional_bias_n_spatial": (int, 16),
    "attn_dist_mode": (str, "v0"),
    "causal_norm": (str, "quiet_softmax"),
}
PRETRAINED: dict[str, tuple[Any, Any]] = {  # the same, of models for pretrained features alone
    "reduced_pretrained_feat_dim": (int, 128),
    "disable_xy_coords": (str2bool, False),
    "disable_all_coords": (str2bool, False),
}
IGNORED = {
    "cachedir": "its pickles may be stale",
    "example_images": "",
    "from_subfolder": "upstream ignores it too",
    "input_test": "upstream ignores it too",
    "preallocate": "",
    "profile": "",
    "tracking_frequency": "",
    "wandb_project": "",
}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = configargparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        config_file_parser_class=configargparse.YAMLConfigFileParser,
        allow_abbrev=False,
        add_config_file_help=False,
    )
    parser.add_argument("-c", "--config", is_config_file=True, help="YAML with any of these")

    out = parser.add_argument_group("what is written")
    out.add_argument("-o", "--outdir", type=Path, default=Path("runs"))
    out.add_argument("--name", required=True, help="of the folder in --outdir")
    out.add_argument("--timestamp", type=str2bool, default=True, help="put before --name")
    out.add_argument(
        "--resume", type=str2bool, default=True,
        help="go on from the last checkpoint of this folder (needs --timestamp false)",
    )  # fmt: skip
    out.add_argument("--logger", choices=("tensorboard", "csv", "none"), default="tensorboard")

    data = parser.add_argument_group("movies, in the layout of the Cell Tracking Challenge")
    data.add_argument("--input_train", nargs="+", required=True)
    data.add_argument("--input_val", nargs="+", required=True)
    data.add_argument("--detection_folders", nargs="+", default=["TRA"])
    data.add_argument("--ndim", type=int, choices=(2, 3), default=2)
    data.add_argument("--downscale_temporal", type=int, default=1)
    data.add_argument("--downscale_spatial", type=int, default=1)
    data.add_argument("--crop_size", type=int, nargs="+", help="of random crops")
    data.add_argument("--augment", type=int, default=3, help="level, of the coordinates")
    data.add_argument("--compress", type=str2bool, default=True)
    data.add_argument("--sanity_dist", action="store_true")
    data.add_argument("--max_tokens", type=int)

    features = parser.add_argument_group("features")
    features.add_argument(
        "--features", choices=("wrfeat", "pretrained_feats", "pretrained_feats_aug"),
        default="wrfeat", help="Trackastra's own, or pretrained ones too, or their copies too",
    )  # fmt: skip
    features.add_argument("--cache", type=Path, help="folder of the feature cache")
    features.add_argument("--pretrained_feats_model", type=none_or_str, help="the backbone")
    features.add_argument("--weights", help="of the backbone: a checkpoint, or random:<seed>")
    features.add_argument(
        "--pretrained_feats_mode", choices=POOLINGS, default="mean_patches_exact", help="pooling"
    )
    features.add_argument(
        "--pretrained_feats_additional_props", type=none_or_str, choices=(None, *SHALLOW_FEATURES)
    )
    features.add_argument("--pretrained_n_augs", type=int, default=3, help="augmented copies")
    features.add_argument("--policy", choices=PRESETS, default="default", help="of the copies")
    features.add_argument("--rotate_features", type=str2bool, default=True)
    features.add_argument(
        "--warm", action="store_true", help="compute all that is missing before training"
    )

    model = parser.add_argument_group("model")
    model.add_argument(
        "-m", "--model", "--pretrained_model_path", type=none_or_str,
        help="fine-tune this model folder, or one of Trackastra's by its name",
    )  # fmt: skip
    short = {"d_model": ["-d"], "window": ["-w"]}
    for name, (kind, default) in {**ARCHITECTURE, **PRETRAINED}.items():
        said = f"default {default}, or the model's"
        model.add_argument(*short.get(name, []), f"--{name}", type=kind, help=said)

    how = parser.add_argument_group("training")
    how.add_argument("--epochs", type=int, default=100)
    how.add_argument("--warmup_epochs", type=int, default=10)
    how.add_argument("--train_samples", type=int, default=50000, help="in an epoch")
    how.add_argument("--batch_size", type=int, default=8)
    how.add_argument("--lr", type=float, default=1e-4)
    how.add_argument("--weight_decay", type=float, default=1e-5)
    how.add_argument("--delta_cutoff", type=int, default=2, help="frames that a link may span")
    how.add_argument("--div_upweight", type=float, default=2)
    how.add_argument("--n_pool_sampler", type=int, default=8)
    how.add_argument("--weight_by_ndivs", type=str2bool, default=True)
    how.add_argument("--weight_by_dataset", type=str2bool, default=False)
    how.add_argument("--patience", type=int, help="epochs without a better one; a sixth of all")
    how.add_argument("--num_workers", type=int, default=4)
    how.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="if there is one")
    how.add_argument("--distributed", type=str2bool, default=False, help="all GPUs of this host")
    how.add_argument("--mixedp", type=str2bool, default=True, help="float16 on a GPU")
    how.add_argument("--seed", type=int, default=0)

    options, unknown = parser.parse_known_args(arguments)
    check_options(parser, options, unknown)
    return options


def check_options(parser: Any, options: argparse.Namespace, unknown: list[str]) -> None:
    """End with what is wrong; say what is ignored."""
    names = dict.fromkeys(text.split("=")[0].lstrip("-") for text in unknown)
    wrong = [name for name in names if name not in IGNORED]
    if wrong:
        parser.error(f"unknown options: {', '.join(wrong)}; --help lists those there are")
    for name in names:
        print(f"ignored: {name}" + f" ({IGNORED[name]})" * bool(IGNORED[name]), file=sys.stderr)
    missing = [path for path in options.input_train + options.input_val if not Path(path).is_dir()]
    if missing:
        parser.error(f"no such movie folder: {', '.join(missing)}")
    if options.features != "wrfeat":
        for name in ("cache", "pretrained_feats_model"):
            if getattr(options, name) is None:
                parser.error(f"--features {options.features} needs --{name}")


def choose_model(options: argparse.Namespace, width: int, props: str | None) -> Any:
    """Make a model, or load the one to fine-tune; its architecture must be what was asked for."""
    asked = {**ARCHITECTURE, **(PRETRAINED if width else {})}
    given = {name: getattr(options, name) for name in asked if getattr(options, name) is not None}
    if options.model is None:
        defaults = {name: default for name, (_, default) in asked.items()}
        sizes = {"pretrained_feat_dim": width, "additional_props": props}
        return make_model(options.ndim, **sizes, **{**defaults, **given})
    folder = Path(options.model)
    model = TrackingTransformer.from_folder(
        folder if folder.is_dir() else download_pretrained(options.model), map_location="cpu"
    )
    expected = make_model(options.ndim, pretrained_feat_dim=width, additional_props=props).config
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
        before = None if options.model is None else ModelFeatures.of_folder(Path(options.model))
        unlike = before.unlike(features) if before is not None and features is not None else []
    except BackboneError as error:
        unlike = [str(error)]
    for line in unlike:
        print(f"{options.model} was trained on other features: {line}", file=sys.stderr)


def make_data(options: argparse.Namespace, backbone: Any, window: int) -> LightningDataModule:
    common: dict[str, Any] = {
        "input_train": options.input_train,
        "input_val": options.input_val,
        "cachedir": None,
        "augment": options.augment,
        "distributed": options.distributed,
        "dataset_kwargs": {
            "ndim": options.ndim,
            "detection_folders": options.detection_folders,
            "window_size": window,
            "max_tokens": options.max_tokens,
            "features": "wrfeat",
            "downscale_temporal": options.downscale_temporal,
            "downscale_spatial": options.downscale_spatial,
            "sanity_dist": options.sanity_dist,
            "crop_size": options.crop_size,
            "compress": options.compress,
        },
        "sampler_kwargs": {
            "batch_size": options.batch_size,
            "n_pool": options.n_pool_sampler,
            "num_samples": options.train_samples,
            "weight_by_ndivs": options.weight_by_ndivs,
            "weight_by_dataset": options.weight_by_dataset,
        },
        "loader_kwargs": {
            "batch_size": options.batch_size,
            "num_workers": options.num_workers,
            "persistent_workers": options.num_workers > 0,
            "pin_memory": on_gpu(options),
            "collate_fn": collate_sequence_padding,
        },
    }
    if backbone is None:
        return BalancedDataModule(**common)
    common["loader_kwargs"]["collate_fn"] = collate
    copies = options.pretrained_n_augs if options.features == "pretrained_feats_aug" else 0
    return CachedDataModule(
        **common,
        cache=FeatureCache(options.cache),
        backbone=backbone,
        pooling=options.pretrained_feats_mode,
        augmentations=Augmentations(options.policy, copies=copies, seed=options.seed)
        if copies
        else None,
        additional_props=options.pretrained_feats_additional_props,
        rotate_features=options.rotate_features,
        warm=options.warm,
    )


class CheckMovies(Callback):
    """Ends where a movie gives no windows: upstream's samplers would not say which."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for split in ("train", "val"):
            for data in trainer.datamodule.datasets[split].datasets:
                check_movie(data)


def check_movie(data: Any) -> None:
    folders_of(data)
    if not data.windows:
        raise ValueError(
            f"{data.root} has {count_masks(data.gt_masks)} frames: expected at least the "
            f"{data.window_size} of a window; pass a smaller --window, or leave the movie out"
        )


def make_trainer(options: argparse.Namespace, folder: Path, train_args: dict[str, Any]) -> Trainer:
    loggers = {
        "tensorboard": lambda: TensorBoardLogger(folder, name="tb"),
        "csv": lambda: CSVLogger(folder, name="csv"),
        "none": lambda: False,
    }
    patience = options.epochs // 6 if options.patience is None else options.patience
    callbacks = [
        CheckMovies(),
        BestModel(folder, train_args),
        ModelCheckpoint(folder / "checkpoints", monitor="val_loss", save_last=True),
    ]
    if patience:
        callbacks.append(EarlyStopping("val_loss", patience=patience))
    if options.logger != "none":
        callbacks.append(LearningRateMonitor(logging_interval="epoch"))
    gpu = on_gpu(options)
    return Trainer(
        accelerator="gpu" if gpu else "cpu",
        devices=torch.cuda.device_count() if gpu and options.distributed else 1,
        strategy="ddp" if options.distributed else "auto",
        precision="16-mixed" if gpu and options.mixedp else 32,
        logger=loggers[options.logger](),
        max_epochs=options.epochs,
        callbacks=callbacks,
        log_every_n_steps=1,
    )


def on_gpu(options: argparse.Namespace) -> bool:
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


def train(options: argparse.Namespace) -> Path:
    """Train; give the model folder."""
    seed(options.seed)
    folder, checkpoint = choose_folder(options)
    backbone, props = None, "regionprops2"
    if options.features != "wrfeat":
        device = None if on_gpu(options) else "cpu"
        backbone = load_backbone(options.pretrained_feats_model, options.weights, device)
        props = options.pretrained_feats_additional_props
    features = name_features(options, backbone)
    check_resumed(folder, features)
    model = choose_model(options, backbone.spec.width if backbone else 0, props)
    compare_start(options, features)
    module = TrackingModule(
        model,
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        delta_cutoff=options.delta_cutoff,
        division_weight=options.div_upweight,
    )
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()}
    data = make_data(options, backbone, model.config["window"])
    trainer = make_trainer(options, folder, {**plain, **model.config})
    if checkpoint is not None:
        print(f"going on from {checkpoint}")
    read = partial(read_image, options=ReadOptions(labels=True))
    with replaced(tifffile, "imread", read):  # upstream's names no file that is damaged
        trainer.fit(module, data, ckpt_path=checkpoint)
    return folder


def main() -> None:
    options = parse_options()
    try:
        folder = train(options)
    except (FeatureCacheError, ValueError, FileNotFoundError, yaml.YAMLError) as error:
        text = str(error)
        if text.startswith("Caught "):  # in a DataLoader worker, and its traceback
            text = text.strip().splitlines()[-1]
        sys.exit(f"error: {text}")
    print(f"model: {folder}")


if __name__ == "__main__":
    main()
