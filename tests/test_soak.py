"""A long cold training in a bad environment.

Its runtime folder vanishes, its workers are killed, servers come and go, second trainings start,
the dataset is pickled, stacks pass. A minute by default; a night is::

    FEATURE_CACHE_SOAK_SECONDS=36000 pytest tests/test_soak.py -s
"""

from __future__ import annotations

import json
import os
import pickle
import random
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

from crowd import apart, fork
from feature_cache import CachedFeatureDataset, FeatureCache
from feature_cache.service import close_all, list_servers, open_host, runtime_folder
from feature_cache.testing import FakeBackbone
from serving import Windows, damage, embeddings, make_loader, sockets, wait_until
from synthetic import make_movie

SECONDS = float(os.environ.get("FEATURE_CACHE_SOAK_SECONDS", "60"))
FRAMES, DEPTHS = 24, (0, 2, 3, 4, 5, 6)
MOST_GROWTH = 64 << 20
"""Bytes by which a process may grow after its first rounds."""
LONGEST_SECONDS = 120


def open_dataset(root: Path, depth: int, log: Path | None = None) -> CachedFeatureDataset:
    """Bind a movie, of frames or of stacks with so many slices, each of them another image."""
    images, masks, _ = make_movie(FRAMES * max(1, depth), width=160, seed=depth)
    if depth:
        images, masks = (a.reshape(FRAMES, depth, *a.shape[1:]) for a in (images, masks))
    backbone = FakeBackbone(dim=4, seconds_per_frame=0.002, log=log)
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
        root, log = folder / f"cache-{number}", folder / f"log-{number}"
        dataset = made = open_dataset(root, depth, log)
        if number % 3 == 2:  # the object that was made stays, as in the process of a training
            dataset = pickle.loads(pickle.dumps(made))
        (folder / "next").write_text(json.dumps([number, depth]))
        (folder / "next").replace(folder / "now")
        signal.alarm(LONGEST_SECONDS)
        killed = read_all(dataset, expected[depth], rng)
        signal.alarm(0)
        del dataset, made
        size = psutil.Process().memory_info().rss
        with open(folder / "rounds", "a") as file:
            file.write(json.dumps([number, killed, size]) + "\n")
        if time.monotonic() > deadline:
            close_all()
            return


def train_beside(folder: Path) -> None:
    """Train on what the other one trains on at the moment."""
    torch.set_num_threads(1)
    signal.alarm(LONGEST_SECONDS)
    number, depth = json.loads((folder / "now").read_text())
    dataset = open_dataset(folder / f"cache-{number}", depth, folder / f"log-{number}")
    read_all(dataset, torch.load(folder / "right")[depth], random.Random(0))
    close_all()


def serve(folder: Path, seconds: float) -> None:
    """Do as feature-cache serve does, for a while."""
    torch.set_num_threads(1)
    number, depth = json.loads((folder / "now").read_text())
    dataset = open_dataset(folder / f"cache-{number}", depth, folder / f"log-{number}")
    cache, backbone = dataset.tokens.movies[0].cache, dataset.tokens.movies[0].backbone
    open_host(cache, [backbone], cache, standalone=True)
    time.sleep(seconds)
    close_all()


def kill_worker(training: Any, rng: random.Random) -> None:
    with suppress(psutil.NoSuchProcess, IndexError):
        rng.choice(psutil.Process(training.pid).children()).kill()


def disturb(folder: Path, seed: int, seconds: float) -> dict[str, int]:
    """Run the training, and all that happens around it; give how often each thing happened."""
    rng, counts, others = random.Random(seed), Counter[str](), []
    training = fork.Process(target=train, args=(folder, seed, seconds))
    training.start()
    assert wait_until((folder / "now").exists)

    def start(work: Callable[..., None], *args: Any) -> None:
        others.append(fork.Process(target=work, args=(folder, *args)))
        others[-1].start()

    events: dict[str, Callable[[], None]] = {
        "runtime folder vanished": lambda: shutil.rmtree(runtime_folder(), ignore_errors=True),
        "worker killed": lambda: kill_worker(training, rng),
        "server": lambda: start(serve, rng.uniform(0.2, 2)),
        "second training": lambda: start(train_beside),
    }
    while training.is_alive():
        time.sleep(rng.uniform(0.2, 1.5))
        name = rng.choice(sorted(events))
        events[name]()
        counts[name] += 1
        while sum(one.is_alive() for one in others) > 2:
            time.sleep(0.1)
    for one in [training, *others]:
        one.join(LONGEST_SECONDS)
        assert one.exitcode == 0, (counts, one.exitcode)
    return dict(counts)


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

    rounds = [json.loads(line) for line in (tmp_path / "rounds").read_text().splitlines()]
    sizes = np.array([size for *_, size in rounds])
    print(f"{len(rounds)} rounds, {sum(k for _, k, _ in rounds)} ended by a killed worker")
    settled = sizes[: 2 * len(DEPTHS)].max()
    assert sizes.max() - settled < MOST_GROWTH, sizes
    for number, *_ in rounds:
        root = tmp_path / f"cache-{number}"
        counts = embeddings(tmp_path / f"log-{number}")
        assert set(counts.values()) == {1}, number
        depth = DEPTHS[number % len(DEPTHS)]
        assert len(counts) == FRAMES * max(1, depth)
        assert FeatureCache(root, "r").stats()["records"] == FRAMES
        assert not damage(root)
    list(list_servers())
    assert wait_until(lambda: not [name for name in sockets() if name.endswith(".json")])
    assert not [p for p in psutil.Process().children(recursive=True) if "worker" in p.name()]
