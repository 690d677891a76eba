"""Trackastra's real inference, on cached features."""

from __future__ import annotations

import sys
import threading
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import dask.array as da
import networkx as nx
import numpy as np
import pytest
import torch
import yaml
from joblib import parallel_config
from tqdm import tqdm
from trackastra.data import CTCData, get_features
from trackastra.model import Trackastra, TrackingTransformer, model_api
from trackastra_pretrained_feats import TrackingTransformerwPretrainedFeats

from feature_cache import (
    BackboneError,
    FeatureCache,
    FrameError,
    MissingDependencyError,
    MissingRecordError,
    MovieError,
    UnknownNameError,
    load_backbone,
)
from feature_cache.normalize import normalize
from feature_cache.pooling import pool
from feature_cache.spec import KEY_VERSION, Normalization, SpaceSpec
from feature_cache.testing import FakeBackbone
from feature_cache.token_geometry import rotate_features
from feature_cache.trackastra import (
    CachedFeatureExtractor,
    ModelFeatures,
    cached_inference,
    inference,
    wrap,
)
from feature_cache.trackastra import run as command
from feature_cache.trackastra.shallow import columns_of
from synthetic import make_movie

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`RegionProperties.mean_intensity`:FutureWarning"),
    pytest.mark.filterwarnings("ignore::scipy.sparse.SparseEfficiencyWarning"),
    # Most models here are as older trainings left them; TestFolders has the others.
    pytest.mark.filterwarnings("ignore:the model's folder does not name its features:UserWarning"),
]

WIDTH = 6
TRAIN_ARGS = {
    "features": "pretrained_feats",
    "pretrained_feats_model": "facebook/dinov2-small",
    "pretrained_feats_mode": "mean_patches_exact",
    "pretrained_feats_additional_props": "regionprops2",
}


@pytest.fixture
def make_model(tmp_path, monkeypatch):
    """Write the folder of a small model with random weights, and load it as users do."""
    monkeypatch.chdir(tmp_path)  # where upstream's extractor makes a folder

    def make(*, coord_dim=2, width=WIDTH, named=None, **train_args) -> Trackastra:
        args = {**TRAIN_ARGS, **train_args}
        columns = columns_of(args["pretrained_feats_additional_props"], coord_dim)
        sizes = {
            "coord_dim": coord_dim, "feat_dim": len(columns),
            "d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1,
            "pos_embed_per_dim": 4, "window": 3, "attn_positional_bias_n_spatial": 4,
            "causal_norm": "softmax",
        }  # fmt: skip
        widths = {"pretrained_feat_dim": width, "reduced_pretrained_feat_dim": 8}
        torch.manual_seed(1)
        if args["features"] == "wrfeat":
            model = TrackingTransformer(**sizes)
        else:
            model = TrackingTransformerwPretrainedFeats(**sizes, **widths)
        with torch.no_grad():  # sharper, so that some links are above the tracker's threshold
            for parameter in (*model.head_x.parameters(), *model.head_y.parameters()):
                parameter.mul_(4)
        folder = tmp_path / "model"
        with warnings.catch_warnings(action="ignore", category=ResourceWarning):  # open files
            model.save(folder)
            (folder / "train_config.yaml").write_text(yaml.safe_dump(args))
            if named is not None:
                named.write(folder)
            return Trackastra.from_folder(folder, device="cpu")

    return make


class Counting(FakeBackbone):
    """A backbone that counts the frames it embeds."""

    def __init__(self, **options) -> None:
        super().__init__(dim=WIDTH, **options)
        self.frames = 0

    def embed(self, frames):
        self.frames += len(frames)
        return super().embed(frames)


def link(model, frames, masks, **options):
    """Track; give the graph of links."""
    return model.track(frames, masks, **{"mode": "greedy", **options})[0]


def rows_by_hand(frames, masks, backbone):
    """Embed and pool frames straight from arrays: a dict from labels to vectors for each frame."""
    rows = []
    for frame, mask in zip(frames, masks, strict=True):
        pixels = normalize(frame.astype(np.float32), Normalization())
        grid = backbone.embed(torch.from_numpy(pixels)[None])[0].numpy()
        vectors = pool(grid, mask, "mean_patches_exact").astype(np.float16).astype(np.float32)
        labels = np.unique(mask[mask > 0]).tolist()
        rows.append(dict(zip(labels, vectors, strict=True)))
    return rows


