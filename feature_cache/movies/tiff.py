"""TIFF files: an image of one timepoint, or a whole movie in one file."""

from __future__ import annotations

import contextvars
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import tifffile
from numpy.typing import NDArray

from .faults import DamageError, FaultError, open_image
from .ifd import COMPRESSION, FILL, PREDICTOR, ROWS, TILES, Page, read_pages
from .images import InOneFile, ReadOptions
from .verdict import Plane, Verdict, judge

_LOSSLESS = (5, 8, 32946, 32773, 50000)
"""Codes of compressions: LZW, deflate twice, packbits, zstd."""

TIFF_RECIPE = f"TIFF 1, tifffile {tifffile.__version__}"
"""What decides pixels besides the file; its number rises when files come to mean others."""


def read_tiff(file: Path, options: ReadOptions = ReadOptions()) -> NDArray[Any]:  # noqa: B008
    """Read a TIFF file that holds one timepoint: (H, W) or (Z, H, W).

    Raises
    ------
    MovieError
        It can't be read, is not whole, or is no single plane or volume of one channel.
    """
    with open_image(file) as handle:
        tiff = read_pages(file.name, handle)
        verdict = judge(tiff, options)
        return _read(handle, verdict, verdict.times[0], {page.offset: page for page in tiff.pages})


def tiff_shape(file: Path, options: ReadOptions = ReadOptions()) -> tuple[int, ...]:  # noqa: B008
    """Give the shape of what `read_tiff` gives, reading no pixels; errors as there."""
    with open_image(file) as handle:
        return judge(read_pages(file.name, handle), options).shape


def check_volume(file: Path, options: ReadOptions) -> None:
    """Raise MovieError where the planes of an only file may well be times; also as `read_tiff`."""
    with open_image(file) as handle:
        if not judge(read_pages(file.name, handle), options).is_told:
            raise FaultError(
                "is the only frame, and does not say that its planes are slices: if they are "
                'times, open the file itself as the movie (axes="TYX", --axes TYX); else say '
                'axes="ZYX" (--axes ZYX)'
            )


@dataclass(frozen=True)
class TiffStack(InOneFile):
    """The images of a movie that is one TIFF file, each read when it is asked for.

    No file is held open, so that a stack may be shared between threads, pickled, and used after a
    fork; a file that has changed since is not read.

    Parameters
    ----------
    stamp : tuple of int
        What the file looked like when it was opened.
    """

    options: ReadOptions
    verdict: Verdict = field(repr=False)
    stamp: tuple[int, ...] = field(repr=False)

    @classmethod
    def open(cls, file: Path, options: ReadOptions = ReadOptions()) -> TiffStack:  # noqa: B008
        """Find the images of a movie in a file; reads no pixels.

        Raises
        ------
        MovieError
            It can't be read, is not whole, has no axis of time, or more than one channel.
        """
        with open_image(file) as handle:
            verdict = judge(read_pages(file.name, handle), options, stack=True)
            return cls(file, options, verdict, _stamp(handle))

    def __len__(self) -> int:
        return len(self.verdict.times)

    def __getitem__(self, t: int) -> NDArray[Any]:
        """Read image `t`: (H, W) or (Z, H, W)."""
        planes = self.verdict.times[t]
        with open_image(self.file) as handle:
            if _stamp(handle) != self.stamp:
                raise FaultError("has changed since it was opened: open the movie again")
            return _read(handle, self.verdict, planes, {})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of an image."""
        return self.verdict.shape

    @property
    def recipe(self) -> str:
        """Say what, besides the file, decides the pixels."""
        return f"stack, {self.options}, {TIFF_RECIPE}"


def _stamp(handle: BufferedReader) -> tuple[int, ...]:
    found = os.fstat(handle.fileno())
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def _read(
    handle: BufferedReader, verdict: Verdict, planes: Sequence[Plane], known: Mapping[int, Page]
) -> NDArray[Any]:
    """Read the planes of a timepoint, (H, W) or (Z, H, W); some pages are known already."""
    places = list(dict.fromkeys((plane.page, plane.run) for plane in planes))
    found = [known[offset] for offset, _ in places if offset in known]
    if all(plane.run for plane in planes):
        pages = _read_runs(handle, verdict, places)
    elif len(found) == len(places) and all(map(_has_plain_strips, found)):
        pages = np.stack([_decode_strips(handle, verdict, page) for page in found])
    else:
        pages = _decode_pages(handle, verdict, places)
    return _arrange(pages, verdict, planes, places)


def _arrange(
    pages: NDArray[Any],
    verdict: Verdict,
    planes: Sequence[Plane],
    places: Sequence[tuple[int, int]],
) -> NDArray[Any]:
    """Give the planes of pages, of which some may hold several, in their order."""
    found, expected = (pages.shape[1:], pages.dtype), (verdict.page, verdict.native)
    if found != expected:
        raise FaultError(f"gives pixels of shape, dtype {found}, expected {expected}: save it anew")
    if verdict.axis is not None:
        parts = [
            pages[places.index((plane.page, plane.run))].take(plane.sample, axis=verdict.axis)
            for plane in planes
        ]
        pages = np.stack(parts)
    return pages.reshape(verdict.shape)


def _read_runs(
    handle: BufferedReader, verdict: Verdict, places: Sequence[tuple[int, int]]
) -> NDArray[Any]:
    """Read pages that are plain bytes: (N, *page)."""
    pages = np.empty((len(places), *verdict.page), verdict.dtype)
    for page, (_, start) in zip(pages, places, strict=True):
        handle.seek(start)
        if handle.readinto(page.data.cast("B")) < page.nbytes:
            raise DamageError("was cut short while it was read")
    return pages.astype(verdict.native, copy=False)


def _has_plain_strips(page: Page) -> bool:
    """Tell whether a page is of the usual form, which needs no more than its strips' decoder."""
    plain = page.samples == 1 == page.get(FILL, 1) and TILES not in page.tags
    whole = page.bits in (8, 16, 32, 64) and page.get(COMPRESSION, 1) in _LOSSLESS
    return plain and whole and page.get(PREDICTOR, 1) in ((1, 2) if page.format in (1, 2) else (1,))


