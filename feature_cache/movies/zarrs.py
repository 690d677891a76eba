"""Zarr arrays on disk, v2 and v3, and OME-Zarr images, whose images are read one at a time.

What a folder is, its metadata says; they are read here, and the pixels by zarr-python. OME-Zarr is
read by its specification, 0.1 to 0.5 (https://ngff.openmicroscopy.org): the first dataset of a
multiscale image is the one of full resolution.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import MovieError, MovieNotFoundError, NoMasksError
from ..hashing import Digest, digest_bytes
from .arrays import reading
from .axes import LaidOut, check_image, plan_layout
from .chunks import check_blosc, list_chunks
from .images import Images, InOneFile, ReadOptions

if TYPE_CHECKING:
    import zarr

METADATA = ("zarr.json", ".zarray", ".zgroup")
"""Files one of which makes a folder an array or group of Zarr."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_CHUNK = re.compile(r"c|(c\.)?[0-9]+(\.[0-9]+)*")
_OLD_AXES = "tczyx"
"""Of OME-Zarr before 0.3, which names none."""
_CURE = "restore it or leave it out"
_MANY = 6


@dataclass(frozen=True, slots=True)
class _Node:
    """An array or a group: what its metadata says."""

    path: Path
    is_array: bool
    version: Literal[2, 3]
    attributes: Mapping[str, Any]
    names: Sequence[object] | None
    """Of an array's axes, as its image calls them where it is one of OME-Zarr."""
    metadata: tuple[tuple[Path, Digest], ...]
    """The files that were read, and what was in them."""
    is_ome: bool = False
    """Whether it is an array in an image of OME-Zarr."""

    @property
    def ome(self) -> Mapping[str, Any]:
        """What OME-Zarr says of a group: in 0.5 under a name of its own."""
        inner = self.attributes.get("ome")
        return inner if isinstance(inner, Mapping) else self.attributes


