"""Commands that look: ls, stats, inspect, backbones, doctor."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    CacheOption,
    JsonOption,
    OptionalCacheOption,
    complete_backbone,
    parse_beginning,
)
from .output import print_table, size_text

if TYPE_CHECKING:
    from ..store import Store


def inspect(
    what: Annotated[
        str,
        typer.Argument(
            parser=parse_beginning,
            metavar="WHAT",
            help="Beginning of a space's or pack's name, or of a record's key.",
        ),
    ],
    cache: CacheOption,
) -> None:
    """Show one space, pack or record in full, as JSON.

    Example: feature-cache inspect efficientnet --cache features
    """
    from ..store import Store
    from ..store import inspect as look

    typer.echo(json.dumps(look(Store(cache, "r"), what), indent=2))


def list_spaces(
    cache: CacheOption,
    movies: Annotated[
        bool, typer.Option("--movies", help="The movies instead, as people asked for them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the spaces of a cache: one for each backbone, pooling and dtype; --json has all of it.

    Example: feature-cache ls --cache features
    """
    from ..store import Store
    from ..store.maintenance import last_uses

    if movies:
        _list_movies(Store(cache, "r"), as_json)
        return
    rows = [
        {
            "space": space.name,
            "backbone": space.spec["backbone"]["name"],
            "pooling": (space.spec["pooling"] or {}).get("name", "none"),
            "dtype": space.spec["dtype"],
            "records": len(space),
            "packs": len(uses := last_uses(space)),
            "bytes": space.disk_bytes(),
            "last_use": max(uses.values(), default=0.0),
            **({"spec": dict(space.spec)} if as_json else {}),
        }
        for space in Store(cache, "r").spaces()
    ]
    print_table(rows, as_json)


def _list_movies(store: Store, as_json: bool) -> None:
    from ..report.coverage import find_coverage
    from ..store import read_asked

    known, coverage = find_coverage(store.spaces(), read_asked(store.root))
    rows = [
        {
            "movie": " = ".join(movie.names),
            "space": one.space,
            "frames": movie.slots,
            "copies": copies,
            "records": sum(one.counts[number]),
            "missing": (one.expected[number] or 0) * copies - sum(one.counts[number]),
        }
        for number, movie in enumerate(known)
        for one in coverage
        if (copies := sum(one.wanted[number]))
    ]
    print_table(rows, as_json)


def stats(
    cache: CacheOption,
    runs: Annotated[bool, typer.Option("--runs", help="How each process used it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Count what is in a cache, and how it was used by all processes so far.

    Example: feature-cache stats --cache features --runs
    """
    from ..cache import FeatureCache
    from ..store import Store, read_runs

    if runs:
        print_table([run.to_json() for run in read_runs(Store(cache, "r").root)], as_json)
        return
    counts = FeatureCache(cache, "r").stats(lifetime=True)
    if as_json:
        typer.echo(json.dumps(counts))
        return
    for name, value in counts.items():
        typer.echo(f"{name:<13} {size_text(value) if 'bytes' in name else f'{value:,}'}")


def doctor(
    context: typer.Context,
    cache: OptionalCacheOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is here: versions, devices, settings, the cache's folder, and what can run.

    For each job and each backbone it says whether all is installed, by which command if not, and
    where the weights are. No model is loaded, no network asked. Exit status 1 when something is
    wrong, which an extra that is missing is not.

    Example: feature-cache doctor --cache features
    """
    from ..doctor import examine

    source = context.get_parameter_source("cache")
    names = {"COMMANDLINE": "--cache", "ENVIRONMENT": "FEATURE_CACHE_DIR"}
    facts = examine(cache, names.get(source.name if source else "", "default"))
    if as_json:
        typer.echo(json.dumps([fact.to_json() for fact in facts]))
    else:
        width = max(len(fact.name) for fact in facts)
        for fact in facts:
            mark = "" if fact.is_well else "  <-"
            source_text = f"  ({fact.source})" if fact.source else ""
            install = f"; {fact.install}" if fact.install else ""
            told = f"{fact.value}{install}{source_text}{mark}"
            typer.echo(f"{fact.section:<9} {fact.name:<{width}} {told}")
    if not all(fact.is_well for fact in facts):
        raise typer.Exit(1)


def backbones(
    name: Annotated[
        str, typer.Argument(help="List the options of this one.", autocompletion=complete_backbone)
    ] = "",
    as_json: JsonOption = False,
) -> None:
    """List the backbones, and how to install those that are not; or the options of one.

    Options follow the name wherever a backbone is named: NAME?OPTION=VALUE&OPTION=VALUE.

    Example: feature-cache backbones efficientnet-lite0
    """
    from ..backbones import list_backbones

    if name:
        _list_options(name, as_json)
        return
    rows = [
        {
            "name": info.name,
            "width": info.width,
            "stride": info.stride,
            "input": info.input,
            "licence": info.licence,
            "installed": "yes" if info.installed else info.install,
        }
        for info in list_backbones()
    ]
    print_table(rows, as_json)


def _list_options(name: str, as_json: bool) -> None:
    from ..backbones import list_options
    from ..backbones.name import write_value

    rows = [
        {"option": one.name, "default": write_value(one.default), "values": one.expected}
        for one in list_options(name)
    ]
    print_table(rows, as_json)
