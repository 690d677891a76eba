"""What lies where in a remote: names that may become paths, metadata, the files of a pack."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import StoreError
from ...hashing import canonical_json, digest_json
from ..space import PACK_NAME
from ..store import own_attributes

GROUP = "zarr.json"
"""The metadata of a group; a pack is there when this object is."""

_PART = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


def is_safe(name: str) -> bool:
    """Tell whether a name from outside may become a part of a path."""
    return _PART.fullmatch(name) is not None and ".." not in name


def packs_prefix(space: str) -> str:
    """Name the folder of a space's packs."""
    if not is_safe(space):
        raise StoreError(
            f"{space!r} is no name of a space: expected letters, digits, '.', '_', '-'"
        )
    return f"spaces/{space}/packs"


def pack_prefix(space: str, pack: str) -> str:
    """Name the folder of a pack."""
    if not PACK_NAME.fullmatch(pack):
        raise StoreError(f"{pack!r} is no name of a pack: expected 32 hex digits")
    return f"{packs_prefix(space)}/{pack}"


def pack_files(pack: Path) -> dict[str, Path]:
    """Give a pack's files by name; what a system leaves there (``.nfs…``) is none of them."""
    files = {str(file.relative_to(pack)): file for file in pack.rglob("*") if file.is_file()}
    return {name: files[name] for name in sorted(files) if all(map(is_safe, name.split("/")))}


def sent_bytes(pack: Path) -> int:
    """Sum up the sizes of a pack's files; 0 where it is gone."""
    try:
        return sum(file.stat().st_size for file in pack_files(pack).values())
    except FileNotFoundError:
        return 0


def parse_spec(text: bytes, where: str, name: str) -> dict[str, Any]:
    """Read the spec of a space from its ``zarr.json``."""
    return check_spec(own_attributes(text, f"{where}/{GROUP}").get("space"), where, name)


def check_spec(spec: Any, where: str, name: str) -> dict[str, Any]:
    """Give the spec of a space, if it is the one that the space's name says."""
    try:
        digest = digest_json(spec).hex()[:8]
    except (TypeError, RecursionError):
        digest = ""
    if not isinstance(spec, dict) or not name.endswith(f"-{digest}"):
        raise StoreError(f"{where}/{GROUP} is damaged: it holds another spec than its name says")
    return spec


def check_same(
    there: Mapping[str, Mapping[str, Any]], wanted: Mapping[str, Mapping[str, Any]], where: str
) -> list[str]:
    """Name the spaces that are missing; those that are there must have the same specs."""
    for name in wanted.keys() & there.keys():
        if canonical_json(there[name]) != canonical_json(wanted[name]):
            raise StoreError(f"the space {name} in {where} has another spec than the one to come")
    return sorted(wanted.keys() - there.keys())
