"""Caches with anything in them: right records, none, or an error of ours; and nothing else."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from google_crc32c import value as crc32c

from feature_cache import FeatureCacheError, StoreError
from feature_cache.store import Counter, Store, Usage, inspect, read_runs
from feature_cache.store.maintenance import (
    Finding,
    add_pin,
    compact_space,
    plan_gc,
    repair,
    run_gc,
    verify,
)
from samples import content, expected, fork, make_entries, make_keys, make_spec, wait

pytestmark = [
    pytest.mark.filterwarnings(
        # zarr's event loop is a thread; that a fork survives it is what is tested.
        "ignore:.*multi-threaded, use of fork:DeprecationWarning"
    ),
]

CASES = 150
QUICK_CASES = 40
SEEDS = [
    (0, QUICK_CASES),
    *(pytest.param(seed, CASES, marks=pytest.mark.slow) for seed in range(7)),
]
SPARE_BYTES = 3 << 30
NUMBERS = {"regions": range(5), "empty": range(5, 7), "grids": range(4)}
PLACES = ("retired", "retired/x", "pins", "stats", "quarantine", "processes", "claims")
DEEP = "[" * 100_000
VALUES: list[Any] = [
    *(-1, 0, 1, 7, 1 << 20, 1 << 31, (1 << 48) - 1, 1 << 62, 10**300, 1.5, 1e308, -0.0),
    *(float("nan"), float("inf"), None, True, "", "..", "../..", "/etc/passwd", "c", ".", "\ud800"),
    *("float64", "uint64", "float32", "int8", "bytes", "gzip", "sharding_indexed", "big", "v2"),
    *([], {}, [[]], [1 << 40] * 3, [-1, 8], [0, 0], {"name": "gzip"}, [{"name": "bytes"}]),
]
NAMES = [
    *("..x", ".tmp-", ".tmp-x", ".tmp-a-b", ".tmp-..-x", "-", "--", "a-b-c", "x" * 250, "\udcff"),
    *("0" * 32, "f" * 32, "a-" + "0" * 32 + "-b", "x.json", "merged-1.json", "-takeover", "Ω"),
    *(f"compact-{make_spec().slug}", "elsewhere-1-0"),
]
TEXTS = [
    *("", "null", "[]", "{}", DEEP, '{"of":3,"pid":1e999}', '{"host":"a","pid":-1,"started":0}'),
    *('{"host":"a","pid":1e999,"started":0,"released":[]}', "\x00", "../../canary/secret"),
    *('{"what":"a","space":"..","keys":[]}', '{"hits":1e400}', "/" * 5000),
]


def build(root: Path) -> None:
    store = Store(root)
    for kind, numbers in NUMBERS.items():
        half = len(numbers) // 2
        space = store.space(make_spec(kind))
        space.write(make_entries(numbers[:half], kind), {"by": "us"}, "raw")
        space.write(make_entries(numbers[half:], kind), {"by": "us"}, "zstd")
    add_pin(store, make_spec("grids").slug)
    counter = Counter(store)
    counter.add(Usage(1))
    counter.save()
    store.claims.take(["something"])
    for name in ("retired", "quarantine"):
        (root / name).mkdir(exist_ok=True)


_READ_HERE = 1 << 24


class Damage:
    """Random changes of a cache, which can be taken back."""

    def __init__(self, root: Path, canary: Path, rng: np.random.Generator) -> None:
        self.root, self.canary, self.rng = root, canary, rng
        self.aside = root.parent / "aside"
        self.undo: list[tuple[Path, Path | None]] = []
        self.what: list[str] = []

    def pick(self, things: Any) -> Any:
        return things[int(self.rng.integers(len(things)))]

    def take(self, path: Path) -> Path:
        """Move a file or folder away; give where it is."""
        self.aside.mkdir(exist_ok=True)
        kept = self.aside / str(len(self.undo))
        path.rename(kept)
        self.undo.append((path, kept))
        return kept

    def do(self) -> None:
        plain = (f for f in self.root.rglob("*") if f.is_file() and not f.is_symlink())
        files = sorted(f for f in plain if f.stat().st_size < _READ_HERE)  # a sparse one isn't
        how = self.pick(
            [self.edit, self.edit, self.edit, self.text, self.chunk, self.put, self.add]
        )
        metadata = [file for file in files if file.name == "zarr.json"]
        how(self.pick(metadata if how in (self.edit, self.text) else files))

    def edit(self, file: Path) -> None:
        try:
            document = json.loads(file.read_bytes())
        except ValueError:  # damaged by another
            return
        if not (isinstance(document, dict | list) and document):  # so is this
            return
        for _ in range(int(self.rng.integers(1, 4))):
            holder: Any = document
            while True:
                place = self.pick(list(holder) if isinstance(holder, dict) else range(len(holder)))
                inner = holder[place]
                if not (isinstance(inner, dict | list) and inner) or self.rng.random() < 0.2:
                    break
                holder = inner
            action = self.rng.random()
            if action < 0.8:
                holder[place] = self.pick(VALUES)
            elif action < 0.9:
                del holder[place]
                if not document:
                    break
            elif isinstance(holder, dict):
                holder[str(self.pick(VALUES))] = self.pick(VALUES)
        self.write(file, json.dumps(document).encode())

    def text(self, file: Path) -> None:
        data = file.read_bytes()
        if not data:
            return
        place = int(self.rng.integers(len(data)))
        nested = data.replace(b"{", b'{"deep":' + DEEP.encode() + b"]" * 100_000 + b",", 1)
        self.write(file, self.pick([
            b"", data[:place], DEEP.encode(), data + b" " * (1 << 21), b"\xef\xbb\xbf" + data,
            data[:place] + self.rng.bytes(3) + data[place + 3 :], nested, data.replace(b"3", b"-3"),
            data.replace(b"{", b'{"deep":' + b"[" * 400 + b"]" * 400 + b",", 1),
        ]))  # fmt: skip

    def chunk(self, file: Path) -> None:
        data = bytearray(file.read_bytes())
        if not data:
            return
        for _ in range(int(self.rng.integers(1, 6))):
            data[int(self.rng.integers(len(data)))] = int(self.rng.integers(256))
        if self.rng.random() < 0.7:
            data[-4:] = crc32c(bytes(data[:-4])).to_bytes(4, "little")
        self.write(file, bytes(data))

    def write(self, file: Path, data: bytes) -> None:
        self.take(file)
        file.write_bytes(data)
        self.what.append(f"{file.relative_to(self.root)} = {data[:2000]!r}")

    def put(self, path: Path) -> None:
        """Put something else in place of a file, a pack or an array."""
        if self.rng.random() < 0.3 and "packs" in path.parts[:-1]:
            within = path.parts.index("packs") + 2
            path = Path(*path.parts[: within + int(self.rng.integers(0, 2))])
        kept = self.take(path)
        self.make(path, kept)

    def add(self, file: Path) -> None:
        """Put something odd beside what is there."""
        folders = sorted({f.parent for f in self.root.rglob("zarr.json")})
        folder = self.pick([*folders, *(self.root / place for place in PLACES * 3)])
        path = folder / self.pick(NAMES)
        if os.path.lexists(path):
            return
        if not folder.exists():
            folder.mkdir()
            self.undo.append((folder, None))
        self.undo.append((path, None))
        self.make(path, file)

    def make(self, path: Path, other: Path) -> None:
        kind = self.pick(
            ["folder", "pipe", "link", "link", "loop", "sparse", "text", "text", "none"]
        )
        if kind == "folder":
            path.mkdir()
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "link":
            path.symlink_to(self.pick([self.canary, self.canary / "secret", other]))
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "sparse":
            with open(path, "wb") as opened:
                opened.truncate(self.pick([1 << 25, 1 << 34, 1 << 42]))
        elif kind == "text":
            path.write_text(self.pick(TEXTS))
        self.what.append(f"{path.relative_to(self.root)!s} is a {kind}")

    def take_back(self) -> None:
        for path, kept in reversed(self.undo):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif os.path.lexists(path):
                path.unlink()
            if kept is not None:
                kept.rename(path)
        self.undo.clear()


def read_all(root: Path, mode: Any) -> None:
    """Read every record: each is right, or missing, or an error of ours."""
    try:
        store = Store(root, mode)
    except StoreError:
        return
    for kind, numbers in NUMBERS.items():
        right, keys = expected(numbers, kind), make_keys(numbers)
        for how, some in (("find", keys), ("read", keys[:1])):
            try:
                records = getattr(store.space(make_spec(kind)), how)(some)
            except StoreError:
                continue
            for record, one in zip(records, right, strict=False):
                assert content(record) in (None, one)


def keep(root: Path) -> None:
    """Do all that changes a cache."""
    jobs = [
        lambda: repair(root, verify(root)),
        lambda: [compact_space(space) for space in Store(root).spaces()],
        lambda: run_gc(Store(root), plan_gc(Store(root), max_age_seconds=1e6)),
        lambda: read_runs(root),
        lambda: inspect(Store(root), "f"),
        lambda: Store(root).claims.take(["a", "something", "-", "x" * 250]),
        lambda: Store(root).space(make_spec()).write(make_entries([77]), {}),
    ]
    for job in jobs:
        try:
            job()
        except FeatureCacheError:
            continue


def use(root: Path, *, changing: bool) -> None:
    read_all(root, "r")
    with suppress(StoreError):
        assert all(isinstance(finding, Finding) for finding in verify(root))
    if changing:
        read_all(root, "a")
        keep(root)
        read_all(root, "a")


def fuzz(folder: Path, seed: int, cases: int) -> None:
    def out_of_time(*_: Any) -> None:
        raise TimeoutError("a case takes too long")

    signal.signal(signal.SIGALRM, out_of_time)
    logging.disable()
    warnings.simplefilter("ignore")
    sys.setrecursionlimit(1000)
    canary, base, root = folder / "canary", folder / "base", folder / "cache"
    opened: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str):
            path = Path(arguments[0])
            follows = not (arguments[2] or 0) & os.O_NOFOLLOW
            real = os.path.realpath(path if follows else path.parent)
            if real.startswith(str(canary)):
                opened.append(str(path))

    canary.mkdir()
    (canary / "secret").write_text("{}")
    build(base)
    shutil.copytree(base, root)
    sys.addaudithook(watch)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + SPARE_BYTES, size + SPARE_BYTES))
    rng = np.random.default_rng(seed)
    for case in range(cases):
        changing = case % 8 == 7
        damage = Damage(root, canary, rng)
        signal.alarm(20)
        try:
            for _ in range(int(rng.integers(1, 3))):
                damage.do()
            use(root, changing=changing)
            assert not opened, opened
        except BaseException:
            print(f"seed {seed} case {case}: {damage.what}", file=sys.stderr)
            raise
        if changing:
            for path in (root, damage.aside):
                shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(base, root)
        else:
            damage.take_back()
    signal.alarm(0)


@pytest.mark.parametrize(("seed", "cases"), SEEDS)
def test_broken_caches_by_the_thousand(tmp_path: Path, seed: int, cases: int) -> None:
    print(f"seed {seed}")
    started = time.monotonic()
    assert wait(fork(lambda: fuzz(tmp_path, seed, cases))) == 0
    print(f"{cases} cases in {time.monotonic() - started:.0f} s")
