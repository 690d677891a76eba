"""Where movies come from: paths, patterns, lists, and Trackastra's training configuration."""

from __future__ import annotations

import glob
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..engine import Failure
from ..errors import MovieError, MovieNotFoundError, NoMasksError, UnknownNameError
from ..movies import Movie, Source
from ..movies.formats import is_pattern
from ..movies.text import read_text, read_yaml

_log = logging.getLogger(__name__)
_LISTS = (".txt", ".yaml", ".yml")
_KEYS = (
    *("path", "detections", "masks", "channel", "axes"),
    *("slice_pct", "downscale_temporal", "downscale_spatial"),
)
_NOTHING = ("", "~", "null", "Null", "NULL", "None")
_EXAMPLES = {"masks": "data/masks", "axes": "TCYX"}
_MASK_FOLDERS = ("_GT", "_ST", "_ERR_SEG", "_RES")


def find_sources(
    words: Iterable[str],
    detections: Sequence[str | None] = ("TRA",),
    options: Mapping[str, Any] | None = None,
) -> tuple[list[Source], list[Failure]]:
    """Find what words stand for; what stands for nothing becomes a failure.

    Parameters
    ----------
    words : iterable of str
        Each a movie's path; a pattern such as ``data/*/01``; a text file with such a word a line
        (lines that begin with ``#`` are comments); a YAML file with a list of words or of mappings
        (``path``, and any of ``detections``, ``masks``, ``channel``, ``axes``, ``slice_pct``,
        ``downscale_temporal``, ``downscale_spatial``), or with Trackastra's training
        configuration, whose ``input_train`` and ``input_val`` count. Paths in files are, as there,
        relative to the current folder.
    detections : sequence of str or None
        Where the masks are, for what doesn't say so itself.
    options : mapping, optional
        Further fields of `Source`, for what doesn't say so itself.

    Returns
    -------
    sources : list of Source
        Each once.
    failures : list of Failure
    """
    sources: dict[Source, None] = {}
    failures: list[Failure] = []
    defaults = _Defaults(tuple(detections), options or {})
    for word in words:
        try:
            sources.update(dict.fromkeys(_expand(str(word), defaults)))
        except MovieError as error:
            failures.append(Failure(str(word), str(error), 1))
        except OSError as error:
            failures.append(Failure(str(word), f"can't look for {word}: {error.strerror}", 1))
        except RecursionError:
            reason = f"the list {word} names itself, or lists that name it: take that line out"
            failures.append(Failure(str(word), reason, 1))
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
        path = path.rstrip("/") or path  # as shells complete it, it is the same movie
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
    """List the movies that fit a pattern: folders, without those of masks beside them.

    Where no folder does, a pattern of the images of one folder is that movie.
    """
    expanded = str(Path(pattern).expanduser())
    found = sorted(glob.glob(expanded, recursive=True))  # noqa: PTH207 - it takes any path
    movies = [one for one in found if Path(one).is_dir() and not one.endswith(_MASK_FOLDERS)]
    if movies:
        return movies
    if found and is_pattern(Path(expanded)) and not glob.has_magic(str(Path(expanded).parent)):
        return [expanded]
    if files := [one for one in found if Path(one).is_file()]:
        raise MovieNotFoundError(
            f"no movie at {pattern}: no folder fits it, and its files, such as {files[0]}, are in "
            "several folders: name each, or list them, each on a line of a .txt"
        )
    raise MovieNotFoundError(f"no movie at {pattern}: no folder or file fits the pattern")


def _read_list(file: Path, defaults: _Defaults) -> Iterator[Source]:
    if not file.is_file():
        raise MovieNotFoundError(f"can't read the list of movies {file}: no such file")
    if file.suffix.lower() == ".txt":
        for word in filter(None, map(str.strip, read_text(file).splitlines())):
            if not word.startswith("#"):
                yield from _expand_line(file, word, defaults)
        return
    yield from _expand_yaml(file, read_yaml(file), defaults)


def _expand_line(file: Path, word: str, defaults: _Defaults) -> Iterator[Source]:
    if "#" in word and not Path(word).expanduser().exists():
        raise MovieNotFoundError(
            f"no movie at {word}, a line of {file}: no such folder; a comment stands on a line of "
            "its own"
        )
    yield from _expand(word, defaults)


def _expand_yaml(file: Path, plain: Any, defaults: _Defaults) -> Iterator[Source]:
    if isinstance(plain, dict) and {"input_train", "input_val"} & set(plain):
        inputs = [*_as_list(plain.get("input_train")), *_as_list(plain.get("input_val"))]
        defaults = _change(file, plain, defaults, "detection_folders")
    elif isinstance(plain, list):
        inputs = plain
    else:
        raise MovieError(
            f"{file} holds {'a mapping' if isinstance(plain, dict) else 'no list'}: expected a "
            "list of movies, or a training configuration of Trackastra with input_train"
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
    given = {name: value for name, value in plain.items() if value not in _NOTHING}
    if folders in given and detections != (None,):
        detections = tuple(_as_list(given[folders]))
        if not all(isinstance(name, str) for name in detections):
            raise MovieError(f"{file} has {folders}: {given[folders]!r}, expected folders' names")
    for name in ("masks", "axes"):
        if not isinstance(given.get(name, ""), str):
            raise MovieError(
                f"{file} has {name}: {given[name]!r}, expected text such as {_EXAMPLES[name]}"
            )
        options |= {name: given[name]} if name in given else {}
    try:
        if "slice_pct" in given:
            low, high = given["slice_pct"]
            options["slice_pct"] = (float(low), float(high))
        for name in ("channel", "downscale_temporal", "downscale_spatial"):
            if name in given:
                options[name] = int(given[name])
    except (TypeError, ValueError) as error:
        raise MovieError(
            f"{file} has a value that is no use ({error}): expected slice_pct as two numbers from "
            "0 to 1; channel, downscale_temporal and downscale_spatial as whole numbers"
        ) from error
    return _Defaults(detections, options)


def _as_list(value: Any) -> list[Any]:
    if value is None or value in _NOTHING:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
