"""Warming by several processes and machines: the same records, each computed once."""

from __future__ import annotations

import json
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import distributed
import pytest

from feature_cache import FeatureCache
from feature_cache.store.maintenance import verify
from feature_cache.testing import FakeBackbone
from feature_cache.warm import Recipe, cluster, find_sources, plan_warm, run_warm
from shared_folder import Lab, contents, counts, end, finish, interrupt, lines, wait_until

POOLINGS = ("--pooling", "mean_patches_exact", "--pooling", "nearest_patch")


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    return Lab(tmp_path)


@pytest.mark.slow
def test_all_ways_give_the_same_records(lab: Lab) -> None:
    movies = [lab.write_movie(f"movie{i}", 40, i) for i in range(2)]
    options = (*POOLINGS, "--copies", 2, "--dense", "original")
    planned = 2 * 40 * (2 * 3 + 1)
    report = finish(lab.warm("alone", movies, *options))
    assert (report["planned"], report["computed"], report["failed"]) == (planned, planned, 0)
    report = finish(lab.warm("local", movies, *options, "--local-workers", 2))
    assert (report["computed"], report["failed"]) == (planned, 0)
    with lab.cluster(2) as dask:
        report = finish(lab.warm("dask", movies, *options, "--scheduler", dask.address))
        assert (report["computed"], report["failed"]) == (planned, 0)
    for number, (stop, code) in enumerate([(signal.SIGTERM, 143), (signal.SIGKILL, -9)]):
        logs = lab.logs(f"killed{number}", 0.01)
        process = lab.warm("killed", movies, *options)
        wait_until(lambda logs=logs: len(lines(logs)) > 40, "a run to be in the middle")
        end(process, stop)
        assert process.returncode == code
    lab.logs("last")
    report = finish(lab.warm("killed", movies, *options))
    assert report["present"] > 40
    assert report["present"] + report["computed"] == planned
    expected = contents(lab.root / "alone")
    assert len(expected) == planned
    for other in ("local", "dask", "killed"):
        assert contents(lab.root / other) == expected
    # Workers that are killed at the end leave the files that say they live.
    assert {finding.kind for finding in verify(lab.root / "dask", deep=True)} <= {"leftover"}


@pytest.mark.slow
def test_a_killed_worker_costs_its_units_and_nothing_else(lab: Lab) -> None:
    movies = [lab.write_movie(f"movie{i}", 200, i) for i in range(2)]
    reference = FeatureCache(lab.root / "reference")
    sources, _ = find_sources(map(str, movies))
    run_warm(plan_warm(reference, sources, FakeBackbone(8, 8)))
    logs = lab.logs("logs", 0.02)
    with lab.cluster(2) as dask:
        process = lab.warm("cache", movies, "--scheduler", dask.address)
        wait_until(lambda: len(lines(logs)) > 150, "the middle of the work")
        victim = dask.workers[0]
        victim.send_signal(signal.SIGKILL)
        report = finish(process)
    assert (report["planned"], report["failed"]) == (400, 0)
    assert contents(lab.root / "cache") == contents(lab.root / "reference")
    embedded = counts(logs)
    twice = {digest for digest, times in embedded.items() if times > 1}
    print(f"400 records, {embedded.total()} embedded, {len(twice)} twice")
    assert len(embedded) == 400
    assert max(embedded.values()) <= 2
    died_at = logs / str(victim.pid)  # not there where it died before its first frame
    assert twice <= set(died_at.read_text().splitlines() if died_at.exists() else ())
    assert len(twice) <= 2 * 64  # the two units that it was at


@pytest.mark.slow
@pytest.mark.parametrize("where", ["alone", "on one cluster"])
def test_overlapping_runs_compute_each_record_once(lab: Lab, where: str) -> None:
    movies = [lab.write_movie(f"movie{i}", 40, i) for i in range(3)]
    logs = lab.logs("logs", 0.01)
    runs = (movies[:2], "--copies", 1), (movies[1:], "--copies", 2)
    if where == "alone":
        reports = [finish(run) for run in [lab.warm("cache", *run) for run in runs]]
    else:
        with lab.cluster(2) as dask:
            options = ("--scheduler", dask.address)
            started = [lab.warm("cache", *run, *options) for run in runs]
            reports = [finish(run) for run in started]
    assert [report["planned"] for report in reports] == [160, 240]
    assert [report["failed"] for report in reports] == [0, 0]
    embedded = counts(logs)
    distinct = 40 * (2 + 3 + 3)
    print(f"{distinct} records, {embedded.total()} embedded")
    assert len(contents(lab.root / "cache")) == distinct
    assert embedded.total() == len(embedded) == distinct
    if where == "alone":
        assert sum(report["computed"] for report in reports) == distinct


@pytest.mark.slow
def test_a_scheduler_that_goes_away_fails_what_is_left(lab: Lab) -> None:
    movie = lab.write_movie("movie", 240, 0)
    logs = lab.logs("logs", 0.02)
    file = lab.root / "report.json"
    with lab.cluster(1) as dask:
        options = ("--scheduler", dask.address, "--report", file)
        process = lab.warm("cache", [movie], *options)
        wait_until(lambda: len(lines(logs)) > 130, "the middle of the work")
        dask.scheduler.kill()
        report = finish(process, code=1)
    assert 0 < report["failed"] < 240
    assert report["planned"] == report["present"] + report["computed"] + report["failed"] == 240
    assert "the Dask scheduler at tcp://" in report["errors"][0]["reason"]
    assert json.loads(file.read_text()) == report
    report = finish(lab.warm("cache", [movie]))
    assert report["present"] >= 64
    assert report["present"] + report["computed"] == 240


