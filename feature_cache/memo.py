"""Digests of files, remembered, so that a warm start need not read them again.

A file is known by path, size, times of modification and of change (ns), inode and device, as git's
index and ccache know theirs, and not remembered before the later time is two seconds past: a
younger one might still change within the resolution of its time stamps. Who copies, unpacks or
moves another file there may keep the modification time, and the inode may come again; the time of
change can't be set. What is made from several files is recalled if all of them are unchanged. The
memo is each user's own (`memo_folder`), as paths and inodes mean nothing on another machine. Losing
it costs time, never numbers.

There is one file for each folder and purpose: the checksum of the rest in hexadecimal, a line end,
and JSON. It is read once and written as a whole, under a temporary name that is then renamed.
Processes that write the same one at once may lose what another has just added.

Not noticed is what leaves all of these as they are: writing through a memory map on a file system
that keeps the times, and, where there is no time of change (on Windows it is that of creation, some
network and FUSE file systems give 0), writing and setting the modification time back. `no_memo`
reads everything and replaces what is held; with ``FEATURE_CACHE_MEMO=off`` there is no memo.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import platformdirs

from .forks import Lock
from .hashing import Digest, digest_bytes, digest_json
from .system import replace

_log = logging.getLogger(__name__)
_MEMO_VERSION = 2
_MINIMUM_AGE_NS = 2_000_000_000
_WRITE_SECONDS = 60.0
_switched_off: ContextVar[bool] = ContextVar("_switched_off", default=False)

_Identity: TypeAlias = list[int]
"""Size, times of modification and change in ns, inode, device; a list, as JSON gives it back."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The digest of what was read from files.

    Parameters
    ----------
    digest : bytes, 16
    shape : tuple of int
        Of the image; empty where it is none.
    """

    digest: Digest
    shape: tuple[int, ...] = ()


def memo_folder() -> Path:
    """Give the folder of the memo: ``FEATURE_CACHE_MEMO``, or one in the user's cache folder."""
    chosen = os.environ.get("FEATURE_CACHE_MEMO")
    if chosen and chosen != "off":
        return Path(chosen)
    return Path(platformdirs.user_cache_dir("feature_cache")) / "memo"


def memo_is_off() -> bool:
    """Tell whether digests are not recalled here and now."""
    return _switched_off.get() or _there_is_none()


def _there_is_none() -> bool:
    return os.environ.get("FEATURE_CACHE_MEMO") == "off"


@contextmanager
def no_memo() -> Iterator[None]:
    """Recall no digest in this block: whatever is hashed in it is read, and replaces what is held.

    For this thread (or asyncio task) alone; ``FEATURE_CACHE_MEMO=off`` is for a whole process and
    those that it starts.

    Examples
    --------
    >>> with no_memo():
    ...     memo_is_off()
    True
    """
    token = _switched_off.set(True)
    try:
        yield
    finally:
        _switched_off.reset(token)


class Memo:
    """The memo, as one user of it in one process holds it; a context manager that closes it.

    Parts of it are loaded when first asked for and held until `close`. A pickle holds nothing.
    """

    def __init__(self) -> None:
        self._pages: dict[tuple[str, ...], _Page] = {}

    def __enter__(self) -> Memo:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """Start anew elsewhere."""
        return type(self), ()

    def fingerprint(
        self,
        files: Sequence[Path],
        purpose: str,
        compute: Callable[[], Fingerprint],
        *,
        part: str = "",
    ) -> Fingerprint:
        """Give what `compute` makes of some files, from memory where all are unchanged.

        Written to disk by `close`, and every minute.

        Parameters
        ----------
        files : sequence of Path
            All that `compute` reads.
        purpose : str
            What else decides the result; the same files may have several.
        compute : callable
            Reads the files; its errors are passed on.
        part : str
            Which of several images in the files, such as ``"frame 17"`` of a stack.
        """
        before = None if _there_is_none() else _identify(files)
        if before is None:
            return compute()
        # also under `no_memo`: what is read then replaces what is remembered, or has it forgotten
        page, name = self._page(files, purpose), _name_entry(files, part)
        known = page.recall(name, before)
        if known is not None and not memo_is_off():
            return known
        # before it is read, so that a file which is written while it is read is too young;
        # and looked at again after it, so that one which is replaced meanwhile is not remembered
        started = time.time_ns()
        fresh = compute()
        if fresh == known:
            return fresh
        if _old_enough(before, started) and _identify(files) == before:
            page.remember(name, before, fresh)
        elif known is not None:
            page.forget(name)
        return fresh

    def forget(self, files: Sequence[Path], purpose: str, *, part: str = "") -> None:
        """Have these files (or that part of them) read again when they are next asked for."""
        if not _there_is_none():
            self._page(files, purpose).forget(_name_entry(files, part))

    def close(self) -> None:
        """Write what is new, and let go of what was loaded; it is loaded again when needed."""
        # taken out first: a thread that asks meanwhile loads a page of its own
        pages, self._pages = self._pages, {}
        for page in pages.values():
            page.write()

    def _page(self, files: Sequence[Path], purpose: str) -> _Page:
        at = (purpose, *(str(file.parent) for file in files))
        page = self._pages.get(at)
        if page is None:
            folders = [str(file.parent.absolute()) for file in files]
            # of two threads that load it at once, both take the first one's
            page = self._pages.setdefault(at, _Page(folders, purpose))
        return page


