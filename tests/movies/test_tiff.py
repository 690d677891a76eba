from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import shutil
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from feature_cache import MovieError
from feature_cache.movies import ReadOptions, read_image
from feature_cache.movies.image_files import image_shape
from feature_cache.movies.tiff import TiffStack
from tiffs import (
    COLOUR,
    GRAY_MAP,
    PLANE,
    STACK,
    VOLUME,
    H,
    Image,
    W,
    Write,
    append,
    draw,
    patch,
    rename_tag,
    say_files,
    say_ome,
    shorten,
    spoil,
    write,
    write_gray,
    write_ome_files,
    write_raw,
    write_run,
    write_series,
    write_steps,
)

BITS = PLANE > 100
SMALL = PLANE.astype("uint8")
MASKS = ReadOptions(labels=True)
GREEN = GRAY_MAP * np.array([[0], [1], [0]], "uint16")
THUMBNAIL = (PLANE[::2, ::2], {"subfiletype": 1})
TIMES = "open the file itself as the movie"
CHANNEL = r"name one \(channel=0, --channel 0\)"
CURE = r"axes=|channel=|save it|save the|restore the file|name as many|give it back|counted from 0"
GRAY = r'save it in gray \(photometric="minisblack"\)'


def told(axes: str | None = None, channel: int | None = None, labels: bool = False) -> ReadOptions:
    return ReadOptions(channel, axes, labels)


def check(image: Image, expected: Image) -> None:
    assert image.dtype == expected.dtype
    assert image.shape == expected.shape
    assert np.array_equal(image, expected)


def read_movie(file: Path, options: ReadOptions) -> Image:
    stack = TiffStack.open(file, options)
    images = [stack[t] for t in range(len(stack))]
    assert all(image.shape == stack.shape for image in images)
    return np.stack(images)


