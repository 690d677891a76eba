"""The README's blocks, run in order in one folder, as a reader would."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
EXPECTED = [
    "movies/bacteria/01",
    "20 (124, 112) float16 [1 2 3]",
    "112 3",
    "20",
    "13 [{'name': 'd4', 'element': 'rotate_180'}]",
    "float16 0 16",
]


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)


def mask_times(text: str) -> list[str]:
    """Leave out what differs from run to run: times, bytes of provenance, and commits."""
    changing = r"\d[\d.]* s\b|\"seconds\": [\d.]+|\d+ kB|\d{4}-\d\d-\d\d \d\d:\d\d|\d+ packs merged"
    lines = re.sub(changing, "…", text).splitlines()
    return [line for line in lines if not re.match(r"\w+: +\d+%", line)]


def transcript(block: str) -> list[tuple[str, list[str]]]:
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], mask_times(part)[1:]) for part in parts]


@pytest.mark.slow
def test_every_block_does_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")

    def run(command: list[str] | str) -> str:
        done = subprocess.run(
            command, shell=isinstance(command, str), cwd=tmp_path, capture_output=True, text=True
        )
        shown = done.stdout + "".join(
            line for line in done.stderr.splitlines(True) if line.startswith("error")
        )
        assert done.returncode == 0 or "error" in shown, done.stderr
        return shown

    *uses, reads_zarr = blocks("python")
    for code, line in zip(uses, EXPECTED, strict=False):
        assert run([sys.executable, "-c", code]).splitlines()[-1] == line
    for block in blocks("console"):
        for command, expected in transcript(block):
            assert mask_times(run(command)) == expected, command
    assert run([sys.executable, "-c", reads_zarr]).strip() == EXPECTED[-1]


def test_scripts_that_the_readme_names_exist():
    for script in re.findall(r"\./scripts/\w+", README.read_text()):
        assert (README.parent / script).stat().st_mode & 0o111
