from __future__ import annotations

import io
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile

from feature_cache import FeatureCache, FrameError, Movie, MovieError
from feature_cache import memo as memo_module
from feature_cache.hashing import digest_bytes
from feature_cache.memo import Fingerprint, Memo, memo_folder, no_memo, remembered_digest
from feature_cache.movies import ReadOptions, Series, image_files
from feature_cache.movies.image_files import ImageFiles
from feature_cache.testing import FakeBackbone
from feature_cache.warm import plan_warm, run_warm
from old_files import age, hurry

OLD_NS = (time.time_ns() // 10**9 - 1000) * 10**9


@pytest.fixture(autouse=True)
def fresh_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hurry(monkeypatch)
    monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
    return tmp_path / "memo"


class Reader:
    """Digests a file and counts how often."""

    def __init__(self, file: Path) -> None:
        self.file, self.times = file, 0

    def __call__(self) -> bytes:
        self.times += 1
        return self.file.read_bytes()[:16].ljust(16)


def old_file(tmp_path: Path, text: str = "weights") -> Path:
    file = tmp_path / "file"
    file.write_text(text)
    os.utime(file, ns=(OLD_NS, OLD_NS))
    age(file)
    return file


def test_what_a_client_of_a_network_file_system_knew_before_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another host wrote the file; `stat` tells so a minute later, and opening it at once."""
    file = old_file(tmp_path, "before")
    reader, known, look = Reader(file), file.stat(), Path.stat
    remembered_digest(file, "weights", reader)
    file.write_text("after.")
    monkeypatch.setattr(Path, "stat", lambda self, **_: known if self == file else look(self))
    assert remembered_digest(file, "weights", reader) == b"after.".ljust(16)
    assert reader.times == 2


def test_an_unchanged_file_is_read_once(tmp_path):
    reader = Reader(old_file(tmp_path))
    digests = {remembered_digest(reader.file, "test", reader) for _ in range(3)}
    assert digests == {b"weights".ljust(16)}
    assert reader.times == 1


def test_what_threads_remember_while_it_is_written_is_kept(tmp_path):
    """Threads digest files while another one writes the memo, over and over."""
    files = [tmp_path / f"{number}" for number in range(100)]
    for file in files:
        file.write_text("weights")
        os.utime(file, ns=(OLD_NS, OLD_NS))
        age(file)
    memo, done, made = Memo(), threading.Event(), Fingerprint(b"weights".ljust(16))

    def write() -> None:
        while not done.is_set():
            for page in list(memo._pages.values()):
                page.write()

    writer = threading.Thread(target=write)
    writer.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file: memo.fingerprint((file,), "test", lambda: made), files))
    done.set()
    writer.join()
    memo.close()
    with Memo() as again:
        for file in files:
            assert again.fingerprint((file,), "test", lambda: pytest.fail("forgotten")) == made


def replace_text(file: Path, how: str) -> None:
    """Change what a file holds, and no more of its identity than `how` says."""
    status = file.stat()
    other, text = file.with_name("other"), file.read_text().upper()
    if how == "renamed over":
        other.write_text(text)
        os.utime(other, ns=(OLD_NS, OLD_NS))
        other.replace(file)
    elif how == "copied with its times":
        other.write_text(text)
        os.utime(other, ns=(OLD_NS, OLD_NS))
        shutil.copy2(other, file)
    elif how == "unpacked":
        with tarfile.open(file.with_name("archive.tar"), "w") as archive:
            member = tarfile.TarInfo(file.name)
            member.size, member.mtime = len(text), OLD_NS // 10**9
            archive.addfile(member, io.BytesIO(text.encode()))
        with tarfile.open(file.with_name("archive.tar")) as archive:
            archive.extractall(file.parent, filter="data")
    else:
        file.write_text(text + "!" * (how == "size"))
        mtime_ns = OLD_NS + (how == "time")
        os.utime(file, ns=(mtime_ns, mtime_ns))
    changed = file.stat()
    assert (changed.st_mtime_ns == status.st_mtime_ns) == (how != "time")
    assert (changed.st_size == status.st_size) == (how != "size")
    assert (changed.st_ino == status.st_ino) == (how != "renamed over")


@pytest.mark.parametrize(
    "how", ["size", "time", "in place", "renamed over", "copied with its times", "unpacked"]
)
def test_a_changed_file_is_read_again(tmp_path, how):
    file = old_file(tmp_path)
    reader = Reader(file)
    remembered_digest(file, "test", reader)
    replace_text(file, how)
    assert remembered_digest(file, "test", reader).startswith(b"WEIGHTS")
    assert reader.times == 2


def test_another_device_is_another_file(tmp_path, fresh_memo):
    reader = Reader(old_file(tmp_path))
    remembered_digest(reader.file, "test", reader)
    files = [[*identity(reader.file)[:-1], reader.file.stat().st_dev + 1]]
    forge("file", files=files)
    remembered_digest(reader.file, "test", reader)
    assert reader.times == 2


def test_another_purpose_is_read_again(tmp_path):
    reader = Reader(old_file(tmp_path))
    for purpose in "one", "two", "one":
        remembered_digest(reader.file, purpose, reader)
    assert reader.times == 2


@pytest.mark.parametrize("old", ["mtime", "neither"])
def test_a_young_file_is_not_remembered(tmp_path, monkeypatch, old):
    monkeypatch.undo()
    monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
    file = tmp_path / "young"
    file.write_text("x")
    if old == "mtime":
        os.utime(file, ns=(OLD_NS, OLD_NS))
    reader = Reader(file)
    for _ in range(2):
        remembered_digest(file, "test", reader)
    assert reader.times == 2


def test_two_seconds_are_old_enough(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
    reader = Reader(old_file(tmp_path))
    for _ in range(2):
        remembered_digest(reader.file, "test", reader)
    assert reader.times == 1


def test_a_file_that_changes_meanwhile_is_not_remembered(tmp_path):
    file = old_file(tmp_path)

    def read_and_change() -> bytes:
        file.write_text("changed meanwhile")
        os.utime(file, ns=(OLD_NS, OLD_NS))
        age(file)
        return b"before".ljust(16)

    remembered_digest(file, "test", read_and_change)
    reader = Reader(file)
    assert remembered_digest(file, "test", reader) == b"changed meanwhil"


def test_a_file_that_was_young_when_it_was_read_is_not_remembered(tmp_path):
    file = tmp_path / "young"
    file.write_text("x")

    def read_slowly() -> bytes:
        age(file)
        return b"first".ljust(16)

    remembered_digest(file, "test", read_slowly)
    assert remembered_digest(file, "test", lambda: b"second".ljust(16)) == b"second".ljust(16)


def flip_last_digit(text: bytes) -> bytes:
    at = text.index(b'"digest":"') + 10
    return text[:at] + (b"0" if text[at : at + 1] != b"0" else b"1") + text[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: b"{",
        lambda text: b"[]",
        lambda text: b'{"identity": 3}',
        lambda text: b"\xff",
        lambda text: text[:-20],
        lambda text: bytes(len(text)),
        flip_last_digit,
    ],
)
def test_a_damaged_memo_is_ignored_and_replaced(tmp_path, fresh_memo, damage, caplog):
    reader = Reader(old_file(tmp_path))
    remembered_digest(reader.file, "test", reader)
    [page] = fresh_memo.iterdir()
    page.write_bytes(damage(page.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)
    assert f"ignoring the memo {page}, which is damaged" in caplog.text
    assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)
    assert reader.times == 2


def test_a_memo_that_cannot_be_read_is_ignored(tmp_path, fresh_memo, caplog):
    reader = Reader(old_file(tmp_path))
    remembered_digest(reader.file, "test", reader)
    [page] = fresh_memo.iterdir()
    page.unlink()
    page.mkdir()
    assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)
    assert "which can't be read" in caplog.text
    assert list(fresh_memo.iterdir()) == [page]


def test_no_place_to_remember_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATURE_CACHE_MEMO", "/dev/null/nowhere")
    reader = Reader(old_file(tmp_path))
    assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)


def test_it_can_be_ignored(tmp_path, fresh_memo, monkeypatch):
    reader = Reader(old_file(tmp_path))
    remembered_digest(reader.file, "test", reader)
    with no_memo():
        remembered_digest(reader.file, "test", reader)
    assert reader.times == 2
    monkeypatch.setenv("FEATURE_CACHE_MEMO", "off")
    remembered_digest(reader.file, "test", reader)
    assert reader.times == 3
    monkeypatch.setenv("FEATURE_CACHE_MEMO", str(fresh_memo))
    remembered_digest(reader.file, "test", reader)
    assert reader.times == 3
    assert len(list(fresh_memo.iterdir())) == 1


@pytest.mark.parametrize("age_ns", [0, 10**12], ids=["replaced", "forgotten, as it is young"])
def test_what_is_read_without_the_memo_replaces_what_it_holds(tmp_path, monkeypatch, age_ns):
    """As after a change that left no trace."""
    reader = Reader(old_file(tmp_path))
    remembered_digest(reader.file, "test", lambda: b"stale".ljust(16))
    monkeypatch.setattr(memo_module, "_MINIMUM_AGE_NS", age_ns)
    assert remembered_digest(reader.file, "test", reader) == b"stale".ljust(16)
    with no_memo():
        assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)
    assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)


def test_the_folder_is_the_users_by_default(monkeypatch):
    monkeypatch.delenv("FEATURE_CACHE_MEMO")
    assert memo_folder().name == "memo"
    assert memo_folder().parent.name == "feature_cache"


def mark(number: int) -> Fingerprint:
    return Fingerprint(number.to_bytes(16, "big"), (number,))


def unexpected() -> Fingerprint:
    raise AssertionError("read again")


class TestMemo:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[Path]:
        made = [tmp_path / "images" / f"t{t}.tif" for t in range(20)]
        made[0].parent.mkdir()
        for file in made:
            file.write_text(file.name)
        age(tmp_path)
        return made

    def test_there_is_one_file_a_folder_and_purpose(self, files, fresh_memo):
        for purpose in "one", "two":
            with Memo() as memo:
                for t, file in enumerate(files):
                    memo.fingerprint((file,), purpose, lambda t=t: mark(t))
        assert len(list(fresh_memo.iterdir())) == 2
        with Memo() as memo:
            again = [memo.fingerprint((file,), "one", unexpected) for file in files]
        assert again == [mark(t) for t in range(20)]

    def test_what_is_made_of_two_files_needs_both_unchanged(self, files):
        one, two = files[:2]
        with Memo() as memo:
            memo.fingerprint((one, two), "test", lambda: mark(1))
            assert memo.fingerprint((one, two), "test", unexpected) == mark(1)
            assert memo.fingerprint((one,), "test", lambda: mark(2)) == mark(2)
            assert memo.fingerprint((two, one), "test", lambda: mark(3)) == mark(3)
            for file in one, two:
                os.utime(file, ns=(OLD_NS, OLD_NS - 1))
                age(file)
                assert memo.fingerprint((one, two), "test", lambda: mark(4)) == mark(4)
                assert memo.fingerprint((one, two), "test", unexpected) == mark(4)

    def test_parts_of_a_file_are_told_apart(self, files):
        with Memo() as memo:
            for t in range(3):
                memo.fingerprint((files[0],), "test", lambda t=t: mark(t), part=f"frame {t}")
            memo.fingerprint((files[0],), "test", lambda: mark(9))
            memo.forget((files[0],), "test", part="frame 1")
        with Memo() as memo:
            parts = {"": 9, "frame 0": 0, "frame 2": 2}
            for part, number in parts.items():
                again = memo.fingerprint((files[0],), "test", unexpected, part=part)
                assert again == mark(number)
            assert memo.fingerprint((files[0],), "test", lambda: mark(5), part="frame 1") == mark(5)

    def test_errors_pass_and_are_not_remembered(self, files):
        def fail() -> Fingerprint:
            raise ValueError("broken")

        with Memo() as memo, pytest.raises(ValueError, match="broken"):
            memo.fingerprint((files[0],), "test", fail)
        with Memo() as memo:
            assert memo.fingerprint((files[0],), "test", lambda: mark(1)) == mark(1)

    def test_a_missing_file_is_for_who_reads_it(self, files):
        files[0].unlink()
        with Memo() as memo:
            assert memo.fingerprint((files[0],), "test", lambda: mark(1)) == mark(1)
            assert memo.fingerprint((files[0],), "test", lambda: mark(2)) == mark(2)

    def test_forgetting(self, files):
        with Memo() as memo:
            memo.fingerprint((files[0],), "test", lambda: mark(1))
        with Memo() as memo:
            memo.forget((files[0],), "test")
        with Memo() as memo:
            assert memo.fingerprint((files[0],), "test", lambda: mark(2)) == mark(2)

    def test_a_long_run_is_written_now_and_then(self, files, monkeypatch):
        monkeypatch.setattr(memo_module, "_WRITE_SECONDS", 0.0)
        killed = Memo()
        for file in files:
            killed.fingerprint((file,), "test", lambda: mark(1))
        with Memo() as memo:
            assert memo.fingerprint((files[-1],), "test", unexpected) == mark(1)

    def test_additions_of_two_are_joined_where_they_come_one_after_the_other(self, files):
        with Memo() as one, Memo() as two:
            one.fingerprint((files[0],), "test", lambda: mark(1))
            two.fingerprint((files[1],), "test", lambda: mark(2))
        with Memo() as memo:
            assert memo.fingerprint((files[0],), "test", unexpected) == mark(1)
            assert memo.fingerprint((files[1],), "test", unexpected) == mark(2)

    def test_a_pickle_holds_nothing(self, files):
        memo = Memo()
        memo.fingerprint((files[0],), "test", lambda: mark(1))
        assert len(pickle.dumps(memo)) < 100
        copied = pickle.loads(pickle.dumps(memo))
        assert copied.fingerprint((files[0],), "test", lambda: mark(2)) == mark(2)

    def test_names_that_are_no_text(self, tmp_path):
        file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xff.tif"))
        file.write_text("x")
        age(file)
        with Memo() as memo:
            memo.fingerprint((file,), "test", lambda: mark(1))
        with Memo() as memo:
            assert memo.fingerprint((file,), "test", unexpected) == mark(1)

    def test_processes_that_write_at_once(self, files, fresh_memo):
        code = """
import random, sys, time
from pathlib import Path
from feature_cache.memo import Fingerprint, Memo
files, until = sorted(Path(sys.argv[1]).iterdir()), time.time() + 1.5
while time.time() < until:
    with Memo() as memo:
        number = random.randrange(len(files))
        if random.random() < 0.5:
            memo.forget((files[number],), "test")
        made = Fingerprint(number.to_bytes(16, "big"), (number,))
        assert memo.fingerprint((files[number],), "test", lambda: made) == made
"""
        time.sleep(2)  # these processes take files that are two seconds old
        command = [sys.executable, "-c", code, str(files[0].parent)]
        running = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(3)]
        for child in running:
            errors = child.communicate()[1]
            assert child.returncode == 0
            assert not errors, "a warning: the memo was damaged"
        [page] = fresh_memo.iterdir()
        text = page.read_bytes().partition(b"\n")[2]
        assert set(json.loads(text)["entries"]) <= {file.name for file in files}


class Reads(list[str]):
    """The names of the images read."""


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reads]:
    names, read_image = Reads(), image_files.read_image

    def count(file: Path, options: ReadOptions) -> np.ndarray:
        names.append(file.name)
        return read_image(file, options)

    monkeypatch.setattr(image_files, "read_image", count)
    return names


@pytest.fixture
def old_movie(small_folder, tmp_path) -> Path:
    """Six frames and masks, written long ago."""
    root = small_folder()
    age(tmp_path)
    return root


@pytest.fixture
def silver_movie(old_movie, tmp_path) -> Path:
    """The same with silver truth."""
    silver = Path(f"{old_movie}_ST") / "SEG"
    silver.mkdir(parents=True)
    for t in range(6):
        mask = np.zeros((48, 64), np.uint16)
        mask[40:, 60:] = 77
        tifffile.imwrite(silver / f"man_seg{t:03d}.tif", mask)
    age(tmp_path)
    return old_movie


def hash_movie(cache: FeatureCache, root: Path, **options) -> list[bytes]:
    movie = Movie.open(root, **options)
    keys = cache.movie(movie.frames, movie.masks, FakeBackbone()).keys()
    return [bytes(key) for key in keys]


def taken(reads: Reads) -> list[str]:
    """Give the names of the images read since the last time."""
    names = sorted(reads)
    reads.clear()
    return names


class TestMovies:
    def test_a_warm_start_reads_no_image(self, cache, old_movie, reads):
        reports = []
        for _ in range(2):
            plan = plan_warm(cache, [Movie.open(old_movie)], FakeBackbone())
            reports.append((run_warm(plan).computed, len(taken(reads))))
        assert reports == [(6, 31), (0, 0)]  # hashed, looked at in part, computed
        movie = Movie.open(old_movie)
        records = cache.get_or_compute(movie.frames, movie.masks, FakeBackbone())
        assert len(records) == 6
        assert not reads

    def test_keys_are_those_of_the_pixels(self, cache, silver_movie):
        with no_memo():
            expected = hash_movie(cache, silver_movie)
        assert hash_movie(cache, silver_movie) == expected
        assert hash_movie(cache, silver_movie) == expected

    def test_two_files_remember_a_movie(self, cache, old_movie, fresh_memo):
        hash_movie(cache, old_movie)
        assert len(list(fresh_memo.iterdir())) == 2

    def test_files_need_not_be_readable(self, cache, old_movie):
        keys = hash_movie(cache, old_movie)
        for file in old_movie.iterdir():
            with file.open("r+b") as opened:
                opened.write(bytes(file.stat().st_size))
            forge(file.name, files=[identity(file)])
        assert hash_movie(cache, old_movie) == keys
        with no_memo(), pytest.raises(MovieError, match="is no TIFF"):
            hash_movie(cache, old_movie)

    @pytest.mark.parametrize("which", ["t002.tif", "man_track002.tif", "man_seg002.tif"])
    @pytest.mark.parametrize("how", ["written", "replaced"])
    def test_what_changed_is_read_again(self, cache, silver_movie, reads, which, how):
        keys = hash_movie(cache, silver_movie)
        [file] = silver_movie.parent.rglob(which)
        size, place = file.stat().st_size, file
        if how == "replaced":
            place = file.with_suffix(".new")
        image = tifffile.imread(file)
        image[0, -1] += 1
        compressed = which != "man_seg002.tif"
        tifffile.imwrite(place, image, compression="zlib" if compressed else None)
        if not compressed:
            assert place.stat().st_size == size
        os.utime(place, ns=(OLD_NS, OLD_NS))
        place.replace(file)
        age(file)
        taken(reads)
        changed = hash_movie(cache, silver_movie)
        expected = ["t002.tif"] if which == "t002.tif" else ["man_seg002.tif", "man_track002.tif"]
        assert taken(reads) == expected
        assert [a == b for a, b in zip(keys, changed, strict=True)] == [t != 2 for t in range(6)]
        with no_memo():
            assert hash_movie(cache, silver_movie) == changed

    def test_silver_truth_that_comes_later(self, cache, old_movie, reads, tmp_path):
        keys = hash_movie(cache, old_movie)
        silver = Path(f"{old_movie}_ST") / "SEG"
        shutil.copytree(Path(f"{old_movie}_GT") / "TRA", silver)
        for file in silver.glob("*.tif"):
            tifffile.imwrite(file, np.full((48, 64), 9, np.uint16))
        age(tmp_path)
        taken(reads)
        assert not set(hash_movie(cache, old_movie)) & set(keys)
        assert len(taken(reads)) == 12

    def test_young_files_are_not_remembered(
        self, cache, small_folder, reads, fresh_memo, monkeypatch
    ):
        monkeypatch.setattr(memo_module, "_MINIMUM_AGE_NS", 10**15)
        root = small_folder()
        for _ in range(2):
            hash_movie(cache, root)
            assert len(taken(reads)) == 12
        assert not fresh_memo.exists()

    def test_downscales_do_not_share(self, cache, old_movie, reads):
        keys = [hash_movie(cache, old_movie, downscale_spatial=n) for n in (1, 2, 1, 2)]
        assert len(taken(reads)) == 24
        assert keys[:2] == keys[2:]
        assert not set(keys[0]) & set(keys[1])

    def test_frames_and_masks_of_the_same_files_do_not_share(self, cache, old_movie):
        files = Movie.open(old_movie).masks.source
        plain = Series(files, range(6))
        for masks in Series(files, range(6), labels=True), plain:
            digests = cache.movie(plain, masks, FakeBackbone()).digests(0)
            assert digests[0] != digests[1]

    def test_slices_share(self, cache, old_movie, reads):
        hash_movie(cache, old_movie, slice_pct=(0, 0.5))
        taken(reads)
        hash_movie(cache, old_movie)
        assert len(taken(reads)) == 6
        hash_movie(cache, old_movie)
        assert not reads

    def test_arrays_have_no_files(self, cache, small, fresh_memo):
        cache.get_or_compute(*small, FakeBackbone())
        assert not fresh_memo.exists()

    def test_files_read_in_another_way_are_not_remembered(self, cache, old_movie, reads):
        class Denoised(ImageFiles):
            def __getitem__(self, t: int) -> np.ndarray:
                return super().__getitem__(t) // 2

        movie = Movie.open(old_movie)
        for _ in range(2):
            frames = Denoised(movie.frames.source.files)
            cache.movie(frames, movie.masks, FakeBackbone()).keys()
        assert taken(reads).count("t000.tif") == 2

    def test_damage_gives_the_right_keys(self, cache, old_movie, fresh_memo, caplog):
        keys = hash_movie(cache, old_movie)
        for page in fresh_memo.iterdir():
            page.write_bytes(flip_last_digit(page.read_bytes()))
        assert hash_movie(cache, old_movie) == keys
        assert caplog.text.count("which is damaged") >= 2

    def test_a_mask_that_does_not_fit_is_an_error_each_time(self, cache, old_movie, reads):
        one, two = Movie.open(old_movie), Movie.open(old_movie, downscale_spatial=2)
        cache.movie(one.frames, one.masks, FakeBackbone()).keys()
        cache.movie(two.frames, two.masks, FakeBackbone()).keys()
        taken(reads)
        for _ in range(2):
            with pytest.raises(MovieError, match=r"shape \(48, 64\) and its mask \(24, 32\)"):
                cache.movie(one.frames, two.masks, FakeBackbone()).keys()
        assert not reads

    def test_one_bad_frame_does_not_stop_the_rest(self, cache, old_movie, tmp_path):
        tifffile.imwrite(old_movie / "t002.tif", np.zeros((9, 9), np.uint16))
        age(tmp_path)
        for expected in (5, 1), (0, 1):
            plan = plan_warm(cache, [Movie.open(old_movie)], FakeBackbone())
            report = run_warm(plan)
            assert (report.computed, report.failed) == expected
            assert "has shape (9, 9)" in report.failures[0].reason

    def test_a_change_without_a_trace_is_found_when_it_is_computed(
        self, cache, old_movie, fresh_memo, monkeypatch
    ):
        hash_movie(cache, old_movie)
        frame = old_movie / "t003.tif"
        tifffile.imwrite(frame, np.ones((48, 64), np.uint16))
        monkeypatch.setenv("FEATURE_CACHE_MEMO", "off")
        keys = hash_movie(cache, old_movie)
        monkeypatch.setenv("FEATURE_CACHE_MEMO", str(fresh_memo))
        forge("t003.tif", files=[identity(frame)])
        movie = Movie.open(old_movie)
        with pytest.raises(FrameError, match="changed since it was hashed: open the movie anew"):
            cache.get_or_compute(movie.frames, movie.masks, FakeBackbone())
        assert hash_movie(cache, old_movie) == keys

    def test_shapes_are_compared_again_when_a_record_is_computed(self, cache, old_movie):
        one, two = Movie.open(old_movie), Movie.open(old_movie, downscale_spatial=2)
        cache.movie(two.frames, two.masks, FakeBackbone()).keys()
        for t in range(6):
            forge(f"man_track{t:03d}.tif", shape=[48, 64])
        movie = cache.movie(one.frames, two.masks, FakeBackbone())
        assert len(movie.keys()) == 6
        with pytest.raises(MovieError, match=r"shape \(48, 64\) and its mask \(24, 32\)"):
            movie.get_or_compute()

    def test_trackastra_frames_are_remembered(self, cache, old_movie, reads):
        from trackastra.data import CTCData

        from feature_cache.trackastra import wrap

        data = CTCData(str(old_movie), window_size=4)
        for expected in 6, 0:
            wrapped = wrap(data, cache, FakeBackbone())
            names = taken(reads)
            assert len(set(names)) == expected
            assert not any(name.startswith("man_track") for name in names)
            wrapped.warm()
            taken(reads)


def identity(file: Path) -> list[int]:
    status = file.stat()
    times = status.st_mtime_ns, status.st_ctime_ns
    return [status.st_size, *times, status.st_ino, status.st_dev]


def forge(name: str, **changes: object) -> None:
    """Change what is remembered of a file in the one page that has it."""
    [page] = [page for page in memo_folder().iterdir() if name.encode() in page.read_bytes()]
    content = json.loads(page.read_bytes().partition(b"\n")[2])
    content["entries"][name].update(changes)
    text = json.dumps(content).encode()
    page.write_bytes(digest_bytes(text).hex().encode() + b"\n" + text)
