"""feature-cache train: its options, and a real run from movies to scored tracks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from joblib import parallel_config
from trackastra.data import CTCData
from trackastra.model import Trackastra
from typer.testing import CliRunner

from cold_trainings import wait_until
from feature_cache import BackboneError, FeatureCache, Movie, load_backbone
from feature_cache.cli import app
from feature_cache.movies import link_by_overlap, write_movie
from feature_cache.spec import SpaceSpec
from feature_cache.trackastra import (
    ModelFeatures,
    cached_inference,
    make_model,
    score_tracks,
    write_tracks,
)
from feature_cache.trackastra import train as training
from feature_cache.trackastra.training import TrackingModule, save_model
from feature_cache.train_options import find_seed
from synthetic import make_movie

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_trackastra.py"
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # upstream's


@pytest.fixture
def config(tmp_path, small_folder):
    """Write a YAML file in Trackastra's format; give what names it."""
    movie = str(small_folder())

    def write(**options) -> list[str]:
        given = {"name": "run", "input_train": [movie], "input_val": [movie], **options}
        (tmp_path / "train.yaml").write_text(yaml.safe_dump(given))
        return ["-c", str(tmp_path / "train.yaml")]

    return write


def test_upstreams_files_are_understood(config, capsys):
    given = config(
        features="pretrained_feats_aug",
        pretrained_feats_model="facebook/sam2.1-hiera-base-plus",
        pretrained_feats_additional_props="regionprops_small",
        reduced_pretrained_feat_dim=128,
        rotate_features=True,
        model=None,
        crop_size=[320, 320],
        lr=1e-3,
        cachedir=".cache",
        tracking_frequency=-1,
        max_tokens="None",
        example_images=False,
    )
    options = training.parse_options([*given, "--cache", "features", "--lr", "1e-4"])
    assert options.model is None
    assert options.rotate_features is True
    assert (options.crop_size, options.lr) == ([320, 320], 1e-4)
    assert options.max_tokens is None
    assert capsys.readouterr().err.splitlines() == [
        "ignored: cachedir (its pickles may be stale)",
        "ignored: example_images",
        "ignored: tracking_frequency",
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, "train.yaml: unknown key 'epoch': did you mean 'epochs'? Known: "),
        ({"input_val": ["nowhere"]}, "no such movie folder: nowhere"),
        ({"input_val": []}, "no movies in input_val: name at least one"),
        (
            {"input_val": [__file__]},
            "a training reads folders of one TIFF a timepoint, with tracks",
        ),
        ({"features": "pretrained_feats"}, "needs --cache"),
        ({"feature_dropout": 0.5}, "--feature_dropout with --features wrfeat, which has no"),
        ({"feature_dropout": 1}, "expected a number from 0 to below 1"),
        ({"train_samples": 3}, "--train_samples 3 and --batch_size 8 make no batch"),
        ({"batch_size": 0}, "train.yaml: --batch_size: '0': expected a whole number from 1 on"),
        ({"epochs": -1}, "--epochs: '-1': expected a whole number from 1 on"),
        ({"n_pool_sampler": 0}, "--n_pool_sampler: '0': expected a whole number from 1 on"),
        ({"delta_cutoff": 0}, "--delta_cutoff: '0': expected a whole number from 1 on"),
        ({"patience": -1}, "--patience: '-1': expected a whole number from 0 on"),
        ({"dropout": 1.5}, "--dropout: '1.5': expected a number from 0 to below 1"),
        ({"pos_embed_per_dim": 3}, "--pos_embed_per_dim: '3': expected an even number"),
        ({"feat_embed_per_dim": 3}, "--feat_embed_per_dim: '3': expected an even number"),
        ({"features": "patch"}, "unknown value 'patch': did you mean 'patch_regionprops'? "),
        ({"d_model": 0}, "-d/--d_model: '0': expected a whole number from 1 on"),
        ({"causal_norm": "softmx"}, "--causal_norm: unknown value 'softmx': did you mean 'softm"),
        ({"features": "pretrained_feats", "cache": True}, "needs --cache"),
        ({"features": "pretrained_feats", "cache": "c"}, "needs --pretrained_feats_model"),
        (
            {"policy": "flp"},
            "--policy: unknown value 'flp': did you mean 'flips'? ",
        ),
        ({"pretrained_feats_mode": "avg"}, "unknown value 'avg': Known: nearest_patch, mean_"),
        (
            {"pretrained_feats_additional_props": "regionprops9"},
            "unknown value 'regionprops9': did you mean 'regionprops'? Known: regionprops_small, ",
        ),
    ],
)
def test_wrong_options_end_with_what_is_wrong(config, capsys, given, message):
    with pytest.raises(SystemExit) as ended:
        training.parse_options(config(**given))
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("form", ["-c {}", "-c{}", "--config {}", "--config={}", "{}"])
def test_a_configuration_is_read_however_it_is_named(config, form):
    _, file = config(seed=7, epochs=3)
    words = form.format(file).split()
    assert training.parse_options([*words, "--epochs", "4"]).seed == 7
    assert find_seed(words) == (0 if form == "{}" else 7)


