"""Movies in the layout of the Cell Tracking Challenge: frames and masks, read lazily.

::

    01/t000.tif …                      frames (or 01/img/*.tif)
    01_GT/TRA/man_track000.tif …       masks, with man_track.txt (or 01/TRA)
    01_ST/SEG/man_seg000.tif …         silver truth, merged into the masks of 01_GT/TRA
    01_ERR_SEG/mask000.tif …           any other detections (or 01/<name>)

Which folder holds what, and the merging of silver truth, follow ``CTCData`` of trackastra 0.5.6, so
that masks warmed here have the keys of those in training.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import sparse

from .errors import MovieError, MovieNotFoundError, NoMasksError

Masks = NDArray[np.int32]
Tracks = NDArray[np.int64]
"""(N, 4) int64: label, first frame, last frame, parent's label or 0, as in man_track.txt."""


@dataclass(frozen=True)
class TiffSeries:
    """Images of one folder, each read when asked for.

    Parameters
    ----------
    files : sequence of Path
    downscale : int
        Every n-th pixel of each axis.
    overlays : sequence of Path
        As many files as `files`, or none; the larger pixel counts.
    labels : bool
        Whether the images are masks: int32, as Trackastra holds them.
    """

    files: tuple[Path, ...]
    downscale: int = 1
    overlays: tuple[Path, ...] = ()
    labels: bool = False

    def __len__(self) -> int:
        """Count the images."""
        return len(self.files)

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read image `t`: (H, W) or (Z, H, W).

        Raises
        ------
        MovieError
            If the file can't be read.
        """
        image = self._read(self.files[t])
        if self.overlays:
            overlay = self._read(self.overlays[t])
            if overlay.shape != image.shape:
                raise MovieError(
                    f"{self.files[t]} has shape {image.shape} and {self.overlays[t]} "
                    f"{overlay.shape}: expected the same"
                )
            image = np.maximum(image, overlay)
        return image[(slice(None, None, self.downscale),) * image.ndim]

    def _read(self, file: Path) -> NDArray[Any]:
        image = read_tiff(file)
        if not self.labels:
            return image
        with np.errstate(invalid="ignore"):
            labels = image.astype(np.int32)
        wrong = image[labels != image]
        if wrong.size:
            raise MovieError(
                f"{file} holds {image.dtype} values that are no labels, such as {wrong[0]}: "
                "expected whole numbers from 0 to 2147483647; relabel the mask"
            )
        return labels

    @property
    def folder(self) -> str:
        """The movie's folder, for people; empty where there are no images."""
        parent = self.files[0].parent if self.files else Path()
        return str(parent.parent if parent.name == "img" else parent) if self.files else ""

    def name_of(self, t: int) -> str:
        """Name the file of image `t`."""
        return self.files[t].name

    def files_of(self, t: int) -> tuple[Path, ...]:
        """Give all files that image `t` is made from."""
        return (self.files[t], self.overlays[t]) if self.overlays else (self.files[t],)

    @property
    def recipe(self) -> str:
        """Say what, besides the files, decides the pixels."""
        kind = "labels" if self.labels else "pixels"
        return f"{kind}, downscale {self.downscale}, tifffile {tifffile.__version__}"


def read_tiff(file: Path) -> NDArray[Any]:
    """Read one TIFF file.

    Raises
    ------
    MovieError
        If it is missing or damaged, or in colour.
    """
    with _open_tiff(file) as series:
        return np.asarray(series.asarray())


@contextmanager
def _open_tiff(file: Path) -> Iterator[tifffile.TiffPageSeries]:
    """Give the images of a file; whatever is wrong with it, or with reading it, is a MovieError."""
    try:
        with tifffile.TiffFile(file) as opened:
            series = opened.series[0]
            if "S" in series.axes:
                raise MovieError(
                    f"{file} is a colour image of shape {series.shape}: convert it to one channel"
                )
            yield series
    except MovieError:
        raise
    except PermissionError as error:
        raise MovieError(f"no permission to read {file}") from error
    except (
        OSError,
        ValueError,
        IndexError,
        KeyError,
        RuntimeError,
        struct.error,
        tifffile.TiffFileError,
    ) as error:
        found = error.strerror if isinstance(error, OSError) else f"damaged, or no TIFF ({error})"
        raise MovieError(f"can't read {file}: {found}; restore the file or leave it out") from error


