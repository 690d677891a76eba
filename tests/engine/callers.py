"""Everyone who has features computed, behind one interface: `Work` in, `Outcome` out.

Each runs in a process of its own, forked from one that has all modules loaded, no threads, and
nothing of ours begun. `start` starts it; what it says on stderr, and what came of it, is in files.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import distributed  # noqa: F401 - loaded once, here, instead of in every forked process
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from feature_cache import (
    Augmentations,
    BackboneError,
    CachedFeatureDataset,
    FeatureCache,
    FeatureCacheError,
    Movie,
)
from feature_cache.cli import main as command_line
from feature_cache.service import close_all, list_servers
from feature_cache.testing import FakeBackbone
from feature_cache.trackastra import CachedDataModule
from feature_cache.warm import plan_warm, run_warm
from feature_cache.warm.cluster import open_client, run_on_cluster
from feature_cache.warm.worker import Recipe
from forked_processes import fork_server, restore, start_fork_server
from shared_folder import members, wait_until

PLUGIN = "contract"
"""By which name other processes load the backbone; its traits come as weights."""


class Moody(FakeBackbone):
    """A `FakeBackbone` that does something bad with frames of two values.

    Parameters
    ----------
    mood : str
        ``"error"``, ``"crash"``: raises ours, raises another; ``"nan"``: gives NaN for it;
        ``"shape"``: gives a batch with it in another shape. Else nothing.
    watch : str
        A folder whose files are counted at every call, in a file beside the log.
    """

    def __init__(
        self,
        dim: int = 8,
        seconds: float = 0.0,
        log: str = "",
        mood: str = "",
        watch: str = "",
        context: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(dim, 8, seconds, log, context=context)
        self.mood, self.watch = mood, watch

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        bad = ((frames == 0) | (frames == 1)).flatten(1).all(1)
        if self.watch:
            with open(f"{self.log}.claims", "a") as file, suppress(FileNotFoundError):
                file.write(f"{len(os.listdir(self.watch))}\n")
        if bad.any() and self.mood == "error":
            raise BackboneError("the model can't bear a frame of two values")
        if bad.any() and self.mood == "crash":
            raise RuntimeError("the model stumbles over a frame of two values")
        grids = super().embed(frames)
        if bad.any() and self.mood == "shape":
            return grids[..., :-1]
        if self.mood == "nan":
            grids[bad] = torch.nan
        return grids


def load(name: str, weights: str, device: object, dtype: object) -> Moody:
    """Make the backbone of the entry point."""
    return Moody(**json.loads(weights))


@dataclass(frozen=True)
class Work:
    """What to have computed: movies x copies x poolings."""

    cache: Path
    movies: tuple[Path, ...]
    copies: int = 0
    poolings: tuple[str | None, ...] = ("mean_patches_exact",)
    dim: int = 8
    seconds: float = 0.0
    mood: str = ""
    batch_size: int = 4
    mode: Any = "a"
    keep_watch: bool = False
    scheduler: str = ""
    ndim: int = 2
    context: tuple[int, int] = (0, 0)

    @property
    def log(self) -> Path:
        """A line for each frame embedded, by whatever process."""
        return self.cache.with_suffix(".embedded")

    @property
    def traits(self) -> dict[str, Any]:
        watch = str(self.cache / "claims") if self.keep_watch else ""
        named = {"dim": self.dim, "seconds": self.seconds, "mood": self.mood}
        named["context"] = self.context
        return {**named, "log": str(self.log), "watch": watch}

    @property
    def augmentations(self) -> Augmentations:
        return Augmentations("default", copies=self.copies, seed=0)

    def backbone(self) -> Moody:
        return Moody(**self.traits)

    def open(self) -> FeatureCache:
        return FeatureCache(self.cache, self.mode)

    def embedded(self) -> Counter[str]:
        """Count how often each frame was embedded."""
        return Counter(self.log.read_text().split() if self.log.exists() else [])

    def claims(self) -> list[str]:
        folder = self.cache / "claims"
        return sorted(os.listdir(folder)) if folder.exists() else []

    def claims_seen(self) -> list[int]:
        """Give how many claims there were, at every call of the backbone."""
        return [int(line) for line in Path(f"{self.log}.claims").read_text().split()]


# Callers: each does all of the work, and raises what it raises


def call_get_or_compute(work: Work) -> None:
    cache, backbone = work.open(), work.backbone()
    for path in work.movies:
        for draw in work.augmentations.draws():
            for pooling in work.poolings:
                cache.get_or_compute(
                    path, None, backbone, pooling=pooling, draw=draw, batch_size=work.batch_size
                )


def call_compute(work: Work) -> None:
    cache, backbone = work.open(), work.backbone()
    for path in work.movies:
        for pooling in work.poolings:
            movie = cache.movie(path, None, backbone, pooling=pooling)
            for draw in work.augmentations.draws():
                movie.with_draw(draw).compute(range(len(movie)), batch_size=work.batch_size)


def make_dataset(work: Work, pooling: str | None, backbone: Any) -> CachedFeatureDataset:
    cache = work.open()
    movies = [cache.movie(path, None, backbone, pooling=pooling) for path in work.movies]
    return CachedFeatureDataset(
        Frames(work, None), movies, movie_of=int, batch_size=work.batch_size,
        augmentations=work.augmentations if work.copies else None,
    )  # fmt: skip


def call_dataset_warm(work: Work) -> None:
    for pooling in work.poolings:
        make_dataset(work, pooling, work.backbone()).warm()


def call_datamodule(work: Work) -> None:
    warnings.simplefilter("ignore")  # of upstream
    for pooling in work.poolings:
        CachedDataModule(
            list(work.movies), [work.movies[0]], None, 0, False,
            {"window_size": 2, "ndim": work.ndim}, {"batch_size": 1, "n_pool": 1, "num_samples": 1},
            {"batch_size": 1}, cache=work.open(), backbone=work.backbone(), pooling=pooling,
            augmentations=work.augmentations, batch_size=work.batch_size, warm=True,
        ).prepare_data()  # fmt: skip


def call_run_warm(work: Work) -> list[str]:
    backbone = work.backbone()
    plan = plan_warm(
        work.open(), work.movies, backbone, pooling=work.poolings, augmentations=work.augmentations
    )
    report = run_warm(plan, batch_size=work.batch_size)
    return [f"{failure.what}: {failure.reason}" for failure in report.failures]


def call_dask(work: Work) -> list[str]:
    recipe = Recipe(PLUGIN, json.dumps(work.traits))
    plan = plan_warm(
        work.open(), work.movies, recipe.load(), pooling=work.poolings,
        augmentations=work.augmentations,
    )  # fmt: skip
    with open_client(work.scheduler, None) as client:
        report = run_on_cluster(plan, recipe, client, batch_size=work.batch_size)
    return [f"{failure.what}: {failure.reason}" for failure in report.failures]


def call_command(work: Work) -> list[str]:
    report = work.cache.with_suffix(".json")
    report.unlink(missing_ok=True)
    poolings = [word for name in work.poolings for word in ("--pooling", name or "none")]
    try:
        say_command(
            "warm", *work.movies, "--cache", work.cache, "--backbone", PLUGIN,
            "--weights", json.dumps(work.traits), "--copies", work.copies, *poolings,
            "--batch-size", work.batch_size, "--report", report,
        )  # fmt: skip
    except SystemExit:
        if not report.exists():
            raise
    errors = json.loads(report.read_text())["errors"]
    return [f"{error['what']}: {error['reason']}" for error in errors]


def say_command(*words: object) -> None:
    """Run the command line in this process."""
    sys.argv = ["feature-cache", *map(str, words)]
    command_line()


class Frames(Dataset[str]):
    """Every frame of every movie in every copy: what it costs to have its features, else ""."""

    def __init__(self, work: Work, data: CachedFeatureDataset | None) -> None:
        self.data, self.movies = data, [Movie.open(path) for path in work.movies]
        self.items = [
            (number, copy, t)
            for number, movie in enumerate(self.movies)
            for copy in range(1 + work.copies)
            for t in range(len(movie))
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> str:
        number, copy, t = self.items[index]
        masks = self.movies[number].masks
        assert masks is not None
        assert self.data is not None
        labels = torch.from_numpy(np.setdiff1d(masks[t], 0).astype(np.int64))
        try:
            self.data.tokens(number, torch.full_like(labels, t), labels, copy)
        except FeatureCacheError as error:
            return f"{type(error).__name__}: {error}"
        return ""


def miss(work: Work, backbone: Any, workers: int) -> list[str]:
    """Ask for one frame after the other, as trainings do."""
    errors: list[str] = []
    for pooling in work.poolings:
        frames = Frames(work, make_dataset(work, pooling, backbone))
        loader = DataLoader(
            frames, batch_size=None, num_workers=workers,
            multiprocessing_context="fork" if workers else None,
        )  # fmt: skip
        errors += filter(None, loader)
        del frames, loader
    close_all()
    return errors


def call_main_misses(work: Work) -> list[str]:
    return miss(work, work.backbone(), 0)


def call_loader(work: Work) -> list[str]:
    return miss(work, work.backbone(), 2)


def call_serve(work: Work) -> list[str]:
    """Start feature-cache serve beside, and miss what it then computes."""
    server = multiprocessing.get_context("fork").Process(target=serve, args=(work,))
    server.start()
    wait_until(lambda: [a for a in list_servers() if a.pid == server.pid], "the server")
    try:
        own = replace(work, cache=work.cache.with_name("not-here")).traits
        return miss(work, Moody(**own), 0)
    finally:
        assert server.pid is not None
        os.kill(server.pid, signal.SIGTERM)
        server.join(30)
        assert not work.cache.with_name("not-here.embedded").exists(), "the client computed"


def serve(work: Work) -> None:
    weights = json.dumps(work.traits)
    say_command("serve", "--cache", work.cache, "--backbone", PLUGIN, "--weights", weights)


@dataclass(frozen=True)
class Caller:
    """A way to have features computed.

    Attributes
    ----------
    run : callable
        Does the work; raises, or gives what it says of each frame that failed.
    lazy : bool
        Whether a training asks for one sample after the other: each has its own error.
    raises : bool
        Whether it ends in an error where a frame fails; else it says so in its report.
    is_command : bool
        Whether it opens the cache itself, and ends by an exit status.
    """

    name: str
    run: Callable[[Work], Sequence[str] | None]
    lazy: bool = False
    raises: bool = False
    is_command: bool = False

    def __str__(self) -> str:
        return self.name


GET_OR_COMPUTE = Caller("get_or_compute", call_get_or_compute, raises=True)
COMPUTE = Caller("MovieFeatures.compute", call_compute, raises=True)
DATASET = Caller("dataset.warm", call_dataset_warm, raises=True)
DATAMODULE = Caller("CachedDataModule", call_datamodule, raises=True)
RUN_WARM = Caller("run_warm", call_run_warm)
COMMAND = Caller("feature-cache warm", call_command, is_command=True)
DASK = Caller("a Dask worker", call_dask)
MAIN = Caller("misses here", call_main_misses, lazy=True)
LOADER = Caller("misses of workers", call_loader, lazy=True)
SERVE = Caller("feature-cache serve", call_serve, lazy=True, is_command=True)
CALLERS = (
    GET_OR_COMPUTE, COMPUTE, DATASET, DATAMODULE, RUN_WARM, COMMAND, DASK, MAIN, LOADER, SERVE,
)  # fmt: skip


# Processes


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes
    ----------
    errors : list of str
        What it says of frames that failed, or the error that it raised, beginning with its type.
    raised : bool
    peak_bytes : int
        The most memory that the process had in all its works, or one that it started.
    """

    errors: list[str]
    raised: bool = False
    peak_bytes: int = 0


