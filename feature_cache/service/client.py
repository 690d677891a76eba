"""A process that asks a server for records."""

from __future__ import annotations

import logging
import socket
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import AuthenticationError
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import MovieFeatures
from ..engine import Frame
from ..errors import FeatureCacheError, FrameError, MovieError, ServiceError
from ..key import Record
from ..system import SOCKET_FAMILY, in_forked_child
from . import wire
from .addresses import Address, withdraw
from .wire import GONE, Connection

SILENT_SECONDS = 60.0
"""A server that says nothing for so long hangs."""
_CONNECT_SECONDS, _FULL_SECONDS = 5.0, 0.01
_LOOK_SECONDS = 0.5
_log = logging.getLogger(__name__)
_clients: weakref.WeakSet[Client] = weakref.WeakSet()


@dataclass(frozen=True, slots=True)
class OwnerAnswer:
    """Records that were asked for, and the numbers of those frames that were to be computed."""

    records: list[Record | FeatureCacheError]
    sent: Sequence[int]


@dataclass(frozen=True, slots=True)
class Ask:
    """What to have computed, of one movie.

    Attributes
    ----------
    movie : MovieFeatures
    block : sequence of int
        Frames to have computed.
    need : int
        How many of these, from the first on, are to be answered.
    batch_size : int
        Frames to embed at once, and to compute at most beside those that are needed.
    ahead : bool
        Nobody waits for them.
    hits : int
        Records that were found since the last time, to be counted.
    """

    movie: MovieFeatures
    block: Sequence[int]
    need: int
    batch_size: int
    ahead: bool = False
    hits: int = 0

    def to_json(self) -> dict[str, Any]:
        """Give the message that asks."""
        movie, spec = self.movie, self.movie.spec
        return {
            "do": "want",
            "backbone": spec.backbone.digest.hex(),
            "pooling": spec.pooling,
            "dtype": spec.dtype,
            "space": spec.digest.hex(),
            "draw": movie.draw.to_json(),
            "keys": [movie.key(t).hex() for t in self.block],
            "need": self.need,
            "batch_size": self.batch_size,
            "ahead": self.ahead,
            "hits": self.hits,
        }

    def names(self) -> dict[str, Any]:
        """Give what else the message has where the movie can be opened by others."""
        movie, source = self.movie, self.movie.source
        if source is None:
            return {}
        return {
            "source": source.absolute().to_json(),
            "name": movie.name,
            "origin": movie.origin,
            "frames": list(self.block),
            "digests": [
                [t, frame.hex(), mask and mask.hex()]
                for t, (frame, mask) in movie.digests_seen(self.block).items()
            ],
        }


def connect(address: Address) -> Connection:
    """Connect to a server; files of one that is gone are removed.

    Raises
    ------
    ServiceError
        It is gone, hangs, or has another key.
    """
    opened = socket.socket(SOCKET_FAMILY, socket.SOCK_STREAM)
    try:
        _connect_in_turn(opened, address)
        return wire.greet(opened, address.authkey, server=False)
    except (ConnectionRefusedError, FileNotFoundError) as error:
        # one that can't be seen from here may well listen, where others reach it: its files stay
        if address.runs is not None:
            withdraw(address.name)
        raise ServiceError(f"{address} does not listen any more: {error}") from error
    except (AuthenticationError, *GONE, ValueError, AssertionError) as error:
        raise ServiceError(f"{address} can't be connected to: {error!r}") from error
    finally:
        # `greet` has taken the descriptor out of it by then
        opened.close()


def _connect_in_turn(opened: socket.socket, address: Address) -> None:
    """Connect; where many workers come at once, when there is room for one more."""
    opened.settimeout(_CONNECT_SECONDS)
    deadline = time.monotonic() + _CONNECT_SECONDS
    while True:
        try:
            opened.connect(address.socket)
            return
        except BlockingIOError:  # at once, whatever the limit: the queue of the socket is full
            if time.monotonic() >= deadline:
                raise
            time.sleep(_FULL_SECONDS)