@dataclass(frozen=True)
class Movie:
    """Frames and the masks of one detection folder.

    Attributes
    ----------
    root : Path
        The folder of the frames.
    frames : TiffSeries
    masks : TiffSeries or None
        As many as frames; None where the movie was opened without.
    detections : str or None
        The detection folder's name as asked for.
    detection_folder : Path or None
    """

    root: Path
    frames: TiffSeries
    masks: TiffSeries | None = None
    detections: str | None = None
    detection_folder: Path | None = None

    @classmethod
    def open(
        cls,
        path: str | Path,
        detections: str | None = "TRA",
        *,
        slice_pct: tuple[float, float] = (0.0, 1.0),
        downscale_temporal: int = 1,
        downscale_spatial: int = 1,
    ) -> Movie:
        """Find a movie's files; reads none of them, but for the shape of an only one.

        Parameters
        ----------
        path : path
            ``01``, ``01_GT/TRA`` or ``01_ERR_SEG``; or a folder with ``img`` and ``TRA`` in it.
        detections : str
            Where the masks are, such as ``"TRA"`` or ``"ERR_SEG"``; None opens frames alone.
        slice_pct : (float, float)
            Part of the movie, from and to, 0 to 1.
        downscale_temporal, downscale_spatial : int
            Every n-th frame, every n-th pixel.

        Raises
        ------
        MovieNotFoundError
            No such folder.
        MovieError
            No frames or masks in it, not as many, or other numbers in their names; a stack in
            place of a movie.
        """
        _check_part(path, slice_pct, downscale_temporal, downscale_spatial)
        try:
            root, default = _find_root(path)
            image_files = _list_tiffs(image_folder(root), "frames")
            _check_no_stack(image_files)
            if detections is None:
                part = _part_of(len(image_files), slice_pct, downscale_temporal)
                return cls(root, TiffSeries(image_files[part], downscale_spatial))
            folder = _find_detections(root, default or detections)
            mask_files = _list_tiffs(folder, f"masks ({detections})")
        except PermissionError as error:
            raise MovieError(f"no permission to look into {error.filename}") from error
        _check_pairs(image_files, mask_files, (root, "frames"), (folder, "masks"))
        overlays = _find_overlays(folder, mask_files)
        part = _part_of(len(mask_files), slice_pct, downscale_temporal)
        return cls(
            root=root,
            frames=TiffSeries(image_files[part], downscale_spatial),
            masks=TiffSeries(mask_files[part], downscale_spatial, overlays[part], labels=True),
            detections=detections,
            detection_folder=folder,
        )

    def __len__(self) -> int:
        """Count the frames."""
        return len(self.frames)

    @property
    def name(self) -> str:
        """Folder and detections: how errors and provenance call the movie."""
        return f"{self.root} {self.detections or ''}".rstrip()

    @cached_property
    def tracks(self) -> Tracks:
        """(N, 4): label, first and last frame (of the whole movie), parent; from man_track.txt.

        Raises
        ------
        MovieError
            If there is no such file, or it holds anything else.
        """
        if self.detection_folder is None:
            raise MovieError(f"{self.root} was opened without masks, so it has no tracks")
        return read_tracks(self.detection_folder / "man_track.txt")


def _part_of(count: int, slice_pct: tuple[float, float], step: int) -> slice:
    return slice(int(count * slice_pct[0]), int(count * slice_pct[1]), step)


def _check_part(path: str | Path, slice_pct: tuple[float, float], *downscales: int) -> None:
    if not 0 <= slice_pct[0] < slice_pct[1] <= 1:
        raise MovieError(f"{path}: slice_pct is {slice_pct}, expected 0 <= from < to <= 1")
    if min(downscales) < 1:
        raise MovieError(f"{path}: downscale is {min(downscales)}, expected 1 or more")


def _find_root(given: str | Path) -> tuple[Path, str | None]:
    """Give the folder of the frames, and the detections that the path itself names."""
    path = Path(given).expanduser()
    path = path.absolute() if path.name in ("", "..") else path
    root, detections = _split_path(path)
    if not root.is_dir():
        found = "not a folder" if root.exists() else "no such folder"
        raise MovieNotFoundError(f"no movie at {root}: {found}")
    return root, detections


def _split_path(path: Path) -> tuple[Path, str | None]:
    if path.name == "TRA":
        return path.parent.parent / path.parent.name.split("_")[0], "TRA"
    if "ERR_SEG" in path.name:
        return path.parent / path.name.split("_")[0], "ERR_SEG"
    return path, None


def _find_detections(root: Path, name: str) -> Path:
    guesses = detection_places(root, name)
    for folder in guesses:
        if folder.is_dir():
            return folder
    raise NoMasksError(
        f"{root} has no masks {name!r}: looked for {', '.join(map(str, guesses))}; "
        "name the detection folder (--detections)"
    )


def detection_places(root: Path, name: str) -> tuple[Path, ...]:
    """Give the folders that a movie's detections may be in; the first that there is counts."""
    return root / name, Path(f"{root}_{name}"), Path(f"{root}_GT") / name


def _find_overlays(folder: Path, masks: Sequence[Path]) -> tuple[Path, ...]:
    """List the silver truth that belongs to ground truth ``<n>_GT/TRA``."""
    truth = folder.parent
    silver = truth.with_name(truth.name.removesuffix("_GT") + "_ST") / "SEG"
    if folder.name != "TRA" or not truth.name.endswith("_GT") or not silver.is_dir():
        return ()
    files = _list_tiffs(silver, "silver truth masks")
    _check_pairs(masks, files, (folder, "masks"), (silver, "silver masks"))
    return files


