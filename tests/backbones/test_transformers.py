from __future__ import annotations

import pickle
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
from feature_cache.backbones.preprocessing import scale_by_percentiles
from feature_cache.backbones.transformers import DinoV2, Hiera
from old_files import age, hurry

transformers = pytest.importorskip("transformers")

DINO = "facebook/dinov2-small"
REGISTERS = "facebook/dinov2-with-registers-small"
HIERA = "facebook/hiera-tiny-224-hf"


@pytest.fixture(scope="module")
def random():
    """Load each family once, with random weights."""
    made = {}

    def load(name):
        if name not in made:
            made[name] = load_backbone(name, "random:0", "cpu")
        return made[name]

    return load


@pytest.fixture
def processor(monkeypatch):
    """The processor as preprocessor_config.json of DINOv2 and Hiera describes it."""
    made = transformers.BitImageProcessor(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        resample=3,
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    )
    monkeypatch.setattr(
        transformers.AutoImageProcessor, "from_pretrained", lambda *a, **k: made, raising=True
    )
    return made


def upstream(backbone, kind, tmp_path):
    """The same weights in upstream's own class, through files."""
    backbone.module.save_pretrained(tmp_path / "saved")
    return kind.from_pretrained(tmp_path / "saved", local_files_only=True).eval()


class TestDinoV2Parity:
    @pytest.mark.parametrize(
        "shape", [pytest.param((150, 150), marks=pytest.mark.slow), (131, 203), (300, 260)]
    )
    def test_equals_the_predecessor(
        self, predecessor, processor, extract, random, blobs, monkeypatch, tmp_path, shape
    ):
        model = upstream(random(DINO), transformers.Dinov2Model, tmp_path)
        monkeypatch.setattr(predecessor.AutoModel, "from_pretrained", lambda *a, **k: model)
        extractor = predecessor.DinoV2Features(shape, tmp_path, device="cpu")
        frames = blobs(*shape, count=2)
        ours = random(DINO).embed(frames)
        theirs = extract(extractor, frames.numpy())
        assert relative_error(ours, theirs.reshape(2, 16, 16, 384)) < 1e-5

    @pytest.mark.parametrize(
        ("name", "kind", "dropped"),
        [
            (DINO, transformers.Dinov2Model, 1),
            (REGISTERS, transformers.Dinov2WithRegistersModel, 5),
        ],
    )
    def test_equals_upstream_on_a_frame_that_is_not_square(
        self, random, blobs, tmp_path, name, kind, dropped
    ):
        from torchvision.transforms.v2.functional import InterpolationMode, normalize, resize

        frames = blobs(131, 203, count=2)
        images = resize(
            frames[:, None].repeat(1, 3, 1, 1), [224, 224], InterpolationMode.BICUBIC,
            antialias=True,
        )  # fmt: skip
        model = upstream(random(name), kind, tmp_path)
        with torch.inference_mode():
            raw = model(pixel_values=images).last_hidden_state[:, dropped:]
            images = normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            scaled = model(pixel_values=images).last_hidden_state[:, dropped:]
        ours = random(name).embed(frames)
        assert relative_error(ours, raw.reshape(2, 16, 16, -1)) < 1e-5
        ours = load_backbone(name, "random:0", "cpu", standardize=True).embed(frames)
        assert relative_error(ours, scaled.reshape(2, 16, 16, -1)) < 1e-5


