"""The commands that keep a shared cache well, as people type them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from feature_cache import FeatureCache
from feature_cache.cli.options import parse_age, parse_size
from feature_cache.movies import write_movie
from feature_cache.store import NewRecord, Pack, Store
from synthetic import make_movie
from test_cli import MODEL, warm
from test_recompute import change, spoil


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """A folder for two movies, and for a cache of theirs of which each test has a copy."""
    return tmp_path_factory.mktemp("stock")


@pytest.fixture
def warmed(run, stock):
    """A cache of two movies, two packs; the movies' folders, which all tests share."""
    movies = stock / "one" / "01", stock / "two" / "01"
    if not (stock / "cache").exists():
        for movie, seed in zip(movies, (0, 3), strict=True):
            write_movie(movie, *make_movie(seed=seed))
            assert warm(run, movie, cache=stock / "cache")[0] == 0
    shutil.copytree(stock / "cache", "cache")
    return movies


def packs() -> list[Path]:
    return sorted(Path("cache/spaces").glob("*/packs/" + "?" * 32))


class TestVerify:
    def test_a_sound_cache(self, run, warmed):
        assert run("verify", "--cache", "cache")[:2] == (0, "all is well\n")
        assert run("verify", "--cache", "cache", "--deep", "--json")[:2] == (0, "[]\n")

    def test_damage_is_listed_repaired_and_warmed_again(self, run, warmed):
        damaged = packs()[0] / "features" / "c.0.0"
        data = bytearray(damaged.read_bytes())
        data[7] ^= 16
        damaged.write_bytes(data)
        code, out, _ = run("verify", "--cache", "cache")
        assert code == 1
        assert "checksum" in out or "CRC" in out
        assert "warm again:" in out
        assert out.endswith(
            "1 found: run feature-cache verify --repair, then warm again what is named above\n"
        )
        assert "frame 5" in out
        assert len(packs()) == 2
        code, out, _ = run("verify", "--cache", "cache", "--repair")
        assert code == 1
        assert "1 found, and repaired" in out
        assert run("verify", "--cache", "cache")[0] == 0
        assert len(packs()) == 1
        code, out, _ = warm(run, *warmed)
        assert "6 were there, 6 computed" in out

    def test_what_is_there_twice_is_for_compact(self, run, warmed):
        [space] = Store("cache").spaces()
        pack = Pack(packs()[0])
        key = pack.keys[0].tobytes()
        space.write([NewRecord(key, pack.record(0), {"movie": "one"})], {})
        end = "1 pack with records that are there twice: run feature-cache compact\n"
        for option in ([], ["--repair"]):
            code, out, _ = run("verify", "--cache", "cache", *option)
            assert (code, out.partition("one of each\n")[2]) == (1, end)
        run("compact", "--cache", "cache")
        assert run("verify", "--cache", "cache")[0] == 0

    def test_wrong_numbers_are_found_set_aside_and_warmed_again(self, run, warmed):
        recompute = ("verify", "--cache", "cache", *MODEL[2:], "--recompute")
        code, out, err = run(*recompute, "all")
        assert (code, out) == (0, "12 records computed again: 12 agree, 0 differ\nall is well\n")
        assert "computing again: 12 of 12 records" in err
        [space] = Store("cache").spaces()
        key = change(space, spoil).hex()
        assert run("verify", "--cache", "cache", "--deep")[0] == 0
        code, out, _ = run(*recompute, "all", "--json")
        report = json.loads(out)
        assert (code, report["agree"], report["wrong"]) == (1, 11, 1)
        assert report["findings"][0]["record"] == key
        code, out, _ = run(*recompute, "all", "--repair")
        assert code == 1
        assert f"record {key} (" in out
        assert out.count("warm again: ") == 1
        assert "1 found, and repaired" in out
        assert run(*recompute, "all")[0] == 0
        assert "11 were there, 1 computed" in warm(run, *warmed)[1]
        assert run(*recompute, "all")[1].startswith("12 records computed again: 12 agree")

    def test_what_can_not_be_compared_is_counted(self, run, small_folder):
        movies = small_folder("one"), small_folder("two", seed=3)
        warm(run, *movies)
        shutil.rmtree(movies[0])
        code, out, _ = run("verify", "--cache", "cache", *MODEL[2:], "--recompute", "all")
        assert code == 0
        assert out.splitlines() == [
            f"not compared: 6 records: no movie at {movies[0]}: no such folder",
            "12 records computed again: 6 agree, 0 differ, 6 can't be compared, as their movie is "
            "gone or changed",
            "nothing wrong was found in what could be compared",
        ]

    def test_weights_to_try_and_a_part_of_the_records(self, run, small_folder):
        warm(run, small_folder(), options=("--weights", "random:7"))
        words = ("verify", "--cache", "cache", "--recompute", "3", "--seed", "2")
        assert "3 can't be compared, as their weights are gone or changed" in run(*words)[1]
        given = ("--weights", "random:6", "--weights", "random:7", "--device", "cpu")
        assert run(*words, *given)[1].startswith("3 records computed again: 3 agree, 0 differ\n")

    def test_a_number_that_is_none(self, run, warmed):
        for number in ("0", "some", "-1"):
            code, _, err = run("verify", "--cache", "cache", "--recompute", number)
            assert code == 2
            assert f"{number!r} is no number of records: expected 1 or more, or all" in err

    def test_what_is_no_cache(self, run, tmp_path):
        code, _, err = run("verify", "--cache", tmp_path / "nothing")
        assert code == 2
        assert "nothing" in err