@pytest.fixture
def upstream_given(monkeypatch):
    """Have Trackastra's own inference find given features in its extractor's place."""

    def give(rows, additional_features, *, rotated_in=None):
        def extract(masks, timepoints, labels, coords):
            tokens = zip(timepoints.tolist(), labels.tolist(), strict=True)
            vectors = torch.tensor(np.array([rows[t][label] for t, label in tokens]))
            if rotated_in is not None:
                vectors = rotate_features(vectors, torch.from_numpy(coords), rotated_in)
            return None, vectors

        extractor = SimpleNamespace(
            precompute_image_embeddings=lambda images: None,
            extract_embedding=extract,
            additional_features=additional_features,
        )
        chosen = SimpleNamespace(from_model_name=lambda *args, **kwargs: extractor)
        monkeypatch.setattr(model_api, "FeatureExtractor", chosen)

    return give


class TestGraph:
    @pytest.mark.parametrize(
        ("props", "rotated"),
        [("regionprops_small", False), ("regionprops", True), ("regionprops2", False)],
    )
    def test_is_upstreams_for_the_same_features(
        self, make_model, small, cache, upstream_given, props, rotated
    ):
        frames, masks = small
        model = make_model(pretrained_feats_additional_props=props, rotate_features=rotated)
        rows = rows_by_hand(frames, masks, FakeBackbone(dim=WIDTH))
        upstream_given(rows, props, rotated_in=(48, 64) if rotated else None)
        expected, expected_masks = model.track(frames, masks, mode="greedy", batch_size=2)
        upstream_given([], None)
        with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
            graph, tracked = model.track(frames, masks, mode="greedy", batch_size=2)
        assert expected.number_of_edges() > 3
        assert nx.utils.graphs_equal(graph, expected)
        assert np.array_equal(tracked, expected_masks)

    def test_differs_for_other_features(self, make_model, small, tmp_path):
        model, graphs = make_model(), []
        for seed in (0, 1):
            with cached_inference(tmp_path / "cache", backbone=FakeBackbone(WIDTH, seed=seed)):
                graphs.append(link(model, *small))
        assert not nx.utils.graphs_equal(*graphs)

    def test_without_additional_features(self, make_model, small, cache, upstream_given):
        model = make_model(pretrained_feats_additional_props=None)
        upstream_given(rows_by_hand(*small, FakeBackbone(dim=WIDTH)), None)
        with pytest.raises(TypeError):  # of upstream's own: it makes a tensor of None
            link(model, *small)
        graphs = []
        for batch_size in (1, 3, 4):  # of four windows: one, two or no batches of a single one
            with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
                graphs.append(link(model, *small, batch_size=batch_size))
        assert graphs[0].number_of_edges() > 3
        assert set(graphs[1].edges) == set(graphs[2].edges) == set(graphs[0].edges)

    @pytest.mark.parametrize("props", [None, "regionprops2"])
    def test_has_a_node_for_each_region_of_frames_without_or_with_one_cell(
        self, make_model, cache, props
    ):
        frames, masks, _ = make_movie(frames=8)
        masks[:2], masks[5] = 0, 0
        masks[2][masks[2] != 3] = 0
        masks[6:][masks[6:] != 3] = 0
        model = make_model(pretrained_feats_additional_props=props)
        with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
            graph = link(model, frames, masks, batch_size=1)
            nodes = predict(model, frames, masks)["nodes"]
        expected = [(t, label) for t in range(8) for label in np.unique(masks[t]) if label]
        assert [(node["time"], node["label"]) for node in nodes] == expected
        assert set(graph) <= set(range(len(expected)))

    @pytest.mark.parametrize("props", [None, "regionprops2"])
    def test_a_window_of_one_region(self, make_model, small, cache, props):
        frames, masks = (array[:2] for array in small)
        masks = np.where(masks == 2, masks, 0)
        masks[1] = 0
        model = make_model(pretrained_feats_additional_props=props)
        with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
            assert len(predict(model, frames, masks)["nodes"]) == 1

    def test_a_movie_without_cells_has_no_links(self, make_model, small, cache):
        with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
            assert len(link(make_model(), small[0], small[1] * 0)) == 0

    @pytest.mark.parametrize("mode", ["greedy_nodiv", "ilp"])
    def test_other_linking_modes(self, make_model, small, cache, upstream_given, mode):
        model = make_model()
        upstream_given(rows_by_hand(*small, FakeBackbone(dim=WIDTH)), "regionprops2")
        expected = link(model, *small, mode=mode)
        with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
            graph = link(model, *small, mode=mode)
        assert set(graph.edges) == set(expected.edges)
        assert graph.number_of_edges() > 3


