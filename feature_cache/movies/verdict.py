"""The verdict on a TIFF file: which of its pixels are the image of which timepoint.

A pure function of what is written in the file and of what a reader is told. What the file says of
itself counts; what it doesn't say is not guessed, but asked for.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .faults import DamageError, FaultError
from .ifd import COLORMAP, COMPRESSION, DEPTH, PHOTOMETRIC, Page, Tiff
from .images import LABELS_ALONE, ReadOptions
from .ome import find_planes, holds_ome

_WHITE, _BLACK, _RGB, _PALETTE, _YCBCR = 0, 1, 2, 3, 6
_KINDS = {1: "u", 2: "i", 3: "f", 4: "u"}
_COMPLEX = (5, 6)
_LOSSY = (6, 7)
_FOREIGN = {
    34412: "a Zeiss LSM file",
    33445: "a file of the MD Gel format, whose values may be square roots",
    43314: "a file of NIH Image",
}
_NAMES, _NAMELESS = "TCZYXS", "QI"
_STACK_TAG = 33629
_POINTERS = {330, 34665, 34853, 40965}
"""Tags that point to directories of other images, or of other things."""
_SPLIT = "save it with fewer axes, one movie or timepoint a file"
_GRAY = 'save it in gray (photometric="minisblack")'


class Plane(NamedTuple):
    """Where a plane of pixels is."""

    page: int
    """Where its page's directory starts."""
    sample: int | None
    """Which, where the pixels of the page have several."""
    run: int
    """Where the pixels of the page start, if they are plain bytes without a gap; else 0."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on a file that is read."""

    shape: tuple[int, ...]
    """Of an image: (H, W) or (Z, H, W)."""
    page: tuple[int, ...]
    """Shape of a page as stored: (H, W), or with samples, (H, W, S) or (S, H, W)."""
    axis: int | None
    """Of the samples in a page, if there is one."""
    dtype: str
    """Of the values in the file, with its byte order, such as ``"<u2"``."""
    times: tuple[tuple[Plane, ...], ...]
    """The planes of each timepoint, in the order of Z."""
    is_told: bool
    """Whether the file, or who reads it, says that its planes are slices, where it has
    several."""

    @property
    def native(self) -> np.dtype[Any]:
        """Dtype of the values when they are read."""
        return np.dtype(self.dtype).newbyteorder("=")


@dataclass(frozen=True, slots=True)
class Axes:
    """Axes as stored: a letter and a length each. ``Q`` and ``I`` are axes without a name."""

    letters: str
    lengths: tuple[int, ...]

    def __str__(self) -> str:
        return f"axes {self.letters}, shape {self.lengths}"

    def index(self, letters: str) -> list[int]:
        """Find the axes of more than one element that bear one of some letters."""
        pairs = zip(self.letters, self.lengths, strict=True)
        return [n for n, (letter, many) in enumerate(pairs) if letter in letters and many > 1]

    def squeeze(self) -> Axes:
        """Give those of more than one element, and Y and X."""
        kept = [n for n, m in enumerate(self.lengths) if m > 1 or self.letters[n] in "YX"]
        return Axes("".join(self.letters[n] for n in kept), tuple(self.lengths[n] for n in kept))

    def cure(self, *fills: str, instead: str = "") -> str:
        """Say how to name the axes that have no name, or one that is meant `instead`."""
        seen = self.squeeze().letters
        ways = []
        for fill in fills:
            free = iter([one for one in fill if one not in seen or one in instead])
            kept = [one in _NAMES and one not in instead for one in seen]
            ways.append("".join(a if k else next(free, a) for a, k in zip(seen, kept, strict=True)))
        ways = [way for way in ways if set(way) <= set(_NAMES) and way != seen]
        told = " or ".join(f'axes="{way}"' for way in ways)
        return f"say what the axes are ({told}; --axes {ways[0]})" if ways else _SPLIT


