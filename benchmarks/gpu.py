"""Figures of a GPU, in eight minutes at most: python -m benchmarks.gpu [--device cuda:0].

Needs nothing but the checkout, torch with CUDA, torchvision and, each for its backbone, sam2 and
transformers; what is not installed is left out, with a line that says so. Networks have random
weights. Frames are 1024x1024, uint16, uncompressed TIFFs, each another, with 200 cells. In order of
worth, for SAM 2.1 base-plus in bfloat16, DINOv2-small, and SAM 2.1 base-plus in float32:

differences  of records from those of the CPU, and from those of the plain way on the same GPU,
             against the bound of `feature_cache.rounding`: all poolings and grids, four draws
bare         frames a second of the backbone alone, on batches that lie on the device
warm         `run_warm` with 15 copies and with none: records a second, and how much longer it takes
             than the bare backbone for as many embeddings; the proofs of the first records included
epoch        a training's first epoch, 8 and 2 DataLoader workers, whose misses the parent computes

Each part has a share of the time, and is left out where that isn't left. Results are written after
each part, as JSON and as a table beside it. ``--device cpu --tiny`` tries the script itself.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from feature_cache import Augmentations, CachedFeatureDataset, Draw, FeatureCache, load_backbone
from feature_cache.backbones.base import Backbone
from feature_cache.engine import Embedding, Frame, cut_batches
from feature_cache.engine.cpu import Plain
from feature_cache.engine.device import PLAIN, OnDevice
from feature_cache.hashing import frame_digest
from feature_cache.key import Record
from feature_cache.movies import Movie
from feature_cache.movies.images import Series
from feature_cache.pooling import POOLINGS
from feature_cache.rounding import difference, rounding_bound
from feature_cache.service import close_all
from feature_cache.spec import SpaceSpec
from feature_cache.warm import plan_warm, run_warm

from .harness import describe_machine
from .warming import draw_cells

RESULTS = Path(__file__).parent / "results"
COPIES, WINDOW = 15, 8
SAMPLE_SECONDS = 0.1
BUSY_PERCENT = 90.0
FRAMES_COMPARED, DRAWS_COMPARED = 2, 3
MORE_PACKAGES = ("torchvision", "sam2", "transformers", "tifffile", "scipy")


@dataclass(frozen=True)
class Network:
    """A backbone to measure: its name, compute dtype, package and options."""

    name: str
    dtype: str
    package: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.name.removeprefix('facebook/')}, {self.dtype}"

    def load(self, device: str) -> Backbone:
        return load_backbone(self.name, "random:0", device, self.dtype, **self.options)


@dataclass(frozen=True)
class Scale:
    """How much is measured.

    Attributes
    ----------
    size, cells, frames : int
        Of the movie: sides, cells in a frame, and how many frames there are at most.
    batches : tuple of int
        Frames at once for the bare backbone.
    pilot : int
        Frames of the run whose pace decides how long others are.
    seconds : float
        That a measurement takes, about.
    share : float
        Seconds that a part may take; it is left out where fewer are left.
    """

    networks: tuple[Network, ...]
    size: int
    cells: int
    frames: int
    batches: tuple[int, ...]
    copies: int
    workers: tuple[int, ...]
    pilot: int
    seconds: float
    share: float


_SAM = partial(Network, "facebook/sam2.1-hiera-base-plus", package="sam2")
_DINO = partial(Network, "facebook/dinov2-small", dtype="float32", package="transformers")
FULL = Scale(
    (_SAM(dtype="bfloat16"), _DINO(), _SAM(dtype="float32")),
    size=1024, cells=200, frames=512, batches=(8, 32, 64), copies=COPIES, workers=(8, 2),
    pilot=8, seconds=10.0, share=30.0,
)  # fmt: skip
TINY = Scale(
    (Network("debug/random", "float32", "numpy"),),
    size=64, cells=4, frames=8, batches=(2,), copies=1, workers=(2,),
    pilot=2, seconds=0.2, share=5.0,
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One number: of which part and backbone, what it is, and its unit."""

    part: str
    network: str
    what: str
    value: float
    unit: str


