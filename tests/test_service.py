"""Cold caches that fill while they are trained on: every sample right, each record once."""

from __future__ import annotations

import faulthandler
import io
import itertools
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset
from tqdm import tqdm
from typer.testing import CliRunner

from cold_trainings import (
    FRAMES,
    WINDOW,
    Windows,
    damage,
    embeddings,
    expected_of,
    make_dataset,
    make_loader,
    nothing_left,
    sockets,
    start_serving,
    wait_until,
)
from feature_cache import (
    Augmentations,
    BackboneError,
    CachedFeatureDataset,
    FeatureCache,
    FrameError,
    MissingRecordError,
    ServiceError,
)
from feature_cache.cache import grid_spec
from feature_cache.cli import app, serve
from feature_cache.engine import engine
from feature_cache.service import Misses, StandIn, close_all, list_servers, misses, open_host
from feature_cache.service.client import Client
from feature_cache.service.filling import Progress
from feature_cache.service.misses import plan_block
from feature_cache.testing import FakeBackbone
from forked_processes import apart
from processes import outcome
from refused_threads import refuse_threads
from synthetic import make_movie

# Tests run on machines of two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 4 worker:UserWarning")
HERE = Path(__file__).parent


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    # after an error in a worker, torch waits as long for it to end
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    with nothing_left():
        yield


@pytest.fixture
def log(tmp_path):
    return tmp_path / "log"


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    return expected_of(tmp_path_factory.mktemp("warm"))


def check(samples, expected):
    for sample, features in zip(samples, expected, strict=True):
        assert torch.equal(sample["pretrained_feats"], features)


# A cold start


@pytest.mark.parametrize(
    ("workers", "method", "persistent"),
    [
        (0, None, False),
        pytest.param(1, "fork", False, marks=pytest.mark.slow),
        (2, "fork", False),
        (2, "fork", True),
        pytest.param(4, "fork", False, marks=pytest.mark.slow),
        (1, "spawn", True),
        pytest.param(2, "spawn", False, marks=pytest.mark.slow),
        pytest.param(4, "spawn", True, marks=pytest.mark.slow),
        pytest.param(2, "forkserver", True, marks=pytest.mark.slow),
    ],
)
def test_a_cold_start_computes_each_record_once(
    tmp_path, log, expected, workers, method, persistent
):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log))
    loader = make_loader(dataset, workers, method, persistent_workers=persistent)
    check(loader, expected)
    counts = embeddings(log)
    assert set(counts.values()) == {1}
    assert len(counts) == FRAMES
    check(loader, expected)
    assert embeddings(log) == counts
    root = dataset.tokens.movies[0].cache.store.root
    del dataset, loader
    close_all()
    assert FeatureCache(root, "r").stats()["records"] == FRAMES
    assert not damage(root)


@pytest.mark.parametrize("workers", [0, 2])
def test_augmented_copies_in_any_order(tmp_path, log, workers):
    augmentations = Augmentations("flips", copies=5, seed=3)
    options = {"augmentations": augmentations, "frames_of": lambda i: range(i, i + 4)}
    cold = make_dataset(tmp_path / "cold", FakeBackbone(dim=4, log=log), **options)
    warm = make_dataset(tmp_path / "warm", **options)
    warm.warm()
    loader = make_loader(cold, workers, "fork", shuffle=True)
    for epoch in range(2):
        cold.set_epoch(epoch)
        warm.set_epoch(epoch)
        cold.prefetch(range(3))
        seen = {}
        for sample in loader:
            first = int(sample["timepoints"][0])
            seen[first] = sample
        assert sorted(seen) == list(range(len(warm)))
        for index, sample in seen.items():
            expected = warm[index]
            assert sample["copy"] == expected["copy"]
            assert torch.equal(sample["pretrained_feats"], expected["pretrained_feats"])
    assert set(embeddings(log).values()) == {1}


def test_two_datasets_and_two_backbones_on_one_server(tmp_path, log, expected):
    cache = FeatureCache(tmp_path / "cache")
    images, masks, _ = make_movie(FRAMES)
    other = make_movie(FRAMES, seed=1)
    one, two = (FakeBackbone(dim=4, log=log, seed=seed) for seed in (0, 1))
    parts = [
        CachedFeatureDataset(Windows(m), [cache.movie(f, m, b, dtype=dtype)])
        for f, m, b, dtype in [
            (images, masks, one, "float16"),
            (other[0], other[1], one, "float32"),
            (images, masks, two, "float16"),
        ]
    ]
    assert len([one for one in list_servers() if one.pid == os.getpid()]) == 1
    samples = list(make_loader(ConcatDataset(parts), 2, "fork"))
    check(samples[: len(expected)], expected)
    # Digests in the log are of frames, which both backbones embed.
    assert sorted(embeddings(log).values()) == [1] * FRAMES + [2] * FRAMES


