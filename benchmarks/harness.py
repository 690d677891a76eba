"""What all benchmarks share: interleaved rounds, ratios, the page cache, the machine.

Each round runs every side once, in turns, so that whatever else the machine does meets all of them
alike. A ratio is that of two sides in the same round.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

OURS = "feature_cache"
PACKAGES = (
    *("numpy", "torch", "zarr", "h5py", "lmdb", "tensorstore", "safetensors", "litdata"),
    *("trackastra", "trackastra-pretrained-feats", "xxhash"),
)
Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One comparison: what each side took, round by round; less is better.

    Attributes
    ----------
    name : str
    against : str
        The side that others are divided by; empty where numbers stand for themselves.
    values : mapping of str to list of float
        For each side, a number a round. Sides of this package begin with `OURS`.
    unit : str
        ``"s"`` for seconds, or what else is counted.
    """

    name: str
    against: str
    values: Mapping[str, list[float]]
    unit: str = "s"

    def ratios(self, side: str, against: str = "") -> list[float]:
        """Divide a side by another in each round, or give its values where there is no other."""
        other = against or self.against
        if not other:
            return self.values[side]
        pairs = zip(self.values[side], self.values[other], strict=True)
        return [value / base for value, base in pairs]


@dataclass(frozen=True)
class Options:
    """What a benchmark is told: how long to measure, and where its files go."""

    folder: Path
    quick: bool = False
    rounds: int = 0

    def __post_init__(self) -> None:
        if not self.rounds:
            object.__setattr__(self, "rounds", 3 if self.quick else 9)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Give lower quartile, median and upper quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)


def seconds_of(call: Call) -> float:
    """Run once."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def seconds_each(call: Callable[[Any], object], items: Sequence[Any], budget: float) -> float:
    """Give the mean seconds a call over some items, in turns, for about `budget` seconds."""
    began = time.perf_counter()
    done = 0
    while True:
        for item in items:
            call(item)
            done += 1
            if (taken := time.perf_counter() - began) >= budget:
                return taken / done


def interleave(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run all sides in each round, each round beginning with another; a side gives its value."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    for _ in range(rounds):
        gc.collect()
        gc.disable()
        try:
            for name in order:
                values[name].append(sides[name]())
        finally:
            gc.enable()
        order.append(order.pop(0))
    return values


def compare_calls(
    name: str,
    against: str,
    sides: Mapping[str, Callable[[Any], object]],
    items: Sequence[Any],
    rounds: int,
    budget: float,
) -> Case:
    """Compare what a call takes over the same items, the page cache warm."""
    for call in sides.values():
        for item in items[:3]:
            call(item)

    def side(call: Callable[[Any], object]) -> Callable[[], float]:
        return lambda: seconds_each(call, items, budget)

    return Case(name, against, interleave({n: side(call) for n, call in sides.items()}, rounds))


# The page cache


def files_of(path: Path) -> list[Path]:
    """List the files in a folder, or the one."""
    if path.is_file():
        return [path]
    return [file for file in path.rglob("*") if file.is_file() and file.stat().st_size]


def resident_share(file: Path) -> float:
    """Give how much of a file is in the page cache, 0 to 1 (mincore)."""
    size = file.stat().st_size
    with open(file, "rb") as opened:
        mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
    pages = -(-size // mmap.PAGESIZE)
    state = np.zeros(pages, np.uint8)
    view = np.frombuffer(mapped, np.uint8)
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.mincore(
        ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(state.ctypes.data)
    )
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(file))
    return float((state & 1).mean())


def make_cold(path: Path) -> None:
    """Put a folder's files out of the page cache, and check that they are.

    Raises
    ------
    RuntimeError
        Some stay, as they do while another process has them mapped.
    """
    _unmap(path)
    for file in files_of(path):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if (share := resident_share(file)) > 0.01:
            raise RuntimeError(f"{share:.0%} of {file.name} stays in the page cache")


def _unmap(path: Path) -> None:
    """Let the page tables of this process forget what it has mapped, so that the cache can."""
    libc = ctypes.CDLL(None)
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, *_, name = line.split(maxsplit=5)
        if name.startswith(str(path)):
            start, stop = (int(address, 16) for address in where.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED)


# The machine


def describe_machine() -> dict[str, Any]:
    """Name processor, memory, system and versions; nothing that tells whose machine it is."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [x for x in info.read_text().splitlines() if x.startswith("model name")]
        processor = named[0].split(":")[1].strip() if named else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        "device": _device(),
        "versions": dict(_versions()),
    }


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def _versions() -> Iterable[tuple[str, str]]:
    for package in PACKAGES:
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:
            continue


# Results


def save_results(file: Path, cases: Mapping[str, Sequence[Case]], quick: bool) -> None:
    """Write all as JSON, numbers to four digits."""
    plain = {
        "machine": describe_machine(),
        "quick": quick,
        "benchmarks": {name: [_short(case) for case in some] for name, some in cases.items()},
    }
    file.write_text(json.dumps(plain, indent=1) + "\n")


def _short(case: Case) -> dict[str, Any]:
    values = {side: [float(f"{x:.4g}") for x in some] for side, some in case.values.items()}
    return {**asdict(case), "values": values}


def load_results(file: Path) -> dict[str, dict[str, Case]]:
    """Read what `save_results` wrote: benchmark, then name of the case."""
    plain = json.loads(file.read_text())["benchmarks"]
    return {name: {c["name"]: Case(**c) for c in some} for name, some in plain.items()}


def format_value(value: float, unit: str) -> str:
    """Write a number for people."""
    if unit != "s":
        return f"{value:,.4g} {unit}"
    for factor, name in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {name}"
    return f"{value * 1e9:.3g} ns"


def format_case(case: Case) -> str:
    """Make a table of one case: medians, and ratios with the middle half of the rounds."""
    width = max(map(len, case.values))
    lines = [case.name]
    for side, values in case.values.items():
        middle = format_value(statistics.median(values), case.unit)
        line = f"  {side:<{width}}  {middle:>12}"
        if case.against and side != case.against:
            low, ratio, high = quartiles(case.ratios(side))
            line += f"  {ratio:9.3g} x  ({low:.3g} to {high:.3g})"
        lines.append(line)
    return "\n".join(lines)
