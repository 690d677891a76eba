from __future__ import annotations

import sys
from importlib.util import find_spec

import pytest
import torch

from feature_cache import (
    BackboneError,
    FrameError,
    MissingDependencyError,
    UnknownNameError,
    load_backbone,
)
from feature_cache.testing import check_backbone

NAME = "facebookresearch/co-tracker"
needed = pytest.mark.skipif(
    find_spec("cotracker") is None,
    reason="needs cotracker: pip install git+https://github.com/facebookresearch/co-tracker",
)


@pytest.fixture(scope="module")
def tracker():
    """CoTracker3 offline as its own hubconf.py builds it, with random weights."""
    from cotracker.predictor import CoTrackerPredictor

    torch.manual_seed(5)
    return CoTrackerPredictor(checkpoint=None, window_len=60, v2=False).model.eval()


@pytest.fixture(scope="module")
def checkpoint(tracker, tmp_path_factory):
    file = tmp_path_factory.mktemp("cotracker") / "scaled_offline.pth"
    torch.save(tracker.state_dict(), file)
    return file


@needed
@pytest.mark.parametrize("shape", [(96, 160), (70, 111)])
@pytest.mark.parametrize(
    ("input_range", "feed"), [("0..1", lambda x: x), ("-1..1", lambda x: 2 * (x * 255 / 255) - 1)]
)
def test_equals_upstream(tracker, checkpoint, shape, input_range, feed):
    """The feature network, and what CoTrackerThreeOffline.forward makes of its output."""
    frames = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        maps = tracker.fnet(feed(frames[:, None].repeat(1, 3, 1, 1))).permute(0, 2, 3, 1)
    squares = torch.sum(torch.square(maps), axis=-1, keepdims=True)
    expected = maps / torch.sqrt(torch.maximum(squares, torch.tensor(1e-12)))
    backbone = load_backbone(NAME, checkpoint, "cpu", input_range=input_range)
    ours = backbone.embed(frames)
    assert float((ours - expected).abs().max() / expected.abs().max()) <= 1e-4
    assert ours.shape == (2, shape[0] // 4, shape[1] // 4, 128)


@needed
def test_equals_the_predecessor(tracker, checkpoint):
    module = pytest.importorskip("trackastra_pretrained_feats.pretrained_features")
    extractor = object.__new__(module.CoTrackerFeatures)
    extractor.model, extractor.device = tracker, "cpu"
    extractor.batch_size = extractor.fmaps_chunk_size = 4
    frames = torch.rand(2, 64, 96, generator=torch.Generator().manual_seed(0))
    images = [frame[None].repeat(3, 1, 1).numpy() for frame in frames]
    expected = extractor._run_model(images).reshape(2, 16, 24, 128)
    ours = load_backbone(NAME, checkpoint, "cpu").embed(frames)
    assert float((ours - expected).abs().max()) <= 1e-4


def load_window(checkpoint, context, size="64x96"):
    return load_backbone(f"{NAME}?context={context}&input_size={size}", checkpoint, "cpu")


@needed
def test_a_window_gives_what_the_tracker_says_of_its_points(tracker, checkpoint):
    """From the tokens, its heads read the last step of each track that its predictor finds."""
    window = torch.rand(3, 70, 111, generator=torch.Generator().manual_seed(0))
    grid = load_window(checkpoint, "1,1").embed(window[None])
    assert grid.shape == (1, 8, 12, 384)
    resized = torch.nn.functional.interpolate(
        window[:, None] * 255, (64, 96), mode="bilinear", align_corners=True
    )
    video = resized.expand(-1, 3, -1, -1)[None]
    y, x = (
        axis.flatten() * 8 + 3.5
        for axis in torch.meshgrid(*map(torch.arange, (8, 12)), indexing="ij")
    )
    queries = torch.stack([torch.ones_like(x), x, y], dim=-1)[None]
    with torch.no_grad():
        (before, *_), (after, *_) = (tracker(video, queries, iters=n) for n in (3, 4))
        step = tracker.updateformer.flow_head(grid.view(1, -1, 384))
    expected = (after - before)[:, 1] / 4
    assert float((step - expected).abs().max() / expected.abs().max()) < 1e-3


@needed
def test_what_is_around_a_frame_matters_and_is_in_the_name(checkpoint):
    window = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    window[1, 1] = window[0, 1]
    one, other = load_window(checkpoint, "1,1").embed(window)
    assert float((one - other).abs().max() / one.abs().max()) > 1e-3
    spec = load_window(checkpoint, "1,0").spec
    assert (spec.context, spec.layer, spec.input_size) == ((1, 0), "updateformer", (64, 96))
    assert spec.weights != load_backbone(NAME, checkpoint, "cpu").spec.weights
    assert load_backbone(f"{NAME}?context=2,0").input_size == (384, 512)
    with pytest.raises(FrameError, match=r"expected \(B, T, H, W\), T = 2"):
        load_window(checkpoint, "1,0").embed(window)


@needed
@pytest.mark.slow
def test_windows_keep_what_backbones_promise(checkpoint):
    check_backbone(load_window(checkpoint, "1,0"), shapes=((96, 160),))


@needed
def test_mistakes(tmp_path):
    torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(BackboneError, match=r"no weights 'fnet.…'"):
        _ = load_backbone(NAME, tmp_path / "a.pth", "cpu").spec
    torch.save({"fnet.conv9.weight": torch.zeros(1)}, tmp_path / "b.pth")
    with pytest.raises(BackboneError, match=r"missing \('conv1.weight'.*1 unexpected \('conv9"):
        _ = load_backbone(NAME, tmp_path / "b.pth", "cpu").spec
    with pytest.raises(FrameError, match="16x12 pixels"):
        load_backbone(NAME, "random:0", "cpu").embed(torch.zeros(1, 16, 12))


@needed
def test_both_input_ranges_are_spaces_of_their_own():
    ranges = ("0..1", "-1..1")
    specs = [load_backbone(NAME, "random:0", "cpu", input_range=r).spec for r in ranges]
    assert specs[0] != specs[1]
    assert [spec.extra["input_range"] for spec in specs] == list(ranges)


@pytest.mark.skipif(find_spec("cotracker") is not None, reason="cotracker is installed")
def test_a_missing_package_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"git\+https://github.com/facebookresearch"):
        _ = load_backbone(NAME, "random:0", "cpu").spec


def test_unknown_input_range():
    with pytest.raises(UnknownNameError, match=r"input_range of .*co-tracker '0\.\.255'"):
        load_backbone(NAME, input_range="0..255")


STAND_IN = """
import torch
torch.manual_seed(0)


class CoTrackerThreeOffline(torch.nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.updateformer = torch.nn.Module()
        self.updateformer.flow_head = torch.nn.Linear(2, 2)
"""
"""Upstream's module seeds torch when it is imported."""


@pytest.fixture
def forget_tracker():
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "cotracker"]:
        del sys.modules[name]


@pytest.mark.skipif(find_spec("cotracker") is not None, reason="cotracker is imported already")
@pytest.mark.usefixtures("generators_stay", "forget_tracker")
def test_importing_the_tracker_leaves_all_generators_alone(tmp_path, monkeypatch):
    folder = tmp_path / "hub" / "facebookresearch_co-tracker_main"
    folder /= "cotracker/models/core/cotracker"
    folder.mkdir(parents=True)
    (folder / "cotracker3_offline.py").write_text(STAND_IN)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    _ = load_backbone(f"{NAME}?context=1,1&input_size=64x96", "random:3", "cpu").spec.weights
