"""Pooled features against those of the real trackastra-pretrained-feats, on a real frame."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from skimage.measure import regionprops

from feature_cache.normalize import normalize
from feature_cache.pooling import pool
from feature_cache.regions import Regions
from feature_cache.spec import Normalization

MODES = ("nearest_patch", "mean_patches_exact", "max_patches_exact")


@pytest.fixture(scope="module")
def upstream():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # importing it warns of its own dependencies
        import trackastra_pretrained_feats.pretrained_features as module
    return module


def their_pooling(upstream, grid, mask, mode, folder):
    """Run upstream's own pooling code on a grid given to it."""

    class Given(upstream.FeatureExtractor):
        def _run_model(self, images, **kwargs):
            raise AssertionError("the grid is given")

        def _load_features(self):
            return torch.from_numpy(grid).reshape(1, -1, grid.shape[-1])

    gh, gw, width = grid.shape
    extractor = Given(image_size=mask.shape, save_path=folder, device="cpu", mode=mode)
    extractor.hidden_state_size = width
    extractor.input_size = (gh * 16, gw * 16)
    extractor.final_grid_size = (gh, gw)
    regions = regionprops(mask)
    _, features = extractor.extract_embedding(
        mask[None],
        np.zeros(len(regions), int),
        np.array([region.label for region in regions]),
        np.array([region.centroid for region in regions]),
    )
    return features.numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(64, 64), (44, 69), (21, 21)])
def test_equals_upstream_on_hela(upstream, hela, mode, shape, tmp_path):
    mask = hela[1][3].astype(np.int32)
    grid = np.random.default_rng(1).normal(size=(*shape, 32)).astype(np.float32)
    theirs = their_pooling(upstream, grid, mask, mode, tmp_path)
    ours = pool(grid, mask, mode)
    assert len(Regions.of_mask(mask).labels) == len(ours) > 100
    assert np.abs(ours - theirs).max() <= 1e-5


def test_normalisation_equals_upstream_on_hela(upstream, hela):
    frames = hela[0][:2].astype(np.float32)
    theirs = upstream.percentile_norm(frames.copy())
    for frame, expected in zip(frames, theirs, strict=True):
        assert np.abs(normalize(frame, Normalization()) - expected).max() <= 1e-6
