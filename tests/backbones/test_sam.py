from __future__ import annotations

import sys

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
from feature_cache.backbones import sam
from feature_cache.backbones.sam import MicroSam, SegmentAnything, fit_longest, name_in_transformers

transformers = pytest.importorskip("transformers")

BASE = "facebook/sam-vit-base"
MICRO = "microsam/vit_b_lm"
pytestmark = pytest.mark.usefixtures("shallow")


def as_sam_model(backbone):
    """The same weights in upstream's whole model."""
    config = transformers.SamConfig(vision_config=dict(sam.ENCODER_SIZES["base"]))
    model = transformers.SamModel(config).eval()
    model.vision_encoder.load_state_dict(backbone.module.state_dict())
    return model


class TestParity:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("shape", "grid"),
        [((70, 111), (40, 64)), ((128, 128), (64, 64)), ((90, 60), (64, 43))],
    )
    def test_equals_the_predecessor_cut_to_the_frame(
        self, predecessor, extract, blobs, monkeypatch, tmp_path, shape, grid
    ):
        processor = transformers.SamProcessor(transformers.SamImageProcessor())
        ours = load_backbone(BASE, "random:0", "cpu")
        monkeypatch.setattr(predecessor.SamProcessor, "from_pretrained", lambda *a, **k: processor)
        monkeypatch.setattr(
            predecessor.SamModel, "from_pretrained", lambda *a, **k: as_sam_model(ours)
        )
        extractor = predecessor.SAMFeatures(shape, tmp_path, device="cpu")
        frames = blobs(*shape)
        theirs = extract(extractor, frames.numpy()).reshape(1, 64, 64, 256)
        mine = ours.embed(frames)
        assert mine.shape == (1, *grid, 256)
        assert relative_error(mine, theirs[:, : grid[0], : grid[1]]) < 1e-5

    @pytest.mark.slow
    def test_standardised_equals_upstream_s_own_processor(self, blobs):
        ours = load_backbone(BASE, "random:0", "cpu", standardize=True)
        frames = blobs(60, 100)
        processor = transformers.SamProcessor(transformers.SamImageProcessor())
        inputs = processor(frames[0].repeat(3, 1, 1).numpy(), do_rescale=False, return_tensors="pt")
        with torch.inference_mode():
            theirs = as_sam_model(ours).get_image_embeddings(inputs["pixel_values"])
        mine = ours.embed(frames)
        assert relative_error(mine, theirs.permute(0, 2, 3, 1)[:, :38]) < 1e-5

    def test_equals_the_original_implementation(self, predecessor, monkeypatch, blobs, tmp_path):
        """micro-sam's checkpoints have the original names, and it runs the original code.

        The predecessor's extractor agrees to what rounding to 8 bits leaves.
        """
        modeling = pytest.importorskip(
            "segment_anything.modeling", reason="segment-anything is not installed"
        )
        encoder = modeling.ImageEncoderViT(
            depth=2, embed_dim=768, num_heads=12, global_attn_indexes=(1,), window_size=14,
            img_size=1024, patch_size=16, mlp_ratio=4, out_chans=256, qkv_bias=True,
            use_rel_pos=True, norm_layer=lambda width: torch.nn.LayerNorm(width, eps=1e-6),
        )  # fmt: skip
        encoder.eval()
        for parameter in encoder.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        state = {f"image_encoder.{name}": t for name, t in encoder.state_dict().items()}
        state["prompt_encoder.no_mask_embed.weight"] = torch.zeros(1, 256)
        torch.save(state, tmp_path / "vit_b.pt")
        frames = blobs(60, 100)
        images = torch.nn.functional.interpolate(
            255 * frames[:, None].repeat(1, 3, 1, 1), fit_longest(60, 100), mode="bilinear",
            antialias=True,
        )  # fmt: skip
        whole = modeling.Sam(
            encoder,
            modeling.PromptEncoder(256, (64, 64), (1024, 1024), 16),
            modeling.MaskDecoder(transformer_dim=256, transformer=torch.nn.Identity()),
            pixel_mean=[123.675, 116.28, 103.53],
            pixel_std=[58.395, 57.12, 57.375],
        )
        with torch.inference_mode():
            theirs = encoder(whole.preprocess(images)).permute(0, 2, 3, 1)
        mine = load_backbone(MICRO, tmp_path / "vit_b.pt", "cpu").embed(frames)
        assert relative_error(mine, theirs[:, :38]) < 1e-4
        extractor = self.micro_extractor(predecessor, monkeypatch, whole, tmp_path)
        rounded = extractor._run_model([frames[0, ..., None].repeat(1, 1, 3).numpy()])
        assert relative_error(mine, rounded.reshape(1, 64, 64, 256)[:, :38]) < 0.05

    def micro_extractor(self, predecessor, monkeypatch, whole, tmp_path):
        from segment_anything import SamPredictor

        monkeypatch.setattr(predecessor, "MICRO_SAM_AVAILABLE", True)
        monkeypatch.setattr(
            predecessor, "get_microsam_model", lambda *a, **k: SamPredictor(whole), raising=False
        )
        return predecessor.MicroSAMFeatures((60, 100), tmp_path, device="cpu")


