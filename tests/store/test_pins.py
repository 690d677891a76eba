from __future__ import annotations

from pathlib import Path

import pytest

from feature_cache import MissingRecordError, StoreError
from feature_cache.store import NewRecord, Space, Store
from feature_cache.store.maintenance import (
    add_pin,
    compact_space,
    plan_gc,
    read_pins,
    remove_pin,
    repair,
    run_gc,
    verify,
)
from samples import contents, expected, make_entries, make_key, make_keys, make_record, make_spec


@pytest.fixture
def space(root: Path) -> Space:
    """Four packs with one record of a movie each."""
    space = Store(root).space(make_spec())
    for number in range(4):
        source = {"movie": f"lab/movie{number} GT", "frame": 0}
        space.write([NewRecord(make_key(number), make_record(number), source)], {})
    return space


def evict_all(root: Path) -> list[bool]:
    """Collect what is not pinned; tell which records are left."""
    store = Store(root)
    run_gc(store, plan_gc(store, max_bytes=0))
    return [one is not None for one in contents(Store(root).space(make_spec()), range(4))]


@pytest.mark.parametrize("what", ["space", "pack", "record", "movie", "movie's folder"])
def test_what_is_pinned_stays_until_the_pin_is_taken_back(
    root: Path, space: Space, what: str
) -> None:
    space.refresh()
    [pack] = space.packs_of(make_keys([2]))
    name = {
        "space": space.name,
        "pack": pack[:10],
        "record": make_key(2).hex()[:12],
        "movie": "lab/movie2 GT",
        "movie's folder": "lab/movie2",
    }[what]
    [pin] = add_pin(Store(root), name)
    assert read_pins(root) == [pin]
    plan = plan_gc(Store(root), max_bytes=0)
    assert (plan.pinned_bytes > 0, plan.kept_bytes) == (True, plan.pinned_bytes)
    assert evict_all(root) == ([True] * 4 if what == "space" else [False, False, True, False])
    assert verify(root) == []
    assert remove_pin(Store(root), name) == 1
    assert evict_all(root) == [False] * 4


def test_the_pin_of_a_space_is_taken_back_alone(root: Path, space: Space) -> None:
    [movie] = add_pin(Store(root), "lab/movie2")
    add_pin(Store(root), space.name[:-2])
    assert remove_pin(Store(root), space.name) == 1
    assert read_pins(root) == [movie]


def test_a_pin_survives_compaction(root: Path, space: Space) -> None:
    add_pin(Store(root), "lab/movie2")
    compact_space(space)
    assert evict_all(root) == [True] * 4  # one pack holds them all
    assert contents(space, range(4)) == expected(range(4))


def test_a_damaged_pin_stops_collection_until_it_is_repaired(root: Path, space: Space) -> None:
    add_pin(Store(root), "lab/movie2")
    [file] = (root / "pins").iterdir()
    for text in ("", "{}", "[]", '{"what":"a","space":"b","keys":["x"]}', "[" * 100_000):
        file.write_text(text)
        with pytest.raises(StoreError, match="verify --repair"):
            plan_gc(Store(root), max_bytes=0)
    assert contents(space, range(4)) == expected(range(4))
    repair(root, verify(root))
    assert evict_all(root) == [False] * 4


def test_what_is_not_there_can_not_be_pinned(root: Path, space: Space) -> None:
    for what in ("movie9", make_key(9).hex(), make_key(2).hex()[:4], "nothing"):
        with pytest.raises(MissingRecordError, match=what):
            add_pin(Store(root), what)
    with pytest.raises(MissingRecordError, match="nothing"):
        remove_pin(Store(root), "nothing")
    assert read_pins(root) == []


def test_records_to_come_are_pinned_by_their_space_alone(root: Path, space: Space) -> None:
    add_pin(Store(root), space.name)
    space.write(make_entries([9]), {})
    assert evict_all(root) == [True] * 4
    assert contents(Store(root).space(make_spec()), [9]) == expected([9])
