"""A model of a very large cache, from measured costs: python -m benchmarks.scale RESULTS.json.

What a process pays for the index grows with all records of a space: time to open, and memory. It is
measured up to ten million and continued as a straight line through the two largest numbers. An
object store is not measured; what is assumed of it is printed with the rest.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .harness import OURS, Case, load_results
from .opening import PACK_RECORDS

KEY_BYTES = 16
SIZES = (10**6, 10**7, 10**8, 10**9)


@dataclass(frozen=True)
class Store:
    """What is assumed of an object store."""

    gets_a_second: float = 5500.0
    listed_a_request: int = 1000
    seconds_a_request: float = 0.03
    bytes_a_second: float = 100e6


ASSUMED = Store()


@dataclass(frozen=True)
class Growth:
    """A cost that grows with the number of records: fixed, and for each."""

    fixed: float
    each: float

    def at(self, records: int) -> float:
        return self.fixed + self.each * records


def measured_growth(cases: Mapping[str, Case], what: str, side: str = OURS) -> Growth:
    """Lay a line through the two largest numbers of records.

    Raises
    ------
    ValueError
        Fewer than two were measured.
    """
    points = sorted(
        (int(name.split()[0].replace(",", "")), statistics.median(case.values[side]))
        for name, case in cases.items()
        if name.endswith(f": {what}")
    )
    if len(points) < 2:
        raise ValueError(f"{len(points)} numbers of records measured for {what}: expected two")
    (less, low), (more, high) = points[-2:]
    each = (high - low) / (more - less)
    return Growth(max(0.0, low - each * less), each)


def model(cases: Mapping[str, Case], store: Store = ASSUMED, trainers: int = 1000) -> list[str]:
    """Give a Markdown table: what one process pays, and all trainers at once, in one space."""
    opening, memory = measured_growth(cases, "opening"), measured_growth(cases, "memory")
    head = "| records | packs | opening | memory | opening over the network |"
    lines = [f"{head} {trainers:,} trainers together |", "|" + "---:|" * 6]
    for records in SIZES:
        packs = -(-records // PACK_RECORDS)
        # A GET for the keys of each pack, beside listing; a store serves so many GETs a second.
        network = records * KEY_BYTES / store.bytes_a_second
        listing = -(-packs // store.listed_a_request) * store.seconds_a_request
        alone = network + listing + packs / store.gets_a_second
        crowd = trainers * packs / store.gets_a_second
        lines.append(
            f"| {records:,} | {packs:,} | {opening.at(records):.3g} s "
            f"| {memory.at(records) / 1e3:.3g} GB | {alone:.3g} s | {crowd / 3600:.3g} h |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--trainers", type=int, default=1000)
    options = parser.parse_args()
    print(f"Assumed: {ASSUMED}; packs of {PACK_RECORDS:,} records.\n")
    cases = load_results(options.results)["opening"]
    print(*model(cases, trainers=options.trainers), sep="\n")


if __name__ == "__main__":
    main()
