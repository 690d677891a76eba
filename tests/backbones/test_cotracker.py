from __future__ import annotations

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
    with pytest.raises(UnknownNameError, match=r"input range of CoTracker '0\.\.255'"):
        load_backbone(NAME, input_range="0..255")
