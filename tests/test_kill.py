"""Writers, compact and gc, killed at random moments.

Each kill is that of a process forked for it, so that hundreds of them take seconds. A longer run::

    FEATURE_CACHE_KILLS=2000 pytest tests/test_kill.py
"""

from __future__ import annotations

import os
import random
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_cache.engine import commit
from feature_cache.store import Space, Store, claims
from feature_cache.store.files import TEMPORARY_PREFIX
from feature_cache.store.maintenance import compact_space, plan_gc, run_gc, verify
from forked_processes import Scene, apart, beat_fast, finish, fork, no_sync, start

KILLS = int(os.environ.get("FEATURE_CACHE_KILLS", "320"))
AT_ONCE, CHECK_EVERY, LONGEST_SECONDS = 2, 10, 0.06
NUMBER = struct.Struct("<q")

Report = Callable[[list[int]], None]


def write(scene: Scene, rng: random.Random, report: Report) -> None:
    """Commit packs of any records, and say so after each."""
    space = scene.space()
    while True:
        numbers = rng.sample(range(scene.count), rng.randint(1, 6))
        space.write(scene.entries(numbers), {"seed": 0})
        report(numbers)


def warm(scene: Scene, rng: random.Random, report: Report) -> None:
    """Warm pieces of the movie, with a commit every few records, and say so after each."""
    commit.COMMIT_BYTES = rng.choice([1, 3, 8]) * scene.records[0].features.nbytes
    numbers = {key: number for number, key in enumerate(scene.keys)}
    real = Space.write

    def write_and_report(space: Space, entries: Any, *args: Any) -> list[str]:
        names = real(space, entries, *args)
        report([numbers[entry.key] for entry in entries])
        return names

    Space.write = write_and_report  # type: ignore[method-assign]
    while True:
        first = rng.randrange(scene.count)
        scene.movie(slice(first, first + 20)).warm(batch_size=2)


def compact(scene: Scene, rng: random.Random, report: Report) -> None:
    space = scene.space()
    while True:
        compact_space(space, target_bytes=rng.choice([200, 2_000, 1 << 26]))


def collect(scene: Scene, rng: random.Random, report: Report) -> None:
    store = Store(scene.root)
    while True:
        run_gc(store, plan_gc(store))


VICTIMS = [write, write, warm, warm, compact, collect]


def read(scene: Scene, stop: Any, mode: str) -> None:
    """Read at random, from outside: what was there once is there for good, and right."""
    rng, space, seen = np.random.default_rng(), scene.space(mode), np.zeros(scene.count, bool)
    while not stop.is_set():
        numbers = rng.integers(0, scene.count, 10)
        there = np.array(scene.check(space, numbers.tolist()))
        assert there[seen[numbers]].all(), f"of {numbers}, seen before, only {there} are there"
        seen[numbers] |= there
        time.sleep(0.01)
    assert seen.any()


def check(scene: Scene, committed: set[int]) -> None:
    """Open the cache anew, and read all that was ever committed."""
    numbers = sorted(committed)
    there = scene.check(scene.space("r"), numbers)
    lost = [number for number, found in zip(numbers, there, strict=True) if not found]
    assert not lost, f"records {lost} were committed, and are gone"


@contextmanager
def reporting(committed: set[int]) -> Iterator[Report]:
    """Collect what processes say over a pipe, until all of them are gone."""
    reader, writer = os.pipe()
    yield lambda numbers: [os.write(writer, NUMBER.pack(n)) for n in numbers] and None
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        told = pipe.read()
    whole = len(told) // NUMBER.size * NUMBER.size
    committed.update(number for (number,) in NUMBER.iter_unpack(told[:whole]))


def seconds_to_write(scene: Scene) -> float:
    """Time one commit in a process of its own: the pace of this machine, as busy as it is."""
    began = time.monotonic()
    finish([start(scene.space().write, scene.entries([0]), {})])
    return time.monotonic() - began


def kill_some(scene: Scene, rng: random.Random, committed: set[int], longest: float) -> list[str]:
    """Let processes work at once, each until it is killed; give what they did."""
    works = rng.choices(VICTIMS, k=AT_ONCE)
    with reporting(committed) as report:
        victims = [start(work, scene, random.Random(rng.random()), report) for work in works]
        for victim in victims:
            if rng.random() < 0.7:  # the others are perhaps killed before they are at work
                wait_for(scene.root, victim)
            time.sleep(rng.uniform(0, longest))
            victim.kill()
        finish(victims, -signal.SIGKILL)
    return [work.__name__ for work in works]


def wait_for(root: Path, victim: Any) -> None:
    """Wait until a process has said that it uses the cache."""
    while not any(f"-{victim.pid}-" in name for name in os.listdir(root / "processes")):
        assert victim.is_alive(), "a process ended by itself; see its traceback"
        time.sleep(0.001)


def kill_many(root: Path, pooling: str | None, kills: int, seed: int) -> dict[str, int]:
    """Kill again and again, beside readers; give the number of kills by what was killed."""
    no_sync()
    beat_fast()
    rng, stop, committed = random.Random(seed), fork.Event(), set[int]()
    scene, counts = Scene(root, 3 * kills, pooling), Counter[str]()
    longest = max(LONGEST_SECONDS, 2 * seconds_to_write(scene))
    readers = [start(read, scene, stop, mode) for mode in "ar"]
    while counts.total() < kills and all(reader.is_alive() for reader in readers):
        for _ in range(CHECK_EVERY):
            counts.update(kill_some(scene, rng, committed, longest))
        finish([start(check, scene, committed)])
        longest = max(LONGEST_SECONDS, 2 * seconds_to_write(scene))
    stop.set()
    finish(readers)
    finish([start(complete, scene)])
    return {**counts, "committed": len(committed)}


def complete(scene: Scene) -> None:
    """Compute what is missing, after all that: as if nothing had happened."""
    commit.COMMIT_BYTES, claims.NAMELESS_SECONDS = 1 << 26, 0.5
    scene.movie().warm()
    assert all(scene.check(scene.space(), range(scene.count)))
    while compact_space(scene.space()).busy:  # a claim that was left without a name
        time.sleep(0.1)


@pytest.mark.parametrize("kills", [12, pytest.param(KILLS // 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "pooling",
    [
        pytest.param("mean_patches_exact", id="regions"),
        pytest.param(None, id="grids", marks=pytest.mark.slow),
    ],
)
def test_what_was_committed_stays_and_nothing_else_is_seen(
    tmp_path: Path, pooling: str | None, kills: int
) -> None:
    root, seed = tmp_path / "cache", random.randrange(1 << 32)
    print(f"seed {seed}")
    done = apart(kill_many, root, pooling, kills, seed)
    print(done)
    assert done["committed"] > kills // 25  # as fast as the machine is
    assert not (root / "quarantine").exists()
    assert {finding.kind for finding in verify(root)} == {"leftover"}
    collect_all(root)
    assert verify(root, deep=True) == []
    make_older(root)
    collect_all(root)
    assert not [path for path in root.rglob("*") if path.name.startswith(TEMPORARY_PREFIX)]
    assert not any((root / "claims").iterdir())


def collect_all(root: Path) -> None:
    store = Store(root)
    run_gc(store, plan_gc(store))


def make_older(root: Path) -> None:
    """Let an hour pass, after which files of nobody known are left-overs too."""
    of_nobody = root.rglob(f"{TEMPORARY_PREFIX}*"), root.rglob(f"{TEMPORARY_PREFIX}*/**/*")
    for path in [*chain(*of_nobody), *(root / "claims").iterdir()]:
        os.utime(path, (time.time() - 7200,) * 2)
