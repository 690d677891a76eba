"""Many processes at work on one cache, forked from a process without threads."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr  # noqa: F401 - loaded once, here, instead of in every forked process

from feature_cache import FeatureCache
from feature_cache.cache import MovieFeatures
from feature_cache.engine import compute_records
from feature_cache.key import Keys, Record
from feature_cache.store import NewRecord, Space, process
from feature_cache.testing import FakeBackbone

fork = multiprocessing.get_context("fork")
fork_server = multiprocessing.get_context("forkserver")
ALARM_SECONDS = 500


def start_fork_server() -> None:
    """Have a process that has loaded everything, has no threads, and forks: see `fork_server`."""
    fork_server.set_forkserver_preload(["callers", "forked_processes"])  # what of it is found
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Python 3.11 looks there alone
        forkserver.ensure_running()


def apart(work: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process, from which it may fork; give its result."""
    start_fork_server()
    with ProcessPoolExecutor(1, fork_server) as pool:
        return pool.submit(_strictly, dict(os.environ), work, *args).result(560)


def _strictly(environment: dict[str, str], work: Callable[..., Any], *args: Any) -> Any:
    restore(environment)
    warnings.simplefilter("error")
    return work(*args)


def restore(environment: dict[str, str]) -> None:
    """Have the environment of a test: the server that forks has that of its first one."""
    os.environ.clear()
    os.environ.update(environment)


def start(work: Callable[..., Any], *args: Any) -> ForkProcess:
    """Start work in a forked child, which ends as a process does."""
    assert threading.active_count() == 1, "a fork of a process with threads may hang"
    child = fork.Process(target=_with_alarm, args=(work, *args), daemon=True)
    child.start()
    return child


def _with_alarm(work: Callable[..., Any], *args: Any) -> None:
    signal.alarm(ALARM_SECONDS)
    work(*args)


def finish(processes: Iterable[ForkProcess], code: int = 0) -> None:
    """Wait for processes; each must end with this code."""
    for one in processes:
        one.join(ALARM_SECONDS + 5)
        assert one.exitcode == code, f"a process ended with {one.exitcode}; see its traceback"


def content(record: Record | None) -> tuple[Any, ...] | None:
    """Give all of a record's bits, as something that compares."""
    if record is None:
        return None
    labels = None if record.labels is None else record.labels.tobytes()
    return record.features.dtype.str, record.features.shape, record.features.tobytes(), labels


@dataclass
class Scene:
    """A movie of small frames, what its records are, and the cache that they go to."""

    root: Path
    count: int
    pooling: str | None = "mean_patches_exact"
    keys: list[bytes] = field(init=False)
    records: list[Record] = field(init=False)
    right: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        movie = self.movie()
        jobs = [movie.read(t) for t in range(self.count)]
        self.records = list(compute_records(jobs, movie.spec, movie.backbone, movie.draw, 64))
        self.keys = [movie.key(t) for t in range(self.count)]
        self.right = [content(record) for record in self.records]

    def movie(
        self,
        frames: slice = slice(None),
        mode: Any = "a",
        *,
        log: Path | None = None,
        seconds: float = 0.0,
    ) -> MovieFeatures:
        """Open the cache anew, and bind some of the frames to it."""
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 1 << 12, (self.count, 16, 16), dtype=np.uint16)
        masks = np.repeat(np.arange(4, dtype=np.uint16), 4)[None, :, None] * np.ones_like(pixels)
        backbone = FakeBackbone(4, 8, seconds, log)
        return FeatureCache(self.root, mode).movie(
            pixels[frames], masks[frames], backbone, pooling=self.pooling, name="crowd"
        )

    def space(self, mode: Any = "a") -> Space:
        """Open the cache anew, and give the space of the records."""
        return self.movie(slice(0, 1), mode).space

    def entries(self, numbers: Sequence[int]) -> list[NewRecord]:
        return [NewRecord(self.keys[i], self.records[i], {"frame": i}) for i in numbers]

    def keys_of(self, numbers: Sequence[int]) -> Keys:
        joined = b"".join(self.keys[number] for number in numbers)
        return np.frombuffer(joined, np.uint8).reshape(-1, 16)

    def check(self, space: Space, numbers: Sequence[int]) -> list[bool]:
        """Read records, each of which must be right or missing; tell which are there."""
        read = [content(record) for record in space.read(self.keys_of(numbers))]
        for number, found in zip(numbers, read, strict=True):
            assert found in (None, self.right[number]), f"record {number} has other bits: {found}"
        return [found is not None for found in read]


def no_sync() -> None:
    """Let nothing wait for the disk: a process that is killed loses nothing that it wrote."""
    os.fsync = lambda descriptor: None


def beat_fast() -> None:
    """Let the hearts of this process's children beat, so that they let go of retired packs soon."""
    process.BEAT_SECONDS = 0.05
