"""Remotes: a real S3 endpoint over HTTP on this host, and folders."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_cache.errors import (
    CacheVersionError,
    CorruptRecordError,
    MissingDependencyError,
    NotACacheError,
    StoreError,
    UnknownNameError,
)
from feature_cache.key import Record
from feature_cache.store import NewRecord, Space, Store
from feature_cache.store.pack import check_pack
from feature_cache.store.remote import (
    PIECE_BYTES,
    Remote,
    RemoteSpace,
    open_remote,
    plan_pull,
    plan_push,
    pull,
    push,
)
from feature_cache.store.remote.connection import connect
from s3_server import aws, bucket, endpoint, service
from samples import (
    KINDS,
    contents,
    expected,
    in_fork,
    make_entries,
    make_key,
    make_keys,
    make_spec,
)

__all__ = ["aws", "bucket", "endpoint", "service"]

obstore = pytest.importorskip("obstore")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:.*multi-threaded, use of fork:DeprecationWarning"  # the child only raises an error
    ),
]
QUICK = {"max_retries": 0, "retry_timeout": timedelta(seconds=5)}


@pytest.fixture
def s3(bucket: Any) -> Remote:
    return open_remote(f"s3://{bucket.name}/some/prefix")


@pytest.fixture(params=["s3", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "file":
        return open_remote(f"file://{tmp_path}/remote folder")
    return request.getfixturevalue("s3")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Where another machine has its cache."""
    return tmp_path / "other" / "cache"


def read_all(root: Path, numbers: Sequence[int], kind: str = "regions") -> list[Any]:
    return contents(Store(root, "r").space(make_spec(kind)), numbers)


def object_names(bucket: Any) -> list[str]:
    return sorted(item.key for item in bucket.objects.all())


def pack_objects(bucket: Any) -> list[str]:
    return [name for name in object_names(bucket) if "/packs/" in name and "packs/zarr" not in name]


