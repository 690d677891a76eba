from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash
import zarr

from feature_cache import CorruptRecordError, StoreError, UnknownNameError
from feature_cache.key import Record
from feature_cache.store import CODECS, NewRecord, Pack, Space, Store, read_provenance
from feature_cache.store.maintenance import verify
from feature_cache.store.pack_contents import read_keys
from feature_cache.store.writer import write_pack
from samples import (
    GRIDS,
    KINDS,
    WIDTH,
    content,
    contents,
    expected,
    flip,
    in_fork,
    make_entries,
    make_key,
    make_keys,
    make_record,
    make_spec,
)

pytestmark = pytest.mark.filterwarnings(
    # zarr's event loop is a thread; that a fork survives it is what is tested.
    "ignore:.*multi-threaded, use of fork:DeprecationWarning"
)


# What plain zarr reads


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("kind", KINDS)
def test_zarr_reads_what_we_read_bit_for_bit(
    tmp_path: Path, kind: str, dtype: str, codec: str
) -> None:
    entries = make_entries(range(7), kind, dtype)
    name = write_pack(tmp_path, entries, {}, codec)
    pack, group = Pack(tmp_path / name), zarr.open_group(tmp_path / name, mode="r")
    arrays: dict[str, Any] = {name: array[...] for name, array in group.arrays()}
    assert set(arrays) == {"index", "features"}
    dtypes = {"keys": "u1", "checksums": "<u8", "offsets": "<i8", "labels": "<i4"}
    for part, (start, stop) in group["index"].attrs["parts"].items():  # type: ignore[union-attr]
        arrays[part] = arrays["index"][start:stop].view(dtypes[part])
    regions = {"offsets", "labels"} if kind not in GRIDS else set()
    assert set(arrays) == {"index", "features", "keys", "checksums", *regions}
    assert arrays["keys"].tobytes() == make_keys(range(7)).tobytes() == pack.keys.tobytes()
    for row, entry in enumerate(entries):
        if kind in GRIDS:
            read = Record(arrays["features"][row], None)
        else:
            rows = slice(*arrays["offsets"][row : row + 2])
            read = Record(arrays["features"][rows], arrays["labels"][rows])
        assert content(read) == content(pack.record(row)) == content(entry.record)
        labels = b"" if read.labels is None else read.labels.tobytes()
        assert arrays["checksums"][row] == xxhash.xxh3_64_intdigest(
            entry.key
            + np.array(read.features.shape, "<i8").tobytes()
            + labels
            + read.features.tobytes()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_raw_features_are_one_file_of_plain_numbers(tmp_path: Path, kind: str) -> None:
    pack = tmp_path / write_pack(tmp_path, make_entries(range(5), kind), {})
    features = zarr.open_array(pack / "features", mode="r")
    data = b"".join(file.read_bytes() for file in (pack / "features").glob("c.*"))
    if kind in GRIDS:
        assert (features.chunks, features.shards) == ((1, *GRIDS[kind]), features.shape)
        size = features[0].nbytes + 4  # with its CRC
        parts = [data[i * size : (i + 1) * size - 4] for i in range(5)]
        assert parts == [make_record(i, kind).features.tobytes() for i in range(5)]
    elif kind == "regions":
        assert features.chunks == features.shape == (10, WIDTH)
        assert data[:-4] == features[...].tobytes()
    else:
        assert features.shape == (0, WIDTH)
        assert not data


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["regions", "grids"])
def test_a_pack_takes_eight_files_and_folders(tmp_path: Path, kind: str, codec: str) -> None:
    pack = tmp_path / write_pack(tmp_path, make_entries(range(100), kind), {}, codec)
    assert len([pack, *pack.rglob("*")]) == 8


