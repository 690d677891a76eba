"""Movies: frames and the masks that belong to them.

In the layout of the Cell Tracking Challenge::

    01/t000.tif …                      frames (or 01/img/*.tif)
    01_GT/TRA/man_track000.tif …       masks, with man_track.txt (or 01/TRA)
    01_ST/SEG/man_seg000.tif …         silver truth, merged into the masks of 01_GT/TRA
    01_ERR_SEG/mask000.tif …           any other detections (or 01/<name>)

Which folder holds what, and the merging of silver truth, follow ``CTCData`` of trackastra 0.5.6, so
that masks warmed here have the keys of those in training. Any other movie is two places: its frames
and its masks, each a folder of images, a stack, a Zarr array (see `formats`), or arrays.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from ..errors import FrameTypeError, MovieError, MovieNotFoundError, NoMasksError
from ..forks import cached_property
from ..hashing import JSON
from .arrays import images_of
from .check import MovieCheck, check_movie
from .formats import Found, find_images, image_folder, is_pattern
from .image_files import ImageFiles
from .images import Images, ReadOptions, Series
from .times import check_pairs, check_steps
from .tracks import Tracks, read_tracks
from .zarrs import is_zarr, list_labels, open_labels

Given = Any
"""A `Movie`, a path, or images: an array, a list of arrays, `Images`."""


@dataclass(frozen=True, slots=True)
class Source:
    """How to open a movie, here or on another machine that sees the same folders.

    Parameters
    ----------
    path : str
    detections : str or None
        Where the masks are; None for frames alone.
    slice_pct, downscale_temporal, downscale_spatial, masks, channel, axes
        As `Movie.open`.
    optional : bool
        Whether detections that are not there are left out, as Trackastra does where there are
        several folders of them.
    """

    path: str
    detections: str | None = "TRA"
    slice_pct: tuple[float, float] = (0.0, 1.0)
    downscale_temporal: int = 1
    downscale_spatial: int = 1
    masks: str | None = None
    channel: int | None = None
    axes: str | None = None
    optional: bool = field(default=False, compare=False)

    def open(self) -> Movie:
        """Find the movie's files; errors as `Movie.open`."""
        options = {name: value for name, value in self._options() if name != "path"}
        return Movie.open(self.path, **options)

    def absolute(self) -> Source:
        """Give the same source with paths that are right in any folder."""
        masks = None if self.masks is None else _absolute(self.masks)
        return replace(self, path=_absolute(self.path), masks=masks)

    @property
    def is_whole(self) -> bool:
        """Whether every frame is used."""
        return self.slice_pct == (0.0, 1.0) and self.downscale_temporal == 1

    def to_json(self) -> dict[str, JSON]:
        """Give the path, and whatever is not as by default."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in self._options()
            if name == "path" or value != getattr(_DEFAULT, name)
        }

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Source:
        """Build the source that `to_json` wrote."""
        part = plain.get("slice_pct", (0.0, 1.0))
        return cls(**{**plain, "slice_pct": (part[0], part[1])})

    def _options(self) -> Iterator[tuple[str, Any]]:
        return ((f.name, getattr(self, f.name)) for f in fields(self) if f.name != "optional")


_DEFAULT = Source("")


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


@dataclass(frozen=True, slots=True)
class Row:
    """What belongs together at one time.

    Attributes
    ----------
    index : int
        Of the frame in the movie.
    time : int or None
        The number in the file's name; None where there is none.
    frame : str
    mask : str or None
    """

    index: int
    time: int | None
    frame: str
    mask: str | None


@dataclass(frozen=True)
class Movie:
    """Frames, and the masks that belong to them.

    Attributes
    ----------
    root : Path
        Where the frames are.
    frames : Series
    masks : Series or None
        As many as frames; None where the movie was opened without.
    detections : str or None
        The detection folder's name as asked for.
    detection_folder : Path or None
    source : Source or None
        How it was opened; None where it was made of arrays.
    times : tuple of int
        The number in each frame's name; empty where names tell none.
    """

    root: Path
    frames: Series
    masks: Series | None = None
    detections: str | None = None
    detection_folder: Path | None = None
    source: Source | None = None
    times: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        """Refuse paths and arrays."""
        if not isinstance(self.frames, Series) or not isinstance(self.masks, Series | None):
            raise FrameTypeError(
                "Movie(…) is made of what is open already: open paths by Movie.open(frames, "
                "masks), and make one of arrays by Movie.of(frames, masks)"
            )

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        masks: str | os.PathLike[str] | None = None,
        channel: int | None = None,
        axes: str | None = None,
        *,
        detections: str | None = "TRA",
        slice_pct: tuple[float, float] = (0.0, 1.0),
        downscale_temporal: int = 1,
        downscale_spatial: int = 1,
    ) -> Movie:
        """Find a movie's images; reads names and headers, no pixels.

        Parameters
        ----------
        path : path
            A folder of images, a file's pattern such as ``"data/*_c0.tif"``, a stack, a Zarr
            array or OME-Zarr image; or in the layout above ``01``, ``01_GT/TRA`` or
            ``01_ERR_SEG``, or a folder with ``img`` and ``TRA`` in it.
        masks : path, optional
            The same for the masks, where they are not in that layout.
        channel : int, optional
            Which channel of the frames, from 0, where they have several.
        axes : str, optional
            The meaning of each axis of the frames as stored, such as ``"TYX"``, where they don't
            say; of the masks too, where these don't.
        detections : str
            Where the masks are in the layout above, such as ``"TRA"`` or ``"ERR_SEG"``, which is
            the default where the path is ``01_ERR_SEG``; None opens frames alone.
        slice_pct : (float, float)
            Part of the movie, from and to, 0 to 1.
        downscale_temporal, downscale_spatial : int
            Every n-th frame, every n-th pixel.

        Raises
        ------
        MovieNotFoundError
            There is nothing at the path.
        NoMasksError
            Masks were asked for and not found.
        MovieError
            What is there is no movie; file names don't tell the order of time, or frames and masks
            are not of the same times.
        TypeError
            A path is none.
        """
        for name, given in (("path", path), ("masks", "" if masks is None else masks)):
            if not _is_path(given):
                raise TypeError(
                    f"{name} is a {type(given).__name__}: expected a path; images in memory go to "
                    "FeatureCache.movie or get_or_compute as they are, or to Movie.of(frames, "
                    "masks)"
                )
        source = Source(
            os.fspath(path), detections, slice_pct, downscale_temporal, downscale_spatial,
            None if masks is None else os.fspath(masks), channel, axes,
        )  # fmt: skip
        _check_source(source)
        with _looking(path):
            return _open(source)

    @classmethod
    def of(cls, frames: Given, masks: Given = None, *, detections: str | None = "TRA") -> Movie:
        """Make a movie of what there is: a movie, paths, or images in memory.

        Parameters
        ----------
        frames : Movie, path, or images
            (T, H, W) or (T, Z, H, W): an array of any kind, or a list of frames.
        masks : path or images, optional
            As many as frames; by default those of the movie or at the path.
        detections : str or None
            As `open`, for a path without `masks`.

        Raises
        ------
        MovieError
            As `open`.
        FrameTypeError
            It is none of these.
        """
        if isinstance(frames, Movie) and masks is None:
            return frames
        if _is_path(frames) and (masks is None or _is_path(masks)):
            return cls.open(frames, masks, detections=detections)
        given = cls.open(frames, detections=None) if _is_path(frames) else frames
        images = _series(given)
        if _is_path(masks):
            with _looking(masks):
                found = find_images(Path(masks).expanduser(), ReadOptions(labels=True), "masks")
            _check_steps(found)
            masks = Series(found.images, range(len(found.images)), labels=True)
        root = given.root if isinstance(given, Movie) else _root_of(images)
        return cls(root, images, None if masks is None else _series(masks, labels=True))

    def __len__(self) -> int:
        """Count the frames."""
        return len(self.frames)

    @property
    def name(self) -> str:
        """Folder and detections: how errors and provenance call the movie."""
        root = "" if self.root == Path() else str(self.root)
        masks = self.detections or (self.source.masks if self.source is not None else None)
        return f"{root} {masks or ''}".rstrip()

    @cached_property
    def tracks(self) -> Tracks:
        """(N, 4): label, first and last frame (of the whole movie), parent; from man_track.txt.

        Raises
        ------
        MovieError
            If there is no such file, or it holds anything else.
        """
        if self.detection_folder is None:
            raise MovieError(f"{self.name} was opened without masks in a folder: it has no tracks")
        return read_tracks(self.detection_folder / "man_track.txt")

    def check(
        self, *, quick: bool = False, progress: Callable[[int], Any] | None = None
    ) -> MovieCheck:
        """Look whether frames, masks and tracks are what they should be.

        Parameters
        ----------
        quick : bool
            Read three frames, and no tracks.
        progress : callable, optional
            Called with the number of frames just read.
        """
        file = tracks_file(self)
        return check_movie(self.name, self.frames, self.masks, file, quick=quick, progress=progress)

    def table(self) -> list[Row]:
        """Say which frame and which mask belong to each time."""
        return [
            Row(
                t,
                self.times[t] if self.times else None,
                self.frames.name_of(t),
                None if self.masks is None else self.masks.name_of(t),
            )
            for t in range(len(self))
        ]


def tracks_file(movie: Movie) -> Path | None:
    """Find the man_track.txt that tells of a movie's masks as they are: whole, and in full size."""
    folder, source = movie.detection_folder, movie.source
    if folder is None or source is None or not source.is_whole or source.downscale_spatial != 1:
        return None
    file = folder / "man_track.txt"
    return file if file.is_file() else None


