"""Images that are given as arrays, and arrays in .npy files.

`images_of` decides what something given in Python is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import FeatureCacheError, FrameError, FrameTypeError, MovieError
from .axes import LaidOut, are_known, check_image, ends_in_channels, plan_layout
from .chunks import check_given
from .image_files import IMAGE_SUFFIXES, ImageFiles
from .images import Images, InOneFile, ReadOptions
from .times import order_files


def images_of(
    given: Any,
    options: ReadOptions = ReadOptions(),  # noqa: B008
    *,
    name: str = "frames",
) -> Images:
    """Decide what was given as a movie's frames or masks; reads no pixels of arrays.

    Parameters
    ----------
    given
        `Images`, which are given back as they are; an array (T, H, W) or (T, Z, H, W) of NumPy,
        PyTorch (on any device), Dask, Zarr, h5py, xarray or the like, whose images are read one
        at a time; a list of images (H, W) or (Z, H, W), not all of one shape perhaps; or a list
        of paths of image files, in the order of time, as are the numbers in their names. Where an
        array names its axes, as those of xarray and Zarr may, these count.
    options : ReadOptions
    name : str
        What to call it in an error.

    Raises
    ------
    FrameTypeError
        It is something else.
    FrameError
        An array of another shape.
    MovieError
        Named axes that are no movie's; listed files in another order than that of their numbers.
    """
    _check_kind(given, name)
    if isinstance(given, Images):
        return given
    shape = getattr(given, "shape", None)
    if isinstance(shape, tuple):
        return _plan_array(given, tuple(shape), options, name)
    if _are_paths(given, name):
        files = tuple(Path(file).expanduser() for file in given)
        _check_order(files, name)
        return ImageFiles(files, options)
    if type(given) in (list, tuple):
        return ListedImages(tuple(_check_item(one, f"{name}[{t}]") for t, one in enumerate(given)))
    return ListedImages(given)


def _check_order(files: Sequence[Path], name: str) -> None:
    """Raise MovieError where the numbers in names tell another order of time than the list."""
    try:
        in_time = order_files(files, files[0].parent, name).files
    except MovieError:  # the names tell no time: what is listed first is first
        return
    for t, (file, expected) in enumerate(zip(files, in_time, strict=True)):
        if file != expected:
            raise MovieError(
                f"{name}[{t}] is {file.name}, expected {expected.name}, by the numbers in the "
                "names: list them in the order of time (sorted() puts t10 before t2), or pass "
                "the folder"
            )


def _check_kind(given: Any, name: str) -> None:
    """Raise FrameTypeError for what is no array and no list, by what it is."""
    if isinstance(given, Images) or isinstance(getattr(given, "shape", None), tuple):
        return
    found, cure = f"a {type(given).__name__}", "pass an array (T, H, W), or a list of images"
    if isinstance(given, str | bytes | Path):
        found, cure = f"the path {str(given)!r}", "open it, by Movie.open(path)"
    elif any(hasattr(given, one) for one in ("create_array", "require_dataset", "data_vars")):
        cure = "pass one of the arrays in it, or open its path by Movie.open(path)"
    elif isinstance(given, Mapping):
        cure = f"pass its images in the order of time, such as list({name}.values())"
    elif isinstance(given, Set):
        found, cure = f"{found}, which has no order", "pass a list in the order of time"
    elif hasattr(given, "__len__") and hasattr(given, "__getitem__"):
        return
    elif hasattr(given, "__iter__"):
        found, cure = f"{found}, which can be read only once", f"pass list({name})"
    raise FrameTypeError(f"{name} is {found}: {cure}")


def _are_paths(given: Any, name: str) -> bool:
    """Tell whether a list holds paths; FrameTypeError where only some are, or of other files."""
    if not isinstance(given, list | tuple):
        return False
    paths = [isinstance(one, str | Path) for one in given]
    if not any(paths):
        return False
    if not all(paths):
        t = paths.index(not paths[0])
        raise FrameTypeError(
            f"{name}[0] is {given[0] if paths[0] else 'an image'!r} and {name}[{t}] "
            f"{given[t] if paths[t] else 'an image'!r}: expected all paths or all images"
        )
    for file in given:
        if Path(file).suffix.lower() not in IMAGE_SUFFIXES:
            raise FrameTypeError(
                f"{name} has the path {str(file)!r}: a list of paths is one of image files "
                f"({', '.join(IMAGE_SUFFIXES)}), a timepoint each; open others by Movie.open(path)"
            )
    return True


def _check_item(item: Any, where: str) -> Any:
    """Give one image of a list back, as an array; its pixels are not looked at."""
    with reading(where):
        image = item if hasattr(item, "shape") else np.asarray(item)
    shape = tuple(image.shape)
    if not shape or isinstance(item, Images):
        raise FrameTypeError(
            f"{where} is a {type(item).__name__}: expected an image (H, W) or (Z, H, W); a movie "
            "is passed by itself, not in a list"
        )
    if len(shape) not in (2, 3):
        hint = "; for a movie of one image pass [image]" if len(shape) == 1 else ""
        raise FrameError(f"{where} has shape {shape}: expected (H, W) or (Z, H, W){hint}")
    _check_one_channel(shape, where, "image[..., 0]")
    _check_dtype(image, where)
    return image


def _plan_array(given: Any, shape: tuple[Any, ...], options: ReadOptions, name: str) -> Images:
    _check_dtype(given, name)
    if len(shape) == 2:
        raise FrameError(
            f"{name} has shape {shape}, one image: expected (T, H, W) or (T, Z, H, W); pass "
            f"{name}[None] for a movie of one"
        )
    names = _axis_names(given)
    if options.axes is None and not are_known(names):
        if len(shape) not in (3, 4):
            hint = f"; choose a channel, such as {name}[:, 0]" if len(shape) == 5 else ""
            raise FrameError(f"{name} has shape {shape}: expected (T, H, W) or (T, Z, H, W){hint}")
        _check_one_channel(shape, name, f"{name}[..., 0]")
    if not all(isinstance(length, Integral) for length in shape):
        raise FrameError(
            f"{name} has shape {shape}: expected known lengths; compute_chunk_sizes() finds Dask's"
        )
    return ArrayImages(plan_layout(shape, names, options, name, keep_z=True), given)


def _axis_names(given: Any) -> Sequence[object] | None:
    """Give the names that an array has for its axes: xarray's, or those of Zarr."""
    names = getattr(given, "dims", None) or getattr(
        getattr(given, "metadata", None), "dimension_names", None
    )
    if isinstance(names, tuple):
        return names
    attributes = getattr(given, "attrs", None)
    if not isinstance(attributes, Mapping):
        return None
    return attributes.get("_ARRAY_DIMENSIONS")