def test_no_scheduler_is_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "CONNECT_SECONDS", 0.5)
    with (
        pytest.raises(cluster.SchedulerGoneError, match="no Dask scheduler at tcp://"),
        cluster.open_client("tcp://127.0.0.1:1"),
    ):
        pass


def test_two_caches_that_lack_the_same_get_it_both(lab: Lab) -> None:
    """On one scheduler at once, where what has one name runs once."""
    recipe = Recipe("debug/random")
    movie = lab.write_movie("movie", 4, 0)
    caches = [FeatureCache(lab.root / name) for name in ("one", "two")]
    plans = [plan_warm(cache, [movie], recipe.load()) for cache in caches]
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as local,
        distributed.Client(local, set_as_default=False) as one,
        distributed.Client(local, set_as_default=False) as two,
        ThreadPoolExecutor(2) as threads,
    ):
        runs = [
            threads.submit(cluster.run_on_cluster, plan, recipe, client)
            for plan, client in zip(plans, (one, two), strict=True)
        ]
        wait_until(lambda: len(local.scheduler.tasks) == 2, "both to be asked for")
        local.scale(1)
        assert [run.result().computed for run in runs] == [4, 4]
    assert [FeatureCache(cache.store.root, "r").stats()["records"] for cache in caches] == [4, 4]


def test_a_scheduler_without_workers_is_told(
    lab: Lab, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_LOOK_SECONDS", 0.1)
    recipe = Recipe("debug/random")
    movie = lab.write_movie("movie", 4, 0)
    plan = plan_warm(FeatureCache(lab.root / "cache"), [movie], recipe.load())
    with (
        distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=":0") as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        later = threading.Timer(1.0, local.scale, [1])
        later.start()
        report = cluster.run_on_cluster(plan, recipe, client)
        later.join()
    assert report.computed == 4
    [told] = [record for record in caplog.messages if "no worker is at inproc://" in record]
    assert "waiting for one (dask worker inproc://" in told


@pytest.mark.slow
def test_a_budget_holds_on_a_cluster(lab: Lab) -> None:
    movie = lab.write_movie("movie", 200, 0)
    options = ("--dense", "original", "--max-size", "300k")
    with lab.cluster(2) as dask:
        report = finish(lab.warm("cache", [movie], *options, "--scheduler", dask.address), code=1)
    used = FeatureCache(lab.root / "cache", "r").stats()["bytes"]
    print(f"{used} bytes of 300,000 used")
    assert 100_000 < used <= 300_000
    assert report["planned"] == report["computed"] + report["failed"] == 400
    assert "--max-size 300,000" in report["errors"][-1]["reason"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_unit_that_stops_at_its_share_and_has_failures_says_what_is_left(lab: Lab) -> None:
    root = lab.write_movie("movie", 40, 0)
    cache = FeatureCache(lab.root / "cache")
    recipe = Recipe("debug/random")
    plan = plan_warm(cache, [root], recipe.load(), pooling=[None])
    (root / "t001.tif").write_bytes((root / "t002.tif").read_bytes())
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, processes=False, dashboard_address=":0"
        ) as local,
        distributed.Client(local, set_as_default=False) as client,
    ):
        report = cluster.run_on_cluster(plan, recipe, client, batch_size=2, max_bytes=400_000)
    assert report.planned == 40
    assert 0 < report.computed < 39
    assert report.computed + report.failed == 40
    reasons = " ".join(failure.reason for failure in report.failures)
    assert "run the same again" in reasons


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--local-workers", 2)], ids=["alone", "two workers"])
def test_ctrl_c_commits_what_is_computed(lab: Lab, options: tuple[object, ...]) -> None:
    movie = lab.write_movie("movie", 400, 0)
    logs = lab.logs("logs", 0.02)
    process = lab.warm("cache", [movie], "--batch-size", 4, *options)
    wait_until(lambda: len(lines(logs)) > 50, "the middle of the work")
    said = interrupt(process)
    assert process.returncode == 130
    there = len(contents(lab.root / "cache"))
    assert f"computing: {there} of 400 records" in said
    assert "INFO" not in said
    lost = len(lines(logs)) - there
    print(f"{there} records, {lost} embedded and lost")
    assert lost <= (0 if options else 4)  # alone, the batch that it is at
    assert 40 < there < 400
    assert not list((lab.root / "cache" / "claims").iterdir())
    report = finish(lab.warm("cache", [movie]))
    assert (report["present"], report["computed"]) == (there, 400 - there)


@pytest.mark.slow
def test_workers_send_what_they_write(lab: Lab) -> None:
    movies = [lab.write_movie(f"movie{i}", 70, i) for i in range(2)]
    remote = lab.root / "remote"
    report = finish(lab.warm("cache", movies, "--local-workers", 2, "--push", f"file://{remote}"))
    assert (report["computed"], report["errors"]) == (140, [])
    assert contents(remote) == contents(lab.root / "cache")
