"""Trackastra's data module with cached features, trained by Lightning."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from joblib import parallel_config
from trackastra.data import CTCData

import recorded_training
from cold_trainings import damage, embeddings, nothing_left
from feature_cache import FeatureCache, MovieError, MovieNotFoundError
from feature_cache.dataset import choose_copy
from feature_cache.movies import write_movie
from feature_cache.testing import FakeBackbone
from recorded_training import AUGMENTATIONS, DIM, TRAIN, VAL, WINDOW, fit, make_module, read_log
from synthetic import make_movie

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning, with newer torch
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
]

FRAMES = 8
SEEDS = {name: seed for seed, name in enumerate((*TRAIN, *VAL))}


@pytest.fixture(scope="module")
def movies(tmp_path_factory):
    """Three small movies as CTC folders."""
    folder = tmp_path_factory.mktemp("movies")
    for name, seed in SEEDS.items():
        write_movie(folder / name / "01", *make_movie(FRAMES, seed=seed))
    return str(folder)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """The records that each movie has in each copy."""
    cache = FeatureCache(tmp_path_factory.mktemp("expected"))
    found = {}
    for name, seed in SEEDS.items():
        frames, masks, _ = make_movie(FRAMES, seed=seed)
        for copy, draw in enumerate(AUGMENTATIONS.draws()):
            found[name, copy] = cache.get_or_compute(frames, masks, FakeBackbone(DIM), draw=draw)
    return found


def digest_expected(records, line) -> str:
    """Digest what a sample must hold: every token of its window, in its copy."""
    window = slice(line["index"], line["index"] + WINDOW)
    rows = [record.features for record in records[line["movie"], line["copy"] or 0][window]]
    return recorded_training.digest_features(torch.from_numpy(np.concatenate(rows)).float())


def check_lines(records, lines) -> None:
    """Check that every training sample has the copy of its place in an epoch, and its features."""
    for line in lines:
        epoch, position, rank = line["place"]
        assert [epoch, rank] == [line["epoch"], line["rank"]]
        assert line["copy"] == choose_copy(5, epoch, position, 3, rank)
        assert line["features"] == digest_expected(records, line)


@pytest.mark.parametrize(
    ("workers", "persistent"),
    [(0, False), pytest.param(2, False, marks=pytest.mark.slow), (2, True)],
)
def test_every_epoch_has_its_copies(movies, records, tmp_path, workers, persistent):
    with nothing_left():
        fit(movies, str(tmp_path), workers=workers, persistent=persistent)
    lines = read_log(tmp_path)
    assert [line["epoch"] for line in lines] == sorted([0, 1, 2] * 12)
    assert {line["movie"] for line in lines} == set(TRAIN)
    assert len({line["copy"] for line in lines}) > 1
    check_lines(records, lines)
    for line in read_log(tmp_path, split="val"):
        assert (line["movie"], line["copy"]) == ("three", None)
        assert line["features"] == digest_expected(records, line)
    assert set(embeddings(tmp_path / "embedded").values()) == {1}


def draw(movies, out, workers, epochs, **options):
    """Give all batches of some epochs of training, and those of validation."""
    options = {
        "augment": 3,
        "dataset_kwargs": {"window_size": WINDOW, "crop_size": (30, 40)},
    } | options
    module = make_module(movies, str(out), workers=workers, seed=8, **options)
    module.setup("fit")
    loader = module.train_dataloader()
    batches = []
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        batches += list(loader)
    return batches + list(module.val_dataloader())


def same(one, other) -> bool:
    return all(
        torch.equal(left[name], right[name])
        for left, right in zip(one, other, strict=True)
        for name in ("coords", "features", "assoc_matrix", "pretrained_feats", "labels")
    )


def test_batches_are_a_function_of_the_seed(movies, tmp_path):
    with parallel_config(backend="sequential"):
        first = draw(movies, tmp_path, 0, [0, 1])
        np.random.seed(1)
        torch.manual_seed(1)
        assert same(first, draw(movies, tmp_path, 2, [0, 1], persistent=True))
        assert same(first[6:], draw(movies, tmp_path, 0, [1]))  # resumed
        state = torch.get_rng_state()
        assert not same(first[:6], draw(movies, tmp_path, 0, [1])[:6])
        assert torch.equal(state, torch.get_rng_state())


def test_a_window_that_comes_often_has_every_copy(movies, tmp_path):
    sampler = {"batch_size": 2, "n_pool": 2, "num_samples": 2000}
    module = make_module(movies, str(tmp_path), sampler_kwargs=sampler, seed=8)
    module.setup("fit")
    copies = module.datasets["train"].datasets[0].feature_cache_extras.tokens.copies
    drawn = [n for batch in module.train_dataloader().batch_sampler.batch_sampler for n in batch]
    table = np.zeros((len(module.datasets["train"]), copies.count + 1))
    for n in drawn:
        table[n, copies.choose(n)] += 1
    assert table.sum() == 2000
    assert scipy.stats.chi2_contingency(table).pvalue > 0.01
    assert scipy.stats.chisquare(table.sum(axis=0)).pvalue > 0.01


def test_datasets_are_loaded_once(movies, tmp_path, monkeypatch):
    loaded = []
    original = CTCData._load_wrfeat
    monkeypatch.setattr(
        CTCData, "_load_wrfeat", lambda self: loaded.append(self.root) or original(self)
    )
    trainer, module = fit(movies, str(tmp_path), epochs=1, warm=True)
    trainer.validate(datamodule=module, model=trainer.model, verbose=False)
    assert len(loaded) == len(TRAIN) + len(VAL)
    make_module(movies, str(tmp_path)).setup("fit")
    assert len(loaded) == len(TRAIN) + len(VAL)  # nor are they built again by another
    assert [data.augmenter is None for data in module.datasets["train"].datasets] == [False, False]
    assert [data.augmenter is None for data in module.datasets["val"].datasets] == [True]


def test_wrong_pairs_are_refused_before_anything_is_loaded(movies, tmp_path, monkeypatch):
    folder = tmp_path / "movies"
    shutil.copytree(movies, folder)
    monkeypatch.setattr(CTCData, "__init__", lambda *_, **__: pytest.fail("loads"))
    module = make_module(str(folder), str(tmp_path))
    frame = folder / VAL[-1] / "01" / "t000.tif"
    frame.rename(frame.with_name("t099.tif"))
    with pytest.raises(MovieError, match=r"t001\.tif in .* would go with man_track000\.tif"):
        module.setup("fit")
    shutil.rmtree(folder / TRAIN[0])
    with pytest.raises(MovieNotFoundError, match="no movie at"):
        module.setup("fit")


def test_warming_first_leaves_nothing_to_compute(movies, tmp_path):
    module = make_module(movies, str(tmp_path), warm=True)
    module.prepare_data()
    draws = {str(draw.to_json()) for draw in AUGMENTATIONS.draws()}
    embedded = embeddings(tmp_path / "embedded")
    assert embedded.total() == FRAMES * (len(TRAIN) * len(draws) + len(VAL))
    fit(movies, str(tmp_path), epochs=1, on_miss="error")
    assert embeddings(tmp_path / "embedded") == embedded


def test_preparing_without_warming_loads_nothing(movies, tmp_path):
    module = make_module(movies, str(tmp_path))
    module.prepare_data()
    assert not module.datasets
    assert not (tmp_path / "embedded").exists()


def test_upstreams_pickles_are_neither_written_nor_read(movies, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "feature_cache"):
        module = make_module(movies, str(tmp_path), cachedir=tmp_path / "pickles")
    assert "not used" in caplog.text
    module.setup("fit")
    assert len(module.datasets["train"]) == len(TRAIN) * (FRAMES - WINDOW + 1)
    assert not (tmp_path / "pickles").exists()


def test_a_failed_setup_is_no_setup(movies, tmp_path):
    module = make_module(movies, str(tmp_path), pooling="no_such")
    for _ in range(2):
        with pytest.raises(LookupError, match="no_such"):
            module.setup("fit")


def test_batch_sizes_must_agree(movies, tmp_path):
    with pytest.raises(ValueError, match="3 in sampler_kwargs and 2 in loader_kwargs"):
        make_module(movies, str(tmp_path), sampler_kwargs={"batch_size": 3})


def run(**arguments) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, recorded_training.__file__, json.dumps(arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists:UserWarning")
def test_killed_and_resumed_it_sees_the_same_copies(movies, records, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for out in (whole, broken):
        out.mkdir()
    fit(movies, str(whole), epochs=4, workers=1, persistent=True)
    killed = run(folder=movies, out=str(broken), epochs=4, kill_in=2, workers=1, persistent=True)
    assert killed.returncode == -9, killed.stderr
    assert {line["epoch"] for line in read_log(broken)} == {0, 1, 2}
    again = {"log": "resumed", "resume": True}
    fit(movies, str(broken), epochs=4, workers=1, persistent=True, **again)
    resumed = read_log(broken, "resumed")
    assert [line["epoch"] for line in resumed] == sorted([2, 3] * 12)
    for lines in (read_log(whole), read_log(broken), resumed):
        check_lines(records, lines)
    assert not damage(broken / "cache")


@pytest.mark.slow
def test_two_ranks_share_the_work_of_a_cold_cache(movies, records, tmp_path):
    done = run(folder=movies, out=str(tmp_path), devices=2, distributed=True, epochs=2, workers=1)
    assert done.returncode == 0, done.stderr
    lines = read_log(tmp_path)
    seen = [[line for line in lines if line["rank"] == rank] for rank in range(2)]
    assert [len(each) for each in seen] == [12, 12]  # 12 samples an epoch, half of them a rank
    check_lines(records, lines)
    assert set(embeddings(tmp_path / "embedded").values()) == {1}
    assert sorted((tmp_path / "built").read_text().split()) == sorted(SEEDS)
    assert not damage(tmp_path / "cache")
