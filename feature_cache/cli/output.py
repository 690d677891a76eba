"""Tables, counts, sizes and bars."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import typer

from ..units import count_text as count_text
from ..units import size_text as size_text
from ..units import time_text as time_text

_TIMES = ("last_use", "started", "ended")
"""Columns that hold seconds since 1970."""


def make_bar(what: str, total: int, unit: str = "frame") -> Any:
    """Make a progress bar on stderr."""
    from tqdm import tqdm

    scale = unit == "B"
    return tqdm(
        total=total,
        desc=what,
        unit=unit,
        file=sys.stderr,
        disable=not total or not sys.stderr,
        unit_scale=scale,
    )


def print_table(rows: Sequence[dict[str, Any]], as_json: bool) -> None:
    """Print rows of one form, as a table or as JSON."""
    if as_json:
        typer.echo(json.dumps(rows))
        return
    if not rows:
        typer.echo("nothing here yet")
        return
    for line in align_table(rows):
        typer.echo(line)


def align_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Give the lines of a table, the first its head."""
    texts = [[_cell(name, value) for name, value in row.items()] for row in rows]
    lines = [list(rows[0]), *texts]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]


def _cell(name: str, value: object) -> str:
    if "bytes" in name and isinstance(value, int):
        return size_text(value)
    if name in _TIMES and isinstance(value, float):
        return time_text(value)
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) and name != "pid" else str(value)


def regions_text(regions: tuple[int, float, int]) -> str:
    """Say how many regions frames have: least, median and most."""
    return " / ".join(f"{count:,.12g}" for count in regions)
