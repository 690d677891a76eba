"""Several layers of one forward pass: the records of each are those that it has alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_cache import Augmentations, BackboneError, FeatureCache, load_backbone
from feature_cache.backbones.several_layers import Layers
from feature_cache.spec import SpaceSpec
from feature_cache.warm import plan_warm, run_warm

COPIES = Augmentations("default", copies=2, seed=1)
POOLINGS = ["mean_patches_exact", "nearest_patch", None]
LAYERS = {
    "efficientnet-lite0?layer={}": ("stride-32", "stride-8"),
    "timm/test_vit?layer={}&input_size=96": ("-1", "2"),
    "timm/test_convnext?layer={}": ("0", "2"),
}


def load(name):
    return load_backbone(name, "random:1", "cpu")


def warm(cache, movie, backbone, **options):
    plan = plan_warm(cache, [movie], backbone, augmentations=COPIES, **options)
    return run_warm(plan)


def count_passes(monkeypatch, backbone):
    """Count the forward passes of a backbone's network."""
    first, passes = getattr(backbone, "members", [backbone])[0], []
    original = type(first)._forward_layers

    def forward(self, inputs, members):
        passes.append(len(inputs))
        return original(self, inputs, members)

    monkeypatch.setattr(type(first), "_forward_layers", forward)
    return passes


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "convnext" in n else []) for n in LAYERS]
)
@pytest.mark.parametrize("way", [pytest.param("plain", marks=pytest.mark.slow), "device"])
def test_warmed_together_they_are_what_they_are_alone(tmp_path, small, monkeypatch, name, way):
    monkeypatch.setenv("FEATURE_CACHE_PLAIN", "1" if way == "plain" else "0")
    together = load(name.format(",".join(LAYERS[name])))
    cache, alone = FeatureCache(tmp_path / "together"), FeatureCache(tmp_path / "alone")
    report = warm(cache, small, together, pooling=POOLINGS)
    assert report.failed == 0
    assert report.computed == 2 * 3 * 3 * len(small[0])
    for layer in LAYERS[name]:
        backbone = load(name.format(layer))
        warm(alone, small, backbone, pooling=POOLINGS)
        for pooling in POOLINGS:
            for draw in COPIES.draws():
                spec = SpaceSpec(backbone.spec, pooling)
                here, there = (
                    one.movie(*small, backbone, pooling=pooling, draw=draw)
                    for one in (cache, alone)
                )
                assert (here.keys() == there.keys()).all()
                assert spec in {SpaceSpec(s, pooling) for s in together.specs}
                for one, other in zip(here.get(), there.get(), strict=True):
                    assert one.features.tobytes() == other.features.tobytes()
                    assert np.array_equal(one.labels, other.labels)


def test_one_forward_pass_serves_all(tmp_path, small, monkeypatch):
    name = "efficientnet-lite0?layer=stride-4,stride-8,stride-16,stride-32"
    backbone = load(name)
    passes = count_passes(monkeypatch, backbone)
    cache = FeatureCache(tmp_path / "a")
    plan = plan_warm(cache, [small], backbone)
    assert (plan.missing, plan.tasks[0].embeddings) == (4 * len(small[0]), len(small[0]))
    run_warm(plan)
    assert sum(passes) == len(small[0])


def test_what_is_there_of_one_layer_is_not_computed_again(tmp_path, small):
    cache = FeatureCache(tmp_path / "a")
    cache.get_or_compute(*small, load("efficientnet-lite0?layer=stride-8"))
    report = run_warm(
        plan_warm(cache, [small], load("efficientnet-lite0?layer=stride-8,stride-32"))
    )
    assert (report.present, report.computed) == (len(small[0]), len(small[0]))


def test_other_masks_are_pooled_from_the_grids_of_all_layers(tmp_path, small, monkeypatch):
    frames, masks = small
    backbone = load("efficientnet-lite0?layer=stride-8,stride-32")
    cache = FeatureCache(tmp_path / "a")
    run_warm(plan_warm(cache, [small], backbone, dense="original"))
    passes = count_passes(monkeypatch, backbone)
    plan = plan_warm(cache, [(frames, np.where(masks == masks.max(), 0, masks))], backbone)
    assert plan.from_grids == plan.missing > 0
    assert run_warm(plan).failed == 0
    assert passes == []


def test_a_layer_named_twice_is_one():
    assert len(load("timm/test_vit?layer=-1,5").specs) == 1


def test_who_wants_one_kind_of_features_is_told_to_choose(cache, small):
    backbone = load("efficientnet-lite0?layer=stride-8,stride-32")
    with pytest.raises(BackboneError, match=r"several layers \(stride-8, stride-32\): name one"):
        cache.get_or_compute(*small, backbone)
    with pytest.raises(BackboneError, match="gives one layer at a time"):
        Layers([load("debug/random")] * 2)


def test_the_network_is_loaded_once_and_watched(small, cache):
    backbone = load("timm/test_vit?layer=0,2")
    assert len({id(one.module) for one in backbone.members}) == 1
    with torch.no_grad():
        next(backbone.members[0].module.parameters()).add_(1)
    plan = plan_warm(cache, [small], backbone)
    report = run_warm(plan)
    assert report.computed == 0
    assert "is not as it was loaded" in report.failures[0].reason
