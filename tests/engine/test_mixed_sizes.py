"""Frames of every size, draw and movie share a batch, where the network's input is fixed."""

from __future__ import annotations

import math
from functools import partial
from itertools import starmap

import pytest
import torch
from torch import nn

from feature_cache import Augmentations, BackboneSpec, FeatureCache, SpaceSpec
from feature_cache.backbones.base import TorchBackbone, resize_frames
from feature_cache.engine import device
from feature_cache.rounding import records_agree
from feature_cache.warm import plan_warm, run_warm
from synthetic import make_movie

SIZES = (48, 64), (64, 80), (80, 48)


class Tiny(TorchBackbone):
    """A convolution that sees frames in 64x64, or as they are."""

    def __init__(self, size: tuple[int, int] | None) -> None:
        super().__init__("tiny", "random:0", "cpu")
        self.size, self._batches = size, []

    def _describe(self, weights):
        return BackboneSpec(
            name="tiny", revision=1, weights=weights, layer="conv", width=8, stride=16,
            input_size=self.size, resize="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3,
        )  # fmt: skip

    def _build(self):
        torch.manual_seed(0)
        return nn.Conv2d(3, 8, 16, stride=16)

    def _as_input(self, images):
        size = self.size or tuple(images.shape[1:])
        return super()._as_input(resize_frames(images, size, "bilinear"))

    def _forward(self, inputs):
        self._batches.append(len(inputs))
        return self.module(inputs).permute(0, 2, 3, 1)


class Overriding(Tiny):
    """One whose own `embed` is to be called, whatever it is."""

    def embed(self, frames):
        return super().embed(frames) + 1


@pytest.mark.parametrize("plain", "01")
@pytest.mark.parametrize("kind", [Tiny, Overriding])
def test_frames_of_all_sizes_share_batches(tmp_path, monkeypatch, plain, kind):
    monkeypatch.setenv(device.PLAIN, plain)
    movies = [make_movie(3, *shape)[:2] for shape in SIZES]
    backbone, copies = kind((64, 64)), Augmentations("default", 3)
    cache = FeatureCache(tmp_path / "cache")
    run_warm(plan_warm(cache, movies, backbone, augmentations=copies), batch_size=8)
    if kind is Tiny:
        assert sum(count > 1 for count in backbone._batches) <= math.ceil(36 / 8) + 1
    spec = SpaceSpec(backbone.spec, "mean_patches_exact", "float16")
    alone = FeatureCache(tmp_path / "alone")
    run_warm(plan_warm(alone, movies, kind((64, 64)), augmentations=copies), batch_size=1)
    for frames, masks in movies:
        for draw in copies.draws():
            one, other = (
                each.get_or_compute(frames, masks, backbone, draw=draw) for each in (cache, alone)
            )
            assert all(starmap(partial(records_agree, spec=spec), zip(one, other, strict=True)))


def test_sizes_stay_apart_where_the_network_sees_them(tmp_path):
    movies = [make_movie(2, *shape)[:2] for shape in SIZES[:2]]
    backbone = Tiny(None)
    run_warm(plan_warm(FeatureCache(tmp_path / "cache"), movies, backbone), batch_size=8)
    assert sorted(backbone._batches) == [2, 2]
