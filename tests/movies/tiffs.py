"""TIFF files of every kind, and what they are."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

Image = NDArray[Any]
Write = Callable[[Path], None]

H, W = 18, 20


def draw(*outer: int, dtype: str = "uint16", high: int = 200, seed: int = 0) -> Image:
    """Draw noise of shape (*outer, H, W)."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, high, (*outer, H, W)).astype(dtype)


PLANE, VOLUME, STACK = draw(), draw(5, seed=1), draw(4, 3, seed=2)
COLOUR = draw(3, dtype="uint8").transpose(1, 2, 0).copy()
GRAY_MAP = np.tile(np.linspace(0, 65535, 256), (3, 1)).astype("uint16")


def write(image: Image, **options: Any) -> Write:
    """Write by tifffile, as people do."""

    def write_all(file: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of slices as colours, as asked
            tifffile.imwrite(file, image, **options)

    return write_all


def write_gray(image: Image, **options: Any) -> Write:
    return write(image, photometric="minisblack", **options)


def write_raw(image: Image, **options: Any) -> Write:
    """Write pages without a word on what they are."""
    return write_gray(image, metadata=None, **options)


def write_series(*images: Image, **options: Any) -> Write:
    """Write images one after the other, each a series of its own."""

    def write_all(file: Path) -> None:
        with tifffile.TiffWriter(file) as writer:
            for image in images:
                writer.write(image, **{"photometric": "minisblack", **options})

    return write_all


def write_steps(*steps: tuple[Image, dict[str, Any]]) -> Write:
    """Write pages, each by options of its own."""

    def write_all(file: Path) -> None:
        with tifffile.TiffWriter(file) as writer:
            for image, options in steps:
                writer.write(image, **{"photometric": "minisblack", "metadata": None, **options})

    return write_all


def write_run(image: Image, description: str, **options: Any) -> Write:
    """Write planes as ImageJ writes big ones: a page for the first, and the others after it."""

    def write_all(file: Path) -> None:
        planes = image.reshape(-1, H, W)
        write_raw(planes[0], description=description, **options)(file)
        with file.open("ab") as handle:
            handle.write(planes[1:].astype(f"{options.get('byteorder', '<')}u2").tobytes())

    return write_all


def append(before: Write, nbytes: int) -> Write:
    """Add bytes that no tag tells of."""

    def write_all(file: Path) -> None:
        before(file)
        with file.open("ab") as handle:
            handle.write(bytes(nbytes))

    return write_all


def patch(before: Write, *tags: tuple[int, Any], page: int = 0) -> Write:
    """Overwrite tags of what is written."""

    def write_all(file: Path) -> None:
        before(file)
        with tifffile.TiffFile(file, mode="r+b") as opened:
            for code, value in tags:
                opened.pages[page].tags[code].overwrite(value)

    return write_all


def spoil(before: Write, code: int, at: int, content: bytes) -> Write:
    """Overwrite bytes of a tag's entry: from 2 its type, from 4 its count, from 8 its place."""

    def write_all(file: Path) -> None:
        before(file)
        with tifffile.TiffFile(file) as opened:
            offset = opened.pages.first.tags[code].offset
        with file.open("r+b") as handle:
            handle.seek(offset + at)
            handle.write(content)

    return write_all


def rename_tag(before: Write, code: int, new: int) -> Write:
    """Give the tag of one short number another code."""

    def write_all(file: Path) -> None:
        before(file)
        old, content = struct.pack("<HHI", code, 3, 1), file.read_bytes()
        assert content.count(old) == 1
        file.write_bytes(content.replace(old, struct.pack("<HHI", new, 3, 1)))

    return write_all


def say_ome(
    sizes: dict[str, int], entries: str, *, order: str = "XYZCT", uuid: str | None = None
) -> str:
    """Give OME metadata of one image."""
    size = "".join(f' Size{axis}="{sizes.get(axis, 1)}"' for axis in "TZC")
    identity = "" if uuid is None else f' UUID="{uuid}"'
    return (
        f'<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"{identity}><Image ID="I:0">'
        f'<Pixels ID="P:0" DimensionOrder="{order}" Type="uint16" SizeX="{W}" SizeY="{H}"{size}>'
        f"{entries}</Pixels></Image></OME>"
    )


def say_files(times: int, slices: int) -> str:
    """Give the entries of a series of files, one a timepoint."""
    return "".join(
        f'<TiffData IFD="{z}" FirstT="{t}" FirstZ="{z}" PlaneCount="1">'
        f'<UUID FileName="t{t}.ome.tif">urn:uuid:{t}</UUID></TiffData>'
        for t in range(times)
        for z in range(slices)
    )


def write_ome_files(folder: Path, images: Image, *, known: bool = True) -> list[Path]:
    """Write (T, Z, H, W) as a series of OME-TIFFs, each of which names all of them."""
    times, slices = images.shape[:2]
    files = []
    for t, image in enumerate(images):
        text = say_ome(
            {"T": times, "Z": slices},
            say_files(times, slices),
            uuid=f"urn:uuid:{t}" if known else None,
        )
        files.append(folder / f"t{t}.ome.tif")
        write_raw(image, description=text)(files[-1])
    return files


def shorten(file: Path, step: int = 1) -> Iterator[int]:
    """Cut a file shorter and shorter, to nothing; gives its sizes."""
    for size in range(file.stat().st_size - 1, -1, -step):
        with file.open("r+b") as handle:
            handle.truncate(size)
        yield size
