"""Training data that is kept in the cache: what `load_ctc` gives is what `CTCData` gives."""

from __future__ import annotations

import json
import pickle
import random
import re
import shutil
from pathlib import Path

import networkx as nx
import numpy as np
import pandas as pd
import pytest
import tifffile
import torch
import yaml
from joblib import parallel_config
from trackastra.data import CTCData
from typer.testing import CliRunner

from feature_cache import FeatureCache, FrameError, MovieError
from feature_cache.cli import app
from feature_cache.memo import no_memo
from feature_cache.movies import write_movie
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import load_ctc, wrap
from synthetic import make_movie

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`RegionProperties.mean_intensity`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame.drop"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


DRAWN = ("_rng", "_M")  # what upstream's augmentation keeps of its last draw


def write(root: Path, *, depth: int = 0, seed: int = 0, frames: int = 7) -> Path:
    """Write a movie with a division, a cell that comes and one that goes, and two detections."""
    images, masks, tracks = make_movie(frames=frames, height=40, width=56, cells=4, seed=seed)
    for mask in masks[3:]:  # a cell divides into halves
        middle = np.mean(np.nonzero(mask == 1)[1])
        mask[mask == 1] = 11
        mask[(mask == 11) & (np.arange(mask.shape[1]) > middle)] = 12
    masks[:2][masks[:2] == 2] = 0
    masks[5:][masks[5:] == 3] = 0
    last = frames - 1
    tracks = np.array(
        [[1, 0, 2, 0], [2, 2, last, 0], [3, 0, 4, 0], [4, 0, last, 0], [11, 3, last, 1],
         [12, 3, last, 1]]
    )  # fmt: skip
    if depth:
        images, masks = (np.repeat(a[:, None], depth, axis=1) for a in (images, masks))
    write_movie(root, images, masks, tracks)
    other = np.where(masks == 4, 0, masks) * 3
    (Path(f"{root}_ERR_SEG")).mkdir()
    for t, mask in enumerate(other):
        tifffile.imwrite(
            f"{root}_ERR_SEG/mask{t:03}.tif", mask.astype(np.uint16), photometric="minisblack"
        )
    return root


def plain(root: Path, **options):
    with parallel_config(backend="sequential"):
        return CTCData(str(root), **options)


def kept(root: Path, cache, **options):
    with parallel_config(backend="sequential"):
        return load_ctc(root, cache, **options)


def same(one, other, where: str = "") -> None:
    """Compare anything that a `CTCData` holds, bit by bit."""
    one, other = (x.decompress() if hasattr(x, "decompress") else x for x in (one, other))
    assert type(one) is type(other), where
    if type(one).__module__.startswith("trackastra"):
        one, other = ({k: v for k, v in vars(x).items() if k not in DRAWN} for x in (one, other))
    if isinstance(one, dict):
        assert list(one) == list(other), where
        for name in one:
            same(one[name], other[name], f"{where}.{name}")
    elif isinstance(one, list | tuple):
        same(dict(enumerate(one)), dict(enumerate(other)), where)
    elif isinstance(one, np.ndarray | torch.Tensor):
        assert one.dtype == other.dtype, where
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other), where)
    elif isinstance(one, pd.DataFrame):
        pd.testing.assert_frame_equal(one, other)
    elif isinstance(one, nx.DiGraph):
        assert [list(one), list(one.edges)] == [list(other), list(other.edges)], where
    else:
        assert one == other, where