def test_what_is_not_committed_yet_is_answered_from_memory(tmp_path, log, monkeypatch):
    monkeypatch.setattr(engine, "IDLE_SECONDS", 1000.0)
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log))
    for _ in range(2):
        _ = [dataset[i] for i in range(len(dataset))]
    assert dataset.tokens.movies[0].cache.stats()["records"] == 0
    assert set(embeddings(log).values()) == {1}


def test_records_are_committed_after_a_few_seconds(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "IDLE_SECONDS", 0.1)
    dataset = make_dataset(tmp_path / "cache")
    _ = dataset[0]
    assert wait_until(lambda: dataset.tokens.movies[0].contains(range(4)).all())


def test_records_that_others_wait_for_are_committed_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "IDLE_SECONDS", 1000.0)
    dataset = make_dataset(tmp_path / "cache")
    [movie] = dataset.tokens.movies
    _ = dataset[0]
    assert not movie.contains(range(4)).any()
    again = FeatureCache(tmp_path / "cache").movie(movie.frames, movie.masks, movie.backbone)
    assert again.compute([2]) == 0
    assert movie.contains(range(4)).all()


def test_a_miss_computes_a_block(tmp_path, log):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log), batch_size=6)
    _ = dataset[2]
    assert wait_until(lambda: len(embeddings(log)) == 6)
    time.sleep(0.1)
    assert len(embeddings(log)) == 6  # the access is not sequential (yet)


def test_sequential_access_reads_one_block_ahead(tmp_path, log):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log), batch_size=5)
    _ = [dataset[i] for i in range(3)]  # frames 0 to 5: a second block begins
    assert wait_until(lambda: len(embeddings(log)) == 15)


def test_prefetch_computes_in_the_background(tmp_path, log):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log))
    dataset.prefetch([5, 12])
    assert wait_until(lambda: len(embeddings(log)) == 8)
    _ = dataset[12]
    assert set(embeddings(log).values()) == {1}


def test_blocks_go_on_to_what_is_there(tmp_path):
    [movie] = make_dataset(tmp_path / "cache").tokens.movies
    movie.compute([9])
    assert plan_block(movie, [4, 5], 8) == [4, 5, 6, 7, 8]
    assert plan_block(movie, [22, 23], 8) == [22, 23]


@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_missing_is_pooled_from_stored_grids(tmp_path, log, expected, workers):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log))
    [movie] = dataset.tokens.movies
    movie.in_space(grid_spec(movie.spec.backbone)).warm()
    assert len(embeddings(log)) == FRAMES
    check(make_loader(dataset, workers, "fork"), expected)
    assert embeddings(log).total() == FRAMES


def test_the_dataset_is_small_and_has_no_weights_when_it_is_pickled(tmp_path):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4096))
    copied = pickle.loads(pickle.dumps(dataset.tokens))
    assert isinstance(copied.movies[0].backbone, StandIn)
    assert len(pickle.dumps(copied.movies[0].backbone)) < 2000
    with pytest.raises(MissingRecordError, match="without its weights"):
        copied.movies[0].backbone.embed(torch.zeros(1, 8, 8))
    sample = dataset.dataset[0]
    features = copied(0, sample["timepoints"], sample["labels"])  # computed where it was made
    assert torch.equal(features, dataset[0]["pretrained_feats"])


# Several processes


def rank_of(rank, folder, log, port):
    """Train as one of two ranks; each has its own workers and its own engine."""
    import torch.distributed as dist
    from torch.utils.data import DataLoader, DistributedSampler

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    dataset = make_dataset(folder / "cache", FakeBackbone(dim=4, log=log, seconds_per_frame=0.01))
    sampler = DistributedSampler(dataset, 2, rank, shuffle=True)
    loader = DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=1)
    seen = {}
    for _ in range(2):
        for sample in loader:
            seen[int(sample["timepoints"][0])] = sample["pretrained_feats"]
            dist.barrier()
    torch.save(seen, folder / f"seen-{rank}")
    dist.destroy_process_group()


