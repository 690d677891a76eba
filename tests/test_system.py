"""Systems other than Linux, simulated: what they lack is taken away from the package alone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from feature_cache.system import start_of
from processes import outcome


@pytest.mark.parametrize(
    "words",
    [
        ["win32"],
        *[pytest.param([one, "all"], marks=pytest.mark.slow) for one in ("win32", "darwin")],
    ],
    ids=" ".join,
)
def test_another_system_imports_computes_stores_and_trains_with_workers(
    words: list[str], tmp_path: Path
) -> None:
    script = Path(__file__).with_name("other_platforms.py")
    process = subprocess.Popen(
        [sys.executable, "-X", "warn_default_encoding", script, words[0], tmp_path, *words[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, err = outcome(process, 200)
    assert process.returncode == 0, err
    assert out.startswith("trained to ")


@pytest.mark.skipif(sys.platform != "linux", reason="the boot is told so by Linux")
def test_a_start_stays_when_the_clock_is_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, told = Path("/proc", str(os.getpid())), Path("/proc/stat").read_text()
    (tmp_path / own.name).mkdir()
    shutil.copy(own / "stat", tmp_path / own.name / "stat")
    starts = []
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(tmp_path))
    for boot in (1_700_000_000, 1_700_000_100):
        (tmp_path / "stat").write_text(re.sub(r"(?m)^btime .*$", f"btime {boot}", told))
        starts.append(start_of(psutil.Process()))
        assert psutil.boot_time() == boot
    assert starts[0] == pytest.approx(starts[1])