@dataclass
class Results:
    """All that was measured so far, and what was left out, with the reason."""

    machine: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_of_gpu(self) -> bool:
        return str(self.machine["kind"]) == "GPU"


# Pure: numbers and tables


def count_frames(pace: float, seconds: float, copies: int, least: int, most: int) -> int:
    """Give how many frames with their copies take some seconds, at a pace in records a second.

    Examples
    --------
    >>> count_frames(pace=160.0, seconds=10.0, copies=15, least=8, most=512)
    100
    """
    return min(most, max(least, math.floor(pace * seconds / (1 + copies))))


def ratio_to_bare(seconds: float, embeddings: int, bare: float) -> float:
    """Divide what something took by what the bare backbone takes for as many frames.

    Examples
    --------
    >>> ratio_to_bare(seconds=11.0, embeddings=1000, bare=100.0)
    1.1
    """
    return seconds * bare / embeddings


def sum_up_use(samples: Sequence[float]) -> dict[str, float]:
    """Give the median of a GPU's use, in percent, and the share of samples above `BUSY_PERCENT`."""
    if not samples:
        return {}
    busy = sum(sample > BUSY_PERCENT for sample in samples) / len(samples)
    return {
        "use of the GPU, median": statistics.median(samples),
        f"time in which its use is above {BUSY_PERCENT:.0f} %": 100.0 * busy,
    }


def largest_differences(
    pairs: Iterable[tuple[SpaceSpec, Record, Record]],
) -> dict[SpaceSpec, float]:
    """Give, for each space, how far records are apart at most; NaN and infinity stay."""
    found: dict[SpaceSpec, float] = {}
    for spec, one, other in pairs:
        found[spec] = float(np.maximum(found.get(spec, 0.0), difference(one, other)))
    return found


def difference_rows(network: str, other: str, found: Mapping[SpaceSpec, float]) -> list[Row]:
    """Give a row for each space, in units of its bound: above 1 is more than rounding."""
    return [
        Row("differences", network, f"{spec.pooling or 'grids'}, from {other}",
            apart / rounding_bound(spec), "of the bound")
        for spec, apart in found.items()
    ]  # fmt: skip


def make_table(results: Results) -> str:
    """Give the Markdown page of results; figures of a CPU are called that above them."""
    machine = results.machine
    lines = [f"# {machine['device']}, {machine['date']}", ""]
    if not results.is_of_gpu:
        lines += [
            "**Figures of a CPU, in a tiny configuration: they try the script, and say nothing of "
            "any GPU.**", "",
        ]  # fmt: skip
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    lines += [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB; driver "
        f"{machine['driver']}, CUDA {machine['cuda']}; Python {machine['python']}; {versions}.", "",
        f"Random weights; {machine['movie']}. Measured in {results.seconds:.0f} s.", "",
        "| part | backbone | what | |", "|---|---|---|---:|",
    ]  # fmt: skip
    lines += [f"| {r.part} | {r.network} | {r.what} | {_format(r)} |" for r in results.rows]
    if results.left_out:
        lines += ["", "Left out:", "", *(f"- {line}" for line in results.left_out)]
    return "\n".join(lines) + "\n"


def _format(row: Row) -> str:
    return (
        f"{row.value:.3g} {row.unit}" if abs(row.value) < 1000 else f"{row.value:,.0f} {row.unit}"
    )


def to_json(results: Results) -> dict[str, Any]:
    """Give all as JSON; what is not finite as a string, which JSON has no number for."""
    plain = asdict(results)
    for row in plain["rows"]:
        if not math.isfinite(row["value"]):
            row["value"] = str(row["value"])
    return plain


def name_file(device: str, date: str) -> Path:
    """Name the results of a device on a date."""
    words = "".join(c if c.isalnum() else " " for c in device.lower()).split()
    return RESULTS / f"gpu-{'-'.join(words)}-{date}.json"


# Acting: the movie, the device


