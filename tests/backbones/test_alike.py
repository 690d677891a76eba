"""A backbone of a spec, loaded again with what the spec tells."""

from __future__ import annotations

import pytest
import torch

from feature_cache import BackboneError, load_backbone
from feature_cache.backbones import find_factory
from feature_cache.backbones.from_spec import load_alike, options_of
from feature_cache.backbones.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from feature_cache.spec import BackboneSpec, Context

MADE = [
    ("efficientnet-lite0", "random:1", {}),
    ("efficientnet-lite0", "random:1", {"layer": "stride-8"}),
    ("timm/test_vit", "random:1", {"layer": 2}),
    ("timm/test_vit", "random:1", {"input_size": 96}),
    ("timm/test_convnext", "random:1", {"layer": -2}),
    ("debug/random", "random:7", {"stride": 4}),
    ("debug/encoded_labels", None, {"stride": 2}),
]


@pytest.mark.parametrize(("name", "weights", "options"), MADE)
def test_it_has_the_same_spec_and_gives_the_same(name, weights, options):
    made = load_backbone(name, weights, "cpu", **options)
    again = load_alike(BackboneSpec.from_json(made.spec.to_json()), weights, "cpu")
    assert again.spec == made.spec
    frames = torch.rand((1, 96, 96), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.embed(frames), made.embed(frames))


def test_it_computes_in_the_same_dtype():
    made = load_backbone("efficientnet-lite0", "random:1", "cpu", "bfloat16")
    assert load_alike(made.spec, "random:1", "cpu").spec == made.spec


def told(name: str, **fields) -> BackboneSpec:
    return BackboneSpec(**{"name": name, "revision": 1, "weights": "", "layer": "", "width": 8,
                           "stride": 16, **fields})  # fmt: skip


SCALED = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


@pytest.mark.parametrize(
    ("spec", "options"),
    [
        (
            told("facebook/sam2.1-hiera-tiny", input_size=(512, 512), resize="bilinear-antialias",
                 mean=(0.0, 0.0, 0.0)),
            {"input_size": (512, 512), "antialias": True, "standardize": False},
        ),
        (
            told("facebook/sam-vit-base", extra={"fit": "stretch"}, **SCALED),
            {"fit": "stretch", "standardize": True},
        ),
        (
            told("facebook/dinov2-base", input_size=(448, 224), **SCALED),
            {"input_size": (448, 224), "standardize": True},
        ),
        (
            told("facebookresearch/co-tracker", extra={"input_range": "0..255", "cells": "l2"}),
            {"input_range": "0..255", "input_size": None},
        ),
        (
            told("facebook/sam2.1-hiera-tiny", std=(0.5, 0.5, 0.5), resize="bilinear",
                 context=Context(2, 0), extra={"tile": 64, "halo": 8, "tiling": 1}),
            {"input_size": None, "antialias": False, "standardize": True, "context": (2, 0),
             "tile": 64, "halo": 8},
        ),
    ],
)  # fmt: skip
def test_options_are_told_by_fields_and_further_terms(spec, options):
    assert options_of(spec, find_factory(spec.name)) == options


def test_a_layer_that_the_model_has_not_is_left_to_the_comparison():
    spec = load_backbone("timm/test_vit", "random:1", "cpu").spec
    other = BackboneSpec.from_json({**spec.to_json(), "layer": "blocks.99"})
    assert load_alike(other, "random:1", "cpu").spec != other


def test_weights_that_are_gone_are_named(tmp_path):
    spec = load_backbone("efficientnet-lite0", "random:1", "cpu").spec
    with pytest.raises(BackboneError, match="no weights at"):
        _ = load_alike(spec, tmp_path / "gone.pt", "cpu").spec