def _decode_strips(handle: BufferedReader, verdict: Verdict, page: Page) -> NDArray[Any]:
    """Decode a page of the usual form, by tifffile's decoders without its walk over the file."""
    pixels = np.empty(verdict.page, verdict.dtype)
    rows, decode = (
        page.get(ROWS, len(pixels)),
        tifffile.TIFF.DECOMPRESSORS[page.get(COMPRESSION, 1)],
    )
    for number, (start, size) in enumerate(zip(*page.segments, strict=False)):
        strip = pixels[number * rows : (number + 1) * rows]
        if not strip.size:
            break
        handle.seek(start)
        content = decode(handle.read(size), out=strip.nbytes)
        if len(content) != strip.nbytes:
            raise DamageError(f"is damaged: strip {number} of its pixels has too few bytes")
        strip[...] = np.frombuffer(content, strip.dtype).reshape(strip.shape)
    native = pixels.astype(verdict.native, copy=False)
    return imagecodecs.delta_decode(native, axis=-1) if page.get(PREDICTOR, 1) == 2 else native


def _decode_pages(
    handle: BufferedReader, verdict: Verdict, places: Sequence[tuple[int, int]]
) -> NDArray[Any]:
    """Decode pages: (N, *page)."""
    handle.seek(0)
    with _silence(), tifffile.TiffFile(handle) as opened:
        first, pages = opened.pages.first, []
        for number, (offset, _) in enumerate(places):
            opened.filehandle.seek(offset)
            same = offset == first.offset
            pages.append(first if same else tifffile.TiffPage(opened, number))
        if len(pages) == 1:
            return pages[0].asarray()[np.newaxis]
        shape = (len(pages), *pages[0].shape)
        series = tifffile.TiffPageSeries(pages, shape, pages[0].dtype, f"Q{pages[0].axes}")
        return opened.asarray(series=series, squeeze=False)


@contextmanager
def _silence() -> Iterator[None]:
    """Drop what tifffile logs in here; its errors, of no built-in kind at times, are faults."""
    token = _silent.set(True)
    try:
        yield
    except tifffile.TiffFileError as error:
        raise DamageError(f"is damaged ({error})") from error
    finally:
        _silent.reset(token)


_silent = contextvars.ContextVar("_silent", default=False)
logging.getLogger("tifffile").addFilter(lambda _: not _silent.get())