def write_frames(root: Path, scale: Scale) -> Movie:
    """Write the movie, uncompressed: two frames of noise and disks, rolled."""
    frames, masks = draw_cells(2, scale.size, scale.cells)
    truth = Path(f"{root}_GT") / "TRA"
    for folder in (root, truth):
        folder.mkdir(parents=True)
    for t in range(scale.frames):
        by = 7 * t % scale.size, 3 * t % scale.size
        for file, images in ((f"t{t:03d}", frames), (f"man_track{t:03d}", masks)):
            place = (truth if file.startswith("man") else root) / f"{file}.tif"
            tifffile.imwrite(place, np.roll(images[t % 2], by, axis=(0, 1)))
    tracks = [[n + 1, 0, scale.frames - 1, 0] for n in range(scale.cells)]
    np.savetxt(truth / "man_track.txt", tracks, fmt="%d")
    return Movie.open(root)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Use:
    """Samples how much a GPU is used, in a thread of its own; a context manager.

    Attributes
    ----------
    samples : list of float
        Percent; none where there is no GPU, or nothing that tells.
    """

    def __init__(self, device: torch.device) -> None:
        self.samples: list[float] = []
        self._device, self._ended = device, threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Use:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def rows(self) -> dict[str, float]:
        """Give what was seen: use in percent, memory of tensors in GiB."""
        found = sum_up_use(self.samples)
        if self._device.type == "cuda":
            found["most memory of tensors"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        return found

    def _sample(self) -> None:
        look = find_look(self._device)
        while look is not None and not self._ended.wait(SAMPLE_SECONDS):
            with suppress(Exception):  # one sample less
                self.samples.append(look())


def find_look(device: torch.device) -> Callable[[], float] | None:
    """Give what tells the use of a GPU in percent: torch with pynvml, or nvidia-smi, or nothing."""
    ways = (
        lambda: float(torch.cuda.utilization(device)),
        lambda: float(_ask_nvidia_smi("utilization.gpu", device)),
    )
    for look in ways:
        with suppress(Exception):  # whatever is missing, the next is tried
            look()
            return look
    return None


def _ask_nvidia_smi(what: str, device: torch.device) -> str:
    number = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits", "-i", number]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def describe(device: torch.device, date: str, scale: Scale) -> dict[str, Any]:
    """Name machine, device, driver and versions; nothing that tells whose machine it is."""
    machine = describe_machine()
    is_gpu = device.type == "cuda"
    driver = "none"
    if is_gpu:
        try:
            driver = _ask_nvidia_smi("driver_version", device)
        except (OSError, subprocess.SubprocessError):
            driver = "unknown"
    versions = dict(machine["versions"])
    for package in MORE_PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        **machine,
        "versions": versions,
        "kind": "GPU" if is_gpu else "CPU",
        "device": torch.cuda.get_device_name(device) if is_gpu else f"CPU ({machine['processor']})",
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "date": date,
        "movie": f"frames of {scale.size}x{scale.size}, uint16, uncompressed TIFFs, "
        f"{scale.cells} cells",
    }


# The parts


class First:
    """The first images of a series, read one at a time."""

    def __init__(self, images: Series, count: int) -> None:
        self.images, self.count = images, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, t: int) -> NDArray[Any]:
        return np.asarray(self.images[t])


