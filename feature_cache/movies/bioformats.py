"""Files of microscopes, read by bioio and its plug-ins: Zeiss's CZI, Nikon's ND2, Leica's LIF."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import MissingDependencyError, MovieError, MovieNotFoundError
from .arrays import reading
from .axes import LaidOut, check_image, plan_layout
from .images import Images, InOneFile, ReadOptions

if TYPE_CHECKING:
    import dask.array as da

_PLUGINS: Mapping[str, str] = {".czi": "bioio-czi", ".lif": "bioio-lif", ".nd2": "bioio-nd2"}
BIOIO_SUFFIXES = tuple(_PLUGINS)
"""Of files that bioio reads here, in lower case; names may have any case."""

_INSTALL = 'pip install "feature-cache[bioio]"'
_CURE = "restore the file or leave it out"
_MOSAIC = "M"
"""Tiles, which bioio puts together."""


@dataclass(frozen=True)
class BioImages(LaidOut, InOneFile):
    """Images that are in a file of a microscope."""

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read image `t`, and nothing else."""
        where = f"{self.name_of(t)} in {self.place}"
        array, _ = _open(self.file, _stamp(self.file))
        if array.shape != self.layout.shape:
            raise MovieError(f"{self.file} changed since it was opened: open the movie anew")
        with reading(where, _CURE):
            # In this thread: those of Dask's pool are gone after a fork, and waited for.
            image = self.layout.take(array, t).compute(scheduler="synchronous")
        return check_image(self.layout.arrange(np.asarray(image)), where)

    @property
    def recipe(self) -> str:
        """Say what, besides the file, decides the pixels."""
        plugin = _PLUGINS[self.file.suffix.lower()]
        return f"bioio {version('bioio')}, {plugin} {version(plugin)}, {self.layout}"


def open_bioio(path: str | Path, options: ReadOptions = ReadOptions()) -> Images:  # noqa: B008
    """Open a file of a microscope: CZI, ND2 or LIF.

    Its axes are those that the file names; a Z of one slice disappears.

    Raises
    ------
    MissingDependencyError
        bioio, or its plug-in for such files, is not installed.
    MovieNotFoundError
        No such file.
    MovieError
        It can't be read, has several scenes, or several channels and none chosen.
    """
    file = Path(path).expanduser()
    _check_installed(file)
    array, axes = _open(file, _stamp(file))
    return BioImages(file, plan_layout(array.shape, axes, options, str(file)))


def _check_installed(file: Path) -> None:
    for package in ("bioio", _PLUGINS[file.suffix.lower()]):
        if find_spec(_module_of(package)) is None:
            raise MissingDependencyError(package, f"reading {file}", _INSTALL)


def _module_of(package: str) -> str:
    return package.replace("-", "_")


def _stamp(file: Path) -> tuple[int, ...]:
    """Tell a file from what it was before."""
    try:
        status = file.stat()
    except FileNotFoundError as error:
        raise MovieNotFoundError(f"no movie at {file}: no such file") from error
    except OSError as error:
        raise MovieError(f"can't read {file}: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


@lru_cache(maxsize=16)
def _open(file: Path, stamp: tuple[int, ...]) -> tuple[da.Array, str]:
    """Give all of a file as an array that reads what it is asked for, and its axes.

    It holds no open file: each chunk opens its own.
    """
    from bioio import BioImage

    plugin = _PLUGINS[file.suffix.lower()]
    with reading(str(file), _CURE):
        image = BioImage(file, reader=import_module(_module_of(plugin)).Reader)
        _check_scenes(file, image.scenes, _count_scenes(file, image.scenes))
        _check_extra(file, dict(image.reader.dims.items()))
        axes = image.dims.order
        return image.get_image_dask_data(axes), axes


def _count_scenes(file: Path, scenes: tuple[str, ...]) -> int:
    """Count the scenes: in a CZI, those of its pixels, of which its metadata may say nothing."""
    if file.suffix.lower() != ".czi":
        return len(scenes)
    from aicspylibczi import CziFile

    with file.open("rb") as opened:
        spans = [shape.get("S", (0, 1)) for shape in CziFile(opened).get_dims_shape()]
    return max(len(scenes), sum(stop - start for start, stop in spans))


def _check_scenes(file: Path, scenes: tuple[str, ...], count: int) -> None:
    if count > 1:
        names = ", ".join(scenes[:6]) + (", …" if len(scenes) > 6 else "")
        raise MovieError(
            f"{file} has {count} scenes ({names}): a movie is one; export each as a file of its "
            "own, such as OME-TIFF"
        )


def _check_extra(file: Path, lengths: Mapping[str, int]) -> None:
    """Raise for axes of which bioio would take the first place alone."""
    extra = {axis: n for axis, n in lengths.items() if axis not in f"TCZYXS{_MOSAIC}" and n > 1}
    if extra:
        raise MovieError(
            f"{file} has the axes {', '.join(f'{a} (of {n})' for a, n in extra.items())}, which "
            "no movie has: export what is meant as OME-TIFF"
        )
