"""Records that lie side by side are read at once, or looked at where they lie."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_cache.key import Record
from feature_cache.store import CODECS, Index, NewRecord, Space, Store
from feature_cache.store.maintenance import verify
from samples import (
    KINDS,
    content,
    contents,
    expected,
    make_entries,
    make_key,
    make_keys,
    make_record,
    make_spec,
)


def write(root: Path, kind: str, codec: str = "raw") -> Space:
    """Commit records 0 to 9 and 20 to 24, in two packs."""
    space = Store(root, "a").space(make_spec(kind))
    for numbers in (range(10), range(20, 25)):
        space.write(make_entries(numbers, kind), {}, codec)
    return space


def chunk_of(space: Space, number: int) -> Path:
    return space.packs_folder / space.packs_of(make_keys([number]))[0] / "features/c.0.0"


def damage_record(space: Space, number: int) -> None:
    chunk = chunk_of(space, number)
    bad = sum(len(make_record(n).features) for n in range(number)) * 8 * 2 + 1
    data = bytearray(chunk.read_bytes())
    data[bad] ^= 1
    chunk.write_bytes(data)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.integers(0, 29), max_size=12))
def test_every_record_that_is_there_is_in_one_span_at_its_place(
    tmp_path: Path, kind: str, codec: str, asked: list[int]
) -> None:
    space = write(tmp_path / "cache", kind, codec)
    found = {}
    for first, span in space.gather(make_keys(asked)):
        for number, record in enumerate(span.records(), first):
            assert number not in found
            found[number] = record
    assert [i for i, n in enumerate(asked) if n < 10 or 20 <= n < 25] == sorted(found)
    for place, record in found.items():
        expected = make_record(asked[place], kind)
        assert record.features.tobytes() == expected.features.tobytes()
        assert np.array_equal(record.labels, expected.labels)  # type: ignore[arg-type]


def test_a_window_of_one_pack_is_one_array(tmp_path: Path) -> None:
    space = write(tmp_path / "cache", "regions")
    [(first, span)] = space.gather(make_keys(range(2, 9)))
    assert (first, len(span)) == (0, 7)
    assert span.features.base is not None
    whole = np.concatenate([make_record(n).features for n in range(2, 9)])
    assert span.features.tobytes() == whole.tobytes()


def test_a_damaged_record_takes_no_other_with_it_in_the_same_read(tmp_path: Path) -> None:
    space = write(tmp_path / "cache", "regions")
    damage_record(space, 4)
    records = Store(tmp_path / "cache", "a").space(make_spec()).find(make_keys(range(10)))
    assert [record is not None for record in records[:5]] == [True] * 4 + [False]


def places_of(space: Space, numbers: range) -> tuple[Index, int, int, int]:
    packs, rows = space.index.find(make_keys(numbers))
    return space.index, int(packs[0]), int(rows[0]), int(rows[-1]) + 1


def test_a_view_is_given_once_the_pack_is_open(tmp_path: Path) -> None:
    space = write(tmp_path / "cache", "regions")
    places = places_of(space, range(2, 9))
    assert space.view(*places) is None
    space.read(make_keys([2]))
    span = space.view(*places)
    assert span is not None
    assert [content(record) for record in span.records()] == contents(space, range(2, 9))


def test_a_view_by_an_index_of_before_is_none(tmp_path: Path) -> None:
    space = write(tmp_path / "cache", "regions")
    space.read(make_keys([2]))
    places = places_of(space, range(2, 9))
    space.write(make_entries([40]), {})
    assert space.view(*places) is None
    assert space.view(*places_of(space, range(2, 9))) is not None


def test_a_view_of_what_is_not_one_span_is_none(tmp_path: Path) -> None:
    for kind, codec in (("regions", "zstd"), ("grids", "raw")):
        space = write(tmp_path / f"{kind}-{codec}", kind, codec)
        space.read(make_keys(range(10)))
        assert space.view(*places_of(space, range(2, 9))) is None


def test_a_view_of_one_grid_is_given_unless_it_is_cut_short(tmp_path: Path) -> None:
    space = write(tmp_path / "cache", "grids")
    space.read(make_keys([2]))
    view = space.view(*places_of(space, range(2, 3)))
    assert view is not None
    assert [content(record) for record in view.records()] == expected([2], "grids")
    os.truncate(space.packs_folder / space.packs_of(make_keys([2]))[0] / "features/c.0.0.0.0", 10)
    assert space.view(*places_of(space, range(2, 3))) is None


def test_a_damaged_record_is_in_no_view(tmp_path: Path) -> None:
    space = write(tmp_path / "cache", "regions")
    damage_record(space, 4)
    space = Store(tmp_path / "cache", "a").space(make_spec())
    space.read(make_keys([0]))
    assert space.view(*places_of(space, range(4))) is not None
    assert space.view(*places_of(space, range(3, 6))) is None
    assert contents(space, [3, 4, 5]) == [*expected([3]), None, None]  # then in quarantine
    assert space.view(*places_of(space, range(20, 23))) is None


def test_a_file_cut_short_is_in_no_view(tmp_path: Path) -> None:
    space = write(tmp_path / "cache", "regions")
    space.read(make_keys([2]))
    places = places_of(space, range(2, 9))
    os.truncate(chunk_of(space, 2), 10)
    assert space.view(*places) is None


@pytest.mark.parametrize("width", [256, 1024])
def test_a_last_record_without_regions_may_begin_where_the_file_ends(
    tmp_path: Path, width: int
) -> None:
    rows = [np.ones((n, width), np.float16) for n in (4, 4, 0)]
    entries = [
        NewRecord(make_key(i), Record(features, np.arange(len(features), dtype=np.int32)), {})
        for i, features in enumerate(rows)
    ]
    space = Store(tmp_path / "cache", "a").space(make_spec())
    space.write(entries, {})
    found = [space.read(make_keys([i]))[0] for i in (0, 2, 1)]
    assert [len(record.features) for record in found if record is not None] == [4, 0, 4]
    view = space.view(*places_of(space, range(2, 3)))
    assert view is not None
    assert view.features.shape == (0, width)
    assert verify(tmp_path / "cache") == []
