"""Options that several commands have, and the units that people write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

CacheOption = Annotated[
    Path, typer.Option("--cache", envvar="FEATURE_CACHE_DIR", help="The cache's folder.")
]
OptionalCacheOption = Annotated[
    Path | None,
    typer.Option("--cache", envvar="FEATURE_CACHE_DIR", help="The cache's folder."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BackboneOption = Annotated[str, typer.Option(help="See: feature-cache backbones.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="A checkpoint file, or random:<seed>; default: the model's own."),
]
PoolingOption = Annotated[
    str, typer.Option(help="How a region's vector is made; 'none' keeps grids.")
]
DetectionsOption = Annotated[str, typer.Option(help="Where the masks are.")]
DtypeOption = Annotated[str, typer.Option(help="Storage: float16 or float32.")]
SeedOption = Annotated[int, typer.Option(help="Of the augmented copies.")]
PolicyOption = Annotated[
    str, typer.Option(help="Of the copies: none, flips, geometric, intensity or default.")
]


def _switch_memo_off(context: typer.Context, wanted: bool) -> None:
    from ..memo import no_memo

    if wanted:
        context.with_resource(no_memo())


NoMemoOption = Annotated[
    bool,
    typer.Option(
        "--no-memo",
        callback=_switch_memo_off,
        help="Read every file; neither recall nor remember digests.",
    ),
]

LayersOption = Annotated[
    list[str],
    typer.Option(
        "--layer",
        envvar="FEATURE_CACHE_LAYERS",
        help="A cache below, only read: a folder, or a URL that was pushed to. May be repeated.",
    ),
]
SpacesOption = Annotated[
    list[str], typer.Option("--space", help="Only this space: the beginning of its name.")
]

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


def parse_size(text: str) -> int:
    """Read a size such as ``100G`` or ``1.5TB`` (powers of 1000), or ``64MiB`` (of 1024)."""
    found = re.fullmatch(r"([\d.]+)\s*([kmgtp]?)(i?)b?", text.strip(), re.IGNORECASE)
    if not found or found[1].count(".") > 1 or not found[1].strip("."):
        raise typer.BadParameter(f"{text!r} is no size: expected such as 500M, 100G or 1.5T")
    power = _BYTES[found[2].lower()]
    if found[3]:
        power = 1024 ** round(len(str(power)) / 3)
    return int(float(found[1]) * power)


def parse_age(text: str) -> float:
    """Read an age such as ``30d`` or ``12h``, in seconds."""
    found = re.fullmatch(r"([\d.]+)\s*([smhdwy])", text.strip())
    if not found or found[1].count(".") > 1 or not found[1].strip("."):
        raise typer.BadParameter(f"{text!r} is no age: expected such as 12h, 30d or 8w")
    return float(found[1]) * _SECONDS[found[2]]
