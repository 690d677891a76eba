"""Parts of the reference, from the code itself: MkDocs calls `on_page_markdown` for each page."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import typer.main

from feature_cache import errors
from feature_cache.cli import app
from feature_cache.train_options import make_parser

Row = tuple[str, str, str]
"""An option as it is typed, what it is for, its default."""


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put what is generated in the place of its mark."""
    for name, generate in PARTS.items():
        mark = f"<!-- {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, "\n".join(generate()))
    return markdown


def describe_commands() -> Iterator[str]:
    """Give a section for each command: what it does, an example, its options."""
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        yield from (f"## {name}", "", command.help, "")
        yield from ("```", command.epilog.removeprefix("Example: "), "```", "")
        if name == "train":
            yield "Its options are those of [a training's YAML](yaml.md#a-training)."
        else:
            yield from make_table([_describe(param) for param in command.params])
        yield ""


def _describe(param: Any) -> Row:
    name = ", ".join(param.opts) if param.param_type_name == "option" else param.metavar
    takes = "" if getattr(param, "is_flag", True) else f" {param.metavar or param.name.upper()}"
    env = f" (`{param.envvar}`)" if param.envvar else ""
    plain = "required" if param.required else param.default
    return f"{name}{takes}", f"{param.help}{env}", _name_default(plain)


def describe_training() -> Iterator[str]:
    """Give the options of a training by group."""
    for group in make_parser("feature-cache train")._action_groups:
        actions = [
            action for action in group._group_actions if action.dest not in ("help", "config")
        ]
        if not actions:
            continue
        yield from (f"### {str(group.title).capitalize()}", "")
        if all(action.default is argparse.SUPPRESS or not action.help for action in actions):
            yield ", ".join(f"`{action.dest}`" for action in actions)
        else:
            yield from make_table([_describe_action(action) for action in actions])
        yield ""


def _describe_action(action: argparse.Action) -> Row:
    choices = f"one of {', '.join(map(str, action.choices))}" if action.choices else ""
    said = "; ".join(part for part in (action.help, choices) if part)
    return (
        action.dest,
        said,
        "" if action.default is argparse.SUPPRESS else _name_default(action.default),
    )


def _name_default(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return "" if value is None or value is False or callable(value) else str(value)


def make_table(rows: Iterable[Row]) -> Iterator[str]:
    """Give a Markdown table of options."""
    yield from ("| option | for | default |", "|---|---|---|")
    for name, said, default in rows:
        cells = (f"`{name}`", said, f"`{default}`" if default else "")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def describe_errors() -> Iterator[str]:
    """Give the tree of errors, as its module has it."""
    tree = str(errors.__doc__).partition("::\n\n")[2].partition("\n\nWhat")[0]
    yield from ("```", *(line.removeprefix("    ") for line in tree.splitlines()), "```")


PARTS: dict[str, Callable[[], Iterable[str]]] = {
    "commands": describe_commands,
    "training": describe_training,
    "errors": describe_errors,
}