def _check_pairs(
    files: Sequence[Path],
    partners: Sequence[Path],
    theirs: tuple[Path, str],
    others: tuple[Path, str],
) -> None:
    """Raise where files that go together by their order are not as many, or of other times."""
    (folder, kind), (other, other_kind) = theirs, others
    if len(files) != len(partners):
        raise MovieError(
            f"{folder} has {len(files)} {kind} and {other} has {len(partners)} {other_kind}: "
            f"expected as many {other_kind} as {kind}; add what is missing or remove what is too "
            "many"
        )
    times = _times(files), _times(partners)
    if not all(times):
        return
    for file, partner, one, two in zip(files, partners, *times, strict=True):
        if one != two:
            raise MovieError(
                f"{file.name} in {folder} would go with {partner.name} in {other}: expected the "
                "same number; remove what has no partner, or rename the files"
            )


def _times(files: Sequence[Path]) -> list[int]:
    """Give the times that names end in; none where they don't, or don't ascend."""
    found = [re.findall(r"\d+", file.stem) for file in files]
    numbers = [int(digits[-1]) for digits in found if digits]
    ascend = all(after > before for before, after in pairwise(numbers))
    return numbers if ascend and len(numbers) == len(files) else []


def _check_no_stack(files: Sequence[Path]) -> None:
    """Raise where a movie's only file holds many images: a time is a file of its own."""
    if len(files) > 1:
        return
    with _open_tiff(files[0]) as series:
        shape = series.shape
    if len(shape) > 2:
        raise MovieError(
            f"{files[0]} is the only frame, and holds {shape[0]} images (shape {shape}): expected "
            "a file for each timepoint; write them as t000.tif, t001.tif, … and the masks alike"
        )


def image_folder(root: Path) -> Path:
    """Give the folder of a movie's frames: ``img`` in it, or itself."""
    return root / "img" if (root / "img").is_dir() else root


def _list_tiffs(folder: Path, kind: str) -> tuple[Path, ...]:
    files = tuple(sorted(folder.glob("*.tif")))
    if not files:
        raise MovieError(
            f"{folder} has no {kind}: expected files named *.tif{_name_others(folder)}"
        )
    return files


def _name_others(folder: Path) -> str:
    """Say what is in a folder in place of images."""
    inside = sorted(folder.iterdir())
    others = sorted({file.suffix for file in inside if file.suffix} - {".txt"})
    if others:
        return f", found {', '.join(others)}"
    folders = [one for one in inside if one.is_dir()]
    names = ", ".join(one.name for one in folders[:4])
    return f", found the folders {names}: name one, such as {folders[0]}" if folders else ""


def read_tracks(file: Path) -> Tracks:
    """Read a man_track.txt.

    Raises
    ------
    MovieError
        If there is no such file, or a line is not four whole numbers.
    """
    if not file.is_file():
        raise MovieError(f"no tracks at {file}: expected man_track.txt beside the masks")
    lines = file.read_text().splitlines()
    rows = [line for line in lines if line.strip()]
    bad = [line for line in rows if not re.fullmatch(r"\s*\d+(\s+\d+){3}\s*", line)]
    if bad:
        raise MovieError(f"{file} has the line {bad[0]!r}: expected label, first, last, parent")
    return np.array([line.split() for line in rows], np.int64).reshape(-1, 4)


def write_movie(
    root: Path, frames: Sequence[NDArray[Any]], masks: Sequence[NDArray[Any]], tracks: Tracks
) -> None:
    """Write a movie as ``<root>`` and ``<root>_GT/TRA``.

    Parameters
    ----------
    root : Path
        Such as ``data/01``.
    frames, masks : sequences of (H, W) or (Z, H, W)
        A label is the same cell over time.
    tracks : (N, 4) int64
    """
    truth = Path(f"{root}_GT") / "TRA"
    for folder in (root, truth):
        folder.mkdir(parents=True, exist_ok=True)
    for t, (frame, mask) in enumerate(zip(frames, masks, strict=True)):
        tifffile.imwrite(root / f"t{t:03d}.tif", frame, compression="zlib")
        labels = np.asarray(mask, np.uint16 if np.max(mask) < 1 << 16 else np.int32)
        tifffile.imwrite(truth / f"man_track{t:03d}.tif", labels, compression="zlib")
    np.savetxt(truth / "man_track.txt", tracks, fmt="%d")


def link_by_overlap(masks: Sequence[NDArray[Any]]) -> tuple[list[Masks], Tracks]:
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
        parents = _most_overlapped(linked[-1], mask) if linked else {}
        found = np.unique(mask[mask > 0]).tolist()
        heirs = [parents.get(label, 0) for label in found]
        lookup = np.zeros(int(mask.max()) + 1, np.int32)
        for label, parent in zip(found, heirs, strict=True):
            if parent and heirs.count(parent) == 1:
                lookup[label], tracks[parent][1] = parent, t
            else:
                lookup[label] = len(tracks) + 1
                tracks[len(tracks) + 1] = [t, t, parent]
        linked.append(lookup[mask])
    return linked, np.array([[n, *row] for n, row in tracks.items()], np.int64).reshape(-1, 4)


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
