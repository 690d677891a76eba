"""Files and folders of a cache: durable, atomic, and open to the group that shares them.

Whatever is made in a folder with the setgid bit gets the folder's group permissions, whatever the
umask: a folder is set so that a group can share it, and one user's umask should not undo that.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, TypeVar, cast

from ..errors import NotACacheError, ReadOnlyCacheError, StoreError
from ..hashing import JSON
from ..system import disk_bytes, open_plain, replace, sync_file, sync_folder

T = TypeVar("T")
_log = logging.getLogger(__name__)
TEMPORARY_PREFIX = ".tmp-"
TRANSIENT = (TEMPORARY_PREFIX, ".nfs")
"""How names begin that come and go: ours, and those of NFS for open files that were removed."""
_GROUP_BITS = stat.S_IRGRP | stat.S_IWGRP
_IS_THERE, _TRIES = (errno.ENOTEMPTY, errno.EEXIST), 100
_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
_NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


def list_folder(folder: Path) -> list[str]:
    """List a folder's names, sorted; none where there is no such folder."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_file(file: Path, limit: int) -> bytes:
    """Read a whole file of at most `limit` bytes.

    Raises
    ------
    ValueError
        If it is larger, or no plain file.
    """
    with open_file(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise ValueError(f"{file} has {size} bytes, expected at most {limit}")
        return opened.read()


def open_file(file: Path) -> BinaryIO:
    """Open a plain file for reading; never waits, and follows no link.

    Raises
    ------
    ValueError
        If it is a link, a folder, a pipe or a device.
    """
    try:
        descriptor = open_plain(file)
    except OSError as error:
        # ELOOP of a link, ENXIO of a socket; of a folder Windows says that it may not be opened.
        if error.errno in (errno.ELOOP, errno.ENXIO) or file.is_dir():
            raise ValueError(f"{file} is no plain file") from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{file} is no plain file")
    return cast(BinaryIO, os.fdopen(descriptor, "rb", buffering=0))


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse(text)  # 1e999 would be written as Infinity


def read_json(file: Path, limit: int = 1 << 20) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ValueError
        If the file holds anything else, or more than `limit` bytes.
    """
    return parse_json(read_file(file, limit), file)


def parse_json(data: bytes, where: object) -> dict[str, Any]:
    """Read a JSON object from bytes; ValueError, which names where they are, for anything else."""
    try:
        plain = json.loads(data, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError(f"{where} is nested too deeply") from error
    if not isinstance(plain, dict):
        raise ValueError(f"{where} holds no JSON object")
    return plain


def read_each(folder: Path, read: Callable[[Path], T]) -> tuple[dict[str, T], list[Path]]:
    """Read the JSON files in a folder, by name; list those that hold something else.

    Parameters
    ----------
    folder : Path
    read : callable
        ValueError where a file holds something else.
    """
    found, damaged = dict[str, T](), list[Path]()
    for name in list_folder(folder):
        if name.endswith(".json"):
            try:
                found[name] = read(folder / name)
            except FileNotFoundError:
                continue
            except ValueError as error:
                _log.info("leaving out %s, which is damaged: %s", folder / name, error)
                damaged.append(folder / name)
    return found, damaged


def make_folders(folder: Path, root: Path | None = None) -> None:
    """Make a folder and those above it; those below `root`, which must be there, if it is given."""
    if folder != root and not folder.is_dir():
        make_folders(folder.parent, root)
        make_folder(folder)


def make_folder(folder: Path) -> None:
    """Make a folder in one that must be there, with the group's permissions of that one.

    What works in a cache makes no folder above the cache: one that was moved or removed meanwhile
    would be made anew.
    """
    if folder.is_dir():
        return
    folder.mkdir(exist_ok=True)
    with suppress(PermissionError):  # another user made it at the same moment, and shares it
        share_with_group(folder)


def share_with_group(path: Path) -> None:
    """Give a file or folder just made the group permissions of a setgid folder that it is in."""
    above = path.parent.stat().st_mode
    if not above & stat.S_ISGID:
        return
    mode = path.stat().st_mode
    wanted = mode | (above & (stat.S_IRWXG if stat.S_ISDIR(mode) else _GROUP_BITS))
    if wanted != mode:
        path.chmod(stat.S_IMODE(wanted))


def share_tree(root: Path) -> None:
    """Do `share_with_group` for a folder and all that is in it."""
    share_with_group(root)
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            share_with_group(Path(folder, name))


def sync_tree(root: Path) -> None:
    """Make all files and folders of a tree durable."""
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            sync_file(Path(folder, file))
        sync_folder(Path(folder))


def rename_new(folder: Path, target: Path) -> bool:
    """Give a folder a name, unless there is a folder of that name, with something in it.

    Returns
    -------
    bool
        Whether it has the name now.
    """
    tries = 0
    while True:
        try:
            # Never over a pack: a folder that holds something is not replaced.
            folder.rename(target)
            return True
        except OSError as error:
            if target.is_dir():
                return False
            tries += 1
            # What was there may have gone since: gc takes packs away.
            if error.errno not in _IS_THERE or tries == _TRIES:
                raise


def write_text(file: Path, text: str) -> None:
    """Write a file as a whole, durably, in place of what was there."""
    write_bytes(file, text.encode(), is_durable=True)
    sync_folder(file.parent)


def write_bytes(file: Path, data: bytes, *, is_durable: bool = False) -> None:
    """Write a file as a whole in place of what was there, as others see it."""
    temporary = file.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}")
    try:
        with open(temporary, "wb") as opened:
            opened.write(data)
            # Before the rename: after a crash the name could else be that of an empty file.
            if is_durable:
                opened.flush()
                os.fsync(opened.fileno())
        # Before the rename too: the group may read it from the first moment on.
        share_with_group(temporary)
        replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


def create_exclusive(file: Path, text: str) -> bool:
    """Make a file that must not be there yet; tell whether it was this call that made it."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    try:
        # Until now it was there and empty: so a claim that names nobody counts for some seconds.
        os.write(descriptor, text.encode())
    except OSError:
        file.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)
    share_with_group(file)
    return True


