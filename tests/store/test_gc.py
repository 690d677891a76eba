from __future__ import annotations

import json
import os
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from feature_cache import MissingRecordError
from feature_cache.store import Counter, Space, Store, Usage, counters, read_runs, sum_usage, writer
from feature_cache.store.inspection import record_sources
from feature_cache.store.maintenance import (
    GarbageReport,
    collect,
    compact_space,
    plan_gc,
    repair,
    run_gc,
    verify,
)
from feature_cache.store.maintenance.removal import remove_tree
from feature_cache.store.process import GONE_SECONDS, this_host
from feature_cache.store.requested_movies import ASKED_SECONDS
from samples import (
    content,
    contents,
    die_at,
    du,
    expected,
    forge_process,
    fork,
    in_fork,
    make_entries,
    make_entry,
    make_key,
    make_keys,
    make_older,
    make_record,
    make_spec,
    wait,
)

pytestmark = pytest.mark.filterwarnings(
    # zarr's event loop is a thread; that a fork survives it is what is tested.
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)


@pytest.fixture
def packs(space: Space) -> list[str]:
    """Four packs with one record each, 1 to 4, last used 400, 300, 200 and 100 s ago."""
    names = []
    for number in range(1, 5):
        names += space.write([make_entry(number)], {})
        set_age(space, names[-1], 100.0 * (5 - number))
    return names