def training_of(number, folder, log, _):
    """Train alone; another training does the same, and neither knows of the other."""
    torch.set_num_threads(1)
    dataset = make_dataset(folder / "cache", FakeBackbone(dim=4, log=log, seconds_per_frame=0.01))
    samples = [*make_loader(dataset, 1, "fork"), *make_loader(dataset, 0, None)]
    seen = {int(s["timepoints"][0]): s["pretrained_feats"] for s in samples}
    torch.save(seen, folder / f"seen-{number}")


def free_port():
    import socket

    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("work", [rank_of, training_of])
def test_two_at_once_compute_each_record_once(tmp_path, log, expected, work):
    spawn, port = multiprocessing.get_context("spawn"), free_port()
    both = [spawn.Process(target=work, args=(n, tmp_path, log, port)) for n in range(2)]
    for one in both:
        one.start()
    for one in both:
        one.join(300)
        assert one.exitcode == 0
    assert set(embeddings(log).values()) == {1}
    seen = [torch.load(tmp_path / f"seen-{n}") for n in range(2)]
    assert set(seen[0]) | set(seen[1]) == set(range(len(expected)))
    for index, features in [*seen[0].items(), *seen[1].items()]:
        assert torch.equal(features, expected[index])
    assert not damage(tmp_path / "cache")


# Failures


class Failing(FakeBackbone):
    """Fails as told, for frames brighter than others."""

    def __init__(self, kind, bad=(), limit=None, **options):
        super().__init__(dim=4, **options)
        self.kind, self.bad, self.limit, self.sizes = kind, set(bad), limit, []

    def embed(self, frames):
        from feature_cache.hashing import frame_digest

        self.sizes.append(len(frames))
        if self.limit is not None and len(frames) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        grids = super().embed(frames)
        for i, frame in enumerate(np.asarray(frames)):
            if frame_digest(frame) in self.bad and self.kind == "nan":
                grids[i, 0, 0, 0] = np.nan
            elif frame_digest(frame) in self.bad:
                raise RuntimeError("a kernel failed")
        return grids


def bad_frame(t):
    from feature_cache.hashing import frame_digest
    from feature_cache.normalize import normalize
    from feature_cache.spec import Normalization

    frame = make_movie(FRAMES)[0][t].astype(np.float32)
    return frame_digest(normalize(frame, Normalization()))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"fake gave NaN or infinity for frame 6 of movie"),
        ("raise", r"fake failed for frame 6 of movie: RuntimeError: a kernel failed"),
    ],
)
def test_an_error_goes_to_those_who_need_the_frame(tmp_path, expected, workers, kind, message):
    backbone = Failing(kind, [bad_frame(6)])
    dataset = make_dataset(tmp_path / "cache", backbone)
    loader = iter(make_loader(dataset, workers, "fork"))
    for index in range(3):  # frames 0 to 5, although the block of 8 has frame 6 in it
        assert torch.equal(next(loader)["pretrained_feats"], expected[index])
    with pytest.raises(BackboneError, match=message):
        next(loader)
    assert torch.equal(dataset[7]["pretrained_feats"], expected[7])
    del loader
    close_all()
    there = dataset.tokens.movies[0].contains()
    assert not there[6]
    assert there[[0, 5, 7, 10]].all()


def test_out_of_memory_halves_the_batch_and_says_so(tmp_path, expected, caplog):
    backbone = Failing("oom", limit=2)
    dataset = make_dataset(tmp_path / "cache", backbone)
    check([dataset[i] for i in range(len(dataset))], expected)
    assert backbone.sizes[:3] == [8, 4, 2]
    assert max(backbone.sizes[3:]) == 2
    assert "out of memory with 8 frames at once, going on with 4" in caplog.text


def test_out_of_memory_with_one_frame_says_what_to_lower(tmp_path):
    dataset = make_dataset(tmp_path / "cache", Failing("oom", limit=0))
    with pytest.raises(BackboneError, match=r"one frame, frame 0 of movie .* lower its input_size"):
        _ = dataset[0]
    assert dataset.tokens.movies[0].backbone.sizes[:4] == [8, 4, 2, 1]


def test_nothing_is_computed_where_misses_are_errors(tmp_path, log):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log), on_miss="error")
    assert not sockets()
    for workers in (0, 1):
        with pytest.raises(MissingRecordError, match="on_miss is 'error'"):
            next(iter(make_loader(dataset, workers, "fork")))
    assert not embeddings(log)


