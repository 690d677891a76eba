"""Tracks written in the challenge's format, and their scores."""

from __future__ import annotations

from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import tifffile

from feature_cache.errors import MovieError
from feature_cache.movies import read_tracks, write_movie
from feature_cache.testing import moving_movie
from feature_cache.trackastra.metrics import cut_tracks, score_tracks, write_tracks
from synthetic import make_movie

CELLS, FRAMES = 5, 6


@pytest.fixture
def truth(small_folder) -> Path:
    return Path(f"{small_folder()}_GT") / "TRA"


def graph_of(masks, leave_out=(), exchange_at=None) -> nx.DiGraph:
    """Link cells of equal labels, as Trackastra does; labels 1 and 2 are exchanged in one step."""
    graph = nx.DiGraph()
    for t, mask in enumerate(masks):
        for label in np.unique(mask[mask > 0]).tolist():
            graph.add_node((label, t), time=t, label=label)
    swap = {1: 2, 2: 1}
    for label, t in list(graph):
        target = swap.get(label, label) if t == exchange_at else label
        if (label, t) not in leave_out and (target, t + 1) in graph:
            graph.add_edge((label, t), (target, t + 1))
    return graph


def test_perfect_tracks_have_all_links_and_nothing_wrong(truth, tmp_path):
    _, masks, _ = make_movie()
    result = write_tracks(graph_of(masks), masks, tmp_path / "result")
    scores = score_tracks(truth, result)
    assert scores["links"] == scores["found"] == CELLS * (FRAMES - 1)
    assert (scores["missed"], scores["wrong"], scores["AOGM"]) == (0, 0, 0)
    assert (scores["links_f1"], scores["TRA"], scores["divisions"]) == (1, 1, 0)
    assert "division_f1" not in scores


def test_missed_and_wrong_links_are_counted(truth, tmp_path):
    _, masks, _ = make_movie()
    graph = graph_of(masks, leave_out={(3, 0), (4, 2)}, exchange_at=1)
    scores = score_tracks(truth, write_tracks(graph, masks, tmp_path / "result"))
    assert (scores["missed"], scores["wrong"]) == (4, 2)
    assert scores["found"] == CELLS * (FRAMES - 1) - 4
    assert scores["links_f1"] == pytest.approx(2 * 21 / (2 * 21 + 4 + 2))
    assert scores["AOGM"] == pytest.approx(4 * 1.5 + 2)


def test_cells_left_out_are_missed_with_their_links(truth, tmp_path):
    _, masks, _ = make_movie()
    graph = graph_of(masks)
    graph.remove_nodes_from([(5, t) for t in range(FRAMES)])
    result = write_tracks(graph, masks, tmp_path / "result")
    assert len(read_tracks(result / "man_track.txt")) == CELLS - 1
    assert score_tracks(truth, result)["missed"] == FRAMES - 1


def test_tracks_of_nothing_miss_everything(truth, tmp_path):
    _, masks, _ = make_movie()
    result = write_tracks(nx.DiGraph(), masks, tmp_path / "result")
    with pytest.warns(UserWarning, match="Mapping is empty"):
        scores = score_tracks(truth, result)
    assert (scores["found"], scores["wrong"], scores["TRA"]) == (0, 0, 0)


def test_a_part_of_the_truth_is_compared(truth, tmp_path):
    _, masks, _ = make_movie()
    result = write_tracks(graph_of(masks[2:5]), masks[2:5], tmp_path / "result")
    scores = score_tracks(truth, result, first=2)
    assert scores["links"] == scores["found"] == CELLS * 2


def test_divisions_are_scored(tmp_path):
    frames = np.zeros((3, 20, 30), np.uint16)
    masks = np.zeros_like(frames)
    masks[0, 4:16, 4:24] = 1
    masks[1:, 4:16, 4:13], masks[1:, 4:16, 15:24] = 2, 3
    tracks = np.array([[1, 0, 0, 0], [2, 1, 2, 1], [3, 1, 2, 1]])
    write_movie(tmp_path / "01", frames, masks, tracks)
    graph = graph_of(masks)
    graph.add_edge((1, 0), (2, 1))
    truth = tmp_path / "01_GT" / "TRA"
    half = score_tracks(truth, write_tracks(graph, masks, tmp_path / "half"))
    assert (half["divisions"], half["missed"]) == (1, 1)
    graph.add_edge((1, 0), (3, 1))
    whole = score_tracks(truth, write_tracks(graph, masks, tmp_path / "whole"))
    assert (whole["division_f1"], whole["links_f1"], whole["links"]) == (1, 1, 4)


def test_tracks_are_cut_with_their_parents():
    tracks = np.array([[1, 0, 3, 0], [2, 4, 9, 1], [3, 4, 5, 1], [4, 8, 9, 0], [5, 6, 8, 3]])
    assert cut_tracks(tracks, 4, 8).tolist() == [[2, 0, 3, 0], [3, 0, 1, 0], [5, 2, 3, 3]]
    assert cut_tracks(tracks, 0, 10).tolist() == tracks.tolist()


