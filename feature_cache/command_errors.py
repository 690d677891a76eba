"""What is wrong with a command, in one line: for all that have one."""

from __future__ import annotations

import sys
from typing import Any, NoReturn

import typer

from .errors import FeatureCacheError

USAGE_ERROR: Any = typer.BadParameter.__base__
"""Of click, or of typer, which brings its own; it exports no other of them."""


def run_command(app: typer.Typer, name: str) -> NoReturn:
    """Run a command and end; errors of ours, and wrong use, become one line and exit status 2."""
    try:
        sys.exit(app(prog_name=name, standalone_mode=False))
    except FeatureCacheError as error:
        _fail(str(error))
    except USAGE_ERROR as error:
        _fail(_say_usage(error, name))
    except typer.Abort:
        sys.exit(1)


def _fail(message: str) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    sys.exit(2)


def _say_usage(error: Any, name: str) -> str:
    """Say in one line what is wrong with a command; its help where it has no words at all."""
    said: str = error.format_message()
    if not said or "\n" in said:
        error.show()
        sys.exit(2)
    if isinstance(error, typer.BadParameter) and not said.startswith("Missing"):
        said = said.removeprefix("Invalid value: ").removeprefix("Invalid value for ")
        return _say_found(said, error.__cause__)
    where = name if error.ctx is None else error.ctx.command_path
    return f"{said[0].lower()}{said[1:].rstrip('.')}; see {where} --help"


def _say_found(said: str, cause: Any) -> str:
    """Say of a number what was found, too, where typer leaves it to pydantic and that to us."""
    option, separator, expected = said.partition(": Input should be ")
    if not separator or not hasattr(cause, "errors"):
        return said
    expected = expected.partition(",")[0]  # what can't be parsed is seen
    for words, ours in (
        ("greater than or equal to", "at least"),
        ("less than or equal to", "at most"),
    ):
        expected = expected.replace(words, ours)
    return f"{option}: {cause.errors()[0]['input']!r}: expected {expected}"
