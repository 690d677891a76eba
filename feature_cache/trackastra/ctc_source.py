"""What a `CTCData` was loaded from, and what it holds."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from trackastra.data import data as _ctc

from ..cache import FeatureCache
from ..errors import MovieError, MovieNotFoundError, NoMasksError
from ..movies import Images, Movie, Series
from ..movies.formats import image_folder, list_images
from ..movies.image_files import ImageFiles
from ..movies.movie import detection_places, silver_folder
from ..movies.times import TimedFiles, check_pairs, check_steps, order_files
from .lazy_arrays import HeldMasks, MaskFrames, Stack, count_masks
from .training_data import load_ctc
from .training_data_inputs import missing_detections


def load_data(given: Any, options: Mapping[str, Any], cache: FeatureCache) -> Any:
    """Load the `CTCData` of a movie, or of the one at a path, by `load_ctc`; give all else back.

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
    return load_ctc(movie.root, cache, **{**known, **options})


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
        raise missing_detections(data.root, data.detection_folders)
    return folders


def masks_of(data: Any, folder: str, *, planar: bool) -> Images:
    """Give the masks that a `CTCData` holds, or those on disk that it would read."""
    held = data.det_masks[folder]
    if isinstance(held, Stack) and isinstance(held.frames, MaskFrames):
        return held.frames.series
    return HeldMasks(held, planar=planar)


def owners_of(data: Any, folders: Sequence[str]) -> tuple[int, ...]:
    """Give, for each window, the number of its detection folder among the different ones."""
    unique = list(dict.fromkeys(folders))
    counts = [max(0, count_masks(data.det_masks[f]) - data.window_size + 1) for f in folders]
    owners = [unique.index(f) for f, n in zip(folders, counts, strict=True) for _ in range(n)]
    if len(owners) != len(data.windows):
        raise MovieError(
            f"{data.root} has {len(data.windows)} windows, expected {len(owners)} from its "
            f"detections {list(folders)}: is this trackastra 0.5.5 or 0.5.6?"
        )
    return tuple(owners)
