"""The command ``feature-cache``: a thin shell over the library.

Exit status: 0 done, 1 problems found or part of it failed, 2 wrong use or nothing could be done.
"""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from ..command_errors import run_command
from . import check_movies, compute, evaluate, inform, maintain, pictures, serve, tracking

app = typer.Typer(
    name="feature-cache",
    help="A content-hashed cache of foundation-model features for training.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    *(check_movies.check, compute.warm, evaluate.evaluate, serve.serve, compute.explain),
    *(tracking.train, tracking.track),
    *(inform.list_spaces, inform.stats, inform.inspect, inform.backbones, inform.doctor),
    *(pictures.report, pictures.show),
    *(
        maintain.verify,
        maintain.gc,
        maintain.compact,
        maintain.pin,
        maintain.unpin,
        maintain.push,
        maintain.pull,
    ),
)
_NAMES = {inform.list_spaces: "ls"}


def _register(command: Callable[..., None]) -> None:
    """Add a command; the example at the end of its docstring comes after its options."""
    text, _, example = (inspect.getdoc(command) or "").partition("Example: ")
    end = f"Example: {' '.join(example.split())}"
    passed = {"ignore_unknown_options": True, "allow_extra_args": True}  # all of them to train.py
    app.command(
        _NAMES.get(command), help=text.strip(), epilog=end,
        context_settings=passed if command is tracking.train else None,
        add_help_option=command is not tracking.train,
    )(command)  # fmt: skip


for _command in _COMMANDS:
    _register(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"feature-cache {version('feature-cache')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Say what is waited for, and why.")
    ] = False,
) -> None:
    logging.getLogger("feature_cache").setLevel(logging.INFO if verbose else logging.WARNING)


def main() -> None:
    """Run the command line; errors of ours, and wrong use, become one line and exit status 2."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, TextIOWrapper):  # names may have letters that a terminal has not
        sys.stdout.reconfigure(errors="backslashreplace")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        run_command(app, "feature-cache")
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(number: int, _: object) -> None:
    """End as with Ctrl-C: what is computed is committed, claims and process file go."""
    sys.exit(128 + number)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    from tqdm import tqdm

    tqdm.write(f"warning: {message}", file=sys.stderr)