def seed_all(data, seed: int) -> None:
    """Seed all that upstream draws from."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    parts = [data.cropper, *getattr(data.augmenter, "augmentations", [])]
    for part in parts:
        if hasattr(part, "_rng"):
            part._rng = np.random.RandomState(seed)


def check_same(root: Path, cache: FeatureCache, options: dict) -> None:
    upstream = plain(root, **options)
    for time in ("built", "opened"):
        data = kept(root, cache, **options)
        assert type(data) is CTCData
        assert set(vars(data)) == set(vars(upstream))
        same(vars(upstream), {name: vars(data)[name] for name in vars(upstream)}, time)
        for n in range(len(upstream)):
            samples = []
            for one in (upstream, data, pickle.loads(pickle.dumps(data))):
                seed_all(one, n)
                samples.append(one[n])
            same(samples[0], samples[1], f"sample {n}")
            same(samples[0], samples[2], f"pickled, sample {n}")


BOTH = ["TRA", "ERR_SEG"]
OPTIONS = [
    {},
    {"detection_folders": [*BOTH, "nowhere", "TRA"], "augment": 3, "crop_size": (24, 32)},
    {"detection_folders": ["ERR_SEG"], "augment": 2, "max_tokens": 9},
    {"detection_folders": BOTH, "use_gt": False},
    {"detection_folders": BOTH, "return_dense": True},
    {"slice_pct": (0.2, 0.9), "detection_folders": BOTH},
    {"downscale_temporal": 2, "window_size": 2, "detection_folders": BOTH},
    {"downscale_spatial": 2, "downscale_temporal": 2, "slice_pct": (0.0, 0.9), "window_size": 3},
    {"ndim": 3, "detection_folders": BOTH},
    {"features": "none", "sanity_dist": True},
    {"features": "regionprops2", "detection_folders": BOTH},
    {"features": "patch_regionprops"},  # upstream uses what pandas will drop
    {"window_size": 20},
]


CASES = [
    pytest.param(
        options, compress, marks=[] if (i + compress) % 2 == 0 else pytest.mark.slow,
        id="-".join([*options, "compress" if compress else "plain"]),
    )
    for i, options in enumerate(OPTIONS)
    for compress in (False, True)
    if not (compress and "downscale_spatial" in options)  # upstream can't
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable:UserWarning")
@pytest.mark.parametrize(("options", "compress"), CASES)
def test_training_data_are_those_of_upstream(tmp_path, cache, options, compress):
    root = write(tmp_path / "movie" / "01")
    check_same(root, cache, {"window_size": 4, **options, "compress": compress})


@pytest.mark.parametrize(("features", "compress"), [("wrfeat", True), ("regionprops2", False)])
def test_training_data_of_stacks_are_those_of_upstream(tmp_path, cache, features, compress):
    root = write(tmp_path / "movie" / "01", depth=3)
    options = {"ndim": 3, "window_size": 3, "detection_folders": BOTH, "features": features}
    check_same(root, cache, {**options, "compress": compress})


def edit_tiff(file: Path, change) -> None:
    image = tifffile.imread(file)
    change(image)
    tifffile.imwrite(file, image, photometric="minisblack")


def change_file(root: Path, kind: str, rng: random.Random) -> tuple[Path, bytes]:
    """Change a number in a file of a movie; give the file, and what it held."""
    folders = {"frame": root, "mask": Path(f"{root}_GT/TRA"), "detection": Path(f"{root}_ERR_SEG")}
    if kind == "track":
        file = folders["mask"] / "man_track.txt"
        before = file.read_bytes()
        rows = [line.split() for line in before.decode().splitlines()]
        row = rng.choice(rows)
        row[3] = rng.choice([p for p in "0134" if p not in (row[0], row[3])])
        file.write_text("".join(f"{' '.join(one)}\n" for one in rows))
        return file, before
    file = rng.choice(sorted(folders[kind].glob("*.tif")))
    before = file.read_bytes()

    def change(image):
        y, x = (rng.randrange(n) for n in image.shape[-2:])
        image[y, x] = rng.choice([v for v in (0, 1, 2, 3, 4, 11, 12, 700) if v != image[y, x]])

    edit_tiff(file, change)
    return file, before


def change_options(options: dict, rng: random.Random) -> dict:
    name = rng.choice(["window_size", "slice_pct", "compress", "detection_folders"])
    value = {
        "window_size": options["window_size"] % 3 + 2,
        "slice_pct": (0.0, round(rng.uniform(0.7, 1.0), 6)),
        "compress": not options["compress"],
        "detection_folders": options["detection_folders"][::-1],
    }[name]
    return {**options, name: value}


@pytest.mark.parametrize(
    "count", [5, pytest.param(500, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_no_change_is_served_stale(tmp_path, cache, count):
    root, rng = write(tmp_path / "movie" / "01"), random.Random(count)
    options = {"window_size": 3, "detection_folders": BOTH, "compress": False}
    kept(root, cache, **options)
    done = 0
    while done < count:
        kind = rng.choice(["frame", "mask", "detection", "track", "option"])
        if kind == "option":
            options = change_options(options, rng)
        else:
            file, before = change_file(root, kind, rng)
        try:
            expected = plain(root, **options)
        except (ValueError, nx.NetworkXError) as error:  # upstream refuses it, whatever is kept
            with pytest.raises(type(error), match=re.escape(str(error))):
                kept(root, cache, **options)
            file.write_bytes(before)
            continue
        data = kept(root, cache, **options)
        same(vars(expected), {name: vars(data)[name] for name in vars(expected)}, kind)
        done += 1


def test_tracks_that_change_while_they_are_read_are_not_kept_as_others(
    tmp_path, cache, monkeypatch
):
    root = write(tmp_path / "movie" / "01")
    file = Path(f"{root}_GT/TRA/man_track.txt")
    before = file.read_text()
    after = before.replace("11 3 6 1", "11 3 6 0")
    assert after != before
    expected = plain(root, window_size=3)
    read = CTCData._load_tracklet_links

    def read_and_change(self, folder):
        table = read(self, folder)
        file.write_text(after)
        return table

    with monkeypatch.context() as patch:
        patch.setattr(CTCData, "_load_tracklet_links", read_and_change)
        kept(root, cache, window_size=3)
    file.write_text(before)
    same(vars(expected), {n: vars(kept(root, cache, window_size=3))[n] for n in vars(expected)})


def test_numbers_of_numpy_are_options(tmp_path, cache):
    root = write(tmp_path / "01")
    options = {"window_size": np.int64(3), "sanity_dist": np.bool_(False)}
    for _ in range(2):
        assert len(kept(root, cache, **options)) == 5
    (space,) = cache.spaces()
    kept(root, cache, window_size=3)
    assert len(space) == 1


@pytest.mark.parametrize(
    ("file", "options", "says"),
    [
        ("01/t003.tif", {}, r"has images 7 in .*TRA, 6 in .*01: expected as many of each"),
        ("01_ERR_SEG/mask003.tif", {"detection_folders": BOTH}, "6 in .*_ERR_SEG, 7 in "),
        ("01_GT/TRA/man_track.txt", {}, "man_track.txt can't be read: .*'word'; expected label, "),
        (None, {"use_gt": False, "detection_folders": ["SEG"]}, "has no masks 'SEG'"),
    ],
)
def test_what_a_movie_lacks_is_said(tmp_path, cache, file, options, says):
    root = write(tmp_path / "01")
    if file is not None and file.endswith("txt"):
        (tmp_path / file).write_text("1 0 word 0\n")
    elif file is not None:
        (tmp_path / file).unlink()
    with pytest.raises(MovieError, match=says):
        kept(root, cache, window_size=3, **options)


def test_a_home_folder_is_found(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "01")
    assert len(kept("~/01", cache, window_size=3)) == 5


def test_what_is_kept_is_opened_without_reading_or_building(tmp_path, cache, monkeypatch):
    root = write(tmp_path / "movie" / "01")
    kept(root, cache, window_size=3)
    before = {space.name: len(space) for space in cache.spaces()}

    def build(*_):
        raise AssertionError("built again")

    monkeypatch.setattr(CTCData, "_load_wrfeat", build)
    again = kept(root, FeatureCache(cache.store.root, "r"), window_size=3, augment=2)
    assert len(again) == 5
    assert {space.name: len(space) for space in cache.spaces()} == before
    with no_memo():
        assert kept(root, cache, window_size=3).n_objects == again.n_objects
    shutil.copytree(tmp_path / "movie", tmp_path / "elsewhere")
    assert len(kept(tmp_path / "elsewhere" / "01", cache, window_size=3)) == 5


def test_a_change_is_named_when_it_is_built_again(tmp_path, cache, caplog):
    root = write(tmp_path / "movie" / "01")
    kept(root, cache, window_size=3)
    edit_tiff(sorted(root.glob("*.tif"))[0], lambda frame: np.copyto(frame, frame + 1))
    with caplog.at_level("INFO", "feature_cache"):
        kept(root, cache, window_size=3)
    assert f"{root}: frames differs: xxh3" in caplog.text


def test_the_command_line_knows_what_is_kept(tmp_path, cache):
    kept(write(tmp_path / "movie" / "01"), cache, window_size=3)
    for words in (["ls"], ["stats"], ["verify"], ["verify", "--recompute", "1"], ["compact"]):
        done = CliRunner().invoke(app, [*words, "--cache", str(cache.store.root)])
        assert done.exit_code == 0, done.output
    assert (
        "trackastra-start"
        in CliRunner().invoke(app, ["ls", "--cache", str(cache.store.root)]).output
    )
    assert (
        CliRunner()
        .invoke(app, ["gc", "--max-size", "1", "--yes", "--cache", str(cache.store.root)])
        .exit_code
        == 0
    )
    assert FeatureCache(cache.store.root).stats()["records"] == 0


@pytest.mark.parametrize("features", ["pretrained_feats", "wrfeat"])
def test_a_movie_that_can_not_be_built_costs_no_other(tmp_path, monkeypatch, features):
    """Nor the report of what was computed before."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        write(Path(name, "01"))
    Path("two/01_GT/TRA/man_track.txt").unlink()
    training = {"input_train": ["two/01", "one/01"], "features": features, "window": 3}
    Path("train.yaml").write_text(
        yaml.safe_dump({**training, "pretrained_feats_model": "debug/random"})
    )
    words = ["warm", "train.yaml", "--cache", "cache", "--report", "out.json"]
    done = CliRunner().invoke(app, words)
    assert (done.exit_code, "training data of 1 movie built" in done.output) == (1, True)
    [failed] = json.loads(Path("out.json").read_text())["errors"]
    assert failed["what"] == "training data of two/01"
    assert len(kept(Path("one/01"), FeatureCache("cache", "r"), window_size=3)) == 5


