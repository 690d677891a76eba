"""Is a movie what it should be? Its frames, masks and tracks, with the cure for each fault.

What is measured is told apart by a wide margin, so that a good movie passes whatever it shows: a
region of a label mask has one value in one place; an image's values change from pixel to pixel.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from ..errors import FrameError, MovieError
from ..hashing import JSON, frame_pixels, mask_labels
from ..system import count_cores
from .axes import channel_hint
from .images import Images
from .tracks import Tracks, read_tracks

QUICK_FRAMES = 3
"""Frames that a quick look reads: the first, the middle and the last."""

_MORE_FRAMES = 16
"""Frames that a quick look reads where the first few have no cell: it may be elsewhere."""
_PERCENTILES = (1.0, 99.8)
"""Those between which a frame is normalised by default."""
_ALMOST_ALL = 0.98
"""Of a frame whose two percentiles are equal, at least this share of the pixels is."""
_FLAT, _UNEVEN = 0.8, 0.5
"""Neighbours within regions of a label mask are mostly equal; those of an image are not."""
_FEW = 20
"""Pairs of neighbours that prove nothing."""
_MOST_PIXELS = 1 << 23
"""Of one image in which regions are told apart; of a larger one, its middle."""
_LARGE_PART = 0.1
"""A part of a region counts where it has this share of the largest: specks don't."""
_FEW_LABELS, _PARTS_OF_A_CLASS = 4, 4
"""So many separate parts a label, and a mask names classes, not cells; 2 if labels are few."""
_MANY_CLASSES = 10
"""More are values of an image."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it should be.

    Attributes
    ----------
    what : str
        In a few words, such as ``"no cells"``.
    text : str
        What was found, where it is first, and what to do.
    count : int
        In how many places.
    is_error : bool
        Whether it keeps a frame from being computed: who computes it is told so anyway.
    """

    what: str
    text: str
    count: int = 1
    is_error: bool = False

    def __str__(self) -> str:
        """Say it in one line."""
        more = f" (and {self.count - 1:,} more)" if self.count > 1 else ""
        return f"{self.what}: {self.text}{more}"

    def to_json(self) -> dict[str, JSON]:
        """Give the fields by name."""
        return {"what": self.what, "text": self.text, "count": self.count}


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
        plain: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        plain["problems"] = [problem.to_json() for problem in self.problems]
        return plain

    def log_problems(self) -> None:
        """Log each problem as a warning, those left out that are errors wherever one computes."""
        for problem in self.problems:
            if not problem.is_error:
                _log.warning("%s: %s", self.movie, problem)


@dataclass(frozen=True, slots=True)
class FrameLook:
    """What a frame, `where` for people, is like."""

    where: str
    shape: tuple[int, ...]
    dtype: str
    is_constant: bool
    is_sparse: bool
    """So many pixels are equal that both percentiles of the normalisation are."""
    is_flat: bool
    """It has whole numbers, 0 among them, and within what is above 0 neighbours are equal."""
    looks_labelled: bool
    """And each number is in one place, as in a label mask."""


@dataclass(frozen=True, slots=True)
class MaskLook:
    """What a mask, `where` for people, is like."""

    t: int
    where: str
    shape: tuple[int, ...]
    labels: NDArray[np.int32]
    """(N,), ascending."""
    parts: NDArray[np.int64]
    """(M,), in how many separate parts labels are, small ones left out."""
    looks_like_image: bool
    """Neighbours within what is above 0 differ, and a value is in many places."""

    def has_classes(self, parts: int) -> bool:
        """Tell whether most labels are in so many parts that they name no cells."""
        return bool(len(self.parts) and np.median(self.parts) >= parts)


@dataclass(frozen=True, slots=True)
class _Look:
    """What could be read at one time, and what could not."""

    frame: FrameLook | None
    mask: MaskLook | None
    problems: tuple[Problem, ...]


