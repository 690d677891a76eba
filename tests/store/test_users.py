"""One cache, several users; disks that fill; permissions that go."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from feature_cache import ReadOnlyCacheError, StoreError
from feature_cache.key import Record
from feature_cache.store import (
    Counter,
    NewRecord,
    Space,
    Store,
    Usage,
    claims,
    read_runs,
    sum_usage,
)
from feature_cache.store.maintenance import (
    add_pin,
    compact_space,
    plan_gc,
    remove_pin,
    repair,
    run_gc,
    verify,
)
from samples import (
    WIDTH,
    contents,
    die_at,
    expected,
    flip,
    fork,
    in_fork,
    make_entries,
    make_entry,
    make_key,
    make_spec,
    wait,
)

pytestmark = pytest.mark.filterwarnings(
    # zarr's event loop is a thread; that a fork survives it is what is tested.
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)

ALICE, BOB, GROUP = 40_001, 40_002, 40_100


@pytest.fixture
def shared(public_folder: Path) -> Path:
    """A cache to be, in a folder that a group shares."""
    folder = public_folder / "shared"
    folder.mkdir()
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2770)
    return folder / "cache"


def as_user(uid: int, job: Callable[[], None], umask: int = 0o077) -> None:
    def with_umask() -> None:
        os.umask(umask)
        job()

    in_fork(with_umask, uid, GROUP)


def write(root: Path, *numbers: int) -> None:
    for number in numbers:
        Store(root).space(make_spec()).write([make_entry(number)], {})


def read(root: Path, *numbers: int) -> None:
    for mode in ("r", "a"):
        space = Store(root, mode).space(make_spec())  # type: ignore[arg-type]
        assert contents(space, numbers) == expected(numbers)


def collect_all(root: Path) -> None:
    store = Store(root)
    run_gc(store, plan_gc(store, max_bytes=0))


def use(root: Path) -> None:
    store = Store(root)
    store.claims.take([f"claim of {os.getuid()}"])
    counter = Counter(store)
    counter.add(Usage(1))
    counter.save()
    add_pin(store, make_spec().slug)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002], ids=oct)
def test_two_users_share_a_setgid_folder_whatever_their_umask(shared: Path, umask: int) -> None:
    def alice() -> None:
        write(shared, 0, 1)
        use(shared)

    def bob() -> None:
        read(shared, 0, 1)
        write(shared, 2, 3)
        use(shared)
        assert sum_usage(read_runs(shared)).hits == 2
        report = compact_space(Store(shared).space(make_spec()))
        assert (report.merged, report.written) == (4, 1)
        read(shared, *range(4))

    def alice_again() -> None:
        assert Store(shared).claims.take([f"claim of {BOB}"]) == [True]  # its process is gone
        space = Store(shared).space(make_spec())
        flip(space.packs_folder / space.pack_names()[0] / "index" / "c.0", 1)
        repair(shared, verify(shared))
        assert contents(Store(shared).space(make_spec()), range(4)) == [None] * 4
        write(shared, 4)
        remove_pin(Store(shared), make_spec().slug)

    def bob_again() -> None:
        read(shared, 4)
        write(shared, 4)
        collect_all(shared)
        assert os.listdir(Store(shared).space(make_spec()).packs_folder) == ["zarr.json"]
        assert os.listdir(shared / "quarantine") == []
        assert verify(shared) == []

    for uid, job in ((ALICE, alice), (BOB, bob), (ALICE, alice_again), (BOB, bob_again)):
        as_user(uid, job, umask)
        for path in shared.rglob("*"):
            wanted = 0o2070 if path.is_dir() else 0o060
            status = path.stat()
            assert (status.st_gid, status.st_mode & wanted) == (GROUP, wanted), path


def test_what_a_killed_user_leaves_another_removes(shared: Path) -> None:
    def die() -> None:
        os.umask(0o077)
        write(shared, 0)
        Store(shared).claims.take(["something"])
        die_at(1, "rename")
        write(shared, 1)

    def clean() -> None:
        read(shared, 0)
        assert {finding.kind for finding in verify(shared)} == {"leftover"}
        run_gc(Store(shared), plan_gc(Store(shared)))
        left = list(shared.rglob(".tmp-*"))
        assert not left

    assert wait(fork(die, ALICE, GROUP)) == -signal.SIGKILL
    as_user(BOB, clean)


def test_without_setgid_others_read_and_are_told_why_they_can_not_write(
    public_folder: Path,
) -> None:
    root = public_folder / "home" / "cache"
    root.parent.mkdir()
    os.chown(root.parent, ALICE, GROUP)

    def bob() -> None:
        with pytest.raises(ReadOnlyCacheError, match="mode='r'"):
            Store(root)
        reader = Store(root, "r")
        assert contents(reader.space(make_spec()), [0, 1]) == [*expected([0]), None]
        assert {finding.kind for finding in verify(root)} == {"leftover"}
        with pytest.raises(ReadOnlyCacheError, match="no permission"):
            add_pin(reader, make_spec().slug)
        with pytest.raises(ReadOnlyCacheError, match="no permission"):
            repair(root, verify(root))

    as_user(ALICE, lambda: write(root, 0), 0o022)
    as_user(BOB, bob, 0o022)


def test_a_pack_of_another_user_that_is_there_already_is_compacted_to(shared: Path) -> None:
    def write_all() -> None:
        write(shared, 0, 1)
        compact_space(Store(shared).space(make_spec()))
        collect_all_but_new(shared)

    def again() -> None:
        write(shared, 0, 1)
        compact_space(Store(shared).space(make_spec()))
        read(shared, 0, 1)

    as_user(ALICE, write_all)
    as_user(BOB, again)


def collect_all_but_new(root: Path) -> None:
    run_gc(Store(root), plan_gc(Store(root)))


@pytest.mark.parametrize("lost", ["packs", "root", "processes"])
def test_permission_lost_in_between_is_an_error_and_reading_goes_on(
    shared: Path, lost: str
) -> None:
    as_user(ALICE, lambda: write(shared, 0, 1))
    go, ready = shared.parent / "go", shared.parent / "ready"

    def bob() -> None:
        space = Store(shared).space(make_spec())
        assert contents(space, [0]) == expected([0])
        ready.touch()
        while not go.exists():
            continue
        if lost == "processes":
            space.write([make_entry(2)], {})
        else:
            for job in (lambda: space.write([make_entry(2)], {}), lambda: compact_space(space)):
                with pytest.raises(ReadOnlyCacheError, match="no permission"):
                    job()
        assert contents(space, [0, 1]) == expected([0, 1])

    child = fork(bob, BOB, GROUP)
    while not ready.exists():
        assert os.waitpid(child, os.WNOHANG) == (0, 0)
    folders = {"root": shared, "processes": shared / "processes"}
    for folder in [folders[lost]] if lost in folders else shared.glob("spaces/*/packs"):
        folder.chmod(0o2750)
    for folder in [shared, *shared.rglob("*")] if lost == "root" else []:
        folder.chmod(stat.S_IMODE(folder.stat().st_mode) & ~stat.S_IWGRP)
    go.touch()
    assert wait(child) == 0
    assert {finding.kind for finding in verify(shared)} <= {"leftover"}


# Disks that fill


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path, name: str, left: int = 0) -> None:
    free = os.statvfs(disk)
    (disk / name).write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - left)))


@pytest.fixture
def full(disk: Path) -> Space:
    """A space of four packs, on a disk with no room for a fifth."""
    space = Store(disk / "cache").space(make_spec())
    for number in range(4):
        space.write([make_entry(number)], {})
    fill(disk, "ballast", left=8192)
    return space


def test_a_disk_that_fills_while_records_are_committed(disk: Path, full: Space) -> None:
    big = Record(np.ones((40_000, WIDTH), "f2"), np.arange(40_000, dtype="i4"))
    with pytest.raises(StoreError, match="No space left"):
        full.write([NewRecord(make_key(9), big, {})], {})
    assert contents(full, [*range(4), 9]) == [*expected(range(4)), None]
    assert verify(full.root) == []


def test_a_disk_that_fills_while_it_compacts(disk: Path, full: Space) -> None:
    with pytest.raises(StoreError, match="No space left"):
        compact_space(full)
    assert contents(Store(full.root).space(make_spec()), range(4)) == expected(range(4))
    assert verify(full.root) == []
    (disk / "ballast").unlink()
    assert compact_space(full).written == 1
    assert contents(Store(full.root).space(make_spec()), range(4)) == expected(range(4))


def test_a_disk_that_is_full_for_claims_pins_and_counters(disk: Path, full: Space) -> None:
    store = Store(full.root)
    fill(disk, "rest")
    with pytest.raises(StoreError, match="No space left"):
        store.claims.take(["one", "two"])
    with pytest.raises(StoreError, match="No space left"):
        add_pin(store, full.name)
    counter = Counter(store)
    counter.add(Usage(1))
    counter.save()
    assert contents(Store(full.root).space(make_spec()), range(4)) == expected(range(4))
    (disk / "rest").unlink()
    (disk / "ballast").unlink()
    assert claims.Claims(full.root).take(["one", "two"]) == [True, True]
    assert verify(full.root) == []


def test_garbage_is_collected_on_a_full_disk(disk: Path, full: Space) -> None:
    fill(disk, "rest")
    run_gc(Store(full.root), plan_gc(Store(full.root), max_bytes=0))
    assert os.listdir(full.packs_folder) == ["zarr.json"]
    full.write(make_entries([0]), {})
    assert contents(full, [0]) == expected([0])
