"""What the real packages give for the same weights and the same frame."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from feature_cache.backbones import cellpose, sam

Frames = np.ndarray[Any, np.dtype[np.float32]]


@pytest.fixture(scope="session")
def predecessor() -> Any:
    """The module of trackastra-pretrained-feats that has the extractors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns of its own dependencies
        import trackastra_pretrained_feats.pretrained_features as module
    return module


@pytest.fixture
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAM's and cellpose's encoders with two layers, one with windows and one global."""
    for module, name in ((sam, "base"), (cellpose, "large")):
        sizes = dict(module.ENCODER_SIZES)
        sizes[name] = {**sizes[name], "num_hidden_layers": 2, "global_attn_indexes": (1,)}
        monkeypatch.setattr(module, "ENCODER_SIZES", sizes)


@pytest.fixture
def extract() -> Callable[[Any, Frames], torch.Tensor]:
    """Run an extractor on normalised frames: (B, cells, C)."""

    def run(extractor: Any, frames: Frames) -> torch.Tensor:
        extractor.do_normalize = False
        batches = extractor._prepare_batches(frames.copy())
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the extractors' own making
            return torch.cat([extractor._run_model(batch) for _, batch in batches])

    return run


@pytest.fixture(scope="session")
def blobs() -> Callable[..., torch.Tensor]:
    """Make normalised frames of a given size with structure at every scale: (B, H, W) float32."""

    def make(height: int, width: int, count: int = 1) -> torch.Tensor:
        rng = np.random.default_rng(height * width)
        y, x = np.mgrid[:height, :width]
        waves = np.sin(x / 7.0) * np.cos(y / 11.0) + np.sin((x + 2 * y) / 40.0)
        frames = 0.5 + 0.2 * waves + 0.1 * rng.random((count, height, width))
        return torch.from_numpy(frames.clip(0, 1).astype(np.float32))

    return make