def check_movie(
    name: str,
    frames: Images,
    masks: Images | None,
    tracks: Path | None = None,
    *,
    quick: bool = False,
    progress: Callable[[int], Any] | None = None,
) -> MovieCheck:
    """Look at a movie's frames, as many masks, and tracks. Holds a few of the images at a time.

    A quick look reads three frames, and no tracks. `progress` is called with the number of frames
    just read.
    """
    count = len(frames)
    wanted = _spread(count, QUICK_FRAMES) if quick else range(count)
    looks = list(_look(frames, masks, wanted, progress))
    if quick and masks is not None and not any(len(mask.labels) for mask in _masks(looks)):
        others = [t for t in _spread(count, _MORE_FRAMES) if t not in wanted]
        looks += _look(frames, masks, others, None)
    problems = [*(problem for look in looks for problem in look.problems), *_judge(looks)]
    if tracks is not None and not quick:
        problems += judge_tracks(tracks, _masks(looks), count)
    seen, counts = _frames(looks), [len(mask.labels) for mask in _masks(looks)]
    return MovieCheck(
        name,
        count,
        len(seen),
        seen[0].shape if seen else (),
        seen[0].dtype if seen else "",
        summarize(counts),
        _sum_up(problems),
    )


def summarize(counts: Sequence[int]) -> tuple[int, float, int] | None:
    """Give the least, median and most of some counts; None where there are none."""
    return (min(counts), float(np.median(counts)), max(counts)) if len(counts) else None


def _spread(count: int, wanted: int) -> list[int]:
    """Choose frames all over a movie, the first and the last among them."""
    return sorted({round(t) for t in np.linspace(0, count - 1, wanted).tolist()}) if count else []


def _frames(looks: Iterable[_Look]) -> list[FrameLook]:
    return [look.frame for look in looks if look.frame is not None]


def _masks(looks: Iterable[_Look]) -> list[MaskLook]:
    return [look.mask for look in looks if look.mask is not None]


def _sum_up(problems: Iterable[Problem]) -> tuple[Problem, ...]:
    """Give the first problem of each kind, and how many there are."""
    first: dict[str, Problem] = {}
    for problem in problems:
        before = first.get(problem.what)
        count = problem.count if before is None else before.count + problem.count
        first[problem.what] = replace(before or problem, count=count)
    return tuple(first.values())


# Looking


def _look(
    frames: Images,
    masks: Images | None,
    wanted: Sequence[int],
    progress: Callable[[int], Any] | None,
) -> Iterator[_Look]:
    """Read some frames and their masks, several at once."""
    with ThreadPoolExecutor(max(4, count_cores()), "feature_cache check") as readers:
        for look in readers.map(lambda t: _look_at(frames, masks, t), wanted):
            yield look
            if progress is not None:
                progress(1)


def _look_at(frames: Images, masks: Images | None, t: int) -> _Look:
    frame = mask = None
    problems = []
    try:
        frame = look_at_frame(frames, t)
    except (MovieError, FrameError) as error:
        problems.append(_error(error))
    try:
        mask = None if masks is None else look_at_mask(masks, t)
    except (MovieError, FrameError) as error:
        problems.append(_error(error))
    if frame is not None and mask is not None and frame.shape != mask.shape:
        text = f"{frame.where} has shape {frame.shape} and {mask.where} {mask.shape}"
        hint = channel_hint(frame.shape, mask.shape)
        problems.append(
            Problem("shapes of frame and mask", f"{text}: expected the same{hint}", is_error=True)
        )
    return _Look(frame, mask, tuple(problems))


def _error(error: Exception) -> Problem:
    what = "no numbers" if isinstance(error, FrameError) else "can't be used"
    return Problem(what, str(error), is_error=True)


def _name(images: Images, t: int, kind: str) -> str:
    return f"{kind} {t} ({images.name_of(t)})" if images.place else f"{kind} {t}"


def look_at_frame(frames: Images, t: int) -> FrameLook:
    """Read frame `t`.

    Raises
    ------
    MovieError, FrameError
        It can't be read, or holds NaN.
    """
    where = _name(frames, t, "frame")
    stored = np.asarray(frames[t])
    pixels = frame_pixels(stored, where)
    share = _commonest_share(pixels)
    is_sparse = share > _ALMOST_ALL and np.ptp(np.percentile(pixels, _PERCENTILES)) == 0
    is_flat = _is_flat(part := _middle(stored))
    return FrameLook(
        where,
        pixels.shape,
        str(stored.dtype),
        is_constant=share == 1,
        is_sparse=bool(is_sparse),
        is_flat=is_flat,
        looks_labelled=is_flat and _has_several_values(part) and not _is_scattered(part),
    )


def look_at_mask(masks: Images, t: int) -> MaskLook:
    """Read mask `t`.

    Raises
    ------
    MovieError, FrameError
        It can't be read, or holds no labels.
    """
    where = _name(masks, t, "mask")
    mask = mask_labels(masks[t], where)
    labels, part = np.unique(mask[mask > 0]), _middle(mask)
    parts = _count_parts(part)
    # Of a smooth image, the values between dark and bright are thin lines, all of them border.
    is_uneven = _evenness(part) < _UNEVEN or 2 * len(parts) < len(np.unique(part[part > 0]))
    return MaskLook(t, where, mask.shape, labels, parts, is_uneven and _is_scattered(part))


