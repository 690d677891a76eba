"""Digests of files, remembered, so that a warm start need not read them again.

A file is known by path, size, modification time (ns) and inode, as git's index and ccache know
theirs, and not remembered before it is two seconds old: a younger one might still change within
the resolution of its time stamp. The memo is each user's own (`memo_folder`), as paths and inodes
mean nothing on another machine. Losing it costs time, never numbers.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path

import platformdirs

from .hashing import JSON, Digest, canonical_json, digest_json

_log = logging.getLogger(__name__)
_MINIMUM_AGE_NS = 2_000_000_000


def memo_folder() -> Path:
    """Give the folder of the memo: ``FEATURE_CACHE_MEMO``, or one in the user's cache folder."""
    chosen = os.environ.get("FEATURE_CACHE_MEMO")
    return Path(chosen) if chosen else Path(platformdirs.user_cache_dir("feature_cache")) / "memo"


def remembered_digest(file: Path, purpose: JSON, compute: Callable[[], Digest]) -> Digest:
    """Give the digest that `compute` makes of a file, from memory where the file is unchanged.

    Parameters
    ----------
    file : Path
    purpose : JSON
        What the digest is of; the same file may have several.
    compute : callable
        Reads the file and gives 16 bytes.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    """
    before = _identity(file)
    entry = memo_folder() / f"{digest_json([str(file.absolute()), purpose]).hex()}.json"
    known = _recall(entry, before)
    if known is not None:
        return known
    digest = compute()
    if _identity(file) == before and _old_enough(file):
        _remember(entry, before, digest)
    return digest


def _identity(file: Path) -> list[JSON]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def _old_enough(file: Path) -> bool:
    return time.time_ns() - file.stat().st_mtime_ns >= _MINIMUM_AGE_NS


def _recall(entry: Path, identity: list[JSON]) -> Digest | None:
    try:
        known = json.loads(entry.read_bytes())
        return bytes.fromhex(known["digest"]) if known["identity"] == identity else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        _log.warning("ignoring the memo %s, which can't be read: %s", entry, error)
        return None


def _remember(entry: Path, identity: list[JSON], digest: Digest) -> None:
    temporary = entry.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(canonical_json({"identity": identity, "digest": digest.hex()}))
        temporary.replace(entry)
    except OSError as error:
        _log.info("can't remember digests in %s: %s", entry.parent, error)
