from __future__ import annotations

import json
import pickle
import sys

import pytest
import torch

from feature_cache import (
    BackboneError,
    FrameError,
    MissingDependencyError,
    UnknownNameError,
    load_backbone,
)

timm = pytest.importorskip("timm", reason="needs the package timm")


def load(model, weights="random:0", **options):
    return load_backbone(f"timm/{model}", weights, "cpu", **options)


@pytest.fixture(scope="module")
def frames():
    return torch.rand(2, 96, 160, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "options", "grid", "stride"),
    [
        ("convnext_atto", {}, (3, 5, 320), 32),
        ("convnext_atto", {"layer": -2}, (6, 10, 160), 16),
        ("convnext_atto", {"layer": 0, "input_size": 64}, (16, 16, 40), 4),
        ("efficientnet_b0", {"layer": 2}, (12, 20, 40), 8),
        ("vit_tiny_patch16_224", {}, (14, 14, 192), 16),
        ("vit_tiny_patch16_224", {"input_size": (96, 160)}, (6, 10, 192), 16),
        ("vit_small_patch16_dinov3", {}, (16, 16, 384), 16),
        ("eva02_tiny_patch14_224", {}, (16, 16, 192), 14),
        ("swin_tiny_patch4_window7_224", {"layer": 1}, (28, 28, 192), 8),
    ],
)
def test_width_and_stride_come_from_the_model(frames, model, options, grid, stride):
    backbone = load(model, **options)
    spec = backbone.spec
    assert (spec.width, spec.stride) == (grid[2], stride)
    assert backbone.embed(frames[:1]).shape == (1, *grid)


@pytest.mark.parametrize("model", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_tokens_equal_forward_features_of_timm(frames, model):
    """Prefix tokens dropped, patch tokens row by row."""
    backbone = load(model)
    network, spec = backbone.module, backbone.spec
    resized = torch.nn.functional.interpolate(
        frames[:, None], spec.input_size, mode="bicubic", antialias=True
    )
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    with torch.inference_mode():
        tokens = network.forward_features((resized.repeat(1, 3, 1, 1) - mean) / std)
    expected = tokens[:, network.num_prefix_tokens :].reshape(2, *backbone.embed(frames).shape[1:])
    torch.testing.assert_close(backbone.embed(frames), expected, rtol=1e-4, atol=1e-5)


def test_maps_equal_forward_features_of_timm(frames):
    backbone = load("convnext_atto")
    mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.spec.mean, backbone.spec.std))
    with torch.inference_mode():
        maps = backbone.module.forward_features((frames[:, None].repeat(1, 3, 1, 1) - mean) / std)
    torch.testing.assert_close(
        backbone.embed(frames), maps.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5
    )


def test_a_layer_has_one_name():
    assert load("test_vit", layer=-1).spec == load("test_vit", layer=5).spec
    assert load("test_vit", layer=-2).spec != load("test_vit", layer=-1).spec


def test_frames_are_rounded_up_so_that_the_grid_spans_them(frames):
    grid = load("test_convnext").embed(frames[:, :70, :111])
    assert grid.shape == (2, 3, 4, 64)


