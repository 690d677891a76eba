"""A movie in Zarr, of any version and layout, is the movie that a folder of TIFFs is."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import tifffile
import zarr
from zarr.codecs import BloscCodec

from feature_cache import MovieError, MovieNotFoundError
from feature_cache.errors import NoMasksError
from feature_cache.hashing import frame_digest
from feature_cache.movies import ReadOptions
from feature_cache.movies.arrays import images_of
from feature_cache.movies.zarrs import is_zarr, list_labels, open_labels, open_zarr

PLANES = np.random.default_rng(0).integers(0, 1000, (6, 40, 50)).astype(np.uint16)
VOLUMES = np.random.default_rng(1).integers(0, 1000, (3, 4, 20, 30)).astype(np.uint16)
Write = Callable[[Path, np.ndarray], object]


def write_array(folder: Path, movie: np.ndarray, version: int = 3, **options: Any) -> zarr.Array:
    chunks = options.pop("chunks", tuple(1 if n < 10 else n // 2 - 1 for n in movie.shape))
    array = zarr.create_array(
        folder,
        shape=movie.shape,
        dtype=movie.dtype,
        chunks=chunks,
        zarr_format=version,
        **options,
    )
    array[:] = movie
    return array


def write_attributes(folder: Path, version: int, attributes: dict[str, Any]) -> None:
    zarr.create_group(folder, zarr_format=version, attributes=attributes)


def describe(axes: str, paths: list[str], version: int) -> dict[str, Any]:
    """Give the metadata of a multiscale image, as the specifications 0.4 and 0.5 have them."""
    types = {"t": "time", "c": "channel"}
    scale = {
        "axes": [{"name": axis, "type": types.get(axis, "space")} for axis in axes],
        "datasets": [
            {
                "path": path,
                "coordinateTransformations": [{"type": "scale", "scale": [1.0] * len(axes)}],
            }
            for path in paths
        ],
    }
    if version == 2:
        return {"multiscales": [{"version": "0.4", **scale}]}
    return {"ome": {"version": "0.5", "multiscales": [scale]}}


def write_ome(
    folder: Path, image: np.ndarray, axes: str, version: int = 3, *, labels: Any = None
) -> Path:
    """Write an OME-Zarr image with two scales, and perhaps with label images."""
    write_attributes(folder, version, describe(axes, ["0", "1"], version))
    options: dict[str, Any] = {"chunk_key_encoding": {"name": "v2", "separator": "/"}}
    if version == 3:
        options = {"dimension_names": list(axes)}
    write_array(folder / "0", image, version, **options)
    write_array(folder / "1", image[..., ::2, ::2], version, **options)
    if labels:
        listed = {"labels": list(labels)}
        write_attributes(folder / "labels", version, listed if version == 2 else {"ome": listed})
        for name, (label_axes, values) in labels.items():
            write_ome(folder / "labels" / name, values, label_axes, version)
    return folder


BLOSC = numcodecs.Blosc(cname="zstd", shuffle=numcodecs.Blosc.BITSHUFFLE)
KINDS: dict[str, Write] = {
    "v3": write_array,
    "v3, sharded": lambda folder, movie: write_array(
        folder, movie, chunks=(1, *(10,) * (movie.ndim - 1)), shards=(3, *(20,) * (movie.ndim - 1))
    ),
    "v3, dots": lambda folder, movie: write_array(
        folder, movie, chunk_key_encoding={"name": "default", "separator": "."}
    ),
    "v3, raw": lambda folder, movie: write_array(folder, movie, compressors=None),
    "v3, one chunk": lambda folder, movie: write_array(folder, movie, chunks=movie.shape),
    "v3, two frames a chunk": lambda folder, movie: write_array(
        folder, movie, chunks=(2, *movie.shape[1:])
    ),
    "v2": lambda folder, movie: write_array(folder, movie, 2),
    "v2, slashes": lambda folder, movie: write_array(
        folder, movie, 2, chunk_key_encoding={"name": "v2", "separator": "/"}
    ),
    "v2, blosc": lambda folder, movie: write_array(folder, movie, 2, compressors=BLOSC),
    "v2, blosc lz4": lambda folder, movie: write_array(
        folder, movie, 2, compressors=numcodecs.Blosc(cname="lz4")
    ),
    "v3, blosc lz4": lambda folder, movie: write_array(
        folder, movie, compressors=BloscCodec(cname="lz4", typesize=2)
    ),
    "v2, big endian, fortran": lambda folder, movie: write_array(
        folder, movie.astype(">u2"), 2, order="F", filters=[numcodecs.Delta(dtype=">u2")]
    ),
    "OME-Zarr 0.4": lambda folder, movie: write_ome(folder, movie, axes_of(movie), 2),
    "OME-Zarr 0.5": lambda folder, movie: write_ome(folder, movie, axes_of(movie), 3),
    "OME-Zarr 0.4, five axes": lambda folder, movie: write_ome(folder, five(movie), "tczyx", 2),
    "OME-Zarr 0.5, X first": lambda folder, movie: write_ome(
        folder, movie.transpose(), axes_of(movie)[::-1], 3
    ),
}


def axes_of(movie: np.ndarray) -> str:
    return "tyx" if movie.ndim == 3 else "tzyx"


def five(movie: np.ndarray) -> np.ndarray:
    """Give a movie with all axes of OME-Zarr, C of one channel and Z of one slice perhaps."""
    return movie.reshape(len(movie), 1, -1, *movie.shape[-2:])


def check_same(images: Any, movie: np.ndarray) -> None:
    assert len(images) == len(movie)
    assert images.shape == movie.shape[1:]
    for t, image in enumerate(movie):
        assert type(images[t]) is np.ndarray
        assert images[t].shape == image.shape
        assert frame_digest(images[t]) == frame_digest(image)


@pytest.mark.parametrize(
    ("kind", "movie"),
    [
        pytest.param(kind, movie, id=f"{kind}, {name}", marks=[] if quick else pytest.mark.slow)
        for kind in KINDS
        for name, movie in (("planes", PLANES), ("volumes", VOLUMES))
        for quick in [name == "planes" or "OME" in kind or kind in ("v3", "v3, sharded", "v2")]
    ],
)
def test_any_zarr_is_the_same_movie(tmp_path, movie, kind):
    KINDS[kind](tmp_path / "movie.zarr", movie)
    images = open_zarr(tmp_path / "movie.zarr")
    check_same(images, movie)
    for t, image in enumerate(movie):
        tifffile.imwrite(tmp_path / f"t{t}.tif", image, photometric="minisblack")
        assert frame_digest(tifffile.imread(tmp_path / f"t{t}.tif")) == frame_digest(images[t])
    assert images.name_of(2) == "movie.zarr[2]"
    assert images.place == str(tmp_path / "movie.zarr")


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_an_image_are_those_it_needs(tmp_path, kind):
    """Without any one of them it is another image, or none; without all others it is the same."""
    folder = tmp_path / "movie.zarr"
    KINDS[kind](folder, PLANES)
    images = open_zarr(folder)
    files, digest = images.files_of(4), frame_digest(images[4])
    copy = tmp_path / "copy.zarr"
    for file in files:
        (copy / file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy / file.relative_to(folder))
    alone = open_zarr(copy)
    assert frame_digest(alone[4]) == digest
    assert alone.files_of(4) == tuple(copy / file.relative_to(folder) for file in files)
    chunks = [file for file in files if not file.name.startswith(".") and file.suffix != ".json"]
    assert len(chunks) >= 1
    for file in chunks:
        moved = (copy / file.relative_to(folder)).rename(tmp_path / "moved")
        assert frame_digest(alone[4]) != digest
        assert alone.files_of(4) == ()
        moved.rename(copy / file.relative_to(folder))


def test_only_the_chunks_of_an_image_are_read(tmp_path):
    write_array(tmp_path / "movie.zarr", PLANES)
    images = open_zarr(tmp_path / "movie.zarr")
    wanted = images.files_of(3)
    for file in (tmp_path / "movie.zarr").rglob("*"):
        if file.is_file() and file not in wanted:
            file.write_bytes(b"damaged")
    assert frame_digest(images[3]) == frame_digest(PLANES[3])
    with pytest.raises(MovieError, match=r"can't read movie\.zarr\[2\] in "):
        images[2]


def test_axes_of_other_sources(tmp_path):
    swapped = np.ascontiguousarray(VOLUMES.transpose(2, 1, 3, 0))
    write_array(tmp_path / "named", swapped, dimension_names=["y", "z", "x", "time"])
    check_same(open_zarr(tmp_path / "named"), VOLUMES)
    dims = {"_ARRAY_DIMENSIONS": ["y", "channel", "x", "t"]}
    write_array(tmp_path / "xarray", swapped, 2, attributes=dims)
    check_same(open_zarr(tmp_path / "xarray", ReadOptions(channel=2)), VOLUMES[:, 2])
    write_array(tmp_path / "plain", swapped)
    check_same(open_zarr(tmp_path / "plain", ReadOptions(axes="yzxt")), VOLUMES)


def test_axes_of_old_images(tmp_path):
    for name, axes in (("0.2", None), ("0.3", list("tczyx"))):
        write_ome(tmp_path / name, five(VOLUMES), "tczyx", 2)
        attributes = json.loads((tmp_path / name / ".zattrs").read_text())
        del attributes["multiscales"][0]["axes"]
        if axes:
            attributes["multiscales"][0]["axes"] = axes
        (tmp_path / name / ".zattrs").write_text(json.dumps(attributes))
        check_same(open_zarr(tmp_path / name), VOLUMES)


def test_what_is_told_counts_more_than_metadata(tmp_path):
    """Stacks of time are often stored as Z."""
    write_ome(tmp_path / "movie.zarr", PLANES, "zyx")
    with pytest.raises(MovieError, match=r"axes ZYX .* and no time: .*axes='TYX'"):
        open_zarr(tmp_path / "movie.zarr")
    check_same(open_zarr(tmp_path / "movie.zarr", ReadOptions(axes="TYX")), PLANES)


def test_a_dataset_has_the_axes_of_its_image(tmp_path):
    """An array of OME-Zarr 0.4 does not name them itself."""
    write_ome(tmp_path / "movie.zarr", VOLUMES.swapaxes(0, 1), "ctyx", 2)
    check_same(open_zarr(tmp_path / "movie.zarr" / "0", ReadOptions(channel=1)), VOLUMES[:, 1])
    half = open_zarr(tmp_path / "movie.zarr" / "1", ReadOptions(channel=1))
    check_same(half, VOLUMES[:, 1, ::2, ::2])
    write_ome(tmp_path / "volume.zarr", VOLUMES[0], "zyx", 2)
    with pytest.raises(MovieError, match=r"axes ZYX .* and no time"):
        open_zarr(tmp_path / "volume.zarr" / "0")


@pytest.mark.parametrize("linked", ["image", "array"])
def test_a_dataset_has_the_axes_of_its_image_through_links(tmp_path, linked):
    folder = write_ome(tmp_path / "movie.zarr", PLANES, "zyx", 2)
    place = tmp_path / "link"
    if linked == "array":
        place.symlink_to(folder / "0")
    else:
        (folder / "0").rename(tmp_path / "elsewhere")
        (folder / "0").symlink_to(tmp_path / "elsewhere")
        place = folder / "0"
    with pytest.raises(MovieError, match=r"axes ZYX .* and no time"):
        open_zarr(place)


def test_channels_are_chosen(tmp_path):
    write_ome(tmp_path / "movie.zarr", VOLUMES, "tcyx")
    with pytest.raises(MovieError, match=r"has 4 channels .*: choose one, such as channel=0"):
        open_zarr(tmp_path / "movie.zarr")
    images = open_zarr(tmp_path / "movie.zarr", ReadOptions(channel=3))
    check_same(images, VOLUMES[:, 3])
    others = open_zarr(tmp_path / "movie.zarr", ReadOptions(channel=2))
    assert images.recipe != others.recipe
    with pytest.raises(MovieError, match="channel 4 was asked for: expected 0 to 3"):
        open_zarr(tmp_path / "movie.zarr", ReadOptions(channel=4))


def test_a_missing_chunk_is_the_fill_value(tmp_path):
    """So the format has it; its writers leave out what is all of it."""
    movie = PLANES.copy()
    movie[2] = 7
    write_array(tmp_path / "movie.zarr", movie, fill_value=7)
    images = open_zarr(tmp_path / "movie.zarr")
    check_same(images, movie)
    assert images.files_of(2) == ()
    assert len(images.files_of(1)) > 1


def test_a_missing_chunk_without_a_fill_value(tmp_path):
    write_array(tmp_path / "movie.zarr", PLANES, 2, fill_value=None)
    images = open_zarr(tmp_path / "movie.zarr")
    check_same(images, PLANES)
    images.files_of(2)[-1].unlink()
    with pytest.raises(MovieError, match="is missing, and the array says no value"):
        images[2]


def test_an_array_without_chunks(tmp_path):
    write_array(tmp_path / "movie.zarr", np.zeros_like(PLANES))
    with pytest.raises(MovieError, match="has no chunks, so all its pixels are one value"):
        open_zarr(tmp_path / "movie.zarr")
    masks = open_zarr(tmp_path / "movie.zarr", ReadOptions(labels=True))
    check_same(masks, np.zeros_like(PLANES))


def test_chunks_of_another_naming(tmp_path):
    """Early writers of OME-Zarr left out that the names have slashes; all would be empty."""
    folder = tmp_path / "movie.zarr"
    write_array(folder, PLANES, 2, chunk_key_encoding={"name": "v2", "separator": "/"})
    metadata = json.loads((folder / ".zarray").read_text())
    del metadata["dimension_separator"]
    (folder / ".zarray").write_text(json.dumps(metadata))
    with pytest.raises(MovieError, match=r"chunk '0' where its metadata .* like '0\.0\.0'"):
        open_zarr(folder)


class TestLabels:
    @pytest.mark.parametrize("version", [2, 3])
    def test_are_listed_and_opened(self, tmp_path, version):
        masks = (five(PLANES) > 500).astype(np.int32)
        labels = {"cells": ("tczyx", masks), "nuclei": ("tyx", PLANES.astype(np.int64))}
        write_ome(tmp_path / "movie.zarr", five(PLANES), "tczyx", version, labels=labels)
        assert list_labels(tmp_path / "movie.zarr") == ("cells", "nuclei")
        check_same(open_labels(tmp_path / "movie.zarr", "cells"), masks[:, 0, 0])
        check_same(open_labels(tmp_path / "movie.zarr", "nuclei"), PLANES)
        direct = open_zarr(tmp_path / "movie.zarr" / "labels" / "cells", ReadOptions(labels=True))
        check_same(direct, masks[:, 0, 0])

    def test_what_goes_with_frames_goes_with_labels(self, tmp_path):
        labels = {"cells": ("tzyx", VOLUMES)}
        image = np.stack([VOLUMES] * 2, axis=1)
        folder = write_ome(tmp_path / "movie.zarr", image, "tczyx", labels=labels)
        check_same(open_labels(folder, "cells", ReadOptions(1, "TCZYX")), VOLUMES)

    def test_none(self, tmp_path):
        write_ome(tmp_path / "movie.zarr", PLANES, "tyx")
        write_array(tmp_path / "array", PLANES)
        tifffile.imwrite(tmp_path / "t0.tif", PLANES[0])
        for path in ("movie.zarr", "movie.zarr/0", "array", "", "t0.tif", "missing"):
            assert list_labels(tmp_path / path) == ()
        with pytest.raises(NoMasksError, match="no label image 'cells': expected one of none"):
            open_labels(tmp_path / "movie.zarr", "cells")

    def test_that_are_no_integers(self, tmp_path):
        labels = {"cells": ("tyx", PLANES.astype(np.float32))}
        folder = write_ome(tmp_path / "movie.zarr", PLANES, "tyx", labels=labels)
        with pytest.raises(MovieError, match="float32: expected labels, which are integers"):
            open_labels(folder, "cells")

    @pytest.mark.parametrize("listed", ["cells", [1], ["../other"], [""]])
    def test_a_list_that_is_none(self, tmp_path, listed):
        write_ome(tmp_path / "movie.zarr", PLANES, "tyx")
        write_attributes(tmp_path / "movie.zarr" / "labels", 3, {"ome": {"labels": listed}})
        with pytest.raises(MovieError, match="metadata that are damaged"):
            list_labels(tmp_path / "movie.zarr")


def plate(folder: Path, version: int) -> None:
    wells = [{"path": f"{row}/{column}"} for row in "AB" for column in (1, 2)]
    attributes: dict[str, Any] = {"plate": {"wells": wells}}
    write_attributes(folder, version, attributes if version == 2 else {"ome": attributes})
    well: dict[str, Any] = {"well": {"images": [{"path": "0"}, {"path": "1"}]}}
    write_attributes(folder / "A/1", version, well if version == 2 else {"ome": well})
    write_ome(folder / "A/1/1", PLANES, "tyx", version)


def bioformats(folder: Path, version: int, series: int, *, listed: bool = False) -> None:
    layout: dict[str, Any] = {"bioformats2raw.layout": 3}
    write_attributes(folder, version, layout if version == 2 else {"ome": layout})
    names = [str(number + 5 * listed) for number in range(series)]
    if listed:
        known: dict[str, Any] = {"series": names}
        write_attributes(folder / "OME", version, known if version == 2 else {"ome": known})
    for name in names:
        write_ome(folder / name, PLANES, "tyx", version, labels={"cells": ("tyx", PLANES)})


@pytest.mark.parametrize("version", [2, 3])
def test_a_plate_and_its_wells_name_what_is_in_them(tmp_path, version):
    plate(tmp_path / "plate.zarr", version)
    with pytest.raises(
        MovieError, match=r"a plate: name .*A/1/0, A/2/0, .*such as .*plate\.zarr/A"
    ):
        open_zarr(tmp_path / "plate.zarr")
    with pytest.raises(MovieError, match=r"A/1 is a well: name one of what is in it, 0, 1, such"):
        open_zarr(tmp_path / "plate.zarr/A/1")
    check_same(open_zarr(tmp_path / "plate.zarr/A/1/1"), PLANES)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("listed", [True, False])
def test_what_bioformats_writes(tmp_path, version, listed):
    bioformats(tmp_path / "one.zarr", version, 1, listed=listed)
    check_same(open_zarr(tmp_path / "one.zarr"), PLANES)
    assert list_labels(tmp_path / "one.zarr") == ("cells",)
    check_same(open_labels(tmp_path / "one.zarr", "cells"), PLANES)
    bioformats(tmp_path / "two.zarr", version, 2, listed=listed)
    first = "5" if listed else "0"
    with pytest.raises(MovieError, match=f"holds 2 images: name one of {first}, .*zarr/{first}"):
        open_zarr(tmp_path / "two.zarr")


def two_images(folder: Path) -> None:
    metadata = describe("tyx", ["0"], 3)
    metadata["ome"]["multiscales"] *= 2
    write_attributes(folder, 3, metadata)
    write_array(folder / "0", PLANES)


def lone_group(folder: Path) -> None:
    write_attributes(folder, 3, {})
    for name in ("masks", "images"):
        write_array(folder / name, PLANES)


def both(folder: Path) -> None:
    write_array(folder, PLANES)
    (folder / "zarr.json").write_text("{}")


def unknown_codec(folder: Path) -> None:
    write_array(folder, PLANES)
    text = (folder / "zarr.json").read_text()
    (folder / "zarr.json").write_text(text.replace('"zstd"', '"my-own"'))


def text_of(name: str, text: str) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / name).write_text(text)

    return write


def ome_of(**scale: Any) -> Callable[[Path], object]:
    def write(folder: Path) -> None:
        write_attributes(folder, 2, {"multiscales": [scale]})

    return write


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (lambda folder: None, "no movie at .*: no such folder"),
        (lambda folder: folder.mkdir(), r"no Zarr array or group: .*zarr\.json.*found nothing"),
        (text_of("a.tif", ""), r"no Zarr array or group: .*found a\.tif"),
        (lambda folder: folder.touch(), "is a file, and Zarr is a folder: name its folder"),
        (text_of("zarr.json", "{"), r"zarr\.json is damaged"),
        (text_of("zarr.json", "[]"), r"zarr\.json is damaged"),
        (text_of("zarr.json", "{}"), "no metadata of Zarr v3"),
        (text_of(".zarray", "\0"), r"\.zarray is damaged"),
        (text_of(".zarray", "{}"), "can't read .*restore it or leave it out"),
        (both, "no metadata of Zarr v3"),
        (lone_group, "a group without metadata of an OME-Zarr image: .*images, masks, such as"),
        (lambda folder: write_attributes(folder, 2, {}), "OME-Zarr image, and empty"),
        (two_images, "holds 2 multiscale images: name the array of one, 0, 0, such as"),
        (lambda folder: bioformats(folder, 3, 0), "holds 0 images"),
        (unknown_codec, "can't read .*my-own.*or install what brings its codecs"),
        (ome_of(), "metadata that are damaged"),
        (ome_of(datasets=[]), "metadata that are damaged"),
        (ome_of(datasets=[{"path": "../0"}]), "metadata that are damaged"),
        (ome_of(datasets=[{"path": "0"}], axes=[{"type": "t"}]), "metadata that are damaged"),
        (ome_of(datasets=[{"path": "0"}]), "0 is no Zarr array or group"),
        (lambda folder: write_attributes(folder, 2, {"multiscales": 3}), "are damaged"),
        (lambda folder: write_attributes(folder, 2, {"plate": {"wells": [1]}}), "are damaged"),
        (lambda folder: write_array(folder, PLANES[0]), r"shape \(40, 50\) and does not name"),
        (lambda folder: write_array(folder, five(VOLUMES)), "does not name its axes"),
        (
            lambda folder: write_array(folder, VOLUMES.transpose(0, 2, 3, 1)),
            r"\(3, 20, 30, 4\), whose last axis looks like channels: .*'TYXC'",
        ),
        (lambda folder: write_array(folder, PLANES.astype("c8")), "holds complex64: expected real"),
        (
            lambda folder: write_array(folder, PLANES, dimension_names=["t", "y", "phase"]),
            "calls its axes t, y, phase: expected",
        ),
        (
            lambda folder: write_array(folder, PLANES, dimension_names=["t", "y", None]),
            "calls its axes t, y, None: expected",
        ),
        (
            lambda folder: write_array(folder, PLANES, dimension_names=["t", "y", "y"]),
            "axes TYY .*: expected T, Y and X, each once",
        ),
    ],
)
def test_what_is_no_movie(tmp_path, arrange, message):
    arrange(tmp_path / "movie.zarr")
    with pytest.raises(MovieError, match=message):
        open_zarr(tmp_path / "movie.zarr")


@pytest.mark.parametrize("url", ["s3://bucket/movie.zarr", "https://host/movie.zarr", "gs:/b/m"])
def test_what_is_elsewhere(url):
    with pytest.raises(MovieError, match="not on this machine: copy it to a folder here"):
        open_zarr(url)


def test_what_is_packed(tmp_path):
    (tmp_path / "movie.zarr.zip").touch()
    with pytest.raises(MovieError, match="is a file, and Zarr is a folder: unpack it"):
        open_zarr(tmp_path / "movie.zarr.zip")


def test_what_is_missing_is_not_found(tmp_path):
    with pytest.raises(MovieNotFoundError):
        open_zarr(tmp_path / "movie.zarr")
    assert not is_zarr(tmp_path)


DAMAGED = ["v3", "v3, sharded", "v3, raw", "v2", "v2, blosc", "OME-Zarr 0.4"]
DAMAGED += ["v2, blosc lz4", "v3, blosc lz4"]


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_chunk_cut_short(tmp_path, kind):
    """At any place: never other pixels."""
    KINDS[kind](tmp_path / "movie.zarr", PLANES)
    images = open_zarr(tmp_path / "movie.zarr")
    chunk = images.files_of(3)[-1]
    whole = chunk.read_bytes()
    digest = frame_digest(images[3])
    for size in sorted({0, 1, 3, 8, 16, 17, len(whole) // 2, len(whole) - 5, len(whole) - 1}):
        chunk.write_bytes(whole[:size])
        with pytest.raises(MovieError, match=r"can't read movie\.zarr\[3\] in .*; restore it"):
            images[3]
        if "blosc" in kind:
            with pytest.raises(MovieError, match="can't read"):
                images_of(zarr.open_array(tmp_path / "movie.zarr", mode="r"))[3]
    chunk.write_bytes(whole)
    assert frame_digest(images[3]) == digest


@pytest.mark.parametrize("kind", ["v3", "v2", "OME-Zarr 0.4", "OME-Zarr 0.5"])
def test_metadata_that_change_after_opening(tmp_path, kind):
    """A digest would be remembered of what neither the old nor the new movie is."""
    KINDS[kind](tmp_path / "movie.zarr", PLANES)
    images = open_zarr(tmp_path / "movie.zarr")
    images[0]
    for file in images.files_of(0):
        if file.name in ("zarr.json", ".zarray", ".zattrs"):
            text = file.read_text()
            file.write_text(text + " ")
            with pytest.raises(MovieError, match="changed since it was opened: open the movie"):
                images[0]
            file.write_text(text)
    images[0]


def test_recipes_tell_what_decides_the_pixels(tmp_path):
    write_array(tmp_path / "movie.zarr", VOLUMES)
    recipe = open_zarr(tmp_path / "movie.zarr").recipe
    assert f"zarr {zarr.__version__}" in recipe
    assert "TZYX" in recipe
    assert open_zarr(tmp_path / "movie.zarr", ReadOptions(0, "TCYX")).recipe != recipe


def read_after_fork(images: Any, digests: Any) -> None:
    for t in range(len(images)):
        digests.put(frame_digest(images[t]))


class TestShared:
    @pytest.fixture
    def images(self, tmp_path: Path) -> Any:
        KINDS["v3, sharded"](tmp_path / "movie.zarr", PLANES)
        return open_zarr(tmp_path / "movie.zarr")

    def test_pickles_are_small(self, images):
        pickled = pickle.dumps(images)
        assert len(pickled) < 5000
        check_same(pickle.loads(pickled), PLANES)

    def test_threads(self, images):
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(images.__getitem__, list(range(6)) * 10))
        for t, image in zip(list(range(6)) * 10, read, strict=True):
            assert frame_digest(image) == frame_digest(PLANES[t])

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_right_after_a_fork(self, images):
        images[0]  # zarr's threads run
        context = multiprocessing.get_context("fork")
        digests = context.Queue()
        child = context.Process(target=read_after_fork, args=(images, digests))
        child.start()
        found = [digests.get(timeout=60) for _ in range(6)]
        child.join()
        assert found == [frame_digest(image) for image in PLANES]
