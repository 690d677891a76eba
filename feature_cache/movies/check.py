"""Is a movie what it should be? Its frames, masks and tracks, with the cure for each fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import FrameError, MovieError
from ..hashing import JSON, frame_pixels, mask_labels
from .images import Series
from .tracks import read_tracks

QUICK_FRAMES = 3
"""Frames that a quick look reads: the first, the middle and the last."""

_NEIGHBOURS_OF_LABELS = 0.5
"""Neighbouring pixels of a label image are mostly equal; those of a photograph are not."""
_PIECES_OF_A_CLASS = 4
"""So many separate parts a label, and a mask names classes, not cells."""
_ALMOST_ALL = 0.98
"""Between the percentiles 1 and 99.8 lie at least so many pixels."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be.

    Attributes
    ----------
    what : str
        In a few words, such as ``"no cells"``.
    text : str
        What was found, where, and what to do.
    """

    what: str
    text: str

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        return {"what": self.what, "text": self.text}


@dataclass(frozen=True, slots=True)
class MovieCheck:
    """What a look at a movie found.

    Attributes
    ----------
    movie : str
    frames : int
    looked : int
        How many of them were read.
    shape : tuple of int
        Of a frame; empty where none could be read.
    dtype : str
        Of the pixels as stored.
    regions : (int, float, int) or None
        Least, median and most regions of a frame, of those that were read; None without masks.
    problems : tuple of Problem
        Empty where all is well.
    """

    movie: str
    frames: int
    looked: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""
    regions: tuple[int, float, int] | None = None
    problems: tuple[Problem, ...] = ()

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        plain: dict[str, JSON] = {
            name: getattr(self, name) for name in ("movie", "frames", "looked", "shape", "dtype")
        }
        plain["regions"] = self.regions
        plain["problems"] = [problem.to_json() for problem in self.problems]
        return plain


@dataclass(frozen=True, slots=True)
class FrameLook:
    """What one frame and its mask are like.

    Attributes
    ----------
    t : int
    shape : tuple of int
    dtype : str
    is_constant, is_sparse : bool
        All pixels are equal; so many are that both percentiles of the normalisation are.
    looks_labelled : bool
        The frame is made of pieces with a whole number each, as a label mask is.
    labels : (N,) int, or None
        Of the mask.
    parts : int
        Connected parts of the mask's foreground.
    mask_neighbours : float
        Share of the mask's pixels that equal the next in their row.
    """

    t: int
    shape: tuple[int, ...]
    dtype: str
    is_constant: bool
    is_sparse: bool
    looks_labelled: bool
    labels: NDArray[np.int32] | None
    parts: int
    mask_neighbours: float


def check_movie(
    name: str,
    frames: Series,
    masks: Series | None,
    tracks: Path | None = None,
    *,
    quick: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> MovieCheck:
    """Look at a movie's frames, masks and tracks.

    Parameters
    ----------
    name : str
    frames, masks : Series, Series or None
    tracks : Path, optional
        The man_track.txt of the whole movie, where there is one.
    quick : bool
        Read three frames, and no tracks.
    progress : callable, optional
        Called with the number of frames just read.
    """
    wanted: Sequence[int] = range(len(frames))
    if quick:
        wanted = sorted({0, len(frames) // 2, len(frames) - 1})
    looks, problems = [], _Problems()
    for t in wanted:
        try:
            looks.append(look_at_frame(frames, masks, t))
        except (MovieError, FrameError) as error:
            problems.add("unreadable", str(error))
        if progress is not None:
            progress(1)
    judge_looks(looks, problems)
    if tracks is not None and not quick:
        judge_tracks(tracks, looks, len(frames), problems)
    counts = [len(look.labels) for look in looks if look.labels is not None]
    return MovieCheck(
        name,
        len(frames),
        len(looks),
        looks[0].shape if looks else (),
        looks[0].dtype if looks else "",
        (min(counts), float(np.median(counts)), max(counts)) if counts else None,
        problems.found(),
    )


class _Problems:
    """Collects problems; of many of one kind the first is told, and how many there are."""

    def __init__(self) -> None:
        self._first: dict[str, str] = {}
        self._count: Counter[str] = Counter()

    def add(self, what: str, text: str) -> None:
        self._first.setdefault(what, text)
        self._count[what] += 1

    def found(self) -> tuple[Problem, ...]:
        return tuple(
            Problem(
                what,
                f"{text} (and {self._count[what] - 1} more)" if self._count[what] > 1 else text,
            )
            for what, text in self._first.items()
        )


def look_at_frame(frames: Series, masks: Series | None, t: int) -> FrameLook:
    """Read a frame and its mask, and measure what tells images and label masks apart.

    Raises
    ------
    MovieError, FrameError
        They can't be read, hold NaN, or have different shapes.
    """
    where = f"frame {t} ({frames.name_of(t)})" if frames.place else f"frame {t}"
    stored = frames[t]
    frame = frame_pixels(stored, where)
    labels, parts, neighbours = None, 0, 1.0
    if masks is not None:
        mask = mask_labels(masks[t], f"the mask of {where}")
        if mask.shape != frame.shape:
            raise MovieError(
                f"{where} has shape {frame.shape} and its mask {mask.shape}: expected the same"
            )
        labels, parts = np.unique(mask[mask > 0]), int(ndimage.label(mask > 0)[1])
        neighbours = _equal_neighbours(mask)
    flat = frame.reshape(-1)
    some = np.sort(flat[:: max(1, flat.size // 10_000)])
    share = np.count_nonzero(flat == some[len(some) // 2]) / flat.size
    sparse = share > _ALMOST_ALL and not np.ptp(np.percentile(frame, (1.0, 99.8)))
    return FrameLook(
        t,
        frame.shape,
        str(stored.dtype),
        is_constant=bool(share == 1.0),
        is_sparse=bool(sparse),
        looks_labelled=_looks_labelled(stored),
        labels=labels,
        parts=parts,
        mask_neighbours=neighbours,
    )


def _equal_neighbours(image: NDArray[Any]) -> float:
    return float((image[..., 1:] == image[..., :-1]).mean()) if image.shape[-1] > 1 else 1.0


def _looks_labelled(image: NDArray[Any]) -> bool:
    """Tell whether an image is made of pieces with a whole number each, as a label mask is."""
    if image.dtype.kind not in "bui" or image.min() != 0 or _equal_neighbours(image) < 0.8:
        return False
    values = np.unique(image[image > 0])
    return len(values) > 2 and int(ndimage.label(image > 0)[1]) <= 2 * len(values) <= image.size


def judge_looks(looks: Sequence[FrameLook], problems: _Problems) -> None:
    """Say what is wrong with frames and masks that were read."""
    if not looks:
        return
    _judge_shapes(looks, problems)
    _judge_pixels(looks, problems)
    masked = [look for look in looks if look.labels is not None]
    if masked:
        _judge_masks(masked, problems)


def _judge_shapes(looks: Sequence[FrameLook], problems: _Problems) -> None:
    first = looks[0]
    for look in looks:
        if look.shape != first.shape:
            problems.add(
                "shapes",
                f"frame {look.t} has shape {look.shape} and frame {first.t} {first.shape}: "
                "expected one shape; are these frames of one movie?",
            )


def _judge_pixels(looks: Sequence[FrameLook], problems: _Problems) -> None:
    for look in looks:
        if look.is_constant:
            problems.add(
                "constant",
                f"frame {look.t} has one value in all pixels: its features tell nothing; leave "
                "it out, or restore it",
            )
        elif look.is_sparse:
            problems.add(
                "few pixels above black",
                f"frame {look.t} has so few pixels that differ from its background that the "
                "percentiles 1 and 99.8 are equal: it is normalised by its least and largest "
                "value instead; crop it to where cells are if that is too dark",
            )


def _judge_masks(looks: Sequence[FrameLook], problems: _Problems) -> None:
    if _most(look.mask_neighbours < _NEIGHBOURS_OF_LABELS for look in looks):
        swapped = _most(look.looks_labelled for look in looks)
        problems.add(
            "frames and masks exchanged" if swapped else "masks look like images",
            f"the mask of frame {looks[0].t} has other values from pixel to pixel, as an image "
            f"has{', and the frame looks like a label mask' if swapped else ''}: expected one "
            f"whole number a cell; {'exchange the two' if swapped else 'name the label masks'}",
        )
        return
    if not any(len(_labels(look)) for look in looks):
        problems.add(
            "no cells",
            f"no cell in any of the {len(looks)} masks that were read: expected a whole number a "
            "cell, 0 is background; are these the masks?",
        )
        return
    _judge_labels(looks, problems)


def _judge_labels(looks: Sequence[FrameLook], problems: _Problems) -> None:
    filled = [look for look in looks if len(_labels(look))]
    different = {int(label) for look in filled for label in _labels(look)}
    many = _most(look.parts > 1 for look in filled)
    if len(different) == 1 and many:
        problems.add(
            "one label everywhere",
            f"every cell has label {different.pop()}, in {filled[0].parts} separate parts of frame "
            f"{filled[0].t}: a binary mask; label each cell, such as by skimage.measure.label",
        )
    elif _most(look.parts >= _PIECES_OF_A_CLASS * len(_labels(look)) for look in filled):
        problems.add(
            "labels are classes",
            f"the mask of frame {filled[0].t} has {filled[0].parts} separate parts and "
            f"{len(_labels(filled[0]))} labels: expected a label a cell; label each cell, such as "
            "by skimage.measure.label",
        )


def _labels(look: FrameLook) -> NDArray[np.int32]:
    return look.labels if look.labels is not None else np.zeros(0, np.int32)


def _most(facts: Iterable[bool]) -> bool:
    known = list(facts)
    return 2 * sum(known) > len(known)


def judge_tracks(file: Path, looks: Sequence[FrameLook], frames: int, problems: _Problems) -> None:
    """Say where man_track.txt and the masks of a whole movie disagree."""
    try:
        tracks = read_tracks(file)
    except MovieError as error:
        problems.add("tracks", str(error))
        return
    spans = {label: (first, last) for label, first, last, _ in tracks.tolist()}
    for label, first, last, parent in tracks.tolist():
        if not first <= last < frames:
            problems.add(
                "tracks",
                f"{file} has cell {label} in frames {first} to {last}: expected frames within 0 "
                f"to {frames - 1}, the first one first",
            )
        if parent and parent not in spans:
            problems.add(
                "divisions",
                f"{file} has cell {label} with the parent {parent}, which is not there: add its "
                "line, or write 0",
            )
        elif parent and spans[parent][1] >= first:
            problems.add(
                "divisions",
                f"{file} has cell {label} from frame {first} on, and its parent {parent} until "
                f"frame {spans[parent][1]}: expected the parent to end before",
            )
    for look in looks:
        drawn = set(_labels(look).tolist())
        ends = {n for n, span in spans.items() if look.t in span}
        within = {n for n, (first, last) in spans.items() if first <= look.t <= last}
        for label in sorted(ends - drawn):
            problems.add(
                "tracks",
                f"{file} has cell {label} in frame {look.t}, and its mask has no such label",
            )
        for label in sorted(drawn - within):
            problems.add(
                "tracks",
                f"the mask of frame {look.t} has the label {label}, which {file} does not have in "
                "this frame",
            )
