"""What a server does with clients that are hostile, broken or slow."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cold_trainings import make_dataset, make_loader, nothing_left, sockets, wait_until
from feature_cache import BackboneError, FeatureCache, MissingRecordError, ServiceError
from feature_cache.cache.movie_keys import MovieKeys
from feature_cache.movies import Source
from feature_cache.service import Service, addresses, list_servers, runtime_folder, wire
from feature_cache.service import client as asking
from feature_cache.service.client import Ask, Client, connect
from feature_cache.service.server import Server
from feature_cache.system import HAS_ABSTRACT, SOCKET_FAMILY
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

FRAME, MASK = [48, 64], [48, 64]


@pytest.fixture(autouse=True)
def clean():
    with nothing_left():
        yield


@pytest.fixture
def movie(tmp_path):
    frames, masks, _ = make_movie(12)
    return FeatureCache(tmp_path / "cache").movie(frames, masks, FakeBackbone(dim=4), name="movie")


@pytest.fixture
def server(movie):
    service = Service(movie.cache, memory_bytes=1 << 20)
    service.add_backbone(movie.backbone)
    made = Server(service)
    made.publish()
    yield made
    made.stop()
    service.close()
    made.close()


def is_served(server, movie):
    """Check that the server goes on: another client gets its record."""
    client = Client(server.address)
    answer = client.fetch(Ask(movie, [0], 1, 4))
    client.close()
    return answer.records[0].features.shape == (5, 4)


def is_over(connection):
    """Read to the end: an error, if anything, and then the server has closed."""
    try:
        assert set(json.loads(connection.recv_bytes())) == {"error"}
        connection.recv_bytes()
    except (EOFError, ConnectionError):
        return True
    return False


def request(movie, **changes):
    spec = movie.spec
    return {
        "do": "want",
        "backbone": spec.backbone.digest.hex(),
        "pooling": spec.pooling,
        "dtype": spec.dtype,
        "space": spec.digest.hex(),
        "draw": [],
        "keys": [movie.key(1).hex()],
        "need": 1,
        "batch_size": 4,
        **changes,
    }


def frame_header(movie, **changes):
    header = {"number": 0, "frame": FRAME, "seen": 1, "mask": MASK, "where": "x"}
    header["provenance"] = {}
    return {"frames": [{**header, **changes}]}


def test_without_the_key_nobody_comes_in(server, movie, caplog):
    from dataclasses import replace

    with pytest.raises(ServiceError, match="can't be connected to"):
        connect(replace(server.address, authkey=b"wrong"))
    assert wait_until(lambda: "a connection is refused" in caplog.text)
    assert is_served(server, movie)


def test_the_description_is_private(server):
    for name in sockets():
        status = (runtime_folder() / name).stat()
        assert status.st_uid == os.getuid()
        assert name.endswith(".sock") or status.st_mode & 0o077 == 0
    assert runtime_folder().stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("garbage", [b"", b"\0" * 64, os.urandom(4096), b"GET / HTTP/1.1\r\n\r\n"])
def test_garbage_instead_of_a_greeting(server, movie, garbage):
    with socket.socket(socket.AF_UNIX) as opened:
        opened.connect(server.address.socket)
        opened.sendall(garbage)
    assert is_served(server, movie)


def test_one_who_says_nothing_keeps_nobody_out(server, movie, monkeypatch):
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(server.address.socket)
        assert is_served(server, movie)


@pytest.mark.parametrize(
    "message",
    [
        b"no json",
        b"[1, 2]",
        b"[" * 100_000,
        b'{"do": "format"}',
        b'{"do": "want"}',
        b'{"do": "want", "keys": 3}',
        b'{"do": "hurry", "keys": ["zz"]}',
        b'{"do": "hurry", "keys": ["00"]}',
    ],
)
def test_what_is_no_message_ends_the_connection(server, movie, message):
    with connect(server.address) as connection:
        connection.send_bytes(message)
        assert is_over(connection)
    assert is_served(server, movie)


def test_a_header_that_is_too_long_is_not_read(server, movie):
    with connect(server.address) as connection:
        os.write(connection.fileno(), struct.pack("!i", wire.HEADER_BYTES + 1))
        with pytest.raises((EOFError, ConnectionError)):
            connection.recv_bytes()
    assert is_served(server, movie)


@pytest.mark.parametrize(
    "changes",
    [
        {"need": 2},
        {"need": -1},
        {"batch_size": 0},
        {"batch_size": float("inf")},
        {"keys": ["00" * 16] * 20_000},
        {"draw": [{"name": "no such"}]},
        {"pooling": "no such"},
        {"dtype": "float128"},
        {"space": "00" * 16},
        {"backbone": "00" * 16},
    ],
    ids=lambda changes: str(changes)[:40],
)
def test_wrong_requests_are_told(server, movie, changes):
    with connect(server.address) as connection:
        wire.send(connection, request(movie, **changes))
        assert wire.receive(connection)["error"][1]
    assert is_served(server, movie)


@pytest.mark.parametrize(
    "changes",
    [
        {"frame": [1 << 30, 1 << 30], "mask": None},
        {"frame": [-1, 5], "mask": None},
        {"frame": [1.5, 5], "mask": None},
        {"frame": "48", "mask": None},
        {"frame": [2] * 9, "mask": None},
        {"mask": [48, 63]},
        {"number": 1},
        {"number": "x"},
    ],
    ids=str,
)
def test_sizes_are_checked_before_anything_is_sent(server, movie, changes):
    with connect(server.address) as connection:
        wire.send(connection, request(movie))
        assert wire.receive(connection) == {"pixels": [0]}
        wire.send(connection, frame_header(movie, **changes))
        assert wire.receive(connection)["error"][1]
    assert server.service.engine.reserved == 0
    assert is_served(server, movie)


@pytest.mark.parametrize("sent", ["other", "nan", "short"])
def test_other_pixels_than_those_of_the_key_are_never_stored(server, movie, sent):
    frame = np.full(FRAME, np.nan if sent == "nan" else 1, np.float32)
    with connect(server.address) as connection:
        wire.send(connection, request(movie))
        wire.receive(connection)
        wire.send(connection, frame_header(movie))
        assert wire.receive(connection) == {"go": True}
        connection.send_bytes(frame.tobytes()[: 400 if sent == "short" else None])
        if sent != "short":
            connection.send_bytes(movie.masks[1].astype(np.int32).tobytes())
        name, message = wire.receive(connection)["error"]
        assert name in ("FrameError", "ServiceError"), message
    assert server.service.engine.reserved == 0
    assert not movie.contains([1])[0]
    assert is_served(server, movie)


def test_a_client_that_leaves_in_the_middle_leaves_no_memory_behind(server, movie):
    for _ in range(3):
        with connect(server.address) as connection:
            wire.send(connection, request(movie))
            wire.receive(connection)
            wire.send(connection, frame_header(movie))
            wire.receive(connection)
    assert is_served(server, movie)
    assert server.service.engine.reserved == 0


def test_frames_in_files_are_asked_for_by_name(server, movie, small_folder, monkeypatch):
    """The server reads them; the client need not have read a pixel, if their digests are known."""
    stored = movie.cache.movie(small_folder(), None, movie.backbone)
    monkeypatch.setattr(asking, "read_frames", pytest.fail)
    client = Client(server.address)
    answer = client.fetch(Ask(stored, [1, 2, 3], 2, 8))
    client.close()
    assert sorted(answer.sent) == [0, 1, 2]
    assert same(answer.records, movie.cache.get_or_compute(*make_movie()[:2], movie.backbone)[1:3])


@pytest.mark.parametrize("elsewhere", ["gone", "other"])
def test_pixels_are_sent_where_the_server_reads_other_files_or_none(
    server, movie, small_folder, elsewhere
):
    stored = movie.cache.movie(small_folder(), None, movie.backbone)
    other = small_folder("other", seed=5) if elsewhere == "other" else "/no/such/movie/01"
    stored.source = Source(str(other))  # as where another file system is mounted there
    client = Client(server.address)
    answer = client.fetch(Ask(stored, [1, 2], 2, 8))
    client.close()
    assert same(answer.records, movie.cache.get_or_compute(*make_movie()[:2], movie.backbone)[1:3])


@pytest.mark.skipif(not HAS_ABSTRACT, reason="what a full queue does is the system's")
def test_who_comes_with_many_others_waits_for_a_turn(server):
    address = replace(server.address, name=f"{server.address.name}-full")
    with socket.socket(SOCKET_FAMILY) as full, ExitStack() as stack:
        full.bind(address.socket)
        full.listen(0)
        full.settimeout(10)
        others = []

        def comes_in():
            others.append(stack.enter_context(socket.socket(SOCKET_FAMILY)))
            others[-1].setblocking(False)
            return others[-1].connect_ex(address.socket) == 0

        while comes_in():
            pass

        def serve():
            for _ in others[:-1]:
                time.sleep(0.1)
                full.accept()[0].close()
            wire.greet(full.accept()[0], address.authkey, server=True).close()

        with ThreadPoolExecutor(1) as threads:
            served = threads.submit(serve)
            connect(address).close()
            served.result()


@pytest.mark.parametrize("step", ["read", "key"])
def test_what_nobody_expects_in_the_server_is_told(server, movie, small_folder, monkeypatch, step):
    stored, own = movie.cache.movie(small_folder(), None, movie.backbone), getattr(MovieKeys, step)

    def fail(self, t):
        if threading.current_thread().name.startswith("feature_cache"):
            raise MemoryError("no memory left")
        return own(self, t)

    monkeypatch.setattr(MovieKeys, step, fail)
    client = Client(server.address)
    with pytest.raises(BackboneError, match="MemoryError: no memory left"):
        raise client.fetch(Ask(stored, [1], 1, 8)).records[0]
    client.close()


def same(records, expected):
    return len(records) == len(expected) and all(
        np.array_equal(a.features, b.features) for a, b in zip(records, expected, strict=True)
    )


def test_errors_keep_their_class():
    for error in (MissingRecordError("a"), ServiceError("b"), RuntimeError("c")):
        again = wire.make_error(*wire.error_text(error))
        assert isinstance(again, type(error))
        assert str(error) in str(again)


# Files


def write_description(name, **changes):
    runtime_folder().mkdir(mode=0o700, exist_ok=True)
    process = addresses.this_process()
    plain = {
        "version": 2, "pid": process.pid, "started": process.started, "host": process.host,
        "cache": [1, 2], "root": "/x", "backbones": [], "device": "cpu", "standalone": False,
        "authkey": "00",
        **changes,
    }  # fmt: skip
    (runtime_folder() / f"{name}.json").write_text(json.dumps(plain))


def test_descriptions_of_the_dead_are_removed_and_damaged_ones_passed_over():
    write_description("a", pid=2**22 + 1)
    write_description("b", version=1)
    write_description("c", backbones=None)
    (runtime_folder() / "d.json").write_text("{")
    write_description("e")
    assert [address.name for address in list_servers() if address.root == "/x"] == ["e"]
    assert "a.json" not in sockets()
    for name in "bcde":
        addresses.withdraw(name)


def test_one_that_does_not_listen_any_more_is_removed(tmp_path):
    dataset = make_dataset(tmp_path / "cache")
    movie = dataset.tokens.movies[0]
    cache = list(addresses.identify(movie.cache.store.root))
    digest = movie.spec.backbone.digest.hex()
    write_description("a", cache=cache, backbones=[digest], standalone=True, pid=os.getppid(),
                      started=addresses._started(os.getppid()))  # fmt: skip
    assert len(list(make_loader(dataset, 1, "fork"))) == len(dataset)
    assert "a.json" not in sockets()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_workers_need_no_folder(tmp_path, monkeypatch, method):
    short = Path(tempfile.mkdtemp(prefix="fc-"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short))
    monkeypatch.setattr(addresses, "SHARED_TEMPORARY", str(short / "nowhere"))
    (short / "feature_cache").mkdir()
    (short / "feature_cache").chmod(0o755)  # that others may enter is not used
    dataset = make_dataset(tmp_path / "cache")
    assert not os.listdir(short / "feature_cache")
    assert not list(list_servers())
    assert len(list(make_loader(dataset, 1, method))) == len(dataset)
    shutil.rmtree(short)


def test_a_server_is_found_in_another_environment_and_after_a_logout(tmp_path, monkeypatch):
    monkeypatch.setattr(addresses, "SHARED_TEMPORARY", str(tmp_path))
    dataset = make_dataset(tmp_path / "cache")

    def found():
        return [a.name for a in list_servers() if a.name.startswith(f"{os.getpid()}-")]

    names = found()
    assert names
    with monkeypatch.context() as cron:
        cron.delenv("XDG_RUNTIME_DIR")
        assert found() == names
    shutil.rmtree(runtime_folder())
    shutil.rmtree(tmp_path / f"feature_cache-{os.getuid()}")
    assert len(list(make_loader(dataset, 1, "fork"))) == len(dataset)
    assert wait_until(lambda: found() == names)


def test_long_paths_are_not_used_for_sockets(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert len(str(runtime_folder())) < 80
    assert Path(runtime_folder()).name == f"feature_cache-{os.getuid()}"


def test_a_server_that_hangs_is_given_up(movie, monkeypatch):
    from feature_cache.service import client

    monkeypatch.setattr(client, "SILENT_SECONDS", 0.5)
    left, right = socket.socketpair()
    kept = []
    greeting = threading.Thread(target=lambda: kept.append(wire.greet(right, b"k", server=True)))
    greeting.start()
    made = Client.__new__(Client)
    made._connection = wire.greet(left, b"k", server=False)
    process = addresses.this_process()
    made.address = addresses.Address("x", process.pid, process.started, process.host, (0, 0), "/x",
                                 frozenset(), "", False, b"k")  # fmt: skip
    greeting.join()
    with pytest.raises(ServiceError, match="said nothing for 0 s"):
        made.fetch(Ask(movie, [0], 1, 1))
    kept[0].close()
