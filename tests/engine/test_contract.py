"""One contract for everyone who has features computed: see `callers`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations_with_replacement
from pathlib import Path
from typing import Any

import pytest

from callers import (
    CALLERS,
    COMMAND,
    COMPUTE,
    DASK,
    DATAMODULE,
    DATASET,
    GET_OR_COMPUTE,
    LOADER,
    MAIN,
    RUN_WARM,
    SERVE,
    Caller,
    Started,
    Work,
    run,
)
from feature_cache import FeatureCache
from feature_cache.testing import FakeBackbone
from forked_processes import fork_server
from shared_folder import contents, holds_tables, wait_until

MakeWork = Callable[..., Work]
Right = Callable[[Work], dict[Any, Any]]
Settle = Callable[[Work, Caller], Work]


@pytest.fixture
def settle(request: pytest.FixtureRequest) -> Settle:
    """Give a work what its caller needs: a cluster."""

    def settled(work: Work, caller: Caller) -> Work:
        if caller is not DASK:
            return work
        return replace(work, scheduler=request.getfixturevalue("dask"))

    return settled


SLOW = (DATAMODULE, DASK)
"""Callers that take their time: most of their tests run with the slow ones."""
ALIKE = (*SLOW, COMMAND, COMPUTE, DATASET, MAIN)
"""Those, and callers of what another one of the quick tests calls, where a test is a long one."""


def each(*callers: Caller, slow: Any = SLOW) -> Any:
    """Parametrize by callers."""
    parameters = []
    for caller in callers:
        marks = [pytest.mark.slow] if caller in slow else []
        parameters.append(pytest.param(caller, id=name_of(caller), marks=marks))
    return pytest.mark.parametrize("caller", parameters)


def name_of(caller: Caller) -> str:
    return caller.name.replace(" ", "-")


def without(*callers: Caller) -> tuple[Caller, ...]:
    return tuple(caller for caller in CALLERS if caller not in callers)


# The same records, whoever asks

TOGETHER = (RUN_WARM, COMMAND, DASK)
"""Who computes several poolings of one embedding."""
SCENES = {
    "copies, of several shapes": (("one", "two"), {"copies": 2}),
    "several poolings": (("one",), {"poolings": ("median_patches_exact", "nearest_patch")}),
    "stacks": (("stack",), {"copies": 1, "ndim": 3}),
}


@pytest.mark.parametrize(
    ("scene", "caller"),
    [
        pytest.param(scene, caller, id=f"{name}, {caller}", marks=marks)
        for number, (name, scene) in enumerate(SCENES.items())
        for caller in CALLERS
        for marks in [(pytest.mark.slow,) if caller in (ALIKE if number else (DASK,)) else ()]
    ],
)
def test_records_are_equal_in_bits_and_computed_once(
    make_work: MakeWork, right_records: Right, settle: Settle, caller: Caller, scene: Any
) -> None:
    names, options = scene
    work = settle(make_work(*names, **options), caller)
    [first] = run(caller, work)
    assert first.errors == []
    assert contents(work.cache) == right_records(work)
    embedded = work.embedded()
    assert set(embedded.values()) == {1 if caller in TOGETHER else len(work.poolings)}
    [again] = run(caller, work)
    assert again.errors == []
    assert work.embedded() == embedded, "a hit touches no model"
    assert work.claims() == []


@each(*CALLERS, slow=ALIKE)
def test_what_is_pooled_from_stored_grids_needs_no_model(
    make_work: MakeWork, right_records: Right, settle: Settle, caller: Caller
) -> None:
    work = settle(make_work("one", copies=1), caller)
    cache = FeatureCache(work.cache)
    for draw in work.augmentations.draws():
        cache.get_or_compute(
            work.movies[0], None, FakeBackbone(8, 8), pooling=None, draw=draw, dtype="float32"
        )
    [outcome] = run(caller, work)
    assert outcome.errors == []
    assert work.embedded().total() == 0
    pooled = {key: bits for key, bits in contents(work.cache).items() if "grid" not in key[0]}
    assert pooled == right_records(work)


# Packs


def packs_of(work: Work) -> int:
    spaces = FeatureCache(work.cache, "r").spaces()
    return sum(len(space.pack_names()) for space in spaces if not holds_tables(space))


@each(
    *without(GET_OR_COMPUTE, COMPUTE, MAIN, LOADER, SERVE),
)
def test_a_job_that_fits_one_commit_becomes_one_pack(
    make_work: MakeWork, settle: Settle, caller: Caller
) -> None:
    work = settle(make_work("a", "b", "c", copies=8), caller)
    [outcome] = run(caller, work)
    assert outcome.errors == []
    assert packs_of(work) <= (len(work.movies) if caller is DASK else 1)  # a worker's unit


@each(GET_OR_COMPUTE, COMPUTE)
def test_a_call_becomes_one_pack(make_work: MakeWork, caller: Caller) -> None:
    work = make_work("one", "two", copies=1)
    run(caller, work)
    assert packs_of(work) == 4  # of one movie in one copy


@each(MAIN, LOADER, SERVE)
def test_a_training_commits_every_few_seconds(make_work: MakeWork, caller: Caller) -> None:
    work = make_work("a", "b", "c", copies=8)
    began = time.monotonic()
    run(caller, work)
    assert packs_of(work) <= 2 + (time.monotonic() - began) / 2


# Bad frames

BAD = {
    "NaN pixels": ("nan", ""),
    "a cut file": ("cut", ""),
    "a model's error": ("two-valued", "error"),
    "a model's crash": ("two-valued", "crash"),
    "NaN in the grid": ("two-valued", "nan"),
    "a grid of another shape": ("two-valued", "shape"),
}
"""What is bad about a frame: how its file is spoiled, and what the backbone does with it."""
ONE_BY_ONE = (GET_OR_COMPUTE, COMPUTE, DATASET, DATAMODULE)


def cases_of_bad_frames() -> Iterator[Any]:
    for kind in BAD:
        late = {"NaN pixels": SLOW, "a model's error": ALIKE}.get(kind, CALLERS)
        for caller in CALLERS:
            if caller is DATAMODULE and kind in ("a cut file", "NaN pixels"):
                continue  # upstream's dataset reads it before us; and `wrap` hashes all it is given
            marks = [pytest.mark.slow] if caller in late else []
            yield pytest.param(kind, caller, id=f"{kind}, {caller}", marks=marks)


def names(error: str, t: int) -> bool:
    return f"frame {t} of" in error or f"t{t:03d}.tif" in error


@pytest.mark.parametrize(("kind", "caller"), list(cases_of_bad_frames()))
def test_a_bad_frame_costs_itself_alone(
    make_work: MakeWork, right_records: Right, settle: Settle, caller: Caller, kind: str
) -> None:
    spoiled, mood = BAD[kind]
    work = settle(make_work(f"bad {spoiled}", mood=mood), caller)
    [outcome] = run(caller, work)
    assert any(names(error, 3) for error in outcome.errors), outcome
    found = contents(work.cache)
    assert len(found) == 5
    assert found.items() <= right_records(make_work("one")).items()
    assert work.claims() == []


@each(*ONE_BY_ONE)
def test_the_error_at_the_end_names_all_that_failed(make_work: MakeWork, caller: Caller) -> None:
    work = make_work("worse two-valued", mood="error")
    [outcome] = run(caller, work)
    [error] = outcome.errors
    assert outcome.raised
    assert names(error, 1)
    assert names(error, 3)
    assert re.search(r"\b4\b.*\bkept\b|\bkept\b.*\b4\b", error), error


@each(
    *(RUN_WARM, COMMAND, DASK, MAIN, LOADER, SERVE),
)
def test_every_frame_that_failed_is_named(
    make_work: MakeWork, settle: Settle, caller: Caller
) -> None:
    work = settle(make_work("worse two-valued", mood="error"), caller)
    [outcome] = run(caller, work)
    assert not outcome.raised
    assert len(outcome.errors) == 2
    for error, t in zip(sorted(outcome.errors), (1, 3), strict=True):
        assert names(error, t)


# Claims


@each(
    *without(MAIN, LOADER, SERVE),  # a training asks for a record at a time, each with its claim
)
def test_claims_are_at_most_one_a_frame(
    make_work: MakeWork, settle: Settle, caller: Caller
) -> None:
    poolings = ("mean_patches_exact", "nearest_patch")
    work = make_work("one", copies=3, poolings=poolings, keep_watch=True)
    work = settle(work, caller)
    run(caller, work)
    assert 1 <= max(work.claims_seen()) <= 6
    assert work.claims() == []


# Patience

WAITERS = {
    "who waits in Python": (GET_OR_COMPUTE, DATASET, RUN_WARM, MAIN),
    "others who wait": (COMPUTE, COMMAND, LOADER),  # a server would do the holder's work too
}
PATIENCE_SECONDS = 10.0
"""Most of the holder's work takes longer. Who waits should have the record within 3 s."""


