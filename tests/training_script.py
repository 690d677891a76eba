"""A training script that knows Trackastra, its pull request 61's flags, and nothing of us."""

from __future__ import annotations

import argparse
from pathlib import Path

import lightning
import torch
import yaml
from trackastra.data import collate_sequence_padding
from trackastra.data.distributed import BalancedDataModule
from trackastra_pretrained_feats import TrackingTransformerwPretrainedFeats


def is_true(text: str) -> bool:
    return text in ("t", "true", "True", "1")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--input_train", nargs="+")
    parser.add_argument("--input_val", nargs="+")
    parser.add_argument("--outdir", type=Path)
    parser.add_argument("--cachedir")
    parser.add_argument("--window", type=int, default=3)
    parser.add_argument("--augment", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--num_workers", type=int, default=0)
    parser.add_argument("--features", default="wrfeat")
    parser.add_argument("--pretrained_feats_model")
    parser.add_argument("--pretrained_feats_mode", default="mean_patches_exact")
    parser.add_argument("--pretrained_feats_additional_props")
    parser.add_argument("--pretrained_n_augs", type=int, default=3)
    parser.add_argument("--rotate_features", type=is_true, default=True)
    parser.add_argument("--dim", type=int, help="of the pretrained features")
    parser.add_argument("--feat_dim", type=int, default=0, help="of the shallow ones")
    return parser.parse_args(arguments)


class SaveModel(lightning.Callback):
    """Writes the model's folder, as the script of pull request 61 does."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args

    def on_fit_start(self, trainer, module):
        if trainer.is_global_zero:
            self.folder.mkdir(parents=True, exist_ok=True)
            args = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.args).items()}
            (self.folder / "train_config.yaml").write_text(yaml.safe_dump(args))

    def on_validation_end(self, trainer, module):
        if trainer.is_global_zero and not trainer.sanity_checking:
            module.model.save(self.folder)


class Training(lightning.LightningModule):
    """Learns the association matrix, without upstream's weights."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.losses = []
        self.outdir = args.outdir
        self.model = TrackingTransformerwPretrainedFeats(
            coord_dim=2, feat_dim=args.feat_dim, d_model=16, nhead=2, num_encoder_layers=1,
            num_decoder_layers=1, pos_embed_per_dim=4, window=args.window,
            pretrained_feat_dim=args.dim, reduced_pretrained_feat_dim=8, feat_embed_per_dim=2,
        )  # fmt: skip

    def training_step(self, batch, _):
        predicted = self.model(
            batch["coords"],
            batch["features"],
            pretrained_features=batch["pretrained_feats"],
            padding_mask=batch["padding_mask"],
        )
        padded = batch["padding_mask"]
        real = ~(padded.unsqueeze(1) | padded.unsqueeze(2))
        loss = torch.nn.functional.binary_cross_entropy_with_logits(
            predicted[real], batch["assoc_matrix"][real]
        )
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch, _):
        self.training_step(batch, _)

    def on_fit_end(self):
        lines = "".join(f"{loss}\n" for loss in self.losses)
        (self.outdir / f"losses-{self.global_rank}").write_text(lines)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main(args: argparse.Namespace) -> None:
    datamodule = BalancedDataModule(
        input_train=args.input_train,
        input_val=args.input_val,
        cachedir=args.cachedir,
        augment=args.augment,
        distributed=args.devices > 1,
        dataset_kwargs={
            "ndim": 2,
            "window_size": args.window,
            "features": args.features,
            "pretrained_feats_model": args.pretrained_feats_model,
            "pretrained_feats_mode": args.pretrained_feats_mode,
            "pretrained_feats_additional_props": args.pretrained_feats_additional_props,
            "pretrained_n_augs": args.pretrained_n_augs,
            "rotate_features": args.rotate_features,
        },
        sampler_kwargs={"batch_size": 2, "n_pool": 2, "num_samples": 12},
        loader_kwargs={
            "batch_size": 2,
            "num_workers": args.num_workers,
            "persistent_workers": args.num_workers > 0,
            "collate_fn": collate_sequence_padding,
        },
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        max_epochs=args.epochs,
        default_root_dir=args.outdir,
        callbacks=[SaveModel(args.outdir / "model", args)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Training(args), datamodule=datamodule)


if __name__ == "__main__":
    main(parse())