def _check_one_channel(shape: tuple[int, ...], where: str, cure: str) -> None:
    if ends_in_channels(shape):
        raise FrameError(
            f"{where} has shape {shape}, whose last axis looks like channels: a frame has one, "
            f"and no axis for it: pass {cure}"
        )


def _check_dtype(array: Any, where: str) -> None:
    """Raise FrameTypeError for arrays of objects, text and the like."""
    dtype = getattr(array, "dtype", None)
    if isinstance(dtype, np.dtype) and dtype.kind not in "buif":
        hint = "; images of several shapes are a list" if dtype.kind == "O" else ""
        raise FrameTypeError(
            f"{where} has dtype {dtype}: expected bool, integer or float pixels{hint}"
        )


@contextmanager
def reading(where: str, cure: str = "") -> Iterator[None]:
    """Make a MovieError of whatever goes wrong in reading from an array or a file.

    What can go wrong is a matter of the library that reads, and of its plug-ins.
    """
    try:
        yield
    except (FeatureCacheError, MemoryError):
        raise
    except PermissionError as error:
        raise MovieError(f"no permission to read {where}") from error
    except Exception as error:
        told = " ".join(str(error).split())
        if not told or isinstance(error, LookupError):
            told = f"{type(error).__name__} {told}".rstrip()
        raise MovieError(f"can't read {where}: {told}{cure and f'; {cure}'}") from error


