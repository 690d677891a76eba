"""Training scripts that are not changed, with cached features."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
import yaml
from joblib import parallel_config
from torch.utils.data import ConcatDataset
from trackastra.data import CTCData, distributed
from trackastra.data.distributed import BalancedDataModule
from trackastra.model import TrackingTransformer
from trackastra_pretrained_feats import TrackingTransformerwPretrainedFeats

import training_script
from cold_trainings import embeddings, nothing_left
from feature_cache import Augmentations, BackboneError, FeatureCache
from feature_cache.dataset import choose_copy
from feature_cache.movies import write_movie
from feature_cache.spec import SpaceSpec
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import CachedCTCData, ModelFeatures, patch, patching
from feature_cache.trackastra import run as command
from synthetic import make_movie

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`RegionProperties.mean_intensity`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning, with newer torch
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),  # of models saved upstream
]

FRAMES, WINDOW, DIM = 8, 3, 4
SEEDS = {"one": 0, "two": 1, "three": 2}
REPLACED = [
    (CTCData, "__init__"),
    (BalancedDataModule, "prepare_data"),
    (distributed, "cache_class"),
    (distributed, "BalancedBatchSampler"),
    (distributed, "BalancedDistributedSampler"),
    (distributed, "DataLoader"),
    (TrackingTransformer, "save"),
]


@pytest.fixture(scope="module")
def movies(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("movies")
    for name, seed in SEEDS.items():
        write_movie(folder / name / "01", *make_movie(FRAMES, seed=seed))
    return folder


@pytest.fixture(autouse=True)
def loading_starts_no_processes():
    with parallel_config(backend="sequential"):
        yield


def load(root: Path, **options):
    return CTCData(root=root, window_size=WINDOW, **options)


def flags(movies: Path, outdir: Path, *more: str) -> list[str]:
    one, two, three = (str(movies / name / "01") for name in SEEDS)
    return [
        *("--input_train", one, two, "--input_val", three),
        *("--outdir", str(outdir), "--window", str(WINDOW)),
        *more,
    ]


def test_a_script_of_pull_request_61_trains_on_augmented_copies(movies, tmp_path, monkeypatch):
    seen = []
    original = CachedCTCData.__getitem__

    def look(self, n, return_dense=None):
        sample = original(self, n, return_dense)
        seen.append((self.root.parent.name, n, sample))
        return sample

    monkeypatch.setattr(CachedCTCData, "__getitem__", look)
    backbone = FakeBackbone(DIM, log=tmp_path / "embedded")
    arguments = flags(
        *(movies, tmp_path, "--features", "pretrained_feats_aug", "--pretrained_n_augs", "5"),
        *("--rotate_features", "f", "--dim", str(DIM), "--epochs", "2"),
        *("--pretrained_feats_additional_props", "regionprops_small", "--feat_dim", "5"),
        *("--pretrained_feats_mode", "nearest_patch", "--cachedir", str(tmp_path / "pickles")),
    )
    with (
        nothing_left(),
        patch(tmp_path / "cache", backbone=backbone, seed=7, policy="flips"),
    ):
        training_script.main(training_script.parse(arguments))
    assert np.isfinite(np.loadtxt(tmp_path / "losses-0")).all()
    spec = SpaceSpec(backbone.spec, "nearest_patch")
    named = ModelFeatures.of(spec, backbone, "regionprops_small", False)
    assert ModelFeatures.of_folder(tmp_path / "model") == named
    told = yaml.safe_load((tmp_path / "model" / "train_config.yaml").read_text())
    assert told["features"] == "pretrained_feats_aug"
    assert ModelFeatures.of_model(told) == named
    assert not (tmp_path / "pickles").exists()
    assert set(embeddings(tmp_path / "embedded").values()) == {1}
    training = [entry for entry in seen if entry[0] != "three"]
    assert len(training) == 2 * 12
    for epoch in range(2):
        for _, n, sample in training[epoch * 12 : (epoch + 1) * 12]:
            assert n.place[0] == epoch
            assert sample["copy"] == choose_copy(7, epoch, n.place[1], 5, 0)
    assert len({sample["copy"] for _, _, sample in training}) > 2
    draws = Augmentations("flips", copies=5, seed=7).draws()
    cache = FeatureCache(tmp_path / "expected")
    for name, n, sample in seen:
        assert ("copy" in sample) == (name != "three")
        assert sample["features"].shape[1] == 5
        frames, masks, _ = (part[n : n + WINDOW] for part in make_movie(FRAMES, seed=SEEDS[name]))
        records = cache.get_or_compute(
            frames, masks, backbone, pooling="nearest_patch", draw=draws[sample.get("copy", 0)]
        )
        by_label = [dict(zip(r.labels.tolist(), r.features, strict=True)) for r in records]
        tokens = zip(sample["timepoints"].tolist(), sample["labels"].tolist(), strict=True)
        expected = np.stack([by_label[t - n][label] for t, label in tokens]).astype(np.float32)
        assert np.array_equal(sample["pretrained_feats"], expected)


def test_what_a_script_leaves_at_none_is_as_by_default(movies, tmp_path):
    """Its own defaults are None, which it passes on."""
    names = ("mode", "additional_props", "model")
    left = {f"pretrained_feats_{name}": None for name in names} | {"pretrained_n_augs": None}
    with patch(tmp_path / "cache", backbone=FakeBackbone(DIM)):
        data = load(movies / "one/01", features="pretrained_feats_aug", augment=1, **left)
    assert data[0]["pretrained_feats"].shape[1] == DIM
    (tokens,) = data.all_tokens
    assert tokens.copies.count == 3
    assert tokens.movies[0].spec.pooling == "mean_patches_exact"


@pytest.mark.slow
def test_two_ranks_of_a_script_run_by_the_command_line(movies, tmp_path):
    """Lightning starts the second rank, which has to be patched as well."""
    command = [
        *(sys.executable, "-m", "feature_cache.trackastra.run", "--cache", tmp_path / "cache"),
        *("--policy", "flips", training_script.__file__),
        *flags(movies, tmp_path, "--features", "pretrained_feats_aug", "--devices", "2"),
        *("--pretrained_feats_model", "debug/random", "--dim", "128"),
        *("--pretrained_feats_additional_props", "regionprops_small", "--feat_dim", "5"),
    ]
    environment = {**os.environ, "JOBLIB_MULTIPROCESSING": "0"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        losses = np.loadtxt(tmp_path / f"losses-{rank}")
        assert len(losses) > 0
        assert np.isfinite(losses).all()
    stats = FeatureCache(tmp_path / "cache").stats(lifetime=True)
    assert stats["computed"] == stats["records"] > 3 * FRAMES


@pytest.mark.parametrize("error", [None, KeyError])
def test_everything_is_restored(cache, error):
    before = [getattr(owner, name) for owner, name in REPLACED]
    try:
        with patch(cache):
            inside = [getattr(owner, name) for owner, name in REPLACED]
            if error is not None:
                raise error
    except KeyError:
        pass
    assert all(new is not old for new, old in zip(inside, before, strict=True))
    assert [getattr(owner, name) for owner, name in REPLACED] == before


def test_what_was_loaded_goes_on_working(movies, cache):
    with patch(cache, backbone=FakeBackbone(DIM)):
        data = load(movies / "one/01", features="pretrained_feats")
    assert type(data) is CachedCTCData
    expected = [data[n]["pretrained_feats"] for n in range(len(data))]
    again = pickle.loads(pickle.dumps(data))
    assert all(torch.equal(again[n]["pretrained_feats"], f) for n, f in enumerate(expected))


def test_names_mean_what_they_mean_in_pull_request_61(movies, cache, monkeypatch):
    asked = {}
    wrap = patching.wrap
    monkeypatch.setattr(patching, "wrap", lambda *a, **k: wrap(*a, **(asked.update(k) or k)))
    options = {"pretrained_n_augs": 2, "pretrained_feats_additional_props": "regionprops"}
    with patch(cache, backbone=FakeBackbone(DIM), seed=3, geometry="keep", dtype="float32"):
        data = load(movies / "one/01", features="pretrained_feats_aug", augment=1, **options)
        assert asked["augmentations"] == Augmentations("default", copies=2, seed=3)
        assert (asked["pooling"], asked["rotate_features"]) == ("mean_patches_exact", False)
        assert (asked["geometry"], asked["dtype"]) == ("keep", "float32")
        assert data[0]["features"].shape[1] == data.feat_dim == 8
        plain = load(
            movies / "one/01", features="pretrained_feats", augment=1, rotate_features=True
        )
        assert (asked["augmentations"], asked["rotate_features"]) == (None, True)
        assert plain[0]["features"].shape[1] == 0


def test_one_backbone_and_one_cache_for_all_sets(movies, tmp_path, monkeypatch):
    made = []

    def load_fake(name, weights, device):
        made.append((name, weights, device))
        return FakeBackbone(DIM)

    monkeypatch.setattr(patching, "load_backbone", load_fake)
    with patch(tmp_path / "cache", weights="random:1", device="cpu"):
        options = {"features": "pretrained_feats", "pretrained_feats_model": "some/model"}
        datasets = [load(movies / name / "01", **options) for name in SEEDS]
    assert made == [("some/model", "random:1", "cpu")]
    caches = {id(m.cache) for data in datasets for m in data.feature_cache_extras.tokens.movies}
    assert len(caches) == 1


class Own(CTCData):
    """Somebody's own dataset."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # upstream's file
