"""Image files, one a timepoint."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from ..errors import MovieError
from .images import Images, ReadOptions
from .png import PNG_RECIPE, png_shape, read_png
from .tiff import TIFF_RECIPE, read_tiff, tiff_shape

TIFF_SUFFIXES = (".tif", ".tiff")
IMAGE_SUFFIXES = (*TIFF_SUFFIXES, ".png")
"""Files that are images, in lower case; names may have any case."""


@dataclass(frozen=True)
class ImageFiles(Images):
    """Images that are files of their own.

    Parameters
    ----------
    files : tuple of Path
        In the order of time.
    options : ReadOptions
    """

    files: tuple[Path, ...] = field(repr=False)
    options: ReadOptions = field(default_factory=ReadOptions)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read file `t`."""
        return read_image(self.files[t], self.options)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first image."""
        return image_shape(self.files[0], self.options)

    @property
    def place(self) -> str:
        """The folder of the files."""
        return str(self.files[0].parent) if self.files else ""

    @property
    def recipe(self) -> str:
        """Say what, besides the files, decides the pixels."""
        return f"{self.options}, {TIFF_RECIPE}, {PNG_RECIPE}"

    def name_of(self, t: int) -> str:
        """Name file `t`."""
        return self.files[t].name

    def part_of(self, t: int) -> str:
        """Say nothing: a file is one image."""
        return ""

    def files_of(self, t: int) -> tuple[Path, ...]:
        """Give file `t`."""
        return (self.files[t],)


def read_image(file: Path, options: ReadOptions) -> NDArray[Any]:
    """Read the one image of a file: (H, W) or (Z, H, W).

    Raises
    ------
    MovieError
        It can't be read, or is no single plane or volume of one channel.
    """
    return (read_png if _is_png(file) else read_tiff)(file, options)


def image_shape(file: Path, options: ReadOptions) -> tuple[int, ...]:
    """Give the shape of a file's image, reading no pixels; errors as `read_image`."""
    return (png_shape if _is_png(file) else tiff_shape)(file, options)


def _is_png(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise MovieError(
            f"{file} is no image that is known: expected one of {', '.join(IMAGE_SUFFIXES)}; save "
            "it as TIFF"
        )
    return suffix not in TIFF_SUFFIXES