def test_zeros_are_stored_as_chunks_too(tmp_path: Path) -> None:
    zeros = Record(np.zeros(GRIDS["grids"], "f2"), None)
    entries = [*make_entries([1], "grids"), NewRecord(make_key(0), zeros, {})]
    pack = Pack(tmp_path / write_pack(tmp_path, [*entries, *make_entries([2], "grids")], {}))
    for row, record in enumerate([make_record(1, "grids"), zeros, make_record(2, "grids")]):
        assert content(pack.record(row)) == content(record)


@pytest.mark.parametrize("codec", CODECS)
def test_records_of_another_memory_layout_are_stored_in_ours(tmp_path: Path, codec: str) -> None:
    grid = np.arange(96, dtype="f4").reshape(WIDTH, 4, 3).T
    rows = np.arange(96, dtype="f4").reshape(24, 4)[::-2, ::-1]
    for key, record in enumerate(
        (Record(grid, None), Record(rows, np.arange(12, dtype=">i8").astype(">i4")))
    ):
        pack = Pack(
            tmp_path / write_pack(tmp_path, [NewRecord(make_key(key), record, {})], {}, codec)
        )
        read = pack.record(0)
        assert np.array_equal(read.features, record.features)
        assert read.labels is None or read.labels.tolist() == list(range(12))


