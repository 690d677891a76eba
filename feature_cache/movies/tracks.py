"""Tracks of cells: reading, writing, and linking by overlap."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import sparse

from ..errors import MovieError
from ..hashing import mask_labels
from .image_files import IMAGE_SUFFIXES
from .text import read_text

Masks: TypeAlias = NDArray[np.int32]
Tracks: TypeAlias = NDArray[np.int64]
"""(N, 4) int64: label, first frame, last frame, parent's label or 0, as in man_track.txt."""


def read_tracks(file: str | os.PathLike[str]) -> Tracks:
    """Read a man_track.txt.

    Raises
    ------
    MovieError
        If there is no such file, or a line is not four whole numbers.
    """
    file = Path(file)
    if not file.is_file():
        raise MovieError(f"no tracks at {file}: expected man_track.txt beside the masks")
    rows = [line for line in read_text(file).splitlines() if line.strip()]
    bad = [line for line in rows if not re.fullmatch(r"\s*[0-9]{1,18}(\s+[0-9]{1,18}){3}\s*", line)]
    if bad:
        raise MovieError(f"{file} has the line {bad[0]!r}: expected label, first, last, parent")
    return np.array([line.split() for line in rows], np.int64).reshape(-1, 4)


def write_movie(
    root: str | os.PathLike[str],
    frames: Iterable[NDArray[Any]],
    masks: Iterable[NDArray[Any]],
    tracks: Tracks,
    *,
    overwrite: bool = False,
) -> None:
    """Write a movie as ``<root>`` and ``<root>_GT/TRA``; one that is there already stays.

    Parameters
    ----------
    root : path
        Such as ``data/01``.
    frames, masks : arrays (T, H, W) or (T, Z, H, W), or as many images
        A label is the same cell over time.
    tracks : (N, 4) int64
    overwrite : bool
        Whether images and tracks that are there, and other ones, are replaced.

    Raises
    ------
    MovieError
        Other numbers of frames and masks; tracks that are none; or there are images or tracks of
        another movie. Nothing is written.
    FrameError
        A mask has labels that are none.
    """
    root = Path(root)
    truth = root.with_name(f"{root.name}_GT") / "TRA"
    frames, masks = (one if isinstance(one, Sized) else list(one) for one in (frames, masks))
    if len(frames) != len(masks):
        raise MovieError(f"{len(frames)} frames and {len(masks)} masks: expected as many masks")
    table = np.asarray(tracks)
    if table.ndim != 2 or table.shape[1] != 4 or table.dtype.kind not in "iu":
        raise MovieError(
            f"tracks have shape {table.shape} and dtype {table.dtype}: expected (N, 4) whole "
            "numbers (label, first, last, parent), as tracks_of_labels gives"
        )
    parts = (
        _Part(root, "t{:03d}.tif", frames),
        _Part(truth, "man_track{:03d}.tif", masks, are_labels=True),
    )
    others = [file for part in parts for file in part.find_others()]
    if others and not overwrite:
        raise MovieError(
            f"{others[0].parent} holds images already, of which {others[0].name} is none of this "
            f"movie of {len(frames)} frames: choose another folder, or pass overwrite=True"
        )
    file = truth / "man_track.txt"
    if file.exists() and not overwrite and not np.array_equal(read_tracks(file), table):
        raise MovieError(f"{file} has other tracks: choose another folder, or pass overwrite=True")
    for other in others:
        other.unlink()
    for part in parts:
        part.write()
    np.savetxt(file, table, fmt="%d")


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """Frames or masks, and where they are written."""

    folder: Path
    name: str
    images: Iterable[Any]
    are_labels: bool = False

    def each(self) -> Iterator[tuple[Path, NDArray[Any]]]:
        """Give file and image of each time; FrameError for a mask that is none."""
        for t, image in enumerate(self.images):
            array = np.asarray(image)
            if self.are_labels:
                array = mask_labels(array, f"mask {t}")
                array = array.astype(np.uint16) if array.max() < 1 << 16 else array
            yield self.folder / self.name.format(t), array

    def find_others(self) -> list[Path]:
        """List images in the folder that are none of these."""
        there = {f for f in self.folder.glob("*") if f.suffix.lower() in IMAGE_SUFFIXES}
        for file, image in self.each():
            if file in there and _holds(file, image):
                there.remove(file)
        return sorted(there)

    def write(self) -> None:
        """Write all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, image in self.each():
            _write_tiff(file, image)


def _holds(file: Path, image: NDArray[Any]) -> bool:
    try:
        return np.array_equal(tifffile.imread(file), image)
    except (OSError, ValueError):  # cut short
        return False


def _write_tiff(file: Path, image: NDArray[Any]) -> None:
    """Write an image so that its slices, 3 or 4 of them as well, are known as such."""
    axes = {"axes": "YX" if image.ndim == 2 else "ZYX"}
    tifffile.imwrite(file, image, compression="zlib", photometric="minisblack", metadata=axes)


def link_by_overlap(masks: Iterable[NDArray[Any]]) -> tuple[list[Masks], Tracks]:
    """Give each cell one label over time, linking regions that overlap most in consecutive frames.

    A region is the continuation of the region of the frame before that it shares most pixels with,
    if no other is; two or more of the same one are its daughters, with labels of their own.

    Parameters
    ----------
    masks : sequence of (H, W) or (Z, H, W), integer
        Labels need not mean the same cell from frame to frame.

    Returns
    -------
    masks : list of int32 arrays, relabelled
    tracks : (N, 4) int64
    """
    linked: list[Masks] = []
    tracks: dict[int, list[int]] = {}
    for t, mask in enumerate(masks):
        found, inside = np.unique(mask[mask > 0], return_inverse=True)
        regions = np.zeros(mask.shape, np.int32)  # 1 to their number, however large labels are
        regions[mask > 0] = inside + 1
        parents = _most_overlapped(linked[-1], regions) if linked else {}
        heirs = Counter(parents.values())
        lookup = np.zeros(len(found) + 1, np.int32)
        for region in range(1, len(lookup)):
            parent = parents.get(region, 0)
            if heirs[parent] == 1:
                lookup[region], tracks[parent][1] = parent, t
            else:
                lookup[region] = len(tracks) + 1
                tracks[len(tracks) + 1] = [t, t, parent]
        linked.append(lookup[regions])
    return linked, np.array([[n, *row] for n, row in tracks.items()], np.int64).reshape(-1, 4)


def tracks_of_labels(masks: Iterable[NDArray[Any]]) -> Tracks:
    """Give a track for each label, of masks in which a label is the same cell over time.

    Parameters
    ----------
    masks : array (T, H, W) or (T, Z, H, W), or as many images; integer

    Returns
    -------
    (N, 4) int64
        Label, first and last frame that have it, and 0, as labels alone tell no parents.
    """
    spans: dict[int, list[int]] = {}
    for t, mask in enumerate(masks):
        for label in np.unique(mask[mask > 0]).tolist():
            spans.setdefault(label, [t, t])[1] = t
    return np.array([[n, *spans[n], 0] for n in sorted(spans)], np.int64).reshape(-1, 4)


def _most_overlapped(before: NDArray[Any], after: NDArray[Any]) -> dict[int, int]:
    """Map each label of `after` to the label of `before` that it shares most pixels with."""
    both = (before > 0) & (after > 0)
    ones = np.ones(int(both.sum()), np.int64)
    shape = int(after.max()) + 1, int(before.max()) + 1
    counts = sparse.csr_array((ones, (after[both], before[both])), shape=shape)
    counts.sum_duplicates()
    rows = np.flatnonzero(np.diff(counts.indptr))
    spans = ((r, slice(counts.indptr[r], counts.indptr[r + 1])) for r in rows)
    return {
        int(row): int(counts.indices[span][np.argmax(counts.data[span])]) for row, span in spans
    }
