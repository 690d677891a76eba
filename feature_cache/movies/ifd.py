"""What is written in a TIFF file: its pages and their tags, each found to be in the file whole.

A reader that is lenient with a file cut short gives other pixels than were written, so nothing here
is: every directory, value, strip and tile must lie within the file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from typing import IO, Any

from .faults import DamageError

_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_SIZES |= {16: 8, 17: 8, 18: 8}
_INTEGERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q", 18: "Q"}

SUBFILE, OLD_SUBFILE, WIDTH, LENGTH, BITS, COMPRESSION = 254, 255, 256, 257, 258, 259
PHOTOMETRIC, DESCRIPTION, STRIPS, SAMPLES, ROWS, STRIP_BYTES = 262, 270, 273, 277, 278, 279
PLANAR, PREDICTOR, COLORMAP, TILE_WIDTH, TILE_LENGTH = 284, 317, 320, 322, 323
TILES, TILE_BYTES, FORMAT, FILL, DEPTH = 324, 325, 339, 266, 32997
_READ = {
    *(SUBFILE, OLD_SUBFILE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, STRIPS, SAMPLES, ROWS),
    *(STRIP_BYTES, PLANAR, PREDICTOR, COLORMAP, TILE_WIDTH, TILE_LENGTH, TILES, TILE_BYTES),
    *(FORMAT, FILL, DEPTH),
}


@dataclass(frozen=True, slots=True)
class Page:
    """A page of a TIFF file."""

    offset: int
    """Where its directory starts."""
    tags: Mapping[int, tuple[int, ...]]
    """Those that say what the pixels are, and where."""
    descriptions: tuple[str, ...]
    counts: Mapping[int, int]
    """How many values each of its tags has."""

    def get(self, code: int, default: int) -> int:
        """Give a tag's first value."""
        return self.tags[code][0] if self.tags.get(code) else default

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.get(LENGTH, 0), self.get(WIDTH, 0)

    @property
    def samples(self) -> int:
        """How many values a pixel has."""
        return self.get(SAMPLES, 1)

    @property
    def planar(self) -> bool:
        """Whether each sample is a plane of its own, and not beside the others in each pixel."""
        return self.samples > 1 and self.get(PLANAR, 1) == 2

    @property
    def bits(self) -> int:
        """Bits of a value; 0 where they differ between samples."""
        return _only(self.tags.get(BITS, (1,))[: self.samples])

    @property
    def format(self) -> int:
        """What a value is: 1 unsigned, 2 signed, 3 floating; 0 where samples differ."""
        return _only(self.tags.get(FORMAT, (1,))[: self.samples])

    @property
    def reduced(self) -> bool:
        """Whether this is a smaller version of another page, or a mask that belongs to one."""
        return bool(self.get(SUBFILE, 0) & 0b101) or self.get(OLD_SUBFILE, 0) == 2

    @property
    def segments(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where each strip or tile starts, and its bytes."""
        keys = (TILES, TILE_BYTES) if TILES in self.tags else (STRIPS, STRIP_BYTES)
        return self.tags.get(keys[0], ()), self.tags.get(keys[1], ())

    @property
    def run(self) -> int:
        """Where the pixels start, if they are plain bytes without a gap; else 0."""
        plain = self.get(COMPRESSION, 1) == self.get(PREDICTOR, 1) == self.get(FILL, 1) == 1
        if not plain or TILES in self.tags or self.bits not in (8, 16, 32, 64):
            return 0
        starts, needed = self.segments[0], list(_count_bytes(self))
        joined = all(b - a == n for (a, b), n in zip(pairwise(starts), needed, strict=False))
        return starts[0] if joined else 0

    @property
    def nbytes(self) -> int:
        """Bytes of its pixels, uncompressed."""
        return prod(self.shape) * self.samples * self.bits // 8


@dataclass(frozen=True, slots=True)
class Tiff:
    """What is written in a file."""

    name: str
    """Of the file, without its folder."""
    size: int
    """In bytes."""
    rest: int
    """Bytes at the end that no tag tells of."""
    byteorder: str
    """``"<"`` or ``">"``."""
    pages: tuple[Page, ...]


def read_pages(name: str, handle: IO[bytes]) -> Tiff:
    """Read what is written in a TIFF file, all but the pixels.

    Raises
    ------
    FaultError
        It is no TIFF, or not whole.
    """
    size = handle.seek(0, 2)
    walk = _Walk(handle, size)
    pages = tuple(walk)
    ends = [_check_segments(page, size) for page in pages if not page.reduced]
    others = [sum(pair) for page in pages if page.reduced for pair in zip(*page.segments)]  # noqa: B905
    return Tiff(name, size, size - max([walk.end, *ends, *others]), walk.order, pages)


class _Walk:
    """The chain of directories of a TIFF, classic or BigTIFF, of either byte order."""

    def __init__(self, handle: IO[bytes], size: int) -> None:
        self._handle, self._size, self.end = handle, size, 0
        head = self._read(0, 8, "its header")
        self.order = {b"II": "<", b"MM": ">"}.get(head[:2], "")
        version = struct.unpack(f"{self.order}H", head[2:4])[0] if self.order else 0
        if version not in (42, 43):
            raise DamageError("is no TIFF, though named as one")
        self._big = version == 43
        if self._big:
            head = self._read(8, 8, "its header")
        self._first = self._unpack("Q" if self._big else "I", head[-8 if self._big else 4 :])[0]

    def __iter__(self) -> Iterator[Page]:
        offset, seen = self._first, set[int]()
        if not offset:
            raise DamageError("is damaged: it has no page")
        while offset:
            if offset in seen:
                raise DamageError("is damaged: its pages go round in a circle")
            seen.add(offset)
            page, offset = self._read_page(offset, f"page {len(seen) - 1}")
            yield page

    def _read_page(self, offset: int, name: str) -> tuple[Page, int]:
        head, step, end = (8, 20, 8) if self._big else (2, 12, 4)
        count = self._unpack("Q" if self._big else "H", self._read(offset, head, name))[0]
        table = self._read(offset + head, count * step + end, name)
        tags: dict[int, tuple[int, ...]] = {}
        counts: dict[int, int] = {}
        descriptions = []
        form = f"{self.order}HH{'Q8s' if self._big else 'I4s'}"
        for code, kind, number, inline in struct.iter_unpack(form, table[: count * step]):
            value = self._read_value(kind, number, inline, f"tag {code} of {name}", code)
            counts[code] = number
            if code == DESCRIPTION and value is not None:
                descriptions.append(value.rstrip(b"\0").decode("utf-8", "replace"))
            elif code in _READ:
                if kind not in _INTEGERS or not number:
                    raise DamageError(f"is damaged: tag {code} of {name} holds no whole numbers")
                letter = f"{number}{_INTEGERS[kind]}"
                tags.setdefault(code, self._unpack(letter, value or b""))
        following = self._unpack("Q" if self._big else "I", table[count * step :])[0]
        return Page(offset, tags, tuple(descriptions), counts), following

    def _read_value(
        self, kind: int, number: int, inline: bytes, name: str, code: int
    ) -> bytes | None:
        """Give a tag's bytes; None where only their presence counts."""
        nbytes = _SIZES.get(kind, 0) * number
        if nbytes <= len(inline):
            return inline[:nbytes]
        offset = self._unpack("Q" if self._big else "I", inline)[0]
        if code in _READ or code == DESCRIPTION:
            return self._read(offset, nbytes, name)
        self._check(offset, nbytes, name)
        return None

    def _read(self, offset: int, nbytes: int, name: str) -> bytes:
        self._check(offset, nbytes, name)
        self._handle.seek(offset)
        found = self._handle.read(nbytes)
        if len(found) < nbytes:
            raise DamageError(f"is cut short while it is read, in {name}")
        return found

    def _check(self, offset: int, nbytes: int, name: str) -> None:
        if offset + nbytes > self._size:
            raise DamageError(
                f"is cut short, or damaged: {name} ends at byte {offset + nbytes}, the file at "
                f"{self._size}"
            )
        self.end = max(self.end, offset + nbytes)

    def _unpack(self, letters: str, found: bytes) -> tuple[Any, ...]:
        return struct.unpack(f"{self.order}{letters}", found)


def _only(values: tuple[int, ...]) -> int:
    return values[0] if len(set(values)) == 1 else 0


def _check_segments(page: Page, size: int) -> int:
    """Give where the last strip or tile ends.

    Raises
    ------
    FaultError
        One is missing, empty, beyond the end of the file or shorter than its pixels.
    """
    if not all(page.shape) or not page.samples:
        raise DamageError(f"is damaged: it says of itself that it is of shape {page.shape}")
    expected = prod(_lay_out(page)[:3])
    starts, sizes = page.segments
    plain = page.get(COMPRESSION, 1) == 1
    if plain and not sizes and len(starts) == expected == 1:
        sizes = tuple(_count_bytes(page))
    if min(len(starts), len(sizes)) < expected:
        raise DamageError(
            f"is incomplete: it names {min(len(starts), len(sizes))} strips or tiles of pixels, "
            f"expected {expected}"
        )
    end = 0
    for start, nbytes, needed in zip(starts, sizes, _count_bytes(page), strict=False):
        least = needed if plain else 1
        if not start or nbytes < least:
            raise DamageError(
                f"is incomplete: a strip or tile of its pixels has {nbytes} bytes at {start}, "
                f"expected {least} or more"
            )
        if start + nbytes > size:
            raise DamageError(
                f"is cut short, or damaged: its pixels end at byte {start + nbytes}, the file at "
                f"{size}"
            )
        end = max(end, start + nbytes)
    return end


def _lay_out(page: Page) -> tuple[int, int, int, int]:
    """Count strips or tiles: planes, down, across; and the rows of one."""
    height, width = page.shape
    planes = page.samples if page.planar else 1
    tiled = TILES in page.tags
    rows = page.get(TILE_LENGTH, 0) if tiled else min(page.get(ROWS, height), height)
    columns = page.get(TILE_WIDTH, 0) if tiled else width
    if not rows or not columns:
        raise DamageError("is damaged: its strips or tiles are empty")
    return planes, -(-height // rows), -(-width // columns), rows


def _count_bytes(page: Page) -> Iterator[int]:
    """Count the bytes of each strip or tile where it is not compressed."""
    planes, down, across, rows = _lay_out(page)
    tiled = TILES in page.tags
    columns = page.get(TILE_WIDTH, 0) if tiled else page.shape[1]
    row = -(-columns * (1 if page.planar else page.samples) * page.bits // 8)
    for _, y in product(range(planes), range(down)):
        yield from [row * (rows if tiled else min(rows, page.shape[0] - y * rows))] * across