class Client:
    """A connection to one server.

    Parameters
    ----------
    address : Address

    Raises
    ------
    ServiceError
        The server is gone, or does not answer.
    """

    def __init__(self, address: Address) -> None:
        self.address, self._heard = address, time.monotonic()
        self._connection = connect(address)
        _clients.add(self)

    def close(self) -> None:
        """Close the connection."""
        with suppress(OSError):
            self._connection.close()

    def fetch(self, ask: Ask) -> OwnerAnswer:
        """Ask for records of frames: by their names, or else with their pixels.

        Pixels are sent where the server can't read the frames, or reads others.

        Returns
        -------
        OwnerAnswer
            A record or an error for each of the first `need` frames.

        Raises
        ------
        ServiceError
            The server is gone, hangs, or refuses.
        FrameError, MovieError
            A frame that is needed can't be read.
        """
        try:
            answer = self._ask(ask, named=True)
            # the server may see other files of these names: the pixels that are read here count
            if any(isinstance(record, FrameError | MovieError) for record in answer.records):
                answer = replace(self._ask(replace(ask, hits=0), named=False), sent=answer.sent)
            return answer
        except ServiceError:
            self.close()
            raise
        except FeatureCacheError:
            self.close()  # in the middle of a conversation
            raise
        except (*GONE, LookupError, TypeError, ValueError) as error:
            self.close()
            raise ServiceError(self._say(f"is gone ({error!r})")) from error

    def _ask(self, ask: Ask, *, named: bool) -> OwnerAnswer:
        self._send(ask.to_json() | (ask.names() if named else {}))
        told = self._receive("pixels")
        sent = told.get("named") or choose_pixels(told["pixels"], ask.need, ask.batch_size)
        if told["pixels"]:
            self._send_pixels(ask.movie, ask.block, sent, ask.need)
        return OwnerAnswer(self._receive_records(ask.movie.spec.dtype), sent)

    def _send_pixels(
        self, movie: MovieFeatures, block: Sequence[int], numbers: Sequence[int], need: int
    ) -> None:
        frames = read_frames(movie, block, numbers, need)
        described = [
            {
                "number": i,
                "frame": list(frame.pixels.shape),
                "seen": len(frame.seen),
                "mask": None if frame.mask is None else list(frame.mask.shape),
                "where": frame.where,
                "provenance": movie.provenance(block[i]),
            }
            for i, frame in frames.items()
        ]
        self._send({"frames": described})
        self._receive("go")
        for frame in frames.values():
            for one in frame.seen:
                self._connection.send_bytes(_bytes_of(one.pixels.astype("<f4", copy=False)))
            if frame.mask is not None:
                self._connection.send_bytes(_bytes_of(frame.mask))

    def _receive_records(self, dtype: str) -> list[Record | FeatureCacheError]:
        records: list[Record | FeatureCacheError] = []
        for described in self._receive("records")["records"]:
            if "error" in described:
                records.append(wire.make_error(*described["error"]))
                continue
            features = wire.receive_array(self._connection, described["features"], dtype)
            labels = None
            if described["labels"] is not None:
                labels = wire.receive_array(self._connection, [described["labels"]], "<i4")
            records.append(Record(features, labels))
        return records

    def _send(self, header: dict[str, Any]) -> None:
        wire.send(self._connection, header)
        self._heard = time.monotonic()

    def _receive(self, expected: str) -> dict[str, Any]:
        """Wait for a message; raise what the server says went wrong."""
        while True:
            while not self._connection.poll(_LOOK_SECONDS):
                self._check_alive()
            header = wire.receive(self._connection)
            self._heard = time.monotonic()
            if "error" in header:
                raise wire.make_error(*header["error"])
            if expected in header:
                return header
            if "wait" not in header:
                raise ServiceError(self._say(f"sends {sorted(header)}, expected {expected}"))

    def _check_alive(self) -> None:
        if self.address.runs is False:
            raise ServiceError(self._say("is gone"))
        if time.monotonic() - self._heard > SILENT_SECONDS:
            raise ServiceError(self._say(f"said nothing for {SILENT_SECONDS:.0f} s"))

    def _say(self, what: str) -> str:
        return (
            f"{self.address}, which computes for {self.address.root}, {what}; what it had "
            "committed is kept: start it again"
        )


def choose_pixels(lacking: Sequence[int], need: int, batch_size: int) -> list[int]:
    """Choose whose pixels to send: all that are needed, and others to make it a full batch.

    Where none is needed, all: they are read ahead.

    Examples
    --------
    >>> choose_pixels([2, 3, 4, 5, 6, 7], need=3, batch_size=4)
    [2, 3, 4, 5]
    """
    if not need:
        return list(lacking)
    needed = [i for i in lacking if i < need]
    if not needed:
        return []
    return [*needed, *[i for i in lacking if i >= need][: max(0, batch_size - len(needed))]]


def read_frames(
    movie: MovieFeatures, block: Sequence[int], numbers: Sequence[int], need: int
) -> dict[int, Frame]:
    """Read the frames of some numbers of a block; one that nobody needs may fail."""
    read = {}
    for i in numbers:
        try:
            read[i] = movie.read(block[i])
        except (FeatureCacheError, OSError, ValueError) as error:
            if i < need:
                raise
            _log.info("not read ahead: %s", error)
    return read


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _forget_inherited() -> None:
    for client in list(_clients):
        # the child's copy of the descriptor: the parent's connection stays as it is
        client.close()
    _clients.clear()


in_forked_child(_forget_inherited)
