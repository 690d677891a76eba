"""Batches whose features are read together: equal to those read and collated one by one."""

from __future__ import annotations

import itertools
import pickle
from functools import cache as remember

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joblib import parallel_config
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset
from trackastra.data import CTCData, collate_sequence_padding
from trackastra.data.distributed import BalancedBatchSampler

from feature_cache import (
    Augmentations,
    CachedFeatureDataset,
    FeatureCache,
    FrameError,
    MissingRecordError,
)
from feature_cache.dataset import Drawn
from feature_cache.movies import write_movie
from feature_cache.service import Misses
from feature_cache.store import Space
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import CachedConcatDataset, collate, wrap
from synthetic import make_movie

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`RegionProperties.mean_intensity`:FutureWarning"),
]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load one of three movies as CTCData; a movie's cells come and go."""
    root = tmp_path_factory.mktemp("movies")
    for seed in range(3):
        frames, masks, tracks = make_movie(frames=7 + seed, cells=5 - seed, seed=seed)
        for row in tracks[1:]:
            masks[: row[0]][masks[: row[0]] == row[0]] = 0
            row[1] = row[0]
        write_movie(root / str(seed) / "01", frames, masks, tracks)

    @remember
    def load_one(seed, **options):
        with parallel_config(backend="sequential"):
            return CTCData(str(root / str(seed) / "01"), **{"window_size": 4, **options})

    return load_one


def begin(data, epoch):
    """Seed everything, and begin an epoch anew, in which nothing came yet."""
    seed_everything(data)
    if epoch is not None:
        data.set_epoch(epoch)


def seed_everything(*members):
    torch.manual_seed(0)
    np.random.seed(0)
    for data in members:
        for generator in (data.augmenter, data.cropper):
            for one in (generator, *getattr(generator, "augmentations", ())):
                if one is not None:
                    one._rng = np.random.RandomState(1)


def assert_equal(batch, expected):
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert batch[name].dtype == values.dtype
        assert torch.equal(batch[name], values), name


LOADED = [
    {},
    {"augment": 1},
    {"augment": 3, "crop_size": (30, 40), "max_tokens": 11},
    {"crop_size": (36, 44), "compress": True},
    {"max_tokens": 9},
]


@pytest.mark.parametrize("options", LOADED, ids=lambda o: "-".join(o) or "plain")
def test_batches_are_equal_to_those_read_one_by_one(load, cache, options):
    plain = load(0, **options)
    two = Augmentations("default", copies=2, seed=1)
    for rotated, props, (policy, epoch) in itertools.product(
        (False, True),
        (None, "regionprops", "regionprops2"),
        ((None, None), (two, None), (two, 3)),
    ):
        data = wrap(
            plain, cache, FakeBackbone(dim=5, stride=8), augmentations=policy,
            additional_props=props, rotate_features=rotated, progress=False,
        )  # fmt: skip
        for indices in ([0, 2, 1, 2], [3]):
            begin(data, epoch)
            expected = [data[n] for n in indices]
            begin(data, epoch)
            batch = data.__getitems__(indices)
            for ours, theirs in zip(batch, expected, strict=True):
                assert ours.get("copy") == theirs.get("copy")
                copies = [{k: v for k, v in s.items() if k != "copy"} for s in (ours, theirs)]
                assert_equal(*copies)
            reference = collate_sequence_padding(expected)
            assert_equal(collate(batch), reference)
            assert_equal(collate_sequence_padding(batch), reference)


def many(load, cache, **options):
    """Wrap three movies one after the other."""
    members = [load(seed) for seed in range(3)]
    return wrap(ConcatDataset(members), cache, FakeBackbone(dim=5, stride=8), **options)


def test_a_batch_of_several_members(load, cache):
    data = many(load, cache, augmentations=Augmentations("flips", copies=3, seed=2))
    assert len(data) == 4 + 5 + 6
    data.set_epoch(1)
    indices = [14, 0, 7, -1, 4, 3, 4]
    expected = collate_sequence_padding([data[n] for n in indices])
    data.set_epoch(1)
    assert_equal(collate(data.__getitems__(indices)), expected)
    inner = Subset(data, [5, 1, 12])
    data.set_epoch(1)
    expected = collate_sequence_padding([inner[n] for n in (2, 0)])
    data.set_epoch(1)
    assert_equal(collate(inner.__getitems__([2, 0])), expected)
    for index in (15, -16):
        with pytest.raises(IndexError, match="of 15"):
            data.__getitems__([index])


