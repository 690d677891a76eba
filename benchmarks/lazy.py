"""A cold first epoch, filled as it is trained, against warming first: python -m benchmarks.lazy.

The backbone is a fake that sleeps for each frame, so that its cost is known; both sides run in
turn, on the same movie, loader and number of epochs, each on an empty cache. Printed are the ratio
of totals (lazy to warming first and then training), and the time to the first batch as a share of
the time that warming takes.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from feature_cache import CachedFeatureDataset, FeatureCache
from feature_cache.service import close_all
from feature_cache.testing import FakeBackbone

from .harness import OURS, Case, Options, interleave

WINDOW = 4
FIRST = "warming first"


class Windows(Dataset[dict[str, Any]]):
    def __init__(self, masks: np.ndarray[Any, Any]) -> None:
        self.labels = [np.unique(mask[mask > 0]) for mask in masks]

    def __len__(self) -> int:
        return len(self.labels) - WINDOW + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        tokens = [(t, n) for t in range(index, index + WINDOW) for n in self.labels[t]]
        times, labels = torch.tensor(np.array(tokens, dtype=np.int64)).T
        return {"timepoints": times, "labels": labels}


def make_movie(frames: int, size: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    masks = np.zeros((size, size), np.uint16)
    side = size // 8
    for label in range(1, 50):
        y, x = divmod(label - 1, 7)
        masks[y * side + 2 : (y + 1) * side - 2, x * side + 2 : (x + 1) * side - 2] = label
    return rng.integers(0, 4096, (frames, size, size), np.uint16), np.stack([masks] * frames)


def train(dataset: Any, workers: int, step: float, *, shuffle: bool) -> tuple[float, float]:
    """Train one epoch; give seconds to the first batch and in all."""
    options: dict[str, Any] = {"multiprocessing_context": "fork"} if workers else {}
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(
        dataset, batch_size=None, num_workers=workers, shuffle=shuffle, generator=generator,
        **options,
    )  # fmt: skip
    began, first = time.perf_counter(), 0.0
    for _ in loader:
        first = first or time.perf_counter() - began
        time.sleep(step)  # the optimiser
    return first, time.perf_counter() - began


def measure(options: argparse.Namespace, cost: float, *, lazy: bool) -> tuple[float, float]:
    """Give seconds to the first batch and in all, on an empty cache."""
    frames, masks = make_movie(options.frames, options.size)
    folder = Path(tempfile.mkdtemp())
    backbone = FakeBackbone(dim=64, stride=16, seconds_per_frame=cost)
    movie = FeatureCache(folder / "cache").movie(frames, masks, backbone, name="movie")
    movie.keys()
    dataset = CachedFeatureDataset(Windows(masks), [movie], progress=False)
    warming = 0.0
    if not lazy:
        began = time.perf_counter()
        dataset.warm()
        warming = time.perf_counter() - began
    first, total = train(dataset, options.workers, options.step, shuffle=options.shuffle)
    close_all()
    shutil.rmtree(folder)
    return (first if lazy else warming), warming + total


def run(options: Options) -> list[Case]:
    """Compare a cold first epoch with warming first, for one cost of a frame."""
    chosen = make_parser().parse_args(["--frames", "60"] if options.quick else [])
    cost = 0.02
    firsts: dict[str, list[float]] = {}

    def side(name: str, *, lazy: bool) -> Callable[[], float]:
        def total() -> float:
            first, seconds = measure(chosen, cost, lazy=lazy)
            firsts.setdefault(name, []).append(first)
            return seconds

        return total

    sides = {FIRST: side(FIRST, lazy=False), OURS: side(OURS, lazy=True)}
    totals = interleave(sides, 2 if options.quick else min(options.rounds, 5))
    name = f"{chosen.frames} frames of {1e3 * cost:.0f} ms"
    return [
        Case(f"{name}, all of the first epoch", FIRST, totals),
        Case(f"{name}, first batch", FIRST, firsts),
    ]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frames", type=int, default=400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--step", type=float, default=0.005, help="seconds of the optimiser")
    parser.add_argument("--costs", type=float, nargs="+", default=[0.005, 0.02, 0.05])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shuffle", action="store_true")
    return parser


def main() -> None:
    options = make_parser().parse_args()
    print("ms a frame   lazy s   warm+train s   ratio   first batch s   of warming")
    for cost in options.costs:
        pairs = [
            (measure(options, cost, lazy=True), measure(options, cost, lazy=False))
            for _ in range(options.repeats)
        ]
        ratio = statistics.median(lazy[1] / warm[1] for lazy, warm in pairs)
        share = statistics.median(lazy[0] / warm[0] for lazy, warm in pairs)
        (first, total), (_, other) = pairs[len(pairs) // 2]
        seconds = f"{1000 * cost:10.0f} {total:8.2f} {other:14.2f}"
        print(f"{seconds} {ratio:7.3f} {first:15.3f} {share:12.3f}", flush=True)


if __name__ == "__main__":
    main()
