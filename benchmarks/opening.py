"""Opening a space and looking records up, from a thousand records to ten million.

The packs are as large as `compact` makes them of windows of 50 regions (2,560 records); their rows
are tiny and their checksums made up, as none of them is read.
"""

from __future__ import annotations

import gc
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np

from feature_cache.key import Keys
from feature_cache.spec import SpaceSpec
from feature_cache.store import Space, Store
from feature_cache.store.array import write_array
from feature_cache.store.pack_contents import Contents, pack_name, write_contents
from feature_cache.store.writer import _write_metadata
from feature_cache.testing import FakeBackbone

from .harness import OURS, Case, Options, interleave, seconds_each, seconds_of

PACK_RECORDS = 2560
SIZES = (10**3, 10**4, 10**5, 10**6, 10**7)
QUICK_SIZES = (10**3, 10**4, 10**5)
BULK = 10_000


def run(options: Options) -> list[Case]:
    """Open, look up one by one and in bulk, and refresh, for each number of records."""
    cases = []
    for count in QUICK_SIZES if options.quick else SIZES:
        root = options.folder / f"opening-{count}"
        cases += measure(root, count, options)
        shutil.rmtree(root)
    return cases


def make_keys(count: int, seed: int) -> Keys:
    return np.random.default_rng(seed).integers(0, 256, (count, 16), np.uint8)


def write_packs(space: Space, keys: Keys) -> list[str]:
    """Commit packs with these keys, without fsync."""
    names = []
    for start in range(0, len(keys), PACK_RECORDS):
        part = keys[start : start + PACK_RECORDS]
        contents = Contents(
            part,
            np.arange(start, start + len(part), dtype=np.uint64),
            np.arange(len(part) + 1, dtype=np.int64),
            np.ones(len(part), np.int32),
        )
        names.append(pack_name(part, contents.checksums, 0))
        folder = space.packs_folder / names[-1]
        folder.mkdir()
        write_contents(folder, contents)
        write_array(folder / "features", np.ones((len(part), 1), np.float16))
        _write_metadata(folder, {"records": []}, "regions", 0)
    return names


def measure(root: Path, count: int, options: Options) -> list[Case]:
    spec = SpaceSpec(FakeBackbone(dim=1).spec, "mean_patches_exact", "float16")
    space = Store(root).space(spec)
    space.create()
    keys = make_keys(count, seed=0)
    write_packs(space, keys)
    title = f"{count:,} records"

    def reopen() -> Space:
        opened = Space(space.path, space.spec, "r")
        opened.refresh()
        return opened

    opening = {OURS: lambda: seconds_of(reopen)}
    opened, traced = trace(reopen)
    found = np.random.default_rng(1).permutation(keys)[:BULK]
    singles = [found[i : i + 1] for i in range(min(200, len(found)))]
    table = {key.tobytes(): (0, i) for i, key in enumerate(keys)}
    plain = [key.tobytes() for key in found]
    if not opened.contains(found).all():
        raise AssertionError("a record is not found")
    lookups = {
        "dict": lambda: seconds_each(table.__getitem__, plain, 0.01),
        OURS: lambda: seconds_each(opened.contains, singles, 0.02),
        f"{OURS}, in bulk": lambda: seconds_of(lambda: opened.contains(found)) / len(found),
    }
    rounds = options.rounds
    return [
        Case(f"{title}: opening", "", interleave(opening, rounds)),
        Case(f"{title}: memory", "", {OURS: [traced]}, "MB"),
        Case(f"{title}: a lookup", "dict", interleave(lookups, rounds)),
        Case(f"{title}: refresh", "", interleave(refreshes(space, opened), rounds)),
    ]


def trace(reopen: Callable[[], Space]) -> tuple[Space, float]:
    """Open; give the space, and what memory it holds in MB."""
    gc.collect()
    tracemalloc.start()
    opened = reopen()
    gc.collect()
    held = tracemalloc.get_traced_memory()[0] / 1e6
    tracemalloc.stop()
    return opened, held


def refreshes(space: Space, opened: Space) -> dict[str, Callable[[], float]]:
    seeds = iter(range(1, 1000))

    def with_new() -> float:
        write_packs(space, make_keys(PACK_RECORDS, next(seeds)))
        return seconds_of(opened.refresh)

    return {
        f"{OURS}, nothing new": lambda: seconds_of(opened.refresh),
        f"{OURS}, one pack more": with_new,
    }