def files_below(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*"))


def committed(root: Path) -> list[str]:
    """All that lies in folders of packs, temporary or not."""
    return sorted(path.name for path in root.glob("spaces/*/packs/*") if path.name != "zarr.json")


def run_child(target: Callable[..., None], *args: Any) -> int:
    child = multiprocessing.get_context("spawn").Process(target=target, args=args)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def die_after(count: int) -> Callable[[int], None]:
    """Give a progress that kills its process the moment it is told `count` times."""
    told = 0

    def progress(_: int) -> None:
        nonlocal told
        told += 1
        if told == count:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def pull_and_die(root: Path, url: str, count: int) -> None:
    pull(root, open_remote(url), progress=die_after(count))


def push_and_die(root: Path, url: str, count: int) -> None:
    push(root, open_remote(url), progress=die_after(count))


class TestPushAndPull:
    @pytest.mark.parametrize("codec", ["raw", "zstd"])
    def test_records_come_back_bit_for_bit(self, root, remote, other, codec):
        numbers = {kind: range(5 * i, 5 * i + 3) for i, kind in enumerate(KINDS)}
        for kind in KINDS:
            entries = make_entries(numbers[kind], kind)
            Store(root).space(make_spec(kind)).write(entries, {"by": "me"}, codec)

        sent = push(root, remote)
        fetched = pull(other, remote)

        assert (sent.packs, sent.present, sent.failures) == (len(KINDS), 0, ())
        assert fetched == sent
        for kind in KINDS:
            assert read_all(other, numbers[kind], kind) == expected(numbers[kind], kind)
        assert files_below(other / "spaces") == files_below(root / "spaces")
        for name in files_below(root / "spaces"):
            if (root / "spaces" / name).is_file():
                same = (root / "spaces" / name).read_bytes()
                assert (other / "spaces" / name).read_bytes() == same

    def test_again_nothing_is_moved(self, root, space, remote, other):
        space.write(make_entries(range(3)), {})
        space.write(make_entries(range(3, 6)), {})
        push(root, remote)
        pull(other, remote)
        for report in (push(root, remote), pull(other, remote), push(other, remote)):
            assert (report.packs, report.bytes, report.present) == (0, 0, 2)

    def test_only_what_is_missing_is_moved(self, root, space, remote, other):
        space.write(make_entries(range(3)), {})
        push(root, remote)
        pull(other, remote)
        space.write(make_entries(range(3, 6)), {})
        sent, fetched = push(root, remote), pull(other, remote)
        assert (sent.packs, sent.present) == (fetched.packs, fetched.present) == (1, 1)
        assert read_all(other, range(6)) == expected(range(6))

    def test_both_sides_end_with_all(self, root, space, remote, other):
        space.write(make_entries(range(3)), {})
        Store(other).space(make_spec()).write(make_entries(range(3, 6)), {})
        for each in (root, other):
            push(each, remote)
        for each in (root, other):
            pull(each, remote)
            assert read_all(each, range(6)) == expected(range(6))

    def test_progress_adds_up_to_the_plan(self, root, space, remote, other):
        space.write(make_entries(range(9)), {})
        space.write(make_entries(range(9, 12)), {})
        plan, told = plan_push(root, remote), []
        report = push(root, remote, plan=plan, progress=told.append)
        assert sum(told) == plan.bytes == report.bytes > 0
        plan, told = plan_pull(other, remote), []
        report = pull(other, remote, plan=plan, progress=told.append)
        assert sum(told) == plan.bytes == report.bytes > 0

    def test_large_objects_go_in_pieces(self, root, remote, other):
        rng = np.random.default_rng(0)
        grid = rng.standard_normal((2 * PIECE_BYTES // 16 // 64 + 1, 64, 8)).astype(np.float16)
        space = Store(root).space(make_spec("grids"))
        space.write([NewRecord(make_key(0), Record(grid, None), {})], {})
        told: list[int] = []
        push(root, remote, progress=told.append)
        pull(other, remote, progress=told.append)
        (record,) = Store(other).space(make_spec("grids")).read(make_keys([0]))
        assert record is not None
        assert record.features.tobytes() == grid.tobytes()
        assert max(told) == PIECE_BYTES

    def test_only_the_spaces_named(self, root, remote, other):
        for kind in ("regions", "grids"):
            Store(root).space(make_spec(kind)).write(make_entries(range(2), kind), {})
        names = [space.name for space in Store(root).spaces()]
        push(root, remote, spaces=names[:1])
        assert list(remote.spaces()) == names[:1]
        push(root, remote)
        pull(other, remote, spaces=names[1:])
        assert [space.name for space in Store(other).spaces()] == names[1:]
        for move in (push, pull):
            with pytest.raises(UnknownNameError, match="unknown space 'nonsense'"):
                move(root, remote, spaces=["nonsense"])

    def test_an_empty_cache(self, root, remote, other):
        Store(root)
        assert push(root, remote).packs == 0
        assert pull(other, remote).packs == 0
        assert Store(other, "r").spaces() == []

    def test_two_pushes_at_once(self, root, space, remote, other):
        for i in range(6):
            space.write(make_entries([i]), {})
        shutil.copytree(root, other)
        barrier, reports = threading.Barrier(2), []

        def send(cache: Path) -> None:
            own = pickle.loads(pickle.dumps(remote))
            barrier.wait()
            reports.append(push(cache, own))

        threads = [threading.Thread(target=send, args=(cache,)) for cache in (root, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [report.failures for report in reports] == [(), ()]
        assert len(remote.pack_names(space.name)) == 6
        third = other.with_name("third")
        assert pull(third, remote).packs == 6
        assert read_all(third, range(6)) == expected(range(6))

    def test_what_another_push_puts_beside_it_is_left_alone(self, root, space, tmp_path):
        remote = open_remote(f"file://{tmp_path}/remote")
        space.write(make_entries([0]), {})
        push(root, remote)
        (name,) = remote.pack_names(space.name)
        pack = tmp_path / "remote" / "spaces" / space.name / "packs" / name
        half_put = pack / "index" / "zarr.json#1"
        half_put.symlink_to("gone")  # it is listed, and no longer there when it is opened
        (pack / "zarr.json").unlink()  # the push that puts this object is not at its end
        assert push(root, remote).failures == ()
        assert (pack / "zarr.json").exists()
        assert half_put.is_symlink()

    def test_two_pulls_at_once(self, root, space, remote, other):
        for i in range(6):
            space.write(make_entries([i]), {})
        push(root, remote)
        plan = plan_pull(other, remote)
        threads = [
            threading.Thread(target=pull, args=(other, remote), kwargs={"plan": plan})
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert committed(other) == space.pack_names()
        assert read_all(other, range(6)) == expected(range(6))

    def test_half_a_pack_of_another_codec_is_finished(self, root, space, s3, other, monkeypatch):
        space.write(make_entries(range(1, 4)), {}, "zstd")
        raw = Store(other).space(make_spec())
        raw.write(make_entries(range(1, 4)), {})
        assert raw.pack_names() == space.pack_names()
        with monkeypatch.context() as patch:
            patch.setattr(Remote, "_check_sent", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                push(root, s3)
        assert push(other, s3).packs == 1
        third = other.with_name("third")
        assert pull(third, s3).packs == 1
        assert read_all(third, range(1, 4)) == expected(range(1, 4))

    def test_a_pack_that_came_since_the_plan_keeps_its_codec(self, root, space, remote, other):
        space.write(make_entries(range(1, 4)), {}, "zstd")
        raw = Store(other).space(make_spec())
        raw.write(make_entries(range(1, 4)), {})
        assert raw.pack_names() == space.pack_names()
        plan = plan_push(other, remote)
        assert push(root, remote).packs == 1
        report = push(other, remote, plan=plan)
        assert (report.packs, report.bytes, report.failures) == (0, 0, ())
        third = other.with_name("third")
        assert pull(third, remote).packs == 1
        assert read_all(third, range(1, 4)) == expected(range(1, 4))

    def test_what_is_no_part_of_a_pack_is_not_sent(self, root, space, s3, bucket, other):
        space.write(make_entries(range(3)), {})
        folder = space.packs_folder / space.pack_names()[0]
        (folder / ".nfs0001").write_bytes(b"x")
        (folder / "index" / "zarr.json#1").write_bytes(b"x")
        push(root, s3)
        assert not any("nfs" in name or "#" in name for name in object_names(bucket))
        assert pull(other, s3).packs == 1

    def test_a_pack_gone_since_the_plan_is_left_out(self, root, space, remote):
        space.write(make_entries(range(2)), {})
        space.write(make_entries(range(2, 4)), {})
        plan = plan_push(root, remote)
        shutil.rmtree(space.packs_folder / space.pack_names()[0])
        assert push(root, remote, plan=plan).packs == 1

    def test_a_pack_that_goes_while_it_is_checked_is_left_out(
        self, root, space, remote, monkeypatch
    ):
        space.write(make_entries(range(3)), {})

        def check_and_remove(pack: Path, name: str) -> None:
            check_pack(pack, name)
            shutil.rmtree(pack)

        monkeypatch.setattr("feature_cache.store.remote.remote.check_pack", check_and_remove)
        report = push(root, remote)
        assert (report.packs, report.failures) == (0, ())
        assert remote.pack_names(space.name) == []

    def test_any_zarr_reader_reads_a_remote(self, root, space, tmp_path):
        import zarr

        space.write(make_entries(range(1, 4)), {})
        push(root, open_remote(f"file://{tmp_path}/remote"))
        group = zarr.open_group(tmp_path / "remote", mode="r")
        packs = group["spaces"][space.name]["packs"]
        (pack,) = [packs[name] for name in space.pack_names()]
        start, stop = pack["index"].attrs["parts"]["keys"]
        assert pack["index"][start:stop].tobytes() == make_keys(range(1, 4)).tobytes()
        assert group.attrs["feature_cache"]["format_version"]

    def test_a_shared_folder_stays_shared(self, root, space, tmp_path):
        folder = tmp_path / "remote"
        folder.mkdir()
        folder.chmod(0o2770)
        space.write(make_entries(range(2)), {})
        before = os.umask(0o077)
        try:
            push(root, open_remote(f"file://{folder}"))
        finally:
            os.umask(before)
        for path in folder.rglob("*"):
            assert path.stat().st_mode & 0o060 == 0o060, path


class TestLastObject:
    def test_a_pack_appears_with_its_last_object(self, root, space, s3, other, monkeypatch):
        space.write(make_entries(range(3)), {})
        real, calls = obstore.put, 0
        for last in range(30):
            calls = 0

            def put(*args: Any, last: int = last, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > last:
                    raise obstore.exceptions.GenericError("cut off")
                return real(*args, **options)

            monkeypatch.setattr(obstore, "put", put)
            try:
                push(root, s3)
            except StoreError:
                if s3.pack_names(space.name):  # all but the table, which comes last
                    assert pull(other, s3).packs == 1
                    shutil.rmtree(other)
                elif s3.version() is not None:
                    assert pull(other, s3).packs == 0
            else:
                break
        assert last > 3
        assert s3.pack_names(space.name) == space.pack_names()
        assert pull(other, s3).packs == 1
        assert read_all(other, range(3)) == expected(range(3))

    def test_an_object_lost_on_the_way_is_noticed(self, root, space, s3, monkeypatch):
        space.write(make_entries(range(3)), {})
        real = obstore.put

        def put(client: Any, name: str, *args: Any, **options: Any) -> Any:
            return None if name.endswith("index/c.0") else real(client, name, *args, **options)

        monkeypatch.setattr(obstore, "put", put)
        with pytest.raises(StoreError, match=r"index/c\.0 has no bytes"):
            push(root, s3)
        assert s3.pack_names(space.name) == []

    def test_a_push_killed_in_the_middle(self, root, space, s3, other):
        for i in range(4):
            space.write(make_entries([i]), {})
        assert run_child(push_and_die, root, s3.url, 12) == -signal.SIGKILL
        there = len(s3.pack_names(space.name))
        assert pull(other, s3).packs == there < 4 if s3.version() is not None else True
        report = push(root, s3)
        assert (report.packs, report.present) == (4 - there, there)
        pull(other, s3)
        assert read_all(other, range(4)) == expected(range(4))

    @pytest.mark.parametrize(
        ("remote", "count"), [("s3", 14), ("file", 1), ("file", 14)], indirect=["remote"]
    )
    def test_a_pull_killed_in_the_middle(self, root, space, remote, other, count):
        for i in range(4):
            space.write(make_entries([i]), {})
        push(root, remote)
        assert run_child(pull_and_die, other, remote.url, count) == -signal.SIGKILL
        here = [name for name in committed(other) if not name.startswith(".tmp-")]
        assert len(here) < 4
        found = [content for content in read_all(other, range(4)) if content is not None]
        assert len(found) == len(here)
        assert all(content in expected(range(4)) for content in found)
        report = pull(other, remote)
        assert (report.packs, report.present) == (4 - len(here), len(here))
        assert read_all(other, range(4)) == expected(range(4))


class TestDamage:
    @pytest.mark.parametrize(
        ("kind", "damage"),
        [
            *(("regions", how) for how in ("flipped", "cut", "longer", "missing")),
            ("grids", "flipped"),
        ],
    )
    def test_a_damaged_object_is_never_committed(self, root, bucket, s3, other, kind, damage):
        space = Store(root).space(make_spec(kind))
        space.write(make_entries(range(3), kind), {})
        push(root, s3)
        (good,) = space.pack_names()
        for name in pack_objects(bucket):
            data = bucket.Object(name).get()["Body"].read()
            at = len(data) // 2
            if damage == "missing":
                if name.endswith(f"{good}/zarr.json"):
                    continue
                bucket.Object(name).delete()
            elif damage == "flipped":
                flipped = data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]
                bucket.put_object(Key=name, Body=flipped)
            else:
                bucket.put_object(Key=name, Body=data[:at] if damage == "cut" else data + b"0")
            report = pull(other, s3)
            (failure,) = report.failures
            assert (report.packs, failure.name, failure.space) == (0, good, space.name), name
            assert isinstance(failure.error, CorruptRecordError)
            assert good in str(failure.error)
            assert committed(other) == [], name
            bucket.put_object(Key=name, Body=data)
        assert pull(other, s3).packs == 1

    def test_the_rest_goes_on(self, root, space, bucket, s3, other):
        for i in range(3):
            space.write(make_entries([i + 1]), {})
        push(root, s3)
        bad = next(name for name in pack_objects(bucket) if "features/c." in name)
        bucket.put_object(Key=bad, Body=b"nonsense")
        report = pull(other, s3)
        assert (report.packs, len(report.failures)) == (2, 1)
        assert committed(other) == [n for n in space.pack_names() if n not in bad]

    def test_a_pack_under_another_name_is_not_taken(self, root, space, s3, bucket, other):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        (name,) = space.pack_names()
        fake = "0" * 32
        for key in pack_objects(bucket):
            source = {"Bucket": bucket.name, "Key": key}
            bucket.Object(key.replace(name, fake)).copy_from(CopySource=source)
        report = pull(other, s3)
        assert [failure.name for failure in report.failures] == [fake]
        assert committed(other) == [name]

    def test_a_damaged_pack_is_not_sent(self, root, space, remote):
        for i in range(3):
            space.write(make_entries([i + 1]), {})
        bad = space.pack_names()[1]
        chunk = space.packs_folder / bad / "features/c.0.0"
        data = bytearray(chunk.read_bytes())
        data[3] ^= 1
        chunk.write_bytes(data)
        report = push(root, remote)
        assert report.packs == 2
        assert [(f.space, f.name) for f in report.failures] == [(space.name, bad)]
        assert remote.pack_names(space.name) == [n for n in space.pack_names() if n != bad]

    def test_a_full_disk_is_an_error_and_leaves_nothing(
        self, root, space, remote, other, monkeypatch
    ):
        space.write(make_entries(range(3)), {})
        push(root, remote)

        def install(*_: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("feature_cache.store.remote.remote.install_pack", install)
            with pytest.raises(StoreError, match="No space left on device"):
                pull(other, remote)
        assert committed(other) == []
        assert pull(other, remote).packs == 1


class TestWhatIsThere:
    def test_a_newer_version_is_refused(self, root, space, s3, bucket, other):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        group = {"attributes": {"feature_cache": {"format_version": 99}}}
        bucket.put_object(Key="some/prefix/zarr.json", Body=json.dumps(group).encode())
        keys = make_keys([0])
        for use in (push, pull, lambda *_: RemoteSpace(s3, space.name).contains(keys)):
            with pytest.raises(CacheVersionError, match="format version 99"):
                use(root, s3)
        with pytest.raises(CacheVersionError):
            pull(other, s3)
        assert not other.exists()

    def test_an_older_version_is_raised_by_a_push_only(self, root, space, s3, bucket, other):
        push(root := Store(root).root, s3)
        current = s3.version()
        old = json.dumps({"attributes": {"feature_cache": {"format_version": 1}}}).encode()
        bucket.put_object(Key="some/prefix/zarr.json", Body=old)
        pull(other, s3)
        assert s3.version() == 1
        push(root, s3)
        assert s3.version() == current

    @pytest.mark.parametrize("name", ["photo.jpg", "folder/photo.jpg"])
    def test_other_things_are_no_cache(self, root, space, s3, bucket, name):
        space.write(make_entries(range(3)), {})
        bucket.put_object(Key=f"some/prefix/{name}", Body=b"x")
        for use in (push, pull):
            with pytest.raises(NotACacheError, match=name.split("/")[0]):
                use(root, s3)
        assert object_names(bucket) == [f"some/prefix/{name}"]

    @pytest.mark.parametrize("attributes", [{}, {"feature_cache": {"format_version": "1"}}])
    def test_another_zarr_group_is_no_cache(self, root, space, s3, bucket, attributes):
        space.write(make_entries(range(3)), {})
        text = json.dumps({"attributes": attributes}).encode()
        bucket.put_object(Key="some/prefix/zarr.json", Body=text)
        with pytest.raises(NotACacheError, match="no feature cache"):
            push(root, s3)

    @pytest.mark.parametrize(
        "text", [b"", b"{", b"[]", b"\xff", b'{"attributes": 1}', b"[" * 10**6]
    )
    def test_a_damaged_root_or_space(self, root, space, s3, bucket, other, text):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        for name in (f"some/prefix/spaces/{space.name}/zarr.json", "some/prefix/zarr.json"):
            bucket.put_object(Key=name, Body=text)
            with pytest.raises(StoreError, match=r"zarr\.json is damaged"):
                pull(other, s3)
            with pytest.raises(StoreError, match=r"zarr\.json is damaged"):
                push(root, s3)
        assert not other.exists()

    def test_the_spec_of_another_space(self, root, space, s3, bucket, other):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        spec = {**make_spec().to_json(), "dtype": "float32"}
        text = json.dumps({"attributes": {"feature_cache": {"space": spec}}}).encode()
        bucket.put_object(Key=f"some/prefix/spaces/{space.name}/zarr.json", Body=text)
        with pytest.raises(StoreError, match="another spec than its name says"):
            pull(other, s3)

    def test_a_spec_that_is_nested_too_deeply(self, root, space, s3, bucket, other):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        spec: Any = json.loads("[" * 600 + "]" * 600)
        text = json.dumps({"attributes": {"feature_cache": {"space": {"a": spec}}}}).encode()
        bucket.put_object(Key=f"some/prefix/spaces/{space.name}/zarr.json", Body=text)
        with pytest.raises(StoreError, match=r"zarr\.json is damaged"):
            pull(other, s3)

    def test_pulling_where_nothing_is(self, remote, other):
        with pytest.raises(NotACacheError, match="no feature cache at"):
            pull(other, remote)
        assert not other.exists()

    def test_pushing_what_is_no_cache(self, remote, tmp_path):
        with pytest.raises(NotACacheError, match="does not exist"):
            push(tmp_path / "nothing", remote)
        (tmp_path / "nothing").mkdir()
        with pytest.raises(NotACacheError, match="not a feature cache"):
            push(tmp_path / "nothing", remote)

    def test_half_a_pack_and_other_objects_are_no_packs(self, root, space, s3, bucket):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        packs = f"some/prefix/spaces/{space.name}/packs"
        for name in (
            "0" * 32 + "/index/zarr.json",
            "A" * 32 + "/zarr.json",
            "0" * 33 + "/zarr.json",
        ):
            bucket.put_object(Key=f"{packs}/{name}", Body=b"x")
        bucket.put_object(Key=f"{packs}/{'1' * 32}/", Body=b"")
        assert s3.pack_names(space.name) == space.pack_names()


class TestHostileNames:
    @pytest.mark.parametrize(
        "name", ["..", ".", "", ".hidden", "a..b", "..%2fx", "a\\b", "a b", "é", "%2e%2e"]
    )
    def test_spaces(self, root, space, s3, bucket, other, tmp_path, name):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        other.parent.mkdir()
        before = files_below(tmp_path)
        for object_name in ("zarr.json", f"packs/{'0' * 32}/zarr.json"):
            key = f"some/prefix/spaces/{name}/{object_name}"
            put_exactly(bucket, key)
        with pytest.raises(StoreError):
            pull(other, s3)
        assert files_below(tmp_path) == before

    @pytest.mark.parametrize(
        "name",
        [
            "../../../../../escaped",
            "..",
            "index/../../escaped",
            "index//etc/escaped",
            "/etc/escaped",
            "..%2fescaped",
            "index/.hidden",
            "index\\escaped",
            "index/zarr.json/nested",
            "features/zarr.json/nested/deep",
            "index",
            "index/c.0/0",
            "zarr.json/nested",
        ],
    )
    def test_objects_of_a_pack(self, root, space, s3, bucket, other, tmp_path, name):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        (pack,) = space.pack_names()
        pull(other, s3)
        shutil.rmtree(other / f"spaces/{space.name}/packs" / pack)
        before = [n for n in files_below(tmp_path) if "processes" not in n]
        put_exactly(bucket, f"some/prefix/spaces/{space.name}/packs/{pack}/{name}")
        if {"", ".."} & set(name.split("/")):  # obstore itself does not list these
            with pytest.raises(StoreError, match="invalid path"):
                pull(other, s3)
        else:
            report = pull(other, s3)
            assert (report.packs, len(report.failures)) == (0, 1)
            assert "which no pack has" in str(report.failures[0].error)
        assert [n for n in files_below(tmp_path) if "processes" not in n] == before

    def test_names_that_are_asked_for(self, s3, tmp_path):
        for space, pack in [("..", "0" * 32), ("a/b", "0" * 32), ("/a", "0" * 32), ("a", "../b")]:
            with pytest.raises(StoreError, match="is no name of a"):
                s3.read_keys(space, pack)
            with pytest.raises(StoreError, match="is no name of a"):
                s3.pull_pack(space, pack, tmp_path)
        assert files_below(tmp_path) == []


def put_exactly(bucket: Any, key: str) -> None:
    """Put an object under a name that a client or an endpoint might like to change."""
    bucket.put_object(Key=key, Body=b"{}")
    assert key in object_names(bucket)


class TestConnection:
    def test_nobody_listens(self, root, space, aws, monkeypatch):
        space.write(make_entries(range(3)), {})
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
            start = time.monotonic()
            for use in (push, pull):
                with pytest.raises(
                    StoreError, match=r"s3://bucket/x/zarr\.json.*check the address"
                ):
                    use(root, open_remote("s3://bucket/x", retry_config={"max_retries": 2}))
            assert time.monotonic() - start < 30

    def test_nobody_answers(self, root, space, aws, monkeypatch):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
            options = {"client_options": {"timeout": "1s"}, "retry_config": QUICK}
            start = time.monotonic()
            with pytest.raises(StoreError, match="can't read"):
                pull(root, open_remote("s3://bucket/x", **options))
            assert time.monotonic() - start < 30

    def test_the_endpoint_stops_in_the_middle(self, root, space, s3, other, monkeypatch):
        space.write(make_entries(range(3)), {})
        push(root, s3)
        real, calls = obstore.get_range, 0

        def get_range(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 5:
                raise obstore.exceptions.GenericError("connection lost")
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(obstore, "get_range", get_range)
            with pytest.raises(StoreError, match="connection lost"):
                pull(other, s3)
        assert committed(other) == []
        assert pull(other, s3).packs == 1

    def test_wrong_bucket(self, root, space, aws):
        space.write(make_entries(range(3)), {})
        wrong = open_remote("s3://no-such-bucket/x")
        for use in (push, pull):
            with pytest.raises(
                StoreError, match=r"no-such-bucket.*bucket does not exist"
            ) as caught:
                use(root, wrong)
            assert "\n" not in str(caught.value)

    def test_missing_credentials(self, root, space, aws, monkeypatch):
        space.write(make_entries(range(3)), {})
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        options = {"metadata_endpoint": "http://127.0.0.1:9", "retry_config": QUICK}
        with pytest.raises(StoreError, match="credentials"):
            push(root, open_remote("s3://bucket/x", **options))

    def test_options_are_passed_on(self, root, space, aws, bucket, endpoint, monkeypatch):
        space.write(make_entries(range(3)), {})
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        monkeypatch.delenv("AWS_ALLOW_HTTP")
        given = open_remote(
            f"s3://{bucket.name}",
            endpoint=endpoint,
            access_key_id="key",
            secret_access_key="hidden",
            allow_http=True,
        )
        assert push(root, given).packs == 1
        assert "hidden" not in repr(given)
        with pytest.raises(StoreError, match="nonsense"):
            open_remote("s3://bucket", nonsense=1).version()

    @pytest.mark.parametrize("url", ["ftp://host/x", "folder", "s3:/x", ""])
    def test_unknown_scheme(self, url):
        with pytest.raises(UnknownNameError, match="s3://, gs://, az://, hf://datasets/, file://"):
            open_remote(url)

    @pytest.mark.parametrize("url", ["file://host/x", "file:///", "file://"])
    def test_no_folder_of_this_host(self, url):
        with pytest.raises(StoreError, match="file:///path/of/folder"):
            open_remote(url)

    @pytest.mark.parametrize("path", ["/a folder", "./a folder", "a folder"])
    def test_a_folder_in_the_place_of_a_url(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("a folder").mkdir()
        with pytest.raises(StoreError, match=f"write {Path(path).absolute().as_uri()}$"):
            open_remote(path)

    def test_without_obstore(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "obstore", None)
        with pytest.raises(MissingDependencyError, match=r"feature-cache\[remote\]"):
            open_remote("s3://bucket")

    @pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "az://container/x"])
    def test_every_cloud_opens_with_bounded_times(self, url, monkeypatch):
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
        for prefix in ("AWS", "GOOGLE", "AZURE"):
            monkeypatch.setenv(f"{prefix}_PROXY_URL", "http://127.0.0.1:9")
        client = connect(url, {"timeout": "7s"})
        assert client.client_options == {
            "connect_timeout": "5s",
            "timeout": "7s",
            "proxy_url": "http://127.0.0.1:9",
        }
        assert client.retry_config["retry_timeout"] <= timedelta(minutes=2)

    def test_a_forked_process_is_refused_at_once(self, root, space, s3):
        space.write(make_entries(range(3)), {})
        push(root, s3)

        def check() -> None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)  # a hung call runs no Python
            signal.alarm(20)
            for one in (s3, open_remote(s3.url)):
                with pytest.raises(StoreError, match="forked"):
                    one.version()

        in_fork(check)

    def test_pickles_without_its_client(self, root, space, s3):
        push(Store(root).root, s3)
        copy = pickle.loads(pickle.dumps(s3))
        assert (copy.url, copy.version()) == (s3.url, s3.version())


class TestReadThrough:
    @pytest.fixture
    def remote_space(self, root: Path, space: Space, remote: Remote) -> RemoteSpace:
        for i in range(0, 6, 2):
            space.write(make_entries([i, i + 1]), {})
        push(root, remote)
        return RemoteSpace(remote, space.name)

    @pytest.fixture
    def here(self, other: Path) -> Space:
        space = Store(other).space(make_spec())
        space.create()
        return space

    def test_keys(self, root, space, remote, remote_space):
        (name, *_) = space.pack_names()
        keys = remote.read_keys(space.name, name)
        assert (keys.shape, keys.dtype) == ((2, 16), np.uint8)
        assert remote_space.contains(make_keys(range(8))).tolist() == [True] * 6 + [False] * 2
        assert len(remote_space) == 6

    def test_only_the_packs_wanted(self, remote_space, here):
        keys = make_keys([0, 1, 3, 99])
        assert remote_space.fetch(keys, here.packs_folder) == 2
        assert contents(here, range(4)) == expected(range(4))
        assert contents(here, [4, 5]) == [None, None]
        assert remote_space.fetch(keys, here.packs_folder) == 0

    def test_what_comes_later_is_seen(self, root, space, remote, remote_space, here):
        assert not remote_space.contains(make_keys([7])).any()
        space.write(make_entries([7]), {})
        push(root, remote)
        assert not remote_space.contains(make_keys([7])).any()  # asked a moment ago
        assert remote_space.fetch(make_keys([7]), here.packs_folder) == 0
        remote_space.refresh_seconds = 0.0
        assert remote_space.contains(make_keys([7])).all()
        assert remote_space.fetch(make_keys([7]), here.packs_folder) == 1

    def test_threads_share_one(self, remote_space, here):
        def fetch(numbers: range) -> None:
            assert remote_space.contains(make_keys(numbers)).all()
            remote_space.fetch(make_keys(numbers), here.packs_folder)
            assert contents(here, numbers) == expected(numbers)

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(fetch, [range(i, i + 2) for i in (0, 2, 4, 1, 3, 0)]))
        assert len(committed(here.root)) == 3

    def test_what_went_is_forgotten(self, space, s3, bucket, root, here):
        space.write(make_entries([1]), {})
        push(root, s3)
        remote_space = RemoteSpace(s3, space.name)
        assert remote_space.contains(make_keys([1])).all()
        bucket.objects.filter(Prefix=f"some/prefix/spaces/{space.name}/packs/").delete()
        assert remote_space.fetch(make_keys([1]), here.packs_folder) == 0
        assert not remote_space.contains(make_keys([1])).any()

    @pytest.mark.parametrize("part", ["index/c.0", "index/zarr.json", "features/c.0.0"])
    @pytest.mark.parametrize("gone", [False, True])
    def test_damage_counts_as_missing(self, root, space, s3, bucket, here, part, gone, caplog):
        space.write(make_entries([1, 2]), {})
        space.write(make_entries([2, 3]), {})
        push(root, s3)
        remote_space = RemoteSpace(s3, space.name)
        (bad,) = [
            name
            for name in space.pack_names()
            if make_key(1) in {key.tobytes() for key in s3.read_keys(space.name, name)}
        ]
        item = bucket.Object(f"some/prefix/spaces/{space.name}/packs/{bad}/{part}")
        data = item.get()["Body"].read()
        item.delete() if gone else item.put(Body=data[:-9] + bytes([data[-9] ^ 1]) + data[-8:])
        assert remote_space.fetch(make_keys([1, 2]), here.packs_folder) == 1
        assert contents(here, [1, 2, 3]) == [None, *expected([2, 3])]
        assert not remote_space.contains(make_keys([1])).any()
        assert bad in caplog.text

    def test_a_space_or_cache_that_is_not_there(self, remote, here):
        missing = RemoteSpace(remote, "no-such-space")
        assert not missing.contains(make_keys([1])).any()
        assert missing.fetch(make_keys([1]), here.packs_folder) == 0

    def test_pickles_without_its_index(self, remote_space, here):
        remote_space.refresh()
        copy = pickle.loads(pickle.dumps(remote_space))
        assert len(copy) == 0
        assert copy.contains(make_keys([0])).all()