def test_a_cache_that_can_only_be_read(tmp_path, small):
    make_dataset(tmp_path / "cache").warm()
    movie = FeatureCache(tmp_path / "cache", "r").movie(*small, FakeBackbone(dim=4), name="m")
    with pytest.raises(MissingRecordError, match="which can only be read"):
        CachedFeatureDataset(Windows(small[1]), [movie])[0]


def test_more_pixels_than_may_wait(tmp_path):
    cache = FeatureCache(tmp_path / "cache")
    images, masks, _ = make_movie(FRAMES)
    movie = cache.movie(images, masks, FakeBackbone(dim=4))
    host = open_host(cache, [movie.backbone], movie, memory_bytes=9 * 48 * 64 * 8)
    dataset = CachedFeatureDataset(Windows(masks), [movie], batch_size=20)
    with pytest.raises(ServiceError, match="lower batch_size"):
        next(iter(make_loader(dataset, 1, "fork")))
    assert len(list(dataset)) == len(dataset)  # here they are read when there is room
    host.close()
    cache.gc(max_bytes=0, dry_run=False)
    host = open_host(cache, [movie.backbone], movie, memory_bytes=9 * 48 * 64 * 8)
    again = CachedFeatureDataset(Windows(masks), [movie], batch_size=8)
    assert len(list(make_loader(again, 2, "fork"))) == len(again)
    assert wait_until(lambda: host.service.engine.reserved == 0)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    from feature_cache import StoreError
    from feature_cache.store import Space

    monkeypatch.setattr(engine, "IDLE_SECONDS", 0.0)
    monkeypatch.setattr(engine, "COMMIT_SECONDS", 0.0)
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, seconds_per_frame=0.02))

    def fail(*_):
        raise StoreError("can't write: no space left")

    monkeypatch.setattr(Space, "write", fail)
    with pytest.raises(StoreError, match="no space left"):
        _ = [dataset[i] for i in range(len(dataset))]


def test_a_frame_that_changed_is_never_stored_under_its_old_key(tmp_path):
    images, masks, _ = make_movie(FRAMES)
    movie = FeatureCache(tmp_path / "cache").movie(images, masks, FakeBackbone(), name="movie")
    dataset = CachedFeatureDataset(Windows(masks), [movie])
    movie.keys()
    images[2] += 1
    for workers in (0, 1):
        with pytest.raises(FrameError, match="frame 2 of movie changed since it was hashed"):
            next(iter(make_loader(dataset, workers, "fork")))


# Coming and going


def test_it_ends_with_its_last_user(tmp_path):
    one, two = make_dataset(tmp_path / "cache"), make_dataset(tmp_path / "cache")
    _ = one[0]
    root = one.tokens.movies[0].cache.store.root
    del one
    assert [name.endswith(".json") for name in sockets()] == [True]
    _ = two[9]
    del two
    assert wait_until(lambda: not sockets())
    assert wait_until(lambda: FeatureCache(root, "r").stats()["records"] >= 8)


SCRIPT = """
import sys
sys.path.insert(0, {here!r})
from cold_trainings import make_dataset, make_loader
from feature_cache.testing import FakeBackbone

if __name__ == "__main__":
    dataset = make_dataset({root!r}, FakeBackbone(dim=4, seconds_per_frame={seconds}))
    loader = make_loader(dataset, {workers}, "fork", persistent_workers=True)
    for sample in loader:
        print("sample", flush=True)
    print("done", flush=True)
"""


def start_training(root, *, seconds=0.0, workers=2):
    code = SCRIPT.format(here=str(HERE), root=str(root), seconds=seconds, workers=workers)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_an_end_without_a_word_commits_and_leaves_nothing(tmp_path):
    training = start_training(tmp_path / "cache")
    out, err = outcome(training, 60)
    assert out.endswith("done\n"), err
    assert not err
    assert FeatureCache(tmp_path / "cache", "r").stats()["records"] == FRAMES
    assert not damage(tmp_path / "cache")


def test_an_interrupt_commits_and_leaves_nothing(tmp_path):
    training = start_training(tmp_path / "cache", seconds=0.05)
    assert training.stdout.readline() == "sample\n"
    training.send_signal(signal.SIGINT)
    _, err = outcome(training, 60)
    assert "KeyboardInterrupt" in err
    assert training.returncode in (1, -signal.SIGINT, 130)
    assert 0 < FeatureCache(tmp_path / "cache", "r").stats()["records"] < FRAMES
    assert not damage(tmp_path / "cache")