@pytest.mark.slow
class TestHieraParity:
    def test_equals_the_predecessor_given_weights(
        self, predecessor, processor, extract, random, blobs, monkeypatch, tmp_path
    ):
        """Its network has random weights; ours are given to it, positions for 672 pixels."""
        monkeypatch.setattr(
            predecessor.HieraConfig,
            "from_pretrained",
            lambda *a, **k: transformers.HieraConfig(depths=(1, 2, 7, 2)),
        )
        extractor = predecessor.HieraFeatures((90, 150), tmp_path, device="cpu")
        state = dict(random(HIERA).module.state_dict())
        positions = state["embeddings.position_embeddings"].reshape(1, 56, 56, -1)
        state["embeddings.position_embeddings"] = (
            torch.nn.functional.interpolate(
                positions.permute(0, 3, 1, 2), (168, 168), mode="bicubic", align_corners=False
            )
            .flatten(2)
            .transpose(1, 2)
        )
        missing, unexpected = extractor.model.load_state_dict(state, strict=False)
        assert not unexpected
        assert all(name.startswith("pooler.") for name in missing)
        frames = blobs(90, 150)
        ours = random(HIERA).embed(frames)
        theirs = extract(extractor, frames.numpy())
        assert relative_error(ours, theirs.reshape(1, 21, 21, 768)) < 1e-5

    def test_equals_upstream_in_spatial_order_on_a_frame_that_is_not_square(
        self, random, blobs, tmp_path
    ):
        from torchvision.transforms.v2.functional import InterpolationMode, resize

        frames = blobs(75, 140)
        size = (64, 96)
        images = resize(
            frames[:, None].repeat(1, 3, 1, 1), list(size), InterpolationMode.BICUBIC,
            antialias=True,
        )  # fmt: skip
        model = upstream(random(HIERA), transformers.HieraModel, tmp_path)
        model.encoder.schedule = {
            stage: ([[2, 2]] * (3 - stage), [n // 4 // 2**stage for n in size])
            for stage in range(4)
        }
        with torch.inference_mode():
            output = model(images, interpolate_pos_encoding=True, output_hidden_states=True)
        ours = load_backbone(HIERA, "random:0", "cpu", input_size=size).embed(frames)
        assert relative_error(ours, output.reshaped_hidden_states[-1]) < 1e-5


@pytest.mark.parametrize("name", [DINO, REGISTERS, pytest.param(HIERA, marks=pytest.mark.slow)])
class TestEach:
    def test_spec_says_it_all_and_round_trips(self, random, name):
        spec = random(name).spec
        assert BackboneSpec.from_json(spec.to_json()) == spec
        assert spec.name == name
        assert spec.resize == "bicubic-antialias"
        assert (spec.mean, spec.std) == ((), ())
        size = 672 if name == HIERA else 224
        assert spec.input_size == (size, size)

    def test_every_option_is_another_spec(self, random, name):
        first, *others = (
            random(name)._describe("0"),
            load_backbone(name, standardize=True)._describe("0"),
            load_backbone(name, input_size=448)._describe("0"),
            load_backbone(name, input_size=(448, 224))._describe("0"),
            load_backbone(name, dtype="bfloat16")._describe("0"),
            load_backbone(name)._describe("1"),
        )
        assert first not in others
        assert len({str(spec.to_json()) for spec in others}) == len(others)

    def test_two_alive_never_disturb_each_other(self, random, blobs, name):
        frames = blobs(60, 90)
        one = random(name)
        before, classes = one.embed(frames), {k: dict(vars(k)) for k in (DinoV2, Hiera)}
        generator = torch.random.get_rng_state()
        other = load_backbone(name, "random:1", "cpu", input_size=224, standardize=True)
        assert other.embed(frames).shape == (1, 7, 7, 768) or name != HIERA
        assert other.spec.weights != one.spec.weights
        assert torch.equal(one.embed(frames), before)
        assert torch.equal(torch.random.get_rng_state(), generator)
        assert {k: dict(vars(k)) for k in (DinoV2, Hiera)} == classes

    def test_a_saved_folder_is_the_same_backbone(self, random, blobs, tmp_path, name):
        random(name).module.save_pretrained(tmp_path)
        loaded = load_backbone(name, tmp_path, "cpu")
        assert loaded.spec == random(name).spec
        frames = blobs(40, 50)
        assert torch.equal(loaded.embed(frames), random(name).embed(frames))

    def test_the_hub_is_asked_for_safetensors(self, random, monkeypatch, tmp_path, name):
        random(name).module.save_pretrained(tmp_path)
        asked = []

        def find(repo, filename):
            asked.append((repo, filename))
            return tmp_path / filename

        monkeypatch.setattr("feature_cache.backbones.transformers.hub_file", find)
        assert load_backbone(name, device="cpu").spec == random(name).spec
        assert set(asked) == {(name, "model.safetensors")}

    def test_a_warm_start_loads_no_weights(self, random, tmp_path, name, monkeypatch):
        hurry(monkeypatch)
        random(name).module.save_pretrained(tmp_path)
        age(tmp_path)
        first, second = (load_backbone(name, tmp_path, "cpu") for _ in range(2))
        assert first.spec == second.spec
        assert first.is_loaded
        assert not second.is_loaded

    @pytest.mark.parametrize("size", [0, 13, 100, (224, 100), (224,), -224])
    def test_wrong_input_sizes(self, name, size):
        with pytest.raises(BackboneError, match=f"input size .* of {name}: expected"):
            load_backbone(name, input_size=size)

    def test_a_missing_package_names_the_extra(self, monkeypatch, name):
        monkeypatch.setitem(sys.modules, "transformers", None)
        with pytest.raises(MissingDependencyError, match=r"feature-cache\[transformers\]"):
            _ = load_backbone(name, "random:0").spec

    def test_pickles_without_its_weights(self, random, name):
        assert len(pickle.dumps(random(name))) < 5_000


class TestWeights:
    def state(self, random, name=DINO):
        return {n: t.clone() for n, t in random(name).module.state_dict().items()}

    def test_a_classifier_s_checkpoint_gives_its_backbone(self, random, tmp_path):
        state = {f"dinov2.{n}": t for n, t in self.state(random).items()}
        torch.save({**state, "classifier.weight": torch.zeros(2, 768)}, tmp_path / "one.pth")
        assert load_backbone(DINO, tmp_path / "one.pth").spec == random(DINO).spec

    def test_names_of_the_hub_and_of_transformers_are_the_same(self, random, tmp_path):
        """The hub has attention.attention.query where transformers 5 has attention.q_proj."""
        from safetensors.torch import load_file

        random(DINO).module.save_pretrained(tmp_path)
        names = load_file(tmp_path / "model.safetensors")
        assert "encoder.layer.0.attention.attention.query.weight" in names
        torch.save(self.state(random), tmp_path / "theirs.pth")
        one, other = (
            load_backbone(DINO, tmp_path / file) for file in ("model.safetensors", "theirs.pth")
        )
        assert one.spec == other.spec

    def test_one_weight_is_another_backbone(self, random, tmp_path):
        state = self.state(random)
        state["layernorm.weight"][3] += 1e-6
        torch.save(state, tmp_path / "other.pth")
        assert load_backbone(DINO, tmp_path / "other.pth").spec != random(DINO).spec

    def test_weights_of_another_model(self, random, tmp_path):
        torch.save(self.state(random, REGISTERS), tmp_path / "registers.pth")
        with pytest.raises(BackboneError, match=r"1 unexpected \('embeddings.register_tokens'\)"):
            _ = load_backbone(DINO, tmp_path / "registers.pth").spec
        torch.save(self.state(random), tmp_path / "small.pth")
        with pytest.raises(BackboneError, match=r"of another shape \('embeddings.cls_token'"):
            _ = load_backbone("facebook/dinov2-base", tmp_path / "small.pth").spec
        with pytest.raises(BackboneError, match=r"missing \('embeddings.register_tokens'\)"):
            _ = load_backbone(REGISTERS, tmp_path / "small.pth").spec

    def test_a_folder_of_another_architecture(self, random, tmp_path):
        random(DINO).module.save_pretrained(tmp_path)
        with pytest.raises(BackboneError, match="hidden_size is 384, expected 768"):
            _ = load_backbone("facebook/dinov2-base", tmp_path).spec

    def test_a_folder_without_weights(self, tmp_path):
        with pytest.raises(BackboneError, match=r"no model\.safetensors in"):
            _ = load_backbone(DINO, tmp_path).spec

    def test_a_file_that_is_no_checkpoint(self, tmp_path):
        (tmp_path / "model.safetensors").write_bytes(b"nothing of the kind")
        with pytest.raises(BackboneError, match="is no safetensors file"):
            _ = load_backbone(DINO, tmp_path).spec


def test_unknown_names():
    with pytest.raises(UnknownNameError, match="did you mean 'facebook/dinov2-base'"):
        load_backbone("facebook/dinov2-bass")


class TestPercentiles:
    @pytest.mark.parametrize("shape", [(2, 7, 9), (1, 1, 1), (3, 64, 31)])
    def test_agree_with_numpy(self, shape):
        import numpy as np

        frames = np.random.default_rng(1).normal(300, 50, shape).astype(np.float32)
        ours = scale_by_percentiles(torch.from_numpy(frames), 1, 99.8).numpy()
        for frame, scaled in zip(frames, ours, strict=True):
            low, high = np.percentile(frame.astype(np.float64), (1, 99.8))
            expected = (frame - low) / (high - low) if high > low else np.zeros_like(frame)
            np.testing.assert_allclose(scaled, expected, rtol=1e-4, atol=1e-5)

    def test_a_frame_of_few_bright_pixels_is_scaled_from_minimum_to_maximum(self):
        frames = torch.zeros(2, 30, 30)
        frames[0, 3, 4], frames[1, 5] = 200.0, 1.0
        scaled = scale_by_percentiles(frames, 1, 99)
        assert torch.equal(scaled[0], frames[0] / 200)
        assert torch.equal(scaled[1], frames[1])

    def test_a_constant_frame_is_zeros_and_its_input_untouched(self):
        frames = torch.full((1, 5, 5), 7.0)
        assert torch.equal(scale_by_percentiles(frames, 1, 99), torch.zeros(1, 5, 5))
        assert torch.equal(frames, torch.full((1, 5, 5), 7.0))