def test_other_datasets_are_left_alone(movies, tmp_path, cache):
    with patch(cache, backbone=FakeBackbone(DIM)):
        plain = load(movies / "one/01")
        assert type(plain) is CTCData
        assert "pretrained_feats" not in plain[0]
        assert type(Own(root=movies / "one/01", window_size=WINDOW)) is Own
        pickled = distributed.cache_class(tmp_path / "pickles")
        pickled(root=movies / "one/01", window_size=WINDOW)
        assert len(list((tmp_path / "pickles").iterdir())) == 1
        pickled(root=movies / "one/01", window_size=WINDOW, features="pretrained_feats")
        assert len(list((tmp_path / "pickles").iterdir())) == 1


def test_datasets_are_loaded_once(movies, cache):
    module = BalancedDataModule(
        [movies / "one/01"], [movies / "two/01"], None, 1, False,
        {"features": "pretrained_feats", "window_size": WINDOW}, {}, {},
    )  # fmt: skip
    with patch(cache, backbone=FakeBackbone(DIM, log=cache.store.root / "embedded")):
        module.prepare_data()
        assert not hasattr(module, "datasets")
        module.setup("fit")
    assert isinstance(module.datasets["train"], ConcatDataset)
    assert "pretrained_feats" in module.datasets["val"][0]


