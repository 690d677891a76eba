"""The blocks of README and pages, run in order in one folder, as a reader would."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import numpy as np
import pytest
from dask.distributed import LocalCluster
from nbclient import NotebookClient

import feature_cache
from feature_cache import Movie, errors, trackastra
from feature_cache.movies import link_by_overlap, write_movie

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PYTHON = ROOT / "docs" / "reference" / "python.md"
SHORTER = {
    'pip install ".[trackastra,demo]"': "pip install --dry-run --no-deps --no-build-isolation "
    "--quiet $ROOT",
    "--device cuda:0,cuda:1": "--device cpu",
    "--epochs 100": "--epochs 1 --train_samples 8 -d 16",
    "--lr 1e-5": "--lr 1e-5 --epochs 1 --train_samples 8",
    " train.py ": " $ROOT/tests/training_script.py "
    "--input_val movies/bacteria/01 --outdir out --dim 112 "
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


def pages() -> list[Path]:
    """List the README and the pages, in the order of the site's navigation."""
    names = re.findall(r"^ +- .+: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    found = {ROOT / "docs" / name for name in names}
    assert found == set((ROOT / "docs").rglob("*.md"))
    return [README, *(ROOT / "docs" / name for name in names)]


def blocks() -> Iterator[tuple[Path, str, str]]:
    """Give page, kind and content of each block that can be run."""
    for page in pages():
        found = re.findall(r"^```(\w+)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
        for kind, block in found:
            assert kind in {"bash", "console", "python"}, page
            yield page, kind, block


def shown_at_end(block: str) -> list[str]:
    """Give the comments at the end of a block of Python: what it prints last."""
    lines = block.splitlines()
    code = max(number for number, line in enumerate(lines) if not line.startswith("# "))
    return [line.removeprefix("# ") for line in lines[code + 1 :]]


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
    write_movie(root, frames, *link_by_overlap(masks), overwrite=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_block_does_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    monkeypatch.setenv("ROOT", str(ROOT))
    monkeypatch.setenv("HERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        for page, kind, block in blocks():
            if kind == "python":
                shown = run([sys.executable, "-c", block], tmp_path)
                expected = shown_at_end(block)
                assert expected, (page, block)
                assert shown.splitlines()[-len(expected) :] == expected, (page, block)
                if "write_example" in block:
                    for root in map(Path, expected):
                        crop(root)
            elif kind == "bash":
                commands = shorten(block, cluster.scheduler_address)
                assert "error" not in run(f"set -e\n{commands}", tmp_path), (page, block)
            else:
                for command, expected in transcript(block):
                    assert mask_times(run(command, tmp_path)) == expected, (page, command)


def texts_of(notebook: nbformat.NotebookNode) -> list[str]:
    """Give what each cell printed, and which kinds of pictures it made."""
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream" and output.name == "stdout":
                texts.append(output.text)
            elif output.output_type != "stream":
                texts.append(" ".join(sorted(output.data)))
    return texts


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["features_of_cells", "which_features"])
def test_notebooks_print_what_they_show(tmp_path, name):
    shown = nbformat.read(ROOT / "docs" / "notebooks" / f"{name}.ipynb", as_version=4)
    again = copy.deepcopy(shown)
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(again, timeout=600, resources=place).execute()
    assert len(texts_of(shown)) > 3
    for given, expected in zip(texts_of(again), texts_of(shown), strict=True):
        number = r"\d+\.\d+"  # shares may differ a little from processor to processor
        assert re.sub(number, "…", given) == re.sub(number, "…", expected)
        values, wanted = (np.array(re.findall(number, text), float) for text in (given, expected))
        np.testing.assert_allclose(values, wanted, atol=0.06)


def test_what_the_pages_name_is_there():
    for page in [*pages(), ROOT / "CONTRIBUTING.md"]:
        text = page.read_text()
        for script in re.findall(r"\./scripts/[\w-]+", text):
            assert (ROOT / script).stat().st_mode & 0o111, (page, script)
        for link in re.findall(r"\]\((?!\w+:)([^)#]+)", text):
            assert (page.parent / link).exists(), (page, link)
        for file in re.findall(r"`((?:tests|benchmarks|feature_cache)/[\w/.-]+)`", text):
            assert (ROOT / file).exists(), (page, file)


def test_the_reference_has_all_that_is_public():
    listed = set(re.findall(r"^::: feature_cache\.(\S+)", PYTHON.read_text(), re.MULTILINE))
    listed |= set(re.findall(r"\w+Error", str(errors.__doc__)))
    assert (
        set(feature_cache.__all__) | {f"trackastra.{name}" for name in trackastra.__all__} <= listed
    )


@pytest.mark.slow
def test_the_demo(tmp_path):
    options = ["--cache", str(tmp_path), "--steps", "6", "--workers", "1"]
    shown = run([sys.executable, "scripts/demo.py", *options], ROOT)
    assert "warmed once: 40 computed; once more: 0 computed" in shown
    assert re.search(r"links of hela +\d+ found, \d+ missed of 1105", shown)
    (look,) = re.findall(r"look around: \.venv/bin/(.*)", shown)
    assert "40" in run(f"{Path(sys.executable).parent}/{look}", ROOT)
