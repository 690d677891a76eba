"""Claims: who computes which record, so that work is done once.

A claim is a file made exclusively, ``claims/<what>``, that holds the name of a process. It counts
as long as that process lives and is heard of. Nothing rests on a claim but economy: a record
computed twice is the same record.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ..errors import ReadOnlyCacheError
from ..system import remove, replace
from .files import TEMPORARY_PREFIX, create_exclusive, list_folder, make_folder, read_file, writing
from .process import SILENT_SECONDS, holds_claims, join

NAMELESS_SECONDS = 10.0
"""How long a claim that names nobody yet counts: a writer may be between making and writing it."""

_log = logging.getLogger(__name__)
_TAKEOVER = "-takeover"
_ASKED = "asked-"
"""Who waits for a record makes a file of this and its holder's name: commit soon."""
_asked: dict[Path, float] = {}
"""When this process was last asked, by cache; all that compute in it look here."""
_HOLDER_BYTES = 4096


class Claims:
    """The claims in one cache, seen by this process.

    Parameters
    ----------
    root : Path
        The cache's folder, writable.
    """

    def __init__(self, root: Path) -> None:
        self.folder, self._root = root / "claims", root
        self._asks: set[Path] = set()

    def take(self, names: Iterable[str]) -> list[bool]:
        """Claim many things; tell for each whether it is now this call's.

        A claim of a process that is dead or silent is taken over. One of this process's own is not
        given twice. Without permission to claim, everything is this call's.

        Raises
        ------
        StoreError
            The disk is full.
        """
        wanted = list(names)
        try:
            with writing(self.folder):
                make_folder(self.folder)
                return self._take_all(wanted)
        except ReadOnlyCacheError as error:
            _log.warning("nothing is claimed, so work may be done twice: %s", error)
            return [True] * len(wanted)

    def _take_all(self, names: Sequence[str]) -> list[bool]:
        won = [False] * len(names)
        try:
            for i, name in enumerate(names):
                won[i] = self._take(name)
        except OSError:
            self.release(name for name, mine in zip(names, won, strict=True) if mine)
            raise
        return won

    def _take(self, name: str) -> bool:
        own = join(self._root).name
        return create_exclusive(self.folder / name, own) or self._take_over(name)

    def release(self, names: Iterable[str]) -> None:
        """Give up claims; those that another process took over stay its own."""
        own = join(self._root).name
        for name in names:
            # Between look and removal another may take it over: then it is computed twice.
            with suppress(OSError):
                if self.holder(name) == own:
                    remove(self.folder / name)

    def holder(self, name: str) -> str | None:
        """Name the process that claims something; None where there is no claim.

        Empty where the file doesn't say, or can't be read.
        """
        try:
            return read_file(self.folder / name, _HOLDER_BYTES).decode(errors="replace")
        except FileNotFoundError:
            return None
        except OSError:
            # Of another user, perhaps: it counts like one whose name is not written yet.
            return ""
        except ValueError:
            return "no process"

    def is_held(self, name: str) -> bool:
        """Tell whether there is a claim that counts, of this process or another."""
        holder = self.holder(name)
        return holder is not None and self._counts(name, holder, join(self._root).now())

    def ask(self, names: Iterable[str]) -> None:
        """Ask the holders of some claims to commit soon what they have; where that can be."""
        for holder in {self.holder(name) for name in names} - {None, ""}:
            if holder is not None and "/" not in holder:
                with suppress(OSError):
                    file = self.folder / f"{_ASKED}{holder}"
                    # Like a claim of the holder's: gc leaves it there while that one lives.
                    create_exclusive(file, holder)
                    self._asks.add(file)

    def ask_no_more(self) -> None:
        """Take back what was asked, of whoever has not seen it: nobody waits here."""
        asks, self._asks = self._asks, set()
        for file in asks:
            with suppress(OSError):
                file.unlink()

    def asked(self) -> float:
        """Give when this process was last asked to commit soon, by `time.monotonic`."""
        try:
            (self.folder / f"{_ASKED}{join(self._root).name}").unlink()
            _asked[self._root] = time.monotonic()
        except OSError:
            pass
        return _asked.get(self._root, float("-inf"))

    def _take_over(self, name: str) -> bool:
        holder = self.holder(name)
        if holder is None or self._counts(name, holder, join(self._root).now()):
            return False
        # One taker at a time: the marker is exclusive, and its owner looks once more.
        marker, own = self.folder / f"{name}{_TAKEOVER}", join(self._root).name
        if not create_exclusive(marker, own):
            # Of a taker that died: removed, and the next call may try.
            if not self._holds(marker.name, join(self._root).now()):
                marker.unlink(missing_ok=True)
            return False
        try:
            if self.holder(name) != holder:
                return False
            _log.info("taking over the claim %s of %s, which is gone", name, holder or "nobody")
            # Replaced in one step: were the old one removed first, a third could make its own.
            temporary = self.folder / f"{TEMPORARY_PREFIX}{secrets.token_hex(8)}"
            create_exclusive(temporary, own)
            replace(temporary, self.folder / name)
            return True
        finally:
            marker.unlink(missing_ok=True)

    def _counts(self, name: str, holder: str, now: float) -> bool:
        if not holder:
            return self._is_young(self.folder / name, now, NAMELESS_SECONDS)
        return holds_claims(self._root, holder, now)

    def _is_young(self, file: Path, now: float, seconds: float) -> bool:
        try:
            return now - file.stat().st_mtime <= seconds
        except FileNotFoundError:
            return False

    def leftovers(self, now: float) -> list[Path]:
        """List the files of claims that no longer count; `now` as the file system has it."""
        names = list_folder(self.folder)
        return [self.folder / name for name in names if not self._holds(name, now)]

    def _holds(self, name: str, now: float) -> bool:
        if name.startswith(TEMPORARY_PREFIX):
            return self._is_young(self.folder / name, now, SILENT_SECONDS)
        holder = self.holder(name)
        return holder is not None and self._counts(name, holder, now)
