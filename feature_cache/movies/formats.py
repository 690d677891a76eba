"""Which reader opens a path: a folder or pattern of images, a stack, a Zarr array, and others."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import MovieError, MovieNotFoundError
from .arrays import open_npy
from .bioformats import BIOIO_SUFFIXES, open_bioio
from .image_files import IMAGE_SUFFIXES, TIFF_SUFFIXES, ImageFiles
from .images import Images, ReadOptions
from .tiff import TiffStack, check_volume
from .times import TimedFiles, order_files
from .zarrs import is_zarr, open_zarr


@dataclass(frozen=True, slots=True)
class Found:
    """Images that were found at a path; `timed` where each is a file of its own.

    Their tracks, if there are any, are in `folder`.
    """

    images: Images
    timed: TimedFiles | None = None
    folder: Path | None = None

    @property
    def times(self) -> tuple[int, ...]:
        """Give the times in the files' names; empty where there are none."""
        return () if self.timed is None else self.timed.times


def find_images(path: Path, options: ReadOptions, kind: str) -> Found:
    """Open the frames, or the masks, at a path: `kind` says in errors which.

    It is a folder of images, a pattern of their names, or what `open_images` opens.

    Raises
    ------
    MovieNotFoundError
        There is nothing.
    MovieError
        It is no movie, or not readable as one.
    """
    if path.is_dir() and not is_zarr(path):
        return _order(list_images(path, kind), path, options, kind)
    if is_pattern(path):
        return _order(_match(path, kind), path.parent, options, kind)
    return open_images(path, options, kind)


def is_pattern(path: Path) -> bool:
    """Tell whether a path is a pattern of images' names, such as ``data/*_c0.tif``."""
    return glob.has_magic(path.name) and not path.exists()


def open_images(path: Path, options: ReadOptions, kind: str) -> Found:
    """Open a stack of images at a path: a file, or a Zarr array. Errors as `find_images`."""
    if not path.exists():
        raise MovieNotFoundError(f"no {kind} at {path}: no such file or folder")
    suffix = path.suffix.lower()
    if path.is_dir() and is_zarr(path):
        return Found(open_zarr(path, options))
    if suffix in TIFF_SUFFIXES:
        return Found(TiffStack.open(path, options))
    if suffix == ".npy":
        return Found(open_npy(path, options))
    if suffix in BIOIO_SUFFIXES:
        return Found(open_bioio(path, options))
    if suffix in IMAGE_SUFFIXES:
        return _order([path], path.parent, options, kind)
    raise MovieError(
        f"{path} is no movie that is known: expected a folder of images "
        f"({', '.join(IMAGE_SUFFIXES)}), a TIFF stack, a Zarr array or OME-Zarr image, .npy, or "
        f"{', '.join(BIOIO_SUFFIXES)}; save it as one of these"
    )


def _order(files: Sequence[Path], folder: Path, options: ReadOptions, kind: str) -> Found:
    timed = order_files(files, folder, kind)
    if len(files) == 1 and files[0].suffix.lower() in TIFF_SUFFIXES and not options.labels:
        check_volume(files[0], options)
    return Found(ImageFiles(timed.files, options), timed)


def _match(pattern: Path, kind: str) -> list[Path]:
    files = [
        file
        for file in sorted(pattern.parent.glob(pattern.name))
        if _is_image(file.name) and not file.is_dir()
    ]
    if not files:
        raise MovieNotFoundError(f"no {kind} at {pattern}: no image's name fits the pattern")
    return files


def image_folder(root: Path) -> Path:
    """Give the folder of a movie's frames: ``img`` in it, or itself."""
    return root / "img" if (root / "img").is_dir() else root


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES  # noqa: PTH122


def list_images(folder: Path, kind: str) -> list[Path]:
    """List the images of a folder, hidden ones left out; links that lead nowhere count.

    Raises
    ------
    MovieError
        There are none, or some are TIFF and others are not.
    """
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if _is_image(e.name) and not e.is_dir())
    if not names:
        raise MovieError(
            f"{folder} has no {kind}: expected images ({', '.join(IMAGE_SUFFIXES)})"
            f"{_name_others(folder)}"
        )
    kinds = {Path(name).suffix.lower() in TIFF_SUFFIXES for name in names}
    if len(kinds) > 1:
        suffixes = sorted({Path(name).suffix for name in names})
        raise MovieError(
            f"{folder} has {kind} of several formats, {', '.join(suffixes)}: name those that are "
            f"meant by a pattern, such as {folder / ('*' + suffixes[-1])}"
        )
    return [folder / name for name in names]


def _name_others(folder: Path) -> str:
    """Say what is in a folder in place of images."""
    inside = sorted(file for file in folder.iterdir() if not file.name.startswith("."))
    others = sorted({file.suffix for file in inside if file.suffix} - {".txt"})
    if others:
        return f", found {', '.join(others)}"
    folders = [one for one in inside if one.is_dir()]
    names = ", ".join(one.name for one in folders[:4])
    return f", found the folders {names}: name one, such as {folders[0]}" if folders else ""