class TestWeights:
    def test_a_checkpoint_of_timm(self, tmp_path, frames):
        torch.manual_seed(1)
        network = timm.create_model("test_vit")
        torch.save(network.state_dict(), tmp_path / "whole.pth")
        network.reset_classifier(0)
        torch.save(network.state_dict(), tmp_path / "headless.pth")
        network.reset_classifier(7)
        torch.save({"state_dict": network.state_dict()}, tmp_path / "tuned.pth")
        ours = [
            load("test_vit", tmp_path / f"{n}.pth", layer=2)
            for n in ("whole", "headless", "tuned")
        ]  # fmt: skip
        assert ours[0].spec == ours[1].spec == ours[2].spec
        assert ours[0].spec != load("test_vit", layer=2).spec
        assert "state_dict" not in ours[0].module.pretrained_cfg
        assert torch.equal(ours[0].embed(frames), ours[2].embed(frames))

    def test_safetensors(self, tmp_path):
        from safetensors.torch import save_file

        state = timm.create_model("test_vit").state_dict()
        save_file(state, tmp_path / "a.safetensors")
        torch.save(state, tmp_path / "a.pth")
        specs = [load("test_vit", tmp_path / f"a.{kind}").spec for kind in ("safetensors", "pth")]
        assert specs[0] == specs[1]

    def test_another_input_size_gives_another_position_embedding(self, tmp_path):
        """One file, two networks: the digest remembered for one is not taken for the other's."""
        torch.save(timm.create_model("test_vit").state_dict(), tmp_path / "a.pth")
        digests = {
            load("test_vit", tmp_path / "a.pth", input_size=n).spec.weights for n in (160, 96)
        }
        assert len(digests) == 2

    def test_one_of_another_model_says_what_differs(self, tmp_path):
        torch.save(timm.create_model("test_convnext").state_dict(), tmp_path / "a.pth")
        with pytest.raises(BackboneError, match=r"does not fit timm/test_vit: .*cls_token"):
            _ = load("test_vit", tmp_path / "a.pth").spec

    def test_its_own_come_from_the_hub(self, monkeypatch, tmp_path):
        asked = []
        state = timm.create_model("test_vit").state_dict()
        torch.save(state, tmp_path / "a.pth")
        monkeypatch.setattr(
            "feature_cache.backbones.timm.hub_file",
            lambda *names: asked.append(names) or tmp_path / "a.pth",
        )
        assert load("test_vit", None).spec == load("test_vit", tmp_path / "a.pth").spec
        assert set(asked) == {("timm/test_vit.r160_in1k", "model.safetensors")}

    def test_how_a_repository_builds_its_model_is_in_the_key(self, monkeypatch, tmp_path):
        file = tmp_path / "config.json"
        monkeypatch.setattr("feature_cache.backbones.timm.hub_file", lambda *names: file)
        specs = []
        for args in ({}, {"act_layer": "relu"}):
            file.write_text(json.dumps({"architecture": "test_vit", "model_args": args}))
            specs.append(load_backbone("timm/hf-hub:acme/vit", "random:0", "cpu").spec)
        assert specs[0].weights == specs[1].weights
        assert specs[0] != specs[1]


class TestMistakes:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: load("convnext_attto").spec, "model of timm.*did you mean 'convnext_atto"),
            (
                lambda: load("test_vit.nope").spec,
                "model of timm.*'test_vit.nope'.*test_vit.r160_in1k",
            ),
            (lambda: load("test_vit", layer=6).spec, "layer of timm/test_vit '6'"),
            (lambda: load("test_vit", layers=6), "option of timm/test_vit 'layers'.*'layer'"),
        ],
    )
    def test_unknown_names(self, make, message):
        with pytest.raises(UnknownNameError, match=message):
            make()

    def test_input_size_that_does_not_fit(self):
        with pytest.raises(BackboneError, match="no multiple of 16"):
            _ = load("test_vit", input_size=100).spec

    def test_frames_that_do_not_fit(self):
        with pytest.raises(FrameError, match=r"20x100 pixels .* smaller than one cell"):
            load("test_convnext").embed(torch.zeros(1, 20, 100))
        with pytest.raises(FrameError, match=r"shape \(1, 3, 64, 64\).*one channel"):
            load("test_convnext").embed(torch.zeros(1, 3, 64, 64))

    def test_a_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "timm", None)
        with pytest.raises(MissingDependencyError, match=r"feature-cache\[timm\]"):
            _ = load("test_vit").spec


def test_a_pickle_leaves_the_network_behind(frames):
    backbone = load("test_vit")
    expected = backbone.embed(frames)
    data = pickle.dumps(backbone)
    assert len(data) < 5_000
    assert torch.equal(pickle.loads(data).embed(frames), expected)