def _middle(image: NDArray[Any]) -> NDArray[Any]:
    """Give the rows, or slices, in the middle of an image that is very large."""
    kept = max(1, len(image) * _MOST_PIXELS // image.size)
    start = max(0, (len(image) - kept) // 2)
    return image[start : start + kept]


def _commonest_share(pixels: NDArray[np.float32]) -> float:
    """Give the share of the commonest pixel, where it is more than a half."""
    flat = pixels.reshape(-1)
    some = flat[np.random.default_rng(0).integers(0, flat.size, 999)]
    return float(np.count_nonzero(flat == np.sort(some)[len(some) // 2]) / flat.size)


def _evenness(image: NDArray[Any]) -> float:
    """Give the share of equal pairs, of neighbours in a row that both are above 0."""
    one, other = image[..., 1:], image[..., :-1]
    both = (one > 0) & (other > 0)
    count = np.count_nonzero(both)
    return 1.0 if count < _FEW else float(np.count_nonzero(both & (one == other)) / count)


def _is_flat(image: NDArray[Any]) -> bool:
    if image.min() != 0 or not image.any() or _evenness(image) < _FLAT:
        return False
    return image.dtype.kind in "bui" or bool((image == np.floor(image)).all())


def _has_several_values(image: NDArray[Any]) -> bool:
    above = image[image > 0]
    return bool((above != above[0]).any())


def _is_scattered(image: NDArray[Any]) -> bool:
    """Tell whether values above 0 are in several places each, or in one pixel each."""
    above = image[image > 0]
    values = np.unique(above)
    if len(above) < 2 * len(values):
        return True
    some = values[:: max(1, len(values) // 16)][:16]
    return bool(np.median([ndimage.label(image == value)[1] for value in some]) > 1)


def _count_parts(mask: NDArray[np.int32]) -> NDArray[np.int64]:
    """Count the separate parts of each label, those left out that are small beside the largest."""
    inner = (mask > 0) & (ndimage.maximum_filter(mask, 3) == mask)  # so that labels come apart
    pieces, count = ndimage.label(inner, np.ones((3,) * mask.ndim))
    label_of = np.zeros(count + 1, np.int32)
    label_of[pieces] = mask
    sizes = np.bincount(pieces.reshape(-1), minlength=count + 1)[1:]
    labels, places = np.unique(label_of[1:], return_inverse=True)
    largest = np.zeros(len(labels), np.int64)
    np.maximum.at(largest, places, sizes)
    return np.bincount(places[sizes >= _LARGE_PART * largest[places]], minlength=len(labels))


# Judging


def _judge(looks: Sequence[_Look]) -> Iterator[Problem]:
    """Say what is wrong with frames and masks that were read."""
    frames, masks = _frames(looks), _masks(looks)
    yield from _judge_frames(frames)
    are_images = _most(mask.looks_like_image for mask in masks)
    unusable = not masks and any(look.problems for look in looks)
    if (are_images or unusable) and _most(frame.is_flat for frame in frames):
        yield Problem(
            "frames and masks exchanged",
            f"{frames[0].where} looks like a label mask, and "
            f"{masks[0].where if masks else 'its mask'} like an image: exchange the two",
        )
    elif are_images:
        yield _image_problem(masks[0])
    elif _most(frame.looks_labelled for frame in frames):
        yield Problem(
            "frames look like masks",
            f"{frames[0].where} has a whole number in each of its parts, as a label mask has: "
            "expected an image; name the folder or file of the images",
        )
    if masks and not are_images:
        yield from _judge_labels(masks)


def _judge_frames(frames: Sequence[FrameLook]) -> Iterator[Problem]:
    for frame in frames:
        if frame.shape != frames[0].shape:
            yield Problem(
                "shapes",
                f"{frame.where} has shape {frame.shape} and {frames[0].where} {frames[0].shape}: "
                "expected one shape; are these frames of one movie?",
            )
        if frame.is_constant:
            yield Problem(
                "constant",
                f"{frame.where} has one value in all pixels, its features tell nothing: restore "
                "the frame, or leave it out",
            )
        elif frame.is_sparse:
            yield Problem(
                "few pixels above black",
                f"in {frame.where} so few pixels differ from the others that the percentiles "
                f"{_PERCENTILES[0]} and {_PERCENTILES[1]} are equal, so it is normalised by its "
                "least and largest value: crop the movie to where its cells are if these come out "
                "dark",
            )


def _image_problem(mask: MaskLook) -> Problem:
    return Problem(
        "masks look like images",
        f"{mask.where} has other values from pixel to pixel, as an image has: expected one whole "
        "number a cell; name the folder or file of the label masks",
    )


def _judge_labels(masks: Sequence[MaskLook]) -> Iterator[Problem]:
    filled = [mask for mask in masks if len(mask.labels)]
    if not filled:
        yield Problem(
            "no cells",
            f"none of the {len(masks)} masks that were read has a cell, the first is "
            f"{masks[0].where}: expected a whole number a cell, and 0 for the background; name "
            "the folder or file of the masks",
        )
        return
    cure, most = "label each cell, such as by skimage.measure.label", max(filled, key=_sum_parts)
    labels = np.unique(np.concatenate([mask.labels for mask in filled]))
    wanted = 2 if len(labels) <= _FEW_LABELS else _PARTS_OF_A_CLASS
    if not _most(mask.has_classes(wanted) for mask in filled):
        return
    if len(labels) == 1:
        yield Problem(
            "one label everywhere",
            f"every cell of every mask has the label {labels[0]}, such as {_sum_parts(most)} "
            f"parts of {most.where}, a binary mask: {cure}",
        )
    elif len(most.labels) > _MANY_CLASSES:
        yield _image_problem(most)
    else:
        yield Problem(
            "labels are classes",
            f"{most.where} has {_sum_parts(most)} separate parts with only {len(most.labels)} "
            f"labels, which name classes of pixels: {cure}",
        )


def _sum_parts(mask: MaskLook) -> int:
    return int(mask.parts.sum())


def _most(facts: Iterable[bool]) -> bool:
    known = list(facts)
    return 2 * sum(known) > len(known)


def judge_tracks(file: Path, masks: Sequence[MaskLook], frames: int) -> Iterator[Problem]:
    """Say where man_track.txt and the masks that could be read, of a whole movie, disagree."""
    try:
        tracks = read_tracks(file)
    except MovieError as error:
        yield Problem("tracks", str(error))
        return
    yield from _judge_spans(file, tracks, frames)
    yield from _judge_divisions(file, tracks)
    labels, first, last = tracks[:, 0], tracks[:, 1], tracks[:, 2]
    for mask in masks:
        alive = (first <= mask.t) & (last >= mask.t)
        ends = alive & ((first == mask.t) | (last == mask.t))
        for label in np.setdiff1d(labels[ends], mask.labels).tolist():
            yield Problem(
                "tracks without labels",
                f"{file} has cell {label} begin or end in frame {mask.t}, and {mask.where} has no "
                "such label: correct its line, or add the cell to the mask",
            )
        for label in np.setdiff1d(mask.labels, labels[alive]).tolist():
            yield Problem(
                "labels without tracks",
                f"{mask.where} has the label {label}, which {file} does not have in frame "
                f"{mask.t}: add or correct its line, or take the cell out of the mask",
            )


def _judge_spans(file: Path, tracks: Tracks, frames: int) -> Iterator[Problem]:
    labels, counts = np.unique(tracks[:, 0], return_counts=True)
    for label in labels[counts > 1].tolist():
        yield Problem("tracks", f"{file} has several lines for cell {label}: keep one")
    for label, first, last, _ in tracks.tolist():
        if not first <= last < frames:
            yield Problem(
                "tracks out of range",
                f"{file} has cell {label} in frames {first} to {last}: expected the first before "
                f"the last, and both within 0 to {frames - 1}; the first file is frame 0, whatever "
                "its number",
            )


def _judge_divisions(file: Path, tracks: Tracks) -> Iterator[Problem]:
    last_of = dict(tracks[:, [0, 2]].tolist())
    for label, first, _, parent in tracks.tolist():
        if parent and parent not in last_of:
            yield Problem(
                "divisions without a parent",
                f"{file} has cell {label} with the parent {parent}, which is not there: add its "
                "line, or write 0",
            )
        elif parent and last_of[parent] >= first:
            yield Problem(
                "parents that live on",
                f"{file} has cell {label} from frame {first} on, and its parent {parent} until "
                f"frame {last_of[parent]}: end the parent before, or write 0 for it",
            )