def as_numpy(image: Any) -> NDArray[Any]:
    """Bring one image here as a NumPy array; a masked one stays masked."""
    if hasattr(image, "numpy") and hasattr(image, "detach"):  # PyTorch's
        if "bfloat16" in str(image.dtype):
            image = image.float()  # exact; NumPy has no such dtype
        return image.numpy(force=True)
    if hasattr(image, "compute"):
        image = _compute(image)
    if isinstance(image, np.ma.MaskedArray):
        return np.asanyarray(image)
    return np.asarray(image)


def _compute(image: Any) -> Any:
    """Compute a Dask array, or xarray's with one inside, as its user's scheduler would.

    Without one, in this thread: the threads of Dask's pool are gone after a fork, and waited for.
    """
    from dask.base import get_scheduler

    chosen = get_scheduler()  # type: ignore[no-untyped-call]
    return image.compute(scheduler=chosen or "synchronous")


@dataclass(frozen=True, eq=False)
class ArrayImages(LaidOut):
    """Images that are in one array, given in Python.

    A pickle holds the array as its library pickles it: all of a `numpy.memmap`, and none of h5py's.

    Parameters
    ----------
    source
        NumPy's or one like it: it has a shape, and is indexed by numbers and slices.
    """

    source: Any

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read image `t`, and nothing else."""
        t = range(len(self))[t]
        with reading(self.name_of(t)):
            check_given(self.source, self.layout, t)
            image = as_numpy(self.layout.take(self.source, t))
        return check_image(self.layout.arrange(image), self.name_of(t))


@dataclass(frozen=True, eq=False)
class ListedImages(Images):
    """Images that are one array each, in a list or what is indexed like one.

    Parameters
    ----------
    source
        It has a length, and gives an image (H, W) or (Z, H, W) for each number below.
    """

    source: Any

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read image `t`, and nothing else."""
        t = range(len(self))[t]
        with reading(self.name_of(t)):
            image = as_numpy(self.source[t])
        return check_image(image, self.name_of(t))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the first image."""
        if not len(self):
            raise MovieError("no images are in the list: expected one a timepoint")
        shape = getattr(self.source[0], "shape", None)
        return tuple(shape) if isinstance(shape, tuple) else self[0].shape


def open_npy(path: str | Path, options: ReadOptions = ReadOptions()) -> Images:  # noqa: B008
    """Open an array in a ``.npy`` file: (T, H, W), (T, Z, H, W), or as `options` names its axes.

    A Z of one slice disappears, as in any file.

    Raises
    ------
    MovieError
        It can't be read, or holds something else.
    """
    file = Path(path).expanduser()
    array = _map(file)
    return NpyImages(file, plan_layout(array.shape, None, options, str(file)), array.dtype)


def _map(file: Path) -> NDArray[Any]:
    if file.name.endswith("_seg.npy"):
        raise MovieError(
            f"{file} is a file of Cellpose with more in it than masks: export the masks as TIFF or "
            "PNG (File > Save masks, or --save_tif)"
        )
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except PermissionError as error:
        raise MovieError(f"no permission to read {file}") from error
    except (OSError, ValueError, EOFError, SyntaxError, TokenError) as error:
        told = error.strerror if isinstance(error, OSError) else None
        raise MovieError(
            f"can't read {file}: {told or f'damaged, or not written by numpy.save ({error})'}; "
            "restore the file or leave it out"
        ) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise MovieError(f"{file} holds several arrays (numpy.savez): save one by numpy.save")
    if array.dtype.kind not in "buif":
        raise MovieError(f"{file} holds {array.dtype}: expected real numbers")
    return array


@dataclass(frozen=True)
class NpyImages(LaidOut, InOneFile):
    """Images that are in the array of a .npy file; mapped, so that one is read at a time."""

    dtype: np.dtype[Any]

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read image `t`: a copy, which a file cut short can't take away."""
        array = _map(self.file)
        if array.shape != self.layout.shape or array.dtype != self.dtype:
            raise MovieError(
                f"{self.file} changed since it was opened, from {self.dtype} {self.layout.shape} "
                f"to {array.dtype} {array.shape}: open the movie anew"
            )
        return np.array(self.layout.arrange(self.layout.take(array, t)))

    @property
    def recipe(self) -> str:
        """Say what, besides the file, decides the pixels."""
        return f"npy, {self.layout}"
