"""Where movies come from: paths, patterns, lists, and Trackastra's training configuration."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import MovieError, MovieNotFoundError, NoMasksError, UnknownNameError
from ..movies import Movie
from .report import Failure

_log = logging.getLogger(__name__)
_LISTS = (".txt", ".yaml", ".yml")
_KEYS = ("path", "detections", "slice_pct", "downscale_temporal", "downscale_spatial")
_MASK_FOLDERS = ("_GT", "_ST", "_ERR_SEG", "_RES")


@dataclass(frozen=True, slots=True)
class Source:
    """How to open a movie, here or on another machine that sees the same folders.

    Parameters
    ----------
    path : str
    detections : str or None
        Where the masks are; None for frames alone.
    slice_pct, downscale_temporal, downscale_spatial
        As `Movie.open`.
    optional : bool
        Whether detections that are not there are left out, as Trackastra does where there are
        several folders of them.
    """

    path: str
    detections: str | None = "TRA"
    slice_pct: tuple[float, float] = (0.0, 1.0)
    downscale_temporal: int = 1
    downscale_spatial: int = 1
    optional: bool = field(default=False, compare=False)

    @classmethod
    def of(cls, movie: Movie) -> Source:
        """Say how a movie is opened that was opened as a whole.

        Raises
        ------
        MovieError
            It is a part of what its folder holds.
        """
        source = cls(str(movie.root.absolute()), movie.detections)
        opened = source.open()
        files = [file.absolute() for file in movie.frames.files]
        if list(opened.frames.files) != files or opened.frames.downscale != movie.frames.downscale:
            raise MovieError(
                f"{movie.name} is a part of its folder, which a worker can't know: give plan_warm "
                "a Source with slice_pct and downscales in its place"
            )
        return source

    def open(self) -> Movie:
        """Find the movie's files; errors as `Movie.open`."""
        return Movie.open(
            self.path,
            self.detections,
            slice_pct=self.slice_pct,
            downscale_temporal=self.downscale_temporal,
            downscale_spatial=self.downscale_spatial,
        )

    def absolute(self) -> Source:
        """Give the same source with a path that is right in any folder."""
        return replace(self, path=str(Path(self.path).expanduser().absolute()))


def find_sources(
    words: Iterable[str], detections: Sequence[str | None] = ("TRA",)
) -> tuple[list[Source], list[Failure]]:
    """Find what words stand for; what stands for nothing becomes a failure.

    Parameters
    ----------
    words : iterable of str
        Each a movie's path; a pattern such as ``data/*/01``; a text file with such a word a line
        (``#`` begins a comment); a YAML file with a list of words or of mappings (``path``, and
        any of ``detections``, ``slice_pct``, ``downscale_temporal``, ``downscale_spatial``), or
        with Trackastra's training configuration, whose ``input_train`` and ``input_val`` count.
        Paths in files are, as there, relative to the current folder.
    detections : sequence of str or None
        Where the masks are, for what doesn't say so itself.

    Returns
    -------
    sources : list of Source
        Each once.
    failures : list of Failure
    """
    sources: dict[Source, None] = {}
    failures: list[Failure] = []
    for word in words:
        try:
            sources.update(dict.fromkeys(_expand(str(word), _Defaults(tuple(detections)))))
        except MovieError as error:
            failures.append(Failure(str(word), str(error), 1))
    return list(sources), failures


def open_movies(
    sources: Iterable[str | Source], detections: str | None = "TRA"
) -> tuple[list[Movie], list[Failure]]:
    """Open movies, by path or source; what can't be opened becomes a failure."""
    opened, failures = open_sources(
        Source(one, detections) if isinstance(one, str) else one for one in sources
    )
    return [movie for _, movie in opened], failures


def open_sources(sources: Iterable[Source]) -> tuple[list[tuple[Source, Movie]], list[Failure]]:
    """Open movies and say where each is from; what can't be opened becomes a failure.

    Optional detections that are not there are left out, with a warning in the log, where others of
    the same movie are.
    """
    opened, absent, failures = [], [], []
    for source in sources:
        try:
            opened.append((source, source.open()))
        except MovieError as error:
            failure = Failure(source.path, str(error), 1)
            if source.optional and isinstance(error, NoMasksError):
                absent.append((source.path, failure))
            else:
                failures.append(failure)
    there = {source.path for source, _ in opened}
    for path, failure in absent:
        if path in there:
            _log.warning("left out, as Trackastra does: %s", failure.reason)
        else:
            failures.append(failure)
    return opened, failures


