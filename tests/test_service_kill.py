"""Trainings, their workers and servers, killed at random moments.

Each process is forked for it from one that has no threads, so that a round takes a second or two. A
longer run::

    FEATURE_CACHE_ROUNDS=1000 pytest tests/test_service_kill.py
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cold_trainings import (
    FRAMES,
    damage,
    expected_of,
    make_dataset,
    make_loader,
    sockets,
    wait_until,
)
from feature_cache import FeatureCache, MissingRecordError, ServiceError
from feature_cache.service import list_servers, open_host
from feature_cache.testing import FakeBackbone
from forked_processes import apart, fork

ROUNDS = int(os.environ.get("FEATURE_CACHE_ROUNDS", "50"))
LONGEST_SECONDS = 30
CLEAR_ERROR = 7
SECONDS_PER_FRAME = 0.004


def train(root: Path, right: Path, seed: int) -> None:
    """Train an epoch, checking each sample; say by the exit code how it ended."""
    signal.alarm(LONGEST_SECONDS)  # the watchdog: a hang is another exit code
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    expected = torch.load(right)
    try:
        dataset = make_dataset(root, backbone())
        loader = make_loader(
            dataset, 2, "fork", shuffle=True, prefetch_factor=1, worker_init_fn=leave_if_orphaned
        )
        seen = set()
        for sample in loader:
            index = int(sample["timepoints"][0])
            assert torch.equal(sample["pretrained_feats"], expected[index]), index
            seen.add(index)
        assert seen == set(range(len(expected)))
    except (MissingRecordError, ServiceError) as error:
        raise SystemExit(CLEAR_ERROR) from error
    except (EOFError, ConnectionError, FileNotFoundError) as error:
        # torch's, of a worker that was killed while it handed over a tensor
        raise SystemExit(CLEAR_ERROR) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise SystemExit(CLEAR_ERROR) from error


def backbone() -> FakeBackbone:
    return FakeBackbone(dim=4, seconds_per_frame=SECONDS_PER_FRAME)


def serve(root: Path) -> None:
    """Do as feature-cache serve does, until the end of the round."""
    signal.alarm(LONGEST_SECONDS)
    torch.set_num_threads(1)
    cache = FeatureCache(root)
    host = open_host(cache, [backbone()], cache, standalone=True)
    while os.getppid() != 1 and not host.service.engine.ended:
        time.sleep(0.05)


def choose_victim(rng: random.Random, trainings: list[Any], server: Any) -> tuple[str, int] | None:
    """Choose whom to kill: a training (which is a server, and a rank), a worker, a server."""
    kind = rng.choice(["training", "worker", "server"] if server else ["training", "worker"])
    one = rng.choice(trainings)
    if kind == "server":
        return kind, server.pid
    if kind == "training":
        return kind, one.pid
    try:
        workers = psutil.Process(one.pid).children()
    except psutil.NoSuchProcess:
        return None
    return (kind, rng.choice(workers).pid) if workers else None


def play(root: Path, right: Path, rng: random.Random) -> tuple[str, list[int]]:
    """Let two trainings run, kill one process; give what was killed, and how the others ended."""
    server = fork.Process(target=serve, args=(root,)) if rng.random() < 0.4 else None
    if server:
        server.start()
    trainings = [fork.Process(target=train, args=(root, right, rng.random())) for _ in range(2)]
    for training in trainings:
        training.start()
    time.sleep(rng.uniform(0.05, 0.6))
    family = [p for one in trainings for p in descendants(one.pid)]
    victim = choose_victim(rng, trainings, server)
    if victim is not None:
        try:
            os.kill(victim[1], signal.SIGKILL)
        except ProcessLookupError:
            victim = None
    for training in trainings:
        training.join(LONGEST_SECONDS + 5)
    if server:
        server.terminate()
        server.join(LONGEST_SECONDS)
    assert wait_until(lambda: not any(map(runs, family)), 20), "workers outlive their training"
    allowed = {0, CLEAR_ERROR}
    codes = [training.exitcode for training in trainings]
    for training, code in zip(trainings, codes, strict=True):
        killed = victim is not None and victim[1] == training.pid
        assert code in allowed or (killed and code == -signal.SIGKILL), (victim, codes)
    return victim[0] if victim else "nobody", codes


def descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def leave_if_orphaned(_: int) -> None:
    """End where the training was killed before torch's watchdog looks for it with getppid()."""
    if os.getppid() == 1:
        os._exit(1)


def play_many(folder: Path, rounds: int, seed: int) -> dict[str, int]:
    rng, counts = random.Random(seed), Counter[str]()
    right = folder / "right"
    for number in range(rounds):
        root = folder / f"cache-{number // 3}"  # half-filled ones too
        kind, codes = play(root, right, rng)
        counts[f"{kind} killed"] += 1
        counts.update(f"{kind} killed: a training ended with {code}" for code in codes)
    return dict(counts)


@pytest.mark.slow
def test_nothing_hangs_and_nothing_is_lost(tmp_path):
    torch.save(expected_of(tmp_path / "warm"), tmp_path / "right")
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    print(apart(play_many, tmp_path, ROUNDS, seed))
    for root in sorted(tmp_path.glob("cache-*")):
        assert not damage(root)
    list(list_servers())
    assert wait_until(lambda: not [name for name in sockets() if name.endswith(".json")])
    dataset = make_dataset(root, backbone())
    _ = [dataset[i] for i in range(len(dataset))]
    assert dataset.warm() == 0
    assert len(dataset.tokens.movies[0]) == FRAMES
