"""Records that lie side by side are read at once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_cache.store import CODECS, Space, Store
from samples import KINDS, make_entries, make_keys, make_record, make_spec


def write(root: Path, kind: str, codec: str = "raw") -> Space:
    """Commit records 0 to 9 and 20 to 24, in two packs."""
    space = Store(root, "a").space(make_spec(kind))
    for numbers in (range(10), range(20, 25)):
        space.write(make_entries(numbers, kind), {}, codec)
    return space


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(st.integers(0, 29), max_size=12))
def test_every_record_that_is_there_is_in_one_span_at_its_place(
    tmp_path: Path, kind: str, codec: str, asked: list[int]
) -> None:
    space = write(tmp_path / "cache", kind, codec)
    found = {}
    for first, span in space.gather(make_keys(asked)):
        for number in range(len(span)):
            assert first + number not in found
            found[first + number] = span.record(number)
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
    chunk = next(space.packs_folder.glob(f"{space.packs_of(make_keys([4]))[0]}/features/c/0/0"))
    bad = sum(len(make_record(n).features) for n in range(4)) * 8 * 2 + 1
    content = bytearray(chunk.read_bytes())
    content[bad] ^= 1
    chunk.write_bytes(content)
    records = Store(tmp_path / "cache", "a").space(make_spec()).find(make_keys(range(10)))
    assert [record is not None for record in records[:5]] == [True] * 4 + [False]