class InterruptAtLock:
    """Raises KeyboardInterrupt once, where a signal may: after Python's code has taken a lock."""

    def __init__(self, number):
        self.left = number

    def __call__(self, frame, event, called):
        if event == "c_return" and called.__name__ == frame.f_code.co_name == "__enter__":
            self.left -= 1
            if not self.left:
                sys.setprofile(None)
                raise KeyboardInterrupt


def interrupt_at_each_lock(folder):
    """Ask for a sample, again and again, interrupted one lock later; all must end each time."""
    for number in itertools.count(1):
        dataset = make_dataset(folder / f"cache-{number}", FakeBackbone(dim=4))
        interrupt = InterruptAtLock(number)
        sys.setprofile(interrupt)
        with suppress(KeyboardInterrupt):
            _ = dataset[0]
        sys.setprofile(None)
        closing = threading.Thread(target=close_all, daemon=True)
        closing.start()
        closing.join(20)
        if closing.is_alive():  # as this process would be for ever
            faulthandler.dump_traceback()
            os._exit(1)
        if interrupt.left:
            return number - 1
    raise AssertionError


def test_an_interrupt_that_leaves_a_lock_held_holds_up_nobody(tmp_path):
    assert apart(interrupt_at_each_lock, tmp_path) > 0


def debug_dataset(root):
    from feature_cache import load_backbone

    images, masks, _ = make_movie(FRAMES)
    movie = FeatureCache(root).movie(images, masks, load_backbone("debug/random"), name="movie")
    return CachedFeatureDataset(Windows(masks), [movie])


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_server_of_its_own_serves_first_and_commits_when_it_is_stopped(tmp_path, number):
    serving = start_serving(tmp_path / "cache")
    dataset = debug_dataset(tmp_path / "cache")
    samples = [s["pretrained_feats"] for s in make_loader(dataset, 2, "fork")]
    assert dataset.tokens.movies[0].cache.counter.total.computed == 0
    _ = dataset[0]  # the process that has a backbone of its own asks it too
    serving.send_signal(number)
    _, err = outcome(serving, 30)
    assert f"computed {FRAMES}" in err
    assert f"interrupted: the {FRAMES} records computed until now are kept" in err
    assert dataset.tokens.movies[0].contains().all()
    warm = debug_dataset(tmp_path / "warm")
    check(make_loader(warm, 0, None), samples)


def test_a_server_that_is_killed_is_replaced_by_the_training(tmp_path):
    serving = start_serving(tmp_path / "cache")
    dataset = debug_dataset(tmp_path / "cache")
    loader = iter(make_loader(dataset, 1, "fork", prefetch_factor=1))
    _ = next(loader)
    serving.kill()
    outcome(serving, 30)
    assert len(list(loader)) == len(dataset) - 1
    assert dataset.tokens.movies[0].cache.counter.total.computed > 0


def test_a_server_whose_engine_failed_says_so(tmp_path, monkeypatch):
    def fail(host, _):
        host.service.engine.error = RuntimeError("the device is lost")

    monkeypatch.setattr(serve, "_wait", fail)
    words = ["serve", "--cache", str(tmp_path / "cache"), "--backbone", "debug/random"]
    with pytest.raises(ServiceError, match="what computes has ended: the device is lost"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_a_server_ends_when_its_last_user_is_gone(monkeypatch):
    class Server(list):
        used = 1.0

    server = Server()
    host = SimpleNamespace(
        server=server, service=SimpleNamespace(engine=SimpleNamespace(closing=False))
    )
    monkeypatch.setattr(serve, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(serve, "_ALONE_SECONDS", 0.05)
    waiting = threading.Thread(target=serve._wait, args=(host, None), daemon=True)
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()  # nobody came yet
    server.append("user")
    server.used = time.monotonic()
    waiting.join(0.3)
    assert waiting.is_alive()
    server.clear()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_forked_child_that_is_no_worker_serves_itself(tmp_path):
    dataset = make_dataset(tmp_path / "cache")
    _ = dataset[0]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            again = make_dataset(tmp_path / "other")
            _ = again[0]
            close_all()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    _ = dataset[9]


def test_after_it_was_closed_it_begins_anew(tmp_path, log, expected):
    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log))
    _ = dataset[0]
    close_all()
    assert not sockets()
    check([dataset[i] for i in range(len(dataset))], expected)
    assert set(embeddings(log).values()) == {1}


