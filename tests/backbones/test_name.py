"""One string names a backbone with its options, wherever one is named."""

from __future__ import annotations

import pytest
import torch

from feature_cache import BackboneError, UnknownNameError, load_backbone
from feature_cache.backbones import list_options
from feature_cache.backbones.from_spec import is_named, name_in_full
from feature_cache.spec import BackboneSpec

LITE = "efficientnet-lite0"


@pytest.mark.parametrize(
    ("text", "name", "options"),
    [
        (f"{LITE}?layer=stride-8", LITE, {"layer": "stride-8"}),
        (f"{LITE}?dtype=bfloat16&layer=stride-32", LITE,
         {"dtype": "bfloat16", "layer": "stride-32"}),
        ("timm/test_vit?layer=-2&input_size=96x64", "timm/test_vit",
         {"layer": -2, "input_size": (96, 64)}),
        ("timm/test_vit?input_size=none", "timm/test_vit", {}),
        ("debug/random?stride=4", "debug/random", {"stride": 4}),
    ],
)  # fmt: skip
def test_it_is_the_backbone_that_keywords_make(text, name, options):
    made = load_backbone(name, "random:1", "cpu", **options)
    named = load_backbone(f"{text}&weights=random:1", device="cpu")
    assert named.spec == made.spec
    assert named.spec.name == name
    frames = torch.rand((1, 96, 96), generator=torch.Generator().manual_seed(0))
    assert torch.equal(named.embed(frames), made.embed(frames))


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        (f"{LITE}?layr=stride-8", UnknownNameError, "unknown option of .* 'layr': .* 'layer'"),
        (f"{LITE}?layer=stride-9", UnknownNameError, "'stride-9': did you mean 'stride-8'"),
        (f"{LITE}?dtype=bf16", UnknownNameError, "'bf16': did you mean 'bfloat16'"),
        (f"{LITE}?device=cpu", UnknownNameError, "unknown option of .* 'device'"),
        (f"{LITE}?layer", BackboneError, "'layer' .* has no value: expected NAME"),
        (f"{LITE}?layer=stride-8&layer=stride-4", BackboneError, "'layer' .* comes twice"),
        ("timm/test_vit?input_size=96by64", BackboneError, "expected a whole number or HEIGHTx"),
        ("facebook/sam2.1-hiera-tiny?antialias=maybe", BackboneError, "expected true or false"),
        (f"{LITE.replace('0', '')}?layer=stride-8", UnknownNameError, f"did you mean '{LITE}'"),
    ],
)
def test_a_mistake_is_one_line_with_the_nearest_right_one(text, kind, message):
    with pytest.raises(kind, match=message) as raised:
        load_backbone(text, device="cpu")
    assert "\n" not in str(raised.value)


def test_what_is_said_twice_is_refused():
    with pytest.raises(BackboneError, match=r"layer .* twice: stride-8 in its name"):
        load_backbone(f"{LITE}?layer=stride-8", layer="stride-4")


def test_options_are_listed_with_kinds_and_defaults():
    options = {one.name: one for one in list_options("facebook/sam-vit-base")}
    assert list(options) == ["weights", "dtype", "tile", "halo", "fit", "standardize"]
    assert options["fit"].words == ("pad", "stretch")
    assert options["fit"].default == "pad"
    assert options["standardize"].expected == "true or false"


@pytest.mark.parametrize(
    "text",
    [
        LITE,
        f"{LITE}?layer=stride-8",
        f"{LITE}?dtype=bfloat16&layer=stride-32",
        "timm/test_vit?input_size=96x96&layer=2",
        "debug/random?stride=4",
        "facebook/dinov2-small?input_size=56x56&standardize=true",
        "facebook/sam2.1-hiera-tiny?input_size=512x512&antialias=true",
    ],
)
def test_a_spec_gives_its_name_back(text):
    made = load_backbone(text, "random:1", "cpu")
    describe = getattr(made, "describe", lambda weights: made.spec)
    spec = BackboneSpec.from_json(describe("00" * 16).to_json())
    assert name_in_full(spec) == text
    assert is_named(spec, text)
    assert is_named(spec, spec.name)
    assert not is_named(spec, f"{LITE}?layer=stride-4")
