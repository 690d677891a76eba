"""A place is what it looks like: a URL is no folder, a typo no cache, a moved cache no new one."""

from __future__ import annotations

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from feature_cache import FeatureCache, FeatureCacheError, NotACacheError
from feature_cache.cli import app
from feature_cache.movies import write_movie
from feature_cache.store.maintenance import add_pin
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

MODEL = "--backbone debug/random"
LOOK_OR_TIDY = {
    "explain": f"explain 01 {MODEL}",
    "ls": "ls",
    "stats": "stats",
    "stats --runs": "stats --runs",
    "inspect": "inspect debug",
    "report": "report page.html",
    "show": "show 01 --frame 0",
    "verify": "verify",
    "verify --repair": "verify --repair",
    "gc": "gc --max-size 1",
    "gc --yes": "gc --max-size 1 --yes",
    "compact": "compact",
    "pin": "pin 01",
    "pin, listing": "pin",
    "unpin": "unpin 01",
    "push": "push file:///tmp/elsewhere",
}
MAKE = {
    "warm": f"warm 01 {MODEL}",
    "serve": "serve --idle 0.1s",
    "evaluate": f"evaluate 01 {MODEL}",
    "track": "track 01 --model here",
    "pull": "pull file://{here}/pushed",
}
EVERY = {**LOOK_OR_TIDY, **MAKE, "doctor": "doctor"}


@pytest.fixture
def here(run, tmp_path) -> Path:
    """A folder with a movie, where commands run."""
    write_movie(tmp_path / "01", *make_movie())
    return tmp_path


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_every_command_with_a_cache_is_tried() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    asking = {name for name, one in commands.items() if any(p.name == "cache" for p in one.params)}
    assert asking == {words.split()[0] for words in EVERY.values()}


@pytest.mark.parametrize(
    ("url", "given"),
    [
        ("s3://lab/features", "--cache"),
        ("https://lab/features", "FEATURE_CACHE_DIR"),
        pytest.param("s3:/lab/features", "--cache", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("words", EVERY.values(), ids=EVERY)
def test_a_url_is_no_folder(run, here, monkeypatch, words, url, given):
    before = names(here)
    words = words.format(here=here).split()
    if given == "--cache":
        words += ["--cache", url]
    else:
        monkeypatch.setenv("FEATURE_CACHE_DIR", url)
    code, _, err = run(*words)
    assert code == 2
    assert "lab/features is no folder, which a cache has to be here: " in err
    assert ("--layer s3://lab/features" in err) == url.startswith("s3")
    assert names(here) == before


@pytest.mark.parametrize("words", LOOK_OR_TIDY.values(), ids=LOOK_OR_TIDY)
def test_looking_and_tidying_make_no_cache(run, here, words):
    before = names(here)
    code, _, err = run(*words.split(), "--cache", "typo")
    assert code == 2
    assert str(here / "typo") in err
    assert names(here) == before


def test_a_doctor_says_that_there_is_none_yet(run, here):
    before = names(here)
    assert "not there yet" in run("doctor", "--cache", "typo")[1]
    assert names(here) == before


def test_a_file_url_is_a_folder(run, here):
    url = (here / "a cache").as_uri()
    assert run(*MAKE["warm"].split(), "--cache", url)[0] == 0
    assert (here / "a cache" / "zarr.json").is_file()
    for words in ("ls", "verify", "compact", "stats"):
        assert run(words, "--cache", url)[0] == 0
    code, out, _ = run(*MAKE["warm"].split(), "--cache", "new", "--layer", url)
    assert (code, "6 were there, 0 computed" in out) == (0, True)
    code, _, err = run("ls", "--cache", "file://host/share")
    assert code == 2
    assert "expected file:///path/of/folder" in err


@pytest.mark.parametrize("place", ["s3://lab/x", Path("s3://lab/x"), "gs:/lab/x", "http://lab/x"])
@pytest.mark.parametrize("mode", ["a", "r"])
def test_no_url_is_made_a_folder_from_python(tmp_path, monkeypatch, place, mode):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotACacheError, match="://lab/x is no folder"):
        FeatureCache(place, mode)
    assert not os.listdir(tmp_path)


def test_a_cache_that_is_not_to_be_made(tmp_path):
    with pytest.raises(NotACacheError, match="typo does not exist"):
        FeatureCache(tmp_path / "typo", create=False)
    (tmp_path / "empty").mkdir()
    with pytest.raises(NotACacheError, match="empty is not a feature cache"):
        FeatureCache(tmp_path / "empty", create=False)
    pickled = pickle.dumps(FeatureCache(tmp_path / "cache"))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(NotACacheError, match="cache does not exist"):
        pickle.loads(pickled)
    assert os.listdir(tmp_path) == ["empty"]


USES: dict[str, Callable[[FeatureCache, Any], object]] = {
    "computing": lambda cache, movie: cache.get_or_compute(*movie, FakeBackbone()),
    "asking": lambda cache, movie: cache.contains(*movie, FakeBackbone(dim=4)),
    "computing in another space": lambda cache, movie: cache.get_or_compute(
        *movie, FakeBackbone(dim=4)
    ),
    "a pin": lambda cache, _: add_pin(cache.store, "fake"),
    "a compaction": lambda cache, _: cache.compact(),
    "stats": lambda cache, _: cache.stats(),
    "gc": lambda cache, _: cache.gc(max_bytes=0, dry_run=False),
}


@pytest.mark.parametrize("how", ["renamed", "removed", "replaced by an empty folder"])
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_a_cache_that_went_while_it_was_open_is_an_error_and_not_made_anew(
    tmp_path, small, use, how
):
    frames, masks = small
    cache = FeatureCache(tmp_path / "cache")
    cache.get_or_compute(frames[:2], masks[:2], FakeBackbone())
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    left = {"moved"}
    if how == "removed":
        shutil.rmtree(tmp_path / "moved")
        left = set()
    elif how != "renamed":
        (tmp_path / "cache").mkdir()
        left |= {"cache"}
    with pytest.raises(FeatureCacheError, match=r"cache\S* is not there any more"):
        use(cache, small)
    assert set(os.listdir(tmp_path)) == left
    assert not (tmp_path / "cache" / "spaces").exists()
