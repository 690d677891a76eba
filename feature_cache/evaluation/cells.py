"""The cells of a movie: where they are, what shape they have, and which cell each comes from."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FrameError, MovieError
from ..hashing import mask_labels
from ..key import Record
from ..movies import Masks, Movie, link_by_overlap
from ..normalize import normalize
from ..spec import Normalization
from ..units import count_text

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Cells:
    """All cells of a movie, in the order of frames and labels.

    Attributes
    ----------
    movie : str
        Its name.
    truth : str
        Where the links come from: ``"man_track.txt"``, with what cells it lacks, or ``"overlap"``.
    frames : (N,) int64
    labels : (N,) int64
        As in the masks.
    tracks : (N,) int64
        Which track each is of: equal in consecutive frames for the same cell.
    parents : dict of int to int
        The track that another comes from.
    places : (N, ndim) float64
        Centroids, in pixels.
    shapes : (N, S) float64
        Logarithm of the size; second moments, as lengths in pixels; mean and deviation of the
        pixels, between the percentiles 1 and 99.8 of the frame.
    """

    movie: str
    truth: str
    frames: NDArray[np.int64]
    labels: NDArray[np.int64]
    tracks: NDArray[np.int64]
    parents: dict[int, int]
    places: Floats
    shapes: Floats

    @classmethod
    def of(cls, movie: Movie) -> Cells:
        """Measure the cells of a movie, and read or make their links.

        Raises
        ------
        MovieError
            The movie has no masks, or no cell; it can't be read.
        FrameError
            A mask has labels that are none.
        """
        if movie.masks is None:
            raise MovieError(
                f"{movie.name or 'a movie'} was opened without masks: it has no cells to compare"
            )
        measured = [
            _measure(movie.frames[t], mask_labels(movie.masks[t], f"mask {t} of {movie.name}"))
            for t in range(len(movie))
        ]
        counts = [len(labels) for labels, _, _ in measured]
        if not any(counts):
            raise MovieError(
                f"{movie.name or 'a movie'} has no cell in any of its {len(movie)} masks"
            )
        labels = np.concatenate([one for one, _, _ in measured])
        places = np.concatenate([one for _, one, _ in measured])
        shapes = np.concatenate([one for _, _, one in measured])
        file = None if movie.detection_folder is None else movie.detection_folder / "man_track.txt"
        if file is not None and file.is_file():
            truth, tracks, table = "man_track.txt", labels, movie.tracks
            unknown = np.setdiff1d(labels, table[:, 0])
            if len(unknown):
                truth += f" and labels ({count_text(len(unknown), 'cell')} without a line)"
        else:
            truth = "overlap"
            masks = [movie.masks[t] for t in range(len(movie))]
            linked, table = link_by_overlap(masks)
            tracks = np.concatenate(
                [_take_each(new, mask) for new, mask in zip(linked, masks, strict=True)]
            )
        parents = {int(label): int(parent) for label, _, _, parent in table if parent}
        frames = np.repeat(np.arange(len(movie)), counts)
        return cls(movie.name, truth, frames, labels, tracks, parents, places, shapes)

    def __len__(self) -> int:
        """Count the cells."""
        return len(self.frames)

    def find_links(self, step: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        """Give each cell whose parent is in the frame `step` before, and that parent: rows, (L,).

        The parent is the same cell; or, where that is not born yet, the nearest of its ancestors
        that is. A cell that is missing in that frame only has none.
        """
        frames, tracks = self.frames.tolist(), self.tracks.tolist()
        rows = {place: row for row, place in enumerate(zip(frames, tracks, strict=True))}
        births = dict(zip(reversed(tracks), reversed(frames), strict=True))
        links = []
        for row, (frame, track) in enumerate(zip(frames, tracks, strict=True)):
            seen = {track}
            while births.get(track, frame) > frame - step:
                track = self.parents.get(track, 0)
                if not track or track in seen:
                    break
                seen.add(track)
            before = rows.get((frame - step, track))
            if before is not None:
                links.append((row, before))
        later, earlier = np.array(links, np.intp).reshape(-1, 2).T
        return later, earlier

    def select(self, records: list[Record]) -> NDArray[np.float32]:
        """Give the features of all cells, (N, C), from the records of all frames."""
        rows = [_rows_of(record, self.labels[self.frames == t], t, self.movie)
                for t, record in enumerate(records)]  # fmt: skip
        return np.concatenate(rows).astype(np.float32)


def _rows_of(record: Record, labels: NDArray[np.int64], t: int, movie: str) -> NDArray[Any]:
    if record.labels is None or not np.array_equal(record.labels, labels):
        raise FrameError(f"the record of frame {t} of {movie} has other labels than its mask")
    return record.features


def _take_each(linked: Masks, mask: Masks) -> NDArray[np.int64]:
    """Give what a relabelled mask has for each label of the mask, in their order."""
    _, first = np.unique(mask[mask > 0], return_index=True)
    return linked[mask > 0][first].astype(np.int64)


def _measure(frame: NDArray[Any], mask: NDArray[Any]) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Give labels (n,), centroids (n, ndim) and shapes (n, S) of the regions of a mask."""
    inside = np.nonzero(mask)
    labels, rows = np.unique(mask[inside], return_inverse=True)
    sizes = np.bincount(rows).astype(np.float64)

    def average(values: NDArray[Any]) -> Floats:
        return np.bincount(rows, values, len(labels)) / sizes

    places = np.stack([average(axis) for axis in inside], axis=1)
    offsets = [axis - places[rows, i] for i, axis in enumerate(inside)]
    moments = np.stack(
        [average(a * b) + (a is b) / 12 for a, b in combinations_with_replacement(offsets, 2)], 1
    )
    diagonal = [i for i, (a, b) in enumerate(combinations_with_replacement(range(mask.ndim), 2))
                if a == b]  # fmt: skip
    lengths = moments / np.sqrt(moments[:, diagonal].sum(1, keepdims=True))
    pixels = normalize(frame, Normalization())[inside].astype(np.float64)
    mean = average(pixels)
    deviation = np.sqrt(average((pixels - mean[rows]) ** 2))
    return (
        labels.astype(np.int64),
        places,
        np.column_stack([np.log(sizes), lengths, mean, deviation]),
    )
