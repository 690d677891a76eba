"""Augmented copies: the same everywhere, right in pixels, and geometry that agrees."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from skimage.measure import regionprops
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from feature_cache import Augmentations, CachedFeatureDataset, Draw, FeatureCache, Normalization
from feature_cache.augment import Affine, Elastic, Scale, hflip, quarter_turn
from feature_cache.dataset import choose_copy
from feature_cache.errors import FrameError
from feature_cache.normalize import normalize
from feature_cache.pooling import pool
from feature_cache.testing import FakeBackbone
from feature_cache.token_geometry import Placed, map_tokens, rotate_features
from forked_processes import fork_server, start_fork_server
from synthetic import make_movie


def turn(image, element):
    """Do a flip or quarter turn in plain NumPy."""
    by_hand = {
        "flip_horizontal": np.fliplr,
        "flip_vertical": np.flipud,
        "rotate_90": np.rot90,
        "rotate_180": lambda a: np.rot90(a, 2),
        "rotate_270": lambda a: np.rot90(a, 3),
        "transpose": np.transpose,
        "transverse": lambda a: np.rot90(a, 2).T,
    }
    return by_hand[element](image)


def blur(image, kernel, sigma):
    """Blur with a sampled Gaussian, edges mirrored, in float64."""
    reach = kernel // 2
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights /= weights.sum()
    padded = np.pad(image.astype(np.float64), reach, mode="reflect")
    rows = sum(w * padded[i : i + len(image)] for i, w in enumerate(weights))
    return sum(w * rows[:, i : i + image.shape[1]] for i, w in enumerate(weights))


def resize(image, factor, mode):
    size = [max(1, int(np.floor(n * factor + 0.5))) for n in image.shape]
    tensor = torch.from_numpy(np.ascontiguousarray(image, np.float32))[None, None]
    return torch.nn.functional.interpolate(tensor, size=size, mode=mode)[0, 0].numpy()


def apply_by_hand(operation, image, mask):
    """Apply one operation, as JSON, to a frame and its mask, with none of our code."""
    match operation["name"]:
        case "d4":
            return turn(image, operation["element"]), turn(mask, operation["element"])
        case "scale":
            factor = operation["factor"]
            return resize(image, factor, "bilinear"), resize(mask, factor, "nearest-exact")
        case "brightness":
            return np.clip(image * operation["factor"], 0, 1), mask
        case "contrast":
            mean = image.mean(dtype=np.float64)
            return np.clip(mean + operation["factor"] * (image - mean), 0, 1), mask
        case "blur":
            return blur(image, operation["kernel"], operation["sigma"]), mask
    raise AssertionError(operation)


def pool_by_hand(frame, mask, draw, backbone):
    image = normalize(frame.astype(np.float32), Normalization()).astype(np.float64)
    drawn = mask
    for operation in draw.to_json():
        image, drawn = apply_by_hand(operation, image, drawn)
    grid = backbone.embed(torch.from_numpy(image.astype(np.float32))[None])[0].numpy()
    return np.unique(mask[mask > 0]), grid, drawn.astype(np.int32)


@pytest.mark.parametrize("policy", ["flips", "geometric", "default"])
def test_features_of_a_copy_are_those_made_by_hand(cache, small, policy):
    backbone = FakeBackbone(dim=6)
    augmentations = Augmentations(policy, copies=12, seed=3)
    names = set()
    for draw in augmentations.draws():
        names |= {operation["name"] for operation in draw.to_json()}
        records = cache.get_or_compute(*small, backbone, draw=draw, dtype="float32")
        for frame, mask, record in zip(*small, records, strict=True):
            labels, grid, drawn = pool_by_hand(frame, mask, draw, backbone)
            expected = pool(grid, drawn, "mean_patches_exact")
            assert record.labels.tolist() == labels.tolist()
            assert np.abs(record.features - expected).max() <= 1e-6
    assert names >= {"flips": {"d4"}, "geometric": {"d4", "scale"}}.get(
        policy, {"d4", "scale", "brightness", "contrast", "blur"}
    )


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_label_has_its_row_however_small(cache, size):
    """Objects that shrink to nothing take the cell under their mapped centroid."""
    frame, _, _ = make_movie(frames=1, height=64, width=64)
    mask = np.zeros((1, 64, 64), int)
    for i in range(25):
        y, x = divmod(i, 5)
        mask[0, 3 + 12 * y : 3 + 12 * y + size, 5 + 12 * x : 5 + 12 * x + size] = i + 1
    backbone = FakeBackbone(dim=5)
    for factor in (0.8, 0.3, 0.11):
        draw = Draw.of(quarter_turn(1), Scale(factor))
        [record] = cache.get_or_compute(frame, mask, backbone, draw=draw, dtype="float32")
        assert record.labels.tolist() == list(range(1, 26))
        assert np.isfinite(record.features).all()
        assert (np.linalg.norm(record.features, axis=1) > 0.1).all()
    lost = set(range(1, 26)) - set(np.unique(draw.apply_mask(mask[0])).tolist())
    assert lost
    image = torch.from_numpy(normalize(frame[0].astype(np.float32), Normalization()))[None]
    grid = backbone.embed(draw.apply(image))[0].numpy()
    unit = grid / np.linalg.norm(grid, axis=-1, keepdims=True)
    height, width = draw.output_shape((64, 64))
    for label in lost:
        centre = np.argwhere(mask[0] == label).mean(axis=0)[None]
        [(y, x)] = draw.map_points(centre, (64, 64))
        row, column = int(y * grid.shape[0] / height), int(x * grid.shape[1] / width)
        np.testing.assert_allclose(record.features[label - 1], unit[row, column], atol=1e-6)


def test_equal_draws_share_their_records(cache, small):
    backbone = FakeBackbone()
    draws = [
        Draw.of(hflip(), quarter_turn(2)),
        Draw.from_json([{"name": "d4", "element": "flip_vertical"}]),
    ]
    for draw in draws:
        cache.get_or_compute(*small, backbone, draw=draw)
    assert cache.stats()["computed"] == 6
    for draw in Augmentations("flips", copies=20, seed=0).draws():
        cache.get_or_compute(*small, backbone, draw=draw)
    assert cache.stats()["records"] == 6 * 4


def test_noise_depends_on_the_frame_and_not_on_the_batch(cache, tmp_path, small):
    draw = Augmentations("intensity", copies=1, seed=0).draw(1)
    one = cache.get_or_compute(*small, FakeBackbone(), draw=draw, batch_size=1)
    other = FeatureCache(tmp_path / "other").get_or_compute(
        small[0][::-1], small[1][::-1], FakeBackbone(), draw=draw, batch_size=5
    )
    for a, b in zip(one, other[::-1], strict=True):
        assert np.array_equal(a.features, b.features)


def test_more_copies_compute_only_those(cache, small):
    movie = cache.movie(*small, FakeBackbone())
    counts = []
    for copies in (8, 15):
        augmentations = Augmentations("default", copies=copies, seed=0)
        dataset = CachedFeatureDataset(Tokens(small[1]), [movie], augmentations=augmentations)
        counts.append(dataset.warm())
    assert counts == [9 * 6, 7 * 6]


def compute_copies(root, small, policy, seed):
    cache = FeatureCache(root)
    for draw in Augmentations(policy, copies=6, seed=seed).draws():
        cache.get_or_compute(*small, FakeBackbone(seconds_per_frame=0.001), draw=draw)


@pytest.mark.parametrize("policy", [pytest.param("flips", marks=pytest.mark.slow), "default"])
def test_two_runs_with_two_seeds_share_the_right_records_only(tmp_path, small, policy):
    shared = tmp_path / "shared"
    FeatureCache(shared)
    start_fork_server()
    runs = [
        fork_server.Process(target=compute_copies, args=(shared, small, policy, seed))
        for seed in (1, 2)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join(300)
    assert [run.exitcode for run in runs] == [0, 0]
    backbone = FakeBackbone()
    draws = [Augmentations(policy, copies=6, seed=seed).draws() for seed in (1, 2)]
    cache, alone = FeatureCache(shared), FeatureCache(tmp_path / "alone")
    for draw in (*draws[0], *draws[1]):
        ours = cache.get(*small, backbone, draw=draw)
        theirs = alone.get_or_compute(*small, backbone, draw=draw)
        for a, b in zip(ours, theirs, strict=True):
            assert np.array_equal(a.features, b.features)
    different = {str(draw.to_json()) for seed in draws for draw in seed}
    assert cache.stats()["records"] == 6 * len(different)
    assert len(different) < 14


class Tokens(Dataset):
    """Every token of one frame a sample, and the sample's own number."""

    def __init__(self, masks):
        self.labels = [
            torch.from_numpy(np.unique(mask[mask > 0]).astype(np.int64)) for mask in masks
        ]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        times = torch.full((len(self.labels[index]),), index)
        return {"index": index, "timepoints": times, "labels": self.labels[index]}


