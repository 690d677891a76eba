"""Time and memory of one frame for each backbone: python -m benchmarks.backbones [NAME ...].

Random weights, one frame a batch, each backbone in a process of its own. Memory is what embedding
adds to the process at its peak, beyond Python, torch and (apart) the weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from feature_cache import list_backbones, load_backbone

from .harness import Case, Options

FAMILIES = {"timm/<model>": ("timm/convnext_atto", "timm/vit_tiny_patch16_224")}
QUICK = ("efficientnet-lite0",)
NO_WEIGHTS = ("debug/encoded_labels",)
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="default: the smallest of each family")
    parser.add_argument("--all", action="store_true", help="every size")
    parser.add_argument("--device", help="such as cuda:0; default: the best there is")
    parser.add_argument("--dtype", help="float32 (default), bfloat16 or float16")
    parser.add_argument("--shape", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of torch, on the CPU")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser


def choose_names(every: bool) -> list[str]:
    seen: set[tuple[str, int | None]] = set()
    names: list[str] = []
    for info in list_backbones():
        kind = (info.factory, info.stride)
        if info.installed and (every or kind not in seen):
            names.extend(FAMILIES.get(info.name, (info.name,)))
        seen.add(kind)
    return names


def forget_peak(device: torch.device) -> int:
    """Start counting the peak anew; give the bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    if CLEAR.exists():
        CLEAR.write_text("5")  # resets VmHWM, see proc(5)
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if not CLEAR.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    [line] = [x for x in STATUS.read_text().splitlines() if x.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure(name: str, options: argparse.Namespace) -> dict[str, object]:
    if options.threads:
        torch.set_num_threads(options.threads)
    weights = None if name in NO_WEIGHTS else "random:0"
    backbone = load_backbone(name, weights, options.device, options.dtype)
    frame = torch.rand(1, *options.shape, generator=torch.Generator().manual_seed(0))
    module = getattr(backbone, "module", None)
    tensors = [*module.state_dict().values()] if module is not None else []
    before = forget_peak(backbone.device)
    seconds = []
    for _ in range(options.repeats + 1):
        started = time.perf_counter()
        grid = backbone.embed(frame).cpu()
        seconds.append(time.perf_counter() - started)
    return {
        "name": name,
        "grid": "x".join(map(str, grid.shape[1:])),
        "weights_mb": sum(t.numel() * t.element_size() for t in tensors) / 1e6,
        "seconds": min(seconds[1:]),
        "added_mb": (peak_bytes(backbone.device) - before) / 1e6,
        "device": str(backbone.device),
    }


def measure_apart(name: str, arguments: Sequence[str]) -> dict[str, object] | str:
    command = [sys.executable, "-m", "benchmarks.backbones", "--one", *arguments, "--", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["failed"])[-1]
    return json.loads(done.stdout.splitlines()[-1])


def run(options: Options) -> list[Case]:
    """Time one frame of each family's smallest, the slow ones only where there is time."""
    names = list(QUICK) if options.quick else choose_names(False)
    rows = {
        name: measure_apart(name, ["--repeats", "1"] if options.quick else []) for name in names
    }
    print(*(f"{name} is left out: {row}" for name, row in rows.items() if isinstance(row, str)))
    seconds = {
        name: [float(str(row["seconds"]))] for name, row in rows.items() if isinstance(row, dict)
    }
    return [Case("a frame of 512 x 512", "", seconds)]


def main() -> None:
    options = make_parser().parse_args()
    if options.one:
        print(json.dumps(measure(options.names[-1], options)))
        return
    height, width = options.shape
    print(f"One frame of {height}x{width}, random weights, torch {torch.__version__}:\n")
    print("| backbone | grid | s a frame | weights, MB | memory added, MB | device |")
    print("|---|---|---:|---:|---:|---|")
    for name in options.names or choose_names(options.all):
        row = measure_apart(name, sys.argv[1:])
        if isinstance(row, str):
            print(f"| {name} | {row} | | | | |", flush=True)
            continue
        print(
            f"| {name} | {row['grid']} | {row['seconds']:.3f} | {row['weights_mb']:.0f} "
            f"| {row['added_mb']:.0f} | {row['device']} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