class _Page:
    """One file of the memo: fingerprints of the files of a folder, for one purpose.

    What is made from several files has a folder for each.
    """

    def __init__(self, folders: list[str], purpose: str) -> None:
        self.about = {"version": _MEMO_VERSION, "folders": folders, "purpose": purpose}
        self.file = memo_folder() / f"{digest_json(self.about).hex()}.memo"
        self.entries = _load_entries(self.file)
        self.fresh: dict[str, Any] = {}
        self.written = time.monotonic()
        self._lock = Lock()

    def recall(self, name: str, identities: list[_Identity]) -> Fingerprint | None:
        entry = self.entries.get(name)
        if entry is None or entry["files"] != identities:
            return None
        return Fingerprint(bytes.fromhex(entry["digest"]), tuple(entry["shape"]))

    def remember(self, name: str, identities: list[_Identity], made: Fingerprint) -> None:
        entry = {"digest": made.digest.hex(), "shape": made.shape, "files": identities}
        with self._lock:
            self.entries[name] = self.fresh[name] = entry
        if time.monotonic() - self.written >= _WRITE_SECONDS:
            self.write()

    def forget(self, name: str) -> None:
        # None is written too: removed here alone, it would come back from the file
        with self._lock:
            self.entries[name] = self.fresh[name] = None
            self.write()  # at once: the page may be closed already, and it would come back

    def write(self) -> None:
        if not self.fresh:
            return
        # what other threads remember or forget meanwhile would be in neither the file nor `fresh`
        with self._lock:
            # what others wrote meanwhile stays, and what is new here counts
            self.entries = {**self.entries, **_load_entries(self.file), **self.fresh}
            content = {**self.about, "entries": self.entries}
            _write_whole(self.file, json.dumps(content, separators=(",", ":")).encode())
            self.fresh, self.written = {}, time.monotonic()


def remembered_digest(file: Path, purpose: str, compute: Callable[[], Digest]) -> Digest:
    """Give the digest that `compute` makes of one file, from memory where the file is unchanged.

    Parameters
    ----------
    file : Path
    purpose : str
        What the digest is of; the same file may have several.
    compute : callable
        Reads the file and gives 16 bytes; its errors are passed on.
    """
    with Memo() as memo:
        return memo.fingerprint((file,), purpose, lambda: Fingerprint(compute())).digest


def _identify(files: Sequence[Path]) -> list[_Identity] | None:
    """Give the identity of each file; None where one can't be looked at."""
    try:
        found = [_look_at(file) for file in files]
    except OSError:
        return None
    return [[s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino, s.st_dev] for s in found]


def _look_at(file: Path) -> os.stat_result:
    # Opened: a client of NFS asks its server then, and else tells what it knew a minute ago.
    with file.open("rb", buffering=0) as opened:
        return os.fstat(opened.fileno())


def _old_enough(identities: list[_Identity], now_ns: int) -> bool:
    latest = max((t for _, *times, _, _ in identities for t in times), default=0)
    return now_ns - latest >= _MINIMUM_AGE_NS


def _name_entry(files: Sequence[Path], part: str) -> str:
    names = "/".join(file.name for file in files)
    return f"{names}//{part}" if part else names


def _load_entries(file: Path) -> dict[str, Any]:
    try:
        checksum, _, text = file.read_bytes().partition(b"\n")
    except FileNotFoundError:
        return {}
    except OSError as error:
        _log.warning("ignoring the memo %s, which can't be read: %s", file, error)
        return {}
    if checksum != digest_bytes(text).hex().encode():
        _log.warning("ignoring the memo %s, which is damaged", file)
        return {}
    entries: dict[str, Any] = json.loads(text)["entries"]
    return entries


def _write_whole(file: Path, text: bytes) -> None:
    temporary = file.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(digest_bytes(text).hex().encode() + b"\n" + text)
            replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        _log.info("can't remember digests in %s: %s", file.parent, error)
