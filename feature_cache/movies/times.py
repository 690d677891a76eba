"""The times that file names stand for: the one number in them that varies.

Names are split into text and numbers. Over the files of a folder the text is the same, and one
number varies: it is the time. Where that is not so, nothing is guessed: it is an error.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path

from ..errors import MovieError

_NUMBER = re.compile(r"([0-9]+)")
_CLOCK = re.compile(r"([0-9]+)d([0-9]+)h([0-9]+)m(?![a-z])")
"""Time since the start, as Incucyte writes it: ``01d06h30m``."""

_NO_TIMES = {
    **dict.fromkeys(("c", "ch", "chan", "channel", "w", "wave", "wavelength"), "channels"),
    **dict.fromkeys(("z", "p", "plane", "slice"), "slices"),
    **dict.fromkeys(("s", "xy", "pos", "position", "site", "stage", "well", "field"), "positions"),
    **dict.fromkeys(("fov", "fld", "scene", "tile", "view"), "positions"),
}
"""What stands before a number that counts something else than time; a separator may follow words.

A letter before one is another thing's more often: ``exp_s_001``.
"""
_MICRO_MANAGER = re.compile(r"img_[0-9]{9}_.+_[0-9]{3}")
"""Names of Micro-Manager 1.4: time, channel, slice."""


@dataclass(frozen=True, slots=True)
class TimedFiles:
    """Files in the order of the times that their names stand for; an only file has none.

    For people, `kind` says what they are, such as ``"frames"``.
    """

    folder: Path
    kind: str
    files: tuple[Path, ...]
    times: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Name:
    """A file's name, cut at its numbers."""

    file: Path
    text: tuple[str, ...]
    numbers: tuple[int, ...]


def order_files(files: Sequence[Path], folder: Path, kind: str) -> TimedFiles:
    """Find the time of each of one or more files, and order them by it.

    Raises
    ------
    MovieError
        The names don't tell one time each: their text differs, no number varies, or several do;
        times come twice.
    """
    names = sorted(map(_cut, files), key=lambda name: (name.text, name.numbers, name.file.name))
    if len(names) == 1:
        return TimedFiles(folder, kind, (names[0].file,), ())
    _check_text(names, folder, kind)
    place = _find_varying(names, folder, kind)
    names.sort(key=lambda name: name.numbers[place])
    times = tuple(name.numbers[place] for name in names)
    for name, following in pairwise(names):
        if name.numbers[place] == following.numbers[place]:
            raise _same_time(folder, kind, name, following)
    return TimedFiles(folder, kind, tuple(name.file for name in names), times)


def _cut(file: Path) -> _Name:
    stem = _CLOCK.sub(_minutes, file.stem)
    parts = _NUMBER.split(stem)
    return _Name(file, tuple(parts[::2]), tuple(map(int, parts[1::2])))


def _minutes(clock: re.Match[str]) -> str:
    days, hours, minutes = map(int, clock.groups())
    return f"{(days * 24 + hours) * 60 + minutes}min"


def _check_text(names: Sequence[_Name], folder: Path, kind: str) -> None:
    first = names[0]
    other = next((name for name in names if name.text != first.text), None)
    if other is not None:
        raise MovieError(
            f"{folder} has {kind} with names of several kinds, such as {first.file.name} and "
            f"{other.file.name}: expected names that differ in one number, the time; name those "
            f"that are meant by a pattern{_suggest_pattern(names, folder)}, or move the others "
            "away, or rename the files to t000, t001, …"
        )


def _suggest_pattern(names: Sequence[_Name], folder: Path) -> str:
    """Give a pattern that fits names of one kind, several of them, and none of the others."""
    for text, count in Counter(name.text for name in names).most_common(2):
        files = [name.file for name in names if name.text == text]
        for tried in ("*".join(text) + files[0].suffix, re.sub("[0-9]", "?", files[0].name)):
            if count > 1 and [n.file for n in names if fnmatchcase(n.file.name, tried)] == files:
                return f", such as {folder / tried}"
    return ""