def predict(model, frames, masks):
    """Run all of `track` up to the links."""
    predictions = []
    model._track_from_predictions = lambda found, **_: predictions.append(found) or nx.DiGraph()
    try:
        model.track(frames, masks)
    finally:
        del model._track_from_predictions
    return predictions[0]


def test_a_model_takes_batches_of_one_window_and_windows_of_one_region(make_model):
    transformer = make_model(pretrained_feats_additional_props=None).transformer.eval()
    generator = torch.Generator().manual_seed(0)
    coords = torch.rand((3, 5, 3), generator=generator) * 20
    features = torch.rand((3, 5, WIDTH), generator=generator)
    with torch.no_grad():
        batch = transformer(coords, None, features)
        rest = torch.arange(5).expand(3, 5) > 0
        padded = transformer(coords, None, features, padding_mask=rest)[:, :1, :1]
        for leading in (features, features[None]):
            with inference.whole_batches(transformer):
                one = transformer(coords[:1], None, leading[..., :1, :, :])
                single = transformer(coords[:, :1], None, leading[..., :1, :])
            torch.testing.assert_close(one, batch[:1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(single, padded, rtol=1e-4, atol=1e-4)
    assert type(one) is torch.Tensor
    assert not transformer.ptfeat_norm._forward_hooks


class TestWhatIsComputed:
    def test_a_movie_once(self, make_model, small, cache):
        backbone = Counting()
        with cached_inference(cache, backbone=backbone):
            first = link(make_model(), *small)
            assert backbone.frames == 6
            link(make_model(), *small, mode="greedy_nodiv")
        with cached_inference(cache.store.root, backbone=backbone, progress=False) as again:
            assert nx.utils.graphs_equal(link(make_model(), *small, n_workers=2), first)
            assert again.stats()["computed"] == 0
        assert backbone.frames == 6

    def test_one_changed_frame_is_one_frame(self, make_model, small, cache):
        frames, masks = small
        backbone = Counting()
        with cached_inference(cache, backbone=backbone):
            link(make_model(), frames, masks)
            frames = frames.copy()
            frames[2] += 7
            link(make_model(), frames, masks)
        assert backbone.frames == 7

    @pytest.mark.parametrize(("keep_grids", "embedded"), [(True, 6), (False, 8)])
    def test_changed_masks_are_pooled_from_grids_or_their_frames_embedded(
        self, make_model, small, cache, keep_grids, embedded
    ):
        frames, masks = small
        changed = masks.copy()
        changed[1:3, 20:30, 30:40] = 9
        backbone = Counting()
        with cached_inference(cache, backbone=backbone, keep_grids=keep_grids):
            link(make_model(), frames, masks)
            link(make_model(), frames, changed)
        assert backbone.frames == embedded
        expected = rows_by_hand(frames, changed, FakeBackbone(dim=WIDTH))
        for record, rows in zip(cache.get(frames, changed, backbone), expected, strict=True):
            assert record.labels.tolist() == list(rows)
            assert np.array_equal(record.features, np.array(list(rows.values())))

    def test_nothing_of_a_movie_that_was_trained_on(self, make_model, small_folder, cache):
        root, backbone = small_folder(), Counting()
        with parallel_config(backend="sequential"):
            data = CTCData(str(root), window_size=4)
        assert wrap(data, cache, backbone).warm() == 6
        with cached_inference(cache, backbone=backbone):
            graph, _ = make_model().track_from_disk(root, Path(f"{root}_GT/TRA"), mode="greedy")
            link(make_model(coord_dim=3), *make_movie()[:2])
        assert graph.number_of_edges() > 3
        assert backbone.frames == 6

    @pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of models it loads
    def test_upstreams_own_command_embeds_a_movie_once(
        self, make_model, small_folder, tmp_path, monkeypatch, capsys
    ):
        root, weights = small_folder(), "random:3"
        backbone = load_backbone("efficientnet-lite0", weights)
        make_model(named=trained_on(backbone), width=backbone.spec.width)
        tables = []
        for name in ("first", "again"):
            words = [
                *("--cache", tmp_path / "cache", "--weights", weights, "trackastra", "track"),
                *("-i", root, "-m", f"{root}_GT/TRA", "--model-custom", tmp_path / "model"),
                *("--device", "cpu", "--output-edge-table", tmp_path / name),
            ]
            monkeypatch.setattr(sys, "argv", ["run", *map(str, words)])
            command.app(standalone_mode=False)
            tables.append((tmp_path / name).read_bytes())
            monkeypatch.setattr(type(backbone), "embed", pytest.fail)
        assert tables[0].count(b"\n") > 4
        assert tables[0] == tables[1]
        assert all(FeatureCache(tmp_path / "cache").contains(root, None, backbone))
        assert "asked nothing" not in capsys.readouterr().err

    def test_folders_are_paired_by_time_not_by_text(self, make_model, small_folder, cache):
        root = small_folder(frames=12)
        truth = Path(f"{root}_GT/TRA")
        expected = Counting()
        with cached_inference(cache, backbone=expected):
            make_model().track_from_disk(root, truth, mode="greedy")
        for t in range(12):
            (root / f"t{t:03}.tif").rename(root / f"t{t}.tif")
        again = Counting()
        with cached_inference(cache, backbone=again):
            make_model().track_from_disk(root, truth, mode="greedy")
            (root / "t3.tif").unlink()
            (truth / "man_track011.tif").unlink()
            with pytest.raises(MovieError, match=r"t4\.tif in .* would go with man_track003\.tif"):
                make_model().track_from_disk(root, truth, mode="greedy")
        assert (expected.frames, again.frames) == (12, 0)

    @pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.uint64])
    def test_nothing_for_the_same_labels_and_pixels_in_other_arrays(
        self, make_model, small, cache, dtype
    ):
        frames, masks = small
        backbone = Counting()
        with cached_inference(cache, backbone=backbone):
            expected = link(make_model(), frames, masks)
            graph = link(make_model(), frames.astype(np.float32), masks.astype(dtype))
            assert nx.utils.graphs_equal(graph, expected)
            chunks = (2, *frames.shape[1:])
            link(make_model(), da.from_array(frames, chunks), da.from_array(masks, chunks))
        assert backbone.frames == 6

    def test_nothing_where_the_cache_is_read_only(self, make_model, small, cache):
        backbone = Counting()
        cache.get_or_compute(*small, backbone)
        reading = FeatureCache(cache.store.root, mode="r")
        with cached_inference(reading, backbone=backbone):
            assert link(make_model(), *small).number_of_edges() > 3
            with pytest.raises(MissingRecordError, match="can only be read"):
                link(make_model(), small[0] + 1, small[1])
        assert backbone.frames == 6

    def test_the_backbone_of_the_training_is_loaded_once(
        self, make_model, small, cache, monkeypatch
    ):
        loaded = []

        def load(*args):
            loaded.append(args)
            return load_backbone(*args)

        monkeypatch.setattr(inference, "load_backbone", load)
        options = {"pretrained_feats_model": "efficientnet-lite0", "width": 112}
        with cached_inference(cache, weights="random:3"):
            assert not loaded
            link(make_model(**options), *small)
            link(make_model(**options), small[0] + 1, small[1])
        assert loaded == [("efficientnet-lite0", "random:3", "cpu")]
        backbone = load_backbone("efficientnet-lite0", "random:3")
        assert all(cache.contains(*small, backbone))
        with cached_inference(cache, backbone="debug/random"):
            link(make_model(width=128), *small)
        assert len(loaded) == 2

    @pytest.mark.slow
    def test_real_cells_and_weights(self, make_model, hela, cache):
        frames, masks = (array[:5, :256, :320] for array in hela)
        model = make_model(pretrained_feats_model="efficientnet-lite0", width=112)
        backbone = load_backbone("efficientnet-lite0", device="cpu")
        records = cache.get_or_compute(frames, masks, backbone)
        assert min(len(record.labels) for record in records) > 5
        with cached_inference(cache):
            graph = link(model, frames, masks)
        assert cache.stats()["computed"] == 5
        assert graph.number_of_edges() > 3