@pytest.fixture
def copied(cache, small):
    """A dataset with three warm copies."""
    augmentations = Augmentations("default", copies=3, seed=11)
    dataset = CachedFeatureDataset(
        Tokens(small[1]), [cache.movie(*small, FakeBackbone())], augmentations=augmentations
    )
    dataset.warm()
    return dataset


class TestWhichCopy:
    @pytest.mark.parametrize(
        ("workers", "method", "persistent"),
        [
            (0, None, False),
            (1, "fork", True),
            (2, "fork", False),
            pytest.param(2, "spawn", True, marks=pytest.mark.slow),
        ],
    )
    def test_is_what_the_seed_says(self, copied, workers, method, persistent):
        loader = DataLoader(
            copied,
            batch_size=None,
            num_workers=workers,
            multiprocessing_context=method,
            persistent_workers=persistent,
        )
        for epoch in range(3):
            copied.set_epoch(epoch)
            seen = [(sample["index"], sample["copy"]) for sample in loader]
            assert seen == [(i, choose_copy(11, epoch, i, 3)) for i in range(6)]

    def test_is_the_same_for_any_number_of_ranks(self, copied):
        for epoch in range(2):
            copied.set_epoch(epoch)
            seen = {}
            for rank in range(2):
                sampler = DistributedSampler(copied, num_replicas=2, rank=rank, seed=4)
                sampler.set_epoch(epoch)
                loader = DataLoader(copied, batch_size=None, sampler=sampler, num_workers=1)
                seen.update((sample["index"], sample["copy"]) for sample in loader)
            assert seen == {i: choose_copy(11, epoch, i, 3) for i in range(6)}

    def test_all_copies_come_equally_often(self):
        chosen = [choose_copy(0, epoch, i, 3) for epoch in range(50) for i in range(40)]
        counts = np.bincount(chosen, minlength=4)
        assert counts.min() > 400
        assert counts.sum() == 2000

    @pytest.mark.parametrize("begun", [True, False])
    @pytest.mark.parametrize(
        ("workers", "method", "persistent"),
        [
            (0, None, False),
            (2, "fork", True),
            pytest.param(2, "fork", False, marks=pytest.mark.slow),
            pytest.param(2, "spawn", True, marks=pytest.mark.slow),
        ],
    )
    def test_is_another_each_time_that_a_sample_comes(
        self, copied, workers, method, persistent, begun
    ):
        """A plain DataLoader that draws with replacement: each sample 80 times an epoch."""
        loader = DataLoader(
            copied,
            batch_size=24,
            collate_fn=list,
            sampler=RandomSampler(copied, replacement=True, num_samples=480),
            num_workers=workers,
            multiprocessing_context=method,
            persistent_workers=persistent,
        )
        epochs = []
        for epoch in range(2):
            if begun:
                copied.set_epoch(epoch)
            drawn = [(s["index"], s["copy"]) for batch in loader for s in batch]
            counts = np.zeros((6, 4))
            np.add.at(counts, tuple(np.transpose(drawn)), 1)
            assert (chisquare(counts, axis=1).pvalue > 1e-5).all(), counts
            epochs.append(counts)
        assert (epochs[0] != epochs[1]).any()

    def test_begins_anew_with_each_epoch(self, copied):
        def read(dataset):
            dataset.set_epoch(1)
            return [dataset[i]["copy"] for i in [0, 3, 0, 0, 5, 0, 3, 0] * 3]

        other = copy.deepcopy(copied)
        assert read(copied) == read(copied) == read(other)

    def test_comes_from_torchs_generator_before_the_first_epoch(self, copied):
        def copies(seed):
            torch.manual_seed(seed)
            return [copied[i]["copy"] for i in range(6)] + [copied[i]["copy"] for i in range(6)]

        assert copies(1) == copies(1)
        assert len({tuple(copies(seed)) for seed in range(10)}) > 5

    def test_features_are_those_of_the_copy(self, copied, cache, small):
        draws = Augmentations("default", copies=3, seed=11).draws()
        for epoch in range(4):
            copied.set_epoch(epoch)
            for sample in copied:
                records = cache.get(*small, FakeBackbone(), draw=draws[sample["copy"]])
                expected = records[sample["index"]].features.astype(np.float32)
                assert np.array_equal(sample["pretrained_feats"], expected)

    def test_no_augmentations_is_copy_0_and_says_nothing_of_it(self, cache, small):
        dataset = CachedFeatureDataset(Tokens(small[1]), [cache.movie(*small, FakeBackbone())])
        dataset.set_epoch(3)
        assert "copy" not in dataset[0]

    def test_a_negative_epoch_is_an_error(self, copied):
        with pytest.raises(ValueError, match="epoch -1"):
            copied.set_epoch(-1)


