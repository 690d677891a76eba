"""Push and pull: the packs that one side has and the other lacks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import CorruptRecordError, NotACacheError, UnknownNameError
from ..files import list_folder, reading
from ..process import join
from ..space import Mode, Space
from ..store import Store, read_spec
from .layout import GROUP, check_same, check_spec, pack_prefix, packs_prefix, sent_bytes
from .remote import Remote
from .streams import PACKS_AT_ONCE, Progress, each, tell

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackPlace:
    """A pack that one side has.

    Attributes
    ----------
    space, name : str
    bytes : int
        Of all its files.
    """

    space: str
    name: str
    bytes: int


@dataclass(frozen=True, slots=True)
class TransferPlan:
    """What a `push` or `pull` is to move.

    Attributes
    ----------
    spaces : mapping of str to JSON
        Names and specs.
    packs : tuple of PackPlace
        Those that the other side lacks.
    present : int
        Packs that it has.
    """

    spaces: Mapping[str, Mapping[str, Any]]
    packs: tuple[PackPlace, ...]
    present: int

    @property
    def bytes(self) -> int:
        """Sum up what is to be moved."""
        return sum(place.bytes for place in self.packs)


@dataclass(frozen=True, slots=True)
class TransferFailure:
    """A pack that was not moved as it is damaged."""

    space: str
    name: str
    error: CorruptRecordError


@dataclass(frozen=True, slots=True)
class TransferReport:
    """What a `push` or `pull` did.

    Attributes
    ----------
    packs, bytes : int
        Moved by this call.
    present : int
        Packs that the other side had.
    failures : tuple of TransferFailure
        Damaged packs, by space and name; they were not moved.
    """

    packs: int
    bytes: int
    present: int
    failures: tuple[TransferFailure, ...] = ()


def find_missing(
    here: Mapping[str, Collection[str]], there: Mapping[str, Collection[str]]
) -> dict[str, list[str]]:
    """Name the packs of each space that are here and not there, sorted.

    Examples
    --------
    >>> find_missing({"a": ["1", "2"], "b": ["3"]}, {"a": ["1"]})
    {'a': ['2'], 'b': ['3']}
    """
    return {space: sorted(set(packs) - set(there.get(space, ()))) for space, packs in here.items()}


def plan_push(root: Path, remote: Remote, *, spaces: Sequence[str] | None = None) -> TransferPlan:
    """Plan what `push` is to send; nothing is changed.

    Parameters
    ----------
    root : Path
        A cache.
    remote : Remote
    spaces : sequence of str, optional
        Names; all by default.

    Raises
    ------
    UnknownNameError
        For a space that is not in the cache.
    StoreError
        If one of the sides is no cache, or can't be read.
    """
    remote.check_writable()
    with reading(root):
        chosen = _choose(_local_spaces(root), spaces)
        here = {name: _local(root, name, spec).pack_names() for name, spec in chosen.items()}
        known = remote.version() is not None
        there = {name: remote.pack_names(name) for name in chosen} if known else {}
        return _plan(chosen, here, there, lambda *pack: sent_bytes(root / pack_prefix(*pack)))


def push(
    root: Path,
    remote: Remote,
    *,
    spaces: Sequence[str] | None = None,
    plan: TransferPlan | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Send the packs that a remote lacks, each of them verified.

    A pack appears there with its last object. Killed or cut off, another call goes on with what is
    missing; when all is there, nothing is sent.

    Parameters
    ----------
    root, remote, spaces
        As `plan_push`.
    plan : TransferPlan, optional
        By `plan_push`, which this calls itself otherwise.
    progress : callable, optional
        Is told of each number of bytes just sent, by one thread at a time.

    Returns
    -------
    TransferReport
        Damaged packs are not sent and stand under ``failures``.

    Raises
    ------
    As `plan_push`; StoreError also where the remote can't be written.
    """
    plan = plan or plan_push(root, remote, spaces=spaces)
    remote.create(plan.spaces)

    def send(place: PackPlace, told: Progress) -> int | None:
        folder = root / pack_prefix(place.space, place.name)
        with reading(folder):
            try:
                return remote.push_pack(place.space, folder, progress=told)
            except FileNotFoundError:
                # Collected, or merged: what holds its records by now goes with the next push.
                _log.info("%s is gone since the push was planned", folder)
                return None

    report = _transfer(plan, send, progress)
    for space in plan.spaces:
        remote.renew_table(space, root / packs_prefix(space))
    return report


