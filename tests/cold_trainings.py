"""Cold trainings for the tests of the service: a movie, its samples, and who embedded what."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from feature_cache import CachedFeatureDataset, FeatureCache
from feature_cache.service import close_all, process_engines, runtime_folder
from feature_cache.store.maintenance import verify
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

FRAMES, WINDOW = 24, 4


class Windows(Dataset):
    """Windows of consecutive frames, each with all its tokens."""

    def __init__(self, masks: np.ndarray, size: int = WINDOW) -> None:
        self.labels = [np.unique(mask[mask > 0]) for mask in masks]
        self.size = size

    def __len__(self) -> int:
        return len(self.labels) - self.size + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in range(len(self)):
            raise IndexError(index)
        tokens = [(t, n) for t in range(index, index + self.size) for n in self.labels[t]]
        times, labels = torch.tensor(np.array(tokens, dtype=np.int64)).T
        return {"timepoints": times, "labels": labels}


def make_dataset(
    root: Path | str, backbone: Any = None, *, frames: int = FRAMES, seed: int = 0, **options: Any
) -> CachedFeatureDataset:
    images, masks, _ = make_movie(frames, seed=seed)
    backbone = backbone or FakeBackbone(dim=4)
    movie = FeatureCache(root).movie(images, masks, backbone, name="movie")
    return CachedFeatureDataset(Windows(masks), [movie], **options)


def expected_of(root: Path | str, **options: Any) -> list[torch.Tensor]:
    """Give what the samples must hold, from a cache warmed beforehand."""
    dataset = make_dataset(root, **options)
    dataset.warm()
    return [dataset[index]["pretrained_feats"] for index in range(len(dataset))]


def make_loader(dataset: Any, workers: int, method: str | None, **options: Any) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=method if workers else None,
        **options,
    )


def embeddings(log: Path) -> Counter[str]:
    """Count how often each frame was embedded, by whatever process."""
    return Counter(log.read_text().split() if log.exists() else [])


def damage(root: Path) -> list[Any]:
    """Verify a cache; what processes left that were killed is no damage."""
    return [finding for finding in verify(root, deep=True) if finding.kind != "leftover"]


def start_serving(root: Path, *options: str) -> subprocess.Popen[str]:
    """Start feature-cache serve, and wait until it serves."""
    command = [sys.executable, "-m", "feature_cache.cli", "serve", "--cache", str(root)]
    serving = subprocess.Popen(
        [*command, "--backbone", "debug/random", *options], stderr=subprocess.PIPE, text=True
    )
    assert "serving debug/random" in serving.stderr.readline()
    return serving


def wait_until(holds: Callable[[], object], seconds: float = 60.0) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return bool(holds())


def sockets() -> list[str]:
    folder = runtime_folder()
    return sorted(os.listdir(folder)) if folder.exists() else []


@contextmanager
def nothing_left() -> Iterator[None]:
    """Check that no socket and no thread of ours is there afterwards."""
    import threading

    if sockets():  # a collection takes a good part of a second
        gc.collect()
    close_all()  # what earlier tests left
    before = {*sockets()}  # of a process that was killed as it made one
    yield

    def ours() -> list[str]:
        names = [thread.name for thread in threading.enumerate()]
        beats = ("feature_cache heartbeat", "feature_cache notes")  # as long as the process
        return [n for n in names if n.startswith("feature_cache") and n not in beats]

    def closed() -> bool:
        if {*sockets()} - before:
            gc.collect()  # an error may have the dataset in its traceback
        return not {*sockets()} - before

    left = not wait_until(closed), sockets(), list(process_engines._hosts)
    close_all()
    assert not left[0], left
    assert wait_until(lambda: not ours()), ours()
