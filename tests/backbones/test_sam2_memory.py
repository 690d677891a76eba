"""SAM 2's features with the memory of frames before."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from feature_cache import BackboneError, load_backbone
from feature_cache.backbones import find_factory
from feature_cache.backbones.from_spec import name_in_full, options_of
from feature_cache.testing import check_backbone

pytest.importorskip("sam2", reason="needs the package sam2")
pytestmark = pytest.mark.filterwarnings("ignore:.*sam2._C.*:UserWarning")

TINY = "facebook/sam2.1-hiera-tiny"
SIZE = 128


@pytest.fixture(scope="module")
def predictor():
    from sam2.build_sam import build_sam2_video_predictor

    torch.manual_seed(3)
    network = build_sam2_video_predictor(
        "configs/sam2.1/sam2.1_hiera_t.yaml",
        device="cpu",
        hydra_overrides_extra=[f"++model.image_size={SIZE}"],
    ).requires_grad_(False)
    network.fill_hole_area = 0  # which needs CUDA
    return network


@pytest.fixture(scope="module")
def checkpoint(predictor, tmp_path_factory):
    file = tmp_path_factory.mktemp("sam2") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": predictor.state_dict()}, file)
    return file


def load(checkpoint, context):
    return load_backbone(
        f"{TINY}?input_size={SIZE}&context={context}", checkpoint, "cpu", standardize=True
    )


def propagate(predictor, folder, window):
    """What SAM2VideoPredictor's memory attention gives for the last frame, after an empty mask."""
    for t in range(len(window)):
        Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(folder / f"{t}.jpg")
    state = predictor.init_state(str(folder))
    mean = torch.tensor((0.485, 0.456, 0.406))[:, None, None]
    std = torch.tensor((0.229, 0.224, 0.225))[:, None, None]
    state["images"] = (window[:, None] - mean) / std
    state["cached_features"].clear()
    found = []
    hook = predictor.memory_attention.register_forward_hook(lambda *given: found.append(given[-1]))
    predictor.add_new_mask(state, 0, 1, torch.zeros(SIZE, SIZE, dtype=torch.bool))
    for _ in predictor.propagate_in_video(state):
        pass
    hook.remove()
    return found[-1].permute(1, 0, 2).reshape(SIZE // 16, SIZE // 16, 256)


@pytest.mark.slow
def test_equals_the_video_predictor(predictor, checkpoint, tmp_path):
    """Up to its memories in bfloat16; one frame more or less makes a larger difference."""
    window = torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    expected = propagate(predictor, tmp_path, window)
    largest = expected.abs().max()
    ours = load(checkpoint, "2,0").embed(window[None])[0]
    shorter = load(checkpoint, "1,0").embed(window[None, 1:])[0]
    assert float((ours - expected).abs().max() / largest) < 1e-3
    assert float((shorter - expected).abs().max() / largest) > 1e-2


def test_the_name_says_the_context_and_the_key_the_whole_network(checkpoint):
    plain = load_backbone(f"{TINY}?input_size={SIZE}", checkpoint, "cpu").spec
    spec = load(checkpoint, "1,0").spec
    assert (spec.context, spec.layer) == ((1, 0), "memory_attention")
    assert spec.weights != plain.weights
    assert "context=1,0" in name_in_full(spec)
    assert options_of(spec, find_factory(spec.name))["context"] == (1, 0)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{TINY}?context=1,1", "frames after"),
        (f"{TINY}/highres?context=1,0", "no memory"),
        (f"{TINY}?context=1,0&input_size=64x96", "64x96"),
        (f"{TINY}?context=2", "expected FRAMES_BEFORE,FRAMES_AFTER"),
    ],
)
def test_what_has_no_memory_is_refused(name, reason):
    with pytest.raises(BackboneError, match=reason):
        load_backbone(name)


@pytest.mark.slow
def test_keeps_what_backbones_promise(checkpoint):
    check_backbone(load(checkpoint, "1,0"), shapes=((96, 160),))
