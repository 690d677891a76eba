from __future__ import annotations

import json
import logging
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
)

from feature_cache import (
    CacheVersionError,
    CorruptRecordError,
    NotACacheError,
    ReadOnlyCacheError,
    StoreError,
)
from feature_cache.store import (
    CODECS,
    FORMAT_VERSION,
    Counter,
    NewRecord,
    Space,
    Store,
    Usage,
    counters,
    read_runs,
    sum_usage,
)
from feature_cache.store import space as space_module
from feature_cache.store.counters import merge_runs
from feature_cache.store.layers import FolderLayer, LayeredSpace
from feature_cache.store.maintenance import compact_space, plan_gc, repair, run_gc, verify
from feature_cache.store.pack_contents import read_keys
from samples import (
    GRIDS,
    KINDS,
    content,
    contents,
    create_caches,
    die_at,
    du,
    expected,
    flip,
    fork,
    in_fork,
    make_entries,
    make_entry,
    make_key,
    make_keys,
    make_record,
    make_spec,
    wait,
    write_and_die,
    write_forever,
    write_overlapping,
)

pytestmark = pytest.mark.filterwarnings(
    # zarr's event loop is a thread; that a fork survives it is what is tested.
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)

spawn = multiprocessing.get_context("spawn")
NOBODY = 65534
numbers_of_records = st.lists(st.integers(0, 15), unique=True, max_size=8)


# Opening


def test_a_new_cache_and_the_same_reopened(tmp_path: Path) -> None:
    root = tmp_path / "some" / "where"
    Store(root).space(make_spec()).write(make_entries([1]), {})
    for mode in ("a", "r"):
        assert contents(Store(root, mode).space(make_spec()), [1, 2]) == [*expected([1]), None]
    assert (root / "CACHEDIR.TAG").read_text().startswith("Signature: 8a477f597d28d172789f06886806")


def test_an_empty_folder_becomes_a_cache(tmp_path: Path) -> None:
    Store(tmp_path)
    assert (tmp_path / "zarr.json").is_file()


def test_a_creation_that_was_cut_short_is_finished(root: Path) -> None:
    Store(root)
    (root / "zarr.json").unlink()
    (root / ".tmp-0123").write_text("half")
    assert (Store(root).root / "zarr.json").is_file()


def test_zarr_opens_root_spaces_and_packs(root: Path) -> None:
    spec = make_spec()
    for kind in ("regions", "grids"):
        Store(root).space(make_spec(kind)).write(make_entries([1], kind), {})
    group = zarr.open_group(root, mode="r")
    assert group.attrs["feature_cache"] == {"format_version": FORMAT_VERSION}
    slug = f"{spec.slug}-{spec.digest.hex()[:8]}"
    space = zarr.open_group(root / "spaces" / slug, mode="r")
    assert space.attrs["feature_cache"] == {"space": spec.to_json()}
    assert {name for name, _ in group["spaces"].groups()} == {
        space.path.name for space in Store(root).spaces()
    }
    [(_, pack)] = group[f"spaces/{slug}/packs"].groups()
    assert set(pack.array_keys()) == {"index", "features"}


@pytest.mark.parametrize("mode", ["a", "r"])
@pytest.mark.parametrize("foreign", ["a file", "other files", "a Zarr group", "a movie"])
def test_what_is_no_cache_is_left_alone(tmp_path: Path, foreign: str, mode: Any) -> None:
    root = tmp_path / "foreign"
    if foreign == "a file":
        root.write_text("text")
    elif foreign == "a Zarr group":
        zarr.create_group(root)
    else:
        root.mkdir()
        (root / "t000.tif").write_text("image")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(NotACacheError, match=str(root)):
        Store(root, mode)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("present", [False, True])
def test_reading_makes_no_cache(root: Path, present: bool) -> None:
    if present:
        root.mkdir()
    with pytest.raises(NotACacheError, match=str(root)):
        Store(root, "r")
    assert root.exists() == present
    assert not present or not os.listdir(root)


@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_newer_format_is_refused_by_both_versions(root: Path, mode: Any) -> None:
    Store(root)
    meta = json.loads((root / "zarr.json").read_bytes())
    meta["attributes"]["feature_cache"]["format_version"] = FORMAT_VERSION + 41
    (root / "zarr.json").write_text(json.dumps(meta))
    with pytest.raises(CacheVersionError, match=rf"{FORMAT_VERSION + 41}.* {FORMAT_VERSION}\b"):
        Store(root, mode)


