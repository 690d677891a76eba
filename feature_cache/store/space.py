"""The records of one spec: found by key, read from packs, written as new packs."""

from __future__ import annotations

import logging
import os
import re
import secrets
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptRecordError, ReadOnlyCacheError
from ..forks import Lock
from ..hashing import JSON
from ..key import Keys, Record
from ..system import sync_folder
from .files import (
    check_there,
    list_folder,
    make_folder,
    make_folders,
    reading,
    tree_bytes,
    write_group,
    writing,
)
from .index import Index
from .last_uses import Uses
from .listing import Listing
from .pack import Pack, Span
from .pack_contents import read_keys
from .pack_table import read_rows, read_table, write_table
from .process import Presence, join
from .writer import NewRecord, shape_of, write_pack

Mode = Literal["a", "r"]

_log = logging.getLogger(__name__)
PACK_NAME = re.compile(r"[0-9a-f]{32}")
# Each may hold a descriptor, of which a process often has 1024 for everything.
_OPEN_PACKS = 128
# Where packs come and go faster, what is not found by then is a miss, and nobody waits.
_LISTED_AGAIN = 5
_FEW_PACKS, _MANY_PACKS = 64, 256
"""Up to so many packs are read one by one; so many that a table lacks make it worth writing."""


@dataclass(frozen=True, slots=True)
class _Aside:
    """A damaged pack that could not be moved away: which one it was, and what it held."""

    identity: tuple[int, int]
    keys: Keys | None
    error: CorruptRecordError