class TestFeatures:
    """What `CachedFeatureExtractor` gives to Trackastra."""

    @pytest.mark.parametrize(
        ("props", "rotated"),
        [
            (None, True),
            ("regionprops_small", False),
            ("regionprops", True),
            ("regionprops2", False),
        ],
    )
    def test_are_those_of_training(self, small_folder, cache, props, rotated):
        frames, masks, _ = make_movie()
        options = {"rotate_features": rotated}
        with parallel_config(backend="sequential"):
            data = CTCData(str(small_folder()), window_size=4)
        data = wrap(data, cache, FakeBackbone(dim=WIDTH), additional_props=props, **options)
        extractor = CachedFeatureExtractor(
            cache.movie(frames, masks, FakeBackbone(dim=WIDTH)),
            additional_features=props,
            **options,
        )
        regions = extractor.describe(masks, frames, ndim=2)
        sample = data[1]
        window = regions[1:5]
        for name in ("labels", "timepoints"):
            joined = np.concatenate([getattr(r, name) for r in window])
            assert np.array_equal(joined, sample[name])
        features = np.concatenate([r.pretrained_feats for r in window])
        assert np.array_equal(features, sample["pretrained_feats"])
        shallow = np.concatenate([r.features_stacked for r in window])
        assert shallow.shape == sample["features"].shape
        # Trackastra normalises each frame in training, and the whole movie here.
        same = ["intensity" not in name for name in columns_of(props, 2)]
        assert np.array_equal(shallow[:, same], sample["features"][:, same])

    def test_reach_upstreams_own_get_features(self, small, cache):
        frames, masks = small
        movie = cache.movie(frames, masks, FakeBackbone(dim=WIDTH))
        extractor = CachedFeatureExtractor(movie, additional_features="regionprops2")
        regions = get_features(
            masks, frames, "pretrained_feats", feature_extractor=extractor,
            progbar_class=partial(tqdm, disable=True),
        )  # fmt: skip
        ours = extractor.describe(masks, frames, ndim=2)
        for theirs, own in zip(regions, ours, strict=True):
            assert np.array_equal(theirs.pretrained_feats, own.pretrained_feats)
            assert np.array_equal(theirs.features_stacked, own.features_stacked)

    @pytest.mark.parametrize(("props", "columns"), [(None, 0), ("regionprops2", 12)])
    def test_of_stacks(self, make_model, cache, props, columns):
        frames, masks, _ = make_movie(frames=12)
        frames, masks = frames.reshape(4, 3, 48, 64), masks.reshape(4, 3, 48, 64)
        backbone = FakeBackbone(dim=WIDTH)
        model = make_model(coord_dim=3, pretrained_feats_additional_props=props)
        with cached_inference(cache, backbone=backbone):
            link(model, frames, masks)
            nodes = predict(model, frames, masks)["nodes"]
        assert {len(node["coords"]) for node in nodes} == {3}
        extractor = CachedFeatureExtractor(
            cache.movie(frames, masks, backbone), additional_features=props
        )
        records = cache.get(frames, masks, backbone)
        assert sum(len(record.labels) for record in records) == len(nodes)
        for regions, record in zip(extractor.describe(masks, frames, 3), records, strict=True):
            assert regions.labels.tolist() == record.labels.tolist()
            assert np.array_equal(regions.pretrained_feats, record.features)
            assert regions.features_stacked.shape == (len(record.labels), columns)

    def test_stacks_are_refused_by_a_model_of_two_dimensions(self, make_model, small, cache):
        stacks = [array.reshape(3, 2, 48, 64) for array in small]
        with (
            cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)),
            pytest.raises(ValueError, match="Expected 2D data"),
        ):
            link(make_model(), *stacks)

    def test_there_are_none_for_a_label_that_the_movie_does_not_have(self, small, cache):
        frames, masks = small
        extractor = CachedFeatureExtractor(cache.movie(frames, masks, FakeBackbone(dim=WIDTH)))
        with pytest.raises(FrameError, match="label 31 is not in the mask of frame 0"):
            extractor.describe(np.where(masks, masks + 30, 0), frames, ndim=2)

    def test_there_are_none_before_they_are_computed(self, small, cache):
        frames, masks = small
        extractor = CachedFeatureExtractor(cache.movie(frames, masks, FakeBackbone(dim=WIDTH)))
        one = np.array([1])
        with pytest.raises(MissingRecordError):
            extractor.extract_embedding(masks[:1], one, one, np.zeros((1, 2), np.float32))