def plan_pull(root: Path, remote: Remote, *, spaces: Sequence[str] | None = None) -> TransferPlan:
    """Plan what `pull` is to fetch; nothing is changed.

    As `plan_push`, of a cache or none yet; the spaces are those of the remote.
    """
    if remote.version() is None:
        raise NotACacheError(f"there is no feature cache at {remote.url}; check the address")
    chosen = _choose(remote.spaces(), spaces)
    sizes = {space: remote.pack_sizes(space) for space in chosen}
    with reading(root):
        local = [_local(root, name, spec) for name, spec in chosen.items()]
        here = {space.name: space.pack_names() for space in local}
    return _plan(chosen, sizes, here, lambda space, name: sizes[space][name])


def _plan(
    spaces: Mapping[str, Mapping[str, Any]],
    here: Mapping[str, Collection[str]],
    there: Mapping[str, Collection[str]],
    size_of: Callable[[str, str], int],
) -> TransferPlan:
    places = tuple(
        PackPlace(space, name, size_of(space, name))
        for space, names in find_missing(here, there).items()
        for name in names
    )
    return TransferPlan(spaces, places, sum(map(len, here.values())) - len(places))


def pull(
    root: Path,
    remote: Remote,
    *,
    spaces: Sequence[str] | None = None,
    plan: TransferPlan | None = None,
    progress: Progress | None = None,
) -> TransferReport:
    """Fetch the packs that a cache lacks; each is verified as a whole before it is committed.

    Parameters, errors and what is given as `push`, with the sides exchanged: a cache is made where
    there is none, and packs that are damaged there are not committed.
    """
    plan = plan or plan_pull(root, remote, spaces=spaces)
    Store(root)
    for space in check_same(_local_spaces(root), plan.spaces, str(root)):
        _local(root, space, plan.spaces[space], "a").create()
    writer = join(root).name

    def fetch(place: PackPlace, told: Progress) -> int:
        packs_folder = root / packs_prefix(place.space)
        return remote.pull_pack(place.space, place.name, packs_folder, progress=told, writer=writer)

    return _transfer(plan, fetch, progress)


def _transfer(
    plan: TransferPlan,
    move: Callable[[PackPlace, Progress], int | None],
    progress: Progress | None,
) -> TransferReport:
    lock = threading.Lock()

    def told(count: int) -> None:
        with lock:
            tell(progress, count)

    def attempt(place: PackPlace) -> int | TransferFailure | None:
        try:
            return move(place, told)
        except CorruptRecordError as error:
            return TransferFailure(place.space, place.name, error)

    results = each(attempt, plan.packs, PACKS_AT_ONCE)
    moved = [result for result in results if isinstance(result, int)]
    failures = [result for result in results if isinstance(result, TransferFailure)]
    failures.sort(key=lambda failure: (failure.space, failure.name))
    return TransferReport(len(moved), sum(moved), plan.present, tuple(failures))


def _choose(
    known: Mapping[str, Mapping[str, Any]], names: Sequence[str] | None
) -> dict[str, Mapping[str, Any]]:
    for name in names or ():
        if name not in known:
            raise UnknownNameError("space", name, known)
    return {name: known[name] for name in (known if names is None else names)}


def _local_spaces(root: Path) -> dict[str, dict[str, Any]]:
    Store(root, "r")
    spaces = {}
    with reading(root / "spaces"):
        for name in list_folder(root / "spaces"):
            folder = root / "spaces" / name
            if (folder / GROUP).exists():
                spaces[name] = check_spec(read_spec(folder), str(folder), name)
    return spaces


def _local(root: Path, name: str, spec: Mapping[str, Any], mode: Mode = "r") -> Space:
    return Space(root / "spaces" / name, spec, mode)
