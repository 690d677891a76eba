"""All benchmarks: python -m benchmarks [--quick] [--only NAME ...] [--json FILE] [--compare FILE].

Each runs in a process of its own, in a temporary folder. Printed are medians, ratios to the side
named first, and the middle half of the rounds in brackets.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .apart import run_apart
from .compare import find_worse
from .harness import Case, Options, describe_machine, format_case, load_results, save_results

NAMES = (
    *("windows", "batches", "dense", "writing", "opening", "packs", "hashing", "pooling"),
    *("lazy", "warming", "training", "witness", "epochs", "backbones"),
)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="less of all; under two minutes")
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--rounds", type=int, default=0, help="default: 9, or 3 with --quick")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers")
    parser.add_argument(
        "--compare",
        type=read_results,
        metavar="FILE",
        help="say what is worse than in this JSON; exits 0",
    )
    parser.add_argument("--folder", type=Path, help="where files go, such as another disk")
    return parser.parse_args()


def read_results(file: str) -> dict[str, dict[str, Case]]:
    """Read the results to compare with, before anything is measured."""
    try:
        return load_results(Path(file))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"can't read {file}: {error.strerror}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(
            f"{file} holds no results: expected what --json FILE writes"
        ) from error


def main() -> None:
    chosen = parse_options()
    machine = describe_machine()
    print(", ".join(f"{key} {value}" for key, value in machine.items() if key != "versions"))
    print(", ".join(f"{package} {version}" for package, version in machine["versions"].items()))
    results: dict[str, list[Case]] = {}
    failed = []
    with tempfile.TemporaryDirectory(dir=chosen.folder) as folder:
        options = Options(Path(folder), chosen.quick, chosen.rounds)
        for name in chosen.only or NAMES:
            began = time.perf_counter()
            try:
                results[name] = run_apart(name, options)
            except Exception as error:  # noqa: BLE001  the others are run all the same
                failed.append(name)
                print(f"\n{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
                continue
            print(f"\n== {name} ({time.perf_counter() - began:.0f} s)")
            print(*map(format_case, results[name]), sep="\n", flush=True)
            if chosen.json:  # after each, so that what follows may be broken off
                save_results(chosen.json, results, chosen.quick)
    if chosen.compare:
        new = {name: {case.name: case for case in cases} for name, cases in results.items()}
        worse = find_worse(chosen.compare, new)
        print(
            "\nWorse by more than the noise:" if worse else "\nNothing is worse.", *worse, sep="\n"
        )
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
