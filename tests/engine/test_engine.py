"""What the engine does where its stages meet."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from feature_cache import BackboneError, FeatureCache, ServiceError, StoreError
from feature_cache.engine import Promise, cpu, request_frame
from feature_cache.key import Keys
from feature_cache.service import Service
from feature_cache.store import Space
from feature_cache.testing import FakeBackbone
from forked_processes import Scene, apart, finish, fork, start
from refused_threads import refuse_threads
from shared_folder import wait_until


def test_as_many_frames_are_read_at_once_as_there_are_cores(tmp_path, small, monkeypatch):
    frames, masks = small
    monkeypatch.setattr("feature_cache.engine.engine.count_cores", lambda: 4)
    together = threading.Barrier(4, timeout=30)

    class Together:
        """Frames whose first four are given when all are asked for at once."""

        def __len__(self) -> int:
            return len(frames)

        def __getitem__(self, t: int) -> np.ndarray:
            if threading.current_thread().name == "feature_cache read" and t < 4:
                together.wait()
            return frames[t]

    movie = FeatureCache(tmp_path).movie(Together(), masks, FakeBackbone())
    movie.compute(range(4))
    assert not together.broken
    assert movie.contains(range(4)).all()


def fail_beside_another(root: Path) -> None:
    """Have the disk fail just when another process computes the half of what is wanted."""
    scene, begun, look, contains = Scene(root, 4), fork.Event(), fork.Event(), Space.contains

    class Waiting(FakeBackbone):
        def embed(self, images: torch.Tensor) -> torch.Tensor:
            begun.set()
            assert look.wait(30)
            return super().embed(images)

    def compute_half() -> None:
        half = scene.movie(slice(2))
        half.cache.movie(half.frames, half.masks, Waiting(4, 8)).compute(range(2))

    def fail_once(space: Space, keys: Keys) -> Any:
        if threading.current_thread().name != "feature_cache claim":
            return contains(space, keys)
        Space.contains = contains
        look.set()
        raise StoreError("the disk is away")

    other = start(compute_half)
    assert begun.wait(30)
    movie = scene.movie()
    Space.contains = fail_once
    with pytest.raises(StoreError, match="the disk is away"):
        movie.compute(range(4))
    finish([other])
    assert movie.contains(range(4)).tolist() == [True, True, False, False]


def test_what_another_process_computes_does_not_fail_with_what_is_ours(tmp_path: Path) -> None:
    apart(fail_beside_another, tmp_path / "cache")


@pytest.mark.timeout(60)  # it hung
@pytest.mark.parametrize(("name", "started"), [("engine", 0), ("claim", 0), ("embed", 1)])
def test_a_thread_that_can_not_start_ends_the_run(tmp_path, small, monkeypatch, name, started):
    movie = FeatureCache(tmp_path).movie(*small, FakeBackbone())
    before = threading.enumerate()
    with monkeypatch.context() as patch:
        refuse_threads(patch, name, started)
        with pytest.raises(ServiceError, match=r"can't start new thread.*ulimit"):
            movie.compute(range(4))
    for thread in threading.enumerate():
        if thread not in before and not thread.name.endswith(("heartbeat", "notes")):
            thread.join(20)
            assert not thread.is_alive(), thread
    movie.compute(range(4))
    assert movie.contains(range(4)).all()


def test_poolings_that_all_fail_unexpectedly_end_the_run(tmp_path, small, monkeypatch):
    frames, masks = (np.concatenate([array] * 20) for array in small)
    tried = []

    def fail(*args: Any) -> Any:
        tried.append(args)
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(cpu.Plain, "make_records", fail)
    frames = frames + np.arange(len(frames), dtype=frames.dtype)[:, None, None]
    movie = FeatureCache(tmp_path).movie(frames, masks, FakeBackbone())
    with pytest.raises(BackboneError, match=r"fake failed for frame .*: a kernel failed") as told:
        movie.compute(range(len(frames)), batch_size=2)
    assert isinstance(told.value.__cause__, RuntimeError)
    assert 32 <= len(tried) < len(frames)


def test_who_waits_for_room_is_told_of_what_is_asked_for_twice(tmp_path, small):
    begun, go_on = threading.Event(), threading.Event()

    class Waiting(FakeBackbone):
        def embed(self, images: torch.Tensor) -> torch.Tensor:
            begun.set()
            assert go_on.wait(60)
            return super().embed(images)

    cache = FeatureCache(tmp_path)
    movie = cache.movie(*small, Waiting())
    model = cache.open_model(movie.backbone, movie.spec.backbone)
    with cache.open_engine(memory_bytes=100) as engine:
        promise = Promise()
        engine.submit([request_frame(model, 0, [(movie, promise)], 1)])
        assert begun.wait(30)
        assert engine.reserve(100, 1)
        waiting = threading.Thread(target=engine.reserve, args=(100, 50))
        waiting.start()
        again = request_frame(model, 0, [(movie, Promise())], 1)
        again.nbytes = 100
        engine.submit([again])
        waiting.join(20)
        told = not waiting.is_alive()
        go_on.set()
        waiting.join()
        promise.wait(30)
    assert told


def test_the_last_batch_holds_up_no_commit(tmp_path, small):
    """A process that is told to end may be killed before a long batch is through."""
    begun, go = threading.Event(), threading.Event()

    class Slow(FakeBackbone):
        calls = 0

        def embed(self, images: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls > 1:
                begun.set()
                assert go.wait(30)
            return super().embed(images)

    movie = FeatureCache(tmp_path).movie(*small, Slow())
    engine, model = (
        movie.cache.open_engine(),
        movie.cache.open_model(movie.backbone, movie.backbone.spec),
    )
    promises = [Promise() for _ in range(2)]
    engine.submit(request_frame(model, t, [(movie, one)], 1) for t, one in enumerate(promises))
    assert begun.wait(30)
    wait_until(lambda: any(one.done for one in promises), "the batch before")
    engine.stop()
    wait_until(lambda: movie.contains([0, 1]).any(), "the commit of what is computed")
    go.set()
    engine.close()


@pytest.fixture
def go(monkeypatch):
    """Let what is computed be committed, which takes longer than anybody waits."""
    told, write = threading.Event(), Space.write

    def write_late(*args: Any) -> list[str]:
        assert told.wait(30)
        return write(*args)

    monkeypatch.setattr(Space, "write", write_late)
    monkeypatch.setattr("feature_cache.engine.engine.CLOSING_SECONDS", 0.1)
    return told


def test_a_run_whose_last_commit_takes_too_long_says_so(tmp_path, small, go):
    movie = FeatureCache(tmp_path).movie(*small, FakeBackbone())
    with pytest.raises(StoreError, match="not taken what was computed last"):
        movie.compute(range(6))
    go.set()
    wait_until(lambda: movie.contains().all(), "the last commit")


def test_a_training_whose_last_commit_takes_too_long_says_so(tmp_path, small, go, caplog):
    movie = FeatureCache(tmp_path).movie(*small, FakeBackbone())
    service = Service(movie.cache)
    service.add_backbone(movie.backbone)
    service.submit(movie, {0: 0}, 1, ahead=False)[0].wait(30)
    service.close()
    assert "not taken what was computed last" in caplog.text
    go.set()
    wait_until(lambda: movie.contains([0]).all(), "the last commit")