@dataclass(frozen=True, slots=True)
class _Defaults:
    """What a word doesn't say."""

    detections: tuple[str | None, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    def sources(self, path: str) -> Iterator[Source]:
        several = len(self.detections) > 1
        for detections in self.detections:
            yield Source(path, detections, optional=several, **self.options)


def _expand(word: str, defaults: _Defaults) -> Iterator[Source]:
    path = Path(word).expanduser()
    if path.suffix.lower() in _LISTS and not path.is_dir():
        yield from _read_list(path, defaults)
    elif glob.has_magic(word) and not path.exists():
        for folder in _match(word):
            yield from defaults.sources(folder)
    else:
        yield from defaults.sources(word)


def _match(pattern: str) -> list[str]:
    """List the folders of a pattern, without those of masks beside a movie."""
    expanded = str(Path(pattern).expanduser())
    found = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207 - it takes any path
    movies = [one for one in found if Path(one).is_dir() and not one.endswith(_MASK_FOLDERS)]
    if not movies:
        raise MovieNotFoundError(f"no movie at {pattern}: no folder fits the pattern")
    return movies


def _read_list(file: Path, defaults: _Defaults) -> Iterator[Source]:
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise MovieNotFoundError(f"can't read the list of movies {file}: {reason}") from error
    if file.suffix.lower() == ".txt":
        words = (line.partition("#")[0].strip() for line in text.splitlines())
        for word in filter(None, words):
            yield from _expand(word, defaults)
        return
    yield from _read_yaml(file, _parse_yaml(file, text), defaults)


def _parse_yaml(file: Path, text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark else ""
        raise MovieError(f"{file} is no YAML: {where}{problem or error}") from error


def _read_yaml(file: Path, plain: Any, defaults: _Defaults) -> Iterator[Source]:
    if isinstance(plain, dict) and {"input_train", "input_val"} & set(plain):
        inputs = [*_as_list(plain.get("input_train")), *_as_list(plain.get("input_val"))]
        defaults = _change(file, plain, defaults, "detection_folders")
    elif isinstance(plain, list):
        inputs = plain
    else:
        raise MovieError(
            f"{file} holds a {type(plain).__name__}: expected a list of movies, or a training "
            "configuration of Trackastra with input_train"
        )
    for entry in inputs:
        if isinstance(entry, str):
            yield from _expand(entry, defaults)
        elif isinstance(entry, dict) and isinstance(entry.get("path"), str):
            _check_keys(file, entry)
            yield from _expand(entry["path"], _change(file, entry, defaults, "detections"))
        else:
            raise MovieError(
                f"{file} has the entry {entry!r}: expected a path, or a mapping with one"
            )


def _check_keys(file: Path, entry: dict[str, Any]) -> None:
    for key in entry:
        if key not in _KEYS:
            unknown = UnknownNameError("key", key, _KEYS)
            raise MovieError(f"{file}, the entry of {entry['path']}: {unknown}")


def _change(file: Path, plain: dict[str, Any], defaults: _Defaults, folders: str) -> _Defaults:
    detections, options = defaults.detections, dict(defaults.options)
    if folders in plain and detections != (None,):
        detections = tuple(map(str, _as_list(plain[folders])))
    try:
        if plain.get("slice_pct") is not None:
            low, high = plain["slice_pct"]
            options["slice_pct"] = (float(low), float(high))
        for name in ("downscale_temporal", "downscale_spatial"):
            if plain.get(name) is not None:
                options[name] = int(plain[name])
    except (TypeError, ValueError) as error:
        raise MovieError(
            f"{file} has a value that is no use ({error}): expected slice_pct as two numbers from "
            "0 to 1, downscale_temporal and downscale_spatial as whole numbers"
        ) from error
    return _Defaults(detections, options)


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
