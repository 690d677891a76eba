"""Commands that keep a cache well: verify, gc, compact, pin, unpin, push, pull."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    COMPUTING,
    CacheOption,
    JsonOption,
    SpacesOption,
    age_option,
    parse_beginning,
    refuse_without,
    size_option,
)
from .output import count_text, make_bar, print_table, size_text, time_text
from .progress import RunProgress

if TYPE_CHECKING:
    from ..recompute import Recomputed
    from ..store.maintenance import CompactReport, Finding, GarbagePlan, GarbageReport
    from ..store.remote import TransferReport

UrlArgument = Annotated[
    str, typer.Argument(metavar="URL", help="Such as s3://bucket/features or file:///mnt/features.")
]
WhatArgument = Annotated[
    str | None,
    typer.Argument(
        parser=parse_beginning,
        metavar="[WHAT]",
        help="Beginning of a space's or pack's name or a record's key; or a movie.",
    ),
]
YesOption = Annotated[bool, typer.Option("--yes", help="Do it; without, only say what would go.")]


def parse_count(text: str) -> int | None:
    """Read a number of records, or ``all``, which is None."""
    if text == "all":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is no number of records: expected 1 or more, or all")
    return int(text)


def verify(
    context: typer.Context,
    cache: CacheOption,
    repair: Annotated[
        bool, typer.Option("--repair", help="Move what is wrong to quarantine/.")
    ] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also compare with what zarr-python reads.")
    ] = False,
    recompute: Annotated[
        str | None,
        typer.Option(
            metavar="N|all",
            help="Also compute so many records again, and compare the numbers.",
            rich_help_panel=COMPUTING,
        ),
    ] = None,
    weights: Annotated[
        list[str],
        typer.Option(
            help="To try for --recompute, before the models' own: a checkpoint, or random:<seed>.",
            rich_help_panel=COMPUTING,
        ),
    ] = [],
    device: Annotated[
        str | None,
        typer.Option(help="Such as cuda:0; default: the best.", rich_help_panel=COMPUTING),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Frames embedded at once.", rich_help_panel=COMPUTING)
    ] = 8,
    seed: Annotated[
        int, typer.Option(help="Another one chooses other records.", rich_help_panel=COMPUTING)
    ] = 0,
    space: SpacesOption = [],
    as_json: JsonOption = False,
) -> None:
    """Look at every file of a cache, and compare every record with its checksum.

    With --recompute, records chosen at random in all spaces are computed again from their movies:
    nothing else finds wrong numbers whose checksum is right. Records whose movie or weights are
    gone or changed are counted. Exit status 1 when something is wrong, which what killed processes
    left behind is not.

    Example: feature-cache verify --cache features --recompute 100
    """
    from ..store import maintenance

    refuse_without(context, "recompute", ("weights", "device", "batch_size", "seed"))
    count = None if recompute is None else parse_count(recompute)
    with make_bar("verifying", maintenance.count_packs(cache, space), "pack") as bar:
        findings = maintenance.verify(cache, deep=deep, spaces=space, progress=bar.update)
    if repair:
        maintenance.repair(cache, findings)
    again = None
    if recompute is not None:
        again = _compute_again(cache, space, count, seed, weights, device, batch_size)
        findings += again.wrong
        if repair:
            maintenance.repair(cache, again.wrong)
    _show_findings(findings, again, repair, as_json)
    if any(finding.is_wrong for finding in findings):
        raise typer.Exit(1)


def _compute_again(
    cache: Path,
    spaces: list[str],
    count: int | None,
    seed: int,
    weights: list[str],
    device: str | None,
    batch_size: int,
) -> Recomputed:
    from ..recompute import choose_records, recompute
    from ..store import Store
    from ..store.maintenance import choose_spaces

    chosen = choose_records(choose_spaces(Store(cache, "r").spaces(), spaces), count, seed)
    with RunProgress("computing again", sum(len(one.rows) for one in chosen)) as progress:
        return recompute(
            chosen,
            weights=weights,
            device=device,
            batch_size=batch_size,
            progress=progress.update,
        )


def _show_findings(
    findings: list[Finding], again: Recomputed | None, repaired: bool, as_json: bool
) -> None:
    listed = [finding.to_json() for finding in findings]
    if as_json:
        counts = {} if again is None else again.to_json()
        typer.echo(json.dumps(listed if again is None else {"findings": listed, **counts}))
        return
    for (_, reason), number in again.unknown.most_common(20) if again is not None else ():
        typer.echo(f"not compared: {count_text(number, 'record')}: {reason}")
    if again is not None:
        typer.echo(str(again))
    wrong = [finding for finding in findings if finding.is_wrong]
    if left := len(findings) - len(wrong):
        then = "removed" if repaired else "no harm: feature-cache gc --yes removes them"
        typer.echo(f"{count_text(left, 'left-over')} of ended processes, {then}")
    if wrong:
        _print_findings(wrong, repaired)
    elif again is not None and again.unknown:
        typer.echo("nothing wrong was found in what could be compared")
    else:
        typer.echo("all is well")


def _print_findings(findings: list[Finding], repaired: bool) -> None:
    for finding in findings:
        typer.echo(f"{finding.kind}: {finding.path}: {finding.message}")
    lost = [record for finding in findings for record in finding.lost]
    for record in lost[:20]:
        typer.echo(f"warm again: {record}")
    if len(lost) > 20:
        typer.echo(f"warm again: and {len(lost) - 20:,} more (all with --json)")
    twice = sum(finding.kind == "duplicate" for finding in findings)
    others = len(findings) - twice
    if others and repaired:
        typer.echo(f"{others} found, and repaired")
    elif others:
        then = ", then warm again what is named above" if lost else ""
        typer.echo(f"{others} found: run feature-cache verify --repair{then}")
    if twice:
        packs = count_text(twice, "pack")
        typer.echo(f"{packs} with records that are there twice: run feature-cache compact")


def gc(
    cache: CacheOption,
    max_size: Annotated[
        int | None, size_option("Keep this much, such as 100G: the most recently used.")
    ] = None,
    older_than: Annotated[
        float | None, age_option("Let go of what was not used for so long, such as 30d.")
    ] = None,
    space: SpacesOption = [],
    yes: YesOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would go, which is the default.")
    ] = False,
    max_seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Stop after so long; what is left is for the next time."),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="List every pack and left-over.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let go of what was not used for longest, and of what killed processes left.

    Sizes are those that du shows. What a running process read in the last day goes last.

    Example: feature-cache gc --cache features --max-size 100G --older-than 90d --yes
    """
    from ..store import Store
    from ..store.maintenance import plan_gc, run_gc

    if yes and dry_run:
        raise typer.BadParameter("--yes and --dry-run contradict each other")
    store = Store(cache, "a" if yes else "r", create=False)
    plan = plan_gc(store, max_bytes=max_size, max_age_seconds=older_than, spaces=space)
    if not as_json:
        _print_plan(plan, verbose)
    report = run_gc(store, plan, max_seconds=max_seconds) if yes else None
    if as_json:
        done = None if report is None else report.to_json()
        typer.echo(json.dumps({"plan": plan.to_json(), "done": done}))
    elif report is not None:
        _print_report(report)
    elif plan.bytes:
        typer.echo("nothing was removed: --yes does it")


