"""When a refresh lists a folder again: whenever something may be new, and else not."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from feature_cache.store import Space, Store
from feature_cache.store.maintenance import compact_space
from samples import contents, expected, make_entries, make_keys, make_spec


class Clock:
    """The time of this process, which stands still."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Name the folders of packs that were listed."""
    real, names = os.listdir, list[str]()

    def list_and_tell(path: Any) -> list[str]:
        names.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(os, "listdir", list_and_tell)
    return names


def freeze(space: Space, monkeypatch: pytest.MonkeyPatch, stamp_ns: int) -> None:
    """Have the folder of packs look the same for ever, as with a clock that stands still."""
    real, then = os.stat, os.stat(space.packs_folder)
    frozen = SimpleNamespace(**{n: getattr(then, n) for n in dir(then) if n.startswith("st_")})
    frozen.st_mtime_ns = frozen.st_ctime_ns = stamp_ns

    def look(path: Any, *more: Any, **options: Any) -> Any:
        return frozen if path == space.packs_folder else real(path, *more, **options)

    monkeypatch.setattr(os, "stat", look)


def test_where_nothing_changed_nothing_is_listed(
    root: Path, space: Space, clock: Clock, listed: list[str]
) -> None:
    space.write(make_entries([1]), {})
    reader = Store(root).space(make_spec())
    reader.refresh()
    clock.now += 3.0
    reader.refresh()
    assert "packs" in listed
    listed.clear()
    for _ in range(3):
        reader.refresh()
        assert not reader.contains(make_keys([2])).any()
    assert listed == []
    space.write(make_entries([2]), {})
    assert reader.contains(make_keys([1, 2])).all()
    compact_space(space)  # removes what the reader knows
    reader.refresh()
    assert len(reader) == 2
    assert contents(reader, [1, 2]) == expected([1, 2])


@pytest.mark.parametrize(("stamp_ns", "settled"), [(10**18, 2.5), (10**18 + 1, 0.2)])
def test_what_comes_in_the_tick_of_a_listing_is_found(
    root: Path,
    space: Space,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    stamp_ns: int,
    settled: float,
) -> None:
    space.write(make_entries([1]), {})
    freeze(space, monkeypatch, stamp_ns)
    reader = Store(root).space(make_spec())
    assert reader.contains(make_keys([1])).all()
    space.write(make_entries([2]), {})
    assert reader.contains(make_keys([2])).all()
    clock.now += settled * 0.6
    space.write(make_entries([3]), {})
    assert reader.contains(make_keys([3])).all()
    clock.now += settled
    reader.refresh()
    space.write(make_entries([4]), {})
    assert not reader.contains(make_keys([4])).any()  # any clock would have gone on by now
    clock.now += 31.0  # but what a network file system says is believed for half a minute only
    assert reader.contains(make_keys([4])).all()
