from __future__ import annotations

import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from feature_cache import BackboneError, MissingDependencyError, UnknownNameError, load_backbone
from feature_cache.backbones.sam2 import NAMES, published_files

pytest.importorskip("sam2", reason="needs the package sam2")

TINY = "facebook/sam2.1-hiera-tiny"
SMALL = {"input_size": 256}
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*torch.jit.script.*:FutureWarning"
)  # SAM2Transforms


def relative(ours, expected):
    return float((ours - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def upstream():
    """The whole network, built by sam2's own function, with random weights."""
    from sam2.build_sam import build_sam2

    torch.manual_seed(3)
    return build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu").requires_grad_(False)


@pytest.fixture(scope="module")
def checkpoint(upstream, tmp_path_factory):
    """Its weights, in a file as the published ones are."""
    file = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": upstream.state_dict()}, file)
    return file


@pytest.fixture(scope="module")
def frame():
    return np.random.default_rng(0).random((300, 421), dtype=np.float32)


@pytest.fixture(scope="module")
def predicted(upstream, frame):
    """What SAM2ImagePredictor finds in the frame."""
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    predictor = SAM2ImagePredictor(upstream)
    predictor.set_image(np.repeat(frame[..., None], 3, axis=-1))
    return predictor._features


class TestParity:
    @pytest.mark.slow
    def test_image_embedding_equals_the_predictors(self, checkpoint, frame, predicted):
        backbone = load_backbone(TINY, checkpoint, "cpu", standardize=True)
        ours = backbone.embed(torch.from_numpy(frame)[None])
        expected = predicted["image_embed"].permute(0, 2, 3, 1)
        assert ours.shape == (1, 64, 64, 256)
        assert relative(ours, expected) <= 1e-4

    @pytest.mark.slow
    def test_high_resolution_equals_the_predictors(self, checkpoint, frame, predicted):
        backbone = load_backbone(f"{TINY}/highres", checkpoint, "cpu", standardize=True)
        ours = backbone.embed(torch.from_numpy(frame)[None])
        expected = predicted["high_res_feats"][0].permute(0, 2, 3, 1)
        assert ours.shape == (1, 256, 256, 32)
        assert relative(ours, expected) <= 1e-4

    @pytest.mark.parametrize("antialias", [False, True])
    def test_large_frames_are_resized_as_asked(self, antialias):
        """The predictor smooths frames that it shrinks; the predecessor does not."""
        from sam2.utils.transforms import SAM2Transforms

        frame = torch.rand(1, 300, 421, generator=torch.Generator().manual_seed(0))
        backbone = load_backbone(
            TINY, "random:0", "cpu", antialias=antialias, standardize=True, **SMALL
        )
        ours = backbone._as_input(frame)
        transforms = SAM2Transforms(256, 0.0)
        expected = transforms(frame[0].numpy()[..., None].repeat(3, axis=-1))[None]
        assert (relative(ours, expected) <= 1e-5) == antialias

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("highres", "cells", "width"),
        [pytest.param(False, 64, 256), pytest.param(True, 256, 32)],
    )
    def test_the_default_equals_the_predecessor(
        self, upstream, checkpoint, frame, monkeypatch, highres, cells, width
    ):
        """Its extractor, without the autocast that makes it compute in bfloat16."""
        module = pytest.importorskip("trackastra_pretrained_feats.pretrained_features")
        kind = module.SAM2HighresFeatures if highres else module.SAM2Features
        extractor = object.__new__(kind)
        extractor.model, extractor.device, extractor._input_size = upstream, "cpu", (1024, 1024)
        extractor._bb_feat_sizes = [(256, 256), (128, 128), (64, 64)]
        monkeypatch.setattr(module.torch, "autocast", lambda **_: nullcontext())
        expected = extractor._run_model([np.repeat(frame[None], 3, axis=0)])
        monkeypatch.undo()
        name = f"{TINY}/highres" if highres else TINY
        backbone = load_backbone(name, checkpoint, "cpu")
        ours = backbone.embed(torch.from_numpy(frame)[None])
        assert relative(ours, expected.reshape(1, cells, cells, width)) <= 1e-4


class TestSpec:
    def test_options_are_in_the_spec(self):
        specs = [
            load_backbone(name, "random:0", "cpu", **{**SMALL, **options}).spec
            for name, options in [
                (TINY, {}),
                (f"{TINY}/highres", {}),
                ("facebook/sam2-hiera-tiny", {}),
                (TINY, {"input_size": 512}),
                (TINY, {"antialias": True}),
                (TINY, {"standardize": True}),
            ]
        ]
        assert len({str(spec.to_json()) for spec in specs}) == len(specs)

    def test_says_everything(self):
        spec = load_backbone(TINY, "random:0", "cpu", standardize=True).spec
        assert spec.input_size == (1024, 1024)
        assert (spec.resize, spec.layer) == ("bilinear", "backbone_fpn[-1]")
        assert spec.mean == (0.485, 0.456, 0.406)
        assert spec.extra == {"no_mem_embed": True}

    def test_files_are_those_that_the_package_names(self):
        from sam2.build_sam import HF_MODEL_ID_TO_FILENAMES

        models = {name.removesuffix("/highres") for name in NAMES}
        assert {name: published_files(name) for name in models} == HF_MODEL_ID_TO_FILENAMES

    def test_only_what_has_a_part_in_the_grid_enters_the_key(self, upstream, checkpoint, tmp_path):
        state = {name: tensor.clone() for name, tensor in upstream.state_dict().items()}
        state["memory_encoder.out_proj.bias"] += 1
        torch.save({"model": state}, tmp_path / "memory.pt")
        state["image_encoder.trunk.patch_embed.proj.bias"] += 1
        torch.save({"model": state}, tmp_path / "trunk.pt")
        files = (checkpoint, tmp_path / "memory.pt", tmp_path / "trunk.pt")
        specs = [load_backbone(TINY, file, "cpu").spec for file in files]
        assert specs[0] == specs[1] != specs[2]


class TestMistakes:
    def test_a_checkpoint_of_another_size_says_what_differs(self, tmp_path):
        torch.save({"model": {"image_encoder.trunk.x": torch.zeros(1)}}, tmp_path / "bad.pt")
        with pytest.raises(BackboneError, match=r"missing \('.*1 unexpected \('image_encoder.tru"):
            _ = load_backbone(TINY, tmp_path / "bad.pt", "cpu").spec

    def test_a_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "sam2", None)
        with pytest.raises(MissingDependencyError, match=r"feature-cache\[sam2\]"):
            _ = load_backbone(TINY, "random:0", "cpu").spec

    def test_unknown_option_and_input_size(self):
        with pytest.raises(UnknownNameError, match=r"option of .*'antialia'.*did you mean 'antia"):
            load_backbone(TINY, antialia=True)
        with pytest.raises(BackboneError, match="multiple of 32"):
            load_backbone(TINY, input_size=100)

    def test_weights_that_can_not_be_had(self, monkeypatch, tmp_path):
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(BackboneError, match=r"sam2\.1_hiera_base_plus\.pt of .*weights=<path"):
            _ = load_backbone("facebook/sam2.1-hiera-base-plus/highres", device="cpu").spec


def test_two_live_backbones_do_not_disturb_each_other():
    frames = torch.rand(1, 64, 96, generator=torch.Generator().manual_seed(0))
    one = load_backbone(TINY, "random:0", "cpu", **SMALL)
    before = one.embed(frames)
    other = load_backbone(f"{TINY}/highres", "random:1", "cpu", **SMALL)
    other.embed(frames)
    assert torch.equal(one.embed(frames), before)