def test_a_batch_of_several_spaces(load, cache):
    backbone = FakeBackbone(dim=5, stride=8)
    data = CachedConcatDataset([
        wrap(load(0), cache, backbone, dtype="float16"),
        wrap(load(1), cache, backbone, dtype="float32"),
        wrap(load(2), cache, backbone, pooling="nearest_patch"),
    ])  # fmt: skip
    expected = collate_sequence_padding([data[n] for n in (0, 5, 10)])
    assert_equal(collate(data.__getitems__([0, 5, 10])), expected)


def test_features_of_different_width_make_no_batch(load, cache):
    data = CachedConcatDataset([
        wrap(load(seed), cache, FakeBackbone(dim=4 + seed)) for seed in range(2)
    ])  # fmt: skip
    assert len(data.__getitems__([0, 1])) == 2
    with pytest.raises(ValueError, match=r"different widths: 4 \(.*\), 5 \("):
        data.__getitems__([0, 5])


@pytest.mark.parametrize(
    ("workers", "method"),
    [(0, None), (2, "fork"), pytest.param(2, "spawn", marks=pytest.mark.slow)],
)
def test_balanced_batches_through_workers(load, cache, workers, method):
    data = many(load, cache, augmentations=Augmentations("flips", copies=2, seed=0))
    places = itertools.count()
    batches = [
        [Drawn(n, 0, (0, next(places), 0)) for n in batch]
        for batch in BalancedBatchSampler(data, batch_size=3, n_pool=2)
    ]
    expected = [collate_sequence_padding([data[n] for n in batch]) for batch in batches]
    loader = DataLoader(
        data, batch_sampler=batches, collate_fn=collate,
        num_workers=workers, multiprocessing_context=method,
    )  # fmt: skip
    for batch, reference in zip(loader, expected, strict=True):
        assert_equal(batch, reference)
        features = batch["pretrained_feats"]
        assert features.is_contiguous()
        assert features.untyped_storage().nbytes() == features.nbytes


def count_keys(monkeypatch):
    """Note how many keys each Space.read is asked for."""
    asked = []
    read = Space.read

    def counted(self, keys):
        asked.append(len(keys))
        return read(self, keys)

    monkeypatch.setattr(Space, "read", counted)
    return asked


def count_asks(monkeypatch):
    """Note which frames each Misses.fetch is asked for."""
    asked = []
    fetch = Misses.fetch

    def counted(self, movie, absent, **options):
        asked.append(list(absent))
        return fetch(self, movie, absent, **options)

    monkeypatch.setattr(Misses, "fetch", counted)
    return asked


def test_each_record_of_a_batch_is_looked_up_once(load, cache, monkeypatch):
    data = many(load, cache)
    data.warm()
    keys = count_keys(monkeypatch)
    data.__getitems__([0, 1, 2, 0])
    data.__getitems__([3, 4, 5])
    data.__getitems__(list(range(6)))
    assert keys == [6]  # all others lie side by side in the pack, which is mapped by now


def test_windows_that_lie_in_several_packs_are_read_without_looking_up(load, tmp_path, monkeypatch):
    expected = wrap(load(0), tmp_path / "one", FakeBackbone(dim=3), progress=False)
    data = wrap(load(0), tmp_path / "several", FakeBackbone(dim=3), progress=False)
    for times in ([5, 1], [0, 2], [3, 4, 6]):
        data.all_tokens[0].movies[0].compute(times)
    samples = [expected[n] for n in range(len(expected))]
    for n in range(len(data)):
        data[n]  # opens the packs
    monkeypatch.setattr(Space, "read", lambda *_: pytest.fail("looked up"))
    for sample, batched in zip(samples, data.__getitems__(range(len(data))), strict=True):
        assert torch.equal(batched["pretrained_feats"], sample["pretrained_feats"])