def test_a_mask_that_changes_after_opening_is_refused(tmp_path, cache):
    root = write(tmp_path / "movie" / "01", seed=77)
    kept(root, cache, window_size=3)
    data = kept(root, cache, window_size=3)
    file = sorted(Path(f"{root}_GT/TRA").glob("*.tif"))[2]
    edit_tiff(file, lambda mask: np.copyto(mask, 7))
    with pytest.raises(FrameError, match="changed since the training data were loaded"):
        np.asarray(data.det_masks["TRA"])


def test_features_of_what_was_kept_are_those_of_what_was_built(tmp_path, cache):
    root = write(tmp_path / "movie" / "01")
    Path(f"{root}_ST/SEG").mkdir(parents=True)
    for t, file in enumerate(sorted(Path(f"{root}_GT/TRA").glob("*.tif"))):
        mask = tifffile.imread(file)
        mask[:, :2] = np.where(mask[:, :2], mask[:, :2], 1 * (t == 1))
        tifffile.imwrite(f"{root}_ST/SEG/man_seg{t:03}.tif", mask)
    options = {"window_size": 3, "detection_folders": BOTH, "compress": True}
    backbone = FakeBackbone()
    for props in ("regionprops2", "regionprops"):
        one, other = (
            wrap(data, cache, backbone, additional_props=props)
            for data in (plain(root, **options), kept(root, cache, **options))
        )
        for n in range(len(one)):
            same(one[n], other[n], f"{props} {n}")


def test_a_part_that_begins_at_another_frame_is_not_what_was_kept(tmp_path, cache):
    """Two frames more, and the middle has the same frames; its tracks are others then."""
    images, masks, tracks = make_movie(frames=8, height=40, width=56, cells=4)
    masks[5:][masks[5:] == 1] = 9
    tracks = np.array([[1, 0, 4, 0], *tracks[1:], [9, 5, 7, 1]])
    write_movie(tmp_path / "one" / "01", images, masks, tracks)
    longer = np.r_[0, :8, 7]
    write_movie(tmp_path / "two" / "01", images[longer], masks[longer], tracks)
    options = {"window_size": 2, "slice_pct": (0.5, 0.75)}
    assert len(kept(tmp_path / "one" / "01", cache, **options)) == 1
    with pytest.raises(ValueError, match=r".") as refused:
        plain(tmp_path / "two" / "01", **options)
    with pytest.raises(ValueError, match=re.escape(str(refused.value))):
        kept(tmp_path / "two" / "01", cache, **options)
