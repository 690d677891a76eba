"""Use from a notebook: cells, interrupts, a clean end."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from cold_trainings import FRAMES, damage, embeddings, nothing_left, sockets, wait_until
from processes import outcome
from shared_folder import members

SHELLS = {
    "IPython": """
from IPython.core.interactiveshell import InteractiveShell
run = InteractiveShell.instance().run_cell
""",
    "code": """
import code
interpreter = code.InteractiveInterpreter()
def run(cell):
    interpreter.runcode(compile(cell, "a cell", "exec"))
""",
}
CELLS = [
    """
import os, signal, time
from feature_cache.testing import FakeBackbone
from cold_trainings import make_dataset, make_loader

dataset = make_dataset({root!r}, FakeBackbone(4, 8, 0.02, {log!r}))
loader = make_loader(dataset, {workers}, "fork")
""",
    """
for number, sample in enumerate(loader):
    if number == 2:  # as a notebook does, to the whole process group
        os.killpg(0, signal.SIGINT)
        time.sleep(60)
""",
    'print("an epoch of", len(list(loader)))',
]


@pytest.mark.parametrize(
    "shell",
    ["IPython", *(pytest.param(one, marks=pytest.mark.slow) for one in SHELLS if one != "IPython")],
)
@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_epoch_is_interrupted_and_another_one_works(
    tmp_path: Path, shell: str, workers: int
) -> None:
    log = tmp_path / "log"
    names = {"root": str(tmp_path / "cache"), "log": str(log), "workers": workers}
    cells = [cell.format(**names) for cell in CELLS]
    script = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{SHELLS[shell]}"
    script += "".join(f"run({cell!r})\n" for cell in cells)
    with nothing_left():
        notebook = subprocess.Popen(
            [sys.executable, "-c", script], text=True, start_new_session=True,
            env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = outcome(notebook, 120)
        assert notebook.returncode == 0, err
        assert (out + err).count("KeyboardInterrupt") >= 1
        assert f"an epoch of {FRAMES - 3}" in out, err
        assert wait_until(lambda: not members(notebook.pid))
        assert not sockets()
    assert set(embeddings(log).values()) == {1}
    assert len(embeddings(log)) == FRAMES
    assert not damage(tmp_path / "cache")


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from cold_trainings import make_dataset
dataset = make_dataset({cache!r})
get_ipython().run_cell("print('rows', len(dataset[0]['labels']))", store_history=True)
"""


@pytest.mark.slow
def test_ipython_in_a_terminal_is_left_at_once(tmp_path: Path) -> None:
    names = {"tests": str(Path(__file__).parent), "cache": str(tmp_path / "cache")}
    (tmp_path / "script.py").write_text(SCRIPT.format(**names))
    command = ["-m", "IPython", "--simple-prompt", "--no-banner", "--colors=NoColor", "-i"]
    with nothing_left():
        shell = pexpect.spawn(
            sys.executable, [*command, str(tmp_path / "script.py")], encoding="utf8", timeout=60,
            env={**os.environ, "IPYTHONDIR": str(tmp_path / "ipython")},
        )  # fmt: skip
        shell.expect(r"In \[2\]: ")
        assert "computed" in shell.before
        shown = leave(shell)  # the line of progress is written to what IPython has by then let go
        assert "Traceback" not in shown
        assert shell.exitstatus == 0
        assert not sockets()
    assert not damage(tmp_path / "cache")


def leave(shell: pexpect.spawn) -> str:
    """Say exit until it is heard, which a prompt just shown may not do."""
    for _ in range(10):
        shell.sendline("exit")
        if shell.expect([pexpect.EOF, pexpect.TIMEOUT], timeout=5) == 0:
            break
    shell.close()
    return shell.before
