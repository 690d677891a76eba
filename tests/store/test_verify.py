from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from feature_cache import CacheVersionError, CorruptRecordError, NotACacheError, StoreError
from feature_cache.key import Record
from feature_cache.store import Counter, NewRecord, Space, Store, Usage, read_provenance
from feature_cache.store.maintenance import (
    Finding,
    add_pin,
    compact_space,
    plan_gc,
    read_pins,
    repair,
    run_gc,
    verify,
)
from samples import (
    contents,
    die_at,
    expected,
    flip,
    fork,
    in_fork,
    make_entries,
    make_entry,
    make_key,
    make_spec,
    wait,
)

pytestmark = pytest.mark.filterwarnings(
    # zarr's event loop is a thread; that a fork survives it is what is tested.
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)

PACKS = (
    ("regions", range(5), "raw"),
    ("regions", range(5, 8), "zstd"),
    ("grids", range(3), "raw"),
    ("grids", range(3, 5), "blosc"),
)


@pytest.fixture
def sound(root: Path) -> Path:
    """A cache with packs of each kind, a pin and counters."""
    store = Store(root)
    for kind, numbers, codec in PACKS:
        entries = [
            NewRecord(
                entry.key,
                entry.record,
                {"movie": f"hela {kind}", "frame": number, "origin": "copy 2"},
            )
            for number, entry in zip(numbers, make_entries(numbers, kind), strict=True)
        ]
        store.space(make_spec(kind)).write(entries, {"by": "us"}, codec)
    add_pin(store, "hela grids")
    counter = Counter(store)
    counter.add(Usage(1, 2, 3))
    counter.save()
    assert verify(root) == verify(root, deep=True) == []
    return root


def numbers_of(kind: str) -> list[int]:
    return [number for one, numbers, _ in PACKS for number in numbers if one == kind]


def outcomes(root: Path) -> set[str]:
    """Read everything in mode "r"."""
    found = set()
    for kind in ("regions", "grids"):
        right = expected(numbers_of(kind), kind)
        for number, one in zip(numbers_of(kind), right, strict=True):
            try:
                [read] = contents(Store(root, "r").space(make_spec(kind)), [number])
            except StoreError:
                found.add("raised")
            else:
                found.add({None: "none", one: "right"}.get(read, "WRONG"))
    return found


def packs_of(root: Path, kind: str) -> list[Path]:
    space = Store(root, "r").space(make_spec(kind))
    return [space.packs_folder / name for name in space.pack_names()]


def cache_files(root: Path) -> list[Path]:
    """Give the files whose every bit is known or summed up."""
    folders = ("pins", "processes", "stats", "claims")
    return sorted(f for f in root.rglob("*") if f.is_file() and f.parent.name not in folders)


def problems(root: Path) -> list[Finding]:
    return [finding for finding in verify(root) if finding.kind != "duplicate"]


def is_found(root: Path) -> bool:
    try:
        return bool(verify(root))
    except CacheVersionError:
        return True  # the version itself


# One thing wrong


