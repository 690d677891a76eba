"""A movie's frames, or its masks: one image a timepoint, read when it is asked for.

`Images` is what every reader gives; `Series` is the part of one that a movie uses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ..errors import MovieError

LABELS_ALONE = "save the one that holds the labels by itself"
"""What to do with masks of several channels: the option is for the frames."""


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """What a reader is told where files don't say it themselves.

    Parameters
    ----------
    channel : int, optional
        Which channel, from 0, where images have several.
    axes : str, optional
        The meaning of each axis as stored, of the letters ``TCZYX`` and ``S`` (samples of a
        colour), such as ``"TYX"``.
    labels : bool
        Whether the images are masks: a value is a region's label, not an intensity.
    """

    channel: int | None = None
    axes: str | None = None
    labels: bool = False


class Images(ABC):
    """Images (H, W) or (Z, H, W), one a timepoint, each read when it is asked for.

    Safe to share between threads, to pickle, and to use in a forked process. Values are as stored:
    any real dtype.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Count the timepoints."""

    @abstractmethod
    def __getitem__(self, t: int, /) -> NDArray[Any]:
        """Read image `t`.

        Raises
        ------
        MovieError
            It can't be read, or is not what a movie's image is.
        """

    def __iter__(self) -> Iterator[NDArray[Any]]:
        """Read the images, one after the other."""
        return (self[t] for t in range(len(self)))

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of an image, (H, W) or (Z, H, W); reads no pixels."""

    @property
    def place(self) -> str:
        """Where the images are, for people; empty where that is nowhere."""
        return ""

    @property
    def recipe(self) -> str:
        """Say what, besides the files, decides the pixels."""
        return type(self).__name__

    def name_of(self, t: int) -> str:
        """Name image `t` for people."""
        return f"image {t}"

    def files_of(self, t: int) -> tuple[Path, ...]:
        """Give all files that image `t` is made from; none where they can't be told unchanged."""
        return ()

    def part_of(self, t: int) -> str:
        """Say which of the images in its files image `t` is; empty for the only one."""
        return str(t)


@dataclass(frozen=True, eq=False)
class InOneFile(Images):
    """Images that are all in one file, or in the folder of one array."""

    file: Path

    @property
    def place(self) -> str:
        """The file."""
        return str(self.file)

    def name_of(self, t: int) -> str:
        """Name image `t`, such as ``movie.tif[3]``."""
        return f"{self.file.name}[{t}]"

    def files_of(self, t: int) -> tuple[Path, ...]:
        """Give the file."""
        return (self.file,)


@dataclass(frozen=True)
class Series(Images):
    """Those images of a reader that a movie uses, each as the movie uses it.

    Parameters
    ----------
    source : Images
    times : range
        Which of them.
    downscale : int
        Every n-th pixel of each axis.
    overlay : Images, optional
        As many as in `source`; the larger pixel counts.
    labels : bool
        Whether the images are masks: int32, as Trackastra holds them.
    """

    source: Images
    times: range
    downscale: int = 1
    overlay: Images | None = None
    labels: bool = False

    def __len__(self) -> int:
        return len(self.times)

    @overload
    def __getitem__(self, t: int) -> NDArray[Any]: ...
    @overload
    def __getitem__(self, t: slice) -> Series: ...
    def __getitem__(self, t: int | slice) -> NDArray[Any] | Series:
        """Read image `t`: (H, W) or (Z, H, W); a slice gives a series, and reads nothing."""
        if isinstance(t, slice):
            return replace(self, times=self.times[t])
        image = self._read(self.source, t)
        if self.overlay is not None:
            over = self._read(self.overlay, t)
            if over.shape != image.shape:
                raise MovieError(
                    f"{_where(self.source, self.times[t])} has shape {image.shape} and "
                    f"{_where(self.overlay, self.times[t])} {over.shape}: expected the same"
                )
            image = np.maximum(image, over)
        return image[(slice(None, None, self.downscale),) * image.ndim]

    def _read(self, images: Images, t: int) -> NDArray[Any]:
        image = images[self.times[t]]
        if not self.labels:
            return image
        with np.errstate(invalid="ignore"):
            labels = image.astype(np.int32)
        wrong = image[labels != image]
        if wrong.size:
            raise MovieError(
                f"{_where(images, self.times[t])} holds {image.dtype} values that are no labels, "
                f"such as {wrong[0]}: expected whole numbers from 0 to 2147483647; relabel the mask"
            )
        return labels

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return tuple(-(-length // self.downscale) for length in self.source.shape)

    @property
    def place(self) -> str:
        """Where the images are."""
        return self.source.place

    @property
    def recipe(self) -> str:
        """Say what, besides the files, decides the pixels."""
        kind = "labels" if self.labels else "pixels"
        over = "" if self.overlay is None else f", under {self.overlay.recipe}"
        return f"{kind}, downscale {self.downscale}, {self.source.recipe}{over}"

    def name_of(self, t: int) -> str:
        """Name image `t`."""
        return self.source.name_of(self.times[t])

    def files_of(self, t: int) -> tuple[Path, ...]:
        """Give all files that image `t` is made from; none where another reader reads them."""
        if not all(map(_is_ours, (self, self.source, self.overlay))):
            return ()  # a subclass may make other pixels of the same files
        files = self.source.files_of(self.times[t])
        if self.overlay is None or not files:
            return files
        over = self.overlay.files_of(self.times[t])
        return (*files, *over) if over else ()

    def part_of(self, t: int) -> str:
        """Say which of the images in its files image `t` is."""
        return self.source.part_of(self.times[t])


def _where(images: Images, t: int) -> str:
    """Name an image for an error, by its file where it has one of its own."""
    files = images.files_of(t)
    return str(files[0]) if len(files) == 1 and not images.part_of(t) else images.name_of(t)


def _is_ours(images: Images | None) -> bool:
    """Tell whether what an image is made of is known: not so for readers of others."""
    return images is None or type(images).__module__.startswith(f"{__package__}.")