@contextmanager
def _looking(path: str | os.PathLike[str]) -> Iterator[None]:
    """Make a MovieError of what the file system says of folders."""
    try:
        yield
    except MovieError:
        raise
    except PermissionError as error:
        raise MovieError(f"no permission to look into {error.filename}") from error
    except OSError as error:
        raise MovieError(
            f"can't look into {error.filename or path}: {error.strerror or error}; expected a "
            "folder or file that can be read"
        ) from error


def _is_path(given: object) -> bool:
    return isinstance(given, str | os.PathLike)


def _root_of(images: Images) -> Path:
    folder = Path(images.place)
    return folder.parent if folder.name == "img" else folder


def _series(given: Given, *, labels: bool = False) -> Series:
    if isinstance(given, Movie):
        return given.frames
    if isinstance(given, Series):
        return given
    images = images_of(given, ReadOptions(labels=labels), name="masks" if labels else "frames")
    return Series(images, range(len(images)), labels=labels and isinstance(images, ImageFiles))


def _open(source: Source) -> Movie:
    """Open a movie by the layout of its path, or by the two places that are named."""
    path, options = Path(source.path).expanduser(), ReadOptions(source.channel, source.axes)
    if source.masks is not None:
        frames = find_images(image_folder(path), options, "frames")
        return _pair(source, path, frames, _find_masks(source, frames))
    if not (path.is_file() or is_pattern(path) or is_zarr(path)):
        return _open_folder(source, path, options)
    frames = find_images(path, options, "frames")
    masks = None if source.detections is None else _choose_labels(path, options)
    return _pair(source, path, frames, masks)


