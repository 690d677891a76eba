"""Tables and picture of the results: python -m benchmarks.report RESULTS.json [--page FILE].

Printed is the table of the design's targets. With --page docs/explanation/performance.md, it
replaces what stands between the marks of the page, with the picture (written beside it) and the
model of a large cache.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .harness import OURS, Case, format_value, load_results
from .scale import model
from .targets import TARGETS, WINDOW, Target

Results = Mapping[str, Mapping[str, Case]]


def make_table(results: Results) -> list[str]:
    """Give the Markdown table of targets, one row for each that was measured."""
    lines = ["| what | asked | measured | middle half | |", "|---|---:|---:|---:|---|"]
    return lines + [line for target in TARGETS for line in _row_of(target, results)]


def _row_of(target: Target, results: Results) -> Iterable[str]:
    measured = target.measure(results)
    if measured is None:
        return
    low, middle, high = (f"{x:.3g} x" if target.against else format_value(x, "s") for x in measured)
    holds = target.least <= measured[1] <= target.most
    verdict = "" if holds else "not reached"
    asked = target.asked if target.against else f"at most {format_value(target.most, 's')}"
    yield f"| {target.what} | {asked} | {middle} | {low} to {high} | {verdict} |"


def describe(machine: Mapping[str, Any]) -> str:
    """Name the machine and the versions in a sentence."""
    versions = ", ".join(f"{package} {version}" for package, version in machine["versions"].items())
    gpu = "" if machine["device"] == "none" else f", {machine['device']}"
    return (
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gib']} GiB{gpu}, "
        f"{machine['system']}, Python {machine['python']}; {versions}."
    )


def draw(results: Results, file: Path) -> None:
    """Draw windows and batches against the alternatives, and the growth of the index."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    _draw_windows(left, results)
    _draw_growth(right, results)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)


def _draw_windows(axes: Any, results: Results) -> None:
    case = results["windows"][f"{WINDOW} warm"]
    sides = sorted(case.values, key=lambda side: -statistics.median(case.values[side]))
    values = [statistics.median(case.values[side]) * 1e6 for side in sides]
    colors = ["#c44e52" if side.startswith(OURS) else "#8c8c8c" for side in sides]
    axes.barh(sides, values, color=colors)
    axes.set_xscale("log")
    axes.set_xlabel("µs a window of 8 frames x 50 regions x 256, page cache warm")


def _draw_growth(axes: Any, results: Results) -> None:
    cases = results["opening"]
    for what, side in (("opening", OURS), ("refresh", f"{OURS}, one pack more")):
        points = [
            (int(name.split()[0].replace(",", "")), statistics.median(case.values[side]) * 1e3)
            for name, case in cases.items()
            if name.endswith(f": {what}")
        ]
        label = what if side == OURS else "refresh with one pack more"
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set(xscale="log", yscale="log", xlabel="records", ylabel="ms")
    axes.legend()


def replace_part(page: Path, name: str, text: str) -> None:
    """Put a text between the marks ``<!-- name -->`` and ``<!-- end of name -->`` of a page.

    Raises
    ------
    ValueError
        There are no such marks.
    """
    first, last = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(first)
    _, ended, after = rest.partition(last)
    if not (found and ended):
        raise ValueError(f"{page} has no part between {first.strip()} and {last}")
    page.write_text(f"{before}{first}{text}\n{last}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page with the marks")
    options = parser.parse_args()
    results = load_results(options.results)
    machine = describe(json.loads(options.results.read_text())["machine"])
    table = "\n".join([machine, "", *make_table(results)])
    print(table)
    if options.page:
        picture = options.page.with_name(f"{options.results.stem}.svg")
        draw(results, picture)
        text = f"{table}\n\n![Windows read, and the growth of the index]({picture.name})"
        replace_part(options.page, "benchmarks", text)
        replace_part(options.page, "scale", "\n".join(model(results["opening"])))


if __name__ == "__main__":
    main()