@pytest.mark.parametrize("mode", ["a", "r"])
@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"attributes": 3}', "\x00" * 99])
def test_damaged_metadata_of_the_root_raise(root: Path, text: str, mode: Any) -> None:
    Store(root)
    (root / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match=str(root)):
        Store(root, mode)
    assert (root / "zarr.json").read_text() == text


@pytest.mark.parametrize("text", ["", "[]", '{"attributes": {}}', '{"attributes": {"a": 1}}'])
def test_damaged_metadata_of_a_space_raise(
    space: Space, root: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    space.write(make_entries([1]), {})
    (space.path / "zarr.json").write_text(text)
    with pytest.raises(StoreError, match="damaged"):
        Store(root).space(make_spec())
    assert Store(root).spaces() == []
    assert f"{space.path / 'zarr.json'} is damaged" in caplog.text


def test_another_spec_under_the_same_name_raises(root: Path, space: Space) -> None:
    space.write(make_entries([1]), {})
    file = space.path / "zarr.json"
    file.write_text(file.read_text().replace('"last"', '"first"'))
    with pytest.raises(StoreError, match="another spec"):
        Store(root).space(make_spec())


def test_an_unknown_mode_is_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="'w'"):
        Store(root, "w")  # type: ignore[arg-type]
    assert not root.exists()


def test_a_parent_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    with pytest.raises(StoreError, match="file"):
        Store(tmp_path / "file" / "cache")


def test_nothing_is_written_in_mode_r(root: Path, space: Space) -> None:
    space.write(make_entries([1]), {})
    before = sorted(root.rglob("*"))
    reader = Store(root, "r").space(make_spec())
    with pytest.raises(ReadOnlyCacheError, match="mode 'r'"):
        reader.write(make_entries([2]), {})
    assert contents(reader, [1, 2]) == [*expected([1]), None]
    assert sorted(root.rglob("*")) == before


def test_without_permission_to_write(public_folder: Path) -> None:
    root = public_folder / "cache"
    space = Store(root).space(make_spec())
    space.write(make_entries([1]), {})

    def check() -> None:
        with pytest.raises(ReadOnlyCacheError, match="mode='r'"):
            Store(root)
        with pytest.raises(ReadOnlyCacheError, match="no permission"):
            Store(public_folder / "new")
        reader = Store(root, "r").space(make_spec())
        assert contents(reader, [1, 2]) == [*expected([1]), None]
        with pytest.raises(ReadOnlyCacheError, match="no permission"):
            space.write(make_entries([2]), {})

    in_fork(check, uid=NOBODY)
    assert {path.name for path in public_folder.iterdir()} == {"cache"}
    assert not list(root.rglob(".tmp-*"))


@pytest.mark.parametrize("closed", [".", "..", "zarr.json", "spaces", "packs", "pack", "features"])
def test_without_permission_to_read(public_folder: Path, closed: str) -> None:
    root = public_folder / "caches" / "cache"
    space = Store(root).space(make_spec())
    space.write(make_entries([1]), {})
    [pack] = (space.packs_folder / name for name in space.pack_names())
    places = {"packs": space.packs_folder, "pack": pack, "features": pack / "features"}
    places.get(closed, root / closed).chmod(0)

    def check() -> None:
        with pytest.raises(StoreError, match=str(public_folder)):
            contents(Store(root, "r").space(make_spec()), [1])

    in_fork(check, uid=NOBODY)
    assert contents(Store(root).space(make_spec()), [1]) == expected([1])


def test_two_processes_create_the_same_caches(tmp_path: Path) -> None:
    barrier = spawn.Barrier(2)
    both = [spawn.Process(target=create_caches, args=(tmp_path, 12, barrier)) for _ in range(2)]
    finish(both)
    for i in range(12):
        assert contents(Store(tmp_path / str(i), "r").space(make_spec()), [i]) == expected([i])
        [space] = Store(tmp_path / str(i)).spaces()
        assert len(space.pack_names()) == 1
    assert not list(tmp_path.rglob(".tmp-*"))


def finish(processes: Iterable[Any]) -> None:
    """Run processes to their end; each must end well."""
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * len(list(processes))


