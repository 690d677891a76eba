"""A shared cache over three months, with time that is the file system's and ages that are faked."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest

from feature_cache.hashing import digest_bytes
from feature_cache.key import Keys, Record
from feature_cache.store import NewRecord, Space, Store
from feature_cache.store.maintenance import (
    compact,
    compact_space,
    merge_packs,
    plan_gc,
    run_gc,
    verify,
)
from samples import WIDTH, content, du, forge_process, in_fork, make_spec

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        # zarr's event loop is a thread; that a fork survives it is what is tested.
        "ignore:.*multi-threaded, use of fork:DeprecationWarning"
    ),
]
DAYS, DAY = 90, 86400.0
BUDGET, TARGET_BYTES = 3 << 20, 64 << 10
READER = 1234
ROWS = 200


def record(number: int) -> Record:
    rng = np.random.default_rng(number)
    return Record(rng.random((ROWS, WIDTH)).astype(np.float16), np.arange(ROWS, dtype=np.int32))


def key(number: int) -> bytes:
    return digest_bytes(number.to_bytes(8, "big"))


def keys(numbers: list[int]) -> Keys:
    return np.frombuffer(b"".join(map(key, numbers)), np.uint8).reshape(-1, 16)


def commit(space: Space, numbers: list[int]) -> None:
    space.write(
        [NewRecord(key(n), record(n), {"movie": f"{n % 7}", "frame": n}) for n in numbers], {}
    )


def check(root: Path, numbers: list[int]) -> None:
    """Compare each bit of records, all of which must be there, as a reader that opens the cache."""
    found = Store(root, "r").space(make_spec()).read(keys(numbers))
    for number, one in zip(numbers, found, strict=True):
        assert content(one) == content(record(number)), number


def pass_a_day(root: Path) -> None:
    """Let everything be a day older, but what this process says of itself."""
    own = Store(root).presence.file
    for path in [root, *root.rglob("*")]:
        if path != own:
            status = path.lstat()
            os.utime(path, (status.st_atime - DAY, status.st_mtime - DAY))


def die_elsewhere(root: Path, space: Space, number: int) -> None:
    """Leave what a process of another host leaves when it is killed."""
    name = forge_process(root, age=3600.0)
    Store(root).claims.folder.mkdir(exist_ok=True)
    (root / "claims" / f"frame-{number}").write_text(name)
    half = space.packs_folder / f".tmp-{name}-{number:016x}"
    half.mkdir()
    (half / "zarr.json").write_text("{}")


@pytest.mark.parametrize("seed", [1450757446, None])  # copies of what is merged were used last
def test_three_months_of_use_lose_nothing_hold_the_budget_and_keep_what_is_used(
    public_folder: Path, monkeypatch: pytest.MonkeyPatch, seed: int | None
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    monkeypatch.setattr(compact, "TARGET_BYTES", TARGET_BYTES)  # many packs within the budget
    root, chosen = public_folder / "cache", seed or random.randrange(1 << 32)
    print(f"seed {chosen}")
    dice = random.Random(chosen)
    space = Store(root).space(make_spec())
    (root / "uses").mkdir(exist_ok=True)
    (root / "uses").chmod(0o1777)
    hot, there, made, most_packs = list(range(20)), set(range(20)), 20, 0
    commit(space, hot)

    def read_hot() -> None:
        """Read, without a right to write, what a project uses every day."""
        check(root, hot)
        Store(root, "r").presence.leave()

    def check_all() -> None:
        check(root, sorted(there))

    for day in range(DAYS):
        for _ in range(dice.randint(2, 5)):  # trainings that commit as they go
            for _ in range(2):
                new = list(range(made, made + dice.randint(1, 6)))
                again = dice.sample(sorted(there), 2)  # two processes computed the same
                commit(space, [*new, *again])
                made += len(new)
                there.update(new)
                merge_packs(space)
        in_fork(read_hot, READER if os.getuid() == 0 else None)
        if dice.random() < 0.1:  # a night of warming
            commit(space, list(range(made, made + 60)))
            there.update(range(made, made + 60))
            made += 60
        if dice.random() < 0.1:
            compact_space(space, target_bytes=TARGET_BYTES)
        if dice.random() < 0.2:
            die_elsewhere(root, space, day)
        most_packs = max(most_packs, len(space.pack_names()))
        if day % 7 == 6:
            in_fork(check_all)
            store = Store(root)
            report = run_gc(store, plan_gc(store, max_bytes=BUDGET))
            assert report.is_done
            assert du(root) <= BUDGET
            space.refresh()
            there = {number for number in there if space.contains(keys([number])).all()}
            assert there.issuperset(hot)
            assert len(there) > 100
        pass_a_day(root)
    assert made > 1000
    assert most_packs < 100
    in_fork(check_all)
    store = Store(root)
    run_gc(store, plan_gc(store))
    assert {finding.kind for finding in verify(root)} <= {"duplicate"}
    assert os.listdir(root / "claims") == []
    assert not list(root.rglob(".tmp-*"))
