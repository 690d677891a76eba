"""A cache on a real network file system: GlusterFS, a brick and a mount for each of two hosts."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_cache import FeatureCache
from feature_cache.store import Store
from feature_cache.store.maintenance import verify

pytestmark = pytest.mark.slow

BRICK = """
volume posix
  type storage/posix
  option directory {folder}
end-volume
volume locks
  type features/locks
  subvolumes posix
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.bind-address 127.0.0.1
  option transport.socket.listen-port {port}
  option auth.addr.locks.allow 127.0.0.1
  subvolumes locks
end-volume
"""
CLIENT = """
volume client
  type protocol/client
  option transport-type tcp
  option remote-host 127.0.0.1
  option remote-port {port}
  option remote-subvolume locks
end-volume
"""
MOVIE = """
import sys
import numpy as np
from feature_cache import FeatureCache
from feature_cache.testing import FakeBackbone

root, log, seconds = sys.argv[1:]
frames = np.random.default_rng(0).integers(0, 4096, (80, 32, 32), np.uint16)
masks = np.zeros((80, 32, 32), np.int32)
masks[:, 4:12, 4:12], masks[:, 16:28, 16:28] = 1, 2
backbone = FakeBackbone(8, 8, float(seconds), log)
"""
COMPUTE = "FeatureCache(root).get_or_compute(frames, masks, backbone, batch_size=2)"
READ = """
cache = FeatureCache(root, "r")
first = cache.get(frames, masks, backbone)
for _ in range(50):
    for record, again in zip(first, cache.get(frames, masks, backbone), strict=True):
        assert np.array_equal(record.features, again.features)
"""
TIDY = """
cache = FeatureCache(root)
for _ in range(3):
    cache.compact()
    cache.gc(dry_run=False)
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The same folder as two hosts see it."""
    if not (shutil.which("glusterfsd") and shutil.which("glusterfs") and shutil.which("unshare")):
        pytest.skip("needs GlusterFS (Debian's glusterfs-server) and unshare")
    if not Path("/dev/fuse").exists():
        pytest.skip("needs FUSE, and there is no /dev/fuse")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (tmp_path / "brick").mkdir()
    brick, client = tmp_path / "brick.vol", tmp_path / "client.vol"
    brick.write_text(BRICK.format(folder=tmp_path / "brick", port=port))
    client.write_text(CLIENT.format(port=port))
    logs = ("-l", str(tmp_path / "brick.log"), "-p", str(tmp_path / "brick.pid"))
    server = subprocess.Popen(["glusterfsd", "--no-daemon", "-f", str(brick), *logs])
    mounted = []
    try:
        for name in ("one", "two"):
            folder = tmp_path / name
            folder.mkdir()
            log = ("-l", str(tmp_path / f"{name}.log"))
            subprocess.run(["glusterfs", "-f", str(client), *log, str(folder)], check=False)
            mounted.append(folder)
            _wait_for(folder)
            if not folder.is_mount():
                pytest.skip("needs the right to mount")
        yield mounted[0], mounted[1]
    finally:
        for folder in mounted:
            subprocess.run(["umount", "-l", str(folder)], check=False)
        server.terminate()
        server.wait()


def _wait_for(mount: Path) -> None:
    """Wait until a mount has found the brick: before, all it says is that it is not connected."""
    for _ in range(600):
        try:
            (mount / f"{mount.name} is there").touch()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the brick is not found")


def start(host: str, mount: Path, code: str, log: Path, seconds: float) -> subprocess.Popen[bytes]:
    """Run code in a process of a host of this name."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
    words = ["-c", MOVIE + code, str(mount / "cache"), str(log), str(seconds)]
    return subprocess.Popen([*named, sys.executable, *words])


def embedded(logs: Path) -> list[str]:
    return [line for log in logs.iterdir() for line in log.read_text().splitlines()]


def test_two_hosts_share_a_cache(mounts: tuple[Path, Path], tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    hosts = list(zip(("one", "two"), mounts, strict=True))
    work = [
        start(host, mount, COMPUTE, logs / f"{host}{number}", 0.02)
        for host, mount in hosts
        for number in range(3)
    ]
    assert [process.wait() for process in work] == [0] * 6
    assert len(set(embedded(logs))) == 80
    # Of a pack of the other host a mount may hear only after its claims were let go of.
    assert len(embedded(logs)) <= 80 + 8
    work = [
        start(host, mount, code, logs / "none", 0.0)
        for host, mount in hosts
        for code in (READ, READ, TIDY)
    ]
    assert [process.wait() for process in work] == [0] * 6
    assert [len(space) for space in Store(mounts[1] / "cache", "r").spaces()] == [80]
    assert not [one for one in verify(mounts[0] / "cache") if one.kind == "damaged"]


def test_the_work_of_a_host_that_died_is_taken_over(
    mounts: tuple[Path, Path], tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    FeatureCache(mounts[0] / "cache")
    dead = start("one", mounts[0], COMPUTE, logs / "one", 0.5)
    while not embedded(logs):
        time.sleep(0.1)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert 0 < len(embedded(logs)) < 80
    assert start("two", mounts[1], COMPUTE, logs / "two", 0.0).wait() == 0
    assert [len(space) for space in Store(mounts[0] / "cache", "r").spaces()] == [80]