def judge(tiff: Tiff, options: ReadOptions, *, stack: bool = False) -> Verdict:
    """Decide what a file's images are: a `stack` is a whole movie, any other one timepoint.

    Raises
    ------
    FaultError
        It is anything else than images of one channel, or does not say what its axes are.
    """
    pages = [n for n, page in enumerate(tiff.pages) if not page.reduced]
    page = _check_alike(tiff, pages)
    _check_kind(page)
    _check_meaning(page, options)
    stored, order = _find_axes(tiff, pages, whole=stack and options.axes is None)
    chosen = choose_planes(stored, options, stack=stack)
    _check_rest(tiff, page, stored, len(order))
    planes = _locate(tiff, page, order, prod(stored.lengths) // prod(page.shape))
    times = tuple(tuple(planes[n] for n in volume) for volume in chosen.tolist())
    shape = page.shape if chosen.shape[1] == 1 else (chosen.shape[1], *page.shape)
    kind = _name_dtype(page, tiff.byteorder)
    form: tuple[int, ...] = page.shape
    axis = None
    if page.samples > 1:
        axis = 0 if page.planar else 2
        form = (page.samples, *form) if page.planar else (*form, page.samples)
    told = options.axes is not None or not stored.index(_NAMELESS)
    return Verdict(shape, form, axis, kind, times, told)


def choose_planes(stored: Axes, options: ReadOptions, *, stack: bool = False) -> NDArray[np.int64]:
    """Choose the planes that a reader is to give, as (T, Z), by their numbers as stored.

    Raises
    ------
    FaultError
        As `judge` does for what concerns axes.
    """
    axes = _rename(stored, options)
    channels = axes.index("CS")
    # the same option goes with frames, which have channels
    channel = None if options.labels and not channels else options.channel
    _check_channel(axes, channels, channel, options)
    _check_names(axes, options, stack)
    return _choose(axes, channel)


def _check_alike(tiff: Tiff, pages: list[int]) -> Page:
    """Give the first of the pages that are images, all of which must be of one form."""
    if not pages:
        raise FaultError(
            "holds nothing but reduced images (NewSubfileType): expected one in full; save it anew"
        )
    found: dict[Any, Page] = {}
    for page in (tiff.pages[n] for n in pages):
        form = (page.shape, page.samples, page.planar, page.bits, page.format)
        found.setdefault((form, page.get(PHOTOMETRIC, _BLACK)), page)
    if len(found) > 1:
        shapes = " and ".join(f"{one.shape} of {one.bits} bits" for one in list(found.values())[:3])
        raise FaultError(
            f"holds several series of images ({shapes}): expected one; save the one that counts "
            "as a file of its own"
        )
    return tiff.pages[pages[0]]


def _check_kind(page: Page) -> None:
    """Raise where a page is of a format of its own, or its values are no real numbers."""
    for code, name in _FOREIGN.items():
        if code in page.counts:
            raise FaultError(f"is {name}: expected plain TIFF; save it as ImageJ or OME-TIFF")
    if page.counts.get(_STACK_TAG, 1) > 1 or page.get(DEPTH, 1) > 1:
        raise FaultError(
            "holds many planes in a page: expected a page for each; save it as ImageJ or OME-TIFF"
        )
    if page.format in _COMPLEX:
        raise FaultError("holds complex numbers: expected real ones; save the part that counts")
    if page.format not in _KINDS or not 0 < page.bits <= 64:
        raise FaultError(
            "holds values of a kind that is not known: expected integers or floating point; save "
            "it anew"
        )


def _check_meaning(page: Page, options: ReadOptions) -> None:
    """Raise where values are no intensities; or no labels, where images are masks."""
    photometric = page.get(PHOTOMETRIC, _BLACK)
    if photometric not in (_WHITE, _BLACK, _RGB, _PALETTE, _YCBCR):
        raise FaultError(f"is in a colour space of its own ({photometric}): {_GRAY}")
    if options.labels:
        if page.get(COMPRESSION, 1) in _LOSSY:
            raise FaultError(
                "holds labels that JPEG has changed: save it by a lossless compression"
            )
        return
    if photometric == _WHITE:
        raise FaultError(
            f"has values that are brighter the smaller they are (min-is-white): {_GRAY}"
        )
    if photometric == _PALETTE:
        colormap = np.array(page.tags.get(COLORMAP, ()))
        check_palette(colormap[: colormap.size // 3 * 3].reshape(3, -1) / 65535)


def check_palette(colours: NDArray[np.float64]) -> None:
    """Raise where a palette (3, N) of 0..1 shows no values as brightness, in gray or in one hue."""
    many = colours.shape[1]
    used = colours[colours.any(1)]
    if not used.size or (np.abs(used - np.linspace(0, 1, many)) > 1 / many).any():
        raise FaultError(f"has a palette, so its values are no intensities: {_GRAY}")


def _name_dtype(page: Page, byteorder: str) -> str:
    size = next(size for size in (1, 2, 4, 8) if page.bits <= 8 * size)
    return "?" if page.bits == 1 else f"{byteorder}{_KINDS[page.format]}{size}"


def _find_axes(tiff: Tiff, pages: list[int], *, whole: bool) -> tuple[Axes, list[int]]:
    """Find the axes as stored, and which page holds each plane (or the only one for all)."""
    page = tiff.pages[pages[0]]
    text = next(iter(page.descriptions), "")
    if holds_ome(text):
        outer, pages = _read_ome(tiff, text, pages, whole=whole)
    elif text.startswith("ImageJ="):
        outer = _read_imagej(tiff, text, page, len(pages))
    elif any(said := [_find_shape(tiff.pages[n]) for n in pages]):
        return _read_shaped(tiff, page, said), pages
    else:
        outer = Axes("I", (len(pages),))
    samples = Axes("S", (page.samples,)) if page.samples > 1 else Axes("", ())
    parts = (outer, samples, Axes("YX", page.shape))
    parts = parts if page.planar else (outer, parts[2], samples)
    return Axes("".join(part.letters for part in parts), sum((p.lengths for p in parts), ())), pages


def _read_ome(tiff: Tiff, text: str, pages: list[int], *, whole: bool) -> tuple[Axes, list[int]]:
    planes = find_planes(text, tiff.name, len(tiff.pages), tiff.pages[pages[0]].samples)
    if planes is None:
        return Axes("I" if len(pages) == 1 else "?", (len(pages),)), pages
    if set(planes.pages) != set(pages):
        raise FaultError(
            f"has {len(pages)} pages, and its OME metadata name {len(planes.pages)}: save it anew"
        )
    if whole and planes.times < planes.all_times:
        raise FaultError(
            f"holds {planes.times} of {planes.all_times} timepoints of its OME metadata, the "
            "others are in other files: save the movie as one file, name the folder where each "
            "file is a timepoint, or say what the axes are (axes=…, --axes) to read this one alone"
        )
    return Axes(planes.axes, planes.lengths), list(planes.pages)


def _read_imagej(tiff: Tiff, text: str, page: Page, pages: int) -> Axes:
    """Read the axes that ImageJ writes: of order TZC, but where it says so."""
    said = dict(re.findall(r"^(\w+)=(.*?)\s*$", text, re.MULTILINE))
    counts = {name: int(n) for name, n in said.items() if n.isdecimal()}
    order = said.get("order", "czt").lower()
    letters = order[::-1].upper() if sorted(order) == ["c", "t", "z"] else "TZC"
    named = {"T": "frames", "Z": "slices", "C": "channels"}
    lengths = [counts.get(named[letter], 1) for letter in letters]
    if page.samples > 1 and counts.get("channels", 1) == page.samples:
        lengths[letters.index("C")] = 1
    images = counts.get("images", pages)
    rest, odd = divmod(max(images, prod(lengths)), prod(lengths) or 1)
    if odd or not prod(lengths):
        raise FaultError(
            f"says that its {images} images are {dict(zip(letters, lengths, strict=True))} "
            "(ImageJ): save it anew"
        )
    axes = Axes("I" + letters, (rest, *lengths))
    _check_promise(tiff, page, prod(axes.lengths), pages)
    return axes


def _check_promise(tiff: Tiff, page: Page, promised: int, pages: int) -> None:
    """Raise where there are not as many planes as a description says, on pages or in one run."""
    if promised == pages:
        return
    if not (pages == 1 < promised and page.run):
        raise FaultError(
            f"has {pages} pages, and {promised} by its description: incomplete, or changed by "
            "other software; save it anew"
        )
    end = page.run + promised * page.nbytes
    if end > tiff.size:
        raise DamageError(
            f"of {tiff.size} bytes is cut short: the pixels of its {promised} planes end at byte "
            f"{end}"
        )


def _check_rest(tiff: Tiff, page: Page, stored: Axes, pages: int) -> None:
    """Raise where planes follow that no page tells of, as in stacks of other software."""
    others = _POINTERS & page.counts.keys()
    told = prod(stored.lengths) == pages * prod(page.shape) * page.samples
    if page.run and told and not others and tiff.rest >= page.nbytes:
        raise FaultError(
            f"has {tiff.rest} bytes behind its {pages} page(s) of {page.nbytes}: expected none, or "
            "a page for each plane; save it as ImageJ or OME-TIFF"
        )


def _find_shape(page: Page) -> dict[str, Any]:
    """Find the shape that tifffile wrote with a page that starts a series; else nothing."""
    for text in page.descriptions:
        old = re.fullmatch(r"shape=\(([\d, ]+)\)", text)
        try:
            found = {"shape": re.findall(r"\d+", old[1])} if old else json.loads(text)
            return {**found, "shape": tuple(int(length) for length in found["shape"])}
        except (ValueError, TypeError, KeyError):
            continue
    return {}


def _read_shaped(tiff: Tiff, page: Page, said: list[dict[str, Any]]) -> Axes:
    """Read the axes of what tifffile wrote; it may have taken slices for samples of a colour."""
    starts = [said[0], *filter(None, said[1:])]
    if any(one != said[0] for one in starts):
        raise FaultError(
            f"holds several series of images, of shapes {[one.get('shape') for one in starts[:3]]}"
            ": expected one; save the one that counts as a file of its own"
        )
    shape, letters = said[0]["shape"], str(said[0].get("axes", "")).upper()
    planes, inside = (page.samples, 1) if page.planar else (1, page.samples)
    places = [
        n for n in range(len(shape) - 1)
        if shape[n : n + 2] == page.shape and prod(shape[n + 2 :]) == inside
        and prod(shape[:n]) % planes == 0
    ]  # fmt: skip
    named = len(letters) == len(shape)
    y = letters.find("YX") if named else (places or [-1])[0]
    if y not in places:
        raise FaultError(
            f"has pages of shape {page.shape}, and {shape} by its description (tifffile): save it "
            "anew"
        )
    _check_promise(tiff, page, len(starts) * prod(shape[:y]) // planes, len(said))
    tail = "".join("S" if length > 1 else "Q" for length in shape[y + 2 :])
    letters = letters if named else "Q" * y + "YX" + tail
    series = Axes("?", (len(starts),)) if len(starts) > 1 else Axes("", ())
    return Axes(series.letters + letters, series.lengths + shape)


def _rename(axes: Axes, options: ReadOptions) -> Axes:
    """Give axes the meaning that the reader is told."""
    if options.axes is None:
        return axes
    letters, squeezed = options.axes.upper(), axes.squeeze()
    if options.labels and len(letters) > len(squeezed.letters):
        letters = letters.replace("C", "")  # the same option goes with frames, which have channels
    known = set(letters) <= set("TCZYXS") and len(set(letters)) == len(letters)
    if not known or not {"Y", "X"} <= set(letters):
        raise FaultError(
            f'can\'t be read by axes="{options.axes}": expected letters of TCZYXS, each once, '
            "with Y and X"
        )
    fit = axes if len(letters) == len(axes.letters) else squeezed
    if squeezed.letters == "YX" and "YX" in letters:  # all others are of one element
        lengths = dict(zip("YX", squeezed.lengths, strict=True))
        return Axes(letters, tuple(lengths.get(letter, 1) for letter in letters))
    if len(letters) != len(fit.letters):
        raise FaultError(
            f'can\'t be read by axes="{options.axes}": it has {len(fit.letters)} axes, of shape '
            f"{fit.lengths}; name as many"
        )
    if letters.find("YX") != fit.letters.find("YX"):
        raise FaultError(
            f'can\'t be read by axes="{options.axes}": its images are planes of Y and X, so these '
            f"stand next to each other, in axes {fit.letters.find('Y')} and "
            f"{fit.letters.find('X')} of shape {fit.lengths}, from 0"
        )
    return Axes(letters, fit.lengths)


def _check_channel(axes: Axes, found: list[int], channel: int | None, options: ReadOptions) -> None:
    """Raise where there is not the one channel that is asked for."""
    many = axes.lengths[found[0]] if found else 1
    if channel is None and not found:
        return
    seen = axes.squeeze()
    if len(found) > 1:
        raise FaultError(f"has channels, and each in colour ({seen}): {_GRAY}")
    if found and channel is None:
        colour = axes.letters[found[0]] == "S"
        kind = "is a colour image" if colour else f"has {many} channels"
        volumes = "Z" in seen.letters
        names = axes.cure("TZ", instead="CZ") if volumes else axes.cure("Z", "T", instead="C")
        other = _GRAY if colour else names
        way = LABELS_ALONE if options.labels else "name one (channel=0, --channel 0)"
        raise FaultError(f"{kind} ({seen}), expected one channel: {way}, or {other}")
    if channel is not None and not 0 <= channel < many:
        raise FaultError(
            f"has no channel {channel}: expected one of its {many}, counted from 0 ({seen})"
        )


def _check_names(axes: Axes, options: ReadOptions, stack: bool) -> None:
    """Raise where axes are not a volume's, or not a movie's."""
    seen = axes.squeeze()
    if seen.letters == "YX":
        return
    others = [one for one in seen.letters if one not in _NAMES + _NAMELESS]
    twice = any(len(axes.index(letter)) > 1 for letter in "TCZS")
    nameless, slices, times = (axes.index(letters) for letters in (_NAMELESS, "Z", "T"))
    if others or twice or len(nameless) > 1 or (nameless and (stack or slices or times)):
        cure = axes.cure("TZ", "ZT") if stack else axes.cure("ZC")
        raise FaultError(f"does not say what all its axes are ({seen}): {cure}")
    if times and not stack:
        raise FaultError(
            f"holds {axes.lengths[times[0]]} timepoints ({seen}), expected a file for each: open "
            f"the file itself as the movie, or {axes.cure('Z', instead='T')}"
        )
    told = options.axes is not None and "T" in axes.letters
    if stack and slices and not times and not told:
        raise FaultError(f"is one volume ({seen}), expected time: {axes.cure('T', instead='Z')}")


def _choose(axes: Axes, channel: int | None) -> NDArray[np.int64]:
    """Choose the planes of a channel, as (T, Z); their numbers are as stored."""
    letters = axes.letters.replace("YX", "")
    y = axes.letters.index("YX")
    lengths = axes.lengths[:y] + axes.lengths[y + 2 :]
    parts: list[Any] = []
    for letter, length in zip(letters, lengths, strict=True):
        parts.append(0 if length == 1 else channel if letter in "CS" else slice(None))
    planes = np.arange(prod(lengths)).reshape(lengths)[tuple(parts)]
    kept = [letter for letter, part in zip(letters, parts, strict=True) if part == slice(None)]
    if "T" not in kept:
        planes = planes[None]
    elif kept == ["Z", "T"]:
        planes = planes.T
    return planes.reshape(len(planes), -1)


def _locate(tiff: Tiff, page: Page, order: list[int], count: int) -> list[Plane]:
    """Find where each plane is: on a page, or in the run of bytes that starts at the only one."""
    pages = [(tiff.pages[n].offset, tiff.pages[n].run) for n in order]
    if count > len(order) * page.samples:
        nbytes, ((offset, run),) = page.nbytes, pages
        pages = [(offset, run + n * nbytes) for n in range(count // page.samples)]
    samples = range(page.samples) if page.samples > 1 else (None,)
    return [Plane(offset, sample, run) for offset, run in pages for sample in samples]