@pytest.mark.parametrize("name", ["engine", "claim", "embed"])
def test_where_a_thread_did_not_start_the_next_who_asks_is_answered(
    tmp_path, expected, monkeypatch, name
):
    dataset = make_dataset(tmp_path / "cache")
    with monkeypatch.context() as patch:
        refuse_threads(patch, name)
        with pytest.raises(ServiceError, match="can't start new thread"):
            _ = dataset[0]
    check([dataset[0]], expected[:1])


def test_a_server_without_a_thread_is_not_to_be_found(tmp_path, expected, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        refuse_threads(patch, "server")
        dataset = make_dataset(tmp_path / "cache")
    assert not sockets()
    assert "workers can't ask this process to compute: " in caplog.text
    check([dataset[0]], expected[:1])


def test_a_server_takes_the_next_who_comes_where_no_thread_started(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "cache")
    address = open_host(dataset.tokens.movies[0].cache, [], dataset).server.address
    with monkeypatch.context() as patch:
        refuse_threads(patch, "client")
        with pytest.raises(ServiceError, match="can't be connected to"):
            Client(address)
    Client(address).close()


def test_progress_counts(tmp_path, monkeypatch, capsys):
    dataset = make_dataset(tmp_path / "cache")
    _ = [dataset[i] for i in range(len(dataset))]
    host = open_host(dataset.tokens.movies[0].cache, [], dataset)
    assert host.service.progress.text.startswith("computed 24 of about 24, ")
    assert not capsys.readouterr().err
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    shown = Progress(True)
    shown.add(total=9, misses=1, hits=3)
    shown.add(computed=2)
    shown.close()
    assert "computed 2 of about 9, 0.0 frames/s, 75.0 % hits" in capsys.readouterr().err
    assert not Progress(False).shown


def test_a_line_that_can_not_be_written_holds_up_nothing(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "cache")
    host = open_host(dataset.tokens.movies[0].cache, [], dataset)
    monkeypatch.setattr(sys, "stderr", Gone())
    host.service.progress.shown = True
    _ = dataset[0]
    host.close()
    assert host.service.engine.ended
    tqdm.get_lock().acquire(timeout=10)
    tqdm.get_lock().release()  # raises where the lock was never let go: no bar could be shown


class Gone(io.StringIO):
    """What IPython leaves of stderr at its end."""

    def write(self, text: str) -> int:
        raise AttributeError("'NoneType' object has no attribute 'outputs'")


def test_read_ahead_that_fails_fails_nobody(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    dataset = make_dataset(tmp_path / "cache", Failing("nan", [bad_frame(20)]))
    dataset.prefetch([18])
    assert wait_until(lambda: dataset.tokens.movies[0].cache.counter.total.computed == 3)
    _ = dataset[0]


def test_read_ahead_goes_on_where_no_thread_started(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "cache")
    with monkeypatch.context() as patch:
        refuse_threads(patch, "read-ahead")
        dataset.prefetch([18])
    dataset.prefetch([0])
    assert wait_until(lambda: dataset.tokens.movies[0].contains()[:WINDOW].all(), 20)


def test_read_ahead_goes_on_after_what_nobody_expects(tmp_path, monkeypatch):
    dataset = make_dataset(tmp_path / "cache")
    run, failed = misses._Route.run, []

    def fail_once(route, ask):
        if not failed:
            failed.append(ask)
            raise RuntimeError("something odd")
        return run(route, ask)

    monkeypatch.setattr(misses._Route, "run", fail_once)
    dataset.prefetch([18])
    assert wait_until(lambda: failed)
    dataset.prefetch([0])
    assert wait_until(lambda: dataset.tokens.movies[0].contains()[:WINDOW].all(), 20)


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_hits_in_workers_are_counted(tmp_path, method):
    dataset = make_dataset(tmp_path / "cache")
    dataset.warm()
    cache = dataset.tokens.movies[0].cache
    samples = len(list(make_loader(dataset, 2, method)))
    assert cache.stats(lifetime=True)["hits"] == samples * WINDOW
    assert cache.stats()["hits"] == 0


def test_misses_of_many_threads(tmp_path, log, expected):
    from concurrent.futures import ThreadPoolExecutor

    dataset = make_dataset(tmp_path / "cache", FakeBackbone(dim=4, log=log))
    dataset.tokens.movies[0].keys()
    with ThreadPoolExecutor(4) as pool:
        samples = list(pool.map(dataset.__getitem__, range(len(dataset))))
    check(samples, expected)
    assert set(embeddings(log).values()) == {1}
    assert isinstance(dataset.tokens._misses, Misses)