def _find_masks(source: Source, frames: Found) -> Found:
    """Open masks that are named; where a stack doesn't tell its axes, they are those of frames."""
    path = Path(source.masks or "").expanduser()
    if not path.exists() and not is_pattern(path):
        places = [
            place for place in detection_places(Path(source.path), path.name) if place.is_dir()
        ]
        hint = f"; for {places[0]} say detections={path.name!r}" if places else ""
        raise MovieNotFoundError(f"no masks at {path}: no such file or folder{hint}")
    if path.is_dir() or is_pattern(path):
        found = find_images(path, ReadOptions(labels=True), "masks")
        return replace(found, folder=path if path.is_dir() else path.parent)
    try:
        return find_images(path, ReadOptions(labels=True), "masks")
    except MovieError:
        axes = "TYX" if len(frames.images.shape) == 2 else "TZYX"
        with suppress(MovieError):  # what is wrong without axes is what the file itself says
            return find_images(path, ReadOptions(None, axes, labels=True), "masks")
        with suppress(MovieError):  # of frames told to have Z, which may be channels: shapes say so
            found = find_images(path, ReadOptions(None, "TYX", labels=True), "masks")
            if source.axes is not None and len(found.images) == len(frames.images):
                return found
        raise


def _choose_labels(path: Path, options: ReadOptions) -> Found:
    """Open the one label image of an OME-Zarr image."""
    labels = list_labels(path) if is_zarr(path) else ()
    if len(labels) == 1:
        return Found(open_labels(path, labels[0], options))
    if labels:
        raise NoMasksError(
            f"{path} has several label images, {', '.join(labels)}: name one, such as "
            f"masks={str(path / 'labels' / labels[0])!r} (--masks)"
        )
    raise NoMasksError(
        f"{path} says nothing of its masks: name them (masks=…, --masks PATH), or open frames "
        "alone (detections=None; check --frames-only, warm --pooling none)"
    )


def _open_folder(source: Source, path: Path, options: ReadOptions) -> Movie:
    """Open a movie in the layout of the Cell Tracking Challenge, or a folder of frames alone."""
    root, named = _find_root(path)
    frames = find_images(image_folder(root), options, "frames")
    if source.detections is None:
        return _pair(source, root, frames, None)
    name = named if source.detections == _DEFAULT.detections else source.detections
    folder, masked = _find_detections(root, name), ReadOptions(labels=True)
    masks = find_images(folder, masked, "masks")
    overlay = _find_overlay(folder, masks, masked)
    source = replace(source, detections=name)
    return _pair(source, root, frames, replace(masks, folder=folder), overlay)


def _pair(
    source: Source, root: Path, frames: Found, masks: Found | None, overlay: Found | None = None
) -> Movie:
    """Make the movie of frames and masks that belong together."""
    if masks is not None:
        _check_counts(frames, masks)
    _check_steps(frames, masks)
    part = _part_of(source, len(frames.images))
    images = Series(frames.images, part, source.downscale_spatial)
    times = tuple(frames.times[t] for t in part) if frames.times else ()
    if masks is None:
        return Movie(root, images, None, None, None, source, times)
    held = Series(
        masks.images, part, source.downscale_spatial,
        None if overlay is None else overlay.images, labels=True,
    )  # fmt: skip
    detections = source.detections if source.masks is None and masks.folder else None
    return Movie(root, images, held, detections, masks.folder, source, times)