def test_no_augmentation_means_no_copies_and_a_warning(movies, cache):
    with patch(cache, backbone=FakeBackbone(DIM)):
        with pytest.warns(UserWarning, match="augment=0, so without augmented copies"):
            data = load(movies / "one/01", features="pretrained_feats_aug")
        assert "copy" not in data[0]
        load(movies / "one/01", features="pretrained_feats_aug", augment=1)
        load(movies / "two/01", features="pretrained_feats_aug")  # for validation: no warning


def save_model(folder: Path, dim: int = DIM) -> None:
    sizes = {"d_model": 16, "nhead": 2, "num_encoder_layers": 1, "num_decoder_layers": 1}
    model = TrackingTransformerwPretrainedFeats(
        coord_dim=2, feat_dim=0, pos_embed_per_dim=4, window=WINDOW, pretrained_feat_dim=dim,
        reduced_pretrained_feat_dim=8, feat_embed_per_dim=2, **sizes,
    )  # fmt: skip
    model.save(folder)


class TestModels:
    """What is written beside a model that upstream's script saves."""

    def load(self, movies, name="one", **options):
        load(movies / name / "01", features="pretrained_feats", **options)

    def test_one_of_other_features_is_not_overwritten(self, movies, cache, tmp_path):
        with patch(cache, backbone=FakeBackbone(DIM)):
            self.load(movies)
            save_model(tmp_path / "model")
        written = (tmp_path / "model" / "model.pt").read_bytes()
        with patch(cache, backbone=FakeBackbone(DIM, seed=1)):
            self.load(movies)
            with pytest.raises(BackboneError, match="trained on other features: weights differ"):
                save_model(tmp_path / "model")
        assert (tmp_path / "model" / "model.pt").read_bytes() == written

    def test_none_are_named_that_can_not_be_told(self, movies, cache, tmp_path, caplog):
        with patch(cache, backbone=FakeBackbone(DIM)):
            self.load(movies)
            save_model(tmp_path / "wide", dim=DIM + 1)
            self.load(movies, "two", rotate_features=True)
            save_model(tmp_path / "model")
        assert "2 kinds of features were given to datasets of width 4" in caplog.text
        for name in ("wide", "model"):
            assert (tmp_path / name / "model.pt").exists()
            assert ModelFeatures.of_folder(tmp_path / name) is None


