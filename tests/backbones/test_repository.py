"""Models of transformers by their repository, against transformers' own code on seeded weights."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional

from comparison import relative_error
from feature_cache import BackboneError, UnknownNameError, list_backbones, load_backbone
from feature_cache.backbones import repository
from feature_cache.backbones.known import KNOWN
from feature_cache.testing import check_backbone

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

TINY = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 2}  # fmt: skip
STAGED = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
TEXT = {**TINY, "vocab_size": 50, "num_hidden_layers": 1}
SAM3_VIT = {"model_type": "sam3_vit_model", "image_size": 112, "pretrain_image_size": 56,
            "window_size": 4, "global_attn_indexes": [2], **TINY}  # fmt: skip
SAM3 = {"backbone_config": SAM3_VIT, "fpn_hidden_size": 16,
        "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]}  # fmt: skip
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.4)

WHOLE = {
    "dinov2-registers": ("Dinov2WithRegistersModel", {**TINY, "image_size": 56, "patch_size": 14}),
    "dinov3": ("DINOv3ViTModel", {**TINY, "image_size": 64, "num_register_tokens": 4}),
    "siglip": ("SiglipModel", {"vision_config": {**TINY, "image_size": 64}, "text_config": TEXT}),
    "clip": ("CLIPModel", {"vision_config": {**TINY, "image_size": 64, "patch_size": 16},
                           "text_config": TEXT}),
    "ijepa": ("IJepaModel", {**TINY, "image_size": 64, "patch_size": 16}),
    "vit-classifier": ("ViTForImageClassification", {**TINY, "image_size": 64}),
    "radio": ("RadioModel", {**TINY, "image_size": 64}),
    "sam3": ("Sam3VisionModel", SAM3),
    "convnext": ("ConvNextModel", STAGED),
    "dinov3-convnext": ("DINOv3ConvNextModel", STAGED),
}  # fmt: skip
"""Of each family the class that a repository holds, tiny."""


def make(kind, folder):
    """Save a seeded model as its repository has it; give the model."""
    name, options = WHOLE[kind]
    kind = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = kind(kind.config_class(**options)).eval()
    model.save_pretrained(folder)
    scales = {"image_mean": MEAN, "image_std": STD, "resample": 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(scales))
    return model


def load(name, folder, **options):
    return load_backbone(f"transformers/acme/{name}", folder, "cpu", **options)


def prepare(frames, size):
    """Preprocess as the processor is told to."""
    resized = functional.interpolate(frames[:, None], size, mode="bicubic", antialias=True)
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (resized.expand(-1, 3, -1, -1) - mean) / std


@pytest.mark.parametrize("kind", WHOLE)
def test_the_grid_is_that_of_transformers(kind, tmp_path, blobs):
    model = make(kind, tmp_path)
    frames, size = blobs(64, 64, 2), load(kind, tmp_path).spec.input_size or (64, 64)
    vision = next((getattr(model, n) for n in ("vision_model", "vit") if hasattr(model, n)), model)
    inputs = prepare(frames, size)
    with torch.inference_mode():
        output = vision(pixel_values=inputs, output_hidden_states=True)
    for layer in (-1, 1):
        backbone = load(kind, tmp_path, layer=layer)
        last = output.hidden_states[-1] if kind.endswith("convnext") else output.last_hidden_state
        found = last if layer == -1 else output.hidden_states[2]
        rows, columns = (length // backbone.spec.stride for length in size)
        if found.ndim == 4 and kind != "sam3":
            expected = found.permute(0, 2, 3, 1)
        elif found.ndim == 4:
            expected = found
        else:
            expected = found[:, found.shape[1] - rows * columns :].reshape(2, rows, columns, -1)
        assert backbone.spec.width == expected.shape[-1]
        assert relative_error(backbone.embed(frames), expected) < 1e-5
    assert backbone.spec.mean == MEAN


@pytest.mark.parametrize("kind", ["dinov3", "siglip", "convnext"])
def test_it_computes_in_its_own_dtype_whatever_its_weights_are_kept_in(kind, tmp_path, blobs):
    make(kind, tmp_path)
    expected = load(kind, tmp_path).embed(blobs(64, 64))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    assert torch.equal(load(kind, tmp_path).embed(blobs(64, 64)), expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{}", "the processor_config.json of transformers/acme/dinov3 has no image_processor"),
        ("[]", "processor_config.json holds a list: expected names and values"),
    ],
)
def test_a_processor_that_says_nothing_is_an_error(text, says, tmp_path):
    make("dinov3", tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(text)
    with pytest.raises(BackboneError, match=says):
        _ = load("dinov3", tmp_path).spec


def test_a_processor_that_names_no_scale_is_an_error(tmp_path):
    make("dinov3", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": null}')
    with pytest.raises(BackboneError, match="expected image_mean and image_std; pass"):
        _ = load("dinov3", tmp_path).spec
    assert not load("dinov3", tmp_path, standardize=False).spec.mean


def test_patches_of_naflex_are_those_of_its_processor(blobs):
    frames, patch = blobs(48, 80), 16
    inputs = frames[:, None].expand(-1, 3, -1, -1) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    processor = transformers.Siglip2ImageProcessor(
        do_resize=False, do_rescale=False, do_normalize=False, patch_size=patch, max_num_patches=15
    )
    theirs = processor(list(inputs), return_tensors="pt", input_data_format="channels_first")
    ours = repository._as_patches(inputs, patch)
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"].float())
    assert ours["spatial_shapes"].tolist() == theirs["spatial_shapes"].tolist()


def test_levels_of_a_pyramid(tmp_path, blobs):
    model = make("sam3", tmp_path)
    frames = blobs(112, 112)
    with torch.inference_mode():
        levels = model(pixel_values=prepare(frames, (112, 112))).fpn_hidden_states
    both = load("sam3", tmp_path, layer="fpn-0"), load("sam3", tmp_path, layer="fpn-2")
    for backbone, level in zip(both, (levels[0], levels[2]), strict=True):
        assert relative_error(backbone.embed(frames), level.permute(0, 2, 3, 1)) < 1e-5
    together = load_backbone("transformers/acme/sam3?layer=fpn-0,fpn-2,0", tmp_path, "cpu")
    assert torch.equal(together.embed(frames)[1], both[1].embed(frames))
    with pytest.raises(UnknownNameError, match=r"unknown layer of .*'fpn-3': Known: -1"):
        _ = load("dinov3", make("dinov3", tmp_path) and tmp_path, layer="fpn-3").spec


def test_a_vision_model_is_found_inside_a_larger_one(tmp_path, blobs):
    """As facebook/sam3 holds a detector and a tracker."""
    make("sam3", tmp_path)
    alone = load("sam3", tmp_path)
    state = {f"detector_model.vision_encoder.{name}": tensor
             for name, tensor in alone.module.state_dict().items()}  # fmt: skip
    others = {name.replace("detector", "tracker"): torch.zeros(1) for name in state}
    config = json.loads((tmp_path / "config.json").read_text())
    whole = {"model_type": "sam3", "vision_config": config}
    (tmp_path / "config.json").write_text(json.dumps(whole))
    save_file(others | state, tmp_path / "model.safetensors")
    within = load("sam3", tmp_path)
    assert within.spec == alone.spec
    assert torch.equal(within.embed(blobs(64, 64)), alone.embed(blobs(64, 64)))


KNOWN_TINY = {
    "facebook/dinov3-vits16plus-pretrain-lvd1689m": TINY,
    "facebook/dinov3-convnext-tiny-pretrain-lvd1689m": STAGED,
    "facebook/sam3": SAM3,
    "nvidia/C-RADIOv4-H": TINY,
    "google/siglip2-base-patch16-224": TINY,
    "facebook/ijepa_vith14_1k": TINY,
}


@pytest.fixture
def tiny(monkeypatch):
    """The families that are known by name, with small sizes."""
    small = {name: replace(KNOWN[name], config={**KNOWN[name].config, **sizes})
             for name, sizes in KNOWN_TINY.items()}  # fmt: skip
    monkeypatch.setattr(repository, "KNOWN", MappingProxyType(small))


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("name", KNOWN_TINY)
def test_those_known_by_name_conform(name):
    check_backbone(load_backbone(name, "random:0", "cpu"), shapes=((176, 112),))


@pytest.mark.slow
@pytest.mark.parametrize("name", KNOWN)
def test_what_the_table_says_is_what_the_model_is(name):
    """Built without weights: width, stride and input of the real size."""
    spec = load_backbone(name).describe("00" * 16)
    info = next(info for info in list_backbones() if info.name == name)
    assert (spec.width, spec.stride) == (info.width, info.stride)
    size = spec.input_size
    assert info.input == ("native size" if size is None else f"{size[0]}x{size[1]}")


def dinov3_names(state):
    """Give the weights of timm's DINOv3 the names that transformers has for them."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in (("cls_token", "embeddings.cls_token"),
                         ("reg_token", "embeddings.register_tokens"),
                         ("patch_embed.proj", "embeddings.patch_embeddings"),
                         ("blocks.", "layer."), ("attn.proj", "attention.o_proj"),
                         ("attn.", "attention."), ("gamma_1", "layer_scale1.lambda1"),
                         ("gamma_2", "layer_scale2.lambda1"), ("mlp.fc1", "mlp.up_proj"),
                         ("mlp.fc2", "mlp.down_proj")):  # fmt: skip
            name = name.replace(old, new)
        if "qkv" in name:
            for part, own in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace("qkv", f"{part}_proj")] = own
        else:
            renamed[name] = tensor
    for name in [name for name in renamed if name.endswith("q_proj.weight")]:
        for part in "qv":
            bias = name.replace("q_proj.weight", f"{part}_proj.bias")
            renamed.setdefault(bias, torch.zeros(len(renamed[name])))
    renamed["embeddings.mask_token"] = torch.zeros(1, 1, renamed["norm.weight"].shape[0])
    return renamed