@dataclass
class Bench:
    """What the parts of one backbone share.

    Attributes
    ----------
    bare : float
        Frames a second of the backbone alone; 0 as long as it isn't measured.
    pace : dict of int to float
        Records a second of warming, by number of copies.
    """

    network: Network
    scale: Scale
    device: torch.device
    movie: Movie
    folder: Path
    bare: float = 0.0
    pace: dict[int, float] = field(default_factory=dict)
    _loaded: dict[str, Backbone] = field(default_factory=dict, init=False)

    def row(self, part: str, what: str, value: float, unit: str) -> Row:
        return Row(part, self.network.title, what, value, unit)

    def backbone(self, device: torch.device | str) -> Backbone:
        """Load the backbone on a device, once."""
        name = str(device)
        if name not in self._loaded:
            self._loaded[name] = self.network.load(name)
        return self._loaded[name]

    def first(self, frames: int) -> tuple[First, First]:
        """Give the first frames and their masks."""
        assert self.movie.masks is not None
        return First(self.movie.frames, frames), First(self.movie.masks, frames)

    def read(self, t: int) -> Frame:
        assert self.movie.masks is not None
        pixels, mask = np.asarray(self.movie.frames[t]), np.asarray(self.movie.masks[t], np.int32)
        return Frame(pixels, mask, frame_digest(pixels), f"frame {t}")

    def embeddings(self) -> list[Embedding]:
        """Give a few frames under the identity and under draws, for every kind of record."""
        spec = self.backbone("cpu").spec
        specs = tuple(SpaceSpec(spec, pooling, "float16") for pooling in (None, *POOLINGS))
        draws = [Draw(), *map(Augmentations("default", DRAWS_COMPARED).draw, (1, 2, 3))]
        frames = [self.read(t) for t in range(FRAMES_COMPARED)]
        return [Embedding(frame, draw, specs) for draw in draws for frame in frames]

    def compare(self) -> Iterator[Row]:
        """Compare the way of the device with the plain one there, and with the CPU."""
        device, cpu = self.backbone(self.device), self.backbone("cpu")
        wanted = self.embeddings()
        found = compute(OnDevice(device, (device.spec,)), wanted, len(wanted))
        ways = {"the plain way on the same device": device, "the CPU": cpu}
        for name, backbone in ways.items():
            expected = compute(Plain(backbone, (backbone.spec,)), wanted, 1)
            pairs = [
                (spec, one, other)
                for each, ours, theirs in zip(wanted, found, expected, strict=True)
                for spec, one, other in zip(each.specs, ours, theirs, strict=True)
            ]
            yield from difference_rows(self.network.title, name, largest_differences(pairs))

    def measure_bare(self) -> Iterator[Row]:
        """Embed batches that lie on the device, again and again."""
        backbone = self.backbone(self.device)
        for size in self.scale.batches:
            images = torch.rand(size, self.scale.size, self.scale.size, device=self.device)
            with Use(self.device) as use:
                pace = size * repeat(
                    partial(backbone.embed, images), self.device, self.scale.seconds / 4
                )
            self.bare = max(self.bare, pace)
            yield self.row("bare", f"{size} frames at once", pace, "frames/s")
            yield from self._rows_of("bare", f"{size} frames at once", use)

    def measure_warm(self, copies: int) -> Iterator[Row]:
        """Warm as many frames as take the time asked, after a few that tell how many."""
        pilot, _ = self.warm(copies, self.scale.pilot)
        pace = self.scale.pilot * (1 + copies) / pilot
        frames = count_frames(pace, self.scale.seconds, copies, self.scale.pilot, self.scale.frames)
        name = f"{copies} copies of {frames} frames"
        with Use(self.device) as use:
            seconds, cpu_seconds = self.warm(copies, frames)
        records = frames * (1 + copies)
        self.pace[copies] = records / seconds
        yield self.row("warm", name, records / seconds, "records/s")
        each = 1e3 * cpu_seconds / records
        yield self.row("warm", f"{name}: processor time a record", each, "ms")
        if self.bare:
            ratio = ratio_to_bare(seconds, records, self.bare)
            yield self.row("warm", f"{name}, against the bare backbone", ratio, "x")
        yield from self._rows_of("warm", name, use)

    def warm(self, copies: int, frames: int) -> tuple[float, float]:
        """Warm some frames into a cache of their own; give its seconds, and those of processors."""
        augmentations = Augmentations("default", copies)
        with self._cache() as cache:
            backbone = self.backbone(self.device)
            plan = plan_warm(cache, [self.first(frames)], backbone, augmentations=augmentations)
            before = time.process_time()
            report = run_warm(plan, batch_size=None)
            cpu_seconds = time.process_time() - before
        if report.failures or report.computed != frames * (1 + copies):
            reasons = "; ".join(str(failure) for failure in report.failures[:3])
            raise RuntimeError(f"{report.computed} records were computed: {reasons}")
        return report.seconds, cpu_seconds

    def measure_epoch(self, workers: int) -> Iterator[Row]:
        """Go through windows of frames of which nothing is stored yet."""
        least, most = WINDOW, self.scale.frames // WINDOW * WINDOW
        frames = count_frames(self.pace.get(0, 0.0), self.scale.seconds, 0, least, most)
        frames -= frames % WINDOW
        with self._cache() as cache, Use(self.device) as use:
            began = time.perf_counter()
            seen = list(self._load(cache, frames, workers))
            seconds = time.perf_counter() - began
            close_all()
        name = f"{workers} workers, {frames} frames"
        if sum(tokens for tokens, _ in seen) != frames * self.scale.cells:
            raise RuntimeError(f"{name}: features of another number of cells than there are")
        yield self.row("epoch", name, frames / seconds, "frames/s")
        in_workers = sum(has_cuda for _, has_cuda in seen)
        yield self.row("epoch", f"{name}: windows read where CUDA is set up", in_workers, "windows")
        yield from self._rows_of("epoch", name, use)

    def _load(self, cache: FeatureCache, frames: int, workers: int) -> Iterator[tuple[int, bool]]:
        movie = cache.movie(*self.first(frames), self.backbone(self.device))
        windows = Windows(frames, self.scale.cells)
        cached = CachedFeatureDataset(windows, [movie], batch_size=WINDOW, progress=False)
        for [seen] in DataLoader(Seen(cached), 1, num_workers=workers, collate_fn=list):
            yield seen

    @contextmanager
    def _cache(self) -> Iterator[FeatureCache]:
        with tempfile.TemporaryDirectory(dir=self.folder) as root:
            yield FeatureCache(root)

    def _rows_of(self, part: str, name: str, use: Use) -> Iterator[Row]:
        for what, value in use.rows().items():
            yield self.row(part, f"{name}: {what}", value, "GiB" if "memory" in what else "%")


