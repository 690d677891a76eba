"""Claims: who computes what."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from feature_cache import BackboneError, FeatureCache
from feature_cache.cache import MovieFeatures
from feature_cache.engine import claim_name, engine
from feature_cache.store import Claims, Store
from feature_cache.store.claims import NAMELESS_SECONDS
from feature_cache.store.process import SILENT_SECONDS, Process, join, this_host
from feature_cache.testing import FakeBackbone
from forked_processes import apart, finish, fork, start
from samples import ELSEWHERE, forge_process, in_fork, make_older
from synthetic import make_movie

pytestmark = pytest.mark.filterwarnings(
    # zarr's event loop is a thread; that a fork survives it is what is tested.
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)
NOBODY = 65534


@pytest.fixture
def claims(root: Path) -> Claims:
    return Store(root).claims


def forge_claim(claims: Claims, name: str, text: str, *, age: float = 0.0) -> Path:
    claims.folder.mkdir(exist_ok=True)
    file = claims.folder / name
    file.write_bytes(text.encode())
    make_older(file, age)
    return file


# Given to one


def test_a_claim_is_given_once(claims: Claims, root: Path) -> None:
    assert claims.take(["a", "b"]) == [True, True]
    assert claims.take(["b", "c"]) == [False, True]
    assert Store(root).claims.take(["a"]) == [False]
    assert claims.holder("a") == join(root).name
    assert claims.holder("z") is None


def test_the_same_name_twice_in_one_call_is_given_once(claims: Claims) -> None:
    assert claims.take(["a", "a"]) == [True, False]


def test_another_thread_does_not_get_it_either(claims: Claims) -> None:
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda _: claims.take(["a"])[0], range(64)))
    assert sum(won) == 1


def test_a_released_claim_can_be_taken_again(claims: Claims) -> None:
    claims.take(["a", "b"])
    claims.release(["a", "never taken"])
    assert claims.take(["a", "b"]) == [True, False]


def test_a_living_process_keeps_its_claim(claims: Claims) -> None:
    claims.take(["a"])

    def check() -> None:
        assert claims.take(["a", "b"]) == [False, True]
        claims.release(["a"])
        assert claims.take(["a"]) == [False]

    in_fork(check)
    assert claims.take(["a"]) == [False]
    assert claims.take(["b"]) == [True]  # its holder is gone


def take_and_die(claims: Claims) -> int:
    """Claim two things in a child, which is killed then; give its process number."""
    child = os.fork()
    if not child:
        claims.take(["a", "b"])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return child


def test_a_claim_of_a_killed_process_is_taken_over_at_once(
    claims: Claims, caplog: pytest.LogCaptureFixture
) -> None:
    os.waitpid(take_and_die(claims), 0)
    holder = claims.holder("a")
    with caplog.at_level(logging.INFO, "feature_cache"):
        assert claims.take(["a"]) == [True]
    assert f"taking over the claim a of {holder}" in caplog.text
    assert sorted(os.listdir(claims.folder)) == ["a", "b"]


def test_the_killed_process_need_not_have_been_waited_for(claims: Claims) -> None:
    child = take_and_die(claims)
    try:
        assert claims.take(["a"]) == [True]
    finally:
        os.waitpid(child, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="ends a thread as Linux does")
def test_a_killed_process_holds_until_its_last_thread_is_at_its_end(
    claims: Claims, root: Path
) -> None:
    """Killed amid a rename, the thread that renames may outlive the first one."""
    code = """