TOUCHED = (
    (model_api, "FeatureExtractor"),
    (model_api, "get_features"),
    (model_api, "normalize"),
    (Trackastra, "_predict"),
    (Trackastra, "track"),
)


def touched():
    return [getattr(owner, name) for owner, name in TOUCHED]


class TestContext:
    def test_restores_everything(self, make_model, small, cache, tmp_path):
        before, model = touched(), make_model()
        with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
            assert touched() != before
            link(model, *small)
            assert model.feature_extractor is None
        assert touched() == before
        with pytest.raises(KeyError), cached_inference(cache):
            raise KeyError
        with (
            pytest.raises(MovieError),
            cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)),
        ):
            link(model, small[0], small[1][:5])
        assert touched() == before
        assert model.feature_extractor is None
        assert not model.transformer.ptfeat_norm._forward_hooks
        assert {path.name for path in tmp_path.iterdir()} == {"cache", "model"}

    def test_of_the_innermost_counts(self, make_model, small, tmp_path):
        outer, inner, model = Counting(), Counting(seed=1), make_model()
        before = touched()
        with cached_inference(tmp_path / "one", backbone=outer):
            with cached_inference(tmp_path / "two", backbone=inner):
                link(model, *small)
            assert (outer.frames, inner.frames) == (0, 6)
            link(model, *small)
            assert (outer.frames, inner.frames) == (6, 6)
        assert touched() == before

    def test_is_its_threads_own(self, make_model, small, tmp_path, upstream_given):
        models = [make_model() for _ in range(3)]
        backbones = [Counting(seed=seed) for seed in range(2)]
        upstream_given(rows_by_hand(*small, FakeBackbone(dim=WIDTH)), "regionprops2")
        before, graphs = touched(), {}
        inside, first_left = threading.Barrier(3), threading.Event()

        def track(n):
            with cached_inference(tmp_path / str(n), backbone=backbones[n], progress=False):
                inside.wait()
                if n == 1:
                    first_left.wait()
                graphs[n] = link(models[n], *small)

        def track_without():
            inside.wait()
            graphs[2] = link(models[2], *small)

        threads = [threading.Thread(target=track, args=(n,)) for n in range(2)]
        threads.append(threading.Thread(target=track_without))
        for thread in threads:
            thread.start()
        threads[0].join()
        first_left.set()
        for thread in threads[1:]:
            thread.join()
        assert [backbone.frames for backbone in backbones] == [6, 6]
        assert nx.utils.graphs_equal(graphs[0], graphs[2])
        assert not nx.utils.graphs_equal(graphs[0], graphs[1])
        assert touched() == before

    def test_leaves_other_models_alone(self, make_model, small, cache):
        model = make_model(features="wrfeat")
        expected = link(model, *small)
        with cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)):
            graph = link(model, *small)
        assert nx.utils.graphs_equal(graph, expected)
        assert cache.stats()["records"] == 0