def _print_plan(plan: GarbagePlan, verbose: bool) -> None:
    stays = plan.kept_bytes + plan.other_bytes
    typer.echo(
        f"{size_text(plan.bytes)} to free, {size_text(stays)} stay "
        f"({size_text(plan.pinned_bytes)} pinned)"
    )
    for line in _sum_up(plan):
        typer.echo(line)
    if plan.max_bytes is not None and stays > plan.max_bytes:
        typer.echo(
            f"{size_text(plan.max_bytes)} are not reached: {size_text(plan.pinned_bytes)} are "
            f"pinned (see feature-cache pin), {size_text(plan.other_bytes)} are no packs"
        )
    if plan.unseen:
        typer.echo(
            f"what {plan.unseen} read here without a right to write is not known, and counts as "
            "not used: chmod 1777 the cache's uses/ to see it"
        )
    for line in _list_plan(plan) if verbose else ():
        typer.echo(line)


def _sum_up(plan: GarbagePlan) -> Iterator[str]:
    """Say in a line each how much goes of what."""
    if plan.evictions:
        records = sum(eviction.records for eviction in plan.evictions)
        size = size_text(sum(eviction.bytes for eviction in plan.evictions))
        until = time_text(max(eviction.last_use for eviction in plan.evictions))
        packs = count_text(len(plan.evictions), "pack")
        yield f"{packs} to let go: {records:,} records, {size}, last used until {until}"
    if plan.quarantined:
        size = size_text(sum(size for _, size in plan.quarantined))
        yield f"{count_text(len(plan.quarantined), 'pack')} in quarantine: {size}"
    if plan.leftovers:
        size = size_text(sum(size for _, size in plan.leftovers))
        yield f"{count_text(len(plan.leftovers), 'left-over')} of ended processes: {size}"


def _list_plan(plan: GarbagePlan) -> Iterator[str]:
    for eviction in plan.evictions:
        yield (
            f"evict {eviction.pack[:12]} of {eviction.space}: {eviction.records:,} records, "
            f"{size_text(eviction.bytes)}, last used {time_text(eviction.last_use)}"
        )
    for path, size in plan.quarantined:
        yield f"in quarantine: {path.name}, {size_text(size)}"
    for path, size in plan.leftovers:
        yield f"left over: {path}, {size_text(size)}"


