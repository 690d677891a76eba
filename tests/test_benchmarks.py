"""The benchmarks' own arithmetic, and that they run; no time is asserted on."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from benchmarks import warming
from benchmarks.__main__ import NAMES, parse_options
from benchmarks.compare import find_worse
from benchmarks.harness import (
    OURS,
    Case,
    Options,
    format_case,
    interleave,
    load_results,
    make_cold,
    resident_share,
    save_results,
    seconds_each,
)
from benchmarks.report import make_table, replace_part
from benchmarks.scale import model
from benchmarks.warming import Profile, Spent, StandIn
from feature_cache.hashing import frame_digest

ROOT = Path(__file__).parent.parent


def case(ours: list[float], theirs: list[float], name: str = "reading") -> Case:
    return Case(name, "other", {"other": theirs, OURS: ours})


def results(*cases: Case) -> dict[str, dict[str, Case]]:
    return {"windows": {case.name: case for case in cases}}


def test_a_ratio_is_that_of_two_sides_in_the_same_round():
    both = case([2.0, 9.0], [1.0, 3.0])
    assert both.ratios(OURS) == [2.0, 3.0]
    assert both.ratios("other", OURS) == [0.5, pytest.approx(1 / 3)]
    assert "2.5 x" in format_case(both)


@pytest.mark.parametrize("name", NAMES)
def test_every_benchmark_is_there(name):
    assert callable(import_module(f"benchmarks.{name}").run)


def test_each_round_runs_every_side_and_begins_with_another():
    calls: list[str] = []
    sides = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    values = interleave(sides, 3)
    assert "".join(calls) == "abcbcacab"
    assert values == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_items_are_taken_in_turns_until_the_budget_is_spent():
    seen: list[int] = []
    assert seconds_each(seen.append, [1, 2, 3], 1e-3) > 0
    assert seen[:6] == [1, 2, 3, 1, 2, 3]


def test_files_leave_the_page_cache(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    file.read_bytes()
    assert resident_share(file) == 1
    try:
        make_cold(tmp_path)
    except RuntimeError as error:
        pytest.skip(f"this file system keeps its pages: {error}")
    assert resident_share(file) <= 0.01


def test_results_come_back_from_json(tmp_path):
    before = case([0.123456, 2.0], [1.0, 3.0])
    save_results(tmp_path / "results.json", {"windows": [before]}, quick=True)
    assert load_results(tmp_path / "results.json") == results(case([0.1235, 2.0], [1.0, 3.0]))
    machine = json.loads((tmp_path / "results.json").read_text())["machine"]
    assert machine["cores"] >= 1
    assert machine["versions"]["numpy"]


@pytest.mark.parametrize(
    ("ours", "theirs", "worse"),
    [
        ([1.0, 1.1, 1.2], [1.0, 1.0, 1.0], False),
        ([2.0, 2.1, 2.2], [1.0, 1.0, 1.0], True),
        ([2.0, 2.1, 2.2], [2.0, 2.0, 2.0], False),  # another machine, half as fast
        ([0.9, 1.3, 2.2], [1.0, 1.0, 1.0], False),  # noise
        ([0.5, 0.5, 0.5], [1.0, 1.0, 1.0], False),
    ],
)
def test_what_is_worse_by_more_than_the_noise_is_named(ours, theirs, worse):
    old = results(case([1.0, 1.1, 1.2], [1.0, 1.0, 1.0]))
    found = find_worse(old, results(case(ours, theirs), case([9.0], [1.0], "something new")))
    expected = [f"windows: reading: {OURS}: 1.1 before, 2.1 now x other"] if worse else []
    assert found == expected


def test_the_table_says_what_was_measured_and_what_was_not_reached():
    window = Case("8 x 50 x 256 warm", "np.memmap", {"np.memmap": [1.0], OURS: [1.5]})
    [_, _, line] = make_table(results(window))
    assert line == (
        "| a window in memory, against np.memmap | at most 1.1 x | 1.5 x | 1.5 x to 1.5 x "
        "| not reached |"
    )


def test_only_what_is_between_the_marks_is_replaced(tmp_path):
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end of table -->\nafter\n")
    replace_part(page, "table", "new")
    replace_part(page, "table", "newer")
    assert page.read_text() == "before\n<!-- table -->\nnewer\n<!-- end of table -->\nafter\n"
    with pytest.raises(ValueError, match="no part"):
        replace_part(page, "scale", "new")


def test_the_model_goes_on_from_the_two_largest_numbers():
    cases = {
        f"{count:,} records: {what}": Case(f"{count:,} records: {what}", "", {OURS: [value]})
        for what in ("opening", "memory")
        for count, value in ((10**3, 7.0), (10**5, 1.0), (10**6, 10.0))
    }
    row = model(cases, trainers=1)[3]
    assert row.startswith("| 10,000,000 | 3,907 | 100 s | 0.1 GB |")
    with pytest.raises(ValueError, match="expected two"):
        model({}, trainers=1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "can't read old.json: No such file or directory"),
        ("{}", "old.json holds no results: expected what --json FILE writes"),
        ("[", "old.json holds no results: expected what --json FILE writes"),
    ],
)
def test_what_can_not_be_compared_with_is_said_first(tmp_path, monkeypatch, capsys, text, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--compare", "old.json"])
    if text is not None:
        Path("old.json").write_text(text)
    with pytest.raises(SystemExit):
        parse_options()
    assert capsys.readouterr().err.endswith(f"error: argument --compare: {says}\n")


def test_processor_time_goes_to_what_a_thread_is_at():
    stop = threading.Event()
    busy = threading.Thread(target=hash_until, args=(stop,))
    idle = threading.Thread(target=stop.wait)
    with Profile() as profile:
        for thread in (busy, idle):
            thread.start()
        time.sleep(0.3)
        stop.set()
    busy.join()
    idle.join()
    assert profile.seconds["hashing"] > profile.seconds["the rest"]


def hash_until(stop: threading.Event) -> None:
    while not stop.is_set():
        frame_digest(np.zeros((1024, 1024), np.float32))


@pytest.mark.parametrize("way", warming.WAYS)
def test_in_the_model_every_record_is_computed_and_waited_for(tmp_path, monkeypatch, way):
    slept: list[float] = []
    monkeypatch.setattr(warming.time, "sleep", slept.append)
    stages = dict.fromkeys(warming.STAGES, 0.125)
    job = warming.make_model(Spent(1.0, stages, read=0.5), StandIn(0.0, 4, 4), 3, tmp_path)
    warming.WAYS[way](job)
    assert job.backbone.frames == job.records == 3 * 16
    assert slept.count(0.25) >= job.records  # a mask, drawn and pooled
    assert slept.count(0.5) == job.frames.reads >= 3


@pytest.mark.slow
def test_a_benchmark_runs_and_is_compared(tmp_path):
    out = tmp_path / "out.json"
    old = {"machine": {}, "quick": True, "benchmarks": {"hashing": []}}
    (tmp_path / "old.json").write_text(json.dumps(old))
    command = [sys.executable, "-m", "benchmarks", "--quick", "--only", "hashing", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--json", out, "--compare", tmp_path / "old.json"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Nothing is worse" in done.stdout
    frame, movie, _ = load_results(out)["hashing"].values()
    assert set(frame.values) == {"reading the TIFFs", OURS, "the same by sha256"}
    assert [len(values) for values in movie.values.values()] == [1, 1]


@pytest.mark.slow
def test_windows_are_equal_in_all_formats(tmp_path):
    from benchmarks.data import Collection
    from benchmarks.formats import FORMATS
    from benchmarks.windows import compare_windows

    collection = Collection(tmp_path, movies=1, copies=2, frames=9, regions=5, width=8)
    cases = compare_windows(collection, Options(tmp_path, quick=True, rounds=1))
    assert {"np.memmap", "in memory", OURS} <= set(cases[0].values)
    assert set(cases[0].values) - {name for name in cases[0].values if OURS in name} <= set(FORMATS)