def test_a_flipped_bit_is_found_in_each_file(sound: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = set()
    for file in cache_files(sound):
        data = file.read_bytes()
        relative = file.relative_to(sound).parts
        arrays.update(relative[4:5])
        places = range(len(data)) if len(data) < 50 else rng.choice(len(data), 6, replace=False)
        for place in map(int, places):
            flip(file, place, int(rng.integers(8)))
            assert is_found(sound), (file, place)
            file.write_bytes(data)
    assert arrays == {"zarr.json", "features", "index"}
    assert verify(sound) == []


@pytest.mark.parametrize("how", ["truncated", "longer", "missing", "a folder", "a link", "a pipe"])
def test_a_file_that_is_none_any_more_is_found_repaired_and_never_wrong(
    sound: Path, how: str
) -> None:
    parts = {file: file.relative_to(sound).parts for file in cache_files(sound)}
    alike = {(*part[:3], *part[4:]): file for file, part in parts.items()}  # in other packs
    for file in alike.values():
        data = file.read_bytes()
        aside = file.rename(sound.parent / "aside")
        if how == "truncated":
            file.write_bytes(data[:-1])
        elif how == "longer":
            file.write_bytes(data + b" ")
        elif how == "a folder":
            file.mkdir()
        elif how == "a link":
            file.symlink_to(aside)
        elif how == "a pipe":
            os.mkfifo(file)
        assert is_found(sound), file
        if file != sound / "zarr.json":
            assert "WRONG" not in outcomes(sound), file
        if file.is_dir():
            file.rmdir()
        else:
            file.unlink(missing_ok=True)
        aside.rename(file)
    assert outcomes(sound) == {"right"}
    assert verify(sound) == []


@pytest.mark.parametrize("what", ["packs", "features", "index"])
def test_swapped_packs_are_found(root: Path, what: str) -> None:
    space = Store(root).space(make_spec("grids"))
    for numbers in (range(2), range(2, 4)):
        space.write(make_entries(numbers, "grids"), {})
    one, two = (space.packs_folder / name for name in space.pack_names())
    if what != "packs":
        one, two = one / what, two / what
    aside = one.rename(root.parent / "aside")
    two.rename(one)
    aside.rename(two)
    assert [finding.kind for finding in verify(root)] == ["damaged"] * 2
    with pytest.raises(CorruptRecordError):
        contents(Store(root, "r").space(make_spec("grids")), [0])
    repair(root, verify(root))
    assert verify(root) == []
    assert contents(Store(root).space(make_spec("grids")), range(4)) == [None] * 4


def test_a_damaged_pack_goes_to_quarantine_and_what_is_lost_is_named(sound: Path) -> None:
    pack = packs_of(sound, "grids")[0]
    [kept] = packs_of(sound, "grids")[1:]
    frames = [source["frame"] for source in read_provenance(pack)["records"]]
    flip(pack / "features" / "c.0.0.0.0", 9)
    [finding] = verify(sound)
    assert (finding.kind, finding.path) == ("damaged", pack)
    assert finding.lost == tuple(f"hela grids frame {frame} copy 2" for frame in frames)
    assert verify(sound, deep=True) == [finding]
    repair(sound, [finding])
    assert verify(sound) == []
    [aside] = (sound / "quarantine").iterdir()
    assert pack.name in aside.name
    assert packs_of(sound, "grids") == [kept]
    space = Store(sound).space(make_spec("grids"))
    right = expected(numbers_of("grids"), "grids")
    there = [one if n not in frames else None for n, one in enumerate(right)]
    assert contents(space, numbers_of("grids")) == there
    space.write(make_entries(frames, "grids"), {})
    assert contents(space, numbers_of("grids")) == right
    assert verify(sound) == []


def test_the_texts_of_groups_are_written_anew(sound: Path) -> None:
    space = Store(sound).space(make_spec())
    texts = [
        sound / "zarr.json",
        sound / "CACHEDIR.TAG",
        sound / "spaces" / "zarr.json",
        space.packs_folder / "zarr.json",
    ]
    before = [text.read_bytes() for text in texts]
    for damage in (lambda f: flip(f, 3), Path.unlink, lambda f: (f.unlink(), f.mkdir())):
        for text in texts:
            damage(text)
        assert {finding.path for finding in verify(sound)} == set(texts)
        repair(sound, verify(sound))
        assert verify(sound) == []
        assert [text.read_bytes() for text in texts] == before
    assert outcomes(sound) == {"right"}


@pytest.mark.parametrize("how", ["flipped", "missing", "another"])
def test_a_spec_is_written_anew_when_the_space_is_used(sound: Path, how: str) -> None:
    file = Store(sound).space(make_spec()).path / "zarr.json"
    if how == "flipped":
        flip(file, 90)
    elif how == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"last"', '"first"'))
    [finding] = verify(sound)
    kind = {"flipped": "damaged", "missing": "missing", "another": "spec"}[how]
    assert (finding.kind, finding.path) == (kind, file)
    repair(sound, [finding])
    Store(sound).space(make_spec())
    assert verify(sound) == []
    assert outcomes(sound) == {"right"}


def test_unknown_files_are_found_at_each_level_and_none_is_deleted(sound: Path) -> None:
    pack = packs_of(sound, "regions")[0]
    folders = [
        sound,
        sound / "spaces",
        pack.parent.parent,
        pack.parent,
        pack,
        pack / "features",
        sound / "pins",
        sound / "stats",
        sound / "retired",
        sound / "retired" / pack.parent.parent.name,
    ]
    for i, folder in enumerate(folders):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "notes-of-mine").write_text(f"important {i}")
    found = verify(sound)
    assert {finding.kind for finding in found} == {"unknown"}
    assert {finding.path for finding in found} == {f / "notes-of-mine" for f in folders}
    repair(sound, found)
    assert verify(sound) == []
    run_gc(Store(sound), plan_gc(Store(sound)))
    texts = {file.read_text() for file in (sound / "quarantine").iterdir()}
    assert texts == {f"important {i}" for i in range(len(folders))}
    assert outcomes(sound) == {"right"}


def test_a_damaged_pin_and_damaged_counters_are_set_aside(sound: Path) -> None:
    [pin], [run] = (list((sound / name).iterdir()) for name in ("pins", "stats"))
    for file in (pin, run):
        file.write_text(file.read_text()[:-5])
    assert {(f.kind, f.path) for f in verify(sound)} == {("damaged", pin), ("damaged", run)}
    repair(sound, verify(sound))
    assert verify(sound) == []
    assert read_pins(sound) == []


