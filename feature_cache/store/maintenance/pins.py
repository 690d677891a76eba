"""Pins: what garbage collection must keep."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import MissingRecordError, StoreError
from ...hashing import JSON, canonical_json, digest_json
from ..files import make_folder, read_each, read_json, reading, write_text, writing
from ..inspection import record_sources
from ..pack_contents import read_keys
from ..requested_movies import Asked, read_asked
from ..space import Space
from ..store import Store

_LIMIT = 1 << 30
_SHORTEST = 8
"""Of the beginnings of a name in hex: a shorter one would match by chance."""


@dataclass(frozen=True, slots=True)
class Pin:
    """Something to keep.

    Attributes
    ----------
    what : str
        What was asked for.
    space : str
        A space's name.
    keys : frozenset of bytes, or None
        The records; None for all that the space has and will have.
    """

    what: str
    space: str
    keys: frozenset[bytes] | None

    def to_json(self) -> dict[str, JSON]:
        """Give all by name."""
        keys = None if self.keys is None else sorted(key.hex() for key in self.keys)
        return {"what": self.what, "space": self.space, "keys": keys}


def add_pin(store: Store, what: str) -> list[Pin]:
    """Keep a space, a pack, a record or a movie from garbage collection.

    Parameters
    ----------
    store : Store
    what : str
        The beginning of a name of a space or pack, or of a record's key in hex; or a movie, as
        `inspect` shows its name, or its folder's.

    Returns
    -------
    list of Pin
        One for each space concerned.

    Raises
    ------
    MissingRecordError
        There is no such thing.
    StoreError
        The pin can't be written.
    """
    asked = [one for one in read_asked(store.root) if _names_movie(what, one.movie)]
    pins = [pin for space in store.spaces() for pin in _find(space, what, asked)]
    if not pins:
        raise MissingRecordError(
            f"{what!r} is no space, pack, record or movie in {store.root}: see feature-cache ls"
        )
    with writing(store.root):
        folder = store.root / "pins"
        make_folder(folder)
        for pin in pins:
            write_text(folder / _file_name(pin), canonical_json(pin.to_json()))
    return pins


def remove_pin(store: Store, what: str) -> int:
    """Take back `add_pin`; give the number of pins removed.

    Parameters
    ----------
    store : Store
    what : str
        As in `add_pin`; or the name of a space that was pinned by its beginning.

    Raises
    ------
    MissingRecordError
        There is no such pin.
    """
    # Of a space's name the pin of the space alone: what else is pinned in it stays.
    pins = [p for p in read_pins(store.root) if what == p.what or (p.space, p.keys) == (what, None)]
    if not pins:
        known = ", ".join(sorted({pin.what for pin in read_pins(store.root)})) or "nothing"
        raise MissingRecordError(f"{what!r} is not pinned in {store.root}; pinned: {known}")
    with writing(store.root):
        for pin in pins:
            (store.root / "pins" / _file_name(pin)).unlink(missing_ok=True)
    return len(pins)


def read_pins(root: Path) -> list[Pin]:
    """Read all pins.

    Raises
    ------
    StoreError
        One of them is damaged: nothing should be collected before it is repaired.
    """
    with reading(root / "pins"):
        pins, damaged = read_each(root / "pins", read_pin)
    if damaged:
        raise StoreError(
            f"{damaged[0]} is damaged: run feature-cache verify --repair, and pin again"
        )
    return [*pins.values()]


def read_pin(file: Path) -> Pin:
    """Read one; ValueError where the file holds none."""
    try:
        plain = read_json(file, _LIMIT)
        listed = plain["keys"]
        keys = None if listed is None else frozenset(map(bytes.fromhex, listed))
        return Pin(str(plain["what"]), str(plain["space"]), keys)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no pin") from error


def _file_name(pin: Pin) -> str:
    readable = re.sub(r"[^A-Za-z0-9]+", "_", pin.what)[:40]
    return f"{readable}-{digest_json([pin.what, pin.space]).hex()[:16]}.json"


def _find(space: Space, what: str, asked: Sequence[Asked]) -> Iterator[Pin]:
    """Find what a word stands for; `asked` are the movies of that name."""
    if space.name.startswith(what):
        yield Pin(what, space.name, None)
        return
    keys: set[bytes] = set()
    for name in space.walk_packs():
        try:
            held = [key.tobytes() for key in read_keys(space.packs_folder / name)]
        except FileNotFoundError:  # others that come next hold its records
            continue
        if len(what) >= _SHORTEST and name.startswith(what):
            keys.update(held)
        if len(what) >= _SHORTEST:
            keys.update(key for key in held if key.hex().startswith(what))
    wanted = [movie.asked_for(space.name) for movie in asked]
    for key, source in record_sources(space):
        # a record that two movies share says which of them was first
        named = _names_movie(what, str(source.get("movie", "")))
        if named or any(is_wanted(source) for is_wanted in wanted):
            keys.add(key)
    if keys:
        yield Pin(what, space.name, frozenset(keys))


def _names_movie(what: str, movie: str) -> bool:
    """Tell whether someone means this movie: its name or folder, of which one may be relative."""
    asked, names = what.rstrip("/"), {movie, movie.rpartition(" ")[0]} - {""}
    return bool(asked) and any(
        f"/{name}".endswith(f"/{asked}") or f"/{asked}".endswith(f"/{name}") for name in names
    )