def test_masks_and_tracks_that_disagree_are_an_error(truth, tmp_path):
    mask = tifffile.imread(truth / "man_track003.tif")
    tifffile.imwrite(truth / "man_track003.tif", np.where(mask == 2, 77, mask).astype(np.uint16))
    with pytest.raises(MovieError, match=r"man_track003\.tif has 5 labels .*: 2, 77"):
        score_tracks(truth, truth)


def test_folders_that_are_too_short_or_empty_are_errors(truth, tmp_path):
    _, masks, _ = make_movie()
    result = write_tracks(graph_of(masks), masks, tmp_path / "result")
    with pytest.raises(MovieError, match="4 masks from frame 2 on"):
        score_tracks(truth, result, first=2)
    with pytest.raises(MovieError, match=r"0 masks .* and one$"):
        score_tracks(truth, tmp_path)
    with pytest.raises(MovieError, match=r"0 masks .* did you mean .*/01_GT/TRA\?"):
        score_tracks(truth.parent, result)


def test_a_result_is_written_over_but_not_where_files_would_stay(truth, tmp_path):
    _, masks, _ = make_movie()
    for stop in (4, 6, 6):
        write_tracks(graph_of(masks[:stop]), masks[:stop], tmp_path / "result")
    assert score_tracks(truth, tmp_path / "result")["missed"] == 0
    before = {file: file.read_bytes() for file in (tmp_path / "result").iterdir()}
    for folder, says in {
        tmp_path / "result": "result has 1 files that are not of these 5 frames, such as "
        r"man_track0005\.tif: expected an empty folder",
        truth: "TRA has 6 files",
    }.items():
        with pytest.raises(MovieError, match=says):
            write_tracks(graph_of(masks[:5]), masks[:5], folder)
    assert {file: file.read_bytes() for file in (tmp_path / "result").iterdir()} == before


@pytest.fixture
def still() -> tuple[np.ndarray, np.ndarray]:
    """One frame of 120x160 with 12 cells, each of its own brightness."""
    mask = np.zeros((120, 160), np.int32)
    for label in range(1, 13):
        y, x = divmod(label - 1, 4)
        mask[10 + 38 * y : 32 + 38 * y, 8 + 38 * x : 30 + 38 * x] = label
    return (mask * 100).astype(np.uint16), mask


def test_a_moving_movie_repeats_and_moves(still):
    once, again = (moving_movie(*still, 4, seed=3) for _ in range(2))
    for a, b in zip(once, again, strict=True):
        np.testing.assert_array_equal(a, b)
    frames, masks, _ = once
    assert (frames.dtype, masks.dtype, frames.shape) == (np.float32, np.int32, (4, 120, 160))
    np.testing.assert_array_equal(masks[0] > 0, still[1] > 0)
    assert (masks[1] != masks[0]).mean() > 0.05
    other = moving_movie(*still, 4, seed=4)
    assert (other[1][1] != masks[1]).any()


def test_a_moving_movies_labels_are_the_same_cells(still):
    frames, masks, tracks = moving_movie(*still, 6, seed=1, speed=5.0, noise=0.0)
    shown = np.where(masks > 0, frames, np.nan)
    for label, start, end, parent in tracks.tolist():
        assert parent == 0
        present = [t for t in range(6) if (masks[t] == label).any()]
        assert present == list(range(start, end + 1))
        brightness = [np.nanmedian(shown[t][masks[t] == label]) for t in present]
        assert max(brightness) - min(brightness) < 50  # the next cell differs by 100


def test_frames_left_out_are_those_between(still):
    options = {"speed": 4.0, "noise": 0.0}
    every, third = (moving_movie(*still, n, 5, every=k, **options) for n, k in ((7, 1), (3, 3)))
    np.testing.assert_array_equal(every[0][::3], third[0])
    np.testing.assert_array_equal(every[1][::3] > 0, third[1] > 0)


def test_cells_that_leave_and_come_back_are_others(still):
    frame, mask = still
    _, masks, tracks = moving_movie(frame, mask, 12, 0, speed=12.0, size=(80, 80))
    assert masks.shape == (12, 80, 80)
    starts, ends = tracks[:, 1], tracks[:, 2]
    assert (starts > 0).any()
    assert (ends < 11).any()
    with pytest.raises(ValueError, match="larger than the frame"):
        moving_movie(frame, mask, 2, 0, size=(80, 400))


def test_perfect_tracks_of_a_moving_movie_score_one(still, tmp_path):
    frames, masks, tracks = moving_movie(*still, 5, seed=2, size=(90, 120))
    write_movie(tmp_path / "01", frames, masks, tracks)
    result = write_tracks(graph_of(masks), masks, tmp_path / "result")
    scores = score_tracks(tmp_path / "01_GT" / "TRA", result)
    assert (scores["links_f1"], scores["links"]) == (1, int((tracks[:, 2] - tracks[:, 1]).sum()))
