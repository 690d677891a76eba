from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_cache import FeatureCache, StoreError
from feature_cache.key import Record
from feature_cache.store import (
    CODECS,
    NewRecord,
    Pack,
    Space,
    Store,
    read_provenance,
    record_sources,
)
from feature_cache.store.filesystem import FileSystem
from feature_cache.store.maintenance import (
    compact,
    compact_space,
    last_uses,
    merge_packs,
    plan_gc,
    run_gc,
    verify,
)
from feature_cache.store.pack import NO_DIGEST, metadata_digest
from samples import (
    GRIDS,
    KINDS,
    content,
    contents,
    expected,
    flip,
    in_fork,
    make_entries,
    make_entry,
    make_key,
    make_keys,
    make_record,
    make_spec,
)


def described(number: int, kind: str = "regions") -> NewRecord:
    """A record of one of two movies, two draws, and a frame, in an order that is not its number."""
    source = {
        "movie": f"movie {number % 2}",
        "draw": [] if number % 4 < 2 else [{"flip": "x"}],
        "frame": 20 - number,
    }
    return NewRecord(make_key(number), make_record(number, kind), source)


def write_each(
    space: Space, numbers: Sequence[int], kind: str = "regions", codec: str = "raw"
) -> None:
    for number in numbers:
        space.write([described(number, kind)], {"writer": number}, codec)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_keys_bits_provenance_and_codec_are_kept(root: Path, kind: str, codec: str) -> None:
    space = Store(root).space(make_spec(kind))
    write_each(space, range(8), kind, codec)
    sources = dict(record_sources(space))
    report = compact_space(space)
    assert (report.merged, report.written, report.records, report.duplicates) == (8, 1, 8, 0)
    assert dict(record_sources(space)) == sources
    for reader in (space, Store(root, "r").space(make_spec(kind))):
        assert contents(reader, range(8)) == expected(range(8), kind)
    [name] = space.pack_names()
    assert Pack(space.packs_folder / name).features.codec == codec
    told = read_provenance(space.packs_folder / name)["compacted_from"]
    assert told == [{"writer": number} for number in range(8)]
    run_gc(Store(root), plan_gc(Store(root)))
    assert sorted(os.listdir(space.packs_folder)) == sorted([name, "zarr.json"])
    assert verify(root, deep=True) == []


def test_records_are_ordered_by_movie_draw_and_frame(root: Path, space: Space) -> None:
    write_each(space, range(12))
    compact_space(space)
    [name] = space.pack_names()
    sources = read_provenance(space.packs_folder / name)["records"]
    order = [(s["movie"], bool(s["draw"]), s["frame"]) for s in sources]
    assert order == sorted(order)
    labels = Pack(space.packs_folder / name).spans(0, 12)[0].labels
    held = [make_record(20 - source["frame"]).labels for source in sources]
    assert np.array_equal(labels, np.concatenate(held))


@pytest.mark.parametrize("codec", CODECS)
def test_a_second_run_does_nothing(root: Path, codec: str) -> None:
    space = Store(root).space(make_spec("grids"))
    zeros = np.zeros((16, 16, 8), "f2")  # much smaller when compressed
    for number in range(10):
        space.write(
            [NewRecord(make_key(number), Record(zeros, None), {"frame": number})], {}, codec
        )
    assert compact_space(space, target_bytes=3 * zeros.nbytes).written == 4
    names = space.pack_names()
    again = compact_space(Store(root).space(make_spec("grids")), target_bytes=3 * zeros.nbytes)
    assert (again.merged, again.written, again.records) == (0, 0, 0)
    assert space.pack_names() == names


def test_duplicates_go_also_from_large_packs(root: Path, space: Space) -> None:
    space.write(make_entries(range(8)), {})
    space.write(make_entries(range(4, 12)), {})
    report = compact_space(space, target_bytes=1)
    assert report.duplicates == 4
    assert contents(space, range(12)) == expected(range(12))
    assert verify(root) == []
    assert compact_space(space, target_bytes=1).merged == 0


def test_grids_of_different_shapes_and_codecs_stay_apart(root: Path) -> None:
    space = Store(root).space(make_spec("grids"))
    kinds = dict(enumerate(list(GRIDS) * 4))
    for number, kind in kinds.items():
        space.write([make_entry(number, kind)], {}, "zstd" if number % 2 else "raw")
    compact_space(space)
    packs = [Pack(space.packs_folder / name) for name in space.pack_names()]
    found = {(pack.features.shape[1:], pack.features.codec) for pack in packs}
    assert len(found) == len(packs) == 2 * len(GRIDS)
    right = [content(make_record(number, kind)) for number, kind in kinds.items()]
    assert contents(Store(root).space(make_spec("grids")), kinds) == right


