"""Options that several commands have, what completes them, and the units that people write."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

MOVIE = "How the movie is read"
FEATURES = "Which features"
COPIES = "Augmented copies"
COMPUTING = "Computing"
OUTPUT = "Output"
"""Headings in the help of commands with many options."""

_AMOUNT = r"[0-9]{1,18}(?:\.[0-9]*)?"
_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "p": 10**15}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400, "y": 365 * 86400}


def parse_size(text: str) -> int:
    """Read a size such as ``100G`` or ``1.5TB`` (powers of 1000), or ``64MiB`` (of 1024)."""
    found = re.fullmatch(rf"({_AMOUNT})\s*([kmgtp]?)(i?)b?", text.strip(), re.IGNORECASE)
    if not found:
        raise typer.BadParameter(f"{text!r} is no size: expected such as 500M, 100G or 1.5T")
    power = _BYTES[found[2].lower()]
    if found[3]:
        power = 1024 ** round(len(str(power)) / 3)
    return int(float(found[1]) * power)


def parse_age(text: str) -> float:
    """Read an age such as ``30d`` or ``12h``, in seconds."""
    found = re.fullmatch(rf"({_AMOUNT})\s*([smhdwy])", text.strip())
    if not found:
        raise typer.BadParameter(f"{text!r} is no age: expected such as 12h, 30d or 8w")
    return float(found[1]) * _SECONDS[found[2]]


def refuse_without(context: typer.Context, wanted: str, names: Iterable[str]) -> None:
    """Refuse options that were given and do nothing without another."""

    def is_given(name: str) -> bool:
        source = context.get_parameter_source(name)
        return source is not None and source.name == "COMMANDLINE"

    for name in names if not is_given(wanted) else ():
        if is_given(name):
            option = name.replace("_", "-")
            raise typer.BadParameter(
                f"--{option} does nothing without --{wanted}: give both, or none"
            )


def size_option(text: str, **more: Any) -> Any:
    """Make an option that takes a size."""
    return typer.Option(parser=parse_size, metavar="SIZE", help=text, **more)


def age_option(text: str, **more: Any) -> Any:
    """Make an option that takes an age."""
    return typer.Option(parser=parse_age, metavar="AGE", help=text, **more)


def complete(names: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Make a completion of names, which are looked up when someone completes."""

    def find(incomplete: str) -> list[str]:
        return [name for name in names() if name.startswith(incomplete)]

    return find


def complete_backbone(incomplete: str) -> list[str]:
    """Complete a backbone's name; behind its ``?``, options and their values."""
    from ..backbones import list_backbones

    if "?" not in incomplete:
        names = [info.name.partition("<")[0] for info in list_backbones()]
        return [name for name in names if name.startswith(incomplete)]
    head, mark = max(incomplete.rpartition(mark)[:2] for mark in "?&")
    return [one for one in _options_after(f"{head}{mark}") if one.startswith(incomplete)]


def _options_after(typed: str) -> Iterator[str]:
    """Give a name that ends in ``?`` or ``&`` with each option, and with each of its values."""
    from ..backbones import list_options
    from ..errors import FeatureCacheError

    try:
        options = list_options(typed.partition("?")[0])
    except FeatureCacheError:
        return
    for option in options:
        yield f"{typed}{option.name}="
        yield from (f"{typed}{option.name}={word}" for word in option.words)


def _pooling_names() -> list[str]:
    from ..pooling import POOLINGS

    return ["none", *POOLINGS]


def _storage_dtypes() -> Iterable[str]:
    from ..spec import STORAGE_DTYPES

    return STORAGE_DTYPES


def _codecs() -> Iterable[str]:
    from ..store import CODECS

    return CODECS


def _policies() -> Iterable[str]:
    from ..augment.policy import PRESETS

    return PRESETS


complete_pooling = complete(_pooling_names)


def parse_folder(text: str) -> Path:
    """Read the name of a cache's folder; NotACacheError for a URL that names none."""
    from ..store.url import find_folder

    return find_folder(text)


_cache_option = typer.Option(
    "--cache",
    envvar="FEATURE_CACHE_DIR",
    parser=parse_folder,
    metavar="FOLDER",
    help="The cache's folder.",
)
CacheOption = Annotated[Path, _cache_option]
OptionalCacheOption = Annotated[Path | None, _cache_option]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
BackboneOption = Annotated[
    str,
    typer.Option(
        help="See feature-cache backbones; options behind it, as NAME?dtype=bfloat16.",
        autocompletion=complete_backbone,
        rich_help_panel=FEATURES,
    ),
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        help="A checkpoint file, or random:<seed>; default: the model's own.",
        rich_help_panel=FEATURES,
    ),
]


def parse_batch_size(text: str) -> int | None:
    """Read a number of frames; None for auto."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdecimal() and int(text) > 0):
        raise typer.BadParameter(f"--batch-size {text!r}: expected auto, or a number from 1 on")
    return int(text)


BatchOption = Annotated[
    str,
    typer.Option(
        help="Frames embedded at once; auto: as many as fit.",
        autocompletion=complete(lambda: ("auto", "8", "16", "32")),
        rich_help_panel=COMPUTING,
    ),
]
PoolingOption = Annotated[
    str,
    typer.Option(
        help="How a region's vector is made; 'none' keeps grids.",
        autocompletion=complete_pooling,
        rich_help_panel=FEATURES,
    ),
]
DetectionsOption = Annotated[
    str, typer.Option(help="The folder of masks beside the movie.", rich_help_panel=MOVIE)
]
ManyDetectionsOption = Annotated[
    list[str],
    typer.Option(
        help="The folder of masks beside the movie. May be repeated.", rich_help_panel=MOVIE
    ),
]
MasksOption = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="The masks of the one movie that is named, where they are not beside it.",
        rich_help_panel=MOVIE,
    ),
]
ChannelOption = Annotated[
    int | None,
    typer.Option(min=0, help="Which channel of frames that have several.", rich_help_panel=MOVIE),
]
AxesOption = Annotated[
    str | None,
    typer.Option(
        help="The axes of frames that don't say theirs, such as TYX.", rich_help_panel=MOVIE
    ),
]
DtypeOption = Annotated[
    str,
    typer.Option(
        help="Storage: float16 or float32.",
        autocompletion=complete(_storage_dtypes),
        rich_help_panel=FEATURES,
    ),
]
ComputeDtypeOption = Annotated[
    str | None,
    typer.Option(
        help="Of the computation, as ?dtype= in the name: float32 (default), bfloat16, float16.",
        autocompletion=complete(lambda: ("float32", "bfloat16", "float16")),
        rich_help_panel=COMPUTING,
    ),
]
CodecOption = Annotated[
    str,
    typer.Option(
        help="Of the files: raw, zstd or blosc.",
        autocompletion=complete(_codecs),
        rich_help_panel=OUTPUT,
    ),
]
SeedOption = Annotated[int, typer.Option(help="Of the copies.", rich_help_panel=COPIES)]
PolicyOption = Annotated[
    str,
    typer.Option(
        help="Of the copies: none, flips, geometric, intensity or default.",
        autocompletion=complete(_policies),
        rich_help_panel=COPIES,
    ),
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
        help="Read every file, and replace what is remembered of it.",
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


def parse_beginning(text: str) -> str:
    """Read the beginning of a name; with none, as of a shell's variable, everything begins."""
    if not text.strip():
        raise typer.BadParameter("is empty: expected the beginning of a name")
    return text


SpacesOption = Annotated[
    list[str],
    typer.Option(
        "--space",
        parser=parse_beginning,
        metavar="TEXT",
        help="Only this space: the beginning of its name.",
    ),
]
