"""Every backbone that can be built here keeps the promises of `Backbone`."""

from __future__ import annotations

import threading

import pytest
import torch

from feature_cache import list_backbones, load_backbone
from feature_cache.backbones.base import TorchBackbone
from feature_cache.testing import FakeBackbone, check_backbone

ONE_SHAPE = {"shapes": ((176, 112),)}
FAMILIES = {
    "timm/<model>": [
        ("timm/convnext_femto", {}),
        ("timm/vit_tiny_patch16_224", {}),
        ("timm/vit_small_patch16_dinov3", {}),
        ("timm/efficientnet_b0", {"layer": -2}),
        ("timm/swin_tiny_patch4_window7_224", {"layer": 1}),
    ],
}
OPTIONS = {
    "facebook/hiera-tiny-224-hf": {"input_size": 224},
    **{
        f"facebook/{version}-hiera-tiny{level}": {"input_size": 256}
        for version in ("sam2", "sam2.1")
        for level in ("", "/highres")
    },
}
ALSO = ("facebook/sam2.1-hiera-tiny/highres", "facebook/sam2-hiera-tiny")
DEEP = {"facebook/sam-vit-base": 12, "mouseland/cellpose-sam": 24}
LONG = (
    *("facebook/sam2.1-hiera-tiny/highres", "facebook/sam2-hiera-tiny"),
    *("facebook/hiera-tiny-224-hf", "facebook/dinov3-vits16-pretrain-lvd1689m"),
    *("timm/swin_tiny_patch4_window7_224", "timm/vit_small_patch16_dinov3"),
    "facebook/sam2.1-hiera-tiny",
)
SAME_NETWORK = ("microsam/vit_b_lm",)  # as facebook/sam-vit-base, with other weights
NO_WEIGHTS = ("debug/encoded_labels",)


def smallest():
    """Give the first of the registry's names of each family: they go from small to large."""
    seen, chosen = set(), []
    for info in list_backbones():
        if (info.factory in seen and info.name not in ALSO) or info.name in SAME_NETWORK:
            seen.add(info.factory)
            continue
        seen.add(info.factory)
        for name, options in FAMILIES.get(info.name, [(info.name, OPTIONS.get(info.name, {}))]):
            absent = pytest.mark.skip(reason=f"not installed: {info.install}")
            marks = [] if info.installed else [absent]
            marks += [pytest.mark.slow] if name in DEEP or name in LONG else []
            chosen.append(pytest.param(info, name, options, id=name, marks=marks))
    return chosen


def load(name, options, seed=0):
    weights = None if name in NO_WEIGHTS else f"random:{seed}"
    return load_backbone(name, weights, "cpu", **options)


@pytest.mark.parametrize(("info", "name", "options"), smallest())
def test_conforms(info, name, options, request):
    if name in DEEP:
        request.getfixturevalue("shallow")
    backbone = load(name, options)
    spec = backbone.spec
    assert spec.name == name
    assert info.width in (None, spec.width)
    assert info.stride in (None, spec.stride)
    check_backbone(backbone, **(ONE_SHAPE if name in DEEP else {}))
    assert load(name, options).spec == spec
    if name not in NO_WEIGHTS:
        assert load(name, options, seed=1).spec.weights != spec.weights
    if isinstance(backbone, TorchBackbone):
        assert not any(module.training for module in backbone.module.modules())
        assert not any(p.requires_grad for p in backbone.module.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("name", DEEP)
def test_the_real_depth(name, blobs):
    backbone = load(name, {})
    grid = backbone.embed(blobs(48, 96))
    assert grid.shape[3] == backbone.spec.width
    encoder = getattr(backbone.module, "encoder", backbone.module)
    assert len(encoder.layers) == DEEP[name]
    assert torch.isfinite(grid).all()


def test_the_fake_conforms():
    check_backbone(FakeBackbone())


class Broken(FakeBackbone):
    """A backbone that breaks one promise."""

    def __init__(self, how):
        super().__init__()
        self.how = how

    def embed(self, frames):
        return self.how(super().embed, frames)


def drift(embed, frames, count=[0]):  # noqa: B006
    count[0] += 1
    return embed(frames) + count[0]


class Unsaid(FakeBackbone):
    """A backbone with an option that is not in its spec."""

    def __init__(self, gain):
        super().__init__()
        self.gain = gain

    def embed(self, frames):
        return super().embed(frames) * self.gain


class Unseeded(FakeBackbone):
    """A backbone that draws its weights by chance, when they are first needed."""

    gain = None

    def embed(self, frames):
        self.gain = torch.rand(1) if self.gain is None else self.gain
        return super().embed(frames) * self.gain


def test_what_the_spec_does_not_say_is_found():
    check_backbone(Unsaid(2), Unsaid(2))
    with pytest.raises(AssertionError, match="two instances of equal spec give other numbers"):
        check_backbone(Unsaid(2), Unsaid(3))
    with pytest.raises(AssertionError, match="two instances of equal spec give other numbers"):
        check_backbone(Unseeded())
    with pytest.raises(AssertionError, match="two instances have other specs: weights differ"):
        check_backbone(FakeBackbone(), FakeBackbone(seed=1))


def test_what_cannot_be_copied_is_asked_for():
    backbone = FakeBackbone()
    backbone.lock = threading.Lock()
    with pytest.raises(AssertionError, match="pass the same made once more as other"):
        check_backbone(backbone)
    check_backbone(backbone, FakeBackbone())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (lambda embed, x: embed(x).flip(1), "does the grid lie on the frame"),
        (lambda embed, x: embed(x).flip(2), "does the grid lie on the frame"),
        (lambda embed, x: embed(x.mT), "its spec says"),
        (lambda embed, x: embed(x.mT).reshape(embed(x).shape), "does the grid lie on the frame"),
        (lambda embed, x: embed(x)[..., 1:], "its spec says width 16"),
        (lambda embed, x: embed(x) * torch.nan, "NaN"),
        (lambda embed, x: embed(x.mul_(2)), "changed the frames"),
        (lambda embed, x: embed(x).requires_grad_(), "gradients"),
        (lambda embed, x: embed(x - x.mean()), "depends on its batch"),
        (lambda embed, x: embed(x) * x[-1].mean(), "depends on the order of its batch"),
        (drift, "a second time"),
        (lambda embed, x: (embed(x) @ torch.eye(16)).float(), "autocast"),
    ],
)
def test_a_broken_promise_is_found(how, message):
    with pytest.raises(AssertionError, match=message):
        check_backbone(Broken(how))
