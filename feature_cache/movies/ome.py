"""What OME metadata say of a file's pages: which plane each is, of a movie of many files or one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree

import numpy as np

from .faults import FaultError


@dataclass(frozen=True, slots=True)
class Planes:
    """The planes that are in a file."""

    axes: str
    """Of T, Z and C, slowest first."""
    lengths: tuple[int, ...]
    pages: tuple[int, ...]
    """Number of the page in the file, for each plane in the order of `axes`."""
    all_times: int
    """Timepoints of the movie, of which others may be in other files."""

    @property
    def times(self) -> int:
        """Timepoints in the file."""
        return self.lengths[self.axes.index("T")]


def holds_ome(description: str) -> bool:
    """Tell whether a description is OME metadata."""
    return description.rstrip()[-4:] == "OME>"


def find_planes(xml: str, name: str, count: int, samples: int) -> Planes | None:
    """Find which planes the pages of a file are; None where its metadata are in another file.

    The metadata may list the planes of many files, and be the same in each of them; this one is
    known by its name. It has `count` pages, each with so many `samples` of the channels.

    Raises
    ------
    FaultError
        It is not said, or not true.
    """
    try:
        root = ElementTree.fromstring(xml)
        if root.find("{*}BinaryOnly") is not None:
            return None
        images = [
            found for pixels in root.iterfind("{*}Image/{*}Pixels")
            if (found := _place_planes(root, pixels, name, count, samples)).pages
        ]  # fmt: skip
    except (ElementTree.ParseError, KeyError, ValueError) as error:
        raise FaultError(f"has OME metadata that can't be read ({error}): save it anew") from error
    if not images:
        raise FaultError(
            "is one of several files, and its OME metadata don't say which: give it back its name"
        )
    if len(images) > 1:
        raise FaultError(
            f"holds {len(images)} images by its OME metadata, expected one: save the one that "
            "counts as a file of its own"
        )
    return images[0]


def _place_planes(
    root: ElementTree.Element, pixels: ElementTree.Element, name: str, count: int, samples: int
) -> Planes:
    axes = pixels.attrib["DimensionOrder"][:1:-1]
    lengths = [int(pixels.attrib[f"Size{axis}"]) for axis in axes]
    if lengths[axes.index("C")] % samples:
        raise FaultError(
            f"has {samples} samples a pixel, and other channels by its OME metadata: save it anew"
        )
    lengths[axes.index("C")] //= samples
    table = list(pixels.iterfind("{*}TiffData"))
    mine = _choose_own(root, table, name)
    pages: dict[int, int] = {}
    for entry in mine:
        pages |= _list_planes(entry.attrib, axes, lengths, count)
    total = int(np.prod(lengths))
    if max(pages, default=0) >= total:
        raise FaultError("has OME metadata that name more planes than there are: save it anew")
    if mine and len(mine) == len(table) and len(pages) < total:
        raise FaultError(
            f"holds {len(pages)} of {total} planes of its OME metadata: incomplete; save it anew"
        )
    return _arrange(axes, lengths, pages)


def _choose_own(
    root: ElementTree.Element, table: list[ElementTree.Element], name: str
) -> list[ElementTree.Element]:
    """Choose the entries of this file: those without a file, of its identity, or of its name."""
    identity = (root.get("UUID") or "").strip()
    everywhere = {_text_of(file) for file in root.iterfind(".//{*}TiffData/{*}UUID")}
    mine = []
    for entry in table:
        file = entry.find("{*}UUID")
        if file is None or len(everywhere) == 1:
            mine.append(entry)
        elif identity in everywhere:
            mine += [entry] * (_text_of(file) == identity)
        elif file.get("FileName", "").lower() == name.lower():
            mine.append(entry)
    return mine


def _text_of(element: ElementTree.Element) -> str:
    return (element.text or "").strip()


def _list_planes(
    entry: Mapping[str, str], axes: str, lengths: list[int], count: int
) -> Mapping[int, int]:
    first = int(entry.get("IFD", 0))
    many = int(
        entry.get("PlaneCount") or entry.get("NumPlanes") or (1 if "IFD" in entry else count)
    )
    if many < 0 or first < 0 or first + many > count:
        raise FaultError(f"has {count} pages, and its OME metadata name others: save it anew")
    start = int(np.ravel_multi_index([int(entry.get(f"First{a}", 0)) for a in axes], lengths))
    return {start + n: first + n for n in range(many)}


def _arrange(axes: str, lengths: list[int], pages: Mapping[int, int]) -> Planes:
    """Give planes as the box that they fill."""
    all_times = lengths[axes.index("T")]
    if not pages:
        return Planes(axes, (), (), all_times)
    where = np.array(np.unravel_index(sorted(pages), lengths))
    found = [len(np.unique(places)) for places in where]
    if np.prod(found) != len(pages):
        raise FaultError("lacks planes among those that its OME metadata place in it: save it anew")
    if len(set(pages.values())) < len(pages):
        raise FaultError("has OME metadata that name a page twice: save it anew")
    return Planes(axes, tuple(found), tuple(pages[plane] for plane in sorted(pages)), all_times)