@each(*without(COMPUTE, DASK), slow=ALIKE)
@pytest.mark.parametrize(
    "waiting",
    [
        WAITERS["who waits in Python"],
        pytest.param(WAITERS["others who wait"], marks=pytest.mark.slow),
    ],
    ids=WAITERS,
)
def test_nobody_waits_long_for_what_is_computed(
    make_work: MakeWork, right_records: Right, caller: Caller, waiting: tuple[Caller, ...]
) -> None:
    work = make_work("long", seconds=0.8, batch_size=1)
    asked = make_work("first of long")
    with Started(caller, [work]) as holder:
        wait_until(lambda: work.embedded().total() >= 2, "the first record to be computed")
        began = time.monotonic()
        waiters = [Started(waiter, [asked]) for waiter in waiting]
        waited = {}
        for name, waiter in zip(map(str, waiting), waiters, strict=True):
            waiter.ends(max(0.0, began + PATIENCE_SECONDS - time.monotonic()))
            waited[name] = f"{time.monotonic() - began:.1f} s"
        came = [waiter.file.exists() for waiter in waiters]
        for waiter in waiters:
            waiter.kill()
        assert holder.ends(0.0) is None, holder.said
    print(f"computed by {caller}, waited for by", waited)
    assert came == [True] * len(waiting)
    right = right_records(asked)
    assert right.items() <= contents(work.cache).items()
    assert max(work.embedded().values()) == 1


