"""Training of Trackastra's models: the loss, a Lightning module, and the model folder.

The loss and the schedule are those of ``scripts/train.py`` of weigertlab/trackastra (pull request
61), which is in no package.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional
from trackastra.model import TrackingTransformer
from trackastra.utils import blockwise_causal_norm, blockwise_sum

from ..errors import importing
from ..train_options import MODEL_INSTALL, MODEL_PACKAGE
from .inference import whole_batches
from .model_features import ModelFeatures, check_resumed
from .shallow import columns_of

with importing(MODEL_PACKAGE, "training a model", MODEL_INSTALL):
    from trackastra_pretrained_feats import TrackingTransformerwPretrainedFeats

Batch = Mapping[str, Tensor]
_log = logging.getLogger(__name__)
_EPS = torch.finfo(torch.float32).eps
_HALF = torch.finfo(torch.float16)


def make_model(
    ndim: int = 2,
    *,
    pretrained_feat_dim: int = 0,
    additional_props: str | None = "regionprops2",
    feat_dim: int | None = None,
    **architecture: Any,
) -> nn.Module:
    """Make an untrained model for samples as `wrap` or `CTCData` give them.

    Parameters
    ----------
    ndim : int
        2 or 3 axes of space.
    pretrained_feat_dim : int
        Width of the pretrained features; 0 makes Trackastra's own model, without any.
    additional_props : str or None
        The samples' shallow features, as in `wrap`.
    feat_dim : int, optional
        How many shallow features there are, where they are others.
    **architecture
        Of ``TrackingTransformer`` and ``TrackingTransformerwPretrainedFeats``, such as ``d_model``.

    Raises
    ------
    UnknownNameError
        No such set of shallow features.
    """
    width = len(columns_of(additional_props, ndim)) if feat_dim is None else feat_dim
    sizes = {"coord_dim": ndim, "feat_dim": width}
    if not pretrained_feat_dim:
        return TrackingTransformer(**sizes, **architecture)
    return TrackingTransformerwPretrainedFeats(
        **sizes, pretrained_feat_dim=pretrained_feat_dim, **architecture
    )


def link_weights(links: Tensor, timepoints: Tensor, division_weight: float) -> Tensor:
    """Weigh the links of one window: 2 where a track goes on, more where a cell divides, else 1.

    Parameters
    ----------
    links : (N, N) float
        1 where token i becomes token j, directly or some frames later.
    timepoints : (N,) int64
        -1 where padded.
    division_weight : float
        How much a link of a dividing cell counts beyond 1.

    Returns
    -------
    (N, N) float
    """
    ahead = blockwise_sum(links, timepoints, dim=-1)
    behind = blockwise_sum(links, timepoints, dim=-2)
    partners = links * (ahead + behind)
    return 1 + (partners == 2).float() + division_weight * (partners > 2).float()


def association_loss(
    logits: Tensor,
    batch: Batch,
    *,
    causal_norm: str = "quiet_softmax",
    delta_cutoff: int = 2,
    division_weight: float = 2.0,
) -> Tensor:
    """Give the loss of predicted links over pairs of tokens up to `delta_cutoff` frames apart.

    Binary cross entropy of the causally normalised links, and 0.01 times that of the logits, each
    pair weighted by `link_weights`; the mean over the pairs of a window, then the mean over windows
    weighted by the number of their pairs to the power of 0.2.

    Parameters
    ----------
    logits : (B, N, N) float
        From token i to token j.
    batch : mapping of tensors
        ``assoc_matrix`` (B, N, N), ``timepoints`` (B, N), ``padding_mask`` (B, N), as
        ``collate_sequence_padding`` gives them.
    causal_norm : str
        As in ``blockwise_causal_norm``; ``"none"`` takes the logits alone.
    delta_cutoff : int
        In frames.
    division_weight : float
        Upstream's ``div_upweight``.

    Returns
    -------
    () float32
    """
    links, times = batch["assoc_matrix"], batch["timepoints"]
    padded = batch["padding_mask"].bool()
    invalid = padded[:, :, None] | padded[:, None, :]
    ahead = times[:, None, :] - times[:, :, None]
    counted = (ahead > 0) & (ahead <= delta_cutoff) & ~invalid
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float().clamp(_HALF.min, _HALF.max).masked_fill(invalid, 0.0)
        errors = functional.binary_cross_entropy_with_logits(logits, links, reduction="none")
        if causal_norm != "none":
            # Upstream's mask_invalid does the same in place, which breaks the gradient of "linear".
            windows = zip(logits.masked_fill(invalid, -math.inf), times, strict=True)
            likely = torch.stack([blockwise_causal_norm(a, t, causal_norm) for a, t in windows])
            causal = functional.binary_cross_entropy(likely, links, reduction="none")
            errors = 0.01 * errors + causal
        pairs = zip(links, times, strict=True)
        weights = torch.stack([link_weights(a, t, division_weight) for a, t in pairs])
        counts = counted.sum(dim=(1, 2))
        per_window = (errors * weights * counted).sum(dim=(1, 2)) / (counts + _EPS)
        sizes = counts.float() ** 0.2
        return (per_window * sizes).sum() / (sizes.sum() + _EPS)


def warmup_cosine(epoch: int, warmup_epochs: int, epochs: int, final: float = 0.001) -> float:
    """Give the part of the learning rate for an epoch, from 0.

    Linear from 0.01 to 1, then a half cosine, which falls to `final`.
    """
    if epoch < warmup_epochs:
        return 0.01 + 0.99 * epoch / warmup_epochs
    done = (epoch - warmup_epochs) / (epochs - warmup_epochs + 1)
    return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2


def drop_features(batch: Batch, probability: float) -> Batch:
    """Give a batch in which some windows have one vector for all cells: the mean of the batch.

    Parameters
    ----------
    batch : mapping of tensors
        ``pretrained_feats`` (B, N, C), ``padding_mask`` (B, N).
    probability : float
        Of a window, drawn from torch's generator.
    """
    features = batch["pretrained_feats"]
    real = ~batch["padding_mask"].bool()
    dropped = torch.rand(len(features), device=features.device) < probability
    mean = features[real].mean(dim=0)
    return {**batch, "pretrained_feats": torch.where(dropped[:, None, None], mean, features)}


class TrackingModule(LightningModule):
    """A model of Trackastra and how it is trained.

    Logs ``train_loss`` and ``val_loss``, and how many batches were skipped, ``train_nan``.

    Parameters
    ----------
    model : TrackingTransformer or TrackingTransformerwPretrainedFeats
        The latter takes ``pretrained_feats`` from the batch, the former leaves them.
    epochs, warmup_epochs : int
        Of the schedule, `warmup_cosine`.
    learning_rate, weight_decay : float
        Of AdamW.
    delta_cutoff, division_weight
        As `association_loss`.
    feature_dropout : float
        How many of the windows are trained on without pretrained features (`drop_features`).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        epochs: int,
        warmup_epochs: int = 10,
        learning_rate: float = 1e-4,
        weight_decay: float = 1e-5,
        delta_cutoff: int = 2,
        division_weight: float = 2.0,
        feature_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.model: Any = model
        self.epochs, self.warmup_epochs = epochs, min(warmup_epochs, epochs)
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.delta_cutoff, self.division_weight = delta_cutoff, division_weight
        self.feature_dropout = feature_dropout
        self.seen = 0

    def forward(self, batch: Batch) -> Tensor:
        """Predict the links of each window: logits (B, N, N)."""
        inputs = {"features": batch["features"], "padding_mask": batch["padding_mask"].bool()}
        if not self.model.config.get("pretrained_feat_dim"):
            return self.model(batch["coords"], **inputs)
        with whole_batches(self.model):
            return self.model(
                batch["coords"], pretrained_features=batch["pretrained_feats"], **inputs
            )

    def on_train_epoch_start(self) -> None:
        """Count the batches of this epoch."""
        self.seen = 0

    def training_step(self, batch: Batch, _: int) -> Tensor | None:
        """Give the loss of a batch; one that gives NaN is skipped, and counted."""
        self.seen += 1
        if self.feature_dropout:
            batch = drop_features(batch, self.feature_dropout)
        loss = self._loss(batch, "train_loss")
        failed = float(loss is None)
        self.log("train_nan", failed, on_step=False, on_epoch=True, sync_dist=True, reduce_fx="sum")
        if loss is not None:
            return loss
        if self.trainer.world_size == 1:
            return None
        # Other ranks wait for gradients.
        return torch.stack([(p * 0).nan_to_num().sum() for p in self.parameters()]).sum()

    def on_train_epoch_end(self) -> None:
        """Say how many were skipped, on all ranks together.

        Raises
        ------
        FloatingPointError
            Most of them were; on each rank alike, so that none waits for another.
        """
        # By Lightning, which reduces what is logged on each rank in an order of its own.
        skipped = int(self.trainer.callback_metrics["train_nan"])
        seen = self.seen * self.trainer.world_size
        if 2 * skipped > seen:
            raise FloatingPointError(
                f"{skipped} of {seen} batches give NaN in epoch {self.current_epoch}: "
                "lower the learning rate, train in float32, or look for NaN in coordinates and "
                "features"
            )
        if skipped:
            _log.warning(
                "%d of %d batches gave NaN in epoch %d and were skipped",
                skipped, seen, self.current_epoch,
            )  # fmt: skip

    def validation_step(self, batch: Batch, _: int) -> None:
        """Log the loss of a batch; one that gives NaN is left out."""
        self._loss(batch, "val_loss")

    def configure_optimizers(self) -> Any:
        """Give AdamW and its schedule, a step an epoch."""
        optimizer = torch.optim.AdamW(
            self.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: warmup_cosine(epoch, self.warmup_epochs, self.epochs)
        )
        return [optimizer], [schedule]

    def _loss(self, batch: Batch, name: str) -> Tensor | None:
        logits = self(batch)
        failed, loss = bool(torch.isnan(logits).any()), logits.new_zeros(())
        if not failed:
            loss = association_loss(
                logits,
                batch,
                causal_norm=self.model.config["causal_norm"],
                delta_cutoff=self.delta_cutoff,
                division_weight=self.division_weight,
            )
            failed = bool(torch.isnan(loss))
        # Without weight where it failed: a rank that logs nothing would keep others waiting.
        self.log(
            name, 0.0 if failed else loss, prog_bar=True, on_step=False, on_epoch=True,
            sync_dist=True, batch_size=0 if failed else len(batch["coords"]),
        )  # fmt: skip
        return None if failed else loss


