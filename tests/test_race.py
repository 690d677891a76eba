"""Processes that race for the same work, and readers beside all that changes a cache."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_cache.engine import commit
from feature_cache.store.maintenance import compact_space, plan_gc, run_gc, verify
from forked_processes import Scene, apart, beat_fast, content, finish, fork, no_sync, start

PROCESSES, FRAMES, BATCH = 8, 200, 4


# Eight processes warm one movie


def warm(scene: Scene, log: Path, barrier: Any) -> None:
    movie = scene.movie(log=log, seconds=0.005)
    barrier.wait()
    records = movie.get_or_compute(batch_size=BATCH)
    assert [content(record) for record in records] == scene.right


def race(root: Path, logs: Path, unit: int, kill: bool) -> int:
    """Let all warm, and the first that is well at it be killed; give its number."""
    no_sync()
    scene, barrier, victim = Scene(root, FRAMES), fork.Barrier(PROCESSES), 0
    commit.COMMIT_BYTES = unit * scene.records[0].features.nbytes
    warmers = [start(warm, scene, logs / str(i), barrier) for i in range(PROCESSES)]
    while kill and len(lines(logs / str(victim))) < 15:
        victim = (victim + 1) % PROCESSES
        time.sleep(0.001)
    if kill:
        warmers[victim].kill()
        finish([warmers.pop(victim)], -signal.SIGKILL)
    finish(warmers)
    return victim


def lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


@pytest.mark.parametrize(
    ("unit", "kill"),
    [
        pytest.param(8, True, id="small commits, one is killed"),
        pytest.param(10_000, False, id="one commit, all live", marks=pytest.mark.slow),
        pytest.param(8, False, id="small commits, all live", marks=pytest.mark.slow),
        pytest.param(10_000, True, id="one commit, one is killed", marks=pytest.mark.slow),
    ],
)
def test_each_record_is_computed_once(tmp_path: Path, unit: int, kill: bool) -> None:
    root, logs = tmp_path / "cache", tmp_path / "logs"
    logs.mkdir()
    victim = apart(race, root, logs, unit, kill)
    embedded = Counter(line for log in logs.iterdir() for line in lines(log))
    twice = {digest for digest, times in embedded.items() if times > 1}
    print(f"embedded {embedded.total()} times, {len(twice)} twice")
    assert len(embedded) == FRAMES
    assert max(embedded.values()) <= 1 + kill
    assert twice <= set(lines(logs / str(victim)))
    assert len(twice) <= 2 * unit + BATCH  # what is being committed, and what came meanwhile
    assert [one for one in verify(root) if not (kill and one.kind == "leftover")] == []


# Readers, beside all that changes a cache


def until(stop: Any, work: Callable[[], None]) -> None:
    """Do something again and again, and at least once."""
    work()
    while not stop.is_set():
        work()


def read(scene: Scene, stop: Any, mode: str, seed: int, lasting: bool) -> None:
    """Read at random; what was there once stays, where it is `lasting`."""
    rng, space, seen = np.random.default_rng(seed), scene.space(mode), np.zeros(scene.count, bool)
    kept: dict[int, Any] = {}

    def work() -> None:
        numbers = rng.integers(0, scene.count, 20)
        there = scene.check(space, numbers.tolist())
        lost = numbers[seen[numbers] & ~np.array(there)]
        assert not (lasting and len(lost)), f"records {lost} were there, and are gone"
        seen[numbers] |= there
        for number in numbers[:2].tolist():  # of some, the arrays are kept for a while
            kept[number] = space.read(scene.keys_of([number]))[0]
        if len(kept) > 20:
            for number, record in kept.items():
                assert content(record) in (None, scene.right[number])
            kept.clear()

    until(stop, work)
    assert seen.any()


def write(scene: Scene, stop: Any, seed: int) -> None:
    """Warm small pieces of the movie, in any order, and commit some records once more."""
    rng = np.random.default_rng(seed)

    def work() -> None:
        first = int(rng.integers(0, scene.count))
        movie = scene.movie(slice(first, first + 12))
        movie.warm(batch_size=3)
        again = rng.choice(scene.count, 5, replace=False).tolist()
        movie.space.write(scene.entries(again), {})

    until(stop, work)


def compact(scene: Scene, stop: Any, merged: Any) -> None:
    space = scene.space()

    def work() -> None:
        merged.value += compact_space(space).merged

    until(stop, work)


def collect(scene: Scene, stop: Any, freed: Any, max_bytes: int | None) -> None:
    store = scene.movie().cache.store

    def work() -> None:
        plan = plan_gc(store, max_bytes=max_bytes)
        freed.value += run_gc(store, plan).freed_bytes

    until(stop, work)


def live(root: Path, seconds: float, evict: bool) -> tuple[int, int]:
    """Let readers, writers, compact and gc work; give packs merged, and bytes freed."""
    no_sync()
    beat_fast()
    scene = Scene(root, 300)
    commit.COMMIT_BYTES = 6 * scene.records[0].features.nbytes
    stop, merged, freed = fork.Event(), fork.Value("q", 0), fork.Value("q", 0)
    crowd = [
        *(start(write, scene, stop, seed) for seed in range(2)),
        start(compact, scene, stop, merged),
        start(collect, scene, stop, freed, 30_000 if evict else None),
        *(start(read, scene, stop, mode, i, not evict) for i, mode in enumerate("aar")),
    ]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and all(process.is_alive() for process in crowd):
        time.sleep(0.05)
    stop.set()
    finish(crowd)
    return merged.value, freed.value


@pytest.mark.parametrize(
    "evict",
    [
        pytest.param(False, id="all stays", marks=pytest.mark.slow),
        pytest.param(True, id="some is evicted"),
    ],
)
def test_readers_see_right_numbers_whatever_goes_on(tmp_path: Path, evict: bool) -> None:
    root = tmp_path / "cache"
    merged, freed = apart(live, root, 5.0, evict)
    print(f"{merged} packs merged, {freed} bytes freed")
    assert [finding for finding in verify(root) if finding.kind != "duplicate"] == []
    assert not (root / "quarantine").exists()
    assert merged > 20
    assert not evict or freed > 20_000