def compute(way: Any, wanted: Sequence[Embedding], batch_size: int) -> list[list[Record]]:
    """Compute the records of embeddings in one way, errors as they come."""
    records: list[list[Record]] = []
    for batch in cut_batches(wanted, batch_size, mixes_sizes=False):
        for each in batch:
            way.prepare(each.frame)
        grids = way.embed(way.draw(batch))
        records += [
            way.make_records(each, layers[each.specs[0].backbone])
            for each, layers in zip(batch, grids, strict=True)
        ]
    return records


def repeat(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Give how often a call is done in a second, the device waited for; the first three are not
    counted.
    """
    for _ in range(3):
        call()
    wait_for(device)
    began, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - began < seconds:
        call()
        wait_for(device)
        done += 1
    return done / (time.perf_counter() - began)


class Windows(Dataset[dict[str, torch.Tensor]]):
    """The cells of `WINDOW` frames, each frame in one window."""

    def __init__(self, frames: int, cells: int) -> None:
        self.frames, self.cells = frames, cells

    def __len__(self) -> int:
        return self.frames // WINDOW

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        times = torch.arange(index * WINDOW, (index + 1) * WINDOW)
        labels = torch.arange(1, self.cells + 1).repeat(WINDOW)
        return {"timepoints": times.repeat_interleave(self.cells), "labels": labels}


class Seen(Dataset[tuple[int, bool]]):
    """How many cells a sample has features of, and whether CUDA is set up in the process."""

    def __init__(self, cached: CachedFeatureDataset) -> None:
        self.cached = cached

    def __len__(self) -> int:
        return len(self.cached)

    def __getitem__(self, index: int) -> tuple[int, bool]:
        features = self.cached[index]["pretrained_feats"]
        return len(features), torch.cuda.is_initialized()  # type: ignore[no-untyped-call]


# The run


@dataclass(frozen=True)
class Part:
    """Something to measure, the seconds that it may take, and how."""

    name: str
    share: float
    measure: Callable[[], Iterable[Row]]


def plan_parts(benches: Sequence[Bench], scale: Scale) -> list[Part]:
    """Put all parts in order of worth."""
    share = scale.share
    kinds: list[tuple[str, float, Callable[[Bench], Iterable[Row]]]] = [
        ("differences", 1.5 * share, Bench.compare),
        ("bare", 0.6 * share, Bench.measure_bare),
        (f"warm with {scale.copies} copies", share, lambda b: b.measure_warm(scale.copies)),
        ("warm without copies", 0.7 * share, lambda b: b.measure_warm(0)),
        *(
            (f"epoch with {n} workers", 0.7 * share, lambda b, n=n: b.measure_epoch(n))
            for n in scale.workers
        ),
    ]
    return [
        Part(f"{name}, {bench.network.title}", seconds, partial(measure, bench))
        for name, seconds, measure in kinds
        for bench in benches
    ]


class Run:
    """Does the parts for which there is time, and writes what is known after each.

    Parameters
    ----------
    results : Results
    file : Path
        The JSON; the table goes beside it.
    seconds : float
        For all, since `began`.

    Attributes
    ----------
    failed : bool
        Whether a part has.
    """

    def __init__(self, results: Results, file: Path, seconds: float, began: float) -> None:
        self.results, self.file, self.seconds, self.began = results, file, seconds, began
        self._lock, self._at, self.failed = threading.Lock(), "nothing", False

    def do(self, parts: Sequence[Part]) -> None:
        """Do them; one that fails is said, and the others are done."""
        last = threading.Timer(self.seconds - self._spent(), self._break_off)
        last.daemon = True
        last.start()
        for part in parts:
            self._at = part.name
            if self._spent() + part.share > self.seconds:
                self.leave_out(f"{part.name}: it may take {part.share:.0f} s, and fewer are left")
                continue
            began = time.perf_counter()
            try:
                for row in part.measure():
                    self.results.rows.append(row)
                    print(f"  {row.what}: {_format(row)}", flush=True)
            except Exception as error:  # noqa: BLE001  the others are done all the same
                self.failed = True
                self.leave_out(f"{part.name} failed: {type(error).__name__}: {error}")
            print(f"{part.name}: {time.perf_counter() - began:.1f} s", flush=True)
            self.save()
        last.cancel()

    def leave_out(self, line: str) -> None:
        print(f"left out: {line}", file=sys.stderr, flush=True)
        self.results.left_out.append(line)
        self.save()

    def save(self) -> None:
        with self._lock:
            self.results.seconds = self._spent()
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text(json.dumps(to_json(self.results), indent=1) + "\n")
            self.file.with_suffix(".md").write_text(make_table(self.results))

    def _spent(self) -> float:
        return time.perf_counter() - self.began

    def _break_off(self) -> None:
        self.leave_out(f"all from here on: the time was over during {self._at}")
        os._exit(1)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--tiny", action="store_true", help="a tiny configuration, for a CPU")
    parser.add_argument("--seconds", type=float, default=460.0, help="for all; default 460")
    parser.add_argument("--date", default=time.strftime("%Y-%m-%d"), help="default: today")
    parser.add_argument("--out", type=Path, help="JSON; default: by device and date")
    parser.add_argument("--folder", type=Path, help="where the movie and caches go")
    return parser.parse_args()


def main() -> None:
    began = time.perf_counter()
    options = parse_options()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit(f"no {device} here: --device cpu --tiny tries the script, and measures nothing")
    if device.type != "cuda" and not options.tiny:
        sys.exit(f"--device {device} without --tiny: it would take hours, and say nothing of a GPU")
    os.environ["FEATURE_CACHE_MEMO"] = "off"
    os.environ[PLAIN] = "0"
    scale = TINY if options.tiny else FULL
    machine = describe(device, options.date, scale)
    results = Results(machine)
    file = options.out or name_file(machine["device"], options.date)
    run = Run(results, file, options.seconds, began)
    if device.type == "cuda" and find_look(device) is None:
        run.leave_out("use of the GPU: neither pynvml nor nvidia-smi tells it here")
    there = []
    for network in scale.networks:
        if importlib.util.find_spec(network.package) is None:
            run.leave_out(f"{network.title}: {network.package} is not installed")
        else:
            there.append(network)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        movie = write_frames(Path(folder) / "01", scale)
        benches = [Bench(network, scale, device, movie, Path(folder)) for network in there]
        run.do(plan_parts(benches, scale))
    print(make_table(results))
    print(f"written to {file} and {file.with_suffix('.md')}")
    sys.exit(1 if run.failed else 0)


if __name__ == "__main__":
    main()