# Killed in the middle


@each(*without(DASK), slow=ALIKE)  # tests/test_warm_cluster.py kills workers
def test_killed_in_the_middle_it_goes_on(
    make_work: MakeWork, right_records: Right, caller: Caller
) -> None:
    work = make_work("a", "b", seconds=0.05, copies=1, batch_size=2)
    right = right_records(work)
    with Started(caller, [work]) as started:
        wait_until(lambda: work.embedded().total() >= 14, "the middle of the work")
        started.kill()
    before = contents(work.cache)
    assert before.items() <= right.items()
    embedded = work.embedded()
    [outcome] = run(caller, replace(work, seconds=0.0))
    assert outcome.errors == []
    assert contents(work.cache) == right
    again = work.embedded() - embedded
    assert len(work.embedded()) == len(right)
    assert max(again.values()) == 1
    assert len(again) == len(right) - len(before)
    cache = FeatureCache(work.cache)
    cache.gc(dry_run=False)
    assert cache.verify() == []
    assert work.claims() == []


# Two at once

CHEAP = (GET_OR_COMPUTE, DATASET, RUN_WARM, COMMAND, MAIN, LOADER)
PAIRS = [
    pytest.param(one, two, id=f"{one}, {two}".replace(" ", "-"), marks=marks)
    for one, two in combinations_with_replacement(CHEAP, 2)
    for next_to in [CHEAP.index(two) - CHEAP.index(one) == 1]
    for marks in [() if next_to else (pytest.mark.slow,)]
]


@pytest.mark.parametrize(("one", "two"), PAIRS)
def test_two_at_once_compute_each_record_once(
    make_work: MakeWork, right_records: Right, one: Caller, two: Caller
) -> None:
    work = make_work("one", "two", copies=1, seconds=0.01, batch_size=2)
    barrier = fork_server.Barrier(2)
    both = [Started(caller, [work], barrier) for caller in (one, two)]
    for started in both:
        [outcome] = started.finish()
        assert outcome.errors == []
    assert contents(work.cache) == right_records(work)
    assert set(work.embedded().values()) == {1}
    assert work.claims() == []


# What can't be written


