"""What people ask to be written at the end of long work: whether it can be is found before."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from .errors import FeatureCacheError


class NotWrittenError(FeatureCacheError):
    """A page, picture, report or folder that was asked for can't be written."""


def check_file(file: Path | None) -> None:
    """Raise NotWrittenError where a file can't be written later; leaves nothing behind."""
    if file is None:
        return
    with _saying(file):
        is_new = not file.exists()
        if not (is_new or file.is_file() or file.is_dir()):
            return  # a pipe, or a terminal: whoever reads it would take the trial for the end
        file.open("ab").close()
        if is_new:
            file.resolve().unlink()  # not a link to it


def check_folder(folder: Path) -> None:
    """Raise NotWrittenError where a folder can't be made, or written in; leaves nothing behind."""
    with _saying(folder):
        above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        with TemporaryDirectory(dir=above):
            pass


def write_file(file: Path, content: bytes | str) -> None:
    """Write a file that was asked for; NotWrittenError where that can't be done.

    Names of files in a text may have bytes that are no letters, which are escaped.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    with _saying(file):
        file.write_bytes(content)


@contextmanager
def _saying(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise NotWrittenError(f"can't write {place}: {error.strerror or error}") from error