def _check_counts(frames: Found, masks: Found) -> None:
    if frames.images.files_of(0) == masks.images.files_of(0) != ():
        raise MovieError(
            f"{frames.images.place} was named for the frames and for the masks: name the folder or "
            "file of the masks (detections=… or masks=…; --detections, --masks), or open frames "
            "alone (detections=None)"
        )
    if frames.timed is not None and masks.timed is not None:
        check_pairs(frames.timed, masks.timed)
    elif len(frames.images) != len(masks.images):
        raise MovieError(
            f"{frames.images.place} has {len(frames.images)} frames and {masks.images.place} "
            f"{len(masks.images)} masks: expected as many masks as frames"
        )


def _check_steps(*found: Found | None) -> None:
    for one in found:
        if one is not None and one.timed is not None:
            check_steps(one.timed)


def _part_of(source: Source, count: int) -> range:
    low, high = source.slice_pct
    part = range(count)[int(count * low) : int(count * high) : source.downscale_temporal]
    if count and not part:
        raise MovieError(
            f"{source.path}: slice_pct {source.slice_pct} leaves none of {count} frames; widen it"
        )
    return part


def _check_source(source: Source) -> None:
    for path in (source.path, source.masks or ""):
        if "://" in path:
            raise MovieNotFoundError(
                f"{path} is a URL: movies are read from folders and files; mount or copy it"
            )
    part: Any = source.slice_pct
    steps: tuple[Any, Any] = (source.downscale_temporal, source.downscale_spatial)
    is_part = isinstance(part, tuple | list) and len(part) == 2
    is_part = is_part and all(isinstance(one, Real) for one in part) and 0 <= part[0] < part[1] <= 1
    are_steps = all(isinstance(step, Integral) and int(step) >= 1 for step in steps)
    is_channel = source.channel is None or isinstance(source.channel, Integral)
    for is_right, text in (
        (is_part, f"slice_pct is {part}, expected 0 <= from < to <= 1"),
        (are_steps, f"downscale is {steps} (time, space), expected whole numbers from 1 on"),
        (is_channel, f"channel is {source.channel!r}, expected a whole number from 0 on"),
        (isinstance(source.axes, str | None), f"axes is {source.axes!r}, expected text as 'TYX'"),
    ):
        if not is_right:
            raise MovieError(f"{source.path}: {text}")


def _find_root(path: Path) -> tuple[Path, str]:
    """Give the folder of the frames, and the detections that go with the path by default."""
    path = path.absolute() if path.name in ("", "..") else path
    root, detections = _split_path(path)
    if not root.is_dir():
        found = "not a folder" if root.exists() else "no such folder"
        raise MovieNotFoundError(f"no movie at {root}: {found}")
    return root, detections


def _split_path(path: Path) -> tuple[Path, str]:
    if path.name == "TRA":
        truth = path.absolute().parent if len(path.parts) < 3 else path.parent
        return truth.with_name(truth.name.removesuffix("_GT")), "TRA"
    if path.name.endswith("_ERR_SEG"):
        return path.with_name(path.name.removesuffix("_ERR_SEG")), "ERR_SEG"
    return path, "TRA"


def _find_detections(root: Path, name: str) -> Path:
    guesses = detection_places(root, name)
    for folder in guesses:
        if folder.is_dir():
            return folder
    raise NoMasksError(
        f"{root} has no masks {name!r}: looked for {', '.join(map(str, guesses))}; name the "
        "detection folder (detections=…, --detections), or the place of the masks (masks=…, "
        "--masks)"
    )


def detection_places(root: Path, name: str) -> tuple[Path, ...]:
    """Give the folders that a movie's detections may be in; the first that there is counts."""
    return root / name, Path(f"{root}_{name}"), Path(f"{root}_GT") / name


def silver_folder(masks: Path) -> Path | None:
    """Give the folder of the silver truth that belongs to ground truth ``<n>_GT/TRA``."""
    truth = masks.parent
    if masks.name != "TRA" or not truth.name.endswith("_GT"):
        return None
    silver = truth.with_name(truth.name.removesuffix("_GT") + "_ST") / "SEG"
    return silver if silver.is_dir() else None


def _find_overlay(folder: Path, masks: Found, options: ReadOptions) -> Found | None:
    """Find the silver truth that belongs to masks."""
    silver = silver_folder(folder)
    if silver is None:
        return None
    found = find_images(silver, options, "silver masks")
    if masks.timed is not None and found.timed is not None:
        check_pairs(masks.timed, found.timed)
    return found
