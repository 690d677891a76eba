"""Text and YAML as editors write them."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

from ..errors import MovieError


def read_text(file: Path) -> str:
    """Read a text file as editors write it: UTF-8 or UTF-16, with a byte order mark or without.

    Raises
    ------
    MovieError
        It can't be read, or is no text.
    """
    try:
        content = file.read_bytes()
        marked = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = content.decode("utf-16" if marked else "utf-8-sig")
    except OSError as error:
        raise MovieError(f"can't read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise MovieError(f"can't read {file}: {error}; save it as UTF-8 text") from error
    if "\0" in text:
        raise MovieError(f"can't read {file}: it is no text of UTF-8; save it as UTF-8 text")
    return text


def read_yaml(file: Path) -> Any:
    """Read a YAML file; every scalar is the text that is written there: ``01`` is no number.

    Raises
    ------
    MovieError
        It can't be read, or is no YAML.
    """
    import yaml

    try:
        return yaml.load(read_text(file), yaml.BaseLoader)
    except yaml.YAMLError as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f"line {mark.line + 1}: " if mark else ""
        told = " ".join(str(problem or error).split())
        raise MovieError(f"{file} is no YAML: {where}{told}") from error
