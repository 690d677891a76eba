"""What is computed is what the key says: under another key, or an error, never a stored record."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from feature_cache import (
    BackboneError,
    BackboneSpec,
    CachedFeatureDataset,
    FeatureCache,
    Movie,
    load_backbone,
)
from feature_cache.backbones.base import TorchBackbone, load_checkpoint, load_into, seeded
from feature_cache.backbones.debug import RandomNoise
from feature_cache.backbones.efficientnet import EfficientNetLite0
from feature_cache.backbones.tiles import Tiled
from feature_cache.testing import FakeBackbone, check_backbone
from feature_cache.warm import plan_warm, run_warm
from old_files import age, hurry
from synthetic import make_movie


class Tiny(TorchBackbone):
    """A network with all that others have: weights, buffers, a layer that depends on chance."""

    def _describe(self, weights: str) -> BackboneSpec:
        return BackboneSpec(
            self.name, self.revision, weights, "last", width=8, stride=8, dtype=self.dtype,
            mean=(0.0,) * 3, std=(1.0,) * 3,
        )  # fmt: skip

    def _build(self) -> nn.Module:
        with seeded(self._seed() or 0):
            network = nn.Sequential(
                nn.Conv2d(3, 8, 8, stride=8), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1), nn.Dropout(0.5)
            )
        file = self._weights_file()
        if file is not None:
            load_into(network, load_checkpoint(file), file)
        return network

    def _forward(self, inputs: Tensor) -> Tensor:
        return self.module(inputs).permute(0, 2, 3, 1)


def tiny(weights: object = "random:0") -> Tiny:
    return Tiny("tiny", weights, "cpu")


def movie(seed: int) -> tuple[np.ndarray, np.ndarray]:
    frames, masks, _ = make_movie(seed=seed)
    return frames, masks


def count(cache: FeatureCache) -> int:
    return int(cache.stats()["records"])


def scale(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(2)


def replace_weight(module: nn.Module) -> None:
    module.weight = nn.Parameter(module.weight.detach() * 2, requires_grad=False)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "a weight in place": lambda net: scale(net[0].weight),
    "a bias in place": lambda net: scale(net[2].bias),
    "the data of a weight in place": lambda net: net[2].weight.data.mul_(2),
    "the data of a weight": lambda net: setattr(net[2].weight, "data", net[2].weight.data * 2),
    "a weight": lambda net: replace_weight(net[2]),
    "weights that are loaded": lambda net: net.load_state_dict(
        tiny("random:1").module.state_dict()
    ),
    "a buffer in place": lambda net: net[1].running_mean.add_(1),
    "a buffer": lambda net: setattr(net[1], "running_var", net[1].running_var * 2),
    "training": lambda net: net.train(),
    "training of a part": lambda net: net[3].train(),
    "a hook": lambda net: net[0].register_forward_hook(lambda m, i, out: out * 2),
    "a hook before": lambda net: net.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "a forward": lambda net: setattr(net[0], "forward", lambda x: x),
    "a layer": lambda net: net.__setitem__(2, nn.Conv2d(8, 8, 1)),
    "a layer more": lambda net: net.append(nn.ReLU()),
    "a layer less": lambda net: net.__delitem__(2),
    "a dtype": lambda net: net.double(),
    "a dtype and back": lambda net: net.bfloat16().float(),
    "a memory format": lambda net: net.to(memory_format=torch.channels_last),
    "a setting": lambda net: setattr(net[1], "eps", 1.0),
    "compiling": lambda net: net.compile(),
}


class TestNetworks:
    @pytest.mark.parametrize("change", CHANGES)
    def test_a_network_that_is_changed_stores_nothing(self, cache, change):
        backbone = tiny()
        before = cache.get_or_compute(*movie(0), backbone)
        CHANGES[change](backbone.module)
        with pytest.raises(BackboneError, match=r"network of tiny is not as it was loaded: the "):
            cache.get_or_compute(*movie(1), backbone)
        assert count(cache) == 6
        again = cache.get_or_compute(*movie(0), backbone)  # a hit asks no network
        for one, other in zip(before, again, strict=True):
            assert np.array_equal(one.features, other.features)

    def test_a_hook_for_all_modules(self, cache):
        backbone = tiny()
        cache.get_or_compute(*movie(0), backbone)
        hook = nn.modules.module.register_module_forward_hook(lambda m, i, out: out * 2)
        try:
            with pytest.raises(BackboneError, match="'all of torch' has changed"):
                cache.get_or_compute(*movie(1), backbone)
        finally:
            hook.remove()
        assert len(cache.get_or_compute(*movie(1), backbone)) == 6

    @pytest.mark.parametrize(
        ("name", "weights", "options"),
        [
            ("efficientnet-lite0", None, {}),
            ("timm/vit_tiny_patch16_224", "random:0", {}),
            ("facebook/dinov2-small", "random:0", {"input_size": 56}),
        ],
    )
    def test_real_networks(self, cache, name, weights, options):
        """Nothing that they do to themselves is taken for a change; one weight of many is."""
        backbone = load_backbone(name, weights, "cpu", **options)
        for seed in range(2):
            cache.get_or_compute(*movie(seed), backbone, batch_size=4)
        backbone.check()
        scale(list(backbone.module.parameters())[-3])
        with pytest.raises(BackboneError, match="is not as it was loaded"):
            cache.get_or_compute(*movie(2), backbone)
        assert count(cache) == 12

    def test_each_way_to_compute(self, cache, small_folder):
        backbone = tiny()
        assert backbone.spec
        backbone.module.train()
        report = run_warm(plan_warm(cache, [Movie.open(small_folder())], backbone))
        assert (report.computed, report.failed) == (0, 6)
        assert "is not as it was loaded" in report.failures[0].reason
        tokens = {"timepoints": torch.tensor([0]), "labels": torch.tensor([1])}
        dataset = CachedFeatureDataset([tokens], [cache.movie(*movie(0), backbone)])
        with pytest.raises(BackboneError, match="is not as it was loaded"):
            dataset[0]
        assert count(cache) == 0


class TestWeights:
    @pytest.fixture
    def file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
        hurry(monkeypatch)
        self.write(tmp_path / "last.pt", 0)
        return tmp_path / "last.pt"

    def write(self, file: Path, seed: int) -> None:
        torch.save(tiny(f"random:{seed}").module.state_dict(), file)
        age(file)

    def test_a_file_that_is_replaced_between_hashing_and_loading(self, cache, file):
        """The digest is remembered from the day before; then a fine-tuning writes the file."""
        cache.get_or_compute(*movie(0), tiny(file))
        backbone = tiny(file)
        cache.get_or_compute(*movie(0), backbone)
        assert not backbone.is_loaded
        self.write(file, 1)
        for _ in range(2):
            with pytest.raises(BackboneError, match=r"not those that its keys were made of.*last"):
                cache.get_or_compute(*movie(1), backbone)
        assert count(cache) == 6
        anew = tiny(file)
        assert anew.spec == tiny("random:1").spec
        cache.get_or_compute(*movie(1), anew)
        assert count(cache) == 12

    def test_a_backbone_that_is_unpickled_after_its_file_changed(self, cache, file):
        backbone = tiny(file)
        cache.get_or_compute(*movie(0), backbone)
        pickled = pickle.dumps(backbone)
        self.write(file, 1)
        with pytest.raises(BackboneError, match="not those that its keys were made of"):
            cache.get_or_compute(*movie(1), pickle.loads(pickled))
        assert count(cache) == 6

    def test_a_digest_that_is_remembered_wrongly_is_forgotten(self, cache, file, monkeypatch):
        """As of a file that changed without a trace."""
        monkeypatch.setattr("feature_cache.memo._identify", lambda files: [[1, 2, 3, 4, 5]])
        assert tiny(file).spec == tiny("random:0").spec
        self.write(file, 1)
        with pytest.raises(BackboneError, match="not those that its keys were made of"):
            cache.get_or_compute(*movie(0), tiny(file))
        assert tiny(file).spec == tiny("random:1").spec


class TestIdentity:
    @pytest.mark.parametrize(
        "name",
        ["dtype", "weights", "name", "device", "spec", "module", "embed", "_forward", "revision"],
    )
    def test_what_made_a_key_cannot_be_changed(self, name):
        backbone = tiny()
        expected = backbone.spec
        with pytest.raises(AttributeError):
            setattr(backbone, name, getattr(tiny("random:1"), name))
        assert backbone.spec == expected

    @pytest.mark.parametrize("name", ["layer", "dtype"])
    def test_of_a_real_one(self, name):
        backbone = load_backbone("efficientnet-lite0", "random:0", "cpu")
        assert backbone.spec
        with pytest.raises(AttributeError, match=f"{name} of a EfficientNetLite0 can't be changed"):
            setattr(backbone, name, "stride-8")

    def test_changed_before_it_is_asked_for_its_spec(self):
        backbone = tiny()
        backbone.dtype = "bfloat16"
        assert backbone.spec.dtype == "bfloat16"

    def test_of_the_fake_and_of_those_for_debugging(self):
        for backbone, array in (
            (FakeBackbone(), "projection"),
            (load_backbone("debug/random"), "seed"),
            (load_backbone("debug/encoded_labels"), "wavelengths"),
        ):
            with pytest.raises(ValueError, match="read-only"):
                getattr(backbone, array)[...] = 0
            for name in array, "spec":
                with pytest.raises(AttributeError, match="can't be changed"):
                    setattr(backbone, name, getattr(backbone, name))

    def test_a_subclass_that_computes_otherwise_has_keys_of_its_own(self, cache):
        class Doubled(Tiny):
            def _forward(self, inputs):
                return super()._forward(inputs) * 2

        class Lite(EfficientNetLite0):
            def _as_input(self, images):
                return super()._as_input(images.flip(1))

        class Described(Tiny):
            def _describe(self, weights):
                return super()._describe(weights)

        specs = [tiny().spec, Doubled("tiny", "random:0", "cpu").spec]
        lites = [kind(weights="random:0", device="cpu").spec for kind in (EfficientNetLite0, Lite)]
        assert specs[0] != specs[1]
        assert lites[0] != lites[1]
        assert Described("tiny", "random:0", "cpu").spec == specs[0]

        class Otherwise(Tiled):
            def embed(self, frames):
                return super().embed(frames) + 1

        class Noisier(RandomNoise):
            def _embed_frame(self, frame):
                return 2 * super()._embed_frame(frame)

        assert Otherwise(FakeBackbone(), 16).spec != Tiled(FakeBackbone(), 16).spec
        assert Noisier().spec != RandomNoise().spec

    @pytest.mark.parametrize("tile", [None, 16])
    def test_a_spec_that_changes_while_it_is_used(self, cache, tile):
        class Late(FakeBackbone):
            revision = 1

            @property
            def spec(self):
                return FakeBackbone(seed=self.revision).spec

            @spec.setter
            def spec(self, value):
                pass

            def embed(self, frames):
                type(self).revision += 1
                return FakeBackbone(seed=self.revision).embed(frames)

        late = Late() if tile is None else Tiled(Late(), tile)
        with pytest.raises(BackboneError, match="the spec of fake has changed: weights differ"):
            cache.get_or_compute(*movie(0), late, batch_size=2)
        assert count(cache) <= 2

    @pytest.mark.parametrize(
        ("option", "value"), [("layer", -2), ("input_size", 64), ("dtype", "bfloat16")]
    )
    def test_options_of_timm(self, option, value):
        plain = load_backbone("timm/convnext_atto", "random:0", "cpu").spec
        assert (
            load_backbone("timm/convnext_atto", "random:0", "cpu", **{option: value}).spec != plain
        )


class Adapter:
    """A backbone of another package, around a network of its own."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.spec = BackboneSpec("adapter", 1, "0" * 32, "last", width=8, stride=8)

    def embed(self, frames: Tensor) -> Tensor:
        return self.network(frames[:, None].expand(-1, 3, -1, -1)).permute(0, 2, 3, 1)