def test_leftovers_of_the_dead_are_found_and_those_of_the_living_are_not(sound: Path) -> None:
    def die() -> None:
        space = Store(sound).space(make_spec())
        Store(sound).claims.take(["mine"])
        die_at(1, "rename")
        space.write(make_entries([50]), {})

    def wait_for_ever() -> None:
        Store(sound).claims.take(["theirs"])
        Store(sound).space(make_spec()).packs_folder.joinpath(
            f".tmp-{Store(sound).presence.name}-0123"
        ).mkdir()
        (sound / "ready").touch()
        time.sleep(100)

    child = fork(wait_for_ever)
    while not (sound / "ready").exists():
        time.sleep(0.01)
    (sound / "ready").unlink()
    assert wait(fork(die)) == -signal.SIGKILL
    dead = verify(sound)
    assert {finding.kind for finding in dead} == {"leftover"}
    assert sorted(finding.path.parent.name for finding in dead) == ["claims", "packs", "processes"]
    repair(sound, dead)
    assert verify(sound) == []
    assert len(list(sound.rglob(".tmp-*"))) == 1
    os.kill(child, signal.SIGKILL)
    wait(child)
    assert len(verify(sound)) == 3
    repair(sound, verify(sound))
    assert verify(sound) == []
    assert not list(sound.rglob(".tmp-*"))


def test_duplicates_are_named_and_compact_drops_them(root: Path, space: Space) -> None:
    space.write(make_entries([1, 2]), {})
    space.write(make_entries([2, 3]), {})
    other = Record(np.zeros((1, 8), "f2"), np.ones(1, "i4"))
    space.write([NewRecord(make_key(3), other, {})], {})
    found = verify(root)
    assert {finding.kind for finding in found} == {"duplicate"}
    assert any("1 of them with other numbers" in finding.message for finding in found)
    repair(root, found)
    assert compact_space(space).duplicates == 2
    assert verify(root) == []
    assert contents(space, [1, 2]) == expected([1, 2])


def test_what_is_no_cache_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotACacheError):
        verify(tmp_path)
    with pytest.raises(StoreError):
        verify(tmp_path / "nowhere")


def test_a_root_of_any_name_is_repaired(tmp_path: Path) -> None:
    root = tmp_path / "spaces" / "a" / "packs"
    Store(root).space(make_spec()).write(make_entries([1]), {})
    flip(root / "CACHEDIR.TAG", 1)
    repair(root, verify(root))
    assert verify(root) == []
    assert os.listdir(tmp_path) == ["spaces"]


# Beside others


def test_a_pack_written_anew_under_the_same_name_is_not_set_aside(sound: Path) -> None:
    pack = packs_of(sound, "regions")[0]
    intact = sound.parent / "intact"
    shutil.copytree(pack, intact)
    flip(pack / "index" / "c.0", 3)
    found = verify(sound)
    shutil.rmtree(pack)
    intact.rename(pack)
    repair(sound, found)
    assert verify(sound) == []
    assert outcomes(sound) == {"right"}


@pytest.mark.slow
def test_nothing_is_found_while_others_write_compact_and_collect(root: Path) -> None:
    Store(root)
    stop = root.parent / "stop"
    jobs: list[Callable[[], None]] = [
        lambda: _write_until(root, stop, 0),
        lambda: _write_until(root, stop, 1),
        lambda: _tidy_until(root, stop),
    ]
    children = [fork(job) for job in jobs]
    until, seen = time.time() + 6, 0
    while time.time() < until:
        assert problems(root) == []
        seen += 1
    stop.touch()
    assert [wait(child) for child in children] == [0, 0, 0]
    assert seen > 3
    repair(root, [finding for finding in verify(root) if finding.kind == "leftover"])
    assert problems(root) == []
    assert not (root / "quarantine").exists()


def _write_until(root: Path, stop: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    while not stop.exists():
        space = Store(root).space(make_spec("grids" if rng.integers(2) else "regions"))
        kind = "regions" if space.spec["pooling"] else "grids"
        numbers = rng.choice(30, 3, replace=False).tolist()
        space.write([make_entry(number, kind) for number in numbers], {})
        read = contents(space, numbers)
        assert all(a in (b, None) for a, b in zip(read, expected(numbers, kind), strict=True))


def _tidy_until(root: Path, stop: Path) -> None:
    while not stop.exists():
        store = Store(root)
        for space in store.spaces():
            compact_space(space, target_bytes=1 << 12)
        run_gc(store, plan_gc(store, max_bytes=60_000))
        store.presence.refresh()


def test_verify_in_a_folder_that_can_only_be_read(sound: Path, public_folder: Path) -> None:
    root = public_folder / "cache"
    shutil.copytree(sound, root)

    def check() -> None:
        assert verify(root, deep=True) == []
        with pytest.raises(StoreError, match="no permission"):
            repair(root, [Finding("unknown", root / "CACHEDIR.TAG", "")])

    in_fork(check, uid=65534)
    meta = json.loads((root / "zarr.json").read_bytes())
    assert meta["node_type"] == "group"