@pytest.fixture(autouse=True)
def silent(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Any:
    """Nothing is printed or logged, whatever a file is."""
    yield
    assert not [record for record in caplog.records if record.name == "tifffile"]
    assert capfd.readouterr() == ("", "")


READ: dict[str, tuple[Write, ReadOptions, Image]] = {
    "plane": (write(PLANE), told(), PLANE),
    "a volume of one slice": (write(VOLUME[:1]), told(), VOLUME[0]),
    **{f"{z} slices by imwrite": (write(draw(z)), told(), draw(z)) for z in (2, 3, 4, 5, 6)},
    **{
        f"{z} slices, {dtype}": (write(draw(z, dtype=dtype)), told(), draw(z, dtype=dtype))
        for z in (3, 4)
        for dtype in ("uint8", "float32")
    },
    "3 slices named": (write(draw(3), metadata={"axes": "ZYX"}), told(), draw(3)),
    "3 slices, compressed": (write(draw(3), compression="zlib"), told(), draw(3)),
    "3 slices in tiles": (write(draw(3), tile=(16, 16)), told(), draw(3)),
    "slices of one row": (write(draw(3)[:, :1]), told(), draw(3)[:, :1]),
    "a last axis of one": (write(PLANE[..., None]), told(), PLANE),
    "planar by tifffile": (write_gray(VOLUME, planarconfig="separate"), told(), VOLUME),
    "ImageJ slices": (write(VOLUME, imagej=True, metadata={"axes": "ZYX"}), told(), VOLUME),
    "ImageJ stack": (write_raw(VOLUME, description="ImageJ=1\nimages=5\n"), told(), VOLUME),
    "ImageJ in one run": (write_run(VOLUME, "ImageJ=1\nimages=5\nslices=5\n"), told(), VOLUME),
    "ImageJ in one run, big-endian": (
        write_run(VOLUME, "ImageJ=1\nimages=5\nslices=5\n", byteorder=">"),
        told(),
        VOLUME,
    ),
    "tifffile in one run": (write_gray(VOLUME, truncate=True), told(), VOLUME),
    "old tifffile in one run": (
        write_run(VOLUME, f'{{"truncated": true, "shape": [5, {H}, {W}]}}'),
        told(),
        VOLUME,
    ),
    "older tifffile": (write_raw(VOLUME, description=f"shape=(5, {H}, {W})"), told(), VOLUME),
    "JSON of others": (write_raw(VOLUME, description='{"cells": 5}'), told(), VOLUME),
    "a few bytes more": (append(write(PLANE), 2 * H * W - 1), told(), PLANE),
    "OME slices": (write(VOLUME, ome=True, metadata={"axes": "ZYX"}), told(), VOLUME),
    "OME of another order": (
        write_raw(
            VOLUME[:4],
            description=say_ome({"Z": 2, "C": 2}, "<TiffData/>", order="XYCZT"),
        ),
        told(channel=1),
        VOLUME[1:4:2],
    ),
    "OME pages in disorder": (
        write_raw(
            VOLUME[:3],
            description=say_ome(
                {"Z": 3}, "".join(f'<TiffData IFD="{2 - z}" FirstZ="{z}"/>' for z in range(3))
            ),
        ),
        told(),
        VOLUME[2::-1],
    ),
    "OME of a file of many, whose name has changed": (
        write_raw(PLANE, description=say_ome({"T": 9}, say_files(9, 1), uuid="urn:uuid:7")),
        told(),
        PLANE,
    ),
    "OME elsewhere": (
        write_raw(PLANE, description='<OME><BinaryOnly UUID=""/></OME>'),
        told(),
        PLANE,
    ),
    "pages without a word": (write_raw(VOLUME), told(), VOLUME),
    "words that are none": (write_raw(VOLUME, description="cells"), told(), VOLUME),
    "words, and axes": (write(draw(3), description="x", metadata={"axes": "ZYX"}), told(), draw(3)),
    "a thumbnail first": (write_steps(THUMBNAIL, (PLANE, {})), told(), PLANE),
    "a thumbnail of old": (
        patch(
            write_steps((PLANE, {}), (PLANE[::2, ::2], {"extratags": [(255, 3, 1, 2, True)]})),
            page=1,
        ),
        told(),
        PLANE,
    ),
    "pyramid levels": (write_steps((PLANE, {}), THUMBNAIL, THUMBNAIL), told(), PLANE),
    "levels in SubIFDs": (write_steps((PLANE, {"subifds": 1}), THUMBNAIL), told(), PLANE),
    "a channel of ImageJ": (write(VOLUME, imagej=True), told(channel=3), VOLUME[3]),
    "a channel of OME": (write(VOLUME, ome=True), told(channel=3), VOLUME[3]),
    "channels in truth slices": (write(VOLUME, imagej=True), told("ZYX"), VOLUME),
    "a channel of a volume": (
        write(STACK, imagej=True, metadata={"axes": "ZCYX"}),
        told(channel=2),
        STACK[:, 2],
    ),
    "slices of channels": (write(STACK), told("CZYX", channel=1), STACK[1]),
    "a sample of RGB": (write(COLOUR), told(channel=2), COLOUR[..., 2]),
    "a sample of planar RGB": (write(draw(3), metadata=None), told(channel=1), draw(3)[1]),
    "a sample of compressed RGB": (
        write(COLOUR, compression="zlib", predictor=True),
        told(channel=1),
        COLOUR[..., 1],
    ),
    "a sample of each page": (
        write(np.stack([COLOUR, COLOUR + 1]), metadata={"axes": "ZYXS"}),
        told(channel=1),
        np.stack([COLOUR, COLOUR + 1])[..., 1],
    ),
    "gray of gray and alpha": (
        write_gray(COLOUR[..., :2], planarconfig="contig", extrasamples=["unassalpha"]),
        told(channel=0),
        COLOUR[..., 0],
    ),
    "colour that is slices": (write(draw(3), metadata=None), told("ZYX"), draw(3)),
    "the only channel": (write(PLANE), told(channel=0), PLANE),
    "slices told, of which there is one": (write(PLANE), told("ZYX"), PLANE),
    "the time of one": (write(PLANE[None, None]), told("TZYX"), PLANE),
    "a gray ramp": (write(SMALL, photometric="palette", colormap=GRAY_MAP), told(), SMALL),
    "a ramp of 8 bits": (
        write(SMALL, photometric="palette", colormap=GRAY_MAP // 257 * 256),
        told(),
        SMALL,
    ),
    "a green ramp": (write(SMALL, photometric="palette", colormap=GREEN), told(), SMALL),
    "labels by a palette": (
        write(SMALL, photometric="palette", colormap=GRAY_MAP[:, ::-1]),
        MASKS,
        SMALL,
    ),
    "labels, min-is-white": (write(SMALL, photometric="miniswhite"), MASKS, SMALL),
    "a mask of bits": (write(BITS), MASKS, BITS),
    "bits, min-is-black": (write_gray(BITS), told(), BITS),
    "masks beside channels": (write(PLANE), told(channel=2, labels=True), PLANE),
    "12 bits": (write(PLANE, bitspersample=12), told(), PLANE),
    "4 bits": (write(SMALL % 16, bitspersample=4), told(), SMALL % 16),
    "bits the other way": (
        rename_tag(write_gray(BITS, extratags=[(65000, 3, 1, 2, True)]), 65000, 266),
        told(),
        np.flip(np.unpackbits(np.packbits(BITS, axis=1), axis=1).reshape(H, -1, 8), 2)
        .reshape(H, -1)[:, :W]
        .astype(bool),
    ),
    **{
        f"{order}{dtype}": (
            write(draw(dtype=dtype, high=120), byteorder=order),
            told(),
            draw(dtype=dtype, high=120),
        )
        for order in "<>"
        for dtype in ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"]
    },
    "BigTIFF": (write(VOLUME, bigtiff=True), told(), VOLUME),
    "BigTIFF, big-endian": (write(VOLUME, bigtiff=True, byteorder=">"), told(), VOLUME),
    **{
        f"compressed by {name}": (write(PLANE, compression=name), told(), PLANE)
        for name in ("lzw", "zlib", "zstd", "packbits", "lzma", "deflate", "png", "lerc")
    },
    "JPEG of gray": (
        write(np.full((H, W), 7, "uint8"), compression="jpeg"),
        told(),
        np.full((H, W), 7, "uint8"),
    ),
    "strips without sizes": (
        patch(write_gray(PLANE, rowsperstrip=H), (279, [2 * H * W])),
        told(),
        PLANE,
    ),
    "many strips": (write(PLANE, rowsperstrip=1), told(), PLANE),
    "strips apart": (write_gray(VOLUME, rowsperstrip=7, contiguous=False), told(), VOLUME),
}


@pytest.mark.parametrize("name", READ)
def test_reads(tmp_path, name):
    put, options, expected = READ[name]
    file = tmp_path / "image.TIF"
    try:
        put(file)
    except NotImplementedError as error:
        pytest.skip(f"this imagecodecs can't write it: {error}")
    check(read_image(file, options), expected)
    assert image_shape(file, options) == expected.shape


REFUSED: dict[str, tuple[Write, ReadOptions, str]] = {
    "RGB": (write(COLOUR), told(), rf"is a colour image \(axes YXS, .*{CHANNEL}, or {GRAY}"),
    "RGBA": (write(draw(4, dtype="u1").transpose(1, 2, 0)), told(), f"colour image.*{CHANNEL}"),
    "planar RGB of others": (write(draw(3), metadata=None), told(), f"colour image.*{CHANNEL}"),
    "slices of colour": (write(np.stack([COLOUR] * 2)), told(), f"colour.*{CHANNEL}"),
    "gray and alpha": (
        write_gray(COLOUR[..., :2], planarconfig="contig", extrasamples=["unassalpha"]),
        told(),
        CHANNEL,
    ),
    "masks in colour": (write(COLOUR), MASKS, "expected one channel: save the one that holds"),
    "no such sample": (write(COLOUR), told(channel=3), "no channel 3: expected one of its 3"),
    "no such channel": (write(PLANE), told(channel=1), "no channel 1: expected one of its 1"),
    "a channel from the end": (write(COLOUR), told(channel=-1), "no channel -1"),
    "ImageJ channels": (write(draw(3), imagej=True), told(), f"3 channels.*{CHANNEL}.*--axes ZYX"),
    "OME channels": (write(draw(3), ome=True), told(), f"3 channels.*{CHANNEL}"),
    "axes C": (write(VOLUME, metadata={"axes": "CYX"}), told(), f"5 channels.*{CHANNEL}"),
    "channels in colour": (
        write(np.stack([COLOUR] * 2), metadata={"axes": "CYXS"}),
        told(channel=0),
        "has channels, and each in colour",
    ),
    "ImageJ times": (write(VOLUME, imagej=True, metadata={"axes": "TYX"}), told(), TIMES),
    "OME times": (write(VOLUME, ome=True, metadata={"axes": "TYX"}), told(), TIMES),
    "axes T": (write(VOLUME, metadata={"axes": "TYX"}), told(), rf"{TIMES}.*--axes ZYX"),
    "times told": (write(VOLUME), told("TYX"), TIMES),
    "two axes without a name": (write(STACK), told(), "does not say what all its axes are.*axes="),
    "an axis of another name": (write(VOLUME, metadata={"axes": "AYX"}), told(), "--axes ZYX"),
    "Z twice": (write(STACK, metadata={"axes": "ZZYX"}), told(), "does not say"),
    "axes too many": (write(VOLUME), told("TZYX"), "it has 3 axes, of shape .*; name as many"),
    "axes too few": (write(STACK), told("ZYX"), "it has 4 axes"),
    "axes unknown": (write(VOLUME), told("KYX"), "expected letters of TCZYXS"),
    "axes twice": (write(VOLUME), told("YYX"), "each once"),
    "axes turned": (write(VOLUME), told("YXZ"), "in axes 1 and 2 of shape"),
    "shapes that differ": (
        write_steps((PLANE, {}), (PLANE[::2], {})),
        told(),
        "several series of images .*save the one that counts",
    ),
    "dtypes that differ": (write_steps((PLANE, {}), (SMALL, {})), told(), "several series"),
    "series that differ": (write_series(VOLUME, PLANE), told(), "several series"),
    "series alike": (write_series(PLANE, PLANE), told(), "axes="),
    "a series after a page": (
        write_steps((PLANE, {}), (PLANE, {"description": f'{{"shape": [{H}, {W}]}}'})),
        told(),
        "several series",
    ),
    "an image without a name first": (
        write_steps((PLANE[::2], {}), (PLANE, {})),
        told(),
        "several",
    ),
    "nothing but thumbnails": (write_steps(THUMBNAIL), told(), "nothing but reduced images"),
    "a palette": (
        write(SMALL, photometric="palette", colormap=GRAY_MAP[:, ::-1]),
        told(),
        f"has a palette.*{GRAY}",
    ),
    "a palette in black": (
        write(SMALL, photometric="palette", colormap=GRAY_MAP * 0),
        told(),
        "has a palette",
    ),
    "labels by JPEG": (write(SMALL, compression="jpeg"), MASKS, "JPEG .*save it by a lossless"),
    "min-is-white": (write(PLANE, photometric="miniswhite"), told(), f"min-is-white.*{GRAY}"),
    "bits by tifffile": (write(BITS), told(), f"min-is-white.*{GRAY}"),
    "CMYK": (write(draw(4).transpose(1, 2, 0), photometric="separated"), told(), GRAY),
    "CIELab": (write(COLOUR, photometric="cielab"), told(channel=0), GRAY),
    "complex numbers": (write(PLANE.astype("complex64")), told(), "complex numbers"),
    "a volume in a page": (
        write(draw(16), volumetric=True, tile=(16, 16, 16)),
        told(),
        "many planes in a page",
    ),
    "MetaMorph stack": (
        patch(write_gray(PLANE, extratags=[(33629, 5, 3, (1,) * 6, True)])),
        told(),
        "many planes in a page",
    ),
    "LSM": (write_gray(PLANE, extratags=[(34412, 1, 8, b"12345678", True)]), told(), "Zeiss LSM"),
    "ImageJ says more": (
        write_raw(VOLUME, description="ImageJ=1\nimages=9\n"),
        told(),
        "has 5 pages, and 9 by its description",
    ),
    "ImageJ says less": (write_raw(VOLUME, description="ImageJ=1\nimages=2"), told(), "5 pages"),
    "ImageJ says what can't be": (
        write_raw(VOLUME, description="ImageJ=1\nimages=5\nslices=2\n"),
        told(),
        "5 images are",
    ),
    "ImageJ run cut short": (
        write_run(VOLUME[:4], "ImageJ=1\nimages=5\nslices=5\n"),
        told(),
        "cut short: the pixels of its 5 planes",
    ),
    "ImageJ says far too much": (
        write_run(VOLUME, "ImageJ=1\nimages=99999999999999\nslices=99999999999999\n"),
        told(),
        "cut short",
    ),
    "planes without a page": (append(write_raw(PLANE), 2 * H * W), told(), "behind its 1 page"),
    "pages without a link": (append(write_raw(VOLUME), 2 * H * W), told(), "behind its 5 page"),
    "tifffile says more": (write_raw(PLANE, description='{"shape": [5, 9, 9]}'), told(), "anew"),
    "tifffile says far too much": (
        write_raw(PLANE, description=f'{{"shape": [99999999999999, {H}, {W}]}}'),
        told(),
        "cut short",
    ),
    "OME says more": (
        write_raw(PLANE, description=say_ome({"Z": 2}, '<TiffData IFD="0"/>')),
        told(),
        "holds 1 of 2 planes",
    ),
    "OME says less": (
        write_raw(VOLUME, description=say_ome({}, '<TiffData IFD="0"/>')),
        told(),
        "has 5 pages, and its OME metadata name 1",
    ),
    "OME says far too much": (
        write_raw(
            PLANE, description=say_ome({"Z": 1 << 40}, f'<TiffData PlaneCount="{1 << 40}"/>')
        ),
        told(),
        "OME metadata name others",
    ),
    "OME of a file of many, unknown": (
        write_raw(PLANE, description=say_ome({"T": 9}, say_files(9, 1))),
        told(),
        "is one of several files",
    ),
    "OME of several images": (
        write_raw(
            VOLUME[:2],
            description=say_ome({}, '<TiffData IFD="0"/>').replace(
                "<Image",
                f'<Image><Pixels DimensionOrder="XYZCT" SizeX="{W}" SizeY="{H}" SizeZ="1" '
                'SizeC="1" SizeT="1"><TiffData IFD="1"/></Pixels></Image><Image',
            ),
        ),
        told(),
        "holds 2 images by its OME metadata",
    ),
    "OME with holes": (
        write_raw(
            VOLUME[:3],
            description=say_ome(
                {"T": 2, "Z": 2},
                "".join(
                    f'<TiffData IFD="{n}" FirstT="{n // 2}" FirstZ="{n % 2}"/>' for n in range(3)
                ),
            ),
        ),
        told(),
        "holds 3 of 4 planes",
    ),
    "OME elsewhere, of several pages": (
        write_raw(VOLUME, description='<OME><BinaryOnly UUID=""/></OME>'),
        told(),
        "does not say what all its axes are",
    ),
    "OME broken": (write_raw(PLANE, description="<OME><OME>"), told(), "can't be read"),
    "a strip never written": (patch(write(PLANE), (279, [0]), (273, [0])), told(), "incomplete"),
    "a strip too short": (
        patch(write(PLANE), (279, [2 * H * W - 1])),
        told(),
        f"has {2 * H * W - 1} bytes .*expected {2 * H * W}",
    ),
    "a compressed strip never written": (
        patch(write(PLANE, compression="zlib"), (279, [0])),
        told(),
        "incomplete",
    ),
    "a tile never written": (
        lambda file: tifffile.imwrite(
            file, iter([PLANE[:16, :16], None, None, None]), shape=(H, W), dtype="u2", tile=(16, 16)
        ),
        told(),
        "incomplete",
    ),
    "strips too few": (patch(write(PLANE, rowsperstrip=9), (278, 3)), told(), "2 strips"),
    "strips without rows": (patch(write(PLANE), (278, 0)), told(), "tiles are empty"),
    "pixels beyond the end": (
        patch(write(PLANE), (273, [1 << 30])),
        told(),
        "cut short, or damaged",
    ),
    "no height": (patch(write(PLANE), (257, 0)), told(), "says of itself"),
    "a value beyond the end": (
        spoil(write(PLANE), 305, 8, b"\xff\xff\xff\0"),
        told(),
        "tag 305 of page 0 ends at byte",
    ),
    "a height in letters": (
        spoil(write(PLANE), 257, 2, b"\2\0"),
        told(),
        "tag 257 of page 0 holds no whole numbers",
    ),
    "OME says fewer than pages": (
        write_raw(VOLUME[:3], description=say_ome({"Z": 2}, "<TiffData/>")),
        told(),
        "more planes than there are",
    ),
    "OME places no box in the file": (
        write_raw(
            VOLUME[:3],
            description=say_ome(
                {"T": 2, "Z": 2}, say_files(2, 2).replace(":1<", ":0<", 1), uuid="urn:uuid:0"
            ).replace('IFD="0" FirstT="1"', 'IFD="2" FirstT="1"'),
        ),
        told(),
        "lacks planes",
    ),
    "OME names a page twice": (
        write_raw(
            PLANE,
            description=say_ome({"Z": 2}, '<TiffData IFD="0"/><TiffData IFD="0" FirstZ="1"/>'),
        ),
        told(),
        "name a page twice",
    ),
    "values of no kind": (patch(write(draw(dtype="int16")), (339, 9)), told(), "not known"),
    "OME says other samples": (
        write(COLOUR, metadata=None, description=say_ome({"C": 4}, "<TiffData/>")),
        told(channel=0),
        "has 3 samples a pixel, and other channels",
    ),
    "nothing": (lambda file: file.write_bytes(b""), told(), "cut short"),
    "text": (lambda file: file.write_text("no image at all"), told(), "no TIFF"),
    "a folder": (lambda file: file.mkdir(), told(), "can't read"),
    "missing": (lambda file: None, told(), "can't read .*No such file"),
    "no page": (lambda file: file.write_bytes(b"II*\0\0\0\0\0"), told(), "no page"),
    "a circle": (
        lambda file: file.write_bytes(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"),
        told(),
        "round in a circle",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path, name):
    put, options, cure = REFUSED[name]
    file = tmp_path / "image.tif"
    put(file)
    for read in (read_image, image_shape):
        with pytest.raises(MovieError, match=cure) as caught:
            read(file, options)
        assert re.fullmatch(f".*{re.escape(str(file))}.*({CURE}).*", str(caught.value))


STACKS: dict[str, tuple[Write, ReadOptions, Image]] = {
    "ImageJ": (write(VOLUME, imagej=True, metadata={"axes": "TYX"}), told(), VOLUME),
    "ImageJ, volumes": (write(STACK, imagej=True, metadata={"axes": "TZYX"}), told(), STACK),
    "ImageJ, channels": (
        write(STACK, imagej=True, metadata={"axes": "TCYX"}),
        told(channel=1),
        STACK[:, 1],
    ),
    "ImageJ, all axes": (
        write(draw(2, 3, 2), imagej=True),
        told(channel=1),
        draw(2, 3, 2)[:, :, 1],
    ),
    "ImageJ, T before Z": (
        write_raw(STACK, description="ImageJ=1\nimages=12\nslices=4\nframes=3\norder=ctz\n"),
        told(),
        STACK.swapaxes(0, 1),
    ),
    "ImageJ in one run": (write_run(VOLUME, "ImageJ=1\nimages=5\nframes=5\n"), told(), VOLUME),
    "ImageJ in one run, volumes": (
        write_run(STACK, "ImageJ=1\nimages=12\nslices=3\nframes=4\n", byteorder=">"),
        told(),
        STACK,
    ),
    "tifffile in one run": (write_gray(STACK, truncate=True), told("TZYX"), STACK),
    "OME": (write(STACK, ome=True, metadata={"axes": "TZYX"}), told(), STACK),
    "OME, compressed": (
        write(STACK, ome=True, metadata={"axes": "TZYX"}, compression="zlib"),
        told(),
        STACK,
    ),
    "OME, T fastest": (
        write_raw(STACK, description=say_ome({"T": 3, "Z": 4}, "<TiffData/>", order="XYTZC")),
        told(),
        STACK.swapaxes(0, 1),
    ),
    "axes written by old tifffile": (
        write_raw(VOLUME, description=f'{{"axes": "TYX", "shape": [5, {H}, {W}]}}'),
        told(),
        VOLUME,
    ),
    "axes written": (write(VOLUME, metadata={"axes": "TYX"}), told(), VOLUME),
    "3 times by imwrite": (write(draw(3)), told("TYX"), draw(3)),
    "4 times of 3 slices by imwrite": (write(STACK), told("TZYX"), STACK),
    "3 times written as a colour": (write(draw(3), metadata={"axes": "TYX"}), told(), draw(3)),
    "Z before T": (write_gray(STACK), told("ZTYX"), STACK.swapaxes(0, 1)),
    "lower case": (write_gray(STACK), told("tzyx"), STACK),
    "pages without a word": (write_raw(VOLUME), told("TYX"), VOLUME),
    "slices that are times": (
        write(VOLUME, imagej=True, metadata={"axes": "ZYX"}),
        told("TYX"),
        VOLUME,
    ),
    "appended page by page": (write_series(*VOLUME), told("TYX"), VOLUME),
    "appended volume by volume": (write_series(*STACK), told("TZYX"), STACK),
    "colour": (
        write(np.stack([COLOUR, COLOUR + 1])),
        told("TYXS", channel=1),
        np.stack([COLOUR, COLOUR + 1])[..., 1],
    ),
    "channels first": (write_gray(STACK), told("CTYX", channel=2), STACK[2]),
    "all axes, the ones of one as well": (write(STACK[:, None]), told("TCZYX"), STACK),
    "thumbnails between": (
        write_steps((VOLUME[0], {}), THUMBNAIL, (VOLUME[1], {}), THUMBNAIL),
        told("TYX"),
        VOLUME[:2],
    ),
    "one time": (write(PLANE), told(), PLANE[None]),
    "one time of slices": (write(STACK[:1]), told("TZYX"), STACK[:1]),
    "masks with the axes of frames": (write(VOLUME), told("TCYX", 1, labels=True), VOLUME),
}


@pytest.mark.parametrize("name", STACKS)
def test_reads_stacks(tmp_path, name):
    put, options, expected = STACKS[name]
    file = tmp_path / "movie.tif"
    put(file)
    check(read_movie(file, options), expected)


NO_STACKS: dict[str, tuple[Write, ReadOptions, str]] = {
    "no names": (write(VOLUME), told(), r'axes="TYX" or axes="ZYX"; --axes TYX'),
    "no words": (write_raw(VOLUME), told(), "--axes TYX"),
    "ImageJ images": (write_raw(VOLUME, description="ImageJ=1\nimages=5\n"), told(), "--axes TYX"),
    "no names, two axes": (write(STACK), told(), r'axes="TZYX" or axes="ZTYX"'),
    "slices alone": (
        write(VOLUME, imagej=True, metadata={"axes": "ZYX"}),
        told(),
        r"is one volume .*expected time.*--axes TYX",
    ),
    "slices told": (write(VOLUME), told("ZYX"), "is one volume"),
    "channels alone": (write(VOLUME, imagej=True), told(), f"5 channels.*{CHANNEL}.*ZYX"),
    "channels": (
        write(STACK, imagej=True, metadata={"axes": "TCYX"}),
        told(),
        f"{CHANNEL}.*--axes TZYX",
    ),
    "times and slices of the wrong names": (
        write(STACK, imagej=True, metadata={"axes": "ZCYX"}),
        told(),
        f"{CHANNEL}.*--axes TZYX",
    ),
    "all axes": (write(draw(2, 3, 2), imagej=True), told(), f"{CHANNEL}.*save it with fewer axes"),
    "colour": (write(np.stack([COLOUR] * 5)), told("TYXS"), CHANNEL),
    "series alike": (write_series(*VOLUME), told(), "--axes TYX"),
    "palette": (
        write(draw(5, dtype="uint8"), photometric="palette", colormap=GRAY_MAP[:, ::-1]),
        told("TYX"),
        "has a palette",
    ),
    "ImageJ run cut short": (
        write_run(VOLUME[:4], "ImageJ=1\nimages=5\nframes=5\n"),
        told(),
        "cut short",
    ),
    "ImageJ says more": (
        write_raw(VOLUME, description="ImageJ=1\nimages=6\nframes=6\n"),
        told(),
        "5 pages, and 6",
    ),
}


@pytest.mark.parametrize("name", NO_STACKS)
def test_refuses_stacks(tmp_path, name):
    put, options, cure = NO_STACKS[name]
    file = tmp_path / "movie.tif"
    put(file)
    with pytest.raises(MovieError, match=cure) as caught:
        TiffStack.open(file, options)
    assert re.fullmatch(f".*({CURE}).*", str(caught.value))


@pytest.mark.parametrize("slices", [1, 3])
def test_ome_series_of_files(tmp_path, slices):
    """Each file is its own timepoint, though its metadata name the whole movie."""
    images = draw(3, slices)
    for file, image in zip(write_ome_files(tmp_path, images), images, strict=True):
        check(read_image(file, told()), image.squeeze())
        elsewhere = tmp_path / "elsewhere" / "x.tif"
        elsewhere.parent.mkdir(exist_ok=True)
        file.rename(elsewhere)
        check(read_image(elsewhere, told()), image.squeeze())


def test_ome_series_of_files_that_are_known_by_name(tmp_path):
    images = draw(3, 2)
    files = write_ome_files(tmp_path, images, known=False)
    check(read_image(files[1], told()), images[1])
    renamed = files[1].rename(tmp_path / "x.tif")
    with pytest.raises(MovieError, match="give it back its name"):
        read_image(renamed, told())


def test_a_part_of_an_ome_series_is_no_movie_unless_its_axes_are_told(tmp_path):
    """As of Micro-Manager, which begins a new file every 4 GB."""
    files = [f'<UUID FileName="{n}.ome.tif">urn:uuid:{n}</UUID>' for n in "ab"]
    planes = [f'<TiffData FirstT="{t}" IFD="{t % 3}">{files[t // 3]}</TiffData>' for t in range(6)]
    file = tmp_path / "a.ome.tif"
    write_raw(VOLUME[:3], description=say_ome({"T": 6}, "".join(planes), uuid="urn:uuid:a"))(file)
    with pytest.raises(MovieError, match="holds 3 of 6 timepoints of its OME metadata, the others"):
        TiffStack.open(file)
    check(read_movie(file, told("TYX")), VOLUME[:3])


@settings(max_examples=30)
@given(
    sizes=st.tuples(*[st.integers(1, 3)] * 3),
    order=st.permutations("CZT").map(lambda outer: "XY" + "".join(outer)),
    grouped=st.booleans(),
    seed=st.integers(0, 9),
)
def test_ome_places_each_plane(tmp_path_factory, sizes, order, grouped, seed):
    """Pages in any order, named one by one; or in the order of the dimensions, named together."""
    images = draw(*sizes, dtype="uint8", seed=seed)
    letters = order[:1:-1]
    pages = images.transpose(*["TZC".index(letter) for letter in letters], 3, 4).reshape(-1, H, W)
    where = list(np.ndindex(*[sizes["TZC".index(letter)] for letter in letters]))
    places = (
        np.arange(len(pages)) if grouped else np.random.default_rng(seed).permutation(len(pages))
    )
    entries = "".join(
        f'<TiffData IFD="{places[n]}" '
        + " ".join(f'First{a}="{i}"' for a, i in zip(letters, place, strict=True))
        + ' PlaneCount="1"/>'
        for n, place in enumerate(where)
    )
    text = say_ome(
        dict(zip("TZC", sizes, strict=True)), "<TiffData/>" if grouped else entries, order=order
    )
    file = tmp_path_factory.mktemp("ome") / "movie.ome.tif"
    write_raw(pages[np.argsort(places)], description=text)(file)
    if sizes[0] == 1 < sizes[1]:
        check(read_image(file, told(channel=sizes[2] - 1)), images[0, :, -1].squeeze())
    else:
        found = read_movie(file, told(channel=sizes[2] - 1))
        check(found, images[:, :, -1] if sizes[1] > 1 else images[:, 0, -1])


LAYOUTS: dict[str, Write] = {
    "classic": write_raw(PLANE),
    "big": write(VOLUME[:2], bigtiff=True, byteorder=">"),
    "compressed": write_gray(draw(2, high=3), compression="zlib", rowsperstrip=7),
    "lzw, predictor": write(draw(high=3), compression="lzw", predictor=True, byteorder=">"),
    "packbits": write(draw(high=2), compression="packbits", rowsperstrip=5),
    "zstd": write(draw(high=3), compression="zstd"),
    "tiles": write(draw(dtype="uint8", high=3), tile=(16, 16), compression="deflate"),
    "planar": write(draw(3, dtype="uint8")),
    "ImageJ": write(draw(3, dtype="uint8"), imagej=True, metadata={"axes": "ZYX"}),
    "ImageJ in one run": write_run(VOLUME[:2], "ImageJ=1\nimages=2\nslices=2\n"),
    "OME": write(draw(dtype="uint8", high=3), ome=True, compression="zlib"),
    "thumbnail at the end": write_steps((PLANE, {}), THUMBNAIL),
    "1 bit": write_gray(BITS),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_cut_anywhere(tmp_path, name):
    """A file cut short is read right, where nothing that counts is missing, or refused."""
    file = tmp_path / "image.tif"
    LAYOUTS[name](file)
    expected = read_image(file, told())
    refused = 0
    for _ in shorten(file):
        try:
            check(read_image(file, told()), expected)
        except MovieError:
            refused += 1
    assert refused > 200


def test_stack_cut_anywhere(tmp_path):
    file = tmp_path / "movie.tif"
    expected = draw(3, dtype="uint8")
    write(expected, imagej=True, metadata={"axes": "TYX"})(file)
    refused = 0
    for _ in shorten(file, 3):
        try:
            check(read_movie(file, told()), expected)
        except MovieError:
            refused += 1
    assert refused > 400


@pytest.mark.parametrize("name", ["classic", "compressed", "tiles"])
def test_damage_anywhere(tmp_path, name):
    """Whatever a byte of the tags says, there are pixels or there is one line of error."""
    file = tmp_path / "image.tif"
    LAYOUTS[name](file)
    content = file.read_bytes()
    for place in range(min(len(content), 320)):
        for flip in (0x10, 0xFF):
            damaged = bytearray(content)
            damaged[place] ^= flip
            file.write_bytes(damaged)
            try:
                assert read_image(file, told()).ndim in (2, 3)
            except MovieError as error:
                assert str(file) in str(error)  # noqa: PT017


@pytest.mark.parametrize("compression", ["lzw", "zlib", "zstd", "packbits", "lzma", "png"])
def test_strip_that_is_cut_inside(tmp_path, compression):
    """A strip that says to be shorter than it is gives an error, or all of its pixels."""
    file = tmp_path / "image.tif"
    put = write(PLANE, compression=compression, rowsperstrip=H)
    put(file)
    with tifffile.TiffFile(file) as opened:
        nbytes = opened.pages[0].databytecounts[0]
    refused = 0
    for missing in range(1, nbytes, 37):
        patch(put, (279, nbytes - missing))(file)
        try:
            check(read_image(file, told()), PLANE)
        except MovieError:
            refused += 1
    assert refused > nbytes // 60


WRITTEN = st.fixed_dictionaries(
    {
        "byteorder": st.sampled_from("<>"),
        "bigtiff": st.booleans(),
        "compression": st.sampled_from([None, "zlib", "lzw", "packbits", "zstd"]),
        "predictor": st.booleans(),
        "tile": st.sampled_from([None, (16, 16), (16, 32)]),
        "rowsperstrip": st.sampled_from([None, 1, 7, 100]),
        "planarconfig": st.sampled_from([None, "contig", "separate"]),
        "photometric": st.sampled_from([None, "minisblack", "rgb"]),
        "metadata": st.sampled_from([None, {}, "named"]),
        "style": st.sampled_from(["plain", "imagej", "ome"]),
    }
)
AXES = {1: ["ZYX", "TYX", "CYX"], 2: ["TZYX", "TCYX", "ZCYX"]}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 5), max_size=2),
    dtype=st.sampled_from(["u1", "i2", "u2", "u4", "f4", "f8"]),
    options=WRITTEN,
    axes=st.integers(0, 2),
)
def test_gives_what_was_written_or_a_cure(tmp_path, shape, dtype, options, axes):
    image = draw(*shape, dtype=dtype)
    file = tmp_path / "image.tif"
    letters = AXES[len(shape)][axes] if shape else "YX"
    if not write_any(file, image, letters, dict(options)):
        assume(False)
    expected = image.squeeze(tuple(n for n, length in enumerate(shape) if length == 1))
    for read in (lambda: read_image(file, told()), lambda: read_movie(file, told())):
        try:
            found = read()
        except MovieError as error:
            assert re.search(CURE, str(error))  # noqa: PT017
        else:
            assert found.dtype == expected.dtype
            nameless = options["metadata"] is None and options["style"] == "plain"
            together = expected.reshape(-1, *expected.shape[-2:]) if nameless else expected
            assert np.array_equal(found.squeeze(), together.squeeze())


def write_any(file: Path, image: Image, letters: str, options: dict[str, Any]) -> bool:
    """Write an image by options that may not go together; tell whether they did."""
    style, named = options.pop("style"), options["metadata"]
    options["bigtiff"] &= style != "imagej"
    options |= {style: True} if style != "plain" else {}
    options["metadata"] = {"axes": letters} if named == "named" else named
    try:
        write(image, **options)(file)
    except (ValueError, TypeError, RuntimeError, struct.error, tifffile.OmeXmlError):
        return False
    return True


@pytest.fixture
def stack(tmp_path):
    file = tmp_path / "movie.tif"
    write(STACK, metadata={"axes": "TZYX"}, compression="zlib")(file)
    return TiffStack.open(file, told())


def test_stack_says_what_it_is(stack):
    assert (len(stack), stack.shape) == (4, (3, H, W))
    assert stack.name_of(3) == "movie.tif[3]"
    assert stack.files_of(3) == (stack.file,)
    assert stack.place == str(stack.file)
    assert TiffStack.open(stack.file, told()).recipe == stack.recipe
    assert TiffStack.open(stack.file, told("ZTYX")).recipe != stack.recipe
    check(stack[-1], STACK[-1])
    with pytest.raises(IndexError):
        stack[4]


def test_stack_in_threads(stack):
    with ThreadPoolExecutor(8) as pool:
        images = pool.map(stack.__getitem__, list(range(4)) * 10)
        for image, expected in zip(images, list(STACK) * 10, strict=True):
            check(image, expected)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_stack_is_pickled_and_forked(stack):
    check(pickle.loads(pickle.dumps(stack))[2], STACK[2])
    check(stack[1], STACK[1])
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for t, image in enumerate(pool.map(stack.__getitem__, range(4))):
            check(image, STACK[t])


def test_stack_that_has_changed_is_not_read(stack):
    write(STACK + 1, metadata={"axes": "TZYX"}, compression="zlib")(stack.file)
    with pytest.raises(MovieError, match="has changed since it was opened: open the movie again"):
        stack[0]


def test_a_copy_that_keeps_size_and_times_is_not_read_by_what_was_there_before(tmp_path):
    """Of other byte order, it would give pixels that are in neither of the two."""
    file, other = tmp_path / "movie.tif", tmp_path / "other.tif"
    for one, order in ((file, "<"), (other, ">")):
        write(VOLUME, metadata={"axes": "TYX"}, byteorder=order)(one)
        os.utime(one, ns=(10**18, 10**18))
    stack = TiffStack.open(file)
    time.sleep(0.02)  # longer than a tick of the clock that gives files their times
    shutil.copy2(other, file)
    with pytest.raises(MovieError, match="has changed since it was opened"):
        stack[0]


def test_stack_that_is_gone(stack):
    stack.file.unlink()
    with pytest.raises(MovieError, match="No such file"):
        stack[0]


def test_stack_larger_than_memory(tmp_path):
    """A stack of a terabyte is opened, and read image by image."""
    file, image = tmp_path / "movie.tif", np.arange(1 << 22, dtype="u2").reshape(2048, 2048)
    times = 10**12 // image.nbytes
    write_raw(image, description=f"ImageJ=1\nimages={times}\nframes={times}\n")(file)
    start = file.stat().st_size - image.nbytes
    os.truncate(file, start + (times - 1) * image.nbytes)
    with file.open("ab") as handle:
        handle.write((image + 1).tobytes())
    stack = TiffStack.open(file)
    assert len(stack) == times
    check(stack[0], image)
    check(stack[times - 2], image * 0)
    check(stack[times - 1], image + 1)


@pytest.mark.parametrize("slices", [None, 2, 3, 4, 5, 6])
def test_movies_written_here_are_read_here(tmp_path, slices):
    from feature_cache.movies import write_movie

    frames = draw(2) if slices is None else draw(2, slices)
    write_movie(tmp_path / "01", frames, frames // 50, np.zeros((0, 4), int))
    for t in range(2):
        for file, expected in (
            (tmp_path / "01" / f"t00{t}.tif", frames[t]),
            (tmp_path / "01_GT" / "TRA" / f"man_track00{t}.tif", frames[t] // 50),
        ):
            check(read_image(file, told()), expected)
            check(tifffile.imread(file), expected)
