"""A benchmark in a process of its own."""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context

from .harness import Case, Options

PRELOADED = ["torch", "zarr", "scipy.sparse", "feature_cache.testing", "benchmarks.data"]


def run_one(name: str, options: Options) -> list[Case]:
    """Run one benchmark, with no memo, sockets or temporary files but in its folder."""
    tempfile.tempdir = str(options.folder)
    os.environ["FEATURE_CACHE_MEMO"] = "off"
    os.environ["XDG_RUNTIME_DIR"] = str(options.folder)
    cases: list[Case] = import_module(f"benchmarks.{name}").run(options)
    return cases


def run_apart(name: str, options: Options) -> list[Case]:
    """Run one benchmark in a fresh process that has torch loaded already."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        running: Future[list[Case]] = pool.submit(run_one, name, options)
        return running.result()