def shallow_of(mask):
    """Measure regions by scikit-image: coords (N, 3) and the columns of regionprops2."""
    regions = regionprops(mask)
    coords = [(0.0, *region.centroid) for region in regions]
    values = [(r.equivalent_diameter_area, 0.5, *r.inertia_tensor.ravel(), 0.25) for r in regions]
    return torch.tensor(coords), torch.tensor(values, dtype=torch.float32)


COLUMNS = ("equivalent_diameter_area", "intensity_mean", *["inertia_tensor"] * 4, "border_dist")


class TestGeometry:
    @pytest.mark.parametrize(
        "draw",
        [
            *(d for d in Augmentations("default", copies=6, seed=1).draws() if not d.is_identity),
            Draw.of(Affine(degrees=12, shear_degrees=8, scale=0.9)),
            Draw.of(Elastic(amplitude=6, smoothing=80, seed=3)),
        ],
        ids=lambda draw: "-".join(op["name"] for op in draw.to_json()),
    )
    def test_agrees_with_regionprops_of_the_drawn_mask(self, hela, draw):
        """On HeLa: centroids within a pixel, diameters within 5 %, inertia within 15 %."""
        mask = hela[1][5].astype(np.int32)
        drawn = draw.apply_mask(mask)
        kept = _whole_cells(mask, drawn, draw)
        assert len(kept) > 80
        coords, shallow = shallow_of(np.where(np.isin(mask, kept), mask, 0))
        found, measured = shallow_of(np.where(np.isin(drawn, kept), drawn, 0))
        [(mapped, after)] = map_tokens([Placed(coords, shallow, draw, mask.shape)], COLUMNS)
        assert (mapped - found).abs().max() < 1
        assert torch.equal(after[:, [1, 6]], shallow[:, [1, 6]])
        assert ((after[:, 0] - measured[:, 0]).abs() / measured[:, 0]).max() < 0.05
        inertia = (after[:, 2:6] - measured[:, 2:6]).norm(dim=1) / measured[:, 2:6].norm(dim=1)
        assert inertia.max() < 0.15

    def test_of_flips_and_turns_is_exact(self, hela):
        mask = hela[1][0].astype(np.int32)
        for draw in Augmentations("flips", copies=8, seed=0).draws():
            coords, shallow = shallow_of(mask)
            found, measured = shallow_of(draw.apply_mask(mask))
            [(mapped, after)] = map_tokens([Placed(coords, shallow, draw, mask.shape)], COLUMNS)
            assert (mapped - found).abs().max() < 1e-3
            torch.testing.assert_close(after, measured, rtol=1e-4, atol=1e-4)

    def test_areas_and_stacks(self):
        draw = Draw.of(Scale(0.5))
        coords = torch.tensor([[0.0, 3, 10, 20]])
        moments = np.diag([1.0, 4.0, 9.0])
        inertia = np.trace(moments) * np.eye(3) - moments
        features = torch.tensor([[80.0, *inertia.ravel()]], dtype=torch.float32)
        columns = ("area", *["inertia_tensor"] * 9)
        [(moved, [after])] = map_tokens([Placed(coords, features, draw, (100, 100))], columns)
        smaller = np.diag([1.0, 1.0, 2.25])
        expected = [20.0, *(np.trace(smaller) * np.eye(3) - smaller).ravel()]
        assert after.tolist() == pytest.approx(expected, abs=1e-5)
        assert moved[0].tolist() == [0, 3, 4.75, 9.75]

    def test_no_tokens(self):
        for draw in (Draw.of(hflip()), Draw.of(Elastic(1, 20))):
            none = Placed(torch.zeros(0, 3), torch.zeros(0, 7), draw, (10, 10))
            for coords, shallow in map_tokens([none, none], COLUMNS):
                assert (coords.shape, shallow.shape) == ((0, 3), (0, 7))
        assert map_tokens([], COLUMNS) == []

    def test_several_samples_at_once_are_to_the_bit_as_each_alone(self):
        rng, shape = np.random.default_rng(0), (90, 70)
        draws = Augmentations("default", copies=12, seed=4).draws()
        draws += (Draw.of(Elastic(amplitude=2, smoothing=20, seed=1), Affine(degrees=7)),)
        samples = [
            Placed(
                torch.tensor(rng.uniform(-9, 99, (n, 3)), dtype=torch.float32),
                torch.tensor(rng.uniform(0, 99, (n, 7)), dtype=torch.float32),
                draw,
                shape,
            )
            for draw, n in zip(draws, rng.integers(0, 40, len(draws)), strict=True)
        ]
        before = [(one.coords.clone(), one.features.clone()) for one in samples]
        together = map_tokens(samples, COLUMNS)
        for one, mapped, kept in zip(samples, together, before, strict=True):
            [alone] = map_tokens([one], COLUMNS)
            assert all(map(torch.equal, mapped, alone))
            assert all(map(torch.equal, kept, (one.coords, one.features)))
            points = one.draw.map_points(one.coords[:, 1:].numpy(), shape)
            np.testing.assert_allclose(mapped[0][:, 1:], points, rtol=1e-6, atol=1e-4)
            assert torch.equal(mapped[0][:, 0], one.coords[:, 0])

    def test_places_that_are_no_numbers(self):
        coords = torch.tensor([[0.0, 1.0, torch.nan]])
        for draw in (Draw.of(hflip()), Draw.of(Elastic(1, 20))):
            with pytest.raises(FrameError, match="no finite numbers"):
                map_tokens([Placed(coords, torch.zeros(1, 7), draw, (10, 10))], COLUMNS)