import ctypes, platform, sys, threading, time
from feature_cache.store import Store
assert Store(sys.argv[1]).claims.take(["a"]) == [True]
print(flush=True)
threading.Thread(target=time.sleep, args=[60]).start()
exit_thread = {"x86_64": 60, "aarch64": 93}[platform.machine()]
ctypes.CDLL(None).syscall(exit_thread, 0)
"""
    with subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            process = psutil.Process(child.pid)
            while process.status() != psutil.STATUS_ZOMBIE:
                time.sleep(0.01)
            assert claims.take(["a"]) == [False]
        finally:
            child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert claims.take(["a"]) == [True]


@pytest.mark.parametrize(
    ("age", "given"), [(0.0, False), (SILENT_SECONDS - 30, False), (SILENT_SECONDS + 30, True)]
)
def test_a_process_of_another_host_holds_while_it_is_heard_of(
    claims: Claims, root: Path, age: float, given: bool
) -> None:
    forge_claim(claims, "a", forge_process(root, age=age), age=1e6)
    assert claims.take(["a"]) == [given]


def test_a_silent_process_of_this_host_loses_its_claims(claims: Claims, root: Path) -> None:
    join(root).announce(create=True)
    own = Process.read(join(root).file)
    for age, given in ((0.0, False), (SILENT_SECONDS + 30, True)):
        name = forge_process(root, host=own.host, pid=own.pid, started=own.started, age=age)
        forge_claim(claims, "a", name)
        assert claims.take(["a"]) == [given]


def test_a_process_number_used_again_holds_nothing(claims: Claims, root: Path) -> None:
    name = forge_process(root, host=this_host(), pid=os.getpid(), started=1e6)
    forge_claim(claims, "a", name)
    assert claims.take(["a"]) == [True]


def test_a_claim_without_the_file_of_its_process_does_not_count(claims: Claims) -> None:
    forge_claim(claims, "a", f"{ELSEWHERE}-1-0123456789abcdef")
    assert claims.take(["a"]) == [True]


@pytest.mark.parametrize(
    "text", ["garbage", "../x", "..", ".", "/etc/passwd", "a\0b", "\n", "x" * 5000, "{}", "é-1-0"]
)
def test_a_claim_that_names_no_process_does_not_count(
    claims: Claims, root: Path, text: str
) -> None:
    (root / "x").write_text(Process(this_host(), os.getpid(), 0.0).to_text())
    forge_claim(claims, "a", text)
    assert claims.leftovers(time.time()) == [claims.folder / "a"]
    assert claims.take(["a"]) == [True]
    assert claims.leftovers(time.time()) == []


@pytest.mark.parametrize(
    ("age", "given"), [(NAMELESS_SECONDS / 2, False), (NAMELESS_SECONDS * 2, True)]
)
def test_a_writer_killed_before_it_wrote_its_name_holds_for_some_seconds(
    claims: Claims, age: float, given: bool
) -> None:
    forge_claim(claims, "a", "", age=age)
    assert bool(claims.leftovers(time.time())) == given
    assert claims.take(["a"]) == [given]


# Taken over by one


def take_at_once(claims: Claims, count: int, start_all: Any, won: Any) -> None:
    start_all.wait()
    mine = sum(claims.take(f"claim {i}" for i in range(count)))
    with won.get_lock():
        won.value += mine
    start_all.wait()  # none of them dies before all have tried


def take_over_by_eight(claims: Claims, count: int) -> int:
    start_all, won = fork.Barrier(8), fork.Value("q", 0)
    finish([start(take_at_once, claims, count, start_all, won) for _ in range(8)])
    return won.value


@pytest.mark.parametrize(
    "holder",
    [
        pytest.param(None, marks=pytest.mark.slow),
        "the dead",
        pytest.param("", marks=pytest.mark.slow),
    ],
)
def test_eight_processes_at_once_and_each_claim_is_won_by_one(
    claims: Claims, holder: str | None
) -> None:
    count = 50
    for i in range(count if holder is not None else 0):
        forge_claim(claims, f"claim {i}", holder, age=1000.0)
    assert apart(take_over_by_eight, claims, count) == count
    assert len(os.listdir(claims.folder)) == count


def test_a_taker_that_died_is_no_obstacle(claims: Claims, root: Path) -> None:
    forge_claim(claims, "a", "the dead")
    forge_claim(claims, "a-takeover", "the dead too")
    forge_claim(claims, "b", "the dead")
    forge_claim(claims, "b-takeover", forge_process(root))
    assert [claims.take(["a", "b"]) for _ in range(2)] == [[False, False], [True, False]]


def test_what_another_process_took_over_stays_its_own(claims: Claims, root: Path) -> None:
    claims.take(["a"])
    taker = forge_process(root)
    forge_claim(claims, "a", taker)
    claims.release(["a"])
    assert claims.holder("a") == taker


# Where claims can't be made


@pytest.mark.parametrize("closed", [".", "claims"])
def test_without_permission_all_is_done_here_with_a_warning(
    public_folder: Path, closed: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = public_folder / "cache"
    claims = Store(root).claims
    if closed == "claims":
        claims.take(["a"])
        for name in ("processes", "."):
            (root / name).chmod(0o777)

    def check() -> None:
        assert claims.take(["a", "b"]) == [True, True]
        assert "nothing is claimed, so work may be done twice" in caplog.text
        claims.release(["a", "b"])

    in_fork(check, uid=NOBODY)


def test_a_claim_of_another_user_counts_though_it_can_not_be_read(public_folder: Path) -> None:
    claims = Store(public_folder / "cache").claims
    claims.take(["a"])
    (claims.folder / "a").chmod(0o600)
    claims.folder.chmod(0o777)

    def check() -> None:
        assert claims.take(["a", "b"]) == [False, True]
        assert claims.folder / "a" not in claims.leftovers(time.time())

    in_fork(check, uid=NOBODY)


def test_an_error_halfway_leaves_nothing_claimed(claims: Claims) -> None:
    with pytest.raises(OSError, match="File name too long"):
        claims.take(["a", "b", "c" * 300])
    assert claims.take(["a", "b"]) == [True, True]


# Work that another process has claimed


def claim_and_stay(root: Path, claimed: Any, stop: Any) -> None:
    cache = FeatureCache(root)
    movie = cache.movie(*make_movie()[:2], FakeBackbone())
    assert all(cache.store.claims.take(claims_of(movie, range(3))))
    claimed.set()
    stop.wait()


def claims_of(movie: MovieFeatures, frames: Iterable[int]) -> list[str]:
    spec = movie.spec.backbone
    return sorted(claim_name(spec.digest, movie.digests(t)[0], movie.draw) for t in frames)


def wait_for_another(root: Path, patience: float) -> list[tuple[str, str]]:
    """Fill a movie of which a process that does nothing has claimed a half; give the log."""
    claimed, stop, engine.PATIENCE_SECONDS = fork.Event(), fork.Event(), patience
    idle = start(claim_and_stay, root, claimed, stop)
    assert claimed.wait(60)
    logged: list[tuple[str, str]] = []
    log = logging.Handler()
    log.emit = lambda record: logged.append(  # type: ignore[method-assign]
        (record.levelname, record.getMessage())
    )
    logging.getLogger("feature_cache").addHandler(log)
    logging.getLogger("feature_cache").setLevel(logging.INFO)
    begin = time.monotonic()
    cache = FeatureCache(root)
    assert cache.movie(*make_movie()[:2], FakeBackbone()).warm() == 6
    assert time.monotonic() - begin >= patience
    stop.set()
    finish([idle])
    return logged


def test_one_that_lives_and_does_nothing_is_waited_for_and_then_passed_over(root: Path) -> None:
    told = apart(wait_for_another, root, 0.3)
    for level, pattern in [
        ("INFO", rf"waiting for (\d+) records that other processes compute, .* {this_host()}"),
        ("WARNING", r"computing (\d+) frames here"),
    ]:  # of as many frames at once as were asked for by then
        said = [re.search(pattern, text) for one, text in told if one == level]
        assert sum(int(one[1]) for one in said if one) == 3
    cache = FeatureCache(root, "r")
    assert all(cache.contains(*make_movie()[:2], FakeBackbone()))


def test_claims_are_released_when_the_records_are_committed(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(root)
    movie = cache.movie(*make_movie()[:2], FakeBackbone())
    real, held = type(movie.space).write, []

    def write(*args: Any) -> list[str]:
        held.append(sorted(os.listdir(cache.store.claims.folder)))
        return real(*args)

    monkeypatch.setattr(type(movie.space), "write", write)
    movie.warm()
    assert held == [claims_of(movie, range(6))]
    assert os.listdir(cache.store.claims.folder) == []


def test_claims_are_released_when_the_computation_fails(root: Path) -> None:
    class Broken(FakeBackbone):
        def embed(self, frames: Any) -> Any:
            raise RuntimeError("out of order")

    cache = FeatureCache(root)
    with pytest.raises(BackboneError, match="RuntimeError: out of order"):
        cache.movie(*make_movie()[:2], Broken()).warm()
    assert os.listdir(cache.store.claims.folder) == []