def test_big_compressed_regions_are_chunked_and_read_across_chunks(tmp_path: Path) -> None:
    features = np.random.default_rng(0).random((20_000, 64), np.float32)
    labels = np.arange(20_000, dtype=np.int32)
    records = [Record(features[i : i + 5000], labels[i : i + 5000]) for i in range(0, 20_000, 5000)]
    entries = [NewRecord(make_key(i), record, {}) for i, record in enumerate(records)]
    pack = Pack(tmp_path / write_pack(tmp_path, entries, {}, "blosc"))
    assert zarr.open_array(pack.path / "features", mode="r").nchunks > 1
    assert [content(pack.record(i)) for i in (3, 0, 2, 1)] == [
        content(records[i]) for i in (3, 0, 2, 1)
    ]
    features = pack.record(1).features
    base = features.base
    assert base is None or base.nbytes == features.nbytes  # not of whole chunks


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_pack_is_read_where_no_thread_starts(
    root: Path, kind: str, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = Store(root).space(make_spec(kind))
    space.write(make_entries(range(5), kind), {}, codec)

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("cannot schedule new futures after shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", refuse)
    assert contents(space, range(5)) == expected(range(5), kind)


@pytest.mark.parametrize("codec", CODECS)
def test_a_grid_that_is_too_large_to_decode_is_stored_as_it_is(
    root: Path, codec: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = make_record(0, "grids").features.nbytes - 1
    for module in ("array", "writer"):
        monkeypatch.setattr(f"feature_cache.store.{module}.DECODED_LIMIT", limit)
    space = Store(root).space(make_spec("grids"))
    space.write(make_entries(range(3), "grids"), {}, codec)
    assert contents(space, range(3)) == expected(range(3), "grids")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", KINDS)
def test_records_are_read_only(tmp_path: Path, kind: str, codec: str) -> None:
    pack = Pack(tmp_path / write_pack(tmp_path, make_entries([3], kind), {}, codec))
    record = pack.record(0)
    assert not record.features.flags.writeable
    assert record.labels is None or not record.labels.flags.writeable


def test_records_outlive_their_pack(tmp_path: Path) -> None:
    folder = tmp_path / write_pack(tmp_path, make_entries([3]), {})
    record = Pack(folder).record(0)
    shutil.rmtree(folder)
    assert content(record) == content(make_record(3))


def test_a_pack_that_was_closed_is_opened_and_verified_again(tmp_path: Path) -> None:
    pack = Pack(tmp_path / write_pack(tmp_path, make_entries(range(1, 4)), {}))
    assert content(pack.record(0)) == content(make_record(1))
    pack.close()
    pack.close()
    assert content(pack.record(0)) == content(make_record(1))
    pack.close()
    flip(pack.path / "features" / "c.0.0", 0)
    with pytest.raises(CorruptRecordError, match="fails its checksum"):
        pack.record(0)


def test_provenance_is_kept_for_people_and_zarr(tmp_path: Path) -> None:
    pack = tmp_path / write_pack(tmp_path, make_entries([3, 4]), {"host": "here"})
    told = {"host": "here", "records": [{"frame": 3}, {"frame": 4}]}
    assert read_provenance(pack) == told
    assert zarr.open_group(pack, mode="r").attrs["provenance"] == told


# What is refused


@pytest.mark.parametrize(
    "entries",
    [
        [],
        make_entries([1, 1]),
        [*make_entries([1]), *make_entries([2], "regions", "float32")],
        [NewRecord(make_key(1), Record(np.zeros((2, 3)), np.zeros(2, "i4")), {})],
        [NewRecord(make_key(1), Record(np.zeros((2, 3), ">f2"), np.zeros(2, "i4")), {})],
        [NewRecord(make_key(1), Record(np.zeros((2, 3), "f2"), np.zeros(3, "i4")), {})],
        [NewRecord(make_key(1), Record(np.zeros(3, "f2"), None), {})],
        [NewRecord(b"short", Record(np.zeros((2, 3), "f2"), np.zeros(2, "i4")), {})],
        [*make_entries([1]), *make_entries([2], "grids")],
    ],
    ids=["none", "twice", "dtypes", "float64", "endian", "labels", "flat", "key", "kinds"],
)
def test_entries_that_could_not_be_read_back_are_refused(
    tmp_path: Path, entries: list[NewRecord]
) -> None:
    with pytest.raises(ValueError, match=r"expected|twice|dimension"):
        write_pack(tmp_path, entries, {})
    assert not os.listdir(tmp_path)


def test_an_unknown_codec_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="blosc"):
        write_pack(tmp_path, make_entries([1]), {}, "bloscc")
    assert not os.listdir(tmp_path)


# Damage

Damaged = tuple[Space, list[int], Path]


@pytest.fixture(
    params=[
        ("regions", "raw"),
        pytest.param(("grids", "raw"), marks=pytest.mark.slow),
        pytest.param(("regions", "zstd"), marks=pytest.mark.slow),
    ],
    ids="-".join,
)
def pack(request: pytest.FixtureRequest, root: Path) -> Damaged:
    """A read-only space, the numbers of its records, and the one pack that they are in."""
    kind, codec = request.param
    writable = Store(root).space(make_spec(kind))
    writable.write(make_entries(range(5), kind), {"by": "us"}, codec)
    [name] = writable.pack_names()
    space = Store(root, "r").space(make_spec(kind))
    return space, list(range(5)), space.packs_folder / name


def kind_of(space: Space) -> str:
    return "regions" if space.spec["pooling"] else "grids"


def outcomes(space: Space, numbers: list[int]) -> set[str]:
    """Read every record alone, in a reader that has nothing open."""
    found = set()
    for number in numbers:
        reader = Space(space.path, space.spec, "r")
        try:
            [read] = contents(reader, [number])
        except CorruptRecordError:
            found.add("raised")
        else:
            found.add("right" if read == expected([number], kind_of(space))[0] else "WRONG")
    return found


def flips(data: bytes) -> Iterator[bytes]:
    """Flip one bit of each byte."""
    bits = 1 << np.random.default_rng(len(data)).integers(0, 8, len(data), np.uint8)
    for place, bit in enumerate(bits.tolist()):
        yield data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]


def holds_number(folder: Path, kind: str, size: int, place: int) -> bool:
    """Tell whether a byte of the file of the features is one of a number, and not of a CRC."""
    if kind == "regions":
        return place < size - 4
    grid = make_record(0, kind).features.nbytes + 4
    rows = len(Pack(folder))
    return place < rows * grid and place % grid < grid - 4


def chunk_files(pack: Path) -> list[Path]:
    return sorted(file for file in pack.rglob("*") if file.is_file() and file.name != "zarr.json")


