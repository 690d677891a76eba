"""Warming on a Dask cluster: a real run with sleeping stand-ins, and a model of a large one.

python -m benchmarks.cluster --workers 1,2,4,8

A worker is a process with one thread, whose stand-in for a network sleeps: so as many run here as
the processors bear, which do all that is not the network. Measured of each run are its wall time,
and the processor time for each unit of work of the scheduler with its client, which are one process
whatever the number of workers (less what it takes while nothing is done: it has the nannies here,
and Dask lets workers be heard less often, the more there are), and of the workers. The model is a
closed queueing network: workers that compute, a scheduler, and a file system, of which the
operations a second are assumed.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

OPERATIONS_A_SECOND = 10_000.0
"""Of a file server for all workers; one disk of this host makes more."""
FRAME_OPERATIONS, PACK_OPERATIONS = 3, 30
"""Its claim is made, read and removed; folders, files, syncs and renames of a pack."""
UNIT_EMBEDDINGS = 64
_IDLE_SECONDS = 3.0
_STANDIN = """
import os
from feature_cache.testing import FakeBackbone

def load(name, weights, device, dtype):
    return FakeBackbone(64, 8, float(os.environ["STANDIN_SECONDS"]))
"""
_INFO = {
    "METADATA": "Metadata-Version: 2.1\nName: standin\nVersion: 1.0\n",
    "entry_points.txt": "[feature_cache.backbones]\nstandin = standin:load\n",
}


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes
    ----------
    workers, units : int
    wall_seconds : float
    device_seconds : float
        What a stand-in sleeps for a unit.
    scheduler_seconds, worker_seconds : float
        Processor time for a unit.
    """

    workers: int
    units: int
    wall_seconds: float
    device_seconds: float
    scheduler_seconds: float
    worker_seconds: float

    @property
    def efficiency(self) -> float:
        """The share of the workers' time in which their networks compute."""
        return self.units * self.device_seconds / (self.workers * self.wall_seconds)


def predict(
    run: Run, workers: int, device_seconds: float, embeddings: int, operations: float
) -> float:
    """Give the units a second of so many workers, from what was measured of a run.

    Parameters
    ----------
    run : Run
    workers : int
    device_seconds : float
        For a unit.
    embeddings : int
        Of a unit: what a worker does beside its network grows with them.
    operations : float
        Of the file system, for a unit.
    """
    own = run.worker_seconds * embeddings / UNIT_EMBEDDINGS
    services = (run.scheduler_seconds, operations / OPERATIONS_A_SECOND)
    return rate_of(workers, device_seconds + own, services)


def rate_of(workers: int, think_seconds: float, services: Sequence[float]) -> float:
    """Give the units a second of a closed network, by mean value analysis (Reiser & Lavenberg).

    Parameters
    ----------
    workers : int
    think_seconds : float
        What a worker takes for a unit without waiting for others.
    services : sequence of float
        What each station that all share takes for a unit, one after the other.
    """
    queues, rate = [0.0] * len(services), 0.0
    for number in range(1, workers + 1):
        times = [service * (1 + queue) for service, queue in zip(services, queues, strict=True)]
        rate = number / (think_seconds + sum(times))
        queues = [rate * seconds for seconds in times]
    return rate


def model(run: Run, workers: Sequence[int] = (16, 64, 256, 1024)) -> list[str]:
    """Give a Markdown table: what many workers do of as many times what one does."""
    head = "".join(f" {number:,} workers |" for number in workers)
    lines = [f"| a frame | copies | a unit |{head}", "|" + "---:|" * (3 + len(workers))]
    for frame_seconds in (0.01, 0.05):
        for copies, embeddings in ((16, 64), (16, 1024), (1, 1024)):
            device = frame_seconds * embeddings
            operations = FRAME_OPERATIONS * embeddings / copies + PACK_OPERATIONS
            rates = [predict(run, number, device, embeddings, operations) for number in workers]
            alone = predict(run, 1, device, embeddings, operations)
            shares = zip(rates, workers, strict=True)
            row = "".join(f" {rate / number / alone:.2f} |" for rate, number in shares)
            lines.append(f"| {frame_seconds * 1e3:.0f} ms | {copies} | {embeddings} |{row}")
    return lines


