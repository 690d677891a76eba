from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_cache import BackboneError, FeatureCache, UnknownNameError, load_backbone


@pytest.fixture(scope="module")
def frames():
    return torch.rand(2, 70, 111, generator=torch.Generator().manual_seed(0))


class TestRandom:
    def test_is_uniform_and_knows_nothing_of_the_frame(self, frames):
        noise = load_backbone("debug/random").embed(frames).numpy()
        assert noise.shape == (2, 9, 14, 128)
        counts, _ = np.histogram(noise, bins=8, range=(-2, 2))
        assert counts.sum() == noise.size
        assert counts.std() < 3 * np.sqrt(noise.size / 8)
        vectors = noise.reshape(-1, 128)
        correlations = np.corrcoef(vectors)[np.triu_indices(len(vectors), 1)]
        assert abs(correlations.mean()) < 0.01
        assert np.abs(correlations).max() < 0.6

    def test_one_pixel_changes_its_cell_and_no_other(self, frames):
        backbone = load_backbone("debug/random")
        nudged = frames.clone()
        nudged[0, 30, 60] += 1e-6
        changed = (backbone.embed(frames) != backbone.embed(nudged)).any(dim=-1)
        assert changed.nonzero().tolist() == [[0, 30 * 9 // 70, 60 * 14 // 111]]

    def test_seeds_are_other_weights_and_other_noise(self, frames):
        one, other, default = (
            load_backbone("debug/random", w) for w in ("random:1", "random:2", None)
        )
        assert len({b.spec.weights for b in (one, other, default)}) == 3
        assert not torch.equal(one.embed(frames), other.embed(frames))

    def test_numbers_are_frozen(self):
        """The same on every machine and in every version: a change needs a new revision."""
        grid = load_backbone("debug/random").embed(torch.zeros(1, 8, 8))
        assert grid[0, 0, 0, :3].tolist() == [
            -0.7992911338806152,
            0.23280000686645508,
            -0.1634693145751953,
        ]


class TestEncodedLabels:
    def test_equal_features_if_and_only_if_equal_labels(self, cache: FeatureCache, small):
        _, masks = small
        records = cache.get_or_compute(
            masks.astype(np.float32),
            masks,
            load_backbone("debug/encoded_labels", stride=1),
            dtype="float32",
        )
        known: dict[int, np.ndarray] = {}
        for record in records:
            for label, vector in zip(record.labels, record.features, strict=True):
                np.testing.assert_allclose(vector, known.setdefault(label, vector), atol=1e-5)
        vectors = np.array(list(known.values()))
        gaps = np.linalg.norm(vectors[:, None] - vectors[None], axis=-1)
        assert gaps[np.triu_indices(len(vectors), 1)].min() > 0.1

    def test_large_labels_and_lengths(self):
        labels = torch.tensor([[[1.0, 2.0, 65535.0, 2.0**24 - 1]]])
        vectors = load_backbone("debug/encoded_labels", stride=1).embed(labels)[0, 0]
        np.testing.assert_allclose(vectors.norm(dim=-1), 32**0.5, rtol=1e-6)
        assert torch.pdist(vectors).min() > 0.5

    def test_takes_the_pixel_under_the_centre(self):
        frame = torch.zeros(1, 8, 8)
        frame[:, 2, 6] = 7
        grid = load_backbone("debug/encoded_labels").embed(frame)
        assert grid.shape == (1, 2, 2, 64)
        assert (grid != grid[0, 1, 1]).any(dim=-1).nonzero().tolist() == [[0, 0, 1]]


@pytest.mark.parametrize(
    ("name", "weights", "options", "error"),
    [
        ("debug/random", "weights.pth", {}, BackboneError),
        ("debug/random", None, {"stride": 0}, BackboneError),
        ("debug/random", None, {"dtype": "float16"}, UnknownNameError),
        ("debug/encoded_labels", "random:0", {}, BackboneError),
    ],
)
def test_mistakes(name, weights, options, error):
    with pytest.raises(error, match=name):
        load_backbone(name, weights, **options)


def test_a_device_that_is_not_there():
    with pytest.raises(BackboneError, match="no device 'tpu9' here"):
        load_backbone("debug/random", device="tpu9")