def _print_report(report: GarbageReport) -> None:
    typer.echo(f"{size_text(report.freed_bytes)} freed, {report.records:,} records let go")
    if not report.is_done:
        typer.echo("the time was over before all was removed: run gc again")


def compact(cache: CacheOption, space: SpacesOption = [], as_json: JsonOption = False) -> None:
    """Merge small packs, drop records that are there twice; readers go on undisturbed.

    Example: feature-cache compact --cache features
    """
    from ..store import Store
    from ..store.maintenance import choose_spaces, compact_space

    store = Store(cache, create=False)
    chosen = choose_spaces(store.spaces(), space)
    with make_bar("compacting", sum(map(len, chosen)), "record") as bar:
        reports = [compact_space(one, progress=bar.update) for one in chosen]
    if as_json:
        typer.echo(json.dumps([report.to_json() for report in reports]))
        return
    for one in reports:
        typer.echo(f"{one.space}: {_describe(one)}")


def _describe(report: CompactReport) -> str:
    if report.busy:
        return "another process is at it"
    if not report.merged:
        return "nothing to merge"
    packs = f"{report.merged:,} packs merged into {report.written:,}"
    return f"{packs}, {report.duplicates:,} duplicates"


def pin(cache: CacheOption, what: WhatArgument = None, as_json: JsonOption = False) -> None:
    """Keep a space, pack, record or movie from gc; without one, list what is pinned.

    Example: feature-cache pin data/01 --cache features
    """
    from ..store import Store
    from ..store.maintenance import add_pin, read_pins

    store = Store(cache, "r" if what is None else "a", create=False)
    pins = read_pins(store.root) if what is None else add_pin(store, what)
    rows = [
        {
            "pinned": one.what,
            "space": one.space,
            "records": "all" if one.keys is None else len(one.keys),
        }
        for one in pins
    ]
    print_table(rows, as_json)


def unpin(
    what: Annotated[str, typer.Argument(help="As pin lists it.")], cache: CacheOption
) -> None:
    """Let gc have again what was pinned.

    Example: feature-cache unpin data/01 --cache features
    """
    from ..store import Store
    from ..store.maintenance import remove_pin

    typer.echo(f"{remove_pin(Store(cache, create=False), what)} unpinned")


def push(
    url: UrlArgument, cache: CacheOption, space: SpacesOption = [], as_json: JsonOption = False
) -> None:
    """Copy the packs that an object store or another folder lacks to it, verified.

    Example: feature-cache push s3://bucket/features --cache features
    """
    from ..store import remote

    there = remote.open_remote(url)
    plan = remote.plan_push(cache.absolute(), there, spaces=_full_names(cache, space))
    with make_bar("sending", plan.bytes, "B") as bar:
        report = remote.push(cache.absolute(), there, plan=plan, progress=bar.update)
    _print_transfer(report, "sent", as_json)


def pull(
    url: UrlArgument, cache: CacheOption, space: SpacesOption = [], as_json: JsonOption = False
) -> None:
    """Copy the packs that a cache lacks from where they were pushed to, verified.

    Example: feature-cache pull s3://bucket/features --cache features
    """
    from ..store import remote
    from ..store.maintenance import choose_names

    there = remote.open_remote(url)
    names = choose_names(list(there.spaces()), space) if space else None
    plan = remote.plan_pull(cache.absolute(), there, spaces=names)
    with make_bar("fetching", plan.bytes, "B") as bar:
        report = remote.pull(cache.absolute(), there, plan=plan, progress=bar.update)
    _print_transfer(report, "fetched", as_json)


def _full_names(cache: Path, starts: list[str]) -> list[str] | None:
    from ..store import Store
    from ..store.maintenance import choose_spaces

    if not starts:
        return None
    return [space.name for space in choose_spaces(Store(cache, "r").spaces(), starts)]


def _print_transfer(report: TransferReport, verb: str, as_json: bool) -> None:
    failures = [
        {"space": one.space, "pack": one.name, "error": str(one.error)} for one in report.failures
    ]
    if as_json:
        counts = {"packs": report.packs, "bytes": report.bytes, "present": report.present}
        typer.echo(json.dumps({**counts, "failures": failures}))
    else:
        for failure in failures:
            typer.echo(f"failed: {failure['error']}", err=True)
        typer.echo(
            f"{count_text(report.packs, 'pack')} {verb}, {size_text(report.bytes)}; "
            f"{report.present:,} were there"
        )
    if failures:
        raise typer.Exit(1)