@contextmanager
def _standin(seconds: float) -> Iterator[Path]:
    """Make a folder, and a backbone that all processes begun meanwhile know by name."""
    with tempfile.TemporaryDirectory(prefix="feature_cache-") as root:
        plugins = Path(root, "plugins")
        info = plugins / "standin-1.0.dist-info"
        info.mkdir(parents=True)
        (plugins / "standin.py").write_text(_STANDIN)
        for name, text in _INFO.items():
            (info / name).write_text(text)
        paths = [str(plugins), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["STANDIN_SECONDS"] = str(seconds)
        sys.path.insert(0, str(plugins))
        yield Path(root)


def _processor_seconds(client: Any) -> float:
    return sum(client.run(time.process_time).values())


def measure(workers: int, seconds: float, units_each: int = 8) -> Run:
    """Warm frames that are all different, with 15 copies, by so many workers, and time it.

    Parameters
    ----------
    workers : int
    seconds : float
        That a stand-in sleeps for an embedding.
    units_each : int
        How many units each worker gets.
    """
    import distributed

    with (
        _standin(seconds) as root,
        distributed.LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address="127.0.0.1:0",
            host="127.0.0.1",
        ) as local,
        distributed.Client(local) as client,
    ):
        client.wait_for_workers(workers)
        _warm(root, client, "first", workers)  # loads what a worker loads once
        own = time.process_time()
        time.sleep(_IDLE_SECONDS)
        idle = (time.process_time() - own) / _IDLE_SECONDS
        units = units_each * workers
        wall, own, others = _warm(root, client, "second", units)
    own = max(0.0, own - idle * wall) / units
    return Run(workers, units, wall, UNIT_EMBEDDINGS * seconds, own, others / units)


def _warm(root: Path, client: Any, name: str, units: int) -> tuple[float, float, float]:
    """Warm so many units; give wall time, and processor time of this process and of workers."""
    from feature_cache import Augmentations, FeatureCache
    from feature_cache.movies import write_movie
    from feature_cache.warm import find_sources, plan_warm
    from feature_cache.warm.cluster import run_on_cluster
    from feature_cache.warm.worker import Recipe

    count = units * UNIT_EMBEDDINGS // 16
    masks = np.zeros((count, 64, 64), np.uint16)
    masks[:, 8:24, 8:24], masks[:, 40:56, 40:56] = 1, 2
    frames = np.random.default_rng(0).integers(0, 1 << 16, masks.shape, np.uint16)
    tracks = np.array([[1, 0, count - 1, 0], [2, 0, count - 1, 0]])
    write_movie(root / name / "01", frames, masks, tracks)
    recipe, (sources, _) = Recipe("standin"), find_sources([str(root / name / "01")])
    cache = FeatureCache(root / f"{name}-cache")
    copies = Augmentations("default", copies=15, seed=0)
    plan = plan_warm(cache, sources, recipe.load(), augmentations=copies)
    wall, own, others = time.perf_counter(), time.process_time(), _processor_seconds(client)
    report = run_on_cluster(plan, recipe, client)
    ended, own = time.perf_counter(), time.process_time() - own
    if report.computed != 16 * count:
        raise RuntimeError(f"not all was computed: {report}")
    return ended - wall, own, _processor_seconds(client) - others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--seconds", type=float, default=0.05, help="an embedding; default 0.05")
    options = parser.parse_args()
    runs = [measure(int(number), options.seconds) for number in options.workers.split(",")]
    for run in runs:
        rate = predict(run, run.workers, run.device_seconds, UNIT_EMBEDDINGS, 0.0)
        print(
            f"{run.workers:4} workers: {run.units / run.wall_seconds:.2f} units/s, "
            f"{rate:.2f} by the model; efficiency {run.efficiency:.2f}; processor time of a unit: "
            f"scheduler {run.scheduler_seconds * 1e3:.1f} ms, worker "
            f"{run.worker_seconds * 1e3:.0f} ms"
        )
    print(f"\nAssumed: a file server of {OPERATIONS_A_SECOND:,.0f} operations a second.\n")
    print(*model(runs[-1]), sep="\n")


if __name__ == "__main__":
    main()
