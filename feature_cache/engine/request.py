"""What is asked of the engine: frames, the records wanted of each, and who is to be told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Protocol

from ..augment import Draw
from ..hashing import JSON, Digest
from ..key import Record
from ..spec import SpaceSpec
from ..store import Space
from .frame import Frame

if TYPE_CHECKING:
    from .cpu import Embedding
    from .model import Model


_numbers = count()


class Answer(Protocol):
    """Who is told what became of records; in a thread of the engine, once for each."""

    def found(self, record: Record | None) -> None:
        """Take note that it is in the store by now; None where `reads` is False."""

    def computed(self, record: Record) -> None:
        """Take a record just computed, which is committed later."""

    def failed(self, error: Exception, wanted: Sequence[Wanted]) -> None:
        """Take the error in the place of records."""

    @property
    def reads(self) -> bool:
        """Whether a record that is found is to be read."""


@dataclass(frozen=True, slots=True, eq=False)
class Wanted:
    """A record to compute, if it is not there: its key, where it goes and what it is made of.

    Attributes
    ----------
    describe : callable
        Gives its provenance.
    """

    key: Digest
    space: Space
    spec: SpaceSpec
    draw: Draw
    describe: Callable[[], dict[str, JSON]]
    answer: Answer


@dataclass(slots=True, eq=False)
class Request:
    """A frame, and all that is wanted of it: the draws and spaces of one backbone.

    Attributes
    ----------
    model : Model
    digest : bytes, 16
        Of what the backbone sees of the frame.
    read : callable
        Reads frame and mask. Raises FrameError or MovieError where they can't be, or changed.
    wanted : sequence of Wanted
    at_most : int or None
        Slices embedded at once, at most (but always a whole frame); None for as many as fit.
    ahead : bool
        Nobody waits for it yet: it comes after all others.
    nbytes : int
        Bytes of pixels that were reserved for it.
    """

    model: Model
    digest: Digest
    read: Callable[[], Frame]
    wanted: Sequence[Wanted]
    at_most: int | None
    ahead: bool = False
    nbytes: int = 0
    number: int = field(default_factory=lambda: next(_numbers))
    """In which order requests came."""
    due: float = field(default=0.0, init=False)
    """When to look again for what another process computes."""
    held_since: float | None = field(default=None, init=False)
    pause: float = field(default=0.02, init=False)

    @property
    def batch_size(self) -> int:
        """Slices embedded at once."""
        return self.model.fitting if self.at_most is None else self.at_most

    def of(self, wanted: Sequence[Wanted]) -> Request:
        """Give a request for a part of the records."""
        part = replace(self, wanted=wanted)
        # `replace` leaves out what `init` doesn't take, and patience must not begin anew
        part.held_since, part.pause = self.held_since, self.pause
        return part


class View(Protocol):
    """The records of one movie in one space under one draw."""

    @property
    def spec(self) -> SpaceSpec:
        """The space's spec."""

    @property
    def draw(self) -> Draw:
        """The draw."""

    @property
    def space(self) -> Space:
        """The space in the store."""

    def key(self, t: int) -> Digest:
        """Give the key of frame `t`'s record."""

    def seen_digest(self, t: int) -> Digest:
        """Give the digest of what the backbone sees for frame `t`."""

    def provenance(self, t: int) -> dict[str, JSON]:
        """Say where the record of frame `t` comes from."""

    def read(self, t: int) -> Frame:
        """Read frame `t` and its mask."""


def request_frame(
    model: Model, t: int, views: Sequence[tuple[View, Answer]], batch_size: int | None
) -> Request:
    """Ask for a frame's records in several views of one movie: draws, and spaces of a backbone."""
    masked = next((view for view, _ in views if view.spec.pooling is not None), views[0][0])
    wanted = [
        Wanted(view.key(t), view.space, view.spec, view.draw, partial(view.provenance, t), answer)
        for view, answer in views
    ]
    return Request(model, masked.seen_digest(t), partial(masked.read, t), wanted, batch_size)


@dataclass(slots=True, eq=False)
class Part:
    """A requested frame under one of its draws, on its way through the device."""

    request: Request
    embedding: Embedding
    wanted: Sequence[Wanted]
    draw: Draw = field(init=False)
    shape: tuple[int, int] = field(init=False)
    """(H, W) that the backbone sees."""
    depth: int = field(init=False)
    """How many slices it has."""
    rank: tuple[bool, int] = field(init=False)
    """Where it stands: what is ahead of time is last, else who came first is first."""

    def __post_init__(self) -> None:
        each, request = self.embedding, self.request
        self.draw, self.shape, self.depth = each.draw, each.shape, each.frame.depth
        self.rank = request.ahead, request.number


class Promise:
    """A record to come, or the error in its place, for all who wait for it.

    A `Future` has a lock that Ctrl-C can leave held by who waits; who computes would hang on it.

    Parameters
    ----------
    record : Record, optional
        One that has come already.
    """

    reads = True

    def __init__(self, record: Record | None = None) -> None:
        self._record = record
        self._error: BaseException | None = None
        self._news = SimpleQueue[None]()

    @property
    def done(self) -> bool:
        """Whether it was kept, or failed."""
        return self._record is not None or self._error is not None

    def found(self, record: Record | None) -> None:
        """Give the record, as it was read."""
        # the record first, the news second: who hears them looks for it
        self._record = record
        self._news.put(None)

    def computed(self, record: Record) -> None:
        """Give the record, as it was computed."""
        self.found(record)

    def failed(self, error: Exception, wanted: Sequence[Wanted] = ()) -> None:
        """Give an error in its place."""
        self._error = error
        self._news.put(None)

    def wait(self, seconds: float) -> Record:
        """Give the record, or raise what came in its place; TimeoutError after some seconds."""
        if not self.done:
            with suppress(Empty):
                self._news.put(self._news.get(timeout=seconds))  # the next who waits hears it too
        if self._record is not None:
            return self._record
        try:
            raise self._error or TimeoutError
        finally:
            del self  # which the error's traceback would keep, and it the error