def test_a_flipped_bit_in_a_chunk_raises(pack: Damaged) -> None:
    space, numbers, folder = pack
    arrays = set()
    for file in chunk_files(folder):
        data, array = file.read_bytes(), file.relative_to(folder).parts[0]
        concerned = numbers if array == "features" else [4]
        arrays.add(array)
        numeric = [holds_number(folder, kind_of(space), len(data), i) for i in range(len(data))]
        for place, damaged in enumerate(flips(data)):
            file.write_bytes(damaged)
            found = outcomes(space, concerned)
            assert "WRONG" not in found, (file, place)
            if "raised" not in found:  # a CRC, which zarr and verify look at
                assert array == "features", (file, place)
                assert not numeric[place], (file, place)
                assert [one.kind for one in verify(space.root)] == ["damaged"]
        file.write_bytes(data)
    assert outcomes(space, numbers) == {"right"}
    assert arrays == set(os.listdir(folder)) - {"zarr.json"}


def test_a_flipped_bit_in_metadata_never_gives_a_wrong_number(pack: Damaged) -> None:
    space, numbers, folder = pack
    raised = 0
    for file in sorted(folder.rglob("zarr.json")):
        data = file.read_bytes()
        for place, damaged in enumerate(flips(data)):
            file.write_bytes(damaged)
            found = outcomes(space, [4])
            assert "WRONG" not in found, (file, place)
            raised += "raised" in found
        file.write_bytes(data)
    assert raised > 100
    assert outcomes(space, numbers) == {"right"}


def test_places_that_are_no_whole_numbers_or_in_another_order(tmp_path: Path) -> None:
    pack = tmp_path / write_pack(tmp_path, make_entries(range(3)), {})
    file = pack / "index" / "zarr.json"
    metadata = json.loads(file.read_bytes())
    parts = metadata["attributes"]["parts"]
    floats = {name: [float(place) for place in places] for name, places in parts.items()}
    for same in (floats, dict(reversed(parts.items()))):
        file.write_text(json.dumps({**metadata, "attributes": {"parts": same}}))
        assert np.array_equal(read_keys(pack), make_keys(range(3)))
        assert content(Pack(pack).record(2)) == content(make_record(2))
    for other in ({**parts, "keys": [0, 12.5]}, {**parts, "keys": [0.5, 12]}, {**floats, "a": 1}):
        file.write_text(json.dumps({**metadata, "attributes": {"parts": other}}))
        with pytest.raises(CorruptRecordError, match="don't make an index"):
            read_keys(pack)


def test_the_width_of_empty_records_is_checked(root: Path) -> None:
    space = Store(root).space(make_spec())
    space.write(make_entries(range(3), "empty"), {})
    [meta] = space.packs_folder.glob("*/features/zarr.json")
    changed = json.loads(meta.read_bytes())
    changed["shape"] = [0, WIDTH + 1]
    meta.write_text(json.dumps(changed))
    with pytest.raises(CorruptRecordError, match="sizes"):
        contents(Store(root, "r").space(make_spec()), range(3))


