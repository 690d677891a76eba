"""Who uses a cache."""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from feature_cache.store import Space, Store, process
from feature_cache.store.process import GONE_SECONDS, Process, join, living, this_host
from forked_processes import apart, beat_fast
from refused_threads import refuse_threads
from samples import (
    contents,
    expected,
    forge_process,
    in_fork,
    make_entries,
    make_spec,
)

pytestmark = pytest.mark.filterwarnings(
    # zarr's event loop is a thread; that a fork survives it is what is tested.
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)
NOBODY = 65534


def processes(root: Path) -> list[str]:
    return sorted(os.listdir(root / "processes"))


@pytest.fixture
def filled(root: Path, space: Space) -> Path:
    """A cache with records 0 to 3, that nobody uses."""
    space.write(make_entries(range(4)), {})
    copy = root.with_name("copy")
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns("processes"))
    return copy


def read_filled(root: Path, mode: Any = "a") -> Space:
    space = Store(root, mode).space(make_spec())
    assert contents(space, range(4)) == expected(range(4))
    return space


# Being there


@pytest.mark.parametrize("mode", ["a", "r"])
def test_a_reader_says_that_it_is_there(filled: Path, mode: Any) -> None:
    (filled / "processes").mkdir()
    read_filled(filled, mode)
    assert processes(filled) == [join(filled).name]
    told = Process.read(join(filled).file)
    assert (told.host, told.pid) == (this_host(), os.getpid())
    assert told.runs


def test_a_writer_and_a_claimer_do_too(filled: Path, root: Path) -> None:
    Store(filled).space(make_spec()).write(make_entries([9]), {})
    assert processes(filled) == [join(filled).name]
    other = Store(root.with_name("other"))
    other.claims.take(["a"])
    assert processes(other.root) == [other.presence.name]


def test_reading_in_mode_r_makes_no_folder_for_it(filled: Path) -> None:
    read_filled(filled, "r")
    assert not (filled / "processes").exists()
    join(filled, create=False).beat()
    assert not (filled / "processes").exists()
    Store(filled).claims.take(["a"])
    assert processes(filled) == [join(filled).name]


def test_a_folder_without_permission_is_read_all_the_same(public_folder: Path) -> None:
    root = public_folder / "cache"
    Store(root).space(make_spec()).write(make_entries(range(4)), {})
    before = processes(root)

    def check() -> None:
        read_filled(root, "r")
        join(root).beat()
        assert not join(root).announced
        join(root).leave()

    in_fork(check, uid=NOBODY)
    assert processes(root) == before


def test_who_can_not_list_the_spaces_leaves_all_the_same(public_folder: Path) -> None:
    root = public_folder / "cache"
    Store(root).space(make_spec()).write(make_entries(range(4)), {})
    (root / "processes").chmod(0o777)
    (root / "spaces").chmod(0o700)

    def check() -> None:
        presence = join(root)
        assert presence.file.exists()
        presence.leave()
        assert not presence.file.exists()

    in_fork(check, uid=NOBODY)


def stay(root: Path, ready: Any, leave: Any) -> None:
    read_filled(root)
    ready.set()
    leave.wait()


def watch(root: Path, method: str, kill: bool) -> tuple[list[str], ...]:
    """Give the files that are there, and which of them live: while a child reads, and after."""
    context = multiprocessing.get_context(method)
    ready, leave = context.Event(), context.Event()
    child: Any = context.Process(target=stay, args=(root, ready, leave))
    child.start()
    assert ready.wait(60)
    during = processes(root), list(living(root, time.time()))
    if kill:
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is a zombie now
    else:
        leave.set()
        child.join(60)
    after = processes(root), list(living(root, time.time()))
    child.join()
    return *during, *after


@pytest.mark.parametrize("kill", [False, True], ids=["ends", "is killed"])
@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_child_has_a_file_of_its_own_until_it_ends(filled: Path, method: str, kill: bool) -> None:
    read_filled(filled)
    [own] = processes(filled)
    there, lived, left, lives = apart(watch, filled, method, kill)
    [child] = set(there) - {own}
    assert lived == there == sorted([own, child])
    assert left == (there if kill else [own])
    assert lives == [own]