def test_upstreams_cache_is_no_folder(config, capsys):
    words = config(cache=True, cachedir="pickles")
    assert training.parse_options(words).cache is None
    assert capsys.readouterr().err.splitlines() == [
        "ignored: cache true (upstream's, of its pickles; here it names a folder)",
        "ignored: cachedir (its pickles may be stale)",
    ]
    assert training.parse_options([*words, "--cache", "features"]).cache == Path("features")


def test_a_model_to_fine_tune_must_be_what_is_asked(config, tmp_path):
    folder = tmp_path / "model"
    save_model(make_model(pretrained_feat_dim=8, d_model=16, num_encoder_layers=1), folder)
    options = training.parse_options(config(model=str(folder), d_model=16))
    assert training.choose_model(options, 8, "regionprops2").config["num_encoder_layers"] == 1
    options = training.parse_options(config(model=str(folder), d_model=32, dropout=0.5))
    with pytest.raises(ValueError, match=r"d_model 16, asked 32; dropout 0\.1, asked 0\.5"):
        training.choose_model(options, 8, "regionprops2")
    with pytest.raises(ValueError, match="pretrained_feat_dim 8, asked 9"):
        training.choose_model(training.parse_options(config(model=str(folder))), 9, "regionprops2")
    with pytest.raises(ValueError, match="it has pretrained features"):
        training.choose_model(training.parse_options(config(model=str(folder))), 0, "regionprops2")


def fake_features(backbone: str = "efficientnet-lite0") -> ModelFeatures:
    model = load_backbone(backbone, "random:0", "cpu")
    return ModelFeatures.of(SpaceSpec(model.spec), model, None, True)


def test_a_training_goes_on_only_with_the_same_features(config, tmp_path):
    """It ends before a movie is read."""
    (tmp_path / "run").mkdir()
    fake_features().write(tmp_path / "run")
    given = {
        "features": "pretrained_feats", "cache": str(tmp_path / "cache"), "device": "cpu",
        "outdir": str(tmp_path), "timestamp": False, "pretrained_feats_model": "efficientnet-lite0",
    }  # fmt: skip
    for options, says in (
        ({"weights": "random:1"}, "weights differ: xxh3"),
        ({"weights": "random:0", "rotate_features": False}, "rotate_features differs: true in tr"),
        ({"features": "wrfeat"}, "and now there are none"),
    ):
        with pytest.raises(BackboneError, match=f"run holds a model that .*{says}"):
            training.train(training.parse_options(config(**{**given, **options})))
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["features.json"]


