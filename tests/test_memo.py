from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from feature_cache.memo import memo_folder, remembered_digest


@pytest.fixture(autouse=True)
def fresh_memo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
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
    past = time.time_ns() - 10**10
    os.utime(file, ns=(past, past))
    return file


def test_an_unchanged_file_is_read_once(tmp_path):
    reader = Reader(old_file(tmp_path))
    digests = {remembered_digest(reader.file, "test", reader) for _ in range(3)}
    assert digests == {b"weights".ljust(16)}
    assert reader.times == 1


@pytest.mark.parametrize("change", ["size", "time", "inode", "purpose"])
def test_a_changed_file_is_read_again(tmp_path, change):
    file = old_file(tmp_path)
    reader = Reader(file)
    remembered_digest(file, "test", reader)
    status = file.stat()
    if change == "size":
        file.write_text("other weights")
        os.utime(file, ns=(status.st_mtime_ns, status.st_mtime_ns))
    elif change == "time":
        file.write_text("WEIGHTS")
        os.utime(file, ns=(status.st_mtime_ns + 1, status.st_mtime_ns + 1))
    elif change == "inode":
        other = tmp_path / "other"
        other.write_text("WEIGHTS")
        os.utime(other, ns=(status.st_mtime_ns, status.st_mtime_ns))
        other.replace(file)
    digest = remembered_digest(file, "else" if change == "purpose" else "test", reader)
    assert reader.times == 2
    assert digest == reader()


def test_a_young_file_is_not_remembered(tmp_path):
    file = tmp_path / "young"
    file.write_text("x")
    reader = Reader(file)
    for _ in range(2):
        remembered_digest(file, "test", reader)
    assert reader.times == 2


def test_a_file_that_changes_meanwhile_is_not_remembered(tmp_path):
    file = old_file(tmp_path)

    def read_and_change() -> bytes:
        file.write_text("changed meanwhile")
        past = time.time_ns() - 5 * 10**9
        os.utime(file, ns=(past, past))
        return b"before".ljust(16)

    remembered_digest(file, "test", read_and_change)
    reader = Reader(file)
    assert remembered_digest(file, "test", reader) == b"changed meanwhil"


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"identity": 3}', b"\xff"])
def test_a_damaged_memo_is_ignored(tmp_path, fresh_memo, damage):
    reader = Reader(old_file(tmp_path))
    remembered_digest(reader.file, "test", reader)
    [entry] = fresh_memo.iterdir()
    entry.write_bytes(damage)
    assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)
    assert reader.times == 2


def test_no_place_to_remember_is_no_error(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATURE_CACHE_MEMO", "/dev/null/nowhere")
    reader = Reader(old_file(tmp_path))
    assert remembered_digest(reader.file, "test", reader) == b"weights".ljust(16)


def test_the_folder_is_the_users_by_default(monkeypatch):
    monkeypatch.delenv("FEATURE_CACHE_MEMO")
    assert memo_folder().name == "memo"
    assert memo_folder().parent.name == "feature_cache"
