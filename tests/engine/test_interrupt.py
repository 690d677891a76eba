"""What is brought to its end, whatever happens meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from feature_cache.engine import finish


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