def test_a_truncated_file_raises_and_kills_nobody(pack: Damaged) -> None:
    space, numbers, folder = pack

    def check() -> None:
        for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
            data = file.read_bytes()
            for length in {0, 1, 4, len(data) // 2, len(data) - 4, len(data) - 1, len(data) + 1}:
                file.write_bytes((data + b"\0")[:length])
                own = file == folder / "zarr.json"
                assert outcomes(space, [4]) == {"right" if own else "raised"} or (
                    file.name == "zarr.json" and length > len(data) - 2  # a last newline
                ), (file, length)
            file.write_bytes(data)

    in_fork(check)
    assert outcomes(space, numbers) == {"right"}


def test_a_deleted_file_raises(pack: Damaged) -> None:
    space, numbers, folder = pack
    for file in (file for file in sorted(folder.rglob("*")) if file.is_file()):
        aside = file.rename(folder.parent / "aside")
        found = outcomes(space, numbers)
        assert found <= {"right", "raised"}
        assert "raised" in found or file == folder / "zarr.json", file
        aside.rename(file)
    assert outcomes(space, numbers) == {"right"}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("kind", ["regions", "grids", "stacks"])
def test_swapped_features_of_packs_of_equal_shape_are_found(
    root: Path, kind: str, codec: str
) -> None:
    space = Store(root).space(make_spec(kind))
    for numbers in ([1, 2], [6, 7]):  # equal numbers of regions too
        space.write(make_entries(numbers, kind), {}, codec)
    one, two = (space.packs_folder / name / "features" for name in space.pack_names())
    assert zarr.open_array(one, mode="r").shape == zarr.open_array(two, mode="r").shape
    aside = one.rename(root / "aside")
    two.rename(one)
    aside.rename(two)
    assert outcomes(space, [1, 2, 6, 7]) == {"raised"}


def test_swapped_records_inside_a_pack_are_found(root: Path) -> None:
    space = Store(root).space(make_spec("grids"))
    space.write(make_entries(range(3), "grids"), {})
    [file] = space.packs_folder.glob("*/features/c.*")
    data, size = file.read_bytes(), make_record(0, "grids").features.nbytes + 4
    file.write_bytes(data[size : 2 * size] + data[:size] + data[2 * size :])
    assert outcomes(space, [0, 1]) == {"raised"}
    assert outcomes(space, [2]) == {"right"}


# Commit


def test_the_same_entries_make_one_pack(tmp_path: Path) -> None:
    names = {write_pack(tmp_path, make_entries([1, 2, 3]), {"time": i}) for i in range(3)}
    assert os.listdir(tmp_path) == list(names)
    assert write_pack(tmp_path, make_entries([3, 2, 1]), {}) not in names
    assert write_pack(tmp_path, make_entries([1, 2]), {}) not in names


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Log every fsync, and every rename with the files and folders that it moves."""
    log: list[tuple[str, ...]] = []
    fsync, rename = os.fsync, os.rename

    def logged_fsync(descriptor: int) -> None:
        fsync(descriptor)
        log.append(("fsync", str(Path(f"/proc/self/fd/{descriptor}").readlink())))

    def logged_rename(source: Any, target: Any) -> None:
        inside = [str(path) for path in Path(source).rglob("*")]
        rename(source, target)
        log.append(("rename", str(source), str(target), *inside))

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    return log


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names files by /proc")
@pytest.mark.parametrize("kind", ["regions", "empty", "grids"])
def test_all_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, calls: list[tuple[str, ...]], kind: str
) -> None:
    name = write_pack(tmp_path, make_entries(range(3), kind), {})
    [renamed] = [i for i, call in enumerate(calls) if call[0] == "rename"]
    _, source, target, *inside = calls[renamed]
    before = [path for _, path in calls[:renamed]]
    assert Path(target) == tmp_path / name
    assert {source, *inside} <= set(before)
    for path in inside:
        assert before.index(path) < before.index(str(Path(path).parent))
    assert ("fsync", str(tmp_path)) in calls[renamed:]


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="names files by /proc")
def test_the_folders_above_a_new_space_are_synced(
    root: Path, space: Space, calls: list[tuple[str, ...]]
) -> None:
    space.write(make_entries([1]), {})
    calls.clear()
    second = Store(root).space(make_spec("grids"))
    second.write(make_entries([1], "grids"), {})
    synced = {path for call, path, *_ in calls if call == "fsync"}
    for folder in (root, root / "spaces", second.path, second.packs_folder):
        assert str(folder) in synced
    # Before its own zarr.json, which is written beside `packs`: who sees it syncs nothing again.
    named = [i for i, (_, path, *_) in enumerate(calls) if Path(path).parent == second.path]
    named = [i for i in named if calls[i][1] != str(second.packs_folder)]
    before = {path for call, path, *_ in calls[: named[0]] if call == "fsync"}
    for folder in (root, root / "spaces", second.path, second.packs_folder):
        assert str(folder) in before


def test_temporary_folders_are_in_the_same_folder_and_unique(
    tmp_path: Path, calls: list[tuple[str, ...]]
) -> None:
    for _ in range(3):
        write_pack(tmp_path, make_entries([1]), {})
    write_pack(tmp_path, make_entries([2]), {})
    sources = {Path(call[1]) for call in calls if call[0] == "rename"}
    assert len(sources) == 2  # renames that fail are not logged
    assert {source.parent for source in sources} == {tmp_path}
    assert all(source.name.startswith(".tmp-") for source in sources)


def test_a_temporary_folder_is_no_pack(space: Space) -> None:
    space.write(make_entries([1]), {})
    space.write(make_entries([2]), {})
    [half] = (name for name in space.pack_names() if holds(space.packs_folder / name, 2))
    (space.packs_folder / half).rename(space.packs_folder / f".tmp-host-1-{half}")
    reader = Space(space.path, space.spec, "r")
    assert contents(reader, [1, 2]) == [*expected([1]), None]
    assert len(reader.pack_names()) == 1


def holds(pack: Path, number: int) -> bool:
    return make_key(number) in {key.tobytes() for key in read_keys(pack)}


@pytest.mark.parametrize("failing", [1, 3, 7, -1], ids=["first", "third", "seventh", "folder"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_failed_sync_leaves_nothing(
    space: Space, monkeypatch: pytest.MonkeyPatch, failing: int, code: int
) -> None:
    space.write(make_entries([1]), {})
    real, seen = os.fsync, 0

    def fsync(descriptor: int) -> None:
        nonlocal seen
        seen += 1
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if seen == failing or (failing == -1 and folder):
            raise OSError(code, os.strerror(code))
        real(descriptor)

    there = sorted(space.packs_folder.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(StoreError, match=os.strerror(code)):
            space.write(make_entries([2, 3]), {})
    assert sorted(space.packs_folder.iterdir()) == there
    assert contents(space, [1, 2]) == [*expected([1]), None]
    space.write(make_entries([2, 3]), {})
    assert contents(space, [1, 2, 3]) == expected([1, 2, 3])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 512 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no permission to mount a small file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_nothing(small_disk: Path) -> None:
    space = Store(small_disk / "cache").space(make_spec())
    space.write(make_entries([1]), {})
    there = sorted(space.packs_folder.iterdir())
    big = Record(np.ones((40_000, WIDTH), "f2"), np.arange(40_000, dtype="i4"))
    with pytest.raises(StoreError, match="No space left"):
        space.write([NewRecord(make_key(2), big, {})], {})
    assert sorted(space.packs_folder.iterdir()) == there
    space.write(make_entries([3]), {})
    assert contents(space, [1, 2, 3]) == [*expected([1]), None, *expected([3])]


@pytest.mark.parametrize("kind", ["regions", "grids"])
def test_permissions_follow_the_folder(tmp_path: Path, kind: str) -> None:
    tmp_path.chmod(0o2770)
    before = os.umask(0o007)
    try:
        pack = tmp_path / write_pack(tmp_path, make_entries([1], kind), {})
    finally:
        os.umask(before)
    for path in (pack, *pack.rglob("*")):
        wanted = 0o2770 if path.is_dir() else 0o660
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path


# Many records at once


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_more_grids_can_be_held_than_files_may_be_open(tmp_path: Path, codec: str) -> None:
    import resource

    pack = tmp_path / write_pack(tmp_path, make_entries(range(200), "cells"), {}, codec)

    def check() -> None:
        Pack(pack).record(0)
        limit = len(os.listdir("/proc/self/fd")) + 64
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        held = [Pack(pack).record(row) for row in range(200)]
        assert list(map(content, held)) == expected(range(200), "cells")

    in_fork(check)