@each(*without(COMMAND, SERVE))  # which open the cache themselves, to write
def test_a_cache_that_can_only_be_read_is_not_computed_for(
    make_work: MakeWork, settle: Settle, caller: Caller
) -> None:
    work = settle(make_work("one", mode="r"), caller)
    FeatureCache(work.cache)
    [outcome] = run(caller, work)
    assert len(outcome.errors) == (6 if caller.lazy else 1)
    assert all(error.startswith("MissingRecordError: ") for error in outcome.errors)
    assert work.embedded().total() == 0
    assert contents(work.cache) == {}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[None]:
    """Put a file system of 1 MB where the cache will be."""
    folder = tmp_path / "cache"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small file system")
    yield
    subprocess.run(["umount", "-l", str(folder)], check=True)


@each(*CALLERS, slow=ALIKE)
@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_said_and_nothing_wrong_is_stored(
    make_work: MakeWork, right_records: Right, settle: Settle, caller: Caller
) -> None:
    work = settle(make_work("one", dim=20_000), caller)
    started = Started(caller, [work])
    [outcome] = started.finish()
    assert "No space left" in "".join([*outcome.errors, started.said])
    if outcome.raised and not caller.is_command:
        assert outcome.errors[0].startswith("StoreError: ")
    assert contents(work.cache).items() <= right_records(work).items()
    assert work.claims() == []


# Ctrl-C


def stop(started: Started, work: Work, number: signal.Signals) -> int | None:
    """Send a signal in the middle; wait for the end."""
    with started:
        wait_until(lambda: work.embedded().total() >= 8, "the middle of the work")
        started.send(number)
        return started.ends()


def lines_that_say_what_is_kept(said: str) -> list[str]:
    return re.findall(r"^.*\b(\d+) records\b.*\bkept\b.*\bsame\b.*$", said, re.MULTILINE)


@each(*without(DASK))  # whose workers go on: tests/test_warm_cluster.py
def test_ctrl_c_keeps_what_is_computed_and_says_so(
    make_work: MakeWork, right_records: Right, caller: Caller
) -> None:
    work = make_work("long", seconds=0.05, batch_size=2)
    started = Started(caller, [work])
    assert stop(started, work, signal.SIGINT)
    found = contents(work.cache)
    assert found.items() <= right_records(work).items()
    assert len(found) >= 4
    assert work.claims() == []
    assert not started.file.exists()
    if caller is not SERVE:  # whose line is in tests/test_service.py
        assert lines_that_say_what_is_kept(started.said) == [str(len(found))], started.said
    if not caller.is_command:
        assert "KeyboardInterrupt" in started.said
    if caller is COMMAND:
        assert "Traceback" not in started.said


@each(*without(DASK, SERVE), slow=(*SLOW, COMPUTE, DATASET, MAIN))  # SERVE: tests/test_service.py
def test_sigterm_is_as_ctrl_c(make_work: MakeWork, right_records: Right, caller: Caller) -> None:
    work = make_work("long", seconds=0.05, batch_size=2)
    started = Started(caller, [work])
    assert stop(started, work, signal.SIGTERM)
    found = contents(work.cache)
    assert found.items() <= right_records(work).items()
    assert len(found) >= 4
    assert work.claims() == []
    assert lines_that_say_what_is_kept(started.said) == [str(len(found))]
    assert "Traceback" not in started.said


# Memory


@pytest.mark.slow
@each(*without(DASK, DATAMODULE))  # of another process; upstream's dataset holds whole movies
@pytest.mark.parametrize(
    ("small", "large"), [((100, 0), (2_000, 0)), ((100, 0), (100, 15))], ids=["long", "copies"]
)
def test_memory_does_not_grow(
    make_work: MakeWork, caller: Caller, small: tuple[int, int], large: tuple[int, int]
) -> None:
    peaks = []
    for frames, copies in (small, large):
        work = make_work(f"of {frames}", cache=f"{frames}-{copies}", copies=copies)
        [outcome] = Started(caller, [work]).finish(300)
        assert outcome.errors == []
        peaks.append(outcome.peak_bytes)
    print(f"{caller}: {peaks[0] / 1e6:.0f} MB and {peaks[1] / 1e6:.0f} MB")
    assert peaks[1] <= 1.1 * peaks[0]
