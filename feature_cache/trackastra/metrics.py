"""How good tracks are: written as the Cell Tracking Challenge has them, scored by traccuracy."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from trackastra.tracking import graph_to_ctc

from ..errors import MovieError, MovieNotFoundError, importing
from ..movies import ReadOptions, Tracks, read_image, read_tracks
from ..movies.formats import list_images
from ..movies.times import order_files
from ..output_files import check_folder

with importing("traccuracy", "scoring tracks", 'pip install "feature-cache[trackastra]"'):
    from traccuracy import TrackingGraph
    from traccuracy.matchers import CTCMatcher
    from traccuracy.metrics import CTCMetrics, DivisionMetrics

_FILES = ("*.tif", "*_track.txt")
"""What the folder of a result is read from."""


def write_tracks(graph: Any, masks: NDArray[Any], folder: str | os.PathLike[str]) -> Path:
    """Write what ``Trackastra.track`` gave as a folder of masks and ``man_track.txt``.

    Parameters
    ----------
    graph : networkx.DiGraph
        The tracks; a cell that they leave out is not in the masks that are written.
    masks : (T, H, W) or (T, Z, H, W) int
    folder : path
        Made where it is missing. An earlier result of as many frames or fewer is written over.

    Returns
    -------
    Path
        `folder`.

    Raises
    ------
    MovieError
        The folder has other masks or tracks, such as those of a longer movie. Nothing is written.
    NotWrittenError
        It can't be written.
    """
    folder = Path(folder)
    check_result(folder, len(masks))
    graph_to_ctc(graph, masks, outdir=folder)
    return folder


def check_result(folder: Path, frames: int) -> None:
    """Look whether tracks of so many frames can be written to a folder; errors as `write_tracks`.

    Writes nothing.
    """
    check_folder(folder)
    written = {"man_track.txt", *(f"man_track{t:04d}.tif" for t in range(frames))}
    present = {file.name for pattern in _FILES for file in folder.glob(pattern)}
    others = sorted(present - written)
    if others:
        raise MovieError(
            f"{folder} has {len(others)} files that are not of these {frames} frames, such as "
            f"{others[0]}: expected an empty folder, or an earlier result to write over; remove "
            "them, or name another folder"
        )


def cut_tracks(tracks: Tracks, first: int, stop: int) -> Tracks:
    """Give the tracks of the frames `first` to `stop` - 1, counted from `first`.

    A daughter whose parent is not in these frames has none.
    """
    part = tracks[(tracks[:, 1] < stop) & (tracks[:, 2] >= first)]
    spans = np.clip(part[:, 1:3], first, stop - 1) - first
    parents = np.where(np.isin(part[:, 3], part[:, 0]), part[:, 3], 0)
    return np.column_stack([part[:, 0], spans, parents])


def score_tracks(
    truth: str | os.PathLike[str], result: str | os.PathLike[str], *, first: int = 0
) -> dict[str, float]:
    """Compare tracks with the truth, link by link.

    Parameters
    ----------
    truth, result : path
        Folders of masks with a man_track.txt (or any ``*_track.txt``), such as ``01_GT/TRA`` and
        what `write_tracks` writes.
    first : int
        The frame of the truth that is the first one of the result, which may end before it.

    Returns
    -------
    dict
        ``links``, the number in the truth; ``found`` and ``missed`` of them; ``wrong``, those in
        the result that join two cells of the truth that are not linked; ``links_f1``; ``AOGM`` and
        ``TRA`` of the challenge; ``divisions`` in the truth, and ``division_f1`` where there are
        any, with every cell in one detection.

    Raises
    ------
    MovieNotFoundError
        No such folder.
    MovieError
        A folder without tracks or masks, or whose masks and tracks disagree.
    ValueError
        The truth has no links.

    Notes
    -----
    A cell is found where a mask covers more than half of its own (traccuracy's ``CTCMatcher``).
    """
    tracked = _read_graph(Path(result))
    frames = len(tracked.segmentation)
    known = _read_graph(Path(truth), first, first + frames)
    if not known.graph.number_of_edges():
        raise ValueError(f"{truth} has no links in frames {first} to {first + frames - 1}")
    links = known.graph.number_of_edges()
    with warnings.catch_warnings():  # that the boxes of cells are found in the masks
        warnings.filterwarnings("ignore", ".*regionprops", UserWarning)
        matched = CTCMatcher().compute_mapping(known, tracked)
    errors = CTCMetrics().compute(matched).results
    missed, wrong = errors["fn_edges"], errors["fp_edges"]
    scores = {
        "links": links,
        "found": links - missed,
        "missed": missed,
        "wrong": wrong,
        "links_f1": 2 * (links - missed) / (2 * (links - missed) + missed + wrong),
        "AOGM": errors["AOGM"],
        "TRA": errors["TRA"],
        "divisions": len(known.get_divisions()),
    }
    if scores["divisions"] and matched.matching_type == "one-to-one":
        divisions = DivisionMetrics().compute(matched).results["Frame Buffer 0"]
        scores["division_f1"] = divisions["Division F1"]
    return scores


def _read_graph(folder: Path, first: int = 0, stop: int | None = None) -> TrackingGraph:
    """Read the frames `first` to `stop` - 1 of a folder in the challenge's format."""
    if not folder.is_dir():
        why = "not a folder" if folder.exists() else "no such folder"
        raise MovieNotFoundError(f"no tracks at {folder}: {why}")
    found = sorted(folder.glob(_FILES[1]))
    files = _find_masks(folder)[first:stop]
    if not files or len(found) != 1 or (stop is not None and len(files) != stop - first):
        inside = f"; did you mean {folder / 'TRA'}?" if (folder / "TRA").is_dir() else ""
        raise MovieError(
            f"{folder} has {len(files)} masks from frame {first} on and {len(found)} files named "
            f"*_track.txt: expected {'some' if stop is None else stop - first}, and one{inside}"
        )
    tracks = cut_tracks(read_tracks(found[0]), first, first + len(files))
    masks = np.stack([read_image(file, ReadOptions(labels=True)) for file in files])
    for t, mask in enumerate(masks):
        _check_labels(mask, tracks[(tracks[:, 1] <= t) & (t <= tracks[:, 2]), 0], files[t])
    return TrackingGraph(_link(tracks), masks, location_keys=())


def _find_masks(folder: Path) -> tuple[Path, ...]:
    """List the masks of a folder in the order of time; none where there are none."""
    if not any(folder.glob(_FILES[0])):
        return ()
    return order_files(list_images(folder, "masks"), folder, "masks").files


def _check_labels(mask: NDArray[Any], listed: NDArray[np.int64], file: Path) -> None:
    drawn = np.unique(mask[mask > 0])
    if not np.array_equal(drawn, np.sort(listed)):
        odd = np.setxor1d(drawn, listed)
        raise MovieError(
            f"{file} has {len(drawn)} labels and the tracks beside it have {len(listed)} in this "
            f"frame; in one of them only: {', '.join(map(str, odd[:5]))}; write both anew"
        )


def _link(tracks: Tracks) -> Any:
    """Make a graph with a node for each label and frame; its nodes are integers."""
    graph = nx.DiGraph()
    lengths = tracks[:, 2] - tracks[:, 1] + 1
    last = dict(zip(tracks[:, 0].tolist(), (np.cumsum(lengths) - 1).tolist(), strict=True))
    for label, start, end, parent in tracks.tolist():
        first = last[label] - (end - start)
        nodes = range(first, last[label] + 1)
        graph.add_nodes_from(
            (node, {"segmentation_id": label, "t": start + node - first}) for node in nodes
        )
        nx.add_path(graph, [last[parent], *nodes] if parent else nodes)
    return graph