class Started:
    """A caller at work in a process of its own, which leads a process group.

    Parameters
    ----------
    caller : Caller
    works : sequence of Work
        Done one after the other.
    barrier : multiprocessing.Barrier, optional
        Waited for at the beginning.
    """

    def __init__(self, caller: Caller, works: Sequence[Work], barrier: Any = None) -> None:
        stem = f"{works[0].cache.name}.{caller.name.replace(' ', '-')}.{time.monotonic_ns()}"
        self.file = works[0].cache.with_name(f"{stem}.outcome")
        self.words = works[0].cache.with_name(f"{stem}.stderr")
        start_fork_server()
        self.process = fork_server.Process(
            target=work_off,
            args=(dict(os.environ), caller.name, works, self.file, self.words, barrier),
        )
        self.process.start()

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def said(self) -> str:
        return self.words.read_text() if self.words.exists() else ""

    def ends(self, seconds: float = 60.0) -> int | None:
        """Wait for the end; give the exit code, None where it is still there."""
        self.process.join(seconds)
        return self.process.exitcode

    def finish(self, seconds: float = 60.0) -> list[Outcome]:
        """Wait for the end; give what came of each work."""
        with self:
            code = self.ends(seconds)
            assert self.file.exists(), f"exit code {code}: {self.said}"
            return [Outcome(**one) for one in json.loads(self.file.read_text())]

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, or, as a terminal does with Ctrl-C, to all its group."""
        assert self.process.pid is not None
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it, and all that it started."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        pid = self.process.pid
        wait_until(lambda: not members(pid), "the last process to end")


def work_off(
    environment: dict[str, str],
    name: str,
    works: Sequence[Work],
    file: Path,
    words: Path,
    barrier: Any,
) -> None:
    """Be a process of its own, and do the work as a caller does."""
    restore(environment)
    os.setsid()
    descriptor = os.open(words, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    torch.set_num_threads(1)
    [caller] = [one for one in CALLERS if one.name == name]
    if barrier is not None:
        barrier.wait()
    outcomes = [{**asdict(attempt(caller, work)), "peak_bytes": peak_bytes()} for work in works]
    temporary = file.with_suffix(".part")
    temporary.write_text(json.dumps(outcomes))
    temporary.rename(file)


def attempt(caller: Caller, work: Work) -> Outcome:
    """Run a caller; an error that it raises is an outcome too."""
    try:
        return Outcome(list(caller.run(work) or ()))
    except Exception as error:  # noqa: BLE001 - tests look at what it is
        traceback.print_exc()
        return Outcome([f"{type(error).__name__}: {error}"], raised=True)
    except SystemExit as end:
        if end.code != 2:
            raise
        sys.stderr.flush()
        return Outcome(read_errors(), raised=True)


def peak_bytes() -> int:
    who = resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN
    return 1024 * max(resource.getrusage(one).ru_maxrss for one in who)


def read_errors() -> list[str]:
    """Give the errors that the command line said, on this process's stderr."""
    said = Path(f"/proc/{os.getpid()}/fd/2").read_text()
    return [line.partition(": ")[2] for line in said.splitlines() if line.startswith("error: ")]


def run(caller: Caller, *works: Work) -> list[Outcome]:
    """Do works one after the other in one process; give what came of each."""
    return Started(caller, works).finish()