@dataclass(frozen=True, eq=False)
class ZarrImages(LaidOut, InOneFile):
    """Images that are in a Zarr array on disk.

    What else is in the chunks of an image is decoded too, and not kept.

    A chunk that is not there holds the array's fill value: Zarr's writers leave out such chunks, so
    a copy that lost one can't be told from a movie that is empty there. It is an error only where
    the array has no fill value.

    Parameters
    ----------
    file : Path
        What was opened: the array's folder, or that of the image it is in.
    metadata : tuple of (Path, Digest)
        The files that say what the chunks mean, and what was in them.
    """

    array: zarr.Array[Any]
    metadata: tuple[tuple[Path, Digest], ...] = field(repr=False)

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read image `t`: only the chunks it is in."""
        t = range(len(self))[t]
        where = f"{self.name_of(t)} in {self.place}"
        with reading(where, _CURE):
            self._check_metadata()
            if self.array.fill_value is None:
                self._check_chunks(t)
            check_blosc(self.array, self._root, self.layout, t)
            image = np.asarray(self.layout.take(self.array, t))
        return check_image(self.layout.arrange(image), where)

    def _check_metadata(self) -> None:
        for file, digest in self.metadata:
            if digest_bytes(file.read_bytes()) != digest:
                raise MovieError(f"{file} changed since it was opened: open the movie anew")

    def _check_chunks(self, t: int) -> None:
        for file in self._chunk_files(t):
            if not file.is_file():
                raise MovieError(
                    f"{file} is missing, and the array says no value for what is missing: restore "
                    "the file or leave the movie out"
                )

    def _chunk_files(self, t: int) -> list[Path]:
        return list_chunks(self.array, self._root, self.layout, t)

    @property
    def _root(self) -> Path:
        return self.metadata[0][0].parent

    @property
    def recipe(self) -> str:
        """Say what, besides the files, decides the pixels."""
        import zarr

        name = self._root.relative_to(self.file)
        return f"zarr {zarr.__version__}, array {name}, {self.layout}"

    def files_of(self, t: int) -> tuple[Path, ...]:
        """Give the metadata and the chunks that image `t` is in; none where a chunk is missing."""
        chunks = self._chunk_files(t)
        if not all(file.is_file() for file in chunks):
            return ()
        return (*(file for file, _ in self.metadata), *chunks)


def is_zarr(path: str | Path) -> bool:
    """Tell whether a folder is an array or a group of Zarr, by its metadata.

    Raises
    ------
    MovieError
        It may not be looked into.
    """
    with reading(str(path)):
        return any((Path(path).expanduser() / name).is_file() for name in METADATA)


def open_zarr(path: str | Path, options: ReadOptions = ReadOptions()) -> Images:  # noqa: B008
    """Open a Zarr array, or the image of an OME-Zarr group, on disk.

    Its axes are those that `options` names, else those that OME-Zarr, Zarr v3 or xarray name in its
    metadata, else (T, Y, X) or (T, Z, Y, X). A Z of one slice disappears.

    Parameters
    ----------
    path : path
        The array's folder, or that of an OME-Zarr image (or label image, ``labels/NAME``).
    options : ReadOptions

    Raises
    ------
    MovieNotFoundError
        No such folder.
    MovieError
        It is no Zarr, not one image, or one that is no movie; it can't be read.
    """
    given = _check_path(path)
    found = _find_array(given)
    array = _open_array(found)
    where = str(given)
    _check_dtype(array, found, options, where)
    _check_chunk_names(found.path, array, options)
    layout = plan_layout(array.shape, found.names, options, where)
    return ZarrImages(given, layout, array, found.metadata)


def list_labels(path: str | Path) -> tuple[str, ...]:
    """Name the label images of an OME-Zarr image; none for whatever else is at the path.

    Raises
    ------
    MovieError
        Its metadata can't be read, or it is not one image.
    """
    group = _find_image(Path(path).expanduser()) if is_zarr(path) else None
    if group is None or not is_zarr(group.path / "labels"):
        return ()
    labels = _read(group.path / "labels")
    listed = labels.ome.get("labels", [])
    if not isinstance(listed, list) or not all(map(_is_inside, listed)):
        raise _damaged(labels)
    return tuple(listed)


def open_labels(
    path: str | Path,
    name: str,
    options: ReadOptions = ReadOptions(),  # noqa: B008
) -> Images:
    """Open a label image of an OME-Zarr image, by its name.

    Raises
    ------
    NoMasksError
        The image has none of that name.
    MovieNotFoundError, MovieError
        As `open_zarr`; MovieError also where the values are no integers.
    """
    known = list_labels(path)
    group = _find_image(_check_path(path))
    if group is None or name not in known:
        raise NoMasksError(
            f"{path} has no label image {name!r}: expected one of {_list_some(known) or 'none'}"
        )
    return open_zarr(group.path / "labels" / name, replace(options, labels=True))


def _check_path(path: str | Path) -> Path:
    if _URL.match(str(path)):
        raise MovieError(f"{path} is not on this machine: copy it to a folder here, and name that")
    folder = Path(path).expanduser()
    with reading(str(folder)):
        if folder.is_file():
            cure = "unpack it" if folder.suffix.lower() in (".zip", ".ozx") else "name its folder"
            raise MovieError(f"{folder} is a file, and Zarr is a folder: {cure}")
        if not folder.is_dir():
            raise MovieNotFoundError(f"no movie at {folder}: no such folder")
    return folder


def _read(folder: Path) -> _Node:
    """Read what the metadata in a folder say it is."""
    with reading(str(folder), _CURE):
        for name in METADATA:
            if (folder / name).is_file():
                return _parse(folder, name)
    inside = _list_some(sorted(one.name for one in folder.iterdir()) if folder.is_dir() else [])
    raise MovieError(
        f"{folder} is no Zarr array or group: expected one of {', '.join(METADATA)} in it, found "
        f"{inside or 'nothing'}"
    )


def _parse(folder: Path, name: str) -> _Node:
    main = (folder / name).read_bytes()
    metadata, plain = [(folder / name, digest_bytes(main))], _load(folder / name, main)
    if name == "zarr.json":
        kind, attributes = plain.get("node_type"), plain.get("attributes", {})
        if kind not in ("array", "group") or plain.get("zarr_format") != 3:
            raise MovieError(f"{folder / name} is no metadata of Zarr v3: restore the file")
    else:
        kind, attributes = "array" if name == ".zarray" else "group", {}
        if (folder / ".zattrs").is_file():
            text = (folder / ".zattrs").read_bytes()
            metadata.append((folder / ".zattrs", digest_bytes(text)))
            attributes = _load(folder / ".zattrs", text)
    if not isinstance(attributes, dict):
        raise MovieError(f"{folder / name} has attributes that are none: restore the file")
    names = plain.get("dimension_names") or attributes.get("_ARRAY_DIMENSIONS")
    return _Node(
        path=folder,
        is_array=kind == "array",
        version=3 if name == "zarr.json" else 2,
        attributes=attributes,
        names=names if isinstance(names, list) else None,
        metadata=tuple(metadata),
    )


def _load(file: Path, text: bytes) -> dict[str, Any]:
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise MovieError(f"{file} is damaged ({error}): restore the file") from error
    if not isinstance(plain, dict):
        raise MovieError(f"{file} is damaged (no JSON object): restore the file")
    return plain


def _find_array(folder: Path) -> _Node:
    """Find the one array that a folder stands for, and the names of its axes."""
    node = _read(folder)
    if not node.is_array:
        image = _find_image(folder, node)
        if image is None:
            raise _refuse_group(node)
        return _first_dataset(image)
    parents = [*folder.absolute().parents[:2], *folder.resolve().parents[:2]]
    images = (_dataset_of(parent, node) for parent in parents)
    return next(filter(None, images), node)


def _find_image(folder: Path, node: _Node | None = None) -> _Node | None:
    """Find the group of the one OME-Zarr image in a folder; None where there is none.

    Bio-Formats makes a group of images, of which there must be one.
    """
    node = _read(folder) if node is None else node
    if node.is_array:
        return None
    if "bioformats2raw.layout" not in node.ome:
        return node if "multiscales" in node.ome else None
    series = _list_series(node)
    if len(series) != 1:
        raise MovieError(
            f"{folder} holds {len(series)} images: name one of {_list_some(series) or 'none'}, "
            f"such as {folder / next(iter(series), '0')}"
        )
    return _find_image(folder / series[0])


def _list_series(node: _Node) -> list[str]:
    """Name the images that Bio-Formats wrote: in OME's list, or numbered from 0."""
    if is_zarr(node.path / "OME"):
        listed = _read(node.path / "OME").ome.get("series")
        if isinstance(listed, list) and all(map(_is_inside, listed)):
            return listed
    numbers = map(str, itertools.count())
    return list(itertools.takewhile(lambda name: is_zarr(node.path / name), numbers))


