"""What was asked for: a small file for each movie that somebody warmed or wrapped.

Records are stored once, for whoever asked first. ``asked/<movie>.json`` says which frames make a
movie, and which copies of it were wanted in which spaces, so that people are told of movies as they
know them. Nothing rests on it; `gc` removes what nobody asked for again in `ASKED_SECONDS`.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..hashing import JSON, canonical_json, digest_json
from .files import check_there, list_folder, make_folder, read_each, read_json, write_text

ASKED_SECONDS = 180 * 86400.0
_TOUCHED_SECONDS = 86400.0
_LIMIT = 1 << 28
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Asked:
    """A movie as somebody asked for it.

    Attributes
    ----------
    movie : str
    source : mapping or None
        How it is opened.
    frames : tuple of (str, str, str or None)
        Of each frame its file, or its number where it came from none, and the digests of frame and
        mask in hex.
    wanted : mapping of str to mapping of str to str
        By space, the copies: the canonical JSON of each draw, and where it comes from.
    """

    movie: str
    source: Mapping[str, Any] | None
    frames: tuple[tuple[str, str, str | None], ...]
    wanted: Mapping[str, Mapping[str, str]]

    @classmethod
    def read(cls, file: Path) -> Asked:
        """Read one; ValueError where the file holds none."""
        plain = read_json(file, _LIMIT)
        try:
            source = None if plain["source"] is None else dict(plain["source"])
            frames = [(str(p), str(f), m and str(m)) for p, f, m in plain["frames"]]
            wanted = {str(space): dict(draws) for space, draws in plain["wanted"].items()}
            return cls(str(plain["movie"]), source, tuple(frames), wanted)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{file} says of no movie what was asked for") from error

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        return {
            "movie": self.movie,
            "source": None if self.source is None else dict(self.source),
            "frames": [list(frame) for frame in self.frames],
            "wanted": {space: dict(draws) for space, draws in self.wanted.items()},
        }

    def file(self, root: Path) -> Path:
        """Name the file of this movie with these very frames and masks."""
        made_of: JSON = [self.movie, [list(frame) for frame in self.frames]]
        return root / "asked" / f"{digest_json(made_of).hex()}.json"

    def asked_for(self, space: str) -> Callable[[Mapping[str, Any]], bool]:
        """Give what tells of a record of a space, as its writer described it, if it is wanted."""
        frames = {frame for _, frame, _ in self.frames}
        pairs = {(frame, mask) for _, frame, mask in self.frames}
        draws = self.wanted.get(space, {})

        def is_wanted(source: Mapping[str, Any]) -> bool:
            frame, mask = source.get("frame_digest"), source.get("mask_digest")
            there = frame in frames if mask is None else (frame, mask) in pairs
            return (
                there
                and canonical_json(source.get("draw", [])) in draws
                and frames.issuperset(source.get("window", ()))
            )

        return is_wanted

    def joined(self, other: Asked) -> Asked:
        """Give it with what else was wanted of the same movie."""
        spaces = {**self.wanted, **other.wanted}
        wanted = {s: {**self.wanted.get(s, {}), **other.wanted.get(s, {})} for s in spaces}
        return replace(self, wanted=wanted)


def add_asked(root: Path, asked: Asked) -> None:
    """Note what was asked for; where that can't be, say so in the log and go on."""
    file = asked.file(root)
    try:
        check_there(root)
        make_folder(file.parent)
        # Without a lock: of two at once one may be lost, and is noted when it is asked for again.
        before = Asked.read(file) if file.exists() else asked
        joined = before.joined(asked)
        if file.exists() and joined == before:
            if time.time() - file.stat().st_mtime > _TOUCHED_SECONDS:
                os.utime(file)
            return
        write_text(file, canonical_json(joined.to_json()))
    except (OSError, ValueError) as error:
        _log.info("what was asked for of %s is not noted: %s", asked.movie, error)


def read_asked(root: Path) -> list[Asked]:
    """Give what was asked for; a file that holds something else, or can't be read, is left out."""
    return [*read_each(root / "asked", _read_if_allowed)[0].values()]


def _read_if_allowed(file: Path) -> Asked:
    try:
        return Asked.read(file)
    except PermissionError as error:  # of somebody who keeps it to himself
        raise ValueError("no permission") from error


def find_forgotten(root: Path, now: float) -> list[Path]:
    """List what nobody asked for in `ASKED_SECONDS`; `now` as the file system has it."""
    forgotten = []
    for name in list_folder(root / "asked"):
        file = root / "asked" / name
        with suppress(FileNotFoundError):  # another gc was first
            if file.suffix == ".json" and now - file.lstat().st_mtime > ASKED_SECONDS:
                forgotten.append(file)
    return forgotten
