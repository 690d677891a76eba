"""A Lightning training with `CachedDataModule` that writes down every sample it sees.

``python recorded_training.py '{"folder": …, "out": …}'`` runs `fit` with these arguments.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import lightning
import torch
from joblib import parallel_config
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from trackastra.data import CTCData, collate_sequence_padding

from feature_cache import Augmentations
from feature_cache.hashing import digest_json
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import CachedCTCData, CachedDataModule

TRAIN, VAL, WINDOW, DIM = ("one", "two"), ("three",), 3, 4
AUGMENTATIONS = Augmentations("flips", copies=3, seed=5)


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate as upstream; say, in the worker, which samples these are."""
    seen = [
        {
            "movie": sample["movie"],
            "index": sample["index"],
            "place": sample["place"],
            "copy": sample.get("copy"),
            "features": digest_features(sample["pretrained_feats"]),
        }
        for sample in samples
    ]
    return {**collate_sequence_padding(samples), "seen": seen}


def digest_features(features: torch.Tensor) -> str:
    return digest_json(features.tolist()).hex()


class Numbers(CTCData):
    """A dataset whose samples say their movie and index."""

    def __getitem__(self, n: int, return_dense: bool | None = None) -> dict[str, Any]:
        sample = super().__getitem__(n, return_dense)
        place = getattr(n, "place", None)
        return {**sample, "index": int(n), "place": place, "movie": self.root.parent.name}


class NumberedCTCData(CachedCTCData, Numbers):
    """The same with cached features."""


class NumberedDataModule(CachedDataModule):
    """Samples say their movie and index; loading starts no processes."""

    def setup(self, stage: str) -> None:
        with parallel_config(backend="sequential"):
            super().setup(stage)
        for dataset in self.datasets.values():
            for part in dataset.datasets:
                part.__class__ = NumberedCTCData


class Probe(lightning.LightningModule):
    """A model of one layer; one line of its log is one sample."""

    def __init__(self, log: Path) -> None:
        super().__init__()
        self.log_file, self.layer = log, torch.nn.Linear(DIM, 1)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        self._note("train", batch)
        return self.layer(batch["pretrained_feats"]).mean()

    def validation_step(self, batch: dict[str, Any], _: int) -> None:
        self._note("val", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)

    def _note(self, split: str, batch: dict[str, Any]) -> None:
        step = {"split": split, "rank": self.global_rank, "epoch": self.current_epoch}
        with open(self.log_file, "a") as log:
            log.writelines(json.dumps(step | seen) + "\n" for seen in batch["seen"])


class Linger(Callback):
    """Gives workers time to read ahead before the first epoch begins."""

    def on_train_start(self, *_: object) -> None:
        time.sleep(0.5)


class Kill(Callback):
    """Kills the process without warning, in the middle of an epoch."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: object) -> None:
        if trainer.current_epoch == self.epoch:
            os.kill(os.getpid(), signal.SIGKILL)


def make_module(folder: str, out: str, **options: Any) -> NumberedDataModule:
    """Make the data module of the movies in a folder; embeddings are logged in `out`."""
    workers, persistent = options.pop("workers", 0), options.pop("persistent", False)
    arguments = {
        "input_train": [Path(folder, name, "01") for name in TRAIN],
        "input_val": [Path(folder, name, "01") for name in VAL],
        "cachedir": None,
        "augment": 1,
        "distributed": False,
        "dataset_kwargs": {"window_size": WINDOW},
        "sampler_kwargs": {"batch_size": 2, "n_pool": 2, "num_samples": 12},
        "loader_kwargs": {
            "batch_size": 2,
            "num_workers": workers,
            "persistent_workers": persistent,
            "collate_fn": collate,
        },
        "cache": f"{out}/cache",
        "backbone": FakeBackbone(DIM, log=f"{out}/embedded"),
        "augmentations": AUGMENTATIONS,
        "batch_size": 2,
    }
    return NumberedDataModule(**{**arguments, **options})


def fit(
    folder: str,
    out: str,
    *,
    log: str = "seen",
    epochs: int = 3,
    devices: int = 1,
    kill_in: int | None = None,
    resume: bool = False,
    **options: Any,
) -> tuple[lightning.Trainer, NumberedDataModule]:
    """Train; every sample seen becomes a line of `log` in `out`."""
    checkpoints = ModelCheckpoint(f"{out}/checkpoints", save_last=True)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=epochs,
        callbacks=[checkpoints, Linger(), *([Kill(kill_in)] if kill_in is not None else [])],
        default_root_dir=out,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = make_module(folder, out, **options)
    last = f"{out}/checkpoints/last.ckpt" if resume else None
    trainer.fit(Probe(Path(out, log)), datamodule=module, ckpt_path=last, weights_only=False)
    return trainer, module


def read_log(out: Path, log: str = "seen", split: str = "train") -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / log).read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def note_builds(out: str) -> None:
    """Have each movie whose training data are built become a line of ``built`` in `out`."""
    build = CTCData._load_wrfeat

    def note(data: CTCData) -> Any:
        with open(f"{out}/built", "a") as log:
            log.write(f"{data.root.parent.name}\n")
        return build(data)

    CTCData._load_wrfeat = note


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    arguments = json.loads(sys.argv[1])
    note_builds(arguments["out"])
    fit(**arguments)