def test_fine_tuning_on_other_features_says_which(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    fake_features().write(tmp_path)
    options = training.parse_options(config(model=f"~/{tmp_path.name}"))
    training.compare_start(options, fake_features())
    assert capsys.readouterr().err == ""
    training.compare_start(options, fake_features("debug/random"))
    assert "was trained on other features: name differs: efficient" in capsys.readouterr().err
    training.compare_start(training.parse_options(config()), fake_features())
    assert capsys.readouterr().err == ""


def break_a_frame(movie: Path) -> None:
    frame = movie / "t002.tif"
    frame.write_bytes(frame.read_bytes()[:-400] + bytes(400))


@pytest.mark.filterwarnings("ignore")  # of Lightning and Trackastra
@pytest.mark.parametrize("features", ["wrfeat", "pretrained_feats_aug"])
@pytest.mark.parametrize(
    ("given", "arrange", "says"),
    [
        ({}, break_a_frame, "can't read .*/01/t002.tif: damaged, or of a kind"),
        ({"window": 50}, None, "/01 has 6 frames: expected at least the 50 of a window; pass a "),
        ({"detection_folders": ["SEG"]}, None, "/01 has no masks 'SEG': looked for "),
    ],
)
def test_movies_that_are_no_use_are_named(
    config, tmp_path, small_folder, features, given, arrange, says
):
    if arrange is not None:
        arrange(small_folder())
    options = {
        "features": features, "pretrained_feats_model": "debug/random", "device": "cpu",
        "cache": str(tmp_path / "cache"), "outdir": str(tmp_path), "logger": "none",
        "d_model": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_workers": 0,
    }  # fmt: skip
    with parallel_config(backend="sequential"), pytest.raises(ValueError, match=says):
        training.train(training.parse_options(config(**{**options, "window": 3, **given})))


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            ValueError("Caught ValueError in DataLoader worker 0.\nTraceback\nValueError: why\n"),
            "ValueError: why",
        ),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB.\nmore"),
            "CUDA out of memory. Tried 2 GiB. Take a smaller --batch_size, --crop_size or --window",
        ),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_an_error_is_one_line(monkeypatch, capsys, raised, line):
    def train(_):
        raise raised

    monkeypatch.setattr(training, "parse_options", lambda *_: None)
    monkeypatch.setattr(training, "train", train)
    with pytest.raises(SystemExit) as ended:
        training.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_a_model_that_does_not_fit_the_disk_leaves_the_one_before(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    model.config = {}
    save_model(model, tmp_path)
    before = (tmp_path / "model.pt").read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    for write in ("write_bytes", "write_text"):
        monkeypatch.setattr(Path, write, fail)
    with pytest.raises(OSError, match="No space left"):
        save_model(model, tmp_path)
    assert (tmp_path / "model.pt").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.yaml", "model.pt"]


def test_a_folder_that_exists_is_gone_on_with_or_an_error(config, tmp_path):
    given = {"outdir": str(tmp_path), "timestamp": False}
    options = training.parse_options(config(**given))
    assert training.choose_folder(options) == (tmp_path / "run", None)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert training.choose_folder(options) == (tmp_path / "run", last)
    with pytest.raises(ValueError, match="exists"):
        training.choose_folder(training.parse_options(config(**given, resume=False)))


EXAMPLE = {  # upstream's scripts/example_config.yaml
    "batch_size": 8, "crop_size": [256, 256], "detection_folders": ["TRA"], "dropout": 0.01,
    "example_images": False, "max_tokens": 2048, "name": "example", "ndim": 2,
    "num_decoder_layers": 5, "num_encoder_layers": 5, "outdir": "runs", "distributed": False,
    "window": 6,
}  # fmt: skip
POSTED = {  # as posted in pull request 61
    "features": "pretrained_feats_aug", "pretrained_feats_model": "debug/random",
    "pretrained_feats_mode": "mean_patches_exact", "pretrained_n_augs": 2,
    "pretrained_feats_additional_props": "regionprops_small", "rotate_features": True,
    "reduced_pretrained_feat_dim": 128, "window": 4, "augment": 3, "compress": True,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("given", [EXAMPLE, POSTED], ids=["example", "posted"])
def test_warmed_by_its_configuration_a_training_computes_and_builds_nothing(
    config, tmp_path, small_folder, monkeypatch, given
):
    words = config(**given, device="cpu", num_workers=0)
    cache = str(tmp_path / "cache")
    with parallel_config(backend="sequential"):
        report = tmp_path / "report.json"
        command = ["warm", words[1], "--cache", cache, "--report", str(report)]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        assert json.loads(report.read_text())["computed"] == (0 if given is EXAMPLE else 6 * 3)
        assert "training data of 1 movie built" in done.output
        monkeypatch.setattr(CTCData, "_load_wrfeat", lambda _: pytest.fail("built again"))
        options = training.parse_options([*words, "--cache", cache, "--only_prechecks"])
        assert training.train(options).startswith("all is well: ")
    before = FeatureCache(cache).stats(lifetime=True)["computed"]
    assert before == (0 if given is EXAMPLE else 6 * 3)
    if given is POSTED:
        backbone = load_backbone("debug/random", device="cpu")
        data = training.make_data(options, FeatureCache(options.cache), backbone, 4)
        data.prepare_data()
        data.setup("fit")
        assert sum(split.warm() for split in data.datasets.values()) == 0


@pytest.mark.filterwarnings("ignore")
def test_a_training_whose_validation_is_all_nan_kept_no_model_and_says_so(
    config, tmp_path, monkeypatch
):
    choose = training.choose_model

    def spoil(*given):
        model = choose(*given)
        model.register_forward_hook(
            lambda model, _, logits: logits if model.training else logits * torch.nan
        )
        return model

    monkeypatch.setattr(training, "choose_model", spoil)
    options = training.parse_options(config(
        **EXAMPLE | {"window": 3, "crop_size": [30, 40], "outdir": str(tmp_path), "name": "run"},
        device="cpu", num_workers=0, cache=str(tmp_path / "cache"), logger="none",
        timestamp=False, d_model=16, epochs=1, train_samples=8,
    ))  # fmt: skip
    with parallel_config(backend="sequential"), pytest.raises(FloatingPointError) as ended:
        training.train(options)
    assert str(ended.value).startswith("no model, as no epoch has a validation loss that is a ")


SHORT = {  # a training of a few steps
    "window": 3, "crop_size": [30, 40], "device": "cpu", "num_workers": 0, "logger": "none",
    "timestamp": False, "d_model": 16, "num_encoder_layers": 1, "num_decoder_layers": 1,
    "epochs": 2, "train_samples": 8, "batch_size": 4,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_what_a_training_cannot_go_on_from_is_said(config, tmp_path):
    def train(**changed) -> str:
        given = config(**{**SHORT, "outdir": str(tmp_path), **changed})
        with parallel_config(backend="sequential"):
            return training.train(training.parse_options([*given, "--cache", str(tmp_path / "c")]))

    assert train() == f"model: {tmp_path / 'run'}"
    assert train() == f"nothing to do: 2 of 2 epochs are done; model: {tmp_path / 'run'}"
    assert train(epochs=1).startswith("nothing to do: 2 of 1 epochs are done; ")
    says = "run holds a model of another architecture: it has "
    for change, told in (
        ({"d_model": 32}, "d_model 16, asked 32"),
        ({"num_decoder_layers": 0, "window": 4}, "window 3, asked 4; num_decoder_layers 1, asked "),
    ):
        with pytest.raises(ValueError, match=says + told):
            train(epochs=3, **change)
    stopped = train(name="still", lr=0, patience=1, epochs=9)
    assert stopped.startswith(f"model: {tmp_path / 'still'}; ended after 2 of 9 epochs, as the val")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"can't go on from .*last.ckpt: it is damaged"):
        train(epochs=3)


@pytest.mark.filterwarnings("ignore")
def test_a_training_that_was_interrupted_ends_as_one_that_was_not(
    config, tmp_path, monkeypatch, capsys
):
    def train(out: str) -> dict[str, torch.Tensor]:
        given = config(
            **POSTED | SHORT | {"outdir": str(tmp_path / out), "epochs": 3, "dropout": 0.2},
            feature_dropout=0.5, cache=str(tmp_path / "cache"), seed=4,
        )  # fmt: skip
        with parallel_config(backend="sequential"):
            training.train(training.parse_options(given))
        return torch.load(tmp_path / out / "run" / "checkpoints" / "last.ckpt")["state_dict"]

    def interrupt(module) -> None:
        if module.current_epoch == 1:
            raise KeyboardInterrupt

    whole = train("whole")
    with monkeypatch.context() as patch:
        patch.setattr(TrackingModule, "on_train_epoch_start", interrupt)
        with pytest.raises(SystemExit) as ended:
            train("broken")
    assert ended.value.code == 130
    assert "features computed here: " in capsys.readouterr().out
    resumed = train("broken")
    assert "features computed here: 0 records" in capsys.readouterr().out
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


@pytest.mark.filterwarnings("ignore")
def test_a_home_folder_in_a_configuration_is_found_by_all(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_movie(tmp_path / "other" / "01", *make_movie(seed=1))
    words = config(
        **POSTED | {"window": 3, "input_train": ["~/movie/01"], "input_val": ["~/other/01/"]},
        outdir="~/runs",
    )
    with parallel_config(backend="sequential"):
        done = CliRunner().invoke(app, ["warm", words[1], "--cache", str(tmp_path / "cache")])
        assert done.exit_code == 0, (done.output, done.exception)
        assert "training data of 2 movies built" in done.output
        assert "24 records" in done.output  # none of validation is copied
        options = training.parse_options([*words, "--cache", "~/cache", "--only_prechecks"])
        assert options.outdir == tmp_path / "runs"
        assert training.train(options).startswith("all is well: ")


@pytest.mark.filterwarnings("ignore")
def test_features_of_a_configuration_are_warmed_for_the_model_it_goes_on_from(
    config, tmp_path, monkeypatch
):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(make_model(d_model=16, num_encoder_layers=1, window=3), tmp_path / "model")
    for model, says in (("~/model", "training data of 1 movie built"), ("~/mdel", "no model at ")):
        words = ["warm", config(model=model)[1], "--cache", str(tmp_path / "cache")]
        with parallel_config(backend="sequential"):
            done = CliRunner().invoke(app, words)
        assert says in f"{done.output}{done.exception}"
        assert done.exit_code == (0 if model == "~/model" else 2)
        assert not isinstance(done.exception, FileNotFoundError)


@pytest.mark.filterwarnings("ignore")
def test_tracks_are_kept_where_there_is_nothing_to_compare_them_with(tmp_path, recwarn):
    frames, masks, tracks = make_movie(cells=3)
    masks = np.where(masks, masks + 3 * np.arange(len(masks))[:, None, None], 0)  # no cell twice
    tracks = np.array([[1 + n, n // 3, n // 3, 0] for n in range(3 * len(masks))])
    write_movie(tmp_path / "01", frames, masks, tracks)
    model = tmp_path / "model"
    save_model(make_model(feat_dim=7, d_model=16, num_encoder_layers=1, window=3), model)
    (model / "train_config.yaml").write_text("features: wrfeat")
    words = ["track", str(tmp_path / "01"), "--model", str(model), "--json", "--threshold", "0"]
    with parallel_config(backend="sequential"):
        done = CliRunner().invoke(app, [*words, "--cache", str(tmp_path / "cache")])
    assert done.exit_code == 0, (done.output, done.exception)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["scores"] == {}
    assert found["cells"] + found["unlinked"] == len(tracks)
    assert any("not compared with those of" in str(one.message) for one in recwarn)
    assert (tmp_path / "01_RES" / "man_track.txt").exists()


TWO_RANKS = """
from feature_cache.trackastra import train
trainer = train.Trainer
train.Trainer = lambda **given: trainer(**{**given, "devices": 2})
train.main()
"""


@pytest.mark.slow
def test_two_ranks_end_well_though_each_names_the_folder_by_its_own_time(config, tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    words = config(
        **SHORT | {"timestamp": True, "outdir": str(tmp_path / "runs")}, distributed=True
    )
    command = [sys.executable, str(tmp_path / "two.py"), *words, "--cache", str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "error:" not in done.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert done.stdout.count("model: ") == done.stdout.count(f"model: {folder}") == 1


@pytest.mark.slow
def test_a_training_whose_whole_group_is_terminated_says_what_it_kept(config, tmp_path):
    words = config(**SHORT | {"outdir": str(tmp_path / "runs"), "num_workers": 1, "epochs": 999})
    command = [sys.executable, "-m", "feature_cache.cli", "train", *words, "--cache"]
    with subprocess.Popen(
        [*command, str(tmp_path / "cache")], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
    ) as process:  # fmt: skip
        assert wait_until((tmp_path / "runs" / "run" / "model.pt").exists, 200)
        os.killpg(process.pid, signal.SIGTERM)
        _, said = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "interrupted in epoch " in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_seed_makes_the_same_training_with_any_number_of_workers(config, tmp_path):
    weights = []
    for workers in (0, 2):
        options = training.parse_options(config(
            **POSTED | {"window": 3, "crop_size": [30, 40]}, device="cpu", num_workers=workers,
            cache=str(tmp_path / "cache"), outdir=str(tmp_path / str(workers)), logger="none",
            timestamp=False, d_model=16, num_encoder_layers=1, num_decoder_layers=1, epochs=3,
            train_samples=16, batch_size=4, dropout=0.1, seed=4, feature_dropout=0.5,
        ))  # fmt: skip
        with parallel_config(backend="sequential"):
            assert training.train(options) == f"model: {tmp_path / str(workers) / 'run'}"
        weights.append(torch.load(tmp_path / str(workers) / "run" / "model.pt"))
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    command = ["track", options.input_val[0], "--model", str(tmp_path / "0" / "run"), "--json"]
    command += ["--cache", str(tmp_path / "cache"), "-o", str(tmp_path / "tracks")]
    found = []
    for threshold in ("0", "0.5", "1"):
        done = CliRunner().invoke(app, [*command, "--threshold", threshold])
        assert done.exit_code == 0, (done.output, done.exception)
        tracked = json.loads(done.stdout.splitlines()[-1])
        assert tracked["scores"]["links"] > 0
        found.append(tracked["scores"]["found"] + tracked["scores"]["wrong"])
    assert found == sorted(found, reverse=True)
    assert found[0] > found[-1]
    assert (tmp_path / "tracks" / "tracks.zarr" / "zarr.json").exists()
    assert FeatureCache(tmp_path / "cache").stats()["records"] == 6 * 3 + 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Lightning and Trackastra, in tracking too
def test_from_movies_to_tracks(hela, tmp_path):
    """Train on frames 0 to 13, validate on 13 to 19; the loss falls, and the model tracks."""
    roots = {}
    for part, times in {"train": np.s_[:14], "val": np.s_[13:]}.items():
        frames, masks = (stack[times, :240, :320] for stack in hela)
        roots[part] = tmp_path / part / "01"
        write_movie(roots[part], frames, *link_by_overlap(masks))
    options = {
        "name": "hela", "timestamp": False, "outdir": str(tmp_path), "logger": "csv",
        "input_train": [str(roots["train"])], "input_val": [str(roots["val"])],
        "features": "pretrained_feats_aug", "pretrained_feats_model": "efficientnet-lite0",
        "pretrained_n_augs": 2, "pretrained_feats_additional_props": "regionprops2",
        "cache": str(tmp_path / "cache"), "warm": True, "reduced_pretrained_feat_dim": 32,
        "d_model": 64, "num_encoder_layers": 2, "num_decoder_layers": 2, "window": 4,
        "epochs": 5, "warmup_epochs": 1, "train_samples": 160, "batch_size": 4, "lr": 2e-3,
        "num_workers": 0, "device": "cpu",
    }  # fmt: skip
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(options))
    command = [sys.executable, str(SCRIPT), "-c", str(tmp_path / "train.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == f"model: {tmp_path / 'hela'}"

    with open(next((tmp_path / "hela" / "csv").rglob("metrics.csv")), newline="") as file:
        rows = list(csv.DictReader(file))
    for name in ("train_loss", "val_loss"):
        losses = [float(row[name]) for row in rows if row[name]]
        assert len(losses) == options["epochs"]
        assert losses[-1] < 0.7 * losses[0], losses

    backbone = load_backbone("efficientnet-lite0", device="cpu")
    named = ModelFeatures.of(SpaceSpec(backbone.spec), backbone, "regionprops2", True)
    assert ModelFeatures.of_folder(tmp_path / "hela") == named
    model = Trackastra.from_folder(tmp_path / "hela", device="cpu")
    assert ModelFeatures.of_model(model.train_args) == named
    movie = Movie.open(roots["val"])
    frames, masks = np.stack(list(movie.frames)), np.stack(list(movie.masks))
    with cached_inference(tmp_path / "cache") as cache:
        computed = cache.stats()["computed"]
        graph, _ = model.track(frames, masks, mode="greedy")
        assert cache.stats()["computed"] == computed  # validation had warmed them
    result = write_tracks(graph, masks, tmp_path / "result")
    scores = score_tracks(Path(f"{roots['val']}_GT") / "TRA", result)
    print(scores)
    assert scores["found"] + scores["missed"] == scores["links"]
    assert scores["found"] > 0.5 * scores["links"], scores
