"""What is wrong with an image file, and the error that a reader makes of it."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

from ..errors import MovieError

_DAMAGE = (
    *(ArithmeticError, AttributeError, AssertionError, LookupError, MemoryError, RuntimeError),
    *(TypeError, ValueError, struct.error),
)
"""What decoders raise for files that are not what they say."""


class FaultError(Exception):
    """What is wrong with a file: a sentence that lacks the file's name in front."""


class DamageError(FaultError):
    """A file that is not whole, or not what it was."""

    def __str__(self) -> str:
        return f"{super().__str__()}; restore the file or leave it out"


@contextmanager
def open_image(file: Path) -> Iterator[BufferedReader]:
    """Open a file to read an image from.

    Raises
    ------
    MovieError
        Whatever goes wrong with it until it is closed.
    """
    try:
        with file.open("rb") as handle:
            yield handle
    except FaultError as error:
        raise MovieError(f"{file} {error}") from error
    except PermissionError as error:
        raise MovieError(f"no permission to read {file}") from error
    except OSError as error:
        raise MovieError(
            f"can't read {file}: {error.strerror or error}; restore the file or leave it out"
        ) from error
    except _DAMAGE as error:
        raise MovieError(
            f"can't read {file}: damaged, or of a kind that can't be decoded ({error}); restore "
            "the file, or save it anew"
        ) from error
