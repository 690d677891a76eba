"""Records with arbitrary bits, and small jobs that other processes do with them."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from feature_cache.hashing import digest_bytes
from feature_cache.key import Keys, Record
from feature_cache.spec import BackboneSpec, SpaceSpec
from feature_cache.store import NewRecord, Space, Store
from feature_cache.store.process import Process

WIDTH = 8
GRIDS = {"grids": (3, 4, WIDTH), "stacks": (2, 3, 4, WIDTH), "cells": (1, 1, WIDTH)}
ELSEWHERE = "elsewhere_01234567"
KINDS = ("regions", "empty", *GRIDS)
"""Regions: 0 to 4 of them in a record. Empty: records without any."""


def make_spec(kind: str = "regions", dtype: str = "float16") -> SpaceSpec:
    pooling = None if kind in GRIDS else "nearest_patch"
    backbone = BackboneSpec("fake", 1, "0" * 32, "last", width=WIDTH, stride=8)
    return SpaceSpec(backbone, pooling, dtype)


def make_key(number: int) -> bytes:
    return digest_bytes(number.to_bytes(8, "big"))


def make_keys(numbers: Iterable[int]) -> Keys:
    return np.frombuffer(b"".join(map(make_key, numbers)), np.uint8).reshape(-1, 16)


def make_record(number: int, kind: str = "regions", dtype: str = "float16") -> Record:
    """Give record `number`: the same in every process, random in every bit, NaN included."""
    rng = np.random.default_rng(number)
    rows = 0 if kind == "empty" else number % 5
    shape = GRIDS.get(kind, (rows, WIDTH))
    bits = rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    features = np.frombuffer(bits, dtype).reshape(shape)
    if kind in GRIDS:
        return Record(features, None)
    return Record(features, np.sort(rng.choice(1 << 31, rows, replace=False)).astype(np.int32))


def make_entry(number: int, kind: str = "regions", dtype: str = "float16") -> NewRecord:
    return NewRecord(make_key(number), make_record(number, kind, dtype), {"frame": number})


def make_entries(numbers: Iterable[int], *options: str) -> list[NewRecord]:
    return [make_entry(number, *options) for number in numbers]


def content(record: Record | None) -> tuple[Any, ...] | None:
    """Give all of a record's bits, as something that compares."""
    if record is None:
        return None
    features, labels = record.features, record.labels
    told = None if labels is None else (labels.dtype.str, labels.shape, labels.tobytes())
    return features.dtype.str, features.shape, features.tobytes(), told


def contents(space: Space, numbers: Iterable[int]) -> list[tuple[Any, ...] | None]:
    return [content(record) for record in space.read(make_keys(numbers))]


def expected(numbers: Iterable[int], *options: str) -> list[tuple[Any, ...] | None]:
    return [content(make_record(number, *options)) for number in numbers]


def in_fork(check: Callable[[], None], uid: int | None = None, gid: int | None = None) -> None:
    """Run a check in a forked child (as another user), and fail if it fails or is killed."""
    assert wait(fork(check, uid, gid)) == 0


def fork(check: Callable[[], None], uid: int | None = None, gid: int | None = None) -> int:
    """Start a check in a forked child (as another user); give its process number."""
    child = os.fork()
    if not child:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a stuck call runs no Python
        signal.alarm(120)
        try:
            if uid is not None:
                os.setgroups([])
                os.setgid(uid if gid is None else gid)
                os.setuid(uid)
            check()
            os._exit(0)
        finally:  # a child that failed must not go on with the tests
            traceback.print_exc()
            os._exit(1)
    return child


def wait(child: int) -> int:
    """Wait for a child; give its exit status, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_at(number: int, *calls: str) -> None:
    """Be killed before call `number`, from 1, of any of the named functions of `os`."""
    seen = 0

    def patch(real: Callable[..., Any]) -> Callable[..., Any]:
        def deadly(*args: Any, **options: Any) -> Any:
            nonlocal seen
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **options)

        return deadly

    for call in calls:
        setattr(os, call, patch(getattr(os, call)))


def flip(file: Path, place: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    data = bytearray(file.read_bytes())
    data[place] ^= 1 << bit
    file.write_bytes(data)


def write_and_die(root: Path, call: str, count: int, *, after: bool) -> None:
    """Commit records 0 to 3, then be killed at a system call of the commit of 4 to 7.

    Killed before (or after) call number `count` of ``os.<call>``; never if there are fewer.
    """
    space = Store(root).space(make_spec())
    space.write(make_entries(range(4)), {})
    real, seen = getattr(os, call), 0

    def deadly(*args: Any, **options: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **options)
        if seen == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, call, deadly)
    space.write(make_entries(range(4, 8)), {})


def write_forever(root: Path, committed: Any) -> None:
    """Commit one record after another, and say so over a pipe after each."""
    space = Store(root).space(make_spec())
    number = 0
    while True:
        space.write([make_entry(number)], {})
        committed.send(number)
        number += 1


def write_overlapping(root: Path, seed: int, barrier: Any) -> None:
    """Commit eight packs of records drawn from 0 to 39."""
    space = Store(root).space(make_spec())
    rng = np.random.default_rng(seed)
    barrier.wait()
    for _ in range(8):
        numbers = rng.choice(40, 10, replace=False).tolist()
        space.write(make_entries(numbers), {"seed": seed})
        assert contents(space, numbers) == expected(numbers)


def create_caches(root: Path, count: int, barrier: Any) -> None:
    """Open `count` caches that another process creates at the same moment."""
    for i in range(count):
        barrier.wait()
        space = Store(root / str(i)).space(make_spec())
        space.write([make_entry(i)], {})


def forge_process(
    root: Path, *, host: str = ELSEWHERE, pid: int = 1, started: float = 0.0, age: float = 0.0
) -> str:
    """Write the file of a process that was last heard of some seconds ago; give its name."""
    file = root / "processes" / f"{host}-{pid}-{os.urandom(8).hex()}"
    file.parent.mkdir(exist_ok=True)
    file.write_text(Process(host, pid, started).to_text())
    make_older(file, age)
    return file.name


def du(*places: Path) -> int:
    """Ask the system's own tool what places take on the disk, in bytes."""
    command = ["du", "--summarize", "--total", "--block-size=1", "--", *places]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(told.splitlines()[-1].split()[0])


def make_older(file: Path, seconds: float) -> None:
    os.utime(file, (time.time() - seconds,) * 2)