class TestGeometry:
    @pytest.mark.parametrize(
        ("shape", "resized"),
        [((700, 1100), (652, 1024)), ((5, 5), (1024, 1024)), ((3, 2000), (2, 1024))],
    )
    def test_the_longer_side_fits(self, shape, resized):
        assert fit_longest(*shape) == resized
        assert fit_longest(*shape[::-1]) == resized[::-1]

    @pytest.mark.slow
    @pytest.mark.parametrize("fit", ["pad", "stretch"])
    def test_a_bright_corner_changes_that_corner_most(self, fit):
        backbone = load_backbone(BASE, "random:0", "cpu", fit=fit)
        dark = torch.full((1, 60, 128), 0.2)
        bright = dark.clone()
        bright[:, -16:, -16:] = 1
        grids = [backbone.embed(frame)[0] for frame in (dark, bright)]
        change = (grids[1] - grids[0]).norm(dim=-1)
        assert change.shape == ((30, 64) if fit == "pad" else (64, 64))
        row, column = divmod(int(change.argmax()), change.shape[1])
        assert row >= change.shape[0] * 0.7
        assert column >= change.shape[1] * 0.8


class TestSpec:
    def test_says_it_all_and_round_trips(self):
        spec = load_backbone(BASE)._describe("0")
        assert BackboneSpec.from_json(spec.to_json()) == spec
        assert (spec.input_size, spec.stride, spec.width) == ((1024, 1024), 16, 256)
        assert spec.extra == {"fit": "pad"}

    def test_every_option_is_another_spec(self):
        specs = [
            load_backbone(BASE)._describe("0"),
            load_backbone(BASE, fit="stretch")._describe("0"),
            load_backbone(BASE, standardize=True)._describe("0"),
            load_backbone(BASE, dtype="bfloat16")._describe("0"),
            load_backbone(MICRO)._describe("0"),
            load_backbone("microsam/vit_l_lm")._describe("0"),
        ]
        assert len({str(spec.to_json()) for spec in specs}) == len(specs)

    def test_unknown_fit(self):
        with pytest.raises(UnknownNameError, match=r"unknown fit of .* Known: pad, stretch"):
            load_backbone(BASE, fit="crop")

    def test_a_missing_package_names_the_extra(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingDependencyError, match=r"feature-cache\[transformers\]"):
            _ = load_backbone(BASE, "random:0").spec


class TestWeights:
    def test_a_saved_folder_and_the_original_names_are_the_same_backbone(self, tmp_path):
        backbone = load_backbone(BASE, "random:0", "cpu")
        as_sam_model(backbone).save_pretrained(tmp_path)
        assert load_backbone(BASE, tmp_path, "cpu").spec == backbone.spec

    def test_another_model_s_weights(self, tmp_path):
        state = load_backbone(BASE, "random:0").module.state_dict()
        torch.save({f"vision_encoder.{n}": t for n, t in state.items()}, tmp_path / "sam.pth")
        with pytest.raises(BackboneError, match=r"missing \('layers\.2\..* of another shape"):
            _ = load_backbone("facebook/sam-vit-large", tmp_path / "sam.pth").spec
        torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(BackboneError, match="another model: none of its 1 tensors is named"):
            _ = load_backbone(BASE, tmp_path / "other.pth").spec

    def test_micro_sam_s_own_cache(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
        with pytest.raises(BackboneError, match="let micro_sam download them"):
            _ = load_backbone(MICRO).spec
        backbone = load_backbone(MICRO, "random:0")
        (tmp_path / "models").mkdir()
        state = {f"vision_encoder.{n}": t for n, t in backbone.module.state_dict().items()}
        torch.save(state, tmp_path / "models" / "vit_b_lm")
        assert load_backbone(MICRO).spec == backbone.spec

    def test_each_generalist_has_its_own_file_and_the_same_network(self, tmp_path, monkeypatch):
        monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path))
        one, other = (load_backbone(name, "random:0") for name in (MICRO, "microsam/vit_b_em_org"
                                                                   "anelles"))  # fmt: skip
        assert one.spec.weights == other.spec.weights
        assert one.spec != other.spec
        with pytest.raises(BackboneError, match=r"vit_h_histo.*get_sam_model\('vit_h_histop"):
            _ = load_backbone("microsam/vit_h_histopathology").spec

    @pytest.mark.parametrize(
        ("original", "renamed"),
        [
            ("pos_embed", "pos_embed"),
            ("patch_embed.proj.weight", "patch_embed.projection.weight"),
            ("blocks.11.norm1.bias", "layers.11.layer_norm1.bias"),
            ("blocks.0.attn.rel_pos_h", "layers.0.attn.rel_pos_h"),
            ("blocks.3.mlp.lin2.weight", "layers.3.mlp.lin2.weight"),
            ("neck.0.weight", "neck.conv1.weight"),
            ("neck.3.bias", "neck.layer_norm2.bias"),
            ("layers.3.layer_norm1.bias", "layers.3.layer_norm1.bias"),
        ],
    )
    def test_original_names(self, original, renamed):
        assert name_in_transformers(original) == renamed

    @pytest.mark.slow
    def test_two_alive_never_disturb_each_other(self, blobs):
        frames = blobs(40, 64)
        one = load_backbone(BASE, "random:0", "cpu")
        before, classes = one.embed(frames), [dict(vars(k)) for k in (SegmentAnything, MicroSam)]
        other = load_backbone(MICRO, "random:1", "cpu", fit="stretch")
        assert other.embed(frames).shape == (1, 64, 64, 256)
        assert torch.equal(one.embed(frames), before)
        assert [dict(vars(k)) for k in (SegmentAnything, MicroSam)] == classes

    def test_random_weights_have_positions(self):
        state = load_backbone(BASE, "random:0").module.state_dict()
        assert all(float(tensor.std()) > 0.01 for name, tensor in state.items() if "pos" in name)
