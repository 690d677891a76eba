from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from comparison import relative_error
from feature_cache import (
    BackboneError,
    BackboneSpec,
    MissingDependencyError,
    UnknownNameError,
    load_backbone,
)
from feature_cache.normalize import normalize
from feature_cache.spec import Normalization

NAME = "weigertlab/tarrow"
yaml = pytest.importorskip("yaml")


def write_folder(folder, **kwargs):
    folder.mkdir(exist_ok=True)
    (folder / "model_kwargs.yaml").write_text(yaml.safe_dump(kwargs))
    return folder


@pytest.mark.filterwarnings("ignore")
class TestReal:
    @pytest.fixture
    def tarrow(self):
        return pytest.importorskip("tarrow", reason="tarrow is not installed")

    @pytest.mark.parametrize(
        ("architecture", "width"), [("unet", 32), ("unet_16fmaps", 16), ("fpn_resnet", 16)]
    )
    def test_equals_tarrow(self, tarrow, tmp_path, architecture, width):
        from tarrow.models import TimeArrowNet
        from tarrow.utils import normalize as their_normalize

        network = TimeArrowNet(backbone=architecture, outdir=tmp_path / "model").eval()
        network.save()
        frame = np.random.default_rng(2).gamma(2.0, 900.0, (69, 110)).astype(np.float32)
        loaded = TimeArrowNet.from_folder(tmp_path / "model", from_state_dict=True).eval()
        with torch.inference_mode():
            theirs = loaded.backbone(torch.from_numpy(their_normalize(frame))[None, None])
        ours = load_backbone(NAME, tmp_path / "model", "cpu")
        assert (ours.spec.width, ours.spec.layer) == (width, architecture)
        pixels = torch.from_numpy(normalize(frame, ours.spec.normalization))[None]
        assert relative_error(ours.embed(pixels), theirs.permute(0, 2, 3, 1)) < 1e-4

    def test_random_weights_conform(self, tarrow, blobs):
        one, same, other = (load_backbone(NAME, f"random:{n}", "cpu") for n in (0, 0, 1))
        assert one.spec == same.spec != other.spec
        frames = blobs(50, 61, count=2)
        grid = one.embed(frames)
        assert grid.shape == (2, 50, 61, 32)
        assert torch.isfinite(grid).all()
        torch.testing.assert_close(grid[1:], one.embed(frames[1:]), rtol=1e-4, atol=1e-5)

    def test_weights_of_another_backbone(self, tarrow, tmp_path):
        from tarrow.models import TimeArrowNet

        TimeArrowNet(backbone="unet_16fmaps", outdir=tmp_path / "model").save()
        write_folder(tmp_path / "model", backbone="unet")
        with pytest.raises(BackboneError, match="of another shape"):
            _ = load_backbone(NAME, tmp_path / "model").spec


def test_spec_says_it_all(tmp_path):
    folder = write_folder(tmp_path, backbone="unet_16fmaps", n_input_channels=1)
    spec = load_backbone(NAME, folder)._describe("0")
    assert BackboneSpec.from_json(spec.to_json()) == spec
    assert (spec.width, spec.stride, spec.input_size, spec.channels) == (16, 1, None, "single")
    assert spec.normalization == Normalization("percentile", 0.0, 100.0)
    assert spec.extra == {"percentiles": (1.0, 99.8), "clipped": False}


def test_needs_a_folder(tmp_path):
    with pytest.raises(BackboneError, match="has no weights of its own: pass weights=<folder"):
        _ = load_backbone(NAME).spec
    with pytest.raises(BackboneError, match=r"no weights at .*model_state\.pt"):
        _ = load_backbone(NAME, tmp_path / "nowhere").spec


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"backbone": "resnet18"}, UnknownNameError, "unknown pixel-wise backbone of tarrow"),
        ({"n_input_channels": 2}, BackboneError, "takes 2 channels: frames here have one"),
    ],
)
def test_models_that_do_not_fit(tmp_path, kwargs, error, message):
    backbone = load_backbone(NAME, write_folder(tmp_path, **kwargs))
    with pytest.raises(error, match=message):
        backbone._describe("0")


@pytest.mark.parametrize("text", ["- a list", "{unclosed"])
def test_folders_that_can_not_be_read(tmp_path, text):
    (tmp_path / "model_kwargs.yaml").write_text(text)
    with pytest.raises(BackboneError, match=r"model_kwargs\.yaml"):
        load_backbone(NAME, tmp_path)._describe("0")


def test_a_missing_package_says_where_to_get_it(monkeypatch):
    for module in ("tarrow", "tarrow.models", "tarrow.models.backbones"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingDependencyError, match=r"pip install git\+https://github\.com"):
        _ = load_backbone(NAME, "random:0").spec