def trained_on(
    backbone, pooling="mean_patches_exact", dtype="float16", props="regionprops2", rotated=False
):
    """Name the features of a training, as it does itself."""
    return ModelFeatures.of(SpaceSpec(backbone.spec, pooling, dtype), backbone, props, rotated)


class TestFolders:
    """Model folders that name their features in full, and those that don't."""

    def test_the_same_features_are_tracked_on_without_a_word(self, make_model, small, cache):
        backbone = FakeBackbone(dim=WIDTH)
        model = make_model(named=trained_on(backbone, dtype="float32"))
        with (
            warnings.catch_warnings(action="error", category=UserWarning),
            cached_inference(cache, backbone=backbone),
        ):
            assert link(model, *small).number_of_edges() > 3
        assert all(cache.contains(*small, backbone, dtype="float32"))

    @pytest.mark.parametrize(
        ("trained", "backbone", "options", "says"),
        [
            ({}, {"seed": 1}, {}, "weights differ: xxh3 .*… in training, xxh3 .*… now"),
            ({}, {"stride": 4}, {}, "stride differs: 8 in training, 4 now; weights differ"),
            (
                {},
                {"normalization": Normalization("percentile", 2)},
                {},
                r"normalization.low differs: 1.0 in training, 2.0 now",
            ),
            ({}, {"dim": 5}, {}, "width differs: 6 in training, 5 now"),
            ({}, {}, {"dtype": "float32"}, "dtype differs: float16 in training, float32 now"),
            ({"dtype": "float32"}, {}, {"dtype": "float16"}, "dtype differs: float32 in training"),
            ({"pooling": "nearest_patch"}, {}, {}, "pooling.name differs: nearest_patch in tr"),
            ({"props": None}, {}, {}, "additional_props differs: null in training, regionprops2"),
            ({"rotated": True}, {}, {}, "rotate_features differs: true in training, false now"),
        ],
    )
    def test_others_are_refused_by_the_fields_that_differ(
        self, make_model, small, cache, trained, backbone, options, says
    ):
        model = make_model(named=trained_on(FakeBackbone(WIDTH), **trained), rotate_features=False)
        given = FakeBackbone(**{"dim": WIDTH, **backbone})
        with (
            cached_inference(cache, backbone=given, **options),
            pytest.raises(
                BackboneError, match=f"the model was trained on other features: .*{says}"
            ),
        ):
            link(model, *small)
        assert cache.stats()["records"] == 0

    def test_words_that_train_config_lacks_are_those_of_training(self, make_model, small, cache):
        model = make_model(named=trained_on(FakeBackbone(WIDTH), rotated=True))
        del model.train_args["pretrained_feats_additional_props"]
        with cached_inference(cache, backbone=FakeBackbone(WIDTH)):
            turned = predict(model, *small)["weights"]
        model = make_model(named=trained_on(FakeBackbone(WIDTH)))
        with cached_inference(cache, backbone=FakeBackbone(WIDTH)):
            assert predict(model, *small)["weights"] != turned

    def test_their_backbone_is_built_with_its_options_and_weights(self, make_model, small, cache):
        backbone = load_backbone("efficientnet-lite0", "random:3", layer="stride-8")
        model = make_model(named=trained_on(backbone), width=backbone.spec.width)
        with cached_inference(cache):
            link(model, *small)
        assert all(cache.contains(*small, backbone))
        for given in (
            {"weights": "random:4"},
            {"backbone": "efficientnet-lite0", "weights": "random:4"},
        ):
            with (
                cached_inference(cache, **given),
                pytest.raises(BackboneError, match=r"other features: weights differ: [^;]*; pass"),
            ):
                link(model, *small)
        with (
            cached_inference(cache, backbone="debug/random"),
            pytest.raises(
                BackboneError, match="name differs: efficientnet-lite0 in training, debug"
            ),
        ):
            link(model, *small)

    def test_weights_that_were_replaced_or_are_gone(self, make_model, small, cache, tmp_path):
        file = tmp_path / "last.pt"
        name, states = (
            "efficientnet-lite0",
            [
                load_backbone("efficientnet-lite0", f"random:{seed}").module.state_dict()
                for seed in range(2)
            ],
        )
        torch.save(states[0], file)
        trained = trained_on(load_backbone(name, file))
        torch.save(states[1], file)
        model = make_model(named=trained, width=112)
        with (
            cached_inference(cache),
            pytest.raises(BackboneError, match="other features: weights differ"),
        ):
            link(model, *small)
        file.unlink()
        with (
            cached_inference(cache),
            pytest.raises(BackboneError, match=r"no weights at .*last\.pt"),
        ):
            link(model, *small)
        with cached_inference(cache, weights="random:0"):
            assert link(model, *small).number_of_edges() > 3

    @pytest.mark.parametrize(
        ("before", "after", "says"),
        [
            (f'"key_version": {KEY_VERSION}', '"key_version": 0', "has key version 0, and this"),
            ('"space"', '"spce"', "names no features"),
            ('"space": {', "", "names no features"),
        ],
    )
    def test_what_this_version_cannot_read_is_refused(
        self, make_model, small, cache, before, after, says
    ):
        model = make_model(named=trained_on(FakeBackbone(WIDTH)))
        text = model.train_args["pretrained_feats_spec"].replace('":', '": ')
        assert before in text
        model.train_args["pretrained_feats_spec"] = text.replace(before, after, 1)
        with (
            cached_inference(cache, backbone=FakeBackbone(WIDTH)),
            pytest.raises(BackboneError, match=says),
        ):
            link(model, *small)

    def test_older_ones_are_taken_at_their_word_with_one_warning(self, make_model, small, cache):
        model = make_model()
        with (
            cached_inference(cache, backbone=FakeBackbone(WIDTH)),
            warnings.catch_warnings(action="always", record=True) as said,
        ):
            link(model, *small)
            link(model, *small)
        texts = [str(one.message) for one in said]
        assert sum("fake has the weights, layer, options" in text for text in texts) == 1