class TestGarbage:
    def test_nothing_goes_without_yes(self, run, warmed):
        code, out, _ = run("gc", "--cache", "cache", "--max-size", "0")
        assert code == 0
        assert "2 packs to let go: 12 records, " in out
        assert "0 B are not reached: 0 B are pinned (see feature-cache pin), " in out
        assert "nothing was removed: --yes does it" in out
        assert len(packs()) == 2
        assert "evict" not in out
        code, out, _ = run("gc", "--cache", "cache", "--max-size", "0", "--verbose")
        assert all(f"evict {pack.name[:12]} of " in out for pack in packs())

    def test_what_killed_processes_left_is_nothing_wrong_and_removed(self, run, warmed):
        old = packs()[0].parent / ".tmp-0123"
        old.mkdir()
        os.utime(old, (1e9, 1e9))
        Path("cache/claims/odd").write_text("host_01234567-1-0123456789abcdef")
        code, out, _ = run("verify", "--cache", "cache")
        assert (code, out) == (
            0,
            "2 left-overs of ended processes, no harm: feature-cache gc --yes removes them\n"
            "all is well\n",
        )
        assert run("report", "page.html", "--cache", "cache", "--verify")[0] == 0
        out = run("gc", "--cache", "cache")[1]
        assert "2 left-overs of ended processes: " in out
        assert str(old) not in out
        assert str(old) in run("gc", "--cache", "cache", "-v")[1]
        assert run("gc", "--cache", "cache", "--yes")[0] == 0
        assert not old.exists()
        assert run("verify", "--cache", "cache")[1] == "all is well\n"

    def test_in_parts(self, run, warmed):
        words = ("gc", "--cache", "cache", "--max-size", "0", "--max-seconds", "0", "--yes")
        code, out, _ = run(*words)
        assert code == 0
        assert out.endswith("the time was over before all was removed: run gc again\n")
        assert "run gc again" not in run(*words)[1]
        assert packs() == []

    def test_what_was_used_last_stays(self, run, warmed):
        time.sleep(0.02)
        warm(run, warmed[0])  # looks for its records
        plan = FeatureCache("cache", "r").gc()
        size = plan.kept_bytes + plan.other_bytes
        first = {p.name for p in packs() if "one" in (p / "zarr.json").read_text()}
        for pack in packs():
            os.utime(pack, (1e9, 1e9 + (pack.name in first)))
        code, out, _ = run("gc", "--cache", "cache", "--max-size", str(size - 1), "--yes")
        assert code == 0
        assert "6 records let go" in out
        assert {pack.name for pack in packs()} == first

    def test_age_json_and_pins(self, run, warmed):
        for pack in packs():
            os.utime(pack, (1e9, 1e9))
        assert "all" in run("pin", packs()[0].parts[2], "--cache", "cache")[1]
        plan = json.loads(run("gc", "--cache", "cache", "--older-than", "1d", "--json")[1])["plan"]
        assert plan["evictions"] == []
        assert plan["pinned_bytes"] == plan["kept_bytes"] > 0
        assert run("unpin", packs()[0].parts[2], "--cache", "cache")[1] == "1 unpinned\n"
        assert run("pin", warmed[0], "--cache", "cache")[1].split()[-1] == "6"
        words = ("gc", "--cache", "cache", "--older-than", "1d", "--yes", "--json")
        done = json.loads(run(*words)[1])["done"]
        assert (done["evicted"], done["records"]) == (1, 6)
        assert "one" in (packs()[0] / "zarr.json").read_text()

    def test_wrong_words(self, run, warmed):
        for options, message in (
            (["--max-size", "much"], "'much' is no size: expected such as 500M"),
            (["--max-size", "9" * 400], "9' is no size: expected such as 500M"),
            (["--older-than", "30"], "'30' is no age: expected such as 12h"),
            (["--yes", "--dry-run"], "contradict"),
            (["--space", "nope"], "no space begins with 'nope'"),
        ):
            code, _, err = run("gc", "--cache", "cache", *options)
            assert code == 2
            assert message in err

    def test_unknown_pins(self, run, warmed):
        for what in ("nope", "two"):
            code, _, err = run("unpin", what, "--cache", "cache")
            assert code == 2
            assert f"{what!r} is not pinned" in err

    def test_a_movie_keeps_what_it_shares_with_another(self, run, warmed):
        """Whose records name the other, who was first."""
        two = warmed[0].parent.with_name("three") / "01"
        shutil.copytree(warmed[0].parent, two.parent)
        (two / "t005.tif").unlink()
        Path(f"{two}_GT/TRA/man_track005.tif").unlink()
        assert "5 were there" in warm(run, two)[1]
        assert run("pin", two, "--cache", "cache")[1].split()[-1] == "5"
        run("gc", "--cache", "cache", "--max-size", "0", "--yes")
        assert "5 were there" in warm(run, two)[1]

    def test_a_pin_of_nothing(self, run, warmed):
        code, _, err = run("pin", "nope", "--cache", "cache")
        assert code == 2
        assert "'nope' is no space, pack, record or movie" in err


