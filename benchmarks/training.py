"""What a training waits for: its start, and its samples with crops, augmentation and copies.

The yardsticks are Trackastra's own `CTCData`, built, and its samples without any features. Here
torch has one thread, as in DataLoader workers; samples are asked for in batches of 8, and one by
one, each at its place in an epoch's draws, as the data module asks.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import torch

from feature_cache import Augmentations, FeatureCache
from feature_cache.dataset import Drawn
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import load_ctc, wrap

from .batches import BATCH, SINGLE, write_hela
from .harness import OURS, Case, Options, interleave, seconds_each, seconds_of

LOAD = {"window_size": 6, "augment": 3, "crop_size": (320,)}
BARE = "CTCData, without features"


def run(options: Options) -> list[Case]:
    """Time starts, and samples."""
    torch.set_num_threads(1)
    os.environ["FEATURE_CACHE_MEMO"] = str(options.folder / "memo")
    root = write_hela(options.folder / "movies" / "01", quick=options.quick)
    cache = FeatureCache(options.folder / "cache")
    with joblib.parallel_config(backend="threading"):  # processes would stay for five minutes
        samples = [compare_samples(root, cache, options, compress=c) for c in (True, False)]
        return [compare_starts(root, cache, options), *samples]


def build(root: Path, load: dict[str, Any]) -> Any:
    from trackastra.data import CTCData

    return CTCData(str(root), **load)


def compare_starts(root: Path, cache: FeatureCache, options: Options) -> Case:
    load_ctc(root, cache, **LOAD)
    sides = {
        "CTCData": lambda: seconds_of(lambda: build(root, LOAD)),
        f"{OURS}, kept": lambda: seconds_of(lambda: load_ctc(root, cache, **LOAD)),
    }
    return Case("a start", "CTCData", interleave(sides, min(options.rounds, 3)))


def compare_samples(root: Path, cache: FeatureCache, options: Options, *, compress: bool) -> Case:
    load = {**LOAD, "compress": compress}
    data, kept = build(root, load), load_ctc(root, cache, **load)
    copies = Augmentations("default", copies=3, seed=0)
    cached = wrap(kept, cache, FakeBackbone(384), augmentations=copies, progress=False)
    cached.warm()
    places = [Drawn(i % len(data), 0, (0, i, 0)) for i in range(32 if options.quick else 512)]
    batches = [places[i : i + BATCH] for i in range(0, len(places), BATCH)]

    def each(read: Callable[[list[Drawn]], object]) -> Callable[[], float]:
        for batch in batches:
            read(batch)
        return lambda: seconds_each(read, batches, 0.1 if options.quick else 1.0) / BATCH

    def one_by_one(dataset: Any) -> Callable[[list[Drawn]], object]:
        return lambda batch: [dataset[n] for n in batch]

    sides = {
        BARE: each(one_by_one(data)),
        OURS: each(cached.__getitems__),
        SINGLE: each(one_by_one(cached)),
    }
    held = "compressed, as configurations have it" if compress else "held as arrays"
    return Case(f"a sample, {held}", BARE, interleave(sides, options.rounds))