def group_text(attributes: Mapping[str, JSON], *, indent: int | None = 2) -> str:
    """Give the zarr.json of a Zarr v3 group; without indent it is written much faster."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}
    return json.dumps(group, indent=indent)


def write_group(folder: Path, attributes: Mapping[str, JSON]) -> None:
    """Make a folder a Zarr group, unless it is one."""
    if not (folder / "zarr.json").exists():
        write_text(folder / "zarr.json", group_text(attributes))


def tree_bytes(root: str | os.PathLike[str], skips: Callable[[str], object] | None = None) -> int:
    """Sum up what a file, or a folder and all that is in it, takes on the disk, as du does.

    What has several names there counts once.

    Parameters
    ----------
    root : path
    skips : callable, optional
        Tells of a name whether it is left out, with all that is below.
    """
    total, seen, todo = 0, set[tuple[int, int]](), [os.fspath(root)]
    while todo:
        path = todo.pop()
        try:
            status = os.lstat(path)
            if stat.S_ISDIR(status.st_mode):
                names = os.listdir(path)
                todo += [f"{path}/{name}" for name in names if not (skips and skips(name))]
        except (FileNotFoundError, NotADirectoryError):
            continue
        if status.st_nlink > 1 and not stat.S_ISDIR(status.st_mode):
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
        total += disk_bytes(status)
    return total


@contextmanager
def reading(place: Path) -> Iterator[None]:
    """Turn what the system says of a failed read into an error of ours."""
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        raise StoreError(
            f"can't read {error.filename or place}: {error.strerror or error}"
        ) from error


@contextmanager
def writing(place: Path, *, is_new: bool = False) -> Iterator[None]:
    """Turn what the system says of a failed write into an error of ours.

    Parameters
    ----------
    place : Path
    is_new : bool
        Whether it is to be made, and need not be there.
    """
    try:
        yield
    except StoreError:
        raise
    except OSError as error:
        if error.errno in _NO_PERMISSION:
            raise ReadOnlyCacheError(
                f"no permission to write in {place} ({error.strerror}); "
                "name a folder you can write, or open the cache with mode='r'"
            ) from error
        if is_new and error.errno not in _IS_FULL:
            files = [str(one) for one in (place, *place.parents) if one.is_file()]
            told = f"{files[0]} is a file" if files else error.strerror or error
            raise StoreError(f"can't make {place}: {told}; name another folder") from error
        if error.errno == errno.ENOENT and not place.exists():
            raise _gone(place) from error
        what = "free some space or name another" if error.errno in _IS_FULL else "name another"
        raise StoreError(
            f"can't write in {place}: {error.strerror or error}; {what} folder. What was "
            "committed before is untouched"
        ) from error


def check_there(root: Path) -> None:
    """Raise NotACacheError where a cache was moved or removed while it was open."""
    if not (root / "zarr.json").exists():
        raise _gone(root)


def _gone(place: Path) -> NotACacheError:
    return NotACacheError(
        f"{place} is not there any more: the cache was moved or removed while it was open. Open it "
        "where it is now; nothing is made anew in its old place"
    )