def test_compact_merges_and_leaves_one(run, warmed):
    before = FeatureCache("cache", "r").stats()
    code, out, _ = run("compact", "--cache", "cache")
    assert code == 0
    assert "2 packs merged into 1, 0 duplicates" in out
    assert len(packs()) == 1
    assert FeatureCache("cache", "r").stats()["records"] == before["records"]
    assert "0 computed" in warm(run, *warmed)[1]
    assert json.loads(run("compact", "--cache", "cache", "--json")[1])[0]["merged"] == 0
    assert run("compact", "--cache", "cache")[1].endswith(": nothing to merge\n")


def test_push_and_pull_move_what_is_missing(run, warmed, tmp_path):
    url = f"file://{tmp_path / 'there'}"
    assert "2 packs sent" in run("push", url, "--cache", "cache")[1]
    assert "0 packs sent, 0 B; 2 were there" in run("push", url, "--cache", "cache")[1]
    assert "2 packs fetched" in run("pull", url, "--cache", "other")[1]
    report = json.loads(run("pull", url, "--cache", "other", "--json")[1])
    assert report == {"packs": 0, "bytes": 0, "present": 2, "failures": []}
    assert "12 were there, 0 computed" in warm(run, *warmed, cache="other")[1]
    code, out, _ = warm(run, *warmed, cache="third", options=("--layer", url))
    assert (code, "12 were there, 0 computed" in out) == (0, True)