class TestAdapters:
    @pytest.mark.parametrize("tile", [None, 16])
    def test_training_mode_is_refused(self, cache, tile):
        network = tiny().module
        network[3].train()
        backbone = Adapter(network) if tile is None else Tiled(Adapter(network), tile)
        with pytest.raises(BackboneError, match="network of adapter is in training mode"):
            cache.get_or_compute(*movie(0), backbone)
        with pytest.raises(BackboneError, match="training mode"):
            check_backbone(Adapter(network))
        assert count(cache) == 0

    def test_a_network_that_changes_between_two_batches(self, cache):
        network, lock = tiny().module, threading.Lock()

        class Frames(list):
            times = 0

            def __getitem__(self, t):
                with lock:
                    Frames.times += 1
                    if Frames.times == 9:  # hashed once, and three are read to be computed
                        scale(network[0].weight)
                return super().__getitem__(t)

        frames, masks = movie(0)
        with pytest.raises(BackboneError, match="network of adapter is not as it was loaded"):
            cache.get_or_compute(Frames(frames), masks, Adapter(network), batch_size=1)
        assert count(cache) <= 3

    def test_what_the_process_has_set_does_not_matter(self, cache, tmp_path, surroundings):
        network = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.Conv2d(8, 8, 1)).eval()
        expected = FeatureCache(tmp_path / "plain").get_or_compute(
            *movie(0), Adapter(network), dtype="float32"
        )
        with surroundings():
            found = cache.get_or_compute(*movie(0), Adapter(network), dtype="float32")
        for one, other in zip(expected, found, strict=True):
            assert np.array_equal(one.features, other.features)


