"""A cache after months: what opening, asking for news and looking after many packs cost.

Each pack has one record, as a lazy training commits them. All but its keys and checksums are hard
links, so that 100,000 packs are made in a minute or two.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from google_crc32c import value as crc32c

from feature_cache import FeatureCache
from feature_cache.spec import SpaceSpec
from feature_cache.store import Space, Store
from feature_cache.store.array import write_array
from feature_cache.store.maintenance import last_uses, plan_gc
from feature_cache.store.pack_contents import Contents, join_parts, pack_name, write_contents
from feature_cache.store.writer import _write_metadata
from feature_cache.testing import FakeBackbone

from .harness import OURS, Case, Options, interleave, seconds_of

COUNT, QUICK_COUNT = 100_000, 10_000
LINKS = 30_000
"""A file may have this many names and more on every file system that has links."""


def run(options: Options) -> list[Case]:
    """Measure with a table of the packs and without, and beside what `du` and `ls` take."""
    count = QUICK_COUNT if options.quick else COUNT
    root = options.folder / "packs"
    space = Store(root).space(SpaceSpec(FakeBackbone(dim=1).spec, "mean_patches_exact", "float16"))
    space.create()
    make_packs(space, count)
    cases = measure(root, space, f"{count:,} packs", min(options.rounds, 3))
    shutil.rmtree(root)
    return cases


def make_packs(space: Space, count: int) -> None:
    """Commit packs of one record, without fsync."""
    keys = np.random.default_rng(0).integers(0, 256, (count, 1, 16), np.uint8)
    offsets, labels = np.array([0, 1], np.int64), np.ones(1, np.int32)
    for number, key in enumerate(keys):
        contents = Contents(key, np.array([number], np.uint64), offsets, labels)
        folder = space.packs_folder / pack_name(key, contents.checksums, 0)
        folder.mkdir()
        if number % LINKS == 0:
            first = folder
            write_contents(folder, contents)
            write_array(folder / "features", np.ones((1, 1), np.float16))
            _write_metadata(folder, {"records": [{}]}, "regions", 0)
            continue
        (folder / "index").mkdir()
        index = join_parts(contents).tobytes()
        (folder / "index" / "c.0").write_bytes(index + crc32c(index).to_bytes(4, "little"))
        shutil.copytree(first / "features", folder / "features", copy_function=os.link)
        for name in ("zarr.json", "index/zarr.json"):
            os.link(first / name, folder / name)


def measure(root: Path, space: Space, title: str, rounds: int) -> list[Case]:
    tables = root / "tables"

    def reopen() -> None:
        Space(space.path, space.spec, "r").refresh()

    def without(call: Callable[[], None]) -> float:
        tables.rename(root / ".tmp-tables")
        try:
            return seconds_of(call)
        finally:
            (root / ".tmp-tables").rename(tables)

    Store(root).spaces()  # writes the table
    store, packs = Store(root, "r"), str(space.packs_folder)
    [opened] = store.spaces()
    time.sleep(2.5)
    opened.refresh()  # from here on the folder is known not to have changed meanwhile
    cache = FeatureCache(root, "r")
    opening = {"reading each pack": lambda: without(reopen), OURS: lambda: seconds_of(reopen)}
    news = {
        "listing the folder": lambda: seconds_of(lambda: sorted(os.listdir(packs))),
        OURS: lambda: seconds_of(opened.refresh),
    }
    looking = {
        "du": lambda: seconds_of(lambda: subprocess.run(["du", "-s", packs], check=True)),
        f"{OURS}, stats": lambda: seconds_of(cache.stats),
        f"{OURS}, gc without --yes": lambda: seconds_of(lambda: plan_gc(store, max_bytes=1 << 30)),
        f"{OURS}, ls": lambda: seconds_of(
            lambda: [(s.disk_bytes(), last_uses(s)) for s in Store(root, "r").spaces()]
        ),
    }
    return [
        Case(f"{title}: opening", "reading each pack", interleave(opening, rounds)),
        Case(f"{title}: nothing new", "listing the folder", interleave(news, rounds)),
        Case(f"{title}: looking", "du", interleave(looking, rounds)),
    ]