def test_what_a_batch_misses_is_asked_for_together(load, tmp_path, monkeypatch):
    asks = count_asks(monkeypatch)
    for number, (batch_size, parts) in enumerate([
        (8, [[0, 1, 2, 3, 5, 6, 7]]), (3, [[0, 1, 2], [3, 5, 6], [7]])
    ]):  # fmt: skip
        cache = FeatureCache(tmp_path / str(number))
        tokens = Few({8: [4], 1: [6, 5, 7], 0: [0, 1, 2, 3], 2: [2, 1], 3: [5, 3]})
        frames, masks, _ = make_movie(frames=9)
        movie = cache.movie(frames, masks, FakeBackbone(dim=3))
        dataset = CachedFeatureDataset(tokens, [movie], batch_size=batch_size, progress=False)
        movie.compute([4, 8])
        asks.clear()
        batch = dataset.__getitems__([8, 1, 0, 2, 3])
        assert asks == parts
        usage = cache.counter.total
        assert usage.hits + usage.misses == sum(len(np.unique(s["timepoints"])) for s in batch)
        assert cache.stats()["computed"] == 9


class Few(Dataset):
    """Samples of one token a frame, some frames for each index."""

    def __init__(self, frames):
        self.frames = frames

    def __getitem__(self, index):
        times = torch.tensor(self.frames[index])
        return {"timepoints": times, "labels": torch.ones_like(times)}


def test_counters_are_those_of_samples_one_by_one(load, cache):
    data = many(load, cache, augmentations=Augmentations("default", copies=1, seed=0))
    data.warm()
    data.set_epoch(0)
    indices = [0, 1, 2, 1, 9, 14]
    counts = []
    for give in (lambda: [data[n] for n in indices], lambda: data.__getitems__(indices)):
        before = cache.counter.total
        give()
        after = cache.counter.total
        counts.append(
            (after.hits - before.hits, after.misses, after.bytes_read - before.bytes_read)
        )
    assert counts[0] == counts[1]
    assert counts[0][0] == 6 * 4


def test_copies_that_are_the_same_are_computed_once(load, cache):
    flips = Augmentations("flips", copies=30, seed=0)
    data = wrap(load(0), cache, FakeBackbone(dim=3), augmentations=flips, progress=False)
    data.__getitems__([0] * 40)
    draws = {str(draw.to_json()) for draw in flips.draws()}
    assert cache.stats()["computed"] <= 7 * len(draws) < 40 * 4


def test_missing_records_are_named(load, cache):
    data = wrap(load(0), cache, FakeBackbone(), on_miss="error")
    with pytest.raises(
        MissingRecordError, match=r"6 records, first frame 1 of .*on_miss is 'error'"
    ):
        data.__getitems__([3, 1])
    assert cache.counter.total.misses == 6
    data.feature_cache_extras.tokens.movies[0].compute([1, 2])
    with pytest.raises(MissingRecordError, match="4 records, first frame 3 of"):
        data.__getitems__([3, 1])


def test_a_cache_that_can_only_be_read(load, cache):
    backbone = FakeBackbone()
    filled = wrap(load(0), cache, backbone)
    filled.__getitems__([0])
    filled.feature_cache_extras.tokens.movies[0].compute([0, 1, 2, 3, 4])
    data = wrap(load(0), FeatureCache(cache.store.root, mode="r"), backbone)
    batch = data.__getitems__([0, 1])
    assert_equal(collate(batch), collate_sequence_padding([filled[0], filled[1]]))
    with pytest.raises(MissingRecordError, match="can only be read"):
        wrap(load(1), data.feature_cache_extras.tokens.movies[0].cache, backbone).__getitems__([0])


def gappy_movie():
    """Give frames and masks with labels that leave gaps, and two frames without a cell."""
    frames, masks, _ = make_movie(frames=6)
    labels = np.array([0, 3, 4, 9, 70, 1000], np.int32)
    masks = labels[masks]
    masks[2] = masks[5] = 0
    masks[3][masks[3] == 9] = 0
    return frames, masks