@pytest.mark.parametrize("part", ["features/c.0.0", "index/c.0", "zarr.json"])
def test_a_damaged_pack_is_set_aside_and_the_others_merged(
    root: Path, space: Space, part: str
) -> None:
    names = [space.write([described(number)], {})[0] for number in range(1, 5)]
    file = space.packs_folder / names[1] / part
    flip(file, 5 if part != "zarr.json" else file.read_text().index("movie 0"))
    report = compact_space(Store(root).space(make_spec()))
    assert (report.merged, report.written, report.records) == (3, 1, 3)
    right = [*expected([1]), None, *expected([3, 4])]
    assert contents(Store(root).space(make_spec()), range(1, 5)) == right
    assert [names[1] in entry for entry in os.listdir(root / "quarantine")] == [True]
    assert verify(root) == []


def test_a_damaged_pack_that_can_not_be_moved_is_left_out(
    root: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [space.write([described(number)], {})[0] for number in range(1, 5)]
    flip(space.packs_folder / names[1] / "features/c.0.0", 5)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if "quarantine" in Path(target).parts:
            raise PermissionError(13, "no", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert compact_space(Store(root).space(make_spec())).records == 3


def test_the_newest_use_is_kept_and_another_compaction_is_waited_for(
    root: Path, space: Space
) -> None:
    write_each(space, range(3))
    for i, name in enumerate(space.pack_names()):
        os.utime(space.packs_folder / name, (0, 1e9 + i))
    claim = f"compact-{space.name}"
    Store(root).claims.take([claim])
    assert compact_space(space).busy
    Store(root).claims.release([claim])
    compact_space(space)
    [name] = space.pack_names()
    assert last_uses(space) == {name: 1e9 + 2}


def test_who_keeps_a_record_inherits_the_use_of_the_one_that_goes(root: Path, space: Space) -> None:
    space.write(make_entries(range(8)), {})
    [large] = space.pack_names()
    space.write(make_entries([3]), {})
    [small] = {*space.pack_names()} - {large}
    for name, used in [(large, 1e9), (small, 2e9)]:
        os.utime(space.packs_folder / name, (used, used))
    assert compact_space(space).duplicates == 1
    assert last_uses(space) == {large: 2e9}


def test_what_is_used_every_day_is_kept_apart_from_what_is_not(root: Path, space: Space) -> None:
    days = [0, 1, 5, 5, 20, 0, 21, 1, 22]
    write_each(space, range(len(days)))
    now = Store(root).presence.now()
    for name, days_ago in zip(space.pack_names(), days, strict=True):
        os.utime(space.packs_folder / name, (0, now - 86400 * (days_ago + 0.5)))
    compact_space(space)
    ages = sorted(round((now - used) / 86400 - 0.5) for used in last_uses(space).values())
    assert ages == [0, 1, 5, 20]
    assert compact_space(space).merged == 0
    assert contents(space, range(len(days))) == expected(range(len(days)))


def test_records_held_and_open_spaces_outlive_a_compaction(root: Path, space: Space) -> None:
    write_each(space, range(5))
    held = space.read(make_keys(range(5)))
    other = Store(root).space(make_spec())
    assert contents(other, range(5)) == expected(range(5))
    compact_space(space)
    run_gc(Store(root), plan_gc(Store(root)))
    assert [content(record) for record in held] == expected(range(5))
    for reader in (space, other):
        assert contents(reader, range(5)) == expected(range(5))


def test_a_merged_pack_that_can_not_be_removed_is_an_error_of_ours(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FeatureCache(root)
    space = cache.store.space(make_spec())
    write_each(space, range(3))
    old, real = set(space.pack_names()), os.rename

    def rename(source: Any, *more: Any, **options: Any) -> None:
        if Path(source).name in old:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, *more, **options)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StoreError, match=r"can't write in .*cache: Input/output error"):
        cache.compact()
    assert contents(cache.store.space(make_spec()), range(3)) == expected(range(3))
    monkeypatch.setattr(os, "rename", real)
    cache.compact()
    assert not old & set(os.listdir(space.packs_folder))


def test_what_is_damaged_while_it_is_merged_gets_no_new_checksum(space: Space) -> None:
    numbers = [1, 2, 3, 6, 7, 8]
    write_each(space, numbers)
    old = space.pack_names()

    def damage(_: int) -> None:
        for name in set(old) & set(space.pack_names()):
            flip(space.packs_folder / name / "features" / "c.0.0", 0)
        old.clear()

    compact_space(space, target_bytes=100, progress=damage)
    assert not old
    for number in numbers:
        fresh = Store(space.root).space(make_spec())
        assert contents(fresh, [number]) in ([None], expected([number]))


def test_more_packs_are_merged_than_files_may_be_open(
    root: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    import resource

    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(compact, "_OPEN_FILES", 8)
    numbers = range(1, 100)
    write_each(space, numbers)

    def check() -> None:
        limit = len(os.listdir("/proc/self/fd")) + 40
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        fresh = Store(root).space(make_spec())
        assert compact_space(fresh).merged == len(numbers)
        assert contents(fresh, numbers) == expected(numbers)

    in_fork(check)


@pytest.mark.parametrize("told", [5, None, "text", 1e308])
def test_what_another_program_says_of_a_pack_stops_no_compaction(
    root: Path, space: Space, told: Any
) -> None:
    space.write(make_entries([1]), {"compacted_from": told})
    space.write(make_entries([2]), {"by": "us"})
    if told == 1e308:  # more than a float can be, in a pack that is as it was written else
        for name in space.pack_names():
            file = space.packs_folder / name / "zarr.json"
            text = file.read_text()
            digest = json.loads(text)["attributes"]["feature_cache"]["digest"]
            text = text.replace("1e+308", "1e+999").replace(digest, NO_DIGEST)
            digest = metadata_digest(file.parent, text.encode())
            file.write_text(text.replace(NO_DIGEST, digest))
    for _ in range(2):
        compact_space(space)
        fresh = Store(root).space(make_spec())
        assert contents(fresh, [1, 2]) == expected([1, 2])
    assert len(verify(root)) == (told == 1e308)


@pytest.mark.parametrize("goes", ["a new pack", "a pack that stays"])
def test_a_pack_stays_where_the_one_that_holds_its_records_goes_meanwhile(
    space: Space, monkeypatch: pytest.MonkeyPatch, goes: str
) -> None:
    space.write(make_entries(range(8)), {})
    [large] = space.pack_names()
    for number in [3, 4]:
        space.write(make_entries([number, 20 + number]), {})
    old = space.pack_names()
    last_uses = compact.last_uses

    def look_late(space: Space) -> dict[str, float]:
        """See when packs were used, when one of them was just collected by another process."""
        new = {file.parent.name for file in space.packs_folder.glob("*/zarr.json")} - set(old)
        if new:
            monkeypatch.setattr(compact, "last_uses", last_uses)
            gone = large if goes == "a pack that stays" else new.pop()
            shutil.rmtree(space.packs_folder / gone)
        return last_uses(space)

    monkeypatch.setattr(compact, "last_uses", look_late)
    compact_space(space, target_bytes=make_entries([1])[0].record.features.nbytes * 8)
    assert compact.last_uses is last_uses
    left = [3, 4, 23, 24]
    assert contents(Store(space.root).space(make_spec()), left) == expected(left)


# While processes commit


def test_a_space_that_is_merged_as_it_grows_has_few_packs_and_all_records(space: Space) -> None:
    reader = Store(space.root, "r").space(make_spec())
    most = 0
    for number in range(300):
        space.write([described(number)], {})
        merge_packs(space)
        most = max(most, len(space.pack_names()))
        if number % 10 == 0:
            wanted = [0, number // 2, number]
            assert contents(reader, wanted) == expected(wanted)
    assert most <= 2 * 16
    assert contents(Store(space.root).space(make_spec()), range(300)) == expected(range(300))
    assert verify(space.root, deep=True) == []


def test_each_record_is_moved_a_few_times(space: Space) -> None:
    moved = 0
    for number in range(300):
        space.write([described(number)], {})
        moved += merge_packs(space).records
    assert moved < 2 * 300  # 16 at a time, and 16 times as many once


def test_while_another_process_merges_nothing_is_done(space: Space) -> None:
    write_each(space, range(16))
    Store(space.root).claims.take([f"compact-{space.name}"])
    assert merge_packs(space).busy
    assert len(space.pack_names()) == 16


def test_on_a_network_file_system_merged_packs_stay_for_readers_that_hear_late(
    root: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compact, "find_file_system", lambda _: FileSystem("nfs4", "/"))
    write_each(space, range(16))
    assert merge_packs(space).merged == 16
    write_each(space, range(16, 48))
    assert merge_packs(space).merged == 32  # those of before are not merged again
    assert len(space.pack_names()) == 16 + 1 + 32 + 1
    monkeypatch.setattr(compact, "NETWORK_GRACE_SECONDS", 0.0)
    merge_packs(space)
    assert len(space.pack_names()) == 2
    assert contents(space, range(48)) == expected(range(48))


def test_packs_that_a_process_merged_and_left_are_no_more_than_duplicates(
    root: Path, space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge_and_die() -> None:
        compact.find_file_system = lambda _: FileSystem("nfs4", "/")  # type: ignore[attr-defined]
        assert merge_packs(space).merged == 16

    write_each(space, range(16))
    in_fork(merge_and_die)
    space.refresh()
    assert len(space.pack_names()) == 17
    report = compact_space(space)
    assert (report.written, report.duplicates) == (0, 16)
    assert len(space.pack_names()) == 1
    assert contents(space, range(16)) == expected(range(16))
