"""The table of many packs: it saves opening them, and nothing else depends on it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from feature_cache.store import Space, Store
from feature_cache.store.maintenance import add_pin, plan_gc, run_gc, verify
from feature_cache.store.pack_table import read_table, write_table
from samples import contents, du, expected, flip, make_entries, make_keys, make_spec

COUNT = 270
"""Enough packs for a table."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with many packs of two records."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        root = tmp_path_factory.mktemp("many") / "cache"
        space = Store(root).space(make_spec())
        for number in range(COUNT):
            space.write(make_entries([2 * number, 2 * number + 1]), {})
    return root


@pytest.fixture
def many(written: Path, tmp_path: Path) -> Space:
    """The same, to be changed."""
    shutil.copytree(written, tmp_path / "cache")
    return Store(tmp_path / "cache").space(make_spec())


def table_of(space: Space) -> Path:
    return space.root / "tables" / space.name


def all_right(space: Space) -> None:
    numbers = range(2 * COUNT)
    opened = Store(space.root).space(make_spec())
    assert opened.contains(make_keys(numbers)).all()
    assert not opened.contains(make_keys([2 * COUNT])).any()
    assert contents(opened, numbers) == expected(numbers)
    opened.refresh()
    assert len(opened) == 2 * COUNT
    assert opened.pack_records() == dict.fromkeys(opened.pack_names(), 2)
    assert opened.disk_bytes() == sum(du(opened.packs_folder / n) for n in opened.pack_names())


def test_packs_that_stand_in_it_are_not_opened(many: Space) -> None:
    table = read_table(table_of(many))
    assert len(table.names) > COUNT - 32
    (many.packs_folder / table.names[0] / "index" / "c.0").unlink()
    assert Store(many.root).space(make_spec()).contains(make_keys(range(2 * COUNT))).all()
    assert None in contents(Store(many.root).space(make_spec()), range(2 * COUNT))


def damage(space: Space) -> None:
    flip(table_of(space), 300)


def shorten(space: Space) -> None:
    file = table_of(space)
    file.write_bytes(file.read_bytes()[:-1])


def swap(space: Space) -> None:
    """Have it say, with a right checksum, that records lie where others do."""
    old = read_table(table_of(space))
    keys = old.keys.reshape(-1, 2, 16)[:, ::-1].reshape(-1, 16)
    write_table(space.root, table_of(space), replace(old, keys=keys))


def mix_up(space: Space) -> None:
    """Have it say so of other packs."""
    old = read_table(table_of(space))
    write_table(space.root, table_of(space), replace(old, keys=np.roll(old.keys, 2, axis=0)))


@pytest.mark.parametrize(
    "change",
    [
        lambda space: None,
        lambda space: table_of(space).unlink(),
        pytest.param(lambda space: table_of(space).write_bytes(b""), marks=pytest.mark.slow),
        lambda space: (table_of(space).unlink(), table_of(space).mkdir()),
        damage,
        pytest.param(shorten, marks=pytest.mark.slow),
    ],
    ids=["sound", "gone", "empty", "a folder", "damaged", "cut short"],
)
def test_nothing_depends_on_it(many: Space, change: Callable[[Space], object]) -> None:
    change(many)
    all_right(many)
    assert [f for f in verify(many.root) if f.kind != "unknown"] == []


FORGED = {
    "counts that wrap to their sum": (0, slice(0, 4), 1 << 62),
    "a size below 0": (1, slice(3, 4), -(1 << 40)),
    "a salt below 0": (2, slice(0, 1), -1),
    "a salt that has too many bits": (2, slice(0, 1), 1 << 32),
}
"""A column and rows, and what is added to what stands there."""


def test_one_with_numbers_that_nobody_wrote_is_none(many: Space) -> None:
    sound = read_table(table_of(many))
    for what, (column, rows, value) in FORGED.items():
        packs = sound.packs.copy()
        packs[rows, column] += value
        write_table(many.root, table_of(many), replace(sound, packs=packs))  # a right checksum
        assert read_table(table_of(many)).names == (), what
    all_right(many)


@pytest.mark.parametrize("change", [swap, mix_up], ids=["other places", "other packs"])
def test_one_that_lies_gives_no_wrong_numbers(many: Space, change: Callable[[Space], None]) -> None:
    change(many)
    all_right(many)


def test_what_went_and_what_came_since(many: Space) -> None:
    names = read_table(table_of(many)).names
    store = Store(many.root)
    opened = store.space(make_spec())
    opened.refresh()
    add_pin(store, names[3])
    plan = plan_gc(store, max_bytes=0)
    assert len(plan.evictions) == COUNT - 1
    run_gc(store, plan)
    assert opened.pack_names() == [names[3]]
    opened.write(make_entries(range(2 * COUNT, 2 * COUNT + 3)), {})
    fresh = Store(many.root).space(make_spec())
    fresh.refresh()
    assert len(fresh) == len(fresh.pack_names()) + 3 == 5
    assert verify(many.root) == []


def test_it_is_written_by_whoever_lists_many_that_it_lacks(many: Space) -> None:
    table_of(many).unlink()
    Store(many.root, "r").spaces()
    assert not table_of(many).exists()
    Store(many.root).spaces()
    table = read_table(table_of(many))
    assert sorted(table.names) == many.pack_names()
    assert table.sizes.tolist() == [du(many.packs_folder / name) for name in table.names]
    assert table.counts.tolist() == [2] * COUNT
    before = table_of(many).stat().st_mtime_ns
    Store(many.root).spaces()
    assert table_of(many).stat().st_mtime_ns == before


def test_a_space_whose_table_is_unknown_is_found(many: Space) -> None:
    (many.root / "tables" / "no-space").write_text(json.dumps({}))
    [finding] = verify(many.root)
    assert (finding.kind, finding.path.name) == ("unknown", "no-space")