def _first_dataset(image: _Node) -> _Node:
    """Give the array of full resolution in an image."""
    scales = _multiscales(image)
    if len(scales) != 1:
        names = [f"{paths[0]}" for paths, _ in scales]
        raise MovieError(
            f"{image.path} holds {len(scales)} multiscale images: name the array of one, "
            f"{_list_some(names)}, such as {image.path / names[0]}"
        )
    [(paths, axes)] = scales
    return _with_names(_read(image.path / paths[0]), axes, image)


def _dataset_of(parent: Path, array: _Node) -> _Node | None:
    """Find an array in the image that it is a dataset of, which names its axes."""
    if not is_zarr(parent):
        return None
    image = _read(parent)
    if image.is_array or "multiscales" not in image.ome:
        return None
    for paths, names in _multiscales(image):
        if any((parent / path).resolve() == array.path.resolve() for path in paths):
            return _with_names(array, names, image)
    return None


def _with_names(array: _Node, names: Sequence[object] | None, image: _Node) -> _Node:
    if not array.is_array:
        raise _damaged(image)
    metadata = (*array.metadata, *image.metadata)
    return replace(array, names=names or array.names, metadata=metadata, is_ome=True)


def _multiscales(image: _Node) -> list[tuple[list[str], Sequence[object] | None]]:
    """Give the paths and the names of the axes of each multiscale image in a group."""
    try:
        found = [
            ([dataset["path"] for dataset in scale["datasets"]], _name_axes(scale))
            for scale in image.ome["multiscales"]
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise _damaged(image) from error
    if not found or not all(paths and all(map(_is_inside, paths)) for paths, _ in found):
        raise _damaged(image)
    return found


def _name_axes(scale: Mapping[str, Any]) -> Sequence[object] | None:
    """Name the axes of a multiscale image, by their type where the name is another."""
    if "axes" not in scale:
        return _OLD_AXES
    types = {"time": "t", "channel": "c"}
    return [
        axis if isinstance(axis, str) else types.get(axis.get("type"), axis["name"])
        for axis in scale["axes"]
    ]


def _is_inside(name: object) -> bool:
    """Tell whether a path in metadata stays in its group."""
    return isinstance(name, str) and name != "" and not {"", ".."} & set(name.split("/"))


def _damaged(node: _Node) -> MovieError:
    return MovieError(
        f"{node.path} has OME-Zarr metadata that are damaged, or of arrays that are not there: "
        "restore it, or name an array in it"
    )


def _refuse_group(node: _Node) -> MovieError:
    """Say what a group holds in place of one image."""
    try:
        if "plate" in node.ome:
            names = [f"{well['path']}/0" for well in node.ome["plate"]["wells"]]
            return _name_one(node, "a plate", names)
        if "well" in node.ome:
            return _name_one(node, "a well", [one["path"] for one in node.ome["well"]["images"]])
    except (KeyError, TypeError) as error:
        raise _damaged(node) from error
    inside = sorted(one.name for one in node.path.iterdir() if is_zarr(one))
    return _name_one(node, "a group without metadata of an OME-Zarr image", inside)


def _name_one(node: _Node, kind: str, names: Sequence[str]) -> MovieError:
    if not names:
        return MovieError(f"{node.path} is {kind}, and empty: expected an array or an image")
    return MovieError(
        f"{node.path} is {kind}: name one of what is in it, {_list_some(names)}, such as "
        f"{node.path / names[0]}"
    )


def _list_some(names: Iterable[str]) -> str:
    names = list(names)
    more = f", … ({len(names)} in all)" if len(names) > _MANY else ""
    return ", ".join(names[:_MANY]) + more


def _open_array(node: _Node) -> zarr.Array[Any]:
    import zarr

    with reading(str(node.path), f"{_CURE}, or install what brings its codecs"):
        return zarr.open_array(node.path, mode="r", zarr_format=node.version)


def _check_dtype(array: zarr.Array[Any], found: _Node, options: ReadOptions, where: str) -> None:
    labels = options.labels and found.is_ome
    if array.dtype.kind not in ("bui" if labels else "buif"):
        kind = "labels, which are integers" if labels else "real numbers"
        raise MovieError(f"{where} holds {array.dtype}: expected {kind}")


def _check_chunk_names(folder: Path, array: zarr.Array[Any], options: ReadOptions) -> None:
    """Raise where no chunk would be found: all would then be the fill value.

    Metadata of early OME-Zarr may say nothing of the slashes in its chunks' names.
    """
    first = array.metadata.encode_chunk_key((0,) * array.ndim).split("/")[0]
    form = re.compile(re.sub("[0-9]+", "[0-9]+", re.escape(first)))
    with reading(str(folder), _CURE):
        names = [one.name for one in folder.iterdir() if _CHUNK.fullmatch(one.name)]
    others = [name for name in names if not form.fullmatch(name)]
    if others:
        raise MovieError(
            f"{folder} has the chunk {min(others)!r} where its metadata expect names that begin "
            f"like {first!r}: correct the separator of its chunk names in the metadata"
        )
    if not names and not options.labels:
        raise MovieError(f"{folder} has no chunks, so all its pixels are one value: {_CURE}")
