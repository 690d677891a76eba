"""What is brought to its end, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from feature_cache import FeatureCache
from feature_cache.engine import finish
from processes import outcome


def test_what_is_to_be_finished_is_where_no_thread_starts(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    finish(lambda: done.append(True))
    assert done


FORKS = """
import os, signal, sys, time
from feature_cache.engine import end_by_exit
assert end_by_exit()
print("ready", flush=True)
while True:
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(1)
    os.kill(child, signal.SIGTERM)
    for _ in range(5_000):
        if os.waitpid(child, os.WNOHANG)[0]:
            break
        time.sleep(0.001)
    else:
        os.kill(child, signal.SIGKILL)
        print("a child lives on", flush=True)
    print("ended", flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_terminate_amid_a_fork_ends_who_it_is_for():
    """A child that is ended as soon as it is forked, and the parent that forks without a pause."""
    with subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True) as busy:
        assert busy.stdout is not None
        told = [busy.stdout.readline().strip() for _ in range(51)]
        busy.send_signal(signal.SIGTERM)
        began = time.monotonic()
        while busy.poll() is None and time.monotonic() - began < 20:
            busy.stdout.readline()
        ended = busy.poll()
        busy.kill()
    assert told == ["ready", *["ended"] * 50]
    assert ended == 128 + signal.SIGTERM


EARLY = """
import os, signal, time
from feature_cache.engine import end_by_exit
assert end_by_exit()
look = signal.getsignal

def be_ended(number):
    signal.getsignal = look
    os.kill(os.getpid(), number)
    return look(number)

signal.getsignal = be_ended
if not os.fork():
    os._exit(0)
for _ in range(200):
    time.sleep(0.1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
def test_a_terminate_before_a_fork_is_prepared_is_not_lost():
    assert subprocess.run([sys.executable, "-c", EARLY]).returncode == 128 + signal.SIGTERM


LAST_COMMIT = """
import logging, sys
import numpy as np
from feature_cache import FeatureCache
from feature_cache.store import Space
from feature_cache.testing import FakeBackbone

logging.basicConfig()
write = Space.write

def write_when_told(*args):
    print("committing", flush=True)
    sys.stdin.read()
    return write(*args)

Space.write = write_when_told
frames = np.random.default_rng(0).integers(0, 4096, (4, 16, 16), np.uint16)
masks = np.ones_like(frames)
FeatureCache(sys.argv[1]).movie(frames, masks, FakeBackbone(4)).compute(range(4))
"""


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_amid_the_last_commit_loses_nothing_and_says_so(tmp_path, number):
    """All is computed by then, and no frame is asked for any more."""
    with subprocess.Popen(
        [sys.executable, "-c", LAST_COMMIT, str(tmp_path / "cache")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as busy:  # fmt: skip
        assert busy.stdout is not None
        assert busy.stdout.readline() == "committing\n"
        busy.send_signal(number)
        _, said = outcome(busy)  # ends its input, so that it goes on
    assert "interrupted: the 4 records computed until now are kept" in said
    assert FeatureCache(tmp_path / "cache", "r").stats()["records"] == 4
    if number == signal.SIGTERM:
        assert busy.returncode == 128 + number
