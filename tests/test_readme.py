"""The README's blocks, run in order in one folder, as a reader would."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from dask.distributed import LocalCluster

from feature_cache import Movie
from feature_cache.movies import link_by_overlap, write_movie

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PRINTED = [
    "movies/bacteria/01",
    "112 3",
    "0 computed",
    "20",
    "torch.Size([3, 112])",
    "13 [{'name': 'd4', 'element': 'rotate_180'}]",
    "['AOGM', 'TRA', 'division_f1', 'divisions', 'found', 'links', 'links_f1', 'missed', 'wrong']",
    "(2, 2)",
    "float16 True",
]
"""The last line that each block of Python prints."""
SHORTER = {
    'pip install ".[trackastra,demo]"': "pip install --dry-run --no-deps --no-build-isolation "
    "--quiet $ROOT",
    "--device cuda:0,cuda:1": "--device cpu",
    "--epochs 100": "--epochs 1 --train_samples 8 -d 16",
    "--lr 1e-5": "--lr 1e-5 --epochs 1 --train_samples 8",
    " train.py ": " $ROOT/tests/standin.py --input_val movies/bacteria/01 --outdir out --dim 112 "
    "--feat_dim 0 ",
    "python -m benchmarks --quick ": "true ",
    "python -m benchmarks --only windows batches": "(cd $ROOT && python -m benchmarks --quick "
    "--only hashing --json $HERE/old.json)",
    "python -m benchmarks --json new.json": "cd $ROOT && python -m benchmarks --quick --only "
    "hashing --json $HERE/new.json",
    "--compare old.json": "--compare $HERE/old.json",
    "python -m benchmarks.report new.json": "true",
}
"""What stands for what would take too long, or for what is not here."""


def blocks() -> Iterator[tuple[str, str]]:
    """Give kind and content of each block that can be run."""
    found = re.findall(r"^```(\w+)\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert {kind for kind, _ in found} == {"bash", "console", "python"}
    yield from found


def mask_times(text: str) -> list[str]:
    """Leave out what differs by run or by the size of movies, and the width of columns."""
    changing = (
        r"\d[\d.]* s\b|\"seconds\": [\d.]+|[\d.]+ [kM]B|\d{4}-\d\d-\d\d \d\d:\d\d|\d+ packs merged"
        r"|\d+x\d+|\"regions\": \[.*?\]|\d[\d.]* / \d[\d.]* / \d+"
    )
    lines = re.sub(" {2,}", "  ", re.sub(changing, "…", text)).splitlines()
    return [line.rstrip() for line in lines if not re.match(r"\w+: +\d+%", line)]


def transcript(block: str) -> list[tuple[str, list[str]]]:
    parts = re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]
    return [(part.splitlines()[0], mask_times(part)[1:]) for part in parts]


def shorten(commands: str, scheduler: str) -> str:
    for long, short in {**SHORTER, "tcp://node1:8786": scheduler}.items():
        commands = commands.replace(long, short)
    return commands


def run(command: list[str] | str, folder: Path) -> str:
    done = subprocess.run(
        command, shell=isinstance(command, str), cwd=folder, capture_output=True, text=True
    )
    shown = done.stdout + "".join(
        line for line in done.stderr.splitlines(True) if line.startswith("error")
    )
    assert done.returncode == 0 or "error" in shown, done.stderr
    return shown


def crop(root: Path) -> None:
    """Leave the middle of a movie, a fifth: all that follows takes as much less time."""
    movie = Movie.open(root)
    parts = (np.stack(list(part))[:, 256:512, 256:896] for part in (movie.frames, movie.masks))
    frames, masks = parts
    write_movie(root, frames, *link_by_overlap(masks))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_block_does_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("ROOT", str(ROOT))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    printed = iter(PRINTED)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        for kind, block in blocks():
            if kind == "python":
                shown = run([sys.executable, "-c", block], tmp_path)
                assert shown.splitlines()[-1] == next(printed)
                if "write_example" in block:
                    for root in map(Path, shown.splitlines()):
                        crop(root)
            elif kind == "bash":
                commands = shorten(block, cluster.scheduler_address)
                assert "error" not in run(f"set -e\n{commands}", tmp_path)
            else:
                for command, expected in transcript(block):
                    assert mask_times(run(command, tmp_path)) == expected, command
    assert next(printed, None) is None


def test_scripts_that_the_readme_names_exist():
    for script in re.findall(r"\./scripts/\w+", README.read_text()):
        assert (ROOT / script).stat().st_mode & 0o111


@pytest.mark.slow
def test_the_demo(tmp_path):
    options = ["--cache", str(tmp_path), "--steps", "6", "--workers", "1"]
    shown = run([sys.executable, "scripts/demo.py", *options], ROOT)
    assert "warmed once: 40 computed; once more: 0 computed" in shown
    assert re.search(r"links of hela +\d+ found, \d+ missed of 1105", shown)
    (look,) = re.findall(r"look around: \.venv/bin/(.*)", shown)
    assert "40" in run(f"{Path(sys.executable).parent}/{look}", ROOT)
