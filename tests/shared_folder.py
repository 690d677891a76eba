"""A lab's folder: movies, a backbone that other processes know by name, and a Dask cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feature_cache import FeatureCache
from feature_cache.movies import write_movie
from feature_cache.spec import TABLES
from feature_cache.store import Space
from feature_cache.store.pack_contents import read_keys
from forked_processes import content
from processes import outcome
from synthetic import make_movie

BACKBONE = """
import os
from feature_cache.testing import FakeBackbone

def load(name, weights, device, dtype):
    seconds, logs = float(os.environ.get("LAB_SECONDS", 0)), os.environ.get("LAB_LOGS")
    return FakeBackbone(8, 8, seconds, logs and f"{logs}/{os.getpid()}")
"""
PATIENCE_SECONDS = 60.0


def wait_until(is_so: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not is_so():
        assert time.monotonic() < deadline, f"waited too long for {what}"
        time.sleep(0.01)


@dataclass
class Lab:
    """A folder with movies, and what is done there."""

    root: Path
    environment: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        plugins = self.root / "plugins"
        info = plugins / "lab_backbone-1.0.dist-info"
        info.mkdir(parents=True)
        (plugins / "lab_backbone.py").write_text(BACKBONE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-backbone\nVersion: 1.0\n")
        entry = "[feature_cache.backbones]\nlab = lab_backbone:load\n"
        (info / "entry_points.txt").write_text(entry)
        paths = [str(plugins), os.environ.get("PYTHONPATH", "")]
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}

    def write_movie(self, name: str, frames: int, seed: int) -> Path:
        """Write a movie."""
        path = self.root / name / "01"
        write_movie(path, *make_movie(frames=frames, seed=seed))
        return path

    def logs(self, name: str, seconds: float = 0.0) -> Path:
        """Have backbones take their time, and log what they embed, a file a process."""
        folder = self.root / name
        folder.mkdir()
        self.environment |= {"LAB_LOGS": str(folder), "LAB_SECONDS": str(seconds)}
        return folder

    def start(self, *words: object) -> subprocess.Popen[str]:
        """Start the command line in a process, and a process group, of its own."""
        command = [sys.executable, "-m", "feature_cache.cli", *map(str, words)]
        return subprocess.Popen(
            command, cwd=self.root, env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def warm(self, cache: str, movies: Sequence[Path], *options: object) -> subprocess.Popen[str]:
        words = ("warm", *movies, "--cache", self.root / cache, "--backbone", "lab", "--json")
        return self.start(*words, *options)

    @contextmanager
    def cluster(self, workers: int, threads: int = 2) -> Iterator[Cluster]:
        """Start a scheduler and workers by hand, on loopback."""
        cluster = Cluster(self, threads)
        try:
            cluster.start(workers)
            yield cluster
        finally:
            cluster.stop()


@dataclass
class Cluster:
    """Processes of ``dask scheduler`` and ``dask worker``."""

    lab: Lab
    threads: int
    scheduler: subprocess.Popen[bytes] = field(init=False)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    address: str = ""

    def start(self, workers: int) -> None:
        file = self.lab.root / "scheduler.json"
        file.unlink(missing_ok=True)
        self.scheduler = self._start(
            "scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file,
            "--no-dashboard",
        )  # fmt: skip
        wait_until(lambda: file.exists() and file.read_text().endswith("}"), "the scheduler")
        self.address = json.loads(file.read_text())["address"]
        self.workers = [
            self._start(
                "worker", self.address, "--no-nanny", "--no-dashboard", "--nthreads",
                self.threads, "--host", "127.0.0.1", "--local-directory", self.lab.root / "scratch",
            )
            for _ in range(workers)
        ]  # fmt: skip

    def _start(self, *words: object) -> subprocess.Popen[bytes]:
        with open(self.lab.root / "dask.log", "ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "dask", *map(str, words)],
                cwd=self.lab.root, env=self.lab.environment, stdout=log, stderr=log,
            )  # fmt: skip

    def stop(self) -> None:
        for process in (*self.workers, self.scheduler):
            process.kill()
            process.wait()


def finish(process: subprocess.Popen[str], code: int = 0) -> dict[str, Any]:
    """Wait for a command; give its report."""
    out, err = outcome(process, 120)
    assert process.returncode == code, f"exit {process.returncode}: {err}"
    report: dict[str, Any] = json.loads(out.splitlines()[-1])
    return report


def end(process: subprocess.Popen[str], number: signal.Signals) -> str:
    """Send a signal, and wait for the end; give what was said."""
    process.send_signal(number)
    return outcome(process, 120)[1]


def interrupt(process: subprocess.Popen[str]) -> str:
    """Send Ctrl-C as a terminal does, to the whole process group; wait for the end of them all."""
    os.killpg(process.pid, signal.SIGINT)
    said = outcome(process, 120)[1]
    wait_until(lambda: not members(process.pid), "the last process to end")
    return said


def members(group: int) -> list[str]:
    """List the processes of a group that still run."""
    stats = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            stats.append(file.read_text())
    fields = [stat.rpartition(")")[2].split() for stat in stats]
    pairs = zip(stats, fields, strict=True)
    return [stat for stat, (state, _, one, *_) in pairs if int(one) == group and state != "Z"]


def lines(folder: Path) -> list[str]:
    """Give the digests of all frames embedded, as far as they are written."""
    return [line for log in folder.glob("*") for line in log.read_text().splitlines()]


def counts(folder: Path) -> Counter[str]:
    return Counter(lines(folder))


def holds_tables(space: Space) -> bool:
    """Tell whether a space has training data instead of features."""
    return space.spec["backbone"]["layer"] == TABLES


def contents(cache: Path) -> dict[tuple[str, bytes], Any]:
    """Read every record of features: its bits by space and key; each is there once."""
    found: dict[tuple[str, bytes], Any] = {}
    for space in FeatureCache(cache, "r").spaces():
        if holds_tables(space):
            continue
        for name in space.pack_names():
            keys = read_keys(space.packs_folder / name)
            for key, record in zip(keys, space.read(keys), strict=True):
                assert record is not None
                found[space.name, key.tobytes()] = content(record)
    return found