def set_age(space: Space, name: str, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(space.packs_folder / name, (then, then))


def collect_garbage(root: Path, **options: Any) -> GarbageReport:
    store = Store(root)
    return run_gc(store, plan_gc(store, **options))


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    wait(child)


# What goes


def test_a_plan_removes_nothing(root: Path, space: Space, packs: list[str]) -> None:
    plan = plan_gc(Store(root), max_bytes=0)
    assert [eviction.pack for eviction in plan.evictions] == packs
    assert plan.bytes == space.disk_bytes() == sum(du(space.packs_folder / name) for name in packs)
    assert plan.other_bytes == du(root) - plan.bytes
    assert contents(Store(root).space(make_spec()), range(1, 5)) == expected(range(1, 5))
    assert plan_gc(Store(root)).evictions == ()


@pytest.mark.parametrize("kept", range(5))
def test_the_least_recently_used_go_until_the_rest_fits_exactly(
    root: Path, space: Space, packs: list[str], kept: int
) -> None:
    sizes = [du(space.packs_folder / name) for name in packs]
    budget = du(root) - sum(sizes[: 4 - kept])
    report = collect_garbage(root, max_bytes=budget)
    assert report.evicted == report.records == 4 - kept
    assert report.freed_bytes == sum(sizes[: 4 - kept])
    assert space.disk_bytes() == sum(sizes[4 - kept :])
    right = [None] * (4 - kept) + expected(range(5 - kept, 5))
    assert contents(Store(root).space(make_spec()), range(1, 5)) == right
    assert verify(root) == []


def test_what_was_not_used_for_long_goes(root: Path, space: Space, packs: list[str]) -> None:
    assert collect_garbage(root, max_age_seconds=250).evicted == 2
    assert space.pack_names() == sorted(packs[2:])


def test_a_clock_that_jumped_lets_nothing_go(
    root: Path, space: Space, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    later = time.time() + 1e7
    monkeypatch.setattr(time, "time", lambda: later)
    assert collect_garbage(root, max_age_seconds=250).evicted == 2


@pytest.mark.parametrize("by", ["this process", "a process that ended"])
def test_reading_makes_a_pack_newer_and_listing_does_not(
    root: Path, space: Space, packs: list[str], by: str
) -> None:
    def use() -> None:
        reader = Store(root).space(make_spec())
        assert contents(reader, [1]) == expected([1])
        assert reader.contains(make_keys([2])).all()
        if by != "this process":
            Store(root).presence.leave()
        else:
            plan = plan_gc(Store(root), max_bytes=0)
            assert [e.pack for e in plan.evictions] == [*packs[1:], packs[0]]

    if by == "this process":
        use()
    else:
        in_fork(use)
    plan = plan_gc(Store(root), max_bytes=0)
    assert [eviction.pack for eviction in plan.evictions] == [*packs[1:], packs[0]]


def test_access_times_of_files_do_not_matter(root: Path, space: Space, packs: list[str]) -> None:
    for name in packs:
        folder = space.packs_folder / name
        before = folder.stat().st_mtime
        for file in filter(Path.is_file, folder.rglob("*")):
            os.utime(file, (2e9 - before, 0))
        os.utime(folder, (2e9 - before, before))
    evictions = plan_gc(Store(root), max_bytes=0).evictions
    assert [eviction.pack for eviction in evictions] == packs


def order(root: Path, **options: Any) -> list[str]:
    """Name the packs in the order in which they would go."""
    plan = plan_gc(Store(root), **(options or {"max_bytes": 0}))
    return [eviction.pack for eviction in plan.evictions]


def reading(root: Path, number: int, *, uid: int | None = None) -> int:
    """Start a process that reads a record again and again, notes it, and waits."""
    ready = root.parent / "ready"

    def read() -> None:
        reader = Store(root, "r").space(make_spec())
        assert contents(reader, [number] * 3) == expected([number] * 3)
        Store(root, "r").presence.note()
        time.sleep(100)

    child = fork(read, uid)
    while not any(name.startswith(this_host()) for name in os.listdir(root / "uses")):
        time.sleep(0.005)
    assert not ready.exists()
    return child


@pytest.mark.parametrize("killed", [False, True])
def test_what_another_process_reads_is_known_at_once_and_after_its_end(
    root: Path, packs: list[str], killed: bool
) -> None:
    child = reading(root, 2)
    if killed:
        kill(child)
    assert order(root) == [packs[0], packs[2], packs[3], packs[1]]
    assert order(root, max_age_seconds=250) == packs[:1]
    if killed:
        assert collect_garbage(root).records == 0  # the time goes to the pack, the file goes
        assert os.listdir(root / "uses") == []
        assert order(root) == [packs[0], packs[2], packs[3], packs[1]]
    else:
        kill(child)


def write_uses(root: Path, process: str, uses: Any, written: float = 0.0) -> Path:
    """Write what a process says that it used, some seconds ago."""
    file = root / "uses" / process
    file.write_text(uses if isinstance(uses, str) else json.dumps(uses))
    make_older(file, written)
    return file


def test_what_a_running_process_read_in_the_last_day_goes_last(
    root: Path, space: Space, packs: list[str]
) -> None:
    lately, long_ago = 20 * 3600.0, 30 * 3600.0
    for name in packs:
        set_age(space, name, 3600.0 * 40)
    running = forge_process(root)
    write_uses(root, running, {space.name: {packs[0]: lately, packs[1]: long_ago}})
    ended = forge_process(root, age=2 * GONE_SECONDS)
    write_uses(root, ended, {space.name: {packs[2]: 60.0, packs[3]: 90.0}}, 2 * GONE_SECONDS)
    assert order(root) == [packs[1], packs[3], packs[2], packs[0]]
    assert order(root, max_age_seconds=25 * 3600.0) == packs[1:2]


def test_a_use_that_an_ended_process_noted_goes_to_the_pack_as_the_file_system_counts(
    root: Path, space: Space, packs: list[str]
) -> None:
    file = write_uses(root, "gone_01234567-1-0123456789abcdef", {space.name: {packs[0]: 50.0}}, 2e3)
    [used] = [file.stat().st_mtime - 50.0]
    for name in packs:
        set_age(space, name, 5e3)
    collect_garbage(root)
    assert not file.exists()
    assert space.pack_times()[packs[0]] == pytest.approx(used, abs=1e-3)
    assert order(root)[-1] == packs[0]


@pytest.mark.parametrize(
    "text", ["", "[1]", '{"%s":3}', '{"%s":{"x":"y"}}', '{"%s":{"../../..":1}}', '{"..":{"x":1}}']
)
def test_files_of_uses_that_hold_something_else_are_left_out(
    root: Path, space: Space, packs: list[str], text: str
) -> None:
    write_uses(root, "odd_01234567-1-0123456789abcdef", text.replace("%s", space.name), 2e3)
    assert order(root) == packs
    collect_garbage(root)
    assert order(root) == packs


@pytest.mark.skipif(os.getuid() != 0, reason="only root may become another user")
@pytest.mark.parametrize("open_to_all", [False, True])
def test_readers_who_may_not_write_are_seen_where_they_may_note_it(
    public_folder: Path, open_to_all: bool
) -> None:
    public_root = public_folder / "cache"
    space = Store(public_root).space(make_spec())
    packs = [space.write([make_entry(number)], {})[0] for number in range(1, 4)]
    for age, name in enumerate(packs):
        set_age(space, name, 1000.0 - age)
    if open_to_all:
        (public_root / "uses").chmod(0o1777)

    def read() -> None:
        reader = Store(public_root, "r").space(make_spec())
        assert contents(reader, [1]) == expected([1])
        Store(public_root, "r").presence.leave()

    in_fork(read, 1234)
    plan = plan_gc(Store(public_root), max_bytes=0)
    assert [e.pack for e in plan.evictions] == ([*packs[1:], packs[0]] if open_to_all else packs)
    assert ("others" in plan.unseen) != open_to_all
    collect_garbage(public_root)
    assert order(public_root) == [e.pack for e in plan.evictions]


def test_in_parts(root: Path, space: Space, packs: list[str]) -> None:
    store, sizes = Store(root), []
    for name in (".tmp-0123", ".tmp-4567"):
        (space.packs_folder / name).mkdir()
        make_older(space.packs_folder / name, 7200)
    while True:
        report = run_gc(store, plan_gc(store, max_bytes=0), max_seconds=0.0)
        sizes.append(du(root))
        if report.is_done:
            break
    assert len(sizes) > len(packs)
    assert sizes == sorted(sizes, reverse=True)
    assert os.listdir(space.packs_folder) == ["zarr.json"]


def test_the_whole_is_what_du_says_and_several_names_count_once(
    root: Path, space: Space, packs: list[str]
) -> None:
    file = space.packs_folder / packs[0] / "features" / "c.0.0"
    os.link(file, file.with_name("1"))
    plan = plan_gc(Store(root), max_bytes=du(root))
    assert plan.evictions == ()
    assert plan.kept_bytes + plan.other_bytes == du(root)
    assert space.disk_bytes() == sum(du(space.packs_folder / name) for name in packs)
    Counter(Store(root)).save()
    budget = du(root) - 1
    assert collect_garbage(root, max_bytes=budget).evicted == 1
    assert du(root) <= budget


def test_only_the_spaces_named(root: Path, space: Space, packs: list[str]) -> None:
    other = Store(root).space(make_spec("grids"))
    other.write(make_entries([1], "grids"), {})
    assert collect_garbage(root, max_bytes=0, spaces=[other.name[:9]]).evicted == 1
    assert space.pack_names() == sorted(packs)
    assert other.pack_names() == []
    with pytest.raises(MissingRecordError, match="nothing"):
        plan_gc(Store(root), spaces=["nothing"])


def test_what_is_used_or_pinned_after_the_plan_stays(
    root: Path, space: Space, packs: list[str]
) -> None:
    from feature_cache.store.maintenance import add_pin

    store = Store(root)
    plan = plan_gc(store, max_bytes=0)
    os.utime(space.packs_folder / packs[0])
    add_pin(store, packs[1])
    assert run_gc(store, plan).evicted == 2
    assert space.pack_names() == sorted(packs[:2])


def test_quarantine_is_emptied_of_packs(root: Path, space: Space, packs: list[str]) -> None:
    chunk = next((space.packs_folder / packs[0]).glob("index/c.0"))
    chunk.write_bytes(bytes(len(chunk.read_bytes())))
    repair(root, verify(root))
    assert len(os.listdir(root / "quarantine")) == 1
    assert collect_garbage(root).freed_bytes
    assert os.listdir(root / "quarantine") == []


def test_what_another_gc_removes_meanwhile_is_not_missed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, names = Store(root), ["a.json", "b.json"]
    (root / "asked").mkdir()
    for name in names:
        (root / "asked" / name).touch()
        make_older(root / "asked" / name, ASKED_SECONDS + 60)
    real = Path.lstat

    def lstat(self: Path) -> os.stat_result:
        if self.name == names[0]:
            self.unlink(missing_ok=True)
        return real(self)

    monkeypatch.setattr(Path, "lstat", lstat)
    assert [path.name for path, _ in plan_gc(store).leftovers] == names[1:]


# Written again


def test_what_a_reader_has_open_it_reads_on_until_it_looks_again(
    root: Path, space: Space, packs: list[str]
) -> None:
    reader = Store(root, "r").space(make_spec())
    assert contents(reader, range(1, 5)) == expected(range(1, 5))
    collect_garbage(root, max_bytes=0)
    assert contents(reader, range(1, 5)) == expected(range(1, 5))
    Store(root).presence.refresh()
    assert contents(reader, range(1, 5)) == [None] * 4


@pytest.mark.parametrize(
    "moment", ["_write_arrays", "_write_metadata", "install_pack", "utime", "is_dir"]
)
def test_a_pack_removed_while_it_is_written_again_is_not_lost(
    root: Path, space: Space, packs: list[str], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    where: Any = {"utime": os, "is_dir": Path}.get(moment, writer)
    real = getattr(where, moment)

    def interrupted(*args: Any) -> Any:
        if moment == "is_dir" and args[0].name != packs[0]:
            return real(*args)
        monkeypatch.setattr(where, moment, real)
        collect_garbage(root, max_bytes=0)
        return real(*args)

    monkeypatch.setattr(where, moment, interrupted)
    space.write([make_entry(1)], {})
    for _ in range(2):
        assert contents(Store(root).space(make_spec()), [1]) == expected([1])
        collect_garbage(root)
    assert verify(root) == []


def test_a_pack_written_again_just_before_it_is_removed_stays(
    root: Path, space: Space, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == packs[0]:
            monkeypatch.setattr(Path, "rename", real)
            assert space.write([make_entry(1)], {}) == packs[:1]
        return real(self, target)

    store = Store(root)
    plan = plan_gc(store, max_bytes=0)
    monkeypatch.setattr(Path, "rename", rename)
    assert run_gc(store, plan).evicted == 3
    assert contents(Store(root).space(make_spec()), [1]) == expected([1])
    assert verify(root) == []


def test_a_pack_used_since_it_was_chosen_is_not_touched(
    root: Path, space: Space, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gc that is killed between taking it and giving it back would lose it."""
    pack = space.packs_folder / packs[0]
    last_use = pack.stat().st_mtime
    os.utime(pack)
    monkeypatch.setattr(Path, "rename", pytest.fail)
    assert not remove_tree(pack, "somebody", last_use=last_use)
    assert contents(Store(root).space(make_spec()), [1]) == expected([1])


def test_a_pack_written_again_and_removed_before_it_is_given_back_stays(
    root: Path, space: Space, packs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, is_dir = Path.rename, Path.is_dir
    pack = space.packs_folder / packs[0]

    def written_again(self: Path, target: Path) -> Path:
        if target == pack:  # it is given back, as it was used just before it was taken
            monkeypatch.setattr(Path, "rename", rename)
            space.write([make_entry(1)], {})
            monkeypatch.setattr(Path, "is_dir", removed_again)
        elif self == pack:
            os.utime(self)
        return rename(self, target)

    def removed_again(self: Path) -> bool:
        if self == pack:
            monkeypatch.setattr(Path, "is_dir", is_dir)
            shutil.rmtree(self)
        return is_dir(self)

    store = Store(root)
    plan = plan_gc(store, max_bytes=0)
    monkeypatch.setattr(Path, "rename", written_again)
    assert run_gc(store, plan).evicted == 3
    assert contents(Store(root).space(make_spec()), [1]) == expected([1])
    assert verify(root) == []


def test_readers_go_on_while_packs_are_compacted_and_collected(root: Path, space: Space) -> None:
    numbers = list(range(12))
    for number in numbers:
        space.write([make_entry(number)], {})
    stop = root.parent / "stop"

    def read_on() -> None:
        reader = Store(root).space(make_spec())
        while not stop.exists():
            assert contents(reader, numbers) == expected(numbers)
            Store(root).presence.refresh()

    def open_anew() -> None:
        while not stop.exists():
            assert contents(Store(root, "r").space(make_spec()), numbers) == expected(numbers)
            assert {*map(make_key, numbers)} <= {key for key, _ in record_sources(space)}

    children = [fork(read) for read in (read_on, open_anew) * 3]  # more than there are cores
    for number in range(12, 72):
        space.write([make_entry(number)], {})
        compact_space(space)
        if number % 6 == 0:
            collect_garbage(root)
    stop.touch()
    assert [wait(child) for child in children] == [0] * 6
    collect_garbage(root)
    assert len(os.listdir(space.packs_folder)) == 2
    assert contents(space, range(72)) == expected(range(72))


# Killed


def test_killed_between_any_two_steps_nothing_is_lost(root: Path, space: Space) -> None:
    for number in range(6):
        space.write([make_entry(number)], {})

    def tidy() -> None:
        store = Store(root)
        compact_space(store.space(make_spec()))
        collect_garbage(root)
        assert contents(store.space(make_spec()), range(6)) == expected(range(6))

    def tidy_and_die(number: int) -> None:
        die_at(number, "rename", "replace", "unlink")
        tidy()

    number = 1
    while status := wait(fork(partial(tidy_and_die, number))):
        assert status == -signal.SIGKILL
        number += 1
        reader = Store(root, "r").space(make_spec())
        assert contents(reader, range(6)) == expected(range(6))
        assert {finding.kind for finding in verify(root)} <= {"leftover", "duplicate"}
    assert number > 10
    in_fork(tidy)
    repair(root, verify(root))
    collect_garbage(root)
    assert len(space.pack_names()) == 1
    assert not list(space.path.rglob(".tmp-*"))
    assert verify(root) == []


def count(root: Path) -> None:
    counter = Counter(Store(root))
    counter.add(Usage(1, 2, 3))
    counter.save()


def test_counters_are_merged_once_whenever_it_is_killed(root: Path) -> None:
    Store(root)
    for _ in range(3):
        in_fork(partial(count, root))

    def merge_and_die(number: int) -> None:
        die_at(number, "unlink", "replace", "open")
        counters.merge_runs(root, time.time() + 1)

    number = 1
    while wait(fork(partial(merge_and_die, number))):
        number += 1
        assert sum_usage(read_runs(root)) == Usage(3, 6, 9)
    assert number > 4
    counters.merge_runs(root, time.time() + 1)
    assert len(os.listdir(root / "stats")) == 1
    assert sum_usage(read_runs(root)) == Usage(3, 6, 9)


def test_counters_are_merged_once_when_it_is_killed_twice(root: Path) -> None:
    real = Path.unlink

    def die(self: Path, missing_ok: bool = False) -> None:
        if self.suffix == ".json":
            os._exit(1)
        real(self, missing_ok)

    def merge_and_die() -> None:
        Path.unlink = die  # type: ignore[method-assign]
        counters.merge_runs(root, time.time() + 1)

    Store(root)
    in_fork(partial(count, root))
    for _ in range(2):
        in_fork(partial(count, root))
        before = set(os.listdir(root / "stats"))
        assert wait(fork(merge_and_die)) == 1
    assert len(before) == 4
    # What the second had to remove, the first one's sum before its parts.
    for name in sorted(before, reverse=True):
        (root / "stats" / name).unlink()
        assert sum_usage(read_runs(root)) == Usage(3, 6, 9)


def test_counters_of_the_living_are_not_merged_and_damaged_ones_do_no_harm(root: Path) -> None:
    counter = Counter(Store(root))
    counter.add(Usage(1, 2, 3))
    counter.save()
    for i, text in enumerate(['{"hits":1}', '{"hits":2}', '{"ended":"x"}', '{"of":3}', "[", "{}"]):
        (root / "stats" / f"{i}.json").write_text(text)
    before = sum_usage(read_runs(root))
    assert before.hits == 4
    assert counters.merge_runs(root, time.time() + 1) == 3
    assert sum_usage(read_runs(root)) == before
    counter.add(Usage(1))
    counter.save()
    assert sum_usage(read_runs(root)).hits == 5


def test_temporaries_of_unknown_writers_stay_for_an_hour(root: Path, space: Space) -> None:
    space.write([make_entry(1)], {})
    for name, age in ((".tmp-0123", 7200), (".tmp-4567", 60), (".tmp-host-1-89", 7200)):
        (space.packs_folder / name).mkdir()
        then = time.time() - age
        os.utime(space.packs_folder / name, (then, then))
    assert {path.name for path in collect.find_leftovers(root)} == {".tmp-0123", ".tmp-host-1-89"}
    collect_garbage(root)
    assert [path.name for path in root.rglob(".tmp-*")] == [".tmp-4567"]
    assert content(space.read(make_keys([1]))[0]) == content(make_record(1))