class Space:
    """The records of one spec. May be shared by threads; pickles and forks open their own files.

    Parameters
    ----------
    path : Path
        The space's folder; it need not exist before the first `write`.
    spec : mapping
        The space's full spec as JSON.
    mode : str
        ``"a"`` or ``"r"``.
    """

    def __init__(self, path: Path, spec: Mapping[str, Any], mode: Mode) -> None:
        self.path, self.spec, self.mode = path, spec, mode
        self.root = path.parent.parent
        self._index = Index()
        self._packs: dict[str, Pack] = {}
        self._aside: dict[str, _Aside] = {}
        self._listing = Listing()
        self._untabled = 0
        self._presence: Presence | None = None
        self._lock = Lock()

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @property
    def packs_folder(self) -> Path:
        """Where the packs are."""
        return self.path / "packs"

    @property
    def folders(self) -> tuple[Space, ...]:
        """Give this space, and the same of folders below it."""
        return (self,)

    def __len__(self) -> int:
        """Count the records known since the last refresh."""
        return len(self._index)

    def __getstate__(self) -> tuple[Path, Mapping[str, Any], Mode]:
        """Leave out index and open packs: another process opens its own."""
        return self.path, self.spec, self.mode

    def __setstate__(self, state: tuple[Path, Mapping[str, Any], Mode]) -> None:
        """Start with nothing open."""
        self.__init__(*state)  # type: ignore[misc]

    def _join(self) -> Presence:
        if self._presence is None or self._presence.is_inherited:
            self._presence = join(self.root, create=self.mode == "a")
            self._presence.add(self)
            # It has the dict, as the space would live on then: `_packs` stays this very one.
            weakref.finalize(self, _note, self._packs, self.name, self._presence.uses)
        return self._presence

    # What is there

    def refresh(self) -> None:
        """Take in packs committed, and let go of packs removed, since the last time.

        Looks at one folder, and no further where nothing changed.

        Raises
        ------
        NotACacheError
            The cache was moved or removed while it was open.
        StoreError
            The system can't read the folders.
        """
        with reading(self.path), self._lock:
            now = Listing.after(self._listing, self.packs_folder)
            if not now.looks[0]:
                check_there(self.root)
            if self._aside or not self._listing.stands(now):
                self._listing = self._list_anew(now)

    def _list_anew(self, now: Listing) -> Listing:
        """Take in the packs as two listings in a row name them; give what the folder looked like.

        A pack that replaces others comes before they go. A listing that was read meanwhile may
        miss all of them, though the folder looks as before, and a pack that is listed may have
        been replaced as well before it is read: then the next listing has another.
        """
        names: set[str] | None = None
        for _ in range(_LISTED_AGAIN):
            # Looked at before it is listed: what comes in between changes how it looks next time.
            now, before = Listing.after(now, self.packs_folder), names
            names = set(list_folder(self.packs_folder))
            is_read = self._take_in(names)
            if is_read and names == before:
                break
        return now

    def _take_in(self, there: set[str]) -> bool:
        """Know the packs of a listing and no others; tell whether all were still there."""
        known = set(self._index.packs)
        gone = known - there
        for name in gone:
            self._packs.pop(name, None)
        index = self._index.drop(gone)
        new = set(filter(PACK_NAME.fullmatch, there - known))
        new -= {name for name in list(self._aside) if self.is_aside(name)}
        if len(new) > _FEW_PACKS:
            table = read_table(self._table).choose(new).proved()
            index = index.extend(table.names, table.counts, table.keys)
            new -= set(table.names)
        found = self._read_keys_of(sorted(new))
        # In one assignment: `contains` and others look into the index without the lock.
        self._index = index.add(found)
        self._untabled += len(found)
        self._renew_table()
        return len(found) == len(new)

    def _read_keys_of(self, names: Sequence[str]) -> dict[str, Keys]:
        found: dict[str, Keys] = {}
        for name in names:
            try:
                found[name] = read_keys(self.packs_folder / name)
            except FileNotFoundError:
                continue
            except CorruptRecordError as error:
                self.condemn(name, error)
        return found

    @property
    def _table(self) -> Path:
        """Where the keys of many packs stand together."""
        return self.root / "tables" / self.name

    def _renew_table(self) -> None:
        """Write the table anew where it lacks too many of the packs."""
        names, enough = self._index.packs, max(_MANY_PACKS, len(self._index.packs) // 8)
        if self.mode == "r" or self._untabled < enough:
            return
        # Another process may have written it since these packs were read.
        old = read_table(self._table)
        missing = sorted(set(names) - set(old.names))
        self._untabled = len(missing)
        if len(missing) >= enough:
            new = read_rows(self.packs_folder / name for name in missing)
            write_table(self.root, self._table, old.choose(set(names)).extended(new))
            self._untabled = 0

    def pack_names(self) -> list[str]:
        """List the committed packs, sorted."""
        return list(filter(PACK_NAME.fullmatch, list_folder(self.packs_folder)))

    def walk_packs(self) -> Iterator[str]:
        """Name the committed packs, and those that replace them while they are gone through."""
        seen = set[str]()
        while new := set(self.pack_names()) - seen:
            seen |= new
            yield from sorted(new)

    def contains(self, keys: Keys) -> NDArray[np.bool_]:
        """Tell which keys have a committed record: (m,) bool. Reads no record."""
        found = self._index.find(keys)[0] >= 0
        if not found.all():
            self._join()
            self.refresh()
            found = self._index.find(keys)[0] >= 0
        return found

    def packs_of(self, keys: Keys) -> list[str]:
        """Name the packs that hold these records, as known since the last refresh."""
        return self._index.packs_of(keys)

    def holders(self, keys: Keys) -> list[str]:
        """Name all packs that hold one of these records, as known since the last refresh."""
        return self._index.holders(keys)

    def pack_records(self) -> dict[str, int]:
        """Count the records of each pack, as known since the last refresh."""
        index = self._index
        return dict(zip(index.packs, index.counts().tolist(), strict=True))

    def pack_bytes(self) -> dict[str, int]:
        """Give what each pack takes on the disk, with its folders, as known since the refresh."""
        table = read_table(self._table)
        known = dict(zip(table.names, table.sizes.tolist(), strict=True))
        names = self._index.packs
        return {n: known.get(n) or tree_bytes(self.packs_folder / n) for n in names}

    # Reading

    def read(self, keys: Keys) -> list[Record | None]:
        """Read records, verified; None where there is none.

        A pack with a wrong record is set aside (mode ``"a"``: moved to ``quarantine/``), with a
        warning in the log, and its records are missing from then on.

        Parameters
        ----------
        keys : (m, 16) uint8

        Raises
        ------
        CorruptRecordError
            In mode ``"r"``, for a record that is not there but may be in a damaged pack.
        StoreError
            If the system can't read the files.
        """
        found = self.find(keys)
        if self.mode == "r":
            absent = [i for i, record in enumerate(found) if record is None]
            self._raise_damage(keys[absent])
        return found

    def find(self, keys: Keys) -> list[Record | None]:
        """Read records as `read`; one lost to damage is None in mode ``"r"`` as well."""
        found: list[Record | None] = [None] * len(keys)
        absent: Sequence[int] = range(len(keys))
        for _ in range(_LISTED_AGAIN):
            # Taken before: what another thread takes in or lets go of while this reads counts too.
            index = self.index
            self._find_into(found, absent, keys[absent])
            absent = [i for i, record in enumerate(found) if record is None]
            if not absent:
                break
            self.refresh()
            if self._index is index:  # nothing came, and nothing went, so there is none
                break
        return found

    def _find_into(self, found: list[Record | None], places: Sequence[int], keys: Keys) -> None:
        for first, span in self.gather(keys):
            for number, record in enumerate(span.records(), first):
                found[places[number]] = record

    def gather(self, keys: Keys) -> list[tuple[int, Span]]:
        """Read what is known to be in this folder, records that lie side by side at once, verified.

        Parameters
        ----------
        keys : (m, 16) uint8

        Returns
        -------
        list of (int, Span)
            A span holds the records of keys[i : i + len(span)]. What no span holds is not here, or
            damaged, or not yet known of: `find` looks further.
        """
        self._join()
        with reading(self.path), self._lock:
            return list(self._gather(keys))

    @property
    def index(self) -> Index:
        """Where the records are, as known since the last refresh; another object after a change."""
        self._join()
        return self._index

    def view(self, index: Index, pack: int, start: int, stop: int) -> Span | None:
        """Give records that lie side by side in one pack, verified, by their places in an index.

        None where the index is not the newest, where the pack is not open yet, or damaged, for what
        has a codec, and for several grids: `read` them.

        Parameters
        ----------
        index : Index
            From `index`.
        pack, start, stop : int
            Number of the pack and rows in it.
        """
        self._join()
        with self._lock, suppress(CorruptRecordError, OSError):
            opened = self._packs.get(index.packs[pack]) if self._index is index else None
            if opened is not None and opened.is_span(start, stop):
                return opened.spans(start, stop)[0]
        return None

    def _gather(self, keys: Keys) -> Iterator[tuple[int, Span]]:
        index = self._index
        packs, rows = index.find(keys)
        # Each key that is absent is apart: -1 does not follow on -1.
        apart = (packs[1:] != packs[:-1]) | (rows[1:] != rows[:-1] + 1)
        bounds = [0, *(np.flatnonzero(apart) + 1).tolist(), len(keys)]
        for first, end in pairwise(bounds):
            if end == first or (number := int(packs[first])) < 0:
                continue
            row, name = int(rows[first]), index.packs[number]
            yield from self._read_spans(first, name, row, row + end - first)

    def _read_spans(
        self, place: int, name: str, start: int, stop: int
    ) -> Iterator[tuple[int, Span]]:
        """Read rows of one pack, those before a damaged one as well; give where each belongs."""
        try:
            spans = self._spans_of(name, start, stop)
        except FileNotFoundError:
            # A pack that replaced it may have the records: `find` lists again, and tries there.
            self._forget(name)
        except CorruptRecordError as error:
            if stop - start == 1:
                self.condemn(name, error)
            else:
                for row in range(start, stop):
                    yield from self._read_spans(place + row - start, name, row, row + 1)
        else:
            for span in spans:
                yield place, span
                place += len(span)

    def _spans_of(self, name: str, start: int, stop: int) -> list[Span]:
        if (pack := self._packs.get(name)) is not None:
            with suppress(OSError):  # CorruptRecordError too
                return pack.spans(start, stop)
            # Another process may have set this pack aside since, and written it anew.
        return self._open(name).spans(start, stop)

    def _open(self, name: str) -> Pack:
        self._packs.pop(name, None)
        pack = Pack(self.packs_folder / name)
        if pack.features.dtype != self.spec.get("dtype", pack.features.dtype):
            raise CorruptRecordError(f"{pack.path} holds {pack.features.dtype}: not its space's")
        while len(self._packs) >= _OPEN_PACKS:
            oldest = next(iter(self._packs))
            # Noted as it goes: `note` only asks the packs that are open.
            _note({oldest: self._packs.pop(oldest)}, self.name, self._join().uses)
        self._packs[name] = pack
        return pack

    def _forget(self, name: str) -> None:
        self._packs.pop(name, None)
        self._index = self._index.drop({name})
        # The next refresh lists, however the folder looks: its times may be old on a network.
        self._listing = Listing()

    # Damage

    def condemn(self, name: str, error: CorruptRecordError) -> None:
        """Let nobody read a damaged pack again: move it away, or else keep it in mind.

        One that is sound by now stays: it was removed while it was read, and written again.
        """
        with self._lock:  # compaction comes here from a thread of its own
            self._condemn(name, error)

    def _condemn(self, name: str, error: CorruptRecordError) -> None:
        self._forget(name)
        try:
            self._open(name).check()
            return
        except FileNotFoundError:
            return
        except CorruptRecordError:
            keys = self._keys_of(name)
            self._packs.pop(name, None)
        if self.mode == "a":
            target = quarantine_folder(self, name)
            with suppress(OSError):
                # Without permission it is kept in mind below; where another was first, it is gone.
                make_folder(target.parent)
                (self.packs_folder / name).rename(target)
                _log.warning("%s; the pack goes to %s, its records count as missing", error, target)
                return
        with suppress(FileNotFoundError):
            self._aside[name] = _Aside(self._identity(name), keys, error)
            _log.warning("%s; the pack stays where it is, its records count as missing", error)

    def _keys_of(self, name: str) -> Keys | None:
        with suppress(OSError):
            return read_keys(self.packs_folder / name)
        return None

    def _identity(self, name: str) -> tuple[int, int]:
        status = (self.packs_folder / name).stat()
        # A pack that is written anew may get the inode that has become free.
        return status.st_ino, status.st_ctime_ns

    def is_aside(self, name: str) -> bool:
        """Tell whether a pack is set aside; one written anew under its name is not."""
        if name not in self._aside:
            return False
        with suppress(OSError):
            if self._aside[name].identity == self._identity(name):
                return True
        del self._aside[name]
        return False

    def _raise_damage(self, absent: Keys) -> None:
        lost = {key.tobytes() for key in absent}
        # Listed at once: another thread may set a pack aside meanwhile.
        for aside in list(self._aside.values()) if lost else ():
            if aside.keys is None or lost & {key.tobytes() for key in aside.keys}:
                raise CorruptRecordError(
                    f"{aside.error}. The cache can only be read: run feature-cache verify --repair "
                    "where it may be written, and warm it again"
                ) from aside.error

    # Writing

    def write(
        self, entries: Sequence[NewRecord], provenance: Mapping[str, JSON], codec: str = "raw"
    ) -> list[str]:
        """Commit records: when this returns, they survive a crash; before, none is there.

        Parameters
        ----------
        entries : sequence of NewRecord
            Any number, keys unique. Grids of different shapes go to different packs.
        provenance : mapping
            What is common to these records.
        codec : str
            One of `feature_cache.store.writer.CODECS`.

        Returns
        -------
        list of str
            The names of the packs.

        Raises
        ------
        ReadOnlyCacheError
            In mode ``"r"``, or where the folder can't be written.
        StoreError
            When the disk is full; nothing is left behind.
        """
        self.create()
        with writing(self.path):
            names = [self._write_pack(group, provenance, codec) for group in _by_shape(entries)]
        self.refresh()
        return names

    def _write_pack(
        self, entries: Sequence[NewRecord], provenance: Mapping[str, JSON], codec: str
    ) -> str:
        # Without the lock: it has a folder of its own until it is renamed, and others read on.
        return write_pack(
            self.packs_folder,
            entries,
            provenance,
            codec,
            writer=self._join().name,
            unusable=set(self._aside),
        )

    def create(self) -> None:
        """Make the space's folders, where there are none.

        ReadOnlyCacheError in mode ``"r"`` and without permission; StoreError on a full disk.
        """
        if self.mode == "r":
            raise ReadOnlyCacheError(f"{self.path} was opened with mode 'r' and can't be written")
        if (self.path / "zarr.json").exists():
            return
        check_there(self.root)
        with writing(self.path):
            make_folders(self.packs_folder, self.root)
            for folder in (self.path.parent, self.packs_folder):
                write_group(folder, {})
            for folder in (self.root, self.path.parent, self.path):
                sync_folder(folder)
            # Last: where this file is, nobody makes or syncs the folders again.
            write_group(self.path, {"feature_cache": {"space": dict(self.spec)}})

    # Use and size

    def note(self) -> None:
        """Tell this process's presence which packs were read since the last time."""
        if self._presence is not None:
            with self._lock:
                _note(self._packs, self.name, self._presence.uses)

    def pack_times(self) -> dict[str, float]:
        """Give when each pack was last used, or written, as far as its folder says.

        Returns
        -------
        dict of str to float
            Seconds since 1970, by name. `maintenance.last_uses` also knows what living processes
            read lately.
        """
        times: dict[str, float] = {}
        try:
            found = list(os.scandir(self.packs_folder))
        except (FileNotFoundError, NotADirectoryError):
            return times
        for entry in found:
            if PACK_NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    times[entry.name] = entry.stat().st_mtime
        return times

    def disk_bytes(self) -> int:
        """Sum up what all files and folders of the packs take on the disk."""
        self.refresh()
        return sum(self.pack_bytes().values())


def _note(packs: Mapping[str, Pack], space: str, uses: Uses) -> None:
    used = [name for name, pack in packs.items() if pack.used]
    for name in used:
        packs[name].used = False
    uses.add(space, used)


def quarantine_folder(space: Space, name: str) -> Path:
    """Give a new name in the quarantine for a pack."""
    return space.root / "quarantine" / f"{space.name}-{name}-{secrets.token_hex(4)}"


def _by_shape(entries: Sequence[NewRecord]) -> Iterator[list[NewRecord]]:
    groups: dict[tuple[int, ...], list[NewRecord]] = {}
    for entry in entries:
        groups.setdefault(shape_of(entry.record), []).append(entry)
    yield from groups.values()