@pytest.mark.parametrize(
    ("url", "message"),
    [("ftp://host/x", "unknown kind of remote"), ("file:///nowhere/at/all", "no feature cache")],
)
def test_pulling_from_nowhere(run, url, message):
    code, _, err = run("pull", url, "--cache", "other")
    assert code == 2
    assert message in err


def test_damage_is_not_sent(run, warmed, tmp_path):
    chunk = packs()[0] / "index" / "c.0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    code, out, err = run("push", f"file://{tmp_path / 'there'}", "--cache", "cache")
    assert code == 1
    assert "1 pack sent" in out
    assert "failed: " in err


class TestDoctor:
    def test_a_cache_and_where_settings_come_from(self, run, warmed, monkeypatch):
        monkeypatch.setenv("FEATURE_CACHE_DIR", "cache")
        code, out, _ = run("doctor")
        assert code == 0
        for words in ("torch", "(FEATURE_CACHE_DIR)", "file system", "GB of", "(default)"):
            assert words in out
        code, out, _ = run("doctor", "--cache", "cache", "--json")
        facts = {(fact["section"], fact["name"]): fact for fact in json.loads(out)}
        assert facts["setting", "cache"]["source"] == "--cache"
        assert facts["cache", "spaces"]["value"] == "1"

    def test_without_a_cache(self, run, tmp_path):
        code, out, _ = run("doctor")
        assert code == 0
        assert "name one to look at it: --cache, or FEATURE_CACHE_DIR\n" in out
        assert run("doctor", "--cache", tmp_path / "new")[0] == 0
        (tmp_path / "file").write_text("")
        assert run("doctor", "--cache", tmp_path)[0] == 1


def test_runs_are_listed(run, warmed):
    code, out, _ = run("stats", "--cache", "cache", "--runs", "--json")
    assert code == 0
    assert [one["computed"] for one in json.loads(out)] == [6, 6]
    assert len(run("stats", "--cache", "cache", "--runs")[1].splitlines()) == 3


def test_ls_shows_the_spec_and_the_last_use(run, warmed):
    [row] = json.loads(run("ls", "--cache", "cache", "--json")[1])
    assert row["spec"]["backbone"]["name"] == row["backbone"] == "efficientnet-lite0"
    assert abs(row["last_use"] - max(pack.stat().st_mtime for pack in packs())) < 1
    assert (
        time.strftime("%Y-%m-%d", time.localtime(row["last_use"]))
        in run("ls", "--cache", "cache")[1]
    )


def test_the_version(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith("feature-cache 0.")


@pytest.mark.slow
def test_a_terminated_warm_keeps_what_it_computed(tmp_path, small_folder):
    root = small_folder(frames=400)
    command = [sys.executable, "-m", "feature_cache.cli", "warm", str(root), "--cache", "cache"]
    options = [*MODEL, "--batch-size", "1"]
    with open(tmp_path / "log", "w+") as log:
        child = subprocess.Popen([*command, *options], cwd=tmp_path, stderr=log, stdout=log)
        try:
            # Of so many claims some are computed: few frames are on their way at once.
            while len(list((tmp_path / "cache" / "claims").glob("*"))) < 20:
                assert child.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.02)
            child.terminate()
            assert child.wait(60) in (0, 128 + signal.SIGTERM)
        finally:
            child.kill()
    cache = Store(tmp_path / "cache", "r")
    assert sum(map(len, cache.spaces())) > 0
    assert not os.listdir(tmp_path / "cache" / "claims")
    assert not os.listdir(tmp_path / "cache" / "processes")
    shutil.rmtree(tmp_path / "cache")


@pytest.mark.parametrize(
    ("text", "size"),
    [("100G", 10**11), ("1.5TB", 15 * 10**11), ("64MiB", 1 << 26), ("7", 7), ("3 kB", 3000)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


def test_ages():
    assert [parse_age(text) for text in ("90s", "12h", "30d")] == [90, 43200, 30 * 86400]