# Reading what was written


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(["float16", "float32"]),
    codec=st.sampled_from(CODECS),
    packs=st.lists(numbers_of_records, max_size=5),
    asked=st.lists(st.integers(0, 20), max_size=30),
)
def test_any_records_in_any_packs_asked_in_any_order(
    kind: str, dtype: str, codec: str, packs: list[list[int]], asked: list[int]
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        space = Store(folder).space(make_spec(kind, dtype))
        for numbers in packs:
            space.write(make_entries(numbers, kind, dtype), {}, codec)
        written = {number for numbers in packs for number in numbers}
        wanted = [
            content(make_record(number, kind, dtype)) if number in written else None
            for number in asked
        ]
        for reader in (space, Store(folder, "r").space(make_spec(kind, dtype))):
            assert contents(reader, asked) == wanted
            assert reader.contains(make_keys(asked)).tolist() == [n in written for n in asked]
            reader.refresh()
            assert len(reader) == len(written)


def test_grids_of_different_shapes_go_to_different_packs(root: Path) -> None:
    space = Store(root).space(make_spec("grids"))
    kinds = list(GRIDS) * 2
    entries = [make_entry(i, kind) for i, kind in enumerate(kinds)]
    space.write(entries, {})
    assert len(space.pack_names()) == len(GRIDS)
    assert contents(space, range(len(kinds))) == [content(entry.record) for entry in entries]


def test_more_packs_than_are_kept_open(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("feature_cache.store.space._OPEN_PACKS", 3)
    space = Store(root).space(make_spec())
    for i in range(8):
        space.write([make_entry(i)], {})
    held = space.read(make_keys(range(8)))
    assert [content(record) for record in held] == expected(range(8))
    assert contents(space, [7, 0, 7, 3, 0]) == expected([7, 0, 7, 3, 0])


def test_files_of_others_among_the_packs_do_no_harm(root: Path, space: Space) -> None:
    space.write(make_entries([1]), {})
    (space.packs_folder / "Thumbs.db").write_text("not ours")
    (space.packs_folder / "notes").mkdir()
    (space.packs_folder / ".nfs0001").write_text("not ours")
    assert contents(Store(root).space(make_spec()), [1, 2]) == [*expected([1]), None]
    assert (space.packs_folder / "notes").is_dir()


@settings(max_examples=12, stateful_step_count=20, deadline=None)
class SpaceAgainstDict(RuleBasedStateMachine):
    """Two processes' views of a cache, against a dict: what it surely has, and what it may have.

    Records 16 to 19 are those of a cache below.
    """

    @initialize(kind=st.sampled_from(KINDS), dtype=st.sampled_from(["float16", "float32"]))
    def create(self, kind: str, dtype: str) -> None:
        self.folder = Path(tempfile.mkdtemp())
        self.options = kind, dtype
        self.sure: dict[int, tuple[Any, ...]] = {}
        self.maybe: set[int] = set()
        below = Store(self.folder / "below").space(make_spec(*self.options))
        below.write(make_entries(range(16, 20), *self.options), {})
        self.root = self.folder / "cache"
        self.first = self.open()
        self.second = self.open()

    def teardown(self) -> None:
        shutil.rmtree(getattr(self, "folder", "nothing"), ignore_errors=True)

    def open(self) -> Space:
        return Store(self.root).space(make_spec(*self.options))

    def check(self, space: Space, numbers: list[int]) -> None:
        """Read records: each is right, or missing where it may be."""
        right = expected(numbers, *self.options)
        for number, read, one in zip(numbers, contents(space, numbers), right, strict=True):
            if number in self.sure:
                assert read == one, number
            else:
                assert read is None or (number in self.maybe and read == one), number

    def doubt(self, pack: Path) -> None:
        """The records of a pack may be missing from now on."""
        numbers = [n for n in range(16) if make_key(n) in {k.tobytes() for k in read_keys(pack)}]
        for number in numbers:
            self.sure.pop(number, None)
            self.maybe.add(number)

    def packs(self) -> list[Path]:
        space = self.open()
        return [space.packs_folder / name for name in space.pack_names()]

    @rule(numbers=numbers_of_records, codec=st.sampled_from(CODECS))
    def write(self, numbers: list[int], codec: str) -> None:
        missing = [n for n in numbers if not self.first.contains(make_keys([n]))[0]]
        self.first.write(make_entries(missing, *self.options), {}, codec)
        self.sure |= {n: content(make_record(n, *self.options)) for n in missing}
        self.maybe -= set(missing)

    @rule(numbers=numbers_of_records)
    def write_in_the_second(self, numbers: list[int]) -> None:
        self.first, self.second = self.second, self.first
        entries = make_entries([n for n in numbers if n in self.sure], *self.options)
        self.first.write(entries, {})
        self.write(numbers, "raw")

    @rule()
    def reopen(self) -> None:
        self.first = self.open()

    @rule()
    def pickle(self) -> None:
        self.first = pickle.loads(pickle.dumps(self.first))

    @rule()
    def refresh_the_second(self) -> None:
        self.second.refresh()
        promoted = 4
        assert len(self.sure) <= len(self.second) <= len(self.sure) + len(self.maybe) + promoted

    @rule(numbers=st.lists(st.integers(0, 15)))
    def read(self, numbers: list[int]) -> None:
        for space in (self.first, self.second):
            self.check(space, numbers)

    @rule(numbers=st.lists(st.integers(0, 15)))
    def contains(self, numbers: list[int]) -> None:
        for space in (self.second, self.first):
            found = space.contains(make_keys(numbers)).tolist()
            for number, one in zip(numbers, found, strict=True):
                assert one == (number in self.sure) or number in self.maybe

    @rule(numbers=st.lists(st.integers(0, 15)), promote=st.booleans())
    def read_layers(self, numbers: list[int], promote: bool) -> None:
        below = Store(self.folder / "below", "r").space(make_spec(*self.options))
        layered = LayeredSpace(self.first, [FolderLayer(below, promote=promote)])
        self.check(layered, numbers)
        assert contents(layered, range(16, 20)) == expected(range(16, 20), *self.options)

    @rule()
    def compact(self) -> None:
        compact_space(self.first)
        again = compact_space(self.open())
        assert (again.merged, again.duplicates) == (0, 0)

    @rule(share=st.sampled_from([0.0, 0.5, 2.0]))
    def collect(self, share: float) -> None:
        store = Store(self.root)
        plan = plan_gc(store, max_bytes=int(share * self.first.disk_bytes()))
        for eviction in plan.evictions:
            self.doubt(self.first.packs_folder / eviction.pack)
        run_gc(store, plan)

    @rule(numbers=numbers_of_records, call=st.integers(1, 40))
    def kill_a_writer(self, numbers: list[int], call: int) -> None:
        absent = [number for number in numbers if number not in self.sure]

        def write() -> None:
            die_at(call, "fsync", "rename", "replace", "mkdir")
            self.open().write(make_entries(absent, *self.options), {})

        assert wait(fork(write)) in (0, -signal.SIGKILL)
        self.maybe |= set(absent)

    @precondition(lambda self: self.packs())
    @rule(data=st.data(), truncate=st.booleans())
    def corrupt(self, data: st.DataObject, truncate: bool) -> None:
        pack = data.draw(st.sampled_from(self.packs()))
        files = [f for f in sorted(pack.rglob("*")) if f.is_file() and f.stat().st_size]
        file = data.draw(st.sampled_from(files))
        with suppress(CorruptRecordError):
            self.doubt(pack)
        changed = bytearray(file.read_bytes())
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
        file.with_name(".tmp-other").write_bytes(changed[:place] if truncate else changed)
        file.with_name(".tmp-other").rename(file)

    @precondition(lambda self: self.packs())
    @rule(data=st.data())
    def lose_a_pack(self, data: st.DataObject) -> None:
        """Another process removes a pack, by a rename as all do."""
        pack = data.draw(st.sampled_from(self.packs()))
        with suppress(CorruptRecordError):
            self.doubt(pack)
        pack.rename(self.folder / "aside")
        shutil.rmtree(self.folder / "aside")
        for space in (self.first, self.second):
            space.refresh()

    @rule()
    def repair(self) -> None:
        repair(self.root, verify(self.root))
        assert {finding.kind for finding in verify(self.root)} <= {"duplicate"}


TestSpaceAgainstDict = SpaceAgainstDict.TestCase


# Damage, in a cache that may be written


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how == "delete":
        file.unlink()
    elif how == "truncate":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[:10] + bytes([data[10] ^ 4]) + data[11:])


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("part", ["chunk", "zarr.json"])
@pytest.mark.parametrize("array", ["index", "features"])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_damaged_pack_is_set_aside_and_can_be_written_again(
    root: Path, caplog: pytest.LogCaptureFixture, array: str, part: str, how: str, codec: str
) -> None:
    space = Store(root).space(make_spec())
    space.write(make_entries([2, 3, 4]), {}, codec)
    [name] = space.pack_names()
    space.write(make_entries([6, 7]), {}, codec)
    folder = space.packs_folder / name / array
    damage(next(folder.glob("c.0*")) if part == "chunk" else folder / part, how)
    with pytest.raises(CorruptRecordError):
        contents(Store(root, "r").space(make_spec()), [2])
    assert not (root / "quarantine").exists()

    caplog.clear()
    reader = Store(root).space(make_spec())
    with caplog.at_level(logging.WARNING, "feature_cache"):
        assert contents(reader, [2, 3, 4, 6, 7]) == [None, None, None, *expected([6, 7])]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    [aside] = (root / "quarantine").iterdir()
    assert name in aside.name
    assert str(aside) in caplog.text
    assert not reader.contains(make_keys([2, 3, 4])).any()

    reader.write(make_entries([2, 3, 4]), {}, codec)
    for again in (reader, Store(root, "r").space(make_spec())):
        assert contents(again, [2, 3, 4, 6, 7]) == expected([2, 3, 4, 6, 7])


def test_a_copy_of_a_damaged_record_is_found_in_another_pack(root: Path, space: Space) -> None:
    space.write(make_entries([1, 2]), {})
    [name] = space.pack_names()
    space.write(make_entries([2, 3]), {})
    damage(space.packs_folder / name / "features" / "c.0.0", "truncate")
    assert contents(Store(root).space(make_spec()), [1, 2, 3]) == [None, *expected([2, 3])]


def test_a_damaged_grid_spares_the_records_read_before(root: Path) -> None:
    space = Store(root).space(make_spec("grids"))
    space.write(make_entries(range(4), "grids"), {})
    [name] = space.pack_names()
    size = make_record(0, "grids").features.nbytes + 4
    flip(space.packs_folder / name / "features" / "c.0.0.0.0", 2 * size + 10)
    right = expected(range(4), "grids")
    assert contents(space, range(4)) == [*right[:2], None, None]
    assert contents(space, range(4)) == [None] * 4


def test_a_pack_written_anew_is_not_condemned_for_the_old_one(root: Path, space: Space) -> None:
    space.write(make_entries([2, 3]), {})
    late = Store(root).space(make_spec())
    assert contents(late, [2]) == expected([2])
    [name] = space.pack_names()
    chunk = space.packs_folder / name / "features" / "c.0.0"
    data = bytearray(chunk.read_bytes())
    data[4 * 16 + 3] ^= 1  # a bit of record 3; in the same file, which is open
    with open(chunk, "r+b") as file:
        file.write(data)
    early = Store(root).space(make_spec())
    assert contents(early, [3]) == [None]
    early.write(make_entries([2, 3]), {})
    assert contents(late, [3, 2]) == expected([3, 2])
    assert early.pack_names() == [name]
    assert len(list((root / "quarantine").iterdir())) == 1


def test_an_open_pack_is_not_opened_again(root: Path, space: Space) -> None:
    space.write(make_entries([2, 3]), {})
    assert contents(space, [2]) == expected([2])
    [name] = space.pack_names()
    (space.packs_folder / name).rename(root / "elsewhere")
    assert contents(space, [2, 3]) == expected([2, 3])
    space.refresh()
    assert contents(space, [2, 3]) == [None, None]


def test_a_pack_set_aside_by_another_process_is_a_miss(root: Path, space: Space) -> None:
    space.write(make_entries([2, 3]), {})
    late = Store(root).space(make_spec())
    assert late.contains(make_keys([2])).all()
    [name] = space.pack_names()
    (space.packs_folder / name).rename(root / "elsewhere")
    assert contents(late, [2, 3]) == [None, None]
    assert not (root / "quarantine").exists()


def test_a_pack_set_aside_while_another_thread_looks_stays_aside(
    root: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    space.write(make_entries([2, 3]), {})
    [name] = space.pack_names()
    reader = Store(root, "r").space(make_spec())
    assert reader.contains(make_keys([2])).all()
    damage(space.packs_folder / name / "features" / "c.0.0", "flip")
    space.write(make_entries([4]), {})
    is_looking, is_set_aside = threading.Event(), threading.Event()

    def read_slowly(pack: Path) -> Any:
        if threading.current_thread() is not threading.main_thread():
            is_looking.set()
            is_set_aside.wait(0.5)
        return read_keys(pack)

    monkeypatch.setattr(space_module, "read_keys", read_slowly)
    thread = threading.Thread(target=reader.refresh)
    thread.start()
    is_looking.wait()
    reader.condemn(name, CorruptRecordError("it is damaged"))
    is_set_aside.set()
    thread.join()
    assert name not in reader.pack_records()
    with pytest.raises(CorruptRecordError, match="it is damaged"):
        contents(reader, [2])
    assert contents(reader, [4]) == expected([4])


def test_a_pack_is_set_aside_while_another_thread_asks_what_was(
    root: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in (2, 3):
        space.write(make_entries([number]), {})
    for name in space.pack_names():
        damage(space.packs_folder / name / "features" / "c.0.0", "flip")
    reader = Store(root, "r").space(make_spec())

    class Interrupted(np.ndarray[Any, Any]):
        def __iter__(self) -> Any:
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(reader.find, make_keys([3])).result() == [None]
            return super().__iter__()

    monkeypatch.setattr(space_module, "read_keys", lambda pack: read_keys(pack).view(Interrupted))
    assert reader.find(make_keys([2])) == [None]
    assert reader.read(make_keys([9])) == [None]
    for number in (2, 3):
        with pytest.raises(CorruptRecordError):
            reader.read(make_keys([number]))


# Processes


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("kind", ["regions", "grids"])
def test_a_fork_reads_what_is_mapped_and_what_is_not(root: Path, kind: str, codec: str) -> None:
    space = Store(root).space(make_spec(kind))
    space.write(make_entries(range(4), kind), {}, codec)
    space.write(make_entries(range(4, 8), kind), {}, codec)
    held = space.read(make_keys(range(2)))

    def check() -> None:
        assert [content(record) for record in held] == expected(range(2), kind)
        assert contents(space, range(8)) == expected(range(8), kind)
        space.write(make_entries([9], kind), {}, codec)

    in_fork(check)
    in_fork(check)
    assert contents(space, range(10)) == [*expected(range(8), kind), None, *expected([9], kind)]


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_pickles_are_small_and_read_the_same_in_a_new_process(root: Path, codec: str) -> None:
    store = Store(root)
    space = store.space(make_spec())
    big = make_record(4)
    rows = np.arange(50_000, dtype=np.int32)
    features = np.resize(big.features, (50_000, big.features.shape[1]))
    entry = NewRecord(make_keys([99]).tobytes(), type(big)(features, rows), {})
    space.write([*make_entries(range(8)), entry], {}, codec)
    assert contents(space, range(8)) == expected(range(8))
    for thing in (space, store):
        assert len(pickle.dumps(thing)) < 2000
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        assert pool.submit(contents, space, [*range(9)]).result(120) == [*expected(range(8)), None]
        assert pool.submit(Store.spaces, store).result(120)[0].path == space.path
    assert pickle.loads(pickle.dumps(Store(root, "r"))).mode == "r"


def test_writers_at_once_lose_nothing(root: Path) -> None:
    Store(root)
    barrier = spawn.Barrier(3)
    writers = [
        spawn.Process(target=write_overlapping, args=(root, seed, barrier)) for seed in range(3)
    ]
    for writer in writers:
        writer.start()
    reader, right = Store(root, "r").space(make_spec()), expected(range(40))
    while any(writer.is_alive() for writer in writers):
        read = contents(reader, range(40))
        assert all(one in (None, two) for one, two in zip(read, right, strict=True))
    finish_started(writers)
    written = {n for seed in range(3) for n in overlapping_numbers(seed)}
    fresh = Store(root).space(make_spec())
    assert contents(fresh, range(40)) == [
        one if n in written else None for n, one in enumerate(right)
    ]
    assert len(fresh) == len(written)
    assert not list(root.rglob(".tmp-*"))
    assert not (root / "quarantine").exists()


def overlapping_numbers(seed: int) -> set[int]:
    rng = np.random.default_rng(seed)
    return {n for _ in range(8) for n in rng.choice(40, 10, replace=False).tolist()}


def finish_started(processes: Iterable[Any]) -> None:
    for process in processes:
        process.join(120)
        assert process.exitcode == 0


@pytest.mark.parametrize(
    ("call", "count", "after", "committed"),
    [
        ("fsync", 1, False, False),
        ("fsync", 8, True, False),
        ("mkdir", 3, False, False),
        ("rename", 1, False, False),
        ("rename", 1, True, True),
        ("rename", 99, True, True),
    ],
)
def test_a_killed_writer_leaves_a_whole_pack_or_none(
    root: Path, call: str, count: int, after: bool, committed: bool
) -> None:
    writer = spawn.Process(target=write_and_die, args=(root, call, count), kwargs={"after": after})
    writer.start()
    writer.join(120)
    assert writer.exitcode == (0 if count == 99 else -signal.SIGKILL)
    left = list(root.rglob(".tmp-*"))
    assert bool(left) == (not committed)
    for mode in ("r", "a"):
        space = Store(root, mode).space(make_spec())
        found = contents(space, range(8))
        assert found == expected(range(4)) + (expected(range(4, 8)) if committed else [None] * 4)
        assert len(space.pack_names()) == 1 + committed
    space.write(make_entries(range(4, 8)), {})
    assert contents(space, range(8)) == expected(range(8))
    assert not (root / "quarantine").exists()


@pytest.mark.parametrize("seconds", [0.0, 0.003, 0.008])
def test_a_writer_killed_at_any_time(root: Path, seconds: float) -> None:
    receiver, sender = spawn.Pipe(duplex=False)
    writer = spawn.Process(target=write_forever, args=(root, sender))
    writer.start()
    sender.close()
    while receiver.recv() < 5:
        pass
    time.sleep(seconds)
    writer.kill()
    writer.join(120)
    last = 5
    while receiver.poll():
        try:
            last = receiver.recv()
        except EOFError:
            break
    space = Store(root, "r").space(make_spec())
    assert contents(space, range(last + 1)) == expected(range(last + 1))
    assert contents(space, [last + 1]) in ([None], expected([last + 1]))
    assert contents(space, range(last + 2, last + 20)) == [None] * 18


# Counters and sizes


def test_usage_is_summed_over_processes(root: Path) -> None:
    def count(*usages: Usage) -> None:
        counter = Counter(Store(root))
        for usage in usages:
            counter.add(usage)
            counter.save()

    in_fork(lambda: count(Usage(1, 2, 3, 4, 5), Usage(hits=1)))
    in_fork(lambda: count(Usage(10, 20, 30)))
    assert sum_usage(read_runs(root)) == Usage(12, 22, 33, 4, 5)
    assert len(read_runs(root)) == 2
    assert merge_runs(root, time.time() + 1) == 2
    assert [run.usage for run in read_runs(root)] == [Usage(12, 22, 33, 4, 5)]
    (root / "stats" / "old.json").write_text('{"hits":1,"misses":0,"computed":7}')
    (root / "stats" / "broken.json").write_text('{"hits":"x"}')
    assert sum_usage(read_runs(root)) == Usage(13, 22, 40, 4, 5)


def test_threads_that_count_at_once_lose_nothing(root: Path) -> None:
    counter = Counter(Store(root))

    class Slow(Usage):
        """Is added up so slowly that another thread comes in between."""

        def __radd__(self, other: Usage) -> Usage:
            time.sleep(1e-4)
            return Usage(other.hits + self.hits)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(lambda _: counter.add(Slow(1)), range(100)))
    assert counter.total == Usage(100)


def test_an_older_count_is_never_kept_last(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, real = Counter(Store(root)), counters.write_text
    begun, saved = threading.Event(), threading.Event()

    def write_late(*args: Any) -> None:
        if not begun.is_set():
            begun.set()
            saved.wait(0.2)
        real(*args)

    def save_more() -> None:
        assert begun.wait(60)
        counter.add(Usage(1))
        counter.save()
        saved.set()

    monkeypatch.setattr(counters, "write_text", write_late)
    counter.add(Usage(1))
    with ThreadPoolExecutor(1) as threads:
        saving = threads.submit(save_more)
        counter.save()
        saving.result()
    assert sum_usage(read_runs(root)) == Usage(2)


def test_disk_bytes_are_those_of_the_committed_packs(space: Space) -> None:
    assert space.disk_bytes() == 0
    space.write(make_entries(range(5)), {})
    [pack] = (space.packs_folder / name for name in space.pack_names())
    shutil.copytree(pack, space.packs_folder / ".tmp-half")
    assert space.disk_bytes() == du(pack)
