"""Ctrl-C and SIGTERM while something is computed: what is computed is kept, whoever asked."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from types import FrameType

from ..system import around_forks, start

_log = logging.getLogger(__name__)
_terminated = False
_AGAIN_SECONDS = 0.01


def say_kept(records: int) -> None:
    """Say, to whoever interrupted, what is kept."""
    _log.warning(
        "interrupted: the %d records computed until now are kept; the same again goes on there",
        records,
    )


def was_interrupted() -> bool:
    """Tell whether this process ends by Ctrl-C or by a SIGTERM that was handled here."""
    # at the end of a process the error that ended it is in `last_type`, and no more in `exc_info`
    last = getattr(sys, "last_type", None), sys.exc_info()[0]
    return _terminated or KeyboardInterrupt in last


@contextmanager
def terminable() -> Iterator[None]:
    """Have SIGTERM end the block as `sys.exit` does, where nobody handles it otherwise."""
    is_ours = end_by_exit()
    try:
        yield
    finally:
        if is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_by_exit() -> bool:
    """Have SIGTERM end this process as `sys.exit` does; tell whether that is new.

    Only in the main thread, and only where SIGTERM would end it without a word.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return False
    signal.signal(signal.SIGTERM, _exit)
    return True


def _exit(number: int, frame: FrameType | None) -> None:
    global _terminated
    # what is raised in a hook of a fork is ignored, and that one may have just begun
    if _forking.now or (frame is not None and frame.f_code is _hold_back.__code__):
        # so it is sent again, until the fork is over; by another thread, as this one is to go on,
        # and to this one: what another thread takes doesn't wake it from what it waits for
        here = threading.get_ident()
        again = threading.Timer(_AGAIN_SECONDS, signal.pthread_kill, (here, number))
        again.daemon = True
        start(again)
        return
    _terminated = True
    sys.exit(128 + number)


class _Forking(threading.local):
    """What a thread is at that forks."""

    now = False
    mask: Iterable[int] = ()


def _hold_back() -> None:
    """Let a SIGTERM wait while this thread forks.

    Until `_forget_exit` the child has this process's handler: Python forgets what came before its
    own hooks, and what comes amid them is raised there, and ignored. The child would live on, and
    whoever ended it would wait for ever.
    """
    # first: until the mask is set, `_exit` may still be called here
    _forking.now = True
    is_ours = signal.getsignal(signal.SIGTERM) is _exit
    _forking.mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM} if is_ours else ())


def _let_come() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _forking.mask)
    # last: what waited comes as soon as the mask is lifted, and must not be raised in this hook
    _forking.now = False


def _forget_exit() -> None:
    """Have SIGTERM end a forked child at once, as whoever started it expects."""
    # before `_let_come`: a SIGTERM that waited then ends the child, without a word of Python's
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _let_come()


_forking = _Forking()
around_forks(_hold_back, _let_come, _forget_exit)


def finish(function: Callable[[], None]) -> None:
    """Call something to its end, also when that is interrupted once.

    In a thread: what a signal raises (Ctrl-C; torch, of a worker killed) comes to the main one.
    """
    # No join: on Python 3.11 one that is interrupted takes the thread for ended.
    done = SimpleQueue[None]()

    def work() -> None:
        try:
            function()
        finally:
            for _ in range(2):  # what an interrupted `get` took is gone
                done.put(None)

    if not start(threading.Thread(target=work, daemon=True)):
        function()
        return
    try:
        done.get()
    except BaseException:
        done.get()
        raise
