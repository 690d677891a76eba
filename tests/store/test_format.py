"""Caches that earlier versions wrote, kept as they were written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from feature_cache.spec import SpaceSpec
from feature_cache.store import FORMAT_VERSION, Store
from feature_cache.store.maintenance import compact_space, verify
from samples import contents, expected, in_fork, make_entries, make_spec

DATA = Path(__file__).with_name("data")
VERSIONS = (1, 2, 3)
NUMBERS = {"regions": range(8), "grids": range(4)}


@pytest.fixture(params=VERSIONS, ids=lambda version: f"v{version}")
def old(request: pytest.FixtureRequest, root: Path) -> Path:
    shutil.copytree(DATA / f"cache-v{request.param}", root)
    for kind in NUMBERS:
        adopt(root, make_spec(kind))
    return root


def adopt(root: Path, spec: SpaceSpec) -> None:
    """Give a space, whose keys are of an older version, to the spec that is now the same."""
    [folder] = (root / "spaces").glob(f"{spec.slug}-*")
    group = json.loads((folder / "zarr.json").read_bytes())
    group["attributes"]["feature_cache"]["space"] = spec.to_json()
    (folder / "zarr.json").write_text(json.dumps(group, indent=2))
    folder.rename(folder.with_name(spec.folder_name))


def version_of(root: Path) -> int:
    attributes = json.loads((root / "zarr.json").read_bytes())["attributes"]
    return attributes["feature_cache"]["format_version"]


@pytest.mark.parametrize("mode", ["r", "a"])
def test_old_caches_give_their_records(old: Path, mode: Any) -> None:
    version = version_of(old)
    store = Store(old, mode)
    for kind, numbers in NUMBERS.items():
        assert contents(store.space(make_spec(kind)), numbers) == expected(numbers, kind)
    assert version_of(old) == (version if mode == "r" else FORMAT_VERSION)
    assert verify(old, deep=True) == []


def test_old_caches_are_added_to_and_compacted(old: Path) -> None:
    for kind, numbers in NUMBERS.items():
        space = Store(old).space(make_spec(kind))
        space.write(make_entries(range(20, 23), kind), {})
        assert compact_space(space).records
        wanted = [*numbers, 20, 21, 22]
        assert contents(Store(old, "r").space(make_spec(kind)), wanted) == expected(wanted, kind)
    assert verify(old, deep=True) == []


def test_a_reader_and_a_writer_of_another_version_agree_on_names(old: Path) -> None:
    for kind, numbers in NUMBERS.items():
        space = Store(old).space(make_spec(kind))
        before = space.pack_names()
        half = len(numbers) // 2
        space.write(make_entries(list(numbers)[:half], kind), {})
        assert space.pack_names() == before


def test_the_first_writer_alone_takes_over_version_1(root: Path) -> None:
    shutil.copytree(DATA / "cache-v1", root)
    Store(root, "r")
    verify(root)
    assert version_of(root) == 1
    in_fork(lambda: [Store(root, "a"), None][1])
    assert version_of(root) == FORMAT_VERSION
    text = (root / "zarr.json").stat()
    Store(root, "a")
    assert (root / "zarr.json").stat().st_mtime_ns == text.st_mtime_ns