def _whole_cells(mask, drawn, draw):
    """Choose the labels of cells of 100 pixels or more that stay inside the frame."""
    inside = np.zeros_like(drawn, bool)
    inside[2:-2, 2:-2] = True
    outer = set(np.unique(drawn[~inside]).tolist())
    edge = set(np.unique(np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])).tolist())
    return [
        region.label
        for region in regionprops(mask)
        if region.area >= 100 and region.label not in outer | edge and region.label in drawn
    ]


class TestRotateFeatures:
    SHAPE = (200, 300)

    def test_turns_each_pair_by_y_or_x(self):
        rng = np.random.default_rng(0)
        features = torch.from_numpy(rng.normal(size=(5, 9))).float()
        coords = torch.from_numpy(rng.random((5, 3)) * 200).float()
        rotated = rotate_features(features, coords, self.SHAPE)
        for i in range(5):
            for pair in range(4):
                axis = pair % 2
                angle = 2 * np.pi * float(coords[i, 1 + axis]) / self.SHAPE[axis]
                vector = features[i, 2 * pair : 2 * pair + 2].numpy()
                turned = vector @ [[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]
                np.testing.assert_allclose(rotated[i, 2 * pair : 2 * pair + 2], turned, atol=1e-5)
        assert torch.equal(rotated[:, 8], features[:, 8])

    def test_keeps_lengths_and_its_input(self):
        features, coords = torch.ones(3, 8), torch.rand(3, 3) * 100
        rotated = rotate_features(features, coords, self.SHAPE)
        torch.testing.assert_close(rotated.norm(dim=1), features.norm(dim=1))
        assert torch.equal(features, torch.ones(3, 8))

    @pytest.mark.parametrize("axis", [1, 2])
    def test_both_coordinates_matter(self, axis):
        features, coords = torch.ones(1, 8), torch.full((1, 3), 10.0)
        moved = coords.clone()
        moved[0, axis] += 25
        one, other = (rotate_features(features, c, self.SHAPE) for c in (coords, moved))
        assert (one - other).abs().max() > 0.1