def test_a_backbone_must_be_named(movies, cache):
    with patch(cache), pytest.raises(BackboneError, match="no pretrained_feats_model"):
        load(movies / "one/01", features="pretrained_feats")
    with pytest.raises(LookupError, match="no_such"), patch(cache, backbone="no_such"):
        pass


@pytest.mark.parametrize("option", ["geometry", "on_miss"])
def test_a_word_that_is_unknown_is_an_error_on_entering(cache, option):
    with pytest.raises(LookupError, match=f"unknown {option} 'nope': .*Known: "):
        patch(cache, **{option: "nope"}).__enter__()


def test_errors_of_ours_are_one_line_and_the_scripts_own_stay(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("raise KeyError('of the script')")
    arguments = ["run", "--cache", str(tmp_path / "cache"), str(script)]
    monkeypatch.setattr(sys, "argv", [*arguments[:1], "--geometry", "nope", *arguments[1:]])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: unknown geometry 'nope': Known: map, keep\n"
    monkeypatch.setattr(command, "__spec__", SimpleNamespace(name=command.__name__))
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(KeyError, match="of the script"):
        command.main()


def test_a_script_that_asks_the_cache_for_nothing_is_told(tmp_path, monkeypatch, capsys):
    script = tmp_path / "train.py"
    script.write_text("")
    monkeypatch.setattr(sys, "argv", ["run", "--cache", str(tmp_path / "cache"), str(script)])
    command.app(standalone_mode=False)
    assert "train.py asked nothing of" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["run", "--cache", str(tmp_path / "cache"), "no-such"])
    with pytest.raises(typer.BadParameter, match="no-such is neither a file nor the command"):
        command.app(standalone_mode=False)


@pytest.mark.parametrize(("words", "seed"), [([], 7), (["--seed", "4"], 4)])
def test_copies_have_the_seed_of_the_scripts_configuration(
    movies, tmp_path, monkeypatch, words, seed
):
    """So what ``warm CONFIG`` computes is what such a training asks for."""
    script, config = tmp_path / "train.py", tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump({"seed": 7, "input_train": [str(movies / "one/01")]}))
    script.write_text(
        "import sys\nfrom trackastra.data import CTCData\n"
        f"data = CTCData(root=r'{movies / 'one/01'}', window_size=3, augment=1, "
        "features='pretrained_feats_aug', pretrained_feats_model='debug/random')\n"
        "sys.seed = data.feature_cache_extras.tokens.copies.augmentations.seed\n"
    )
    given = ["run", "--cache", tmp_path / "cache", script, "-c", config, *words]
    monkeypatch.setattr(sys, "argv", [*map(str, given)])
    command.app(standalone_mode=False)
    assert vars(sys).pop("seed") == seed


def test_without_trackastra_the_command_says_so_in_one_line(tmp_path):
    (tmp_path / "trackastra.py").write_text("raise ModuleNotFoundError(name=__name__)")
    done = subprocess.run(
        [sys.executable, "-m", "feature_cache.trackastra.run", "--help"],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 1
    assert 'install it with: pip install "feature-cache[trackastra]")\n' in done.stderr
    assert "Traceback" not in done.stderr
