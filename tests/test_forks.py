"""A fork while other threads hold what is shared: the child goes on."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from itertools import count, takewhile
from types import FrameType
from typing import Any

import pytest
import torch

from feature_cache import BackboneError, forks
from feature_cache.backbones.network_state import exact_float32
from feature_cache.forks import Lock, cached_property

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
CHOSEN = ""


class Slow:
    """Holds what others may wait for, until it is told to go on."""

    def __init__(self) -> None:
        self.inside, self.go_on, self.lock = threading.Event(), threading.Event(), Lock()

    def wait(self) -> None:
        self.inside.set()
        assert self.go_on.wait(60)

    def hold(self) -> None:
        with self.lock:
            self.wait()

    @cached_property
    def value(self) -> int:
        """Give what takes long."""
        self.wait()
        return os.getpid()

    def switch(self) -> None:
        with exact_float32():
            self.wait()


def precision() -> str:
    if hasattr(torch.backends, "fp32_precision"):  # from torch 2.9 on
        return torch.backends.mkldnn.matmul.fp32_precision
    return torch.get_float32_matmul_precision()


def take(slow: Slow) -> None:
    with slow.lock, slow.lock:
        pass


def make(slow: Slow) -> None:
    other = Slow()
    other.go_on.set()
    assert other.value == slow.value == os.getpid()


def compute(slow: Slow) -> None:
    assert precision() == CHOSEN
    with exact_float32():
        assert precision() != CHOSEN
    assert precision() == CHOSEN


def test_a_precision_that_another_thread_chooses_meanwhile_ends_it_and_stays() -> None:
    torch.set_float32_matmul_precision("highest")
    try:
        says = "was changed while features were computed"
        with pytest.raises(BackboneError, match=says), exact_float32():
            torch.set_float32_matmul_precision("medium")
        assert torch.get_float32_matmul_precision() == "medium"
        with exact_float32():
            assert precision() in ("ieee", "highest")
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_sums_of_half_precision_are_off_meanwhile() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "allow_fp16_accumulation"):
        pytest.skip("this torch has no such switch")
    before, matmul.allow_fp16_accumulation = matmul.allow_fp16_accumulation, True
    try:
        with exact_float32():
            assert not matmul.allow_fp16_accumulation
        assert matmul.allow_fp16_accumulation
    finally:
        matmul.allow_fp16_accumulation = before


def test_an_interrupt_at_any_moment_leaves_a_lock_to_others() -> None:
    lock = Lock()

    def is_interrupted(moment: int) -> bool:
        """Take the lock, and raise at one of the moments at which Python runs code of ours."""
        moments = count(1)

        def trace(frame: FrameType, *_: object) -> Any:
            if frame.f_code.co_filename == forks.__file__ and next(moments) == moment:
                raise KeyboardInterrupt
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            with lock:
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)
        return False

    def take() -> None:
        with lock:
            pass

    for moment in takewhile(is_interrupted, count(1)):
        other = threading.Thread(target=take, daemon=True)
        other.start()
        other.join(10)
        assert not other.is_alive(), f"interrupted at moment {moment}, it is held"


@pytest.mark.parametrize(
    ("what", "child"),
    [(Slow.hold, take), (lambda slow: slow.value, make), (Slow.switch, compute)],
    ids=["lock", "cached_property", "precision"],
)
def test_a_forked_child_waits_for_no_thread_of_its_parent(
    what: Callable[[Slow], Any], child: Callable[[Slow], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    slow, before = Slow(), torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    monkeypatch.setattr(sys.modules[__name__], "CHOSEN", precision())
    thread = threading.Thread(target=what, args=(slow,))
    try:
        thread.start()
        assert slow.inside.wait(60)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                slow.go_on.set()
                child(slow)
                code = 0
            finally:
                os._exit(code)
        deadline = time.monotonic() + 60
        while (ended := os.waitpid(pid, os.WNOHANG)) == (0, 0) and time.monotonic() < deadline:
            time.sleep(0.01)
        if ended == (0, 0):
            os.kill(pid, 9)
            os.waitpid(pid, 0)
        assert ended == (pid, 0)
    finally:
        slow.go_on.set()
        thread.join()
        torch.set_float32_matmul_precision(before)


def test_threads_make_values_of_different_instances_at_the_same_time() -> None:
    first, second = Slow(), Slow()
    thread = threading.Thread(target=lambda: first.value)
    thread.start()
    assert first.inside.wait(60)
    second.go_on.set()
    assert second.value == os.getpid()
    first.go_on.set()
    thread.join()


def test_a_value_is_made_once_and_kept_in_the_instance() -> None:
    slow = Slow()
    slow.go_on.set()
    assert slow.value is slow.value is vars(slow)["value"]
    assert Slow.value.__doc__ == "Give what takes long."