class Precision:
    """torch's precision of float32 matrix products, for a while."""

    def __init__(self, value: str) -> None:
        self.value = value

    def __enter__(self) -> None:
        self.before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(self.value)

    def __exit__(self, *error: object) -> None:
        assert torch.get_float32_matmul_precision() == self.value, "it was not put back"
        torch.set_float32_matmul_precision(self.before)


SURROUNDINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference": torch.inference_mode,
    "gradients": torch.enable_grad,
    "medium precision": lambda: Precision("medium"),
    "high precision": lambda: Precision("high"),
    "another seed": lambda: seeded(5),
}


@pytest.fixture(params=SURROUNDINGS)
def surroundings(request: pytest.FixtureRequest) -> Callable[[], object]:
    return SURROUNDINGS[request.param]


def compute_vit(cache: FeatureCache) -> list[np.ndarray]:
    backbone = load_backbone("timm/vit_tiny_patch16_224", "random:0", "cpu")
    frames, masks = (array[:2] for array in movie(0))
    records = cache.get_or_compute(frames, masks, backbone, dtype="float32")
    return [record.features for record in records]


@pytest.fixture(scope="module")
def undisturbed_features(tmp_path_factory) -> list[np.ndarray]:
    return compute_vit(FeatureCache(tmp_path_factory.mktemp("plain")))


class TestSurroundings:
    def test_they_do_not_matter(self, cache, undisturbed_features, surroundings):
        """Loading included; with 'medium', oneDNN would multiply in bfloat16 where it can."""
        with surroundings():
            found = compute_vit(cache)
        for one, other in zip(undisturbed_features, found, strict=True):
            assert np.array_equal(one, other)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_another_default_dtype_is_refused(self, cache, dtype):
        backbone = tiny()
        assert backbone.spec
        torch.set_default_dtype(dtype)
        try:
            for refused in backbone, FakeBackbone():
                with pytest.raises(BackboneError, match=r"torch's default dtype is torch\.\w+"):
                    cache.get_or_compute(*movie(0), refused)
        finally:
            torch.set_default_dtype(torch.float32)
        assert count(cache) == 0

    def test_precision_is_put_back_after_an_error(self):
        backbone = tiny()
        backbone.module.register_forward_pre_hook(lambda module, inputs: 1 / 0)
        with Precision("medium"), pytest.raises(ZeroDivisionError):
            backbone.embed(torch.zeros(1, 8, 8))