class Chosen(Dataset):
    """Samples given as lists of (timepoint, label)."""

    def __init__(self, samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        tokens = torch.tensor(self.samples[index], dtype=torch.long).reshape(-1, 2)
        coords = torch.cat([tokens[:, :1], tokens], dim=1).float()
        return {"coords": coords, "timepoints": tokens[:, 0], "labels": tokens[:, 1]}


@pytest.fixture(scope="module")
def gappy(tmp_path_factory):
    cache = FeatureCache(tmp_path_factory.mktemp("gappy"))
    movie = cache.movie(*gappy_movie(), FakeBackbone(dim=4), name="gappy")
    rows = {
        (t, int(label)): vector
        for t, record in enumerate(movie.get_or_compute())
        for label, vector in zip(record.labels, record.features, strict=True)
    }
    assert len(rows) == 4 * 5 - 1
    return movie, rows


TOKENS = [(t, int(n)) for t, mask in enumerate(gappy_movie()[1]) for n in np.unique(mask[mask > 0])]


def check_rows(batch, samples, rows):
    longest = max(map(len, samples), default=0)
    padded = batch.features
    assert padded.shape[1] == longest
    for ours, tokens, block in zip(batch, samples, padded, strict=True):
        features = ours["pretrained_feats"]
        assert features.dtype == torch.float32
        assert features.shape == (len(tokens), 4)
        for vector, token in zip(features.numpy(), tokens, strict=True):
            assert np.array_equal(vector, rows[token])
        assert not block[len(tokens) :].any()


class TestTokens:
    @given(samples=st.lists(st.lists(st.sampled_from(TOKENS), max_size=25), min_size=1, max_size=6))
    def test_in_any_order_and_number(self, gappy, samples):
        movie, rows = gappy
        dataset = CachedFeatureDataset(Chosen(samples), [movie], on_miss="error")
        check_rows(dataset.__getitems__(range(len(samples))), samples, rows)

    @given(data=st.data())
    def test_of_whole_frames(self, gappy, data):
        movie, rows = gappy
        bounds = st.tuples(st.integers(0, 6), st.integers(0, 6)).map(sorted)
        windows = data.draw(st.lists(bounds, min_size=1, max_size=6))
        samples = [[token for token in TOKENS if a <= token[0] < b] for a, b in windows]
        dataset = CachedFeatureDataset(Chosen(samples), [movie], on_miss="error")
        check_rows(dataset.__getitems__(range(len(samples))), samples, rows)

    def test_none_at_all(self, gappy):
        dataset = CachedFeatureDataset(Chosen([[], [], [(0, 3)]]), [gappy[0]])
        assert_equal(
            collate(dataset.__getitems__([0, 1])),
            collate_sequence_padding([dataset[0], dataset[1]]),
        )
        assert list(dataset.__getitems__([])) == []

    def test_many_in_one_frame(self, cache):
        """Features are copied in pieces: here more than one a sample."""
        mask = np.arange(1, 401, dtype=np.int32).reshape(1, 20, 20)
        movie = cache.movie(np.ones((1, 20, 20)) * mask, mask, FakeBackbone(dim=256, stride=4))
        samples = [[(0, n) for n in range(1, 401)], [(0, n) for n in range(7, 200, 3)]]
        dataset = CachedFeatureDataset(Chosen(samples), [movie], progress=False)
        expected = collate_sequence_padding([dataset[0], dataset[1]])
        assert_equal(collate(dataset.__getitems__([0, 1])), expected)
        [record] = movie.get_or_compute()
        assert np.array_equal(expected["pretrained_feats"][0], record.features.astype(np.float32))

    @pytest.mark.parametrize("token", [(1, 5), (2, 3), (3, 9), (0, 2000), (0, -1)])
    def test_unknown_labels(self, gappy, token):
        t, label = token
        dataset = CachedFeatureDataset(Chosen([[(0, 3)], [(0, 4), token]]), [gappy[0]])
        with pytest.raises(FrameError, match=f"label {label} is not in the mask of frame {t} of"):
            dataset.__getitems__([0, 1])

    @pytest.mark.parametrize(
        ("tokens", "wrong"),
        [
            ([(0, 1), (1, 2), (1, 3)], "label 2 is not in the mask of frame 1"),
            (
                [(0, 1), (0, (1 << 32) + 3), (1, 3)],
                f"label {(1 << 32) + 3} is not in the mask of frame 0",
            ),
            (
                [(0, 1), (0, 2), (1, 2 - (1 << 32))],
                f"label {2 - (1 << 32)} is not in the mask of frame 1",
            ),
        ],
        ids=["of the frame before", "beyond 32 bits", "below them"],
    )
    def test_labels_of_another_frame_are_no_match(self, cache, tokens, wrong):
        masks = np.zeros((2, 16, 16), int)
        masks[0, :4, :4], masks[0, 8:, :4], masks[1, :4, 8:] = 1, 2, 3
        frames = np.random.default_rng(0).random((2, 16, 16))
        movie = cache.movie(frames, masks, FakeBackbone(dim=3))
        movie.warm()
        right = [(0, 1), (0, 2), (1, 3)]
        dataset = CachedFeatureDataset(Chosen([right, tokens]), [movie], on_miss="error")
        assert dataset[0]["pretrained_feats"].shape == (3, 3)
        with pytest.raises(FrameError, match=wrong):
            dataset[1]


class TestCollate:
    @pytest.fixture
    def batch(self, gappy):
        return CachedFeatureDataset(Chosen([TOKENS[:9], TOKENS, TOKENS[3:7]]), [gappy[0]])

    def test_takes_the_tensor_as_it_is(self, batch):
        samples = batch.__getitems__([0, 1, 2])
        features = collate(samples)["pretrained_feats"]
        assert features is samples.features
        for sample, rows in zip(samples, features, strict=True):
            assert sample["pretrained_feats"].data_ptr() == rows.data_ptr()

    def test_samples_share_no_memory(self, batch):
        samples = batch.__getitems__([1, 1, 0, 2])
        before = [sample["pretrained_feats"].clone() for sample in samples]
        for i, sample in enumerate(samples):
            sample["pretrained_feats"].fill_(-7)
            after = [s["pretrained_feats"] for s in samples[i + 1 :]]
            assert all(map(torch.equal, after, before[i + 1 :]))
        collated = collate(samples)
        assert_equal(collated, collate_sequence_padding(samples))
        assert (collated["pretrained_feats"][~collated["padding_mask"]] == -7).all()
        assert not collated["pretrained_feats"][collated["padding_mask"]].any()
        again = batch.__getitems__([1])[0]["pretrained_feats"]
        assert torch.equal(again, before[0])

    def test_padding_is_zero_whatever_was_in_memory(self, batch, monkeypatch):
        monkeypatch.setattr(torch, "empty", lambda *shape: torch.full(shape, torch.nan))
        features = batch.__getitems__([0, 1, 2]).features
        for i, length in enumerate((9, len(TOKENS), 4)):
            assert torch.isfinite(features[i, :length]).all()
            assert not features[i, length:].any()

    @pytest.mark.parametrize(
        "change",
        [
            lambda samples: samples.reverse(),
            lambda samples: samples.pop(),
            lambda samples: samples.append(samples[0]),
            lambda samples: samples[1].update(pretrained_feats=samples[1]["pretrained_feats"] * 2),
            lambda samples: samples.__setitem__(
                1, {name: value[:5] for name, value in samples[1].items()}
            ),
            lambda samples: [sample.pop("pretrained_feats") for sample in samples],
        ],
    )
    def test_samples_that_were_changed_are_collated_as_they_are(self, batch, change):
        samples = batch.__getitems__([0, 1, 2])
        change(samples)
        assert_equal(collate(samples), collate_sequence_padding(list(samples)))

    def test_any_other_samples(self, batch):
        samples = [batch[0], batch[2]]
        assert_equal(collate(samples), collate_sequence_padding(samples))

    def test_a_pickled_batch(self, batch):
        samples = pickle.loads(pickle.dumps(batch.__getitems__([0, 1])))
        assert_equal(collate(samples), collate_sequence_padding([batch[0], batch[1]]))