def _find_varying(names: Sequence[_Name], folder: Path, kind: str) -> int:
    """Give the place of the one number that varies."""
    columns = list(zip(*(name.numbers for name in names), strict=True))
    varying = [place for place, column in enumerate(columns) if len(set(column)) > 1]
    first, last = names[0].file.name, names[-1].file.name
    if not varying:
        raise _same_time(folder, kind, names[0], names[1])
    if len(varying) > 1:
        raise MovieError(
            f"{folder} has {kind} whose names differ in {len(varying)} numbers, such as {first} "
            f"and {last}: expected one, the time; keep each channel, slice or position in a "
            "folder of its own, or name the files that are meant by a pattern, or rename them to "
            "t000, t001, …"
        )
    place = varying[0]
    counted = _NO_TIMES.get(_find_marker(names[0], place))
    if counted is not None:
        raise MovieError(
            f"{folder} has {kind} whose names differ in one number, such as {first} and {last}: "
            f"these look like {counted}, not times; rename them to t000, t001, … if they are times"
        )
    return place


def _find_marker(name: _Name, place: int) -> str:
    """Give the word in front of a number."""
    if _MICRO_MANAGER.fullmatch(name.file.stem) and place == len(name.numbers) - 1:
        return "slice"
    before = name.text[place].lower()
    word = re.split("[^a-z]", before.rstrip("_-. "))[-1]
    return "" if len(word) == 1 and not before.endswith(word) else word


def _same_time(folder: Path, kind: str, one: _Name, other: _Name) -> MovieError:
    return MovieError(
        f"{folder} has {kind} of the same time, {one.file.name} and {other.file.name}: expected "
        "one file a time; move one away"
    )


def check_steps(timed: TimedFiles) -> None:
    """Raise MovieError where a time is missing between others: they are not evenly spaced."""
    step = min((after - before for before, after in pairwise(timed.times)), default=0)
    for (file, time), (following, after) in pairwise(zip(timed.files, timed.times, strict=False)):
        if after - time != step:
            raise MovieError(
                f"{timed.folder} has no {timed.kind} between {file.name} and {following.name}: "
                f"expected a file for time {time + step}; add what is missing, or rename the files "
                "to consecutive numbers if there is nothing between"
            )


def check_pairs(one: TimedFiles, other: TimedFiles) -> None:
    """Raise where files that belong together, time by time, don't.

    Raises
    ------
    MovieError
        There are more of one than of the other, or they are of other times.
    """
    if len(one.files) == len(other.files) == 1:
        _check_only_pair(one, other)
        return
    if len(one.files) != len(other.files):
        raise MovieError(
            f"{one.folder} has {len(one.files)} {one.kind} and {other.folder} has "
            f"{len(other.files)} {other.kind}{_first_alone(one, other)}: expected as many "
            f"{other.kind} as {one.kind}; add what is missing or remove what is too many"
        )
    for file, partner, time, theirs in zip(
        one.files, other.files, one.times, other.times, strict=True
    ):
        if time != theirs:
            raise MovieError(
                f"{file.name} in {one.folder} would go with {partner.name} in {other.folder}: "
                "expected the same number; remove what has no partner, or rename the files"
            )


def _first_alone(one: TimedFiles, other: TimedFiles) -> str:
    """Name the first file without a partner, where both have times."""
    if not one.times or not other.times:
        return ""
    here, there = set(one.times), set(other.times)
    for files, others, their_kind in ((one, there, other.kind), (other, here, one.kind)):
        for file, time in zip(files.files, files.times, strict=True):
            if time not in others:
                return f" ({file.name} has no {their_kind.removesuffix('s')})"
    return ""


def _check_only_pair(one: TimedFiles, other: TimedFiles) -> None:
    """Compare an only frame and an only mask: no number varies, so all that there are count."""
    numbers, theirs = (sorted(_cut(files.files[0]).numbers) for files in (one, other))
    if numbers and theirs and numbers != theirs:
        raise MovieError(
            f"{one.files[0].name} in {one.folder} would go with {other.files[0].name} in "
            f"{other.folder}: expected the same numbers; rename one, or name both files"
        )
