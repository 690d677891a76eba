from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_cache import MovieError
from feature_cache.movies import ReadOptions, read_image
from feature_cache.movies.image_files import ImageFiles, image_shape
from tiffs import COLOUR, PLANE, Image, shorten

GRAY, RGB, PALETTE, GRAY_ALPHA, RGBA = 0, 2, 3, 4, 6
PART = tuple[bytes, bytes]
MASKS = ReadOptions(labels=True)
SMALL = PLANE.astype("uint8")
RAMP = np.repeat(np.arange(256, dtype="uint8"), 3).tobytes()
PASSES = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2)]


def join(*parts: PART) -> bytes:
    found = (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(found)


def pack(image: Image, bits: int) -> bytes:
    """Give rows without a filter, values of `bits` bits beside each other."""
    if bits == 16:
        rows = image.astype(">u2").reshape(len(image), -1).view("uint8")
    else:
        ones = np.unpackbits(image.reshape(len(image), -1, 1), axis=2)[..., 8 - bits :]
        rows = np.packbits(ones.reshape(len(image), -1), axis=1)
    return b"".join(b"\0" + row.tobytes() for row in rows)


def make(
    image: Image, bits: int = 8, colour: int = GRAY, *extra: PART, interlaced: bool = False
) -> bytes:
    """Make a PNG by hand, of any bits and colours."""
    height, width = image.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    parts = [image[y::dy, x::dx] for y, x, dy, dx in [*PASSES, (1, 0, 2, 1)]]
    pixels = b"".join(pack(part, bits) for part in (parts if interlaced else [image]) if part.size)
    content = zlib.compress(pixels)
    half = len(content) // 2
    data = ((b"IDAT", content[:half]), (b"IDAT", content[half:]))
    return join((b"IHDR", header), *extra, *data, (b"IEND", b""))


def say(colours: bytes) -> PART:
    return b"PLTE", colours


READ: dict[str, tuple[bytes, ReadOptions, Image]] = {
    "8 bits": (make(SMALL), ReadOptions(), SMALL),
    "16 bits": (make(PLANE * 300, 16), ReadOptions(), PLANE * 300),
    "16 bits by a library": (imagecodecs.png_encode(PLANE), ReadOptions(), PLANE),
    **{
        f"{bits} bits": (make(SMALL % 2**bits, bits), ReadOptions(), SMALL % 2**bits)
        for bits in (1, 2, 4)
    },
    "interlaced": (make(SMALL, interlaced=True), ReadOptions(), SMALL),
    "interlaced, 2 bits": (make(SMALL % 4, 2, interlaced=True), ReadOptions(), SMALL % 4),
    "interlaced, 16 bits": (make(PLANE, 16, interlaced=True), ReadOptions(), PLANE),
    "a value that is transparent": (make(SMALL, 8, 0, (b"tRNS", b"\0\7")), ReadOptions(), SMALL),
    "a gamma": (make(SMALL, 8, 0, (b"gAMA", struct.pack(">I", 100))), ReadOptions(), SMALL),
    "a label by a palette": (make(SMALL, 8, PALETTE, say(RAMP[::-1])), MASKS, SMALL),
    "a label by a small palette": (
        make(SMALL % 4, 2, PALETTE, say(bytes(12)), (b"tRNS", b"\0")),
        MASKS,
        SMALL % 4,
    ),
    "a label, interlaced": (
        make(SMALL, 8, PALETTE, say(RAMP[::-1]), interlaced=True),
        MASKS,
        SMALL,
    ),
    "a gray ramp": (make(SMALL, 8, PALETTE, say(RAMP)), ReadOptions(), SMALL),
    "a sample of RGB": (make(COLOUR, 8, RGB), ReadOptions(channel=2), COLOUR[..., 2]),
    "a sample of RGB, 16 bits": (
        make(COLOUR * 200.0, 16, RGB),
        ReadOptions(channel=1),
        COLOUR[..., 1].astype("uint16") * 200,
    ),
    "gray of gray and alpha": (
        make(COLOUR[..., :2].copy(), 8, GRAY_ALPHA),
        ReadOptions(channel=0),
        COLOUR[..., 0],
    ),
    "masks beside channels": (make(SMALL), ReadOptions(2, None, True), SMALL),
    "axes": (make(SMALL), ReadOptions(axes="YX"), SMALL),
    "bytes after the end": (make(SMALL) + b"more", ReadOptions(), SMALL),
    "one pixel": (make(SMALL[:1, :1], 1), ReadOptions(), SMALL[:1, :1] % 2),
}


@pytest.mark.parametrize("name", READ)
def test_reads(tmp_path, name):
    content, options, expected = READ[name]
    file = tmp_path / "image.PNG"
    file.write_bytes(content)
    image = read_image(file, options)
    assert image.dtype == expected.dtype
    assert np.array_equal(image, expected)
    assert image_shape(file, options) == expected.shape


def spoil(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


REFUSED: dict[str, tuple[bytes, ReadOptions, str]] = {
    "RGB": (make(COLOUR, 8, RGB), ReadOptions(), r"colour image .*channel=0, --channel 0"),
    "RGBA": (make(np.dstack([COLOUR, SMALL]), 8, RGBA), ReadOptions(), "channel=0"),
    "gray and alpha": (make(COLOUR[..., :2].copy(), 8, GRAY_ALPHA), ReadOptions(), "channel=0"),
    "masks in colour": (make(COLOUR, 8, RGB), MASKS, "save the one that holds the labels"),
    "no such sample": (make(COLOUR, 8, RGB), ReadOptions(channel=3), "no channel 3"),
    "a palette": (make(SMALL, 8, PALETTE, say(RAMP[::-1])), ReadOptions(), "has a palette"),
    "a palette that is missing": (make(SMALL, 8, PALETTE), ReadOptions(), "has a palette"),
    "axes that don't fit": (make(SMALL), ReadOptions(axes="XY"), "in axes 0 and 1 of shape"),
    "several images": (
        make(SMALL, 8, GRAY, (b"acTL", struct.pack(">II", 2, 0))),
        ReadOptions(),
        "is animated: expected one image",
    ),
    "nothing": (b"", ReadOptions(), "is no PNG"),
    "a TIFF": (b"II*\0" + bytes(99), ReadOptions(), "is no PNG"),
    "no header": (join((b"IEND", b"")), ReadOptions(), "damaged"),
    "no pixels": (join((b"IHDR", make(SMALL)[16:29]), (b"IEND", b"")), ReadOptions(), "damaged"),
    "no width": (make(SMALL[:, :0]), ReadOptions(), "damaged"),
    "a colour that is none": (make(SMALL, 8, 5), ReadOptions(), "damaged"),
    "bits that are none": (make(SMALL, 3), ReadOptions(), "damaged|save it anew"),
    "spoiled pixels": (spoil(make(SMALL), 60), ReadOptions(), "is damaged in its part b'IDAT'"),
    "spoiled words": (
        spoil(make(SMALL, 8, GRAY, (b"tEXt", b"a cell")), 44),
        ReadOptions(),
        "is damaged in its part b'tEXt'",
    ),
    "fewer rows": (
        join((b"IHDR", make(SMALL)[16:29]), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")),
        ReadOptions(),
        "damaged",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(tmp_path, capfd, name):
    content, options, cure = REFUSED[name]
    file = tmp_path / "image.png"
    file.write_bytes(content)
    with pytest.raises(MovieError, match=cure) as caught:
        read_image(file, options)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("make_one", [make, imagecodecs.png_encode])
def test_cut_anywhere(tmp_path, make_one: Callable[..., Any]):
    file = tmp_path / "image.png"
    file.write_bytes(make_one(SMALL))
    for _ in shorten(file):
        for read in (read_image, image_shape):
            with pytest.raises(MovieError, match=r"cut short|no PNG"):
                read(file, ReadOptions())


@given(
    bits=st.sampled_from([1, 2, 4, 8, 16]),
    shape=st.tuples(st.integers(1, 19), st.integers(1, 19)),
    interlaced=st.booleans(),
    seed=st.integers(0, 9),
)
def test_values_are_as_stored(tmp_path_factory, bits, shape, interlaced, seed):
    dtype = "uint16" if bits == 16 else "uint8"
    image = np.random.default_rng(seed).integers(0, 2**bits, shape).astype(dtype)
    file = tmp_path_factory.mktemp("png") / "image.png"
    file.write_bytes(make(image, bits, interlaced=interlaced))
    assert np.array_equal(read_image(file, ReadOptions()), image)


def test_a_folder_of_any_case(tmp_path: Path):
    files = [tmp_path / name for name in ("t0.png", "t1.PNG", "t2.Png")]
    for file in files:
        file.write_bytes(make(SMALL))
    images = ImageFiles(tuple(files), ReadOptions())
    assert len(images) == 3
    assert images.shape == SMALL.shape
    assert all(np.array_equal(images[t], SMALL) for t in range(3))


def test_files_of_other_kinds(tmp_path: Path):
    file = tmp_path / "image.jpg"
    file.write_bytes(b"")
    for read in (read_image, image_shape):
        with pytest.raises(MovieError, match=r"expected one of \.tif, \.tiff, \.png; save it"):
            read(file, ReadOptions())