def save_model(model: Any, folder: Path) -> None:
    """Write ``config.yaml`` and ``model.pt``; whoever reads finds old or new weights, whole."""
    folder.mkdir(parents=True, exist_ok=True)
    config, text = folder / "config.yaml", yaml.safe_dump(model.config)
    if not config.exists() or config.read_text() != text:  # on a full disk nothing would be left
        config.write_text(text)
    unfinished, weights = folder / f"model.pt.{os.getpid()}", BytesIO()
    torch.save(model.state_dict(), weights)  # which says of no full disk that it is full
    try:
        unfinished.write_bytes(weights.getbuffer())
        unfinished.replace(folder / "model.pt")
    finally:
        unfinished.unlink(missing_ok=True)


class BestModel(Callback):
    """Writes a model folder that ``Trackastra.from_folder`` loads: the best ``val_loss`` so far.

    Where samples are of `wrap`, it names their features in full (`ModelFeatures`), so that
    `cached_inference` can tell whether it has the same. The best loss is in Lightning's
    checkpoints, so a training that is resumed keeps a better model of before.

    Parameters
    ----------
    folder : path
    train_args : mapping
        For ``train_config.yaml``: plain values, what inference needs among them (``features``,
        ``pretrained_feats_model``, ``pretrained_feats_mode``,
        ``pretrained_feats_additional_props``, ``rotate_features``).

    Raises
    ------
    BackboneError
        When training starts: the folder's model was trained on other features.
    """

    def __init__(self, folder: str | os.PathLike[str], train_args: Mapping[str, Any]) -> None:
        self.folder, self.train_args, self.best = Path(folder), dict(train_args), math.inf

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write ``train_config.yaml``, and ``features.json`` where there are features to name."""
        features = ModelFeatures.of_data(getattr(trainer.train_dataloader, "dataset", None))
        check_resumed(self.folder, features)
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "train_config.yaml").write_text(yaml.safe_dump(self.train_args))
            if features is not None:
                features.write(self.folder)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the model where it is better than before."""
        loss = trainer.callback_metrics.get("val_loss")
        if trainer.sanity_checking or loss is None or not loss < self.best:  # it may be NaN
            return
        self.best = float(loss)
        if trainer.is_global_zero:
            save_model(pl_module.model, self.folder)

    def state_dict(self) -> dict[str, Any]:
        """Give what a checkpoint keeps."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint kept."""
        self.best = state_dict["best"]
