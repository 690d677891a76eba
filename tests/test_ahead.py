"""Reading ahead of shuffled batches."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from joblib import parallel_config
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler
from trackastra.data import CTCData, collate_sequence_padding
from trackastra.data.distributed import BalancedBatchSampler

from cold_trainings import embeddings, nothing_left, wait_until
from feature_cache import FeatureCache, ReadAhead
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import wrap

FRAMES, WINDOW, BATCHES = 80, 3, 20


@pytest.fixture(autouse=True)
def clean():
    with nothing_left():
        yield


def make_data(root, cache, **options):
    with parallel_config(backend="sequential"):
        data = CTCData(root, window_size=WINDOW, features="wrfeat")
    return wrap(data, cache, FakeBackbone(dim=4, **options), batch_size=1, progress=False)


def make_loader(data, workers, **options):
    sampler = BalancedBatchSampler(data, batch_size=2, num_samples=2 * BATCHES)
    return DataLoader(
        data,
        batch_sampler=ReadAhead(sampler, data, **options),
        collate_fn=collate_sequence_padding,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_the_device_works_while_nobody_asks(tmp_path, small_folder, workers):
    root, log = small_folder(frames=FRAMES, width=160), tmp_path / "log"
    data = make_data(root, tmp_path / "cold", log=log)
    np.random.seed(0)
    batches = iter(make_loader(data, workers, batches=BATCHES))
    seen = [next(batches)]
    np.random.seed(0)
    drawn = list(BalancedBatchSampler(data, batch_size=2, num_samples=2 * BATCHES))
    used = {t for batch in drawn for index in batch for t in range(index, index + WINDOW)}
    assert len(used) > 60
    assert wait_until(lambda: len(embeddings(log)) >= len(used), 60)
    seen += batches
    assert len(seen) == BATCHES
    assert set(embeddings(log).values()) == {1}
    warm = make_data(root, tmp_path / "warm")
    warm.warm()
    for batch, indices in zip(seen, drawn, strict=True):
        expected = collate_sequence_padding([warm[index] for index in indices])
        assert torch.equal(batch["pretrained_feats"], expected["pretrained_feats"])


def test_a_warm_cache_is_left_alone(tmp_path, small_folder):
    root, log = small_folder(frames=20), tmp_path / "log"
    make_data(root, tmp_path / "cache").warm()
    data = make_data(root, FeatureCache(tmp_path / "cache"), log=log)
    assert len(list(make_loader(data, 0))) == BATCHES
    assert not embeddings(log)


def test_batches_stay_as_they_are():
    class Silent:
        def prefetch(self, indices):
            told.append(list(indices))

    told: list[list[int]] = []
    sampler = DistributedSampler(range(30), num_replicas=2, rank=1, seed=4)
    plain = BatchSampler(sampler, 4, drop_last=False)
    for batches in (1, 3, 99):
        told.clear()
        ahead = ReadAhead(plain, Silent(), batches=batches)
        assert list(ahead) == told == list(plain)
        assert len(ahead) == 4
        assert ahead.sampler is sampler
        assert ahead.batch_size == 4
    assert len(pickle.loads(pickle.dumps(ReadAhead([[1]], [])))) == 1
    with pytest.raises(AttributeError, match="no_such"):
        _ = ahead.no_such
    with pytest.raises(ValueError, match="batches 0"):
        ReadAhead(plain, Silent(), batches=0)
