"""Systems other than Linux, simulated: what they lack is taken away from the package alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

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
