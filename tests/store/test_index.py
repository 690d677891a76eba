from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache.key import Keys
from feature_cache.store import Index
from samples import make_keys

# Few different halves, so that keys often come twice, or agree in one half only.
halves = st.sampled_from([b"\0" * 8, b"\0" * 7 + b"\1", b"\x7f" + b"\xff" * 7, b"\xff" * 8])
keys = st.builds(bytes.__add__, halves, halves)
packs = st.lists(st.lists(keys, unique=True, max_size=6), max_size=6)


def as_array(many: list[bytes]) -> Keys:
    return np.frombuffer(b"".join(many), np.uint8).reshape(-1, 16)


def as_arrays(many: dict[str, list[bytes]]) -> dict[str, Keys]:
    return {name: as_array(some) for name, some in many.items()}


def check(index: Index, model: dict[str, list[bytes]], asked: list[bytes]) -> None:
    """Compare an index with a dict of the keys of each pack."""
    assert set(index.packs) == set(model)
    assert len(index) == len({key for some in model.values() for key in some})
    found_packs, found_rows = index.find(as_array(asked))
    assert found_packs.shape == found_rows.shape == (len(asked),)
    for key, pack, row in zip(asked, found_packs.tolist(), found_rows.tolist(), strict=True):
        if any(key in some for some in model.values()):
            assert model[index.packs[pack]][row] == key
        else:
            assert (pack, row) == (-1, -1)


@given(packs, packs, st.lists(keys, max_size=20))
def test_find_agrees_with_a_dict(
    first: list[list[bytes]], second: list[list[bytes]], asked: list[bytes]
) -> None:
    old = {f"a{i}": some for i, some in enumerate(first)}
    new = {f"b{i}": some for i, some in enumerate(second)}
    index = Index().add(as_arrays(old))
    check(index, old, asked)
    check(index.add(as_arrays(new)), old | new, asked)


@given(packs, st.sets(st.integers(0, 7)), packs, st.lists(keys, max_size=20))
def test_drop_agrees_with_a_dict_and_leaves_the_old_index_usable(
    first: list[list[bytes]], dropped: set[int], second: list[list[bytes]], asked: list[bytes]
) -> None:
    model = {f"a{i}": some for i, some in enumerate(first)}
    names = {f"a{i}" for i in dropped}
    left = {name: some for name, some in model.items() if name not in names}
    more = {f"b{i}": some for i, some in enumerate(second)}
    index = Index().add(as_arrays(model))
    shorter = index.drop(names)
    longer = shorter.add(as_arrays(more))
    check(longer, left | more, asked)
    check(shorter, left, asked)
    check(index, model, asked)


@given(st.permutations(range(200)))
def test_random_keys_in_any_order(order: list[int]) -> None:
    index = Index().add({"one": make_keys(order[:80]), "two": make_keys(order[80:150])})
    pack, row = index.find(make_keys(order))
    assert pack.tolist() == [0] * 80 + [1] * 70 + [-1] * 50
    assert row.tolist() == [*range(80), *range(70), *[-1] * 50]


def test_a_duplicate_is_found_where_it_was_first_and_then_where_it_is_left() -> None:
    index = Index().add({"one": make_keys([1, 2])}).add({"two": make_keys([2, 3])})
    assert [found.tolist() for found in index.find(make_keys([2]))] == [[0], [1]]
    assert [found.tolist() for found in index.drop({"one"}).find(make_keys([2]))] == [[0], [0]]


@pytest.mark.parametrize("index", [Index(), Index().add({"one": make_keys([1])})])
def test_nothing_asked_nothing_found(index: Index) -> None:
    pack, row = index.find(make_keys([]))
    assert len(pack) == len(row) == 0


def test_adding_and_dropping_nothing_changes_nothing() -> None:
    index = Index().add({"one": make_keys([1])})
    assert index.add({}) is index
    assert index.drop({"other"}) is index
    assert len(index.drop({"one"})) == 0
