"""PNG files: an image of one timepoint."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from .faults import DamageError, FaultError, open_image
from .images import ReadOptions
from .verdict import Axes, check_palette, choose_planes

PNG_RECIPE = f"PNG 1, imagecodecs {imagecodecs.__version__}"
"""What decides pixels besides the file; its number rises when files come to mean others."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER = struct.Struct(">IIBB3s")
_PALETTE = 3
_SAMPLES = {0: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}
"""How many values a pixel has, by colour type."""


@dataclass(frozen=True, slots=True)
class _Png:
    """What a file holds."""

    shape: tuple[int, int]
    bits: int
    """Of a value."""
    sample: int | None
    """Which to take of those that a pixel has."""
    parts: tuple[tuple[bytes, bytes], ...]
    """Name and content of what is needed to decode it as it is stored, palette or not."""


def read_png(file: Path, options: ReadOptions = ReadOptions()) -> NDArray[Any]:  # noqa: B008
    """Read a PNG file: (H, W) uint8 or uint16, values as stored.

    Raises
    ------
    MovieError
        It can't be read, is not whole, or is not of one channel.
    """
    with open_image(file) as handle:
        png = _judge(handle.read(), options)
        image = imagecodecs.png_decode(_SIGNATURE + b"".join(map(_join, png.parts)))
        if png.bits < 8:
            image = image // (255 // (2**png.bits - 1))
        image = image if png.sample is None else image[..., png.sample]
        if image.shape != png.shape or image.dtype.itemsize != max(png.bits // 8, 1):
            raise FaultError(f"gives {image.dtype} pixels of shape {image.shape}: save it anew")
        return image


def png_shape(file: Path, options: ReadOptions = ReadOptions()) -> tuple[int, ...]:  # noqa: B008
    """Give the shape of what `read_png` gives, decoding no pixels; errors as there."""
    with open_image(file) as handle:
        return _judge(handle.read(), options).shape


def _judge(content: bytes, options: ReadOptions) -> _Png:
    parts = list(_split(content))
    found = dict(reversed(parts))
    if parts[0][0] != b"IHDR" or len(parts[0][1]) != _HEADER.size:
        raise DamageError("is damaged: it does not begin with its header")
    width, height, bits, colour, rest = _HEADER.unpack(parts[0][1])
    if colour not in _SAMPLES or not width or not height:
        raise DamageError("is damaged: its header says nothing that is known")
    if b"acTL" in found and found[b"acTL"][:4] != b"\0\0\0\1":
        raise FaultError("is animated: expected one image; save each as a file of its own")
    if colour == _PALETTE and not options.labels:
        palette = np.frombuffer(found.get(b"PLTE", b""), np.uint8)
        check_palette(palette.reshape(-1, 3).T / 255)
    samples = _SAMPLES[colour]
    inner = ("YXS", (height, width, samples)) if samples > 1 else ("YX", (height, width))
    sample = int(choose_planes(Axes(*inner), options)[0, 0])
    header = _HEADER.pack(width, height, bits, 0 if colour == _PALETTE else colour, rest)
    pixels = [part for part in parts if part[0] == b"IDAT"]
    needed = ((b"IHDR", header), *pixels, (b"IEND", b""))
    return _Png((height, width), bits, sample if samples > 1 else None, needed)


def _split(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Split a file into its parts, each found whole, to the one that ends it."""
    if not content.startswith(_SIGNATURE):
        raise DamageError("is no PNG, though named as one")
    start, name = len(_SIGNATURE), b""
    while name != b"IEND":
        length, name = struct.unpack(">I4s", content[start : start + 8].ljust(8, b"\0"))
        body = content[start + 8 : start + 8 + length]
        end = start + 12 + length
        if end > len(content):
            raise DamageError(f"of {len(content)} bytes is cut short: expected {end} or more")
        if content[start:end] != _join((name, body)):
            raise DamageError(f"is damaged in its part {name!r}")
        yield name, body
        start = end


def _join(part: tuple[bytes, bytes]) -> bytes:
    name, body = part
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
