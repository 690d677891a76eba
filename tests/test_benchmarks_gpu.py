"""The benchmark of a GPU: its arithmetic, and that it runs, here on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import (
    Part,
    Results,
    Row,
    Run,
    count_frames,
    difference_rows,
    largest_differences,
    main,
    make_table,
    name_file,
    ratio_to_bare,
    sum_up_use,
    to_json,
)
from feature_cache.key import Record
from feature_cache.pooling import POOLINGS
from feature_cache.rounding import ROUNDING
from feature_cache.spec import SpaceSpec
from feature_cache.testing import FakeBackbone
from forked_processes import fork_server, start_fork_server

ROOT = Path(__file__).parent.parent


def results(kind: str = "GPU") -> Results:
    machine = {
        "kind": kind, "device": "Some device", "date": "2030-01-02", "processor": "some",
        "cores": 2, "memory_gib": 8, "driver": "1", "cuda": "13", "python": "3.12",
        "versions": {"torch": "2.11"}, "movie": "frames",
    }  # fmt: skip
    return Results(machine, [Row("bare", "network", "8 frames at once", 1234.5, "frames/s")])


def record(*numbers: float) -> Record:
    return Record(np.array([numbers], np.float16), np.array([1], np.int32))


def test_a_run_is_as_long_as_the_pace_of_its_pilot_allows():
    assert count_frames(pace=160.0, seconds=10.0, copies=15, least=8, most=512) == 100
    assert count_frames(pace=1.0, seconds=10.0, copies=15, least=8, most=512) == 8
    assert count_frames(pace=1e6, seconds=10.0, copies=0, least=8, most=512) == 512


def test_warming_is_compared_with_the_backbone_on_as_many_frames():
    assert ratio_to_bare(seconds=15.0, embeddings=1000, bare=100.0) == 1.5


def test_use_is_summed_up():
    median, busy = sum_up_use([0.0, 90.0, 95.0, 100.0]).values()
    assert (median, busy) == (92.5, 50.0)
    assert sum_up_use([]) == {}


def test_the_largest_difference_counts_in_units_of_the_bound():
    spec = SpaceSpec(FakeBackbone(dim=2).spec, "nearest_patch", "float16")
    bound = ROUNDING["float32"]
    pairs = [(spec, record(1.0, 1.0), record(1.0, 1.0)), (spec, record(1, 1), record(1, 1 - bound))]
    [row] = difference_rows("network", "the CPU", largest_differences(pairs))
    assert (row.what, row.value) == ("nearest_patch, from the CPU", 1.0)
    pairs += [(spec, record(1.0, float("nan")), record(1.0, 1.0)), pairs[0]]
    assert np.isnan(largest_differences(pairs)[spec])


def test_figures_of_a_cpu_are_called_that():
    table = make_table(results("CPU"))
    assert "**Figures of a CPU" in table
    assert "| bare | network | 8 frames at once | 1,234 frames/s |" in table
    assert "Figures of a CPU" not in make_table(results("GPU"))


def test_what_is_no_number_is_written_as_its_name(tmp_path):
    found = results()
    found.rows.append(Row("differences", "network", "grids", float("inf"), "of the bound"))
    text = json.dumps(to_json(found), allow_nan=False)
    assert json.loads(text)["rows"][-1]["value"] == "inf"


def test_results_are_named_by_device_and_date():
    assert name_file("NVIDIA H100 80GB HBM3", "2030-01-02").name == (
        "gpu-nvidia-h100-80gb-hbm3-2030-01-02.json"
    )


def test_what_was_measured_is_kept_whatever_comes_after(tmp_path):
    file, row = tmp_path / "new" / "out.json", Row("a", "network", "number", 1.0, "x")

    def fail():
        assert json.loads(file.read_text())["rows"][-1]["part"] == "a"
        yield Row("b", "network", "number", 2.0, "x")
        raise RuntimeError("no more")

    run = Run(results(), file, 100.0, time.perf_counter())
    run.do([
        Part("a", 1.0, lambda: [row]),
        Part("b", 1.0, fail),
        Part("long", 101.0, fail),
        Part("c", 1.0, lambda: [Row("c", "network", "number", 3.0, "x")]),
    ])  # fmt: skip
    written = json.loads(file.read_text())
    assert [row["part"] for row in written["rows"]] == ["bare", "a", "b", "c"]
    assert written["left_out"] == [
        "b failed: RuntimeError: no more",
        "long: it may take 101 s, and fewer are left",
    ]
    assert run.failed
    assert "- b failed: RuntimeError: no more" in file.with_suffix(".md").read_text()


def hang(file: Path) -> None:
    part = Part("hang", 0.0, lambda: time.sleep(60))
    Run(results(), file, 0.5, time.perf_counter()).do([part])


def test_a_run_whose_time_is_over_keeps_its_results(tmp_path):
    file = tmp_path / "out.json"
    start_fork_server()
    run = fork_server.Process(target=hang, args=(file,))
    run.start()
    run.join(60)
    assert run.exitcode == 1
    written = json.loads(file.read_text())
    assert written["left_out"] == ["all from here on: the time was over during hang"]
    assert len(written["rows"]) == 1


def test_it_runs_on_a_cpu(tmp_path):
    file = tmp_path / "out.json"
    command = [sys.executable, "-m", "benchmarks.gpu"]
    done = subprocess.run(
        [*command, "--device", "cpu", "--tiny", "--out", file, "--folder", tmp_path],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(file.read_text())
    assert (written["left_out"], written["machine"]["kind"]) == ([], "CPU")
    assert "**Figures of a CPU" in file.with_suffix(".md").read_text()
    rows = written["rows"]
    assert list(dict.fromkeys(row["part"] for row in rows)) == [
        *("differences", "bare", "warm", "epoch"),
    ]  # fmt: skip
    apart = {row["what"]: row["value"] for row in rows if row["part"] == "differences"}
    assert len(apart) == 2 * (len(POOLINGS) + 1)
    assert max(apart.values()) <= 1
    [in_workers] = [row["value"] for row in rows if row["unit"] == "windows"]
    assert in_workers == 0


def test_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "mps"])
    with pytest.raises(SystemExit, match="--device mps without --tiny"):
        main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cuda:0"])
    with pytest.raises(SystemExit, match="--device cpu --tiny tries the script"):
        main()