@pytest.mark.parametrize(
    ("end", "code", "stays"),
    [
        ("", 0, False),
        ("sys.exit(3)", 3, False),
        ("raise SystemError", 1, False),
        ("os._exit(4)", 4, True),
        ("time.sleep(0.3)", 0, False),
    ],
)
def test_the_file_is_gone_when_the_program_ends(
    filled: Path, end: str, code: int, stays: bool
) -> None:
    script = f"""
import os, sys, time
sys.path.append({str(Path(__file__).parent)!r})
from feature_cache.store import process, Store
from samples import contents, make_spec
process.BEAT_SECONDS = 0.0001
assert None not in contents(Store({str(filled)!r}).space(make_spec()), range(4))
assert len(os.listdir({str(filled / "processes")!r})) == 1
{end}
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    assert bool(processes(filled)) == stays
    assert not living(filled, time.time())


class Names:
    """A data set whose samples are read in a worker, and tell its name."""

    def __init__(self, root: Path) -> None:
        self.space = Store(root).space(make_spec())

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> str:
        assert contents(self.space, [number % 4]) == expected([number % 4])
        assert join(self.space.root).name in processes(self.space.root)
        return join(self.space.root).name


def load(root: Path, persistent: bool) -> set[str]:
    data: Any = Names(root)
    loader = DataLoader(data, num_workers=2, persistent_workers=persistent, batch_size=None)
    return {name for _ in range(2) for name in loader}


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
def test_the_files_of_a_loaders_workers_go_with_them(filled: Path, persistent: bool) -> None:
    names = apart(load, filled, persistent)
    assert len(names) == (2 if persistent else 4)
    assert processes(filled) == []


# Its heart


def watch_heart(root: Path) -> None:
    beat_fast()
    read_filled(root)
    file = join(root).file
    os.utime(file, (0, 0))
    time.sleep(0.5)
    assert time.time() - file.stat().st_mtime < 100
    file.unlink()
    time.sleep(0.5)
    assert file.exists()
    shutil.rmtree(root)
    time.sleep(0.5)
    assert not root.exists()


def test_the_heart_beats_and_makes_no_folder_anew(filled: Path) -> None:
    apart(watch_heart, filled)


class Reader:
    """What a process has open, that does something else when it is asked."""

    def __init__(self, asked: Callable[[], object]) -> None:
        self.note = self.refresh = asked


def wait_until(is_so: Callable[[], object]) -> None:
    for _ in range(2000):
        if is_so():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def wait_for_a_beat(root: Path) -> None:
    os.utime(join(root).file, (0, 0))
    wait_until(lambda: join(root).file.stat().st_mtime > 0)


def test_the_heart_beats_on_after_what_nobody_expected(filled: Path) -> None:
    def check() -> None:
        beat_fast()
        said: list[str] = []
        logger = logging.getLogger(process.__name__)
        logger.addFilter(lambda record: said.append(record.getMessage()) or False)
        reader = Reader(lambda: 1 / 0)
        join(filled).add(reader)
        for _ in range(3):
            said.clear()
            wait_until(lambda: said)
            assert str(filled) in said[0]
        wait_for_a_beat(filled)

    in_fork(check)


def test_a_cache_that_was_away_knows_its_process_again(filled: Path) -> None:
    def check() -> None:
        beat_fast()
        claims, own = Store(filled).claims, join(filled)
        read_filled(filled)
        assert claims.take(["a"]) == [True]
        away = filled.rename(filled.with_name("away"))
        wait_until(lambda: not own.announced)
        (away / "processes" / own.name).unlink()  # as gc would, after a while
        away.rename(filled)
        wait_until(own.file.exists)
        assert join(filled).name == own.name
        assert claims.take(["a"]) == [False]
        claims.release(["a"])
        assert claims.take(["a"]) == [True]

    in_fork(check)


def test_a_cache_made_anew_in_its_place_knows_it_too(filled: Path) -> None:
    def check() -> None:
        beat_fast()
        own = join(filled)
        shutil.rmtree(filled)
        wait_until(lambda: not own.announced)
        assert Store(filled).claims.take(["a"]) == [True]
        assert Store(filled).claims.take(["a"]) == [False]
        assert list(living(filled, time.time())) == [own.name]

    in_fork(check)


def test_the_heart_beats_while_a_folder_is_listed(filled: Path) -> None:
    def check() -> None:
        beat_fast()
        is_asked = threading.Event()
        reader = Reader(lambda: is_asked.set() or threading.Event().wait())
        join(filled).add(reader)
        assert is_asked.wait(60)
        wait_for_a_beat(filled)

    in_fork(check)


def test_spaces_may_be_opened_while_the_others_are_asked(root: Path) -> None:
    presence, stop = Store(root).presence, threading.Event()
    readers = [Reader(lambda: None) for _ in range(5000)]
    for reader in readers:
        presence.add(reader)

    def open_others() -> None:
        while not stop.is_set():
            readers.append(Reader(lambda: None))
            presence.add(readers[-1])
            time.sleep(0)

    with ThreadPoolExecutor(1) as threads:
        opening = threads.submit(open_others)
        try:
            for _ in range(20):
                presence.note()
        finally:
            stop.set()
        opening.result()


def join_without_heart(root: Path) -> None:
    beat_fast()
    with pytest.MonkeyPatch.context() as patch:
        refuse_threads(patch, "heartbeat")
        read_filled(root)
        assert join(root).file.exists()
    wait_for_a_beat(root)


def test_a_heart_that_could_not_start_is_started_when_asked_next(filled: Path) -> None:
    apart(join_without_heart, filled)
    assert processes(filled) == []


def test_a_last_beat_leaves_no_file(filled: Path) -> None:
    read_filled(filled)
    join(filled).leave()
    for _ in range(3):
        join(filled).beat()
    assert processes(filled) == []


def fork_often(root: Path, times: int) -> None:
    """Fork while threads hold the locks of hearts and spaces."""
    warnings.simplefilter("ignore", DeprecationWarning)  # of the fork beside threads
    process.BEAT_SECONDS = 0.0
    space = read_filled(root)
    stop = threading.Event()
    space.write(make_entries(range(10, 14)), {})

    def loop(work: Callable[[], Any]) -> threading.Thread:
        thread = threading.Thread(target=lambda: [work() for _ in iter(stop.is_set, True)])
        thread.start()
        return thread

    threads = [
        loop(lambda: contents(Store(root).space(make_spec()), range(10, 14))),
        loop(lambda: contents(space, [10, 99])),
        loop(join(root).beat),
        loop(join(root).refresh),
    ]

    def check() -> None:
        signal.alarm(30)
        assert contents(space, range(10, 14)) == expected(range(10, 14))
        join(root).beat()

    try:
        for _ in range(times):
            in_fork(check)
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_a_fork_beside_busy_threads_does_not_hang(filled: Path) -> None:
    apart(fork_often, filled, 20)


# Others


def test_another_host_lives_while_it_is_heard_of(filled: Path) -> None:
    heard = forge_process(filled, age=GONE_SECONDS - 60)
    silent = forge_process(filled, age=GONE_SECONDS + 60)
    assert list(living(filled, time.time())) == [heard]
    assert list(living(filled, time.time(), silent_seconds=2 * GONE_SECONDS)) == sorted(
        [heard, silent]
    )


def test_a_process_number_used_again_is_another_process(filled: Path) -> None:
    forge_process(filled, host=this_host(), pid=os.getpid(), started=1e6)
    assert not living(filled, time.time())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"host": "a", "pid": "b"}', "\xff" * 9])
def test_a_damaged_file_counts_as_a_process_until_it_is_old(filled: Path, text: str) -> None:
    file = filled / "processes" / forge_process(filled)
    file.write_text(text)
    with pytest.raises(ValueError, match="no description of a process"):
        Process.read(file)
    [found] = living(filled, time.time()).values()
    assert found.runs is None
    os.utime(file, (time.time() - GONE_SECONDS - 60,) * 2)
    assert not living(filled, time.time())
