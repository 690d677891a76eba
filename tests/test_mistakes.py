"""What people get wrong, and the exact words they get."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tifffile
import torch
import typer

from cold_trainings import make_dataset
from feature_cache import (
    Augmentations,
    CachedFeatureDataset,
    FeatureCache,
    Movie,
    MovieFeatures,
    load_backbone,
)
from feature_cache.cli import app
from feature_cache.movies import write_movie
from feature_cache.service import ReadAhead, close_all
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

WARM = "warm movie/01 --cache cache --backbone debug/random"
FRESH = "warm movie/01 --cache new --backbone debug/random"
ALL = "efficientnet-lite0, facebook/dinov2-small, facebook/dinov2-base, … ("
Arrange = Callable[[Path, pytest.MonkeyPatch], object]


class Mistake(NamedTuple):
    """What someone typed, and what came back.

    `says` is all that stands on stderr, but for progress; ``…`` in it stands for anything, and
    ``{here}`` in both for the current folder. `needs` is a package without which another is said.
    """

    name: str
    command: str
    says: str
    arrange: Arrange = lambda folder, patch: None
    status: int = 2
    needs: str = "feature_cache"


def write(name: str, text: str) -> Arrange:
    return lambda folder, _: (folder / name).write_text(text)


def draw(name: str, image: Any) -> Arrange:
    return lambda folder, _: tifffile.imwrite(folder / "movie" / name, image)


def uninstall(package: str) -> Arrange:
    return lambda _, patch: patch.setitem(sys.modules, package, None)


def remove_masks(folder: Path, _: object) -> None:
    shutil.rmtree(folder / "movie" / "01_GT")


def remove_frame(folder: Path, _: object) -> None:
    (folder / "movie" / "01" / "t005.tif").unlink()


def cut_frame(folder: Path, _: object) -> None:
    frame = folder / "movie" / "01" / "t002.tif"
    frame.write_bytes(frame.read_bytes()[:6])


def lose_the_network(_: Path, patch: pytest.MonkeyPatch) -> None:
    huggingface_hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(*_: Any, **__: Any) -> None:
        raise LocalEntryNotFoundError("nothing here\nand no network")

    patch.setattr(huggingface_hub, "hf_hub_download", download)


def refuse_to_download(_: Path, patch: pytest.MonkeyPatch) -> None:
    requests = pytest.importorskip("requests")
    pretrained = pytest.importorskip("trackastra.model.pretrained")

    def get(*_: Any, **__: Any) -> None:
        raise requests.ConnectionError("no network")

    patch.setattr(requests, "get", get)
    patch.setattr(pretrained, "user_data_dir", lambda _: "data")


def take_another_model(folder: Path, _: object) -> None:
    pytest.importorskip("timm")
    torch.save({"blocks.0.weight": torch.zeros(3)}, folder / "other.pth")


def fill_the_disk(_: Path, patch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def take_a_newer_cache(folder: Path, _: object) -> None:
    file = folder / "cache" / "zarr.json"
    meta = json.loads(file.read_text())
    meta["attributes"]["feature_cache"]["format_version"] = 99
    file.write_text(json.dumps(meta))


def share_for_reading(folder: Path, patch: pytest.MonkeyPatch) -> None:
    write_movie(folder / "movie" / "02", *make_movie(seed=2))
    patch.setattr(os, "access", lambda _, mode, **__: mode != os.W_OK)


def make_thesis(folder: Path, _: object) -> None:
    (folder / "papers").mkdir()
    (folder / "papers" / "thesis.tex").touch()


def lose_all_frames_but_one(here, monkeypatch):
    for folder in ("movie/01", "movie/01_GT/TRA"):
        for file in sorted((here / folder).glob("*.tif"))[1:]:
            file.unlink()


def lose_the_spaces(folder: Path, patch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "cache" / "spaces")
    patch.delattr("feature_cache.store.maintenance.verify")  # it would take long


HALF = np.full((48, 64), 0.5, np.float32)
SMALL = np.ones((9, 9), np.uint16)

MISTAKES = [
    Mistake(
        "no such folder",
        WARM.replace("movie/01", "movei/01"),
        "error: no movie at movei/01: no such folder",
    ),
    Mistake(
        "the folder above the movie",
        WARM.replace("movie/01", "movie"),
        "error: movie has no frames: expected images (.tif, .tiff, .png), found the folders 01, "
        "01_GT: name one, such as movie/01",
    ),
    Mistake(
        "an empty folder",
        WARM.replace("movie/01", "empty"),
        "error: empty has no frames: expected images (.tif, .tiff, .png)",
        lambda folder, _: (folder / "empty").mkdir(),
    ),
    Mistake(
        "no masks",
        WARM,
        "error: movie/01 has no masks 'TRA': looked for movie/01/TRA, movie/01_TRA, "
        "movie/01_GT/TRA; name the detection folder (detections=…, --detections), or the place of "
        "the masks (masks=…, --masks)",
        remove_masks,
    ),
    Mistake(
        "weights that are text",
        "warm movie/01 --cache cache --backbone efficientnet-lite0 --weights weights.pt",
        "error: weights.pt is no state dict that can be read safely: …",
        write("weights.pt", "text\n"),
        needs="timm",
    ),
    Mistake(
        "a dtype as others name it",
        WARM + " --dtype fp16",
        "error: unknown storage dtype 'fp16': did you mean 'float16'? Known: float16, float32",
    ),
    Mistake(
        "a device as others name it",
        WARM + " --device gpu",
        "error: no device 'gpu' here (torch knows cpu, cuda, mps and others); leave it out for the "
        "best there is, or use cpu",
    ),
    Mistake(
        "no cache",
        "ls",
        "error: missing option '--cache' (env var: 'FEATURE_CACHE_DIR'); see feature-cache ls "
        "--help",
    ),
    Mistake(
        "a pattern without quotes",
        WARM + " movie/02 --masks movie/01_GT/TRA",
        "…--masks is for one movie, and 2 are named; put a pattern in quotes,…masks: …",
    ),
    Mistake(
        "fewer frames than masks",
        WARM,
        "error: movie/01 has 5 frames and movie/01_GT/TRA has 6 masks (man_track005.tif has no "
        "frame): expected as many masks as frames; add what is missing or remove what is too many",
        remove_frame,
    ),
    Mistake(
        "a mask of another shape",
        FRESH,
        "failed: frame 2 of movie/01 TRA (t002.tif) has shape (48, 64) and its mask (9, 9): "
        "expected the same",
        draw("01_GT/TRA/man_track002.tif", SMALL),
        status=1,
    ),
    Mistake(
        "labels that are floats",
        FRESH,
        "failed: movie/01_GT/TRA/man_track002.tif holds float32 values that are no labels, such "
        "as 0.5: expected whole numbers from 0 to 2147483647; relabel the mask",
        draw("01_GT/TRA/man_track002.tif", HALF),
        status=1,
    ),
    Mistake(
        "labels below zero",
        FRESH,
        "failed: mask 2 of movie/01 TRA (man_track002.tif) has labels from -1 to -1: expected 0 "
        "to 2147483647; relabel it, with 0 as background",
        draw("01_GT/TRA/man_track002.tif", np.full((48, 64), -1, np.int16)),
        status=1,
    ),
    Mistake(
        "a corrupt image",
        FRESH,
        "failed: movie/01/t002.tif is cut short, or damaged: its header ends at byte 8, the file "
        "at 6; restore the file or leave it out",
        cut_frame,
        status=1,
    ),
    Mistake(
        "a backbone misspelled",
        WARM.replace("debug/random", "debug/randm"),
        "error: unknown backbone 'debug/randm': did you mean 'debug/random'? Known: "
        f"{ALL}… in all: see feature-cache backbones; or name it transformers/… or timm/…)",
    ),
    Mistake(
        "half of a backbone's name",
        WARM.replace("debug/random", "SAM2.1"),
        "error: unknown backbone 'SAM2.1': did you mean 'facebook/sam2.1-hiera-tiny'? Known: "
        f"{ALL}… in all: see feature-cache backbones; or name it transformers/… or timm/…)",
    ),
    Mistake(
        "a pooling misspelled",
        f"{WARM} --pooling mean_patch_exact",
        "error: unknown pooling 'mean_patch_exact': did you mean 'mean_patches_exact'? Known: "
        "nearest_patch, mean_patches_exact, max_patches_exact, median_patches_exact, "
        "mean_patches_bbox, max_patches_bbox, median_patches_bbox",
    ),
    Mistake(
        "a policy misspelled",
        f"{WARM} --copies 2 --policy flip",
        "error: unknown policy 'flip': did you mean 'flips'? Known: none, flips, geometric, "
        "intensity, default",
    ),
    Mistake(
        "a dtype misspelled",
        f"{WARM} --dtype float61",
        "error: unknown storage dtype 'float61': did you mean 'float16'? Known: float16, float32",
    ),
    Mistake(
        "a codec misspelled",
        f"{WARM} --codec ztsd",
        "error: unknown codec 'ztsd': did you mean 'zstd'? Known: raw, zstd, blosc",
    ),
    Mistake(
        "a command misspelled",
        "wram movie/01",
        "error: no such command 'wram'. Did you mean 'warm'?; see feature-cache --help",
    ),
    Mistake(
        "an extra that is not installed",
        "warm movie/01 --cache cache --backbone timm/convnext_atto --weights random:0",
        "error: the backbone 'timm/convnext_atto' needs the package 'timm'; install it with: "
        'pip install "feature-cache[timm]"',
        uninstall("timm"),
    ),
    Mistake(
        "no weights and no network",
        "warm movie/01 --cache cache --backbone facebook/sam2.1-hiera-tiny",
        "error: no weights: sam2.1_hiera_tiny.pt of facebook/sam2.1-hiera-tiny is not in the hub's "
        "cache on this machine (…), and the hub can't be reached; where there is a network: "
        "hf download facebook/sam2.1-hiera-tiny sam2.1_hiera_tiny.pt; or pass weights=<path of a "
        "checkpoint> (--weights)",
        lose_the_network,
    ),
    Mistake(
        "weights of another architecture",
        "warm movie/01 --cache cache --backbone timm/vit_tiny_patch16_224 --weights other.pth",
        "error: other.pth does not fit timm/vit_tiny_patch16_224: Error(s) in loading state_dict "
        "for VisionTransformer: Missing key(s) in state_dict: …; name a checkpoint of this model",
        take_another_model,
    ),
    Mistake(
        "a device that is not there",
        f"{WARM} --device cuda:99",
        "error: no device 'cuda:99' here (…); leave it out for the best there is, or use cpu",
    ),
    Mistake(
        "a full disk",
        FRESH,
        "error: can't write in {here}/new: No space left on device; free some space or name "
        "another folder. What was committed before is untouched",
        fill_the_disk,
    ),
    Mistake(
        "a cache of a newer version",
        "ls --cache cache",
        "error: {here}/cache has format version 99, this feature_cache reads up to 4: upgrade "
        "feature-cache, or name another folder",
        take_a_newer_cache,
    ),
    Mistake(
        "a folder that is no cache",
        "ls --cache papers",
        "error: {here}/papers is not a feature cache (it holds 'thesis.tex'); name another folder",
        make_thesis,
    ),
    Mistake(
        "a shared cache that can only be read",
        WARM.replace("movie/01", "movie/02"),
        "error: 6 records, first of movie/02 TRA, are not in FeatureCache('{here}/cache', "
        "mode='r'), which can only be read: warm it where you may write",
        share_for_reading,
    ),
    Mistake(
        "a size that is none",
        f"{WARM} --max-size 5gigs",
        "error: '--max-size': '5gigs' is no size: expected such as 500M, 100G or 1.5T",
    ),
    Mistake(
        "an age that is none",
        "gc --cache cache --older-than 30",
        "error: '--older-than': '30' is no age: expected such as 12h, 30d or 8w",
    ),
    Mistake(
        "a frame beyond the movie",
        f"{WARM.replace('warm', 'explain')} --frame 99",
        "error: movie/01 has no frame 99: expected 0 to 5",
    ),
    Mistake(
        "an unknown key in a list",
        WARM.replace("movie/01", "list.yaml"),
        "error: list.yaml, the entry of movie/01: unknown key 'downscale': did you mean "
        "'downscale_temporal'? Known: path, detections, masks, channel, axes, slice_pct, "
        "downscale_temporal, downscale_spatial",
        write("list.yaml", "- path: movie/01\n  downscale: 2\n"),
    ),
    Mistake(
        "a list that is no YAML",
        WARM.replace("movie/01", "list.yaml"),
        "error: list.yaml is no YAML: line 3: expected ',' or ']', but got '<stream end>'",
        write("list.yaml", "- path: [movie/01\n- movie/02\n"),
    ),
    Mistake(
        "a list that is not there",
        WARM.replace("movie/01", "list.yaml"),
        "error: can't read the list of movies list.yaml: no such file",
    ),
    Mistake(
        "a part of a movie that is none",
        WARM.replace("movie/01", "list.yaml"),
        "error: movie/01: slice_pct is (0.5, 0.2), expected 0 <= from < to <= 1",
        write("list.yaml", "- path: movie/01\n  slice_pct: [0.5, 0.2]\n"),
    ),
    Mistake(
        "a URL without a scheme",
        f"{FRESH} --push bucket/features",
        "error: unknown kind of remote 'bucket/features': Known: s3://, gs://, az://, "
        "hf://datasets/, file:///absolute/path, https:// or http:// (as a layer)",
    ),
    Mistake(
        "a web server to send to",
        f"{FRESH} --push https://nowhere.invalid/features",
        "error: can't write to https://nowhere.invalid/features: …--layer…, and send to s3://, …",
        needs="obstore",
    ),
    Mistake(
        "a remote without its extra",
        "pull s3://bucket/features --cache cache",
        "error: the remote s3://bucket/features needs the package 'obstore'; install it with: "
        "pip install 'feature-cache[remote]'",
        uninstall("obstore"),
    ),
    Mistake(
        "a remote that is not there",
        "pull file:///nowhere/at/all --cache cache",
        "error: there is no feature cache at file:///nowhere/at/all; check the address",
        needs="obstore",
    ),
    Mistake(
        "stored grids where there are none",
        "warm movie/01 --cache cache --from-grids",
        "error: {here}/cache holds no grids in float32 (it holds: debug/random "
        "mean_patches_exact float16): warm with --dense original or all first",
    ),
    Mistake(
        "no backbone",
        "warm movie/01 --cache cache",
        "error: name a --backbone, or pool --from-grids",
    ),
    Mistake(
        "a cache below a file",
        FRESH.replace("new", "movie/01/t000.tif/new"),
        "error: can't make {here}/movie/01/t000.tif/new: {here}/movie/01/t000.tif is a "
        "file; name another folder",
    ),
    Mistake(
        "a remote below a file",
        "push file://{here}/movie/01/t000.tif/new --cache cache",
        "error: can't make {here}/movie/01/t000.tif/new: {here}/movie/01/t000.tif is a "
        "file; name another folder",
        needs="obstore",
    ),
    Mistake(
        "a channel that can't be",
        f"{WARM} --channel -1",
        "error: '--channel'…-1…",  # and typer's words, which differ by its version
    ),
    Mistake(
        "a number that is none",
        f"{WARM} --copies few",
        "error: '--copies'…few…",
    ),
    Mistake(
        "a channel that is not there",
        f"{FRESH} --channel 3",
        "failed: movie/01/t000.tif has no channel 3: expected one of its 1, counted from 0 (axes "
        "YX, shape (48, 64)); and 5 more alike, up to frame 5 of movie/01 TRA (t005.tif)",
    ),
    Mistake(
        "an option that is like none",
        WARM.replace("random", "random?channel=3"),
        "error: unknown option of debug/random 'channel': Known: weights, dtype, tile, halo, "
        "stride",
    ),
    Mistake(
        "a model that can't be fetched",
        "track movie/01 --cache cache --model general_2d",
        "error: Trackastra's model general_2d is not on this machine, and can't be fetched from "
        "https://…/general_2d.zip: is there a network? (ConnectionError)",
        refuse_to_download,
        needs="trackastra",
    ),
    Mistake(
        "a plan for a folder that is no cache",
        f"{FRESH.replace('new', 'papers')} --plan",
        "error: {here}/papers is not a feature cache (it holds 'thesis.tex'); name another folder",
        make_thesis,
    ),
    Mistake(
        "a space that is not there",
        "verify --cache cache --space zz",
        "error: no space begins with 'zz'; there are: debug-random-mean_patches_exact-float16-…",
    ),
    Mistake(
        "a space that is not where it is pulled from",
        "pull file://{here}/cache --cache new --space zz",
        "error: no space begins with 'zz'; there are: debug-random-mean_patches_exact-float16-…",
        needs="obstore",
    ),
    Mistake(
        "a report of a damaged cache",
        "report page.html --cache cache --verify",
        "1 problem found: see the page, or run feature-cache verify",
        lambda folder, _: (folder / "cache" / "CACHEDIR.TAG").unlink(),
        status=0,
    ),
    Mistake(
        "a training's key misspelled",
        "train train.yaml",
        "error: train.yaml: unknown key 'input_trian': did you mean 'input_train'? Known: … in "
        "all: see feature-cache train --help)",
        write("train.yaml", "input_trian: [movie/01]\nname: hela\n"),
        needs="trackastra_pretrained_feats",
    ),
    Mistake(
        "a training's key misspelled, to warm",
        "warm train.yaml --cache cache",
        "error: train.yaml: unknown key 'pretrained_n_aug': did you mean 'pretrained_n_augs'? "
        "Known: … in all: see feature-cache train --help)",
        write("train.yaml", "input_train: [movie/01]\npretrained_n_aug: 9\n"),
    ),
    Mistake(
        "a training's value that is none",
        "warm train.yaml --cache cache",
        "error: train.yaml: --features: unknown value 'pretrained_feat': did you mean "
        "'pretrained_feats'? Known: none, …",
        write("train.yaml", "input_train: [movie/01]\nfeatures: pretrained_feat\n"),
    ),
    Mistake(
        "a training's switch that is neither",
        "warm train.yaml --cache cache",
        "error: train.yaml: --warm: 'maybe': expected true or false",
        write("train.yaml", "input_train: [movie/01]\nwarm: maybe\n"),
    ),
    Mistake(
        "a training's option misspelled",
        "train --epocs 3",
        "error: unknown option 'epocs': did you mean 'epochs'? Known: … in all: see feature-cache "
        "train --help)",
        needs="trackastra_pretrained_feats",
    ),
    Mistake(
        "a training that is not there",
        "train train.yaml",
        "error: can't read train.yaml: No such file or directory",
        needs="trackastra_pretrained_feats",
    ),
    Mistake(
        "a training to warm that is not there",
        "warm train.yml --cache cache",
        "error: no such file: train.yml",
    ),
    Mistake(
        "a movie in place of a training",
        "train movie/01",
        "error: movie/01 is a folder: expected a configuration in YAML, which names movies "
        "(input_train, input_val)",
        needs="trackastra_pretrained_feats",
    ),
    Mistake(
        "a training without movies",
        "train train.yaml --train-samples 9",
        "error: no movies in input_train: name at least one, in the configuration (input_train: "
        "[data/01]) or as --input_train data/01",
        write("train.yaml", "input_val: [movie/01]\n"),
        needs="trackastra_pretrained_feats",
    ),
    Mistake(
        "a model that is not there",
        "track movie/01 --cache cache --model runs/hela",
        "error: no model at runs/hela: expected the folder of a training, such as runs/hela, or "
        "one of Trackastra's own: …general_2d…",
        needs="trackastra",
    ),
    Mistake(
        "a folder that is no model",
        "track movie/01 --cache cache --model movie",
        "error: movie is no model: it has no config.yaml; name the folder that a training wrote",
        needs="trackastra",
    ),
    Mistake(
        "a movie of one frame to track",
        "track movie/01 --cache cache --model movie",
        "error: movie/01 TRA has 1 frame: expected 2 or more, to link cells",
        lose_all_frames_but_one,
        needs="trackastra",
    ),
    Mistake(
        "a mode of linking misspelled",
        "track movie/01 --cache cache --model movie --mode gredy",
        "error: unknown mode 'gredy': did you mean 'greedy'? Known: greedy, greedy_nodiv, ilp",
        needs="trackastra",
    ),
    Mistake(
        "a device that Trackastra has no word for",
        "track movie/01 --cache cache --model movie --device cuda:1",
        "error: unknown device 'cuda:1': did you mean 'cuda'? Known: cuda, mps, cpu, automatic",
        needs="trackastra",
    ),
    Mistake(
        "a cache to verify that is not there",
        "verify --cache cahce",
        "error: {here}/cahce does not exist; name the folder of a feature cache",
    ),
    *(
        Mistake(
            f"nothing {what}",
            command,
            f"error: '{name}': is empty: expected the beginning of a name",
        )
        for what, command, name in (
            ("to let go of", "gc --cache cache --max-size 0 --yes --space ''", "--space"),
            ("to pin", "pin '' --cache cache", "[WHAT]"),
            ("to inspect", "inspect '' --cache cache", "WHAT"),
        )
    ),
    Mistake(
        "weights to verify nothing with",
        "verify --cache cache --weights random:0",
        "error: --weights does nothing without --recompute: give both, or none",
    ),
    Mistake(
        "a backbone of which nothing is drawn",
        "report page.html --cache cache --backbone debug/random",
        "error: --backbone does nothing without --movie: give both, or none",
    ),
    Mistake(
        "a policy of no copies",
        f"{WARM} --policy flips",
        "error: --policy does nothing without --copies: give both, or none",
    ),
    Mistake(
        "a log that can't be written",
        f"{WARM} --log movie",
        "error: can't write the log movie: Is a directory",
    ),
    Mistake(
        "a report that does not know whose features to draw",
        "report page.html --cache cache --movie movie/01 --verify",
        "error: name a --backbone; stored: none",
        lose_the_spaces,
    ),
]


@pytest.fixture(scope="module")
def warmed(tmp_path_factory):
    """A folder with a movie and a cache that has its features."""
    folder = tmp_path_factory.mktemp("mistakes")
    write_movie(str(folder / "movie" / "01"), *make_movie())
    movie = Movie.open(folder / "movie" / "01")
    backbone = load_backbone("debug/random")
    FeatureCache(folder / "cache").get_or_compute(
        movie.frames, movie.masks, backbone, pooling="mean_patches_exact"
    )
    return folder


@pytest.fixture
def here(warmed, tmp_path, monkeypatch):
    """A copy of it, which is the current folder."""
    shutil.copytree(warmed, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "500")
    return tmp_path


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_command_line_says_what_to_do(run, here, monkeypatch, mistake):
    pytest.importorskip(mistake.needs)
    mistake.arrange(here, monkeypatch)
    status, _, err = run(*shlex.split(mistake.command.replace("{here}", str(here))))
    assert_says(without_progress(err), mistake.says, here)
    assert status == mistake.status


@pytest.mark.parametrize(
    "command",
    [
        f"{FRESH} --report nowhere/out",
        f"{FRESH.replace('warm', 'evaluate')} --page nowhere/out",
        "report nowhere/out --cache new --verify",
        "show movie/01 --cache new --frame 3 --output nowhere/out",
        "track movie/01 --cache new --model general_2d --output empty/out",
        f"report {'long' * 99} --cache new --verify",
        f"track movie/01 --cache new --model general_2d --output {'long' * 99}",
    ],
)
def test_what_cant_be_written_at_the_end_is_said_before_anything_is_done(run, here, command):
    if command.startswith("track"):
        pytest.importorskip("trackastra")
    (here / "empty").touch()
    status, _, err = run(*command.split())
    assert re.fullmatch(r"error: can't write ((nowhere|empty)/out|(long)+): \w+.*\n", err)
    assert status == 2
    assert not (here / "new").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--cache cache --seed x train.py", "error: '--seed'…'x'…"),
        (
            "train.py",
            "error: missing option '--cache' (env var: 'FEATURE_CACHE_DIR'); see python …",
        ),
        ("--cache cache trian.py", "error: trian.py is neither a file nor the command of an …"),
    ],
)
def test_what_runs_a_script_says_it_in_one_line(here, monkeypatch, capsys, words, says):
    pytest.importorskip("trackastra")
    from feature_cache.trackastra import run as running

    monkeypatch.setattr(sys, "argv", ["run", *words.split()])
    with pytest.raises(SystemExit) as ended:
        running.main()
    assert ended.value.code == 2
    assert_says(capsys.readouterr().err.strip(), says, here)


def test_trying_whether_a_link_can_be_written_to_leaves_it_there(run, here):
    (here / "page.html").symlink_to("elsewhere.html")
    assert run("report", "page.html", "--cache", "cache")[0] == 0
    assert (here / "page.html").is_symlink()
    assert "Coverage" in (here / "elsewhere.html").read_text()


def test_a_training_that_cant_write_its_model_says_so_first(here, capsys):
    pytest.importorskip("trackastra_pretrained_feats")
    from feature_cache.trackastra import train as training

    (here / "empty").touch()
    (here / "train.yaml").write_text("input_train: [movie/01]\ninput_val: [movie/01]\n")
    options = ["--cache", "new", "--outdir", "empty", "--name", "out", "--timestamp", "false"]
    with pytest.raises(SystemExit) as ended:
        training.main(["train.yaml", *options], "train")
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: can't write empty/out: Not a directory\n"


@pytest.mark.slow
def test_each_misspelt_option_and_command_is_one_line_with_what_was_meant(run):
    for name, command in typer.main.get_command(app).commands.items():
        status, _, err = run(f"{name}x")
        assert (status, err.count("\n")) == (2, 1)
        assert f"Did you mean {name!r}" in err
        options = [one for param in command.params for one in param.opts if one[:2] == "--"]
        for option in options if name != "train" else ():  # which passes on what it doesn't know
            status, _, err = run(name, f"{option[:3]}{option[4:]}")
            assert (status, err.count("\n")) == (2, 1), err
            assert option in err or f"{option[:3]}{option[4:]}" in options, err


def without_progress(err: str) -> str:
    """Leave out progress."""
    lines = [line.strip() for line in err.splitlines()]
    progress = re.compile(r"(hashing|computing|verifying|sending): |$")
    return "\n".join(line for line in lines if not progress.match(line))


def assert_says(found: str, expected: str, here: Path) -> None:
    pattern = re.escape(expected.replace("{here}", str(here))).replace("…", ".+")
    assert re.fullmatch(pattern, found), f"\nfound:    {found}\nexpected: {expected}"


# In Python


def ask_for_what_is_missing() -> None:
    frames, masks, _ = make_movie(seed=5)
    backbone = load_backbone("debug/random")
    FeatureCache("cache", "r").get_or_compute(frames, masks, backbone, pooling="mean_patches_exact")


def give_masks_of(dtype: type, value: float) -> None:
    frames, masks, _ = make_movie()
    wrong = np.full(masks.shape, value, dtype)
    backbone = load_backbone("debug/random")
    FeatureCache("cache").get_or_compute(frames, wrong, backbone, pooling="mean_patches_exact")


def ask_for(frames: Any, masks: Any) -> None:
    FeatureCache("cache").get_or_compute(frames, masks, load_backbone("debug/random"))


def bind(**options: Any) -> MovieFeatures:
    return FeatureCache("cache").movie(*make_movie()[:2], FakeBackbone(), **options)


def load_training_data(root: Any, **options: Any) -> None:
    pytest.importorskip("trackastra")
    from feature_cache.trackastra import load_ctc

    load_ctc(root, "cache", **options)


def make_data_module(movies: Any = ("movie/01",), **changed: Any) -> None:
    pytest.importorskip("trackastra")
    from feature_cache.trackastra import CachedDataModule

    options: dict[str, Any] = {
        "dataset_kwargs": {},
        "sampler_kwargs": {"batch_size": 2},
        "loader_kwargs": {"batch_size": 2},
        **changed,
    }
    CachedDataModule(movies, movies, None, 0, False, cache=None, backbone=None, **options)


def ask_a_server_that_is_gone() -> None:
    dataset = pickle.loads(pickle.dumps(make_dataset("cache")))
    close_all()
    dataset[0]


def wrap_detections_that_are_not_there() -> None:
    trackastra_data = pytest.importorskip("trackastra.data")
    from feature_cache.trackastra import wrap

    data = trackastra_data.CTCData("movie/01", window_size=3, detection_folders=["SEG"])
    wrap(data, "cache", FakeBackbone())


def wrap_without_pooling() -> None:
    pytest.importorskip("trackastra")
    from feature_cache.trackastra import wrap

    wrap("not looked at", "cache", FakeBackbone(), pooling=None)  # type: ignore[arg-type]


def load_volumes_as_images() -> None:
    frames, masks, tracks = make_movie()
    write_movie("volumes/01", *(np.stack([one] * 2, 1) for one in (frames, masks)), tracks)
    load_training_data("volumes/01")


def call_channels_slices() -> None:
    tifffile.imwrite("frames.tif", np.zeros((6, 2, 40, 50), np.uint8), metadata={"axes": "TCYX"})
    tifffile.imwrite("masks.tif", np.ones((6, 40, 50), np.uint8))
    ask_for(Movie.open("frames.tif", "masks.tif", axes="TZYX"), None)


def make_a_model_of_unknown_properties() -> None:
    pytest.importorskip("trackastra")
    from feature_cache.trackastra import make_model

    make_model(additional_props="regionprops9")


def score(result: str) -> None:
    pytest.importorskip("traccuracy")
    from feature_cache.trackastra import score_tracks

    score_tracks("movie/01_GT/TRA", result)


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        (
            ask_for_what_is_missing,
            "MissingRecordError: 6 records, first frame 0, are not in "
            "FeatureCache('{here}/cache', mode='r'), which can only be read: warm it where you "
            "may write",
        ),
        (
            lambda: give_masks_of(np.float32, 0.5),
            "FrameTypeError: mask 0 has dtype float32: expected integer labels; whole numbers "
            "become such by .astype(int); and 5 other frames failed",
        ),
        (
            lambda: give_masks_of(np.int16, -1),
            "FrameError: mask 0 has labels from -1 to -1: expected 0 to 2147483647; relabel it, "
            "with 0 as background; and 5 other frames failed",
        ),
        (
            lambda: FeatureCache("cache").movie(*make_movie()[:2], "efficientnet-lite0"),
            "TypeError: backbone is the name 'efficientnet-lite0': expected a backbone; load it "
            "once, by load_backbone('efficientnet-lite0')",
        ),
        (
            lambda: FeatureCache("cache").movie(make_movie()[0], FakeBackbone(), make_movie()[1]),
            "TypeError: backbone is a ndarray: expected a backbone, which has spec and embed; "
            "pass frames, masks and backbone in this order",
        ),
        (
            lambda: FeatureCache("cache").movie(*make_movie()[:2], FakeBackbone),  # type: ignore[arg-type]
            "TypeError: backbone is the class FakeBackbone: expected a backbone; make an instance "
            "of it, FakeBackbone(…)",
        ),
        (
            lambda: FeatureCache("cache").movie(*make_movie()[:2], torch.nn.Identity()),  # type: ignore[arg-type]
            "TypeError: backbone is a Identity: expected a backbone, which has spec and embed; …",
        ),
        (
            lambda: FeatureCache(None),
            "TypeError: root is a NoneType: expected a folder, such as 'features'",
        ),
        (
            lambda: ask_for(np.zeros((40, 50)), np.zeros((40, 50), int)),
            "FrameError: frames has shape (40, 50), one image: expected (T, H, W) or (T, Z, H, W); "
            "pass frames[None] for a movie of one",
        ),
        (
            lambda: ask_for(np.zeros((2, 40, 50, 3)), np.zeros((2, 40, 50), int)),
            "FrameError: frames has shape (2, 40, 50, 3), whose last axis looks like channels: a "
            "frame has one, and no axis for it: pass frames[..., 0]",
        ),
        (
            lambda: ask_for(np.zeros((1, 40, 50)), 7),
            "FrameTypeError: masks is a int: pass an array (T, H, W), or a list of images",
        ),
        (
            lambda: ask_for(["t000.tif"], np.zeros((1, 40, 50), int)),
            "MovieError: can't read t000.tif: No such file or directory; restore the file or leave "
            "it out",
        ),
        (
            lambda: CachedFeatureDataset([], ["b/png"]),  # type: ignore[arg-type, list-item]
            "TypeError: movies[0] is a str: expected a list of what FeatureCache.movie gives, …",
        ),
        (
            lambda: CachedFeatureDataset([], FeatureCache("cache")),
            "TypeError: movies is a FeatureCache: expected a list of what FeatureCache.movie "
            "gives, such as [cache.movie(frames, masks, backbone)]",
        ),
        (
            lambda: Augmentations("flips", copies=3).draw(9),
            "DrawError: copy is 9: expected an integer from 0 to 3",
        ),
        (
            lambda: FeatureCache("cache", layers="shared"),  # type: ignore[arg-type]
            "TypeError: layers is 'shared': expected a list of folders and URLs, such as "
            "['shared']",
        ),
        (
            lambda: load_backbone(Path("debug/random")),  # type: ignore[arg-type]
            "TypeError: name is a PosixPath: expected a backbone's name, such as "
            "'efficientnet-lite0'",
        ),
        (
            lambda: load_backbone("debug/random", stride=float("nan")),
            "BackboneError: option stride=nan of debug/random: expected a whole number, such as 8",
        ),
        (
            lambda: load_backbone("efficientnet-lite0", 3),  # type: ignore[arg-type]
            "BackboneError: option weights=3 of efficientnet-lite0: expected a text",
        ),
        (
            lambda: load_backbone("efficientnet-lite0", layer=["stride-8"]),
            "UnknownNameError: unknown layer of efficientnet-lite0 \"['stride-8']\": did you mean "
            "'stride-8'? Known: stride-4, stride-8, stride-16, stride-32",
        ),
        (
            lambda: bind(pooling=["nearest_patch"]),
            "TypeError: pooling is ['nearest_patch']: expected one name, such as "
            "'mean_patches_exact'; several in one run are for plan_warm",
        ),
        (
            lambda: bind(pooling="mean"),
            "UnknownNameError: unknown pooling 'mean': did you mean 'mean_patches_exact'? …",
        ),
        (
            lambda: Movie.open(*make_movie()[:2]),
            "TypeError: path is a ndarray: expected a path; images in memory go to "
            "FeatureCache.movie or get_or_compute as they are, or to Movie.of(frames, masks)",
        ),
        (
            lambda: Movie.open("movie/01", make_movie()[1]),
            "TypeError: masks is a ndarray: expected a path; …",
        ),
        (
            lambda: ask_for([Movie.open("movie/01")], None),
            "FrameTypeError: frames[0] is a Movie: expected an image (H, W) or (Z, H, W); a movie "
            "is passed by itself, not in a list",
        ),
        (
            lambda: ask_for([Movie.open("movie/01").frames], [Movie.open("movie/01").masks]),
            "FrameTypeError: frames[0] is a Series: expected an image …",
        ),
        (
            lambda: ask_for(np.zeros((1, 2, 40, 50)), np.zeros((1, 40, 50), int)),
            "MovieError: frame 0 has shape (2, 40, 50) and its mask (40, 50): expected the same; "
            "if these are 2 channels, a frame has one: of an array pass frames[:, 0], of a file "
            "say axes='TCYX' and channel=0 (--axes TCYX --channel 0)",
        ),
        (
            call_channels_slices,
            "MovieError: frame 0 of frames.tif masks.tif (frames.tif[0]) has shape (2, 40, 50) and "
            "its mask (40, 50): expected the same; …axes='TCYX' and channel=0…",
        ),
        (
            lambda: FeatureCache("cache").gc(max_bytes="100G"),  # type: ignore[arg-type]
            "TypeError: max_bytes is '100G': expected a number, such as 100 * 10**9 for 100 GB",
        ),
        (
            lambda: FeatureCache("cache").gc(max_age_seconds="30d"),  # type: ignore[arg-type]
            "TypeError: max_age_seconds is '30d': expected a number, such as 30 * 86400 for …",
        ),
        (
            lambda: FeatureCache("cache").push("folder"),
            "UnknownNameError: unknown kind of remote 'folder': Known: …file:///absolute/path, …",
        ),
        (
            lambda: FeatureCache("cache").push(Path("cache")),  # type: ignore[arg-type]
            "StoreError: cache is a folder in the place of a URL: write file://{here}/cache",
        ),
        (
            lambda: FeatureCache("cache").push(None),  # type: ignore[arg-type]
            "TypeError: url is a NoneType: expected such as 's3://bucket/prefix'",
        ),
        (
            lambda: next(iter(ReadAhead([3, 1], make_dataset("cache")))),  # type: ignore[list-item]
            "TypeError: batch_sampler gives the index 3: expected batches, each a list of indices; "
            "put the sampler in torch's BatchSampler(sampler, batch_size, drop_last)",
        ),
        (
            lambda: bind().get_or_compute(2),  # type: ignore[arg-type]
            "TypeError: indices is 2: expected a list of frames' numbers, such as [0, 1]",
        ),
        (
            lambda: bind().with_draw("flip"),  # type: ignore[arg-type]
            "DrawError: draw is a str: expected a Draw, such as Augmentations().draw(1)",
        ),
        (
            lambda: bind().explain("flips", 1),  # type: ignore[arg-type]
            "DrawError: augmentations is a str: expected Augmentations, such as "
            "Augmentations('flips', copies=3)",
        ),
        (
            lambda: CachedFeatureDataset([(1, 2)], [bind()])[0],  # type: ignore[arg-type]
            "TypeError: sample 0 is a tuple: expected a dict with timepoints and labels",
        ),
        (
            lambda: CachedFeatureDataset([{}], [bind()] * 2, lambda _: 7)[0],  # type: ignore[arg-type]
            "ValueError: movie_of(0) is 7: expected 0 to 1",
        ),
        (
            lambda: CachedFeatureDataset([{}], []),  # type: ignore[arg-type]
            "ValueError: movies is empty: expected what FeatureCache.movie gives, of each",
        ),
        (
            lambda: load_training_data("movie/03"),
            "MovieNotFoundError: no movie at movie/03: no such folder",
        ),
        (
            lambda: load_training_data("movie"),
            "NoMasksError: movie has no ground truth: looked for movie_GT/TRA and movie/TRA; put …",
        ),
        (
            lambda: load_training_data("movie/01", use_gt=False, detection_folders=["SEG"]),
            "NoMasksError: movie/01 has no masks 'SEG': looked for movie/01/SEG, …",
        ),
        (
            load_volumes_as_images,
            "MovieError: volumes/01 has images of shape (2, 48, 64): expected (H, W), as ndim is "
            "2; for a movie of volumes pass ndim=3",
        ),
        (
            wrap_without_pooling,
            "FrameError: pooling is None, and whole grids have no rows for labels: choose a "
            "pooling, such as 'mean_patches_exact'",
        ),
        (
            lambda: load_training_data(["movie/01"]),
            "TypeError: root is a list: expected one movie's folder",
        ),
        *(
            (partial(load_training_data, "movie/01", **{name: value}), says)
            for name, value, says in (
                (
                    "window_size",
                    1,
                    "ValueError: window_size is 1: expected a whole number from 2 …",
                ),
                (
                    "slice_pct",
                    0.5,
                    "ValueError: slice_pct is 0.5: expected two numbers with 0 <= …",
                ),
                ("crop_size", (9, 9, 9), "ValueError: crop_size is (9, 9, 9): expected a whole …"),
                (
                    "detection_folders",
                    "TRA",
                    "ValueError: detection_folders is 'TRA': expected a …",
                ),
                ("downscale_spatial", 0, "ValueError: downscale_spatial is 0: expected a whole …"),
                ("augment", 4, "ValueError: augment is 4: expected a level from 0 to 3"),
                ("features", "pos", "UnknownNameError: unknown features of 2D movies 'pos': …"),
                ("windowsize", 3, "UnknownNameError: …'windowsize': did you mean 'window_size'? …"),
                ("slice_pct", (0, 0.1), "MovieError: …TRA has 6 frames, and none of them is in …"),
            )
        ),
        (
            lambda: make_data_module(dataset_kwargs=None),
            "TypeError: dataset_kwargs is None: expected a dict, such as {}",
        ),
        (
            lambda: make_data_module(dataset_kwargs={"window_size": "4"}),
            "ValueError: window_size is '4': expected a whole number from 2 on",
        ),
        (
            lambda: make_data_module(dataset_kwargs={"windowsize": 4}),
            "UnknownNameError: …option of CTCData 'windowsize': did you mean 'window_size'? …",
        ),
        (
            lambda: make_data_module(loader_kwargs={}),
            "ValueError: batch_size is 2 in sampler_kwargs and None in loader_kwargs: expected the "
            "same number in both",
        ),
        (
            lambda: make_data_module(seed="a"),
            "TypeError: seed is 'a': expected a whole number, or None",
        ),
        (
            lambda: make_data_module("movie/01"),
            "ValueError: input_train is 'movie/01': expected a list of movies' folders",
        ),
        (
            ask_a_server_that_is_gone,
            "MissingRecordError: 4 records, first frame 0 of movie, are not in "
            "FeatureCache('{here}/cache', mode='a'), and no process on this host serves fake for "
            "it (this is a process without it): warm the cache first (feature-cache warm, or "
            "warm() of the dataset), start feature-cache serve, or make the dataset in the "
            "process that runs the DataLoader",
        ),
        (
            wrap_detections_that_are_not_there,
            "NoMasksError: movie/01 has no masks 'SEG': looked for movie/01/SEG, movie/01_SEG, "
            "movie/01_GT/SEG; name the detection folder (detection_folders)",
        ),
        (
            make_a_model_of_unknown_properties,
            "UnknownNameError: unknown additional_props 'regionprops9': did you mean "
            "'regionprops'? Known: regionprops_small, regionprops, regionprops2",
        ),
        (
            lambda: score("result"),
            "MovieNotFoundError: no tracks at result: no such folder",
        ),
        (
            lambda: score("movie/01_GT"),
            "MovieError: movie/01_GT has 0 masks from frame 0 on and 0 files named *_track.txt: "
            "expected some, and one; did you mean movie/01_GT/TRA?",
        ),
    ],
)
def test_python_says_what_to_do(here, mistake, says):
    with pytest.raises(Exception) as caught:  # noqa: PT011 - its name is compared
        mistake()
    assert_says(f"{caught.type.__name__}: {caught.value}", says, here)