def test_one_network_gives_one_grid_by_any_of_its_names(tmp_path, blobs):
    """DINOv3 by name, by timm and by transformers."""
    timm = pytest.importorskip("timm", reason="needs the package timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = timm.create_model("vit_small_patch16_dinov3").eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                if "gamma" in name:
                    parameter.fill_(0.5)
    torch.save(network.state_dict(), tmp_path / "timm.pth")
    torch.save(dinov3_names(network.state_dict()), tmp_path / "ours.pth")
    name, frames = "facebook/dinov3-vits16-pretrain-lvd1689m", blobs(64, 96)
    layers = {"-1": "last_hidden_state", "3": "hidden_states.3"}
    for layer, called in layers.items():
        options = f"layer={layer}&input_size=64x96"
        theirs = load_backbone(
            f"timm/vit_small_patch16_dinov3?{options}", tmp_path / "timm.pth", "cpu"
        )
        ours = load_backbone(f"{name}?{options}", tmp_path / "ours.pth", "cpu")
        assert ours.spec.layer == called
        assert relative_error(ours.embed(frames), theirs.embed(frames)) < 1e-4
        (tmp_path / "folder").mkdir(exist_ok=True)
        ours.module.save_pretrained(tmp_path / "folder")
        scales = {"image_mean": ours.spec.mean, "image_std": ours.spec.std, "resample": 2}
        (tmp_path / "folder/preprocessor_config.json").write_text(json.dumps(scales))
        again = load(f"dinov3?{options}", tmp_path / "folder")
        assert again.spec.weights == ours.spec.weights
        assert torch.equal(again.embed(frames), ours.embed(frames))


def test_a_configuration_that_gives_other_numbers_gives_other_keys(tmp_path, blobs):
    """Of one set of weights; who wrote it does not matter."""
    make("siglip", tmp_path)
    file, frames = tmp_path / "config.json", blobs(64, 64)
    plain = json.loads(file.read_text())
    file.write_text(json.dumps(plain | {"transformers_version": "4.0.0"}))
    first = load("siglip", tmp_path)
    file.write_text(json.dumps(plain))
    assert load("siglip", tmp_path).spec == first.spec
    expected = first.embed(frames)
    plain["vision_config"]["num_attention_heads"] = 4
    file.write_text(json.dumps(plain))
    other = load("siglip", tmp_path)
    assert other.spec.weights == first.spec.weights
    assert not torch.equal(other.embed(frames), expected)
    assert other.spec != first.spec


class TestMistakes:
    def test_a_checkpoint_of_another_model(self, tmp_path):
        torch.save({"a": torch.zeros(3)}, tmp_path / "a.pth")
        backbone = load_backbone(
            "facebook/dinov3-vits16-pretrain-lvd1689m", tmp_path / "a.pth", "cpu"
        )
        with pytest.raises(BackboneError, match=r"does not fit .* tensors are missing"):
            _ = backbone.spec

    def test_a_folder_of_another_size(self, tmp_path):
        make("dinov3", tmp_path)
        name = "facebook/dinov3-vits16-pretrain-lvd1689m"
        with pytest.raises(BackboneError, match=r"does not describe .*hidden_size is 32"):
            _ = load_backbone(name, tmp_path, "cpu").spec

    def test_a_layer_that_is_none(self, tmp_path):
        make("dinov3", tmp_path)
        with pytest.raises(UnknownNameError, match=r"unknown layer of .* '3'"):
            _ = load("dinov3", tmp_path, layer=3).spec

    @pytest.mark.parametrize(
        ("name", "hints"),
        [
            ("facebook/dinov3-vitb16", ("did you mean 'facebook/dinov3-vitb16-pretrain-lvd1689m'",
                                        "transformers/facebook/dinov3-vitb16 or timm/vit_")),
            ("google/siglip-base-patch16-224", ("transformers/google/siglip-base-patch16-224",)),
        ],
    )  # fmt: skip
    def test_an_unknown_name_is_told_how_others_would_name_it(self, name, hints):
        with pytest.raises(UnknownNameError) as raised:
            load_backbone(name)
        assert all(hint in str(raised.value) for hint in hints)
