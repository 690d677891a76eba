"""A long cold training in a bad environment.

Its runtime folder vanishes, its workers are killed, ``feature-cache serve`` comes and goes, second
trainings start, the dataset is pickled, stacks pass; the memory of every process is watched. A
minute by default; a night is::

    FEATURE_CACHE_SOAK_SECONDS=36000 pytest tests/test_soak.py -s
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cold_trainings import Windows, damage, make_loader, sockets, start_serving, wait_until
from feature_cache import CachedFeatureDataset, FeatureCache, load_backbone
from feature_cache.service import close_all, list_servers, runtime_folder
from forked_processes import apart, fork
from processes import outcome
from synthetic import make_movie

SECONDS = float(os.environ.get("FEATURE_CACHE_SOAK_SECONDS", "60"))
FRAMES, DEPTHS = 24, (0, 2, 3, 4, 5, 6)
MOST_GROWTH = 64 << 20
"""Bytes by which a process may grow after its first rounds."""
LONGEST_SECONDS = 120


def open_dataset(root: Path, depth: int) -> CachedFeatureDataset:
    """Bind a movie, of frames or of stacks with so many slices, each of them another image."""
    images, masks, _ = make_movie(FRAMES * max(1, depth), width=160, seed=depth)
    if depth:
        images, masks = (a.reshape(FRAMES, depth, *a.shape[1:]) for a in (images, masks))
    backbone = load_backbone("debug/random")
    movie = FeatureCache(root).movie(images, masks, backbone, name=f"movie of depth {depth}")
    return CachedFeatureDataset(Windows(masks), [movie], progress=False)


def read_all(dataset: Any, expected: list[torch.Tensor], rng: random.Random) -> int:
    """Read all samples, each of which must be right; begin again where a worker was killed."""
    for killed in count():
        loader = make_loader(dataset, 2, "fork", shuffle=True, prefetch_factor=1)
        seen = set()
        try:
            for sample in loader:
                index = int(sample["timepoints"][0])
                assert torch.equal(sample["pretrained_feats"], expected[index]), index
                seen.add(index)
        except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as error:
            # torch's; the last ones where a worker was killed as it handed over a tensor
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            continue
        assert seen == set(range(len(expected)))
        return killed
    raise AssertionError


def train(folder: Path, seed: int, seconds: float) -> None:
    """Train on one cold cache after the other, in one process; note each round."""
    torch.set_num_threads(1)
    rng, expected = random.Random(seed), torch.load(folder / "right")
    deadline = time.monotonic() + seconds
    for number in count():
        depth = DEPTHS[number % len(DEPTHS)]
        if (folder / f"announced-{number}").exists():
            assert wait_until((folder / f"serving-{number}").exists)
        dataset = made = open_dataset(folder / f"cache-{number}", depth)
        if number % 3 == 2:  # the object that was made stays, as in the process of a training
            dataset = pickle.loads(pickle.dumps(made))
        (folder / "next").write_text(json.dumps([number, depth]))
        (folder / "next").replace(folder / "now")
        signal.alarm(LONGEST_SECONDS)
        killed = read_all(dataset, expected[depth], rng)
        signal.alarm(0)
        del dataset, made
        note(folder / "rounds", [number, killed])
        if time.monotonic() > deadline:
            close_all()
            return


def note(file: Path, line: Any) -> None:
    """Add a line, whoever else does."""
    with open(file, "a") as opened:
        opened.write(json.dumps(line) + "\n")


def notes(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def train_beside(folder: Path) -> None:
    """Train on what the other one trains on at the moment."""
    torch.set_num_threads(1)
    signal.alarm(LONGEST_SECONDS)
    number, depth = json.loads((folder / "now").read_text())
    dataset = open_dataset(folder / f"cache-{number}", depth)
    read_all(dataset, torch.load(folder / "right")[depth], random.Random(0))
    close_all()


def serve(folder: Path, ahead: int, seconds: float) -> None:
    """Run feature-cache serve for a cache that the training comes to, and for a while then."""

    def reached() -> int:
        return json.loads((folder / "now").read_text())[0]

    number = reached() + ahead
    (folder / f"announced-{number}").touch()
    serving = start_serving(folder / f"cache-{number}")
    watched = psutil.Process(serving.pid)
    before = watched.memory_info().rss
    (folder / f"serving-{number}").touch()
    wait_until(lambda: reached() >= number or (folder / "end").exists())
    time.sleep(seconds)
    after = watched.memory_info().rss
    serving.terminate()
    _, said = outcome(serving)
    assert serving.returncode == 128 + signal.SIGTERM, said
    computed = re.search(r"computed (\d+)", said)
    note(folder / "servers", [int(computed[1]) if computed else 0, before, after])


def kill_worker(training: Any, rng: random.Random) -> None:
    with suppress(psutil.NoSuchProcess, IndexError):
        rng.choice(psutil.Process(training.pid).children()).kill()


def disturb(folder: Path, seed: int, seconds: float) -> dict[str, int]:
    """Run the training, and all that happens around it; give how often each thing happened."""
    rng, counts, others, beside = random.Random(seed), Counter[str](), [], []
    training = fork.Process(target=train, args=(folder, seed, seconds))
    training.start()
    assert wait_until((folder / "now").exists)

    def start(work: Callable[..., None], *args: Any) -> Any:
        others.append(fork.Process(target=work, args=(folder, *args)))
        others[-1].start()
        return others[-1]

    events: dict[str, Callable[[], None]] = {
        "runtime folder vanished": lambda: shutil.rmtree(runtime_folder(), ignore_errors=True),
        "worker killed": lambda: kill_worker(training, rng),
        "server": lambda: start(serve, rng.randint(1, 3), rng.uniform(0.1, 1)),
        "second training": lambda: beside.append(start(train_beside)),
    }
    coming: list[str] = []
    while training.is_alive():
        ends = time.monotonic() + rng.uniform(0.2, 1.5)
        while time.monotonic() < ends:
            time.sleep(0.1)
            watch(training, folder / "sizes")
            for one in beside:
                watch(one, folder / "sizes beside")
        coming = coming or rng.sample(sorted(events), len(events))
        name = coming.pop()
        events[name]()
        counts[name] += 1
        while sum(one.is_alive() for one in others) > 3:
            time.sleep(0.1)
            if not training.is_alive():
                (folder / "end").touch()
    (folder / "end").touch()
    for one in [training, *others]:
        one.join(LONGEST_SECONDS)
        assert one.exitcode == 0, (counts, one.exitcode)
    return dict(counts)


def watch(training: Any, file: Path) -> None:
    """Note the resident size of a training, and that of its largest worker."""
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(training.pid)
        workers = [one.memory_info().rss for one in process.children(recursive=True)]
        note(file, [process.memory_info().rss, max(workers, default=0)])


@pytest.mark.slow
@pytest.mark.timeout(SECONDS + 600)
def test_a_training_goes_on_whatever_happens_around_it(tmp_path):
    expected = {}
    for depth in DEPTHS:
        warmed = open_dataset(tmp_path / "warm", depth)
        warmed.warm()
        expected[depth] = [warmed[i]["pretrained_feats"] for i in range(len(warmed))]
    torch.save(expected, tmp_path / "right")
    del warmed
    close_all()
    seed = random.randrange(1 << 32)
    print(f"seed {seed}", apart(disturb, tmp_path, seed, SECONDS))

    rounds, servers = notes(tmp_path / "rounds"), notes(tmp_path / "servers")
    print(f"{len(rounds)} rounds, {sum(k for _, k in rounds)} ended by a killed worker")
    print("servers computed", [computed for computed, *_ in servers])
    assert any(computed for computed, *_ in servers)
    sizes = np.array(notes(tmp_path / "sizes"))
    settled, most = sizes[: len(sizes) // 3].max(axis=0), sizes.max(axis=0)
    beside = np.array(notes(tmp_path / "sizes beside")).max(axis=0)
    servers_grown = (after - before for _, before, after in servers)
    grown = [*(most - settled), *(beside - settled), *servers_grown]
    print("MiB grown:", [int(size) >> 20 for size in grown])
    assert max(grown) < MOST_GROWTH, grown
    for number, _ in rounds:
        cache = FeatureCache(tmp_path / f"cache-{number}", "r")
        stats = cache.stats(lifetime=True)
        assert (stats["records"], stats["computed"]) == (FRAMES, FRAMES), number
        assert not damage(cache.store.root)
    list(list_servers())
    assert wait_until(lambda: not [name for name in sockets() if name.endswith(".json")])
    assert not [p for p in psutil.Process().children(recursive=True) if "worker" in p.name()]
