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
from feature_cache.backbones import cellpose as adapter
from feature_cache.normalize import normalize
from feature_cache.spec import Normalization

pytest.importorskip("transformers")

NAME = "mouseland/cellpose-sam"
pytestmark = pytest.mark.usefixtures("shallow")


@pytest.fixture(scope="module")
def real():
    """cellpose's own network with random weights, its first and sixth layer (a global one)."""
    before = torch.backends.cuda.matmul.allow_tf32
    vit = pytest.importorskip("cellpose.vit", reason="cellpose 4.2 is not installed")
    torch.backends.cuda.matmul.allow_tf32 = before  # importing cellpose turns it on
    network = vit.CPSAM().eval()
    network.encoder.blocks = torch.nn.ModuleList([network.encoder.blocks[i] for i in (0, 5)])
    for parameter in (*network.encoder.parameters(), *network.out.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)
    return network


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestParity:
    @pytest.mark.parametrize("shape", [(70, 111), (300, 280)])
    def test_equals_cellpose(self, real, shape, tmp_path):
        """From the raw frame: normalize_img, then stretched, then all but the shuffling."""
        from cellpose.transforms import convert_image, normalize_img

        real.save_model(tmp_path / "cpsam")
        frame = np.random.default_rng(3).gamma(2.0, 900.0, shape).astype(np.float32)
        theirs = normalize_img(convert_image(frame)).astype(np.float32)
        with torch.inference_mode():
            images = torch.nn.functional.interpolate(
                torch.from_numpy(theirs[..., :1]).permute(2, 0, 1)[None].repeat(1, 3, 1, 1),
                (256, 256), mode="bilinear", align_corners=False,
            )  # fmt: skip
            whole, _ = real(images)
            expected = torch.nn.functional.pixel_unshuffle(whole, 8).permute(0, 2, 3, 1)
        ours = load_backbone(NAME, tmp_path / "cpsam", "cpu")
        pixels = normalize(frame, ours.spec.normalization)
        grid = ours.embed(torch.from_numpy(pixels)[None])
        assert grid.shape == (1, 32, 32, 192)
        assert relative_error(grid, expected) < 1e-4

    def test_importing_the_adapter_does_not_import_cellpose(self):
        import subprocess

        code = (
            "import sys, feature_cache.backbones.cellpose;"
            "print('cellpose' in sys.modules, 'transformers' in sys.modules)"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.stdout.split() == ["False", "False"], run.stderr


class TestSpec:
    def test_says_it_all_and_round_trips(self):
        spec = load_backbone(NAME)._describe("0")
        assert BackboneSpec.from_json(spec.to_json()) == spec
        assert spec.normalization == Normalization("percentile", 0.0, 100.0)
        assert spec.extra == {"percentiles": (1.0, 99.0), "clipped": False}
        assert (spec.input_size, spec.stride, spec.width) == ((256, 256), 8, 192)

    def test_unknown_checkpoint(self):
        with pytest.raises(UnknownNameError, match=r"unknown checkpoint .* Known: cpsam, cpsam_v2"):
            load_backbone(NAME, checkpoint="cyto3")

    def test_a_checkpoint_on_dino_is_of_another_network(self, tmp_path):
        torch.save({"encoder.cls_token": torch.zeros(1, 1, 768)}, tmp_path / "mine")
        with pytest.raises(BackboneError, match=r"CPDINO, which only cellpose 4\.2.* expected"):
            _ = load_backbone(NAME, tmp_path / "mine", "cpu").spec

    def test_a_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingDependencyError, match=r"feature-cache\[transformers\]"):
            _ = load_backbone(NAME, "random:0").spec


class TestWeights:
    def test_a_checkpoint_is_the_same_backbone_wherever_it_is(self, tmp_path, monkeypatch, blobs):
        backbone = load_backbone(NAME, "random:0", "cpu")
        state = {**backbone.module.state_dict(), "W2": torch.zeros(1), "diam_mean": torch.zeros(1)}
        torch.save(state, tmp_path / "cpsam")
        torch.save({f"module.{n}": t for n, t in state.items()}, tmp_path / "cpsam_v2")
        monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
        loaded = load_backbone(NAME, device="cpu")
        assert loaded.spec == load_backbone(NAME, checkpoint="cpsam_v2").spec == backbone.spec
        frames = blobs(50, 80)
        assert torch.equal(loaded.embed(frames), backbone.embed(frames))

    def test_the_hub_is_asked_where_cellpose_has_none(self, tmp_path, monkeypatch):
        monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path))
        asked = []
        monkeypatch.setattr(
            adapter, "hub_file", lambda *names: asked.append(names) or tmp_path / "none"
        )
        with pytest.raises(BackboneError, match="no weights at"):
            _ = load_backbone(NAME).spec
        assert asked == [(NAME, "cpsam")]

    def test_weights_of_cellpose_3(self, tmp_path):
        torch.save({"downsample.down.res_down_0.conv.weight": torch.zeros(1)}, tmp_path / "cyto3")
        with pytest.raises(BackboneError, match=r"missing .* 1 unexpected \('downsample"):
            _ = load_backbone(NAME, tmp_path / "cyto3").spec

    def test_two_seeds_are_two_backbones_and_leave_the_generator_alone(self):
        before = torch.random.get_rng_state()
        one, same, other = (load_backbone(NAME, f"random:{n}").spec for n in (0, 0, 1))
        assert one == same != other
        assert torch.equal(torch.random.get_rng_state(), before)


def test_brightness_and_offset_do_not_matter(blobs):
    backbone = load_backbone(NAME, "random:0", "cpu")
    frames = blobs(40, 60)
    torch.testing.assert_close(
        backbone.embed(frames), backbone.embed(0.25 + frames / 4), rtol=1e-3, atol=1e-4
    )
