from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from feature_cache import (
    Augmentations,
    CachedFeatureDataset,
    DrawError,
    FrameError,
    MissingRecordError,
    UnknownNameError,
)
from feature_cache.movies import Series, write_movie
from feature_cache.service import close_all
from feature_cache.testing import FakeBackbone
from synthetic import make_movie


class Tokens(Dataset):
    """Samples of tokens in any order, some frames left out."""

    def __init__(self, masks, size=20):
        rng = np.random.default_rng(0)
        every = [(t, int(n)) for t, mask in enumerate(masks) for n in np.unique(mask[mask > 0])]
        self.samples = [
            [every[i] for i in rng.permutation(len(every))[: rng.integers(0, 9)]]
            for _ in range(size)
        ]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        tokens = torch.tensor(self.samples[index], dtype=torch.long).reshape(-1, 2)
        return {"timepoints": tokens[:, 0], "labels": tokens[:, 1]}


@pytest.fixture
def movie(cache, small):
    return cache.movie(*small, FakeBackbone(dim=4), name="movie")


def test_each_token_has_the_row_of_its_label(movie, small):
    dataset = CachedFeatureDataset(Tokens(small[1]), [movie])
    assert len(dataset) == 20
    records = movie.get_or_compute()
    for sample in dataset:
        features = sample["pretrained_feats"]
        assert features.dtype == torch.float32
        assert features.shape == (len(sample["labels"]), 4)
        tokens = zip(sample["timepoints"], sample["labels"], features, strict=True)
        for t, label, vector in tokens:
            record = records[int(t)]
            [row] = np.flatnonzero(record.labels == int(label))
            assert torch.equal(vector, torch.from_numpy(record.features[row].astype(np.float32)))


def test_a_cold_cache_fills_as_it_is_touched(movie, small, cache):
    dataset = CachedFeatureDataset(Tokens(small[1]), [movie])
    touched = set(dataset[3]["timepoints"].tolist())
    assert len(touched) <= cache.counter.total.misses <= cache.counter.total.computed <= 6
    _ = list(dataset)
    assert cache.stats()["computed"] == 6
    assert cache.stats()["hits"] > cache.stats()["misses"] > 0


def test_several_movies(cache, small):
    frames, masks = small
    backbone = FakeBackbone(dim=4)
    movies = [cache.movie(frames, masks, backbone), cache.movie(frames[::-1], masks, backbone)]
    tokens = Tokens(masks)
    dataset = CachedFeatureDataset(tokens, movies, movie_of=lambda index: index % 2)
    for index in (4, 5):
        alone = CachedFeatureDataset(tokens, [movies[index % 2]])
        assert torch.equal(dataset[index]["pretrained_feats"], alone[index]["pretrained_feats"])
    with pytest.raises(ValueError, match="2 movies: pass movie_of"):
        CachedFeatureDataset(tokens, movies)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_read_a_warm_cache(movie, small, method):
    movie.get_or_compute()
    dataset = CachedFeatureDataset(Tokens(small[1]), [movie])
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=method)
    for sample, expected in zip(loader, dataset, strict=True):
        assert torch.equal(sample["pretrained_feats"], expected["pretrained_feats"])


def test_workers_that_find_nobody_who_computes_say_what_to_do(movie, small):
    dataset = CachedFeatureDataset(Tokens(small[1]), [movie])
    close_all()
    with pytest.raises(MissingRecordError, match=r"this is a DataLoader worker\): warm"):
        list(DataLoader(dataset, batch_size=None, num_workers=1))


def test_misses_can_be_errors(movie, small, cache):
    dataset = CachedFeatureDataset(Tokens(small[1]), [movie], on_miss="error")
    with pytest.raises(MissingRecordError, match="on_miss is 'error'"):
        dataset[3]
    assert cache.stats()["computed"] == 0


def test_an_unknown_label_is_never_zeros(movie):
    class One(Tokens):
        def __getitem__(self, index):
            return {"timepoints": torch.tensor([2, 2]), "labels": torch.tensor([1, 77])}

    dataset = CachedFeatureDataset(One([]), [movie])
    with pytest.raises(FrameError, match="label 77 is not in the mask of frame 2 of movie"):
        dataset[0]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"labels": None}, TypeError, "a sample has labels that are NoneType: expected a tensor"),
        ({"timepoints": [0, 0]}, TypeError, "a sample has timepoints that are list: expected"),
        ({"timepoints": torch.tensor([0.0, 0.5])}, TypeError, r"timepoints are float32 of shape"),
        ({"labels": torch.tensor([[1, 2]])}, TypeError, r"labels are int64 of shape \(1, 2\)"),
        ({"timepoints": torch.tensor([0, 99])}, FrameError, "timepoint 99 is none of movie"),
        ({"timepoints": torch.tensor([-1, 0])}, FrameError, "timepoint -1 is none of movie"),
    ],
)
def test_samples_that_name_no_cells(movie, changed, error, message):
    sample = {"timepoints": torch.tensor([0, 0]), "labels": torch.tensor([1, 2])}
    with pytest.raises(error, match=message):
        CachedFeatureDataset([{**sample, **changed}], [movie])[0]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"augmentations": "default"}, DrawError, "augmentations is 'default'"),
        ({"on_miss": "skip"}, UnknownNameError, "unknown on_miss 'skip': Known: compute, error"),
        ({"batch_size": 0}, ValueError, "batch_size 0"),
        ({"batch_size": 2.5}, ValueError, r"batch_size 2\.5: expected 1 or more"),
    ],
)
def test_wrong_words(movie, small, options, error, message):
    with pytest.raises(error, match=message):
        CachedFeatureDataset(Tokens(small[1]), [movie], **options)


def test_grids_have_no_rows(cache, small):
    movie = cache.movie(small[0], None, FakeBackbone(), pooling=None)
    with pytest.raises(FrameError, match="choose a pooling"):
        CachedFeatureDataset(Tokens(small[1]), [movie])


def test_copies_that_share_records_are_computed_and_counted_once(cache, small):
    movie, copies = cache.movie(*small, FakeBackbone()), Augmentations("flips", copies=20)
    dataset = CachedFeatureDataset(Tokens(small[1]), [movie], augmentations=copies)
    assert dataset.warm() == 4 * 6 == cache.stats()["computed"]
    assert dataset.warm() == 0


def test_warming_reads_each_file_once_and_computes_while_it_reads(cache, tmp_path, monkeypatch):
    frames, masks, tracks = make_movie(200, 24, 250, cells=2)
    write_movie(tmp_path / "01", frames, masks, tracks)
    seen, read = [], Series.__getitem__

    class Watched(FakeBackbone):
        def embed(self, frames):
            seen.append("embedded")
            return super().embed(frames)

    def watch(images, t):
        seen.append(t)
        return read(images, t)

    monkeypatch.setattr(Series, "__getitem__", watch)
    movie = cache.movie(tmp_path / "01", None, Watched(dim=4))
    dataset = CachedFeatureDataset(Tokens(masks[:1]), [movie], batch_size=8)
    assert dataset.warm() == 200
    monkeypatch.undo()
    assert sorted(t for t in seen if t != "embedded") == sorted([*range(200)] * 2)
    assert seen.index("embedded") < 300
    assert dataset.warm() == 0