class TestErrors:
    @pytest.mark.parametrize(
        ("train_args", "error", "message"),
        [
            ({"width": 9}, BackboneError, r"fake gives 6 features a region, .* trained on 9"),
            ({"pretrained_feats_mode": "exact_patch"}, UnknownNameError, "unknown pooling"),
        ],
    )
    def test_of_models_that_do_not_fit(self, make_model, small, cache, train_args, error, message):
        with (
            cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)),
            pytest.raises(error, match=message),
        ):
            link(make_model(**train_args), *small)

    def test_of_masks(self, make_model, small, cache):
        frames, masks = small
        for wrong, error, message in (
            (masks.astype(float), FrameError, "mask 0 has dtype float64"),
            (masks.astype(int) - 1, FrameError, "labels from -1"),
            (masks[:5], MovieError, "6 frames and 5 masks"),
        ):
            with (
                cached_inference(cache, backbone=FakeBackbone(dim=WIDTH)),
                pytest.raises(error, match=message),
            ):
                link(make_model(), frames, wrong)

    def test_of_a_backbone_nobody_knows(self, make_model, small, cache):
        model = make_model(pretrained_feats_model="facebook/dinov2-smal")
        with (
            cached_inference(cache),
            pytest.raises(UnknownNameError, match="unknown backbone 'facebook/dinov2-smal'"),
        ):
            link(model, *small)

    def test_of_arguments(self, small, cache):
        frames, masks = small
        movie = cache.movie(frames, masks, FakeBackbone(dim=WIDTH))
        for options, error, message in (
            ({"backbone": FakeBackbone(), "weights": "x"}, ValueError, "loaded by name"),
            ({"batch_size": 0}, ValueError, "batch_size 0"),
        ):
            with pytest.raises(error, match=message), cached_inference(cache, **options):
                pass
        with pytest.raises(UnknownNameError, match="unknown pretrained_feats_additional_props"):
            CachedFeatureExtractor(movie, additional_features="regionprops3")
        with pytest.raises(MovieError, match="4 images, and the movie of this extractor has 6"):
            CachedFeatureExtractor(movie).precompute_image_embeddings(frames[:4])

    def test_of_a_missing_package(self, cache, monkeypatch):
        monkeypatch.setitem(sys.modules, "trackastra_pretrained_feats", None)
        with (
            pytest.raises(MissingDependencyError, match="--no-deps trackastra-pretrained"),
            cached_inference(cache),
        ):
            pass
