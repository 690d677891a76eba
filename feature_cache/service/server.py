"""A socket at which an engine serves the other processes of its host."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from multiprocessing import AuthenticationError
from typing import Any

import numpy as np

from ..augment import Draw
from ..cache import MovieFeatures
from ..engine import Frame, Promise, Request, Wanted
from ..errors import (
    FeatureCacheError,
    FrameError,
    MissingRecordError,
    MovieError,
    ServiceError,
)
from ..hashing import DIGEST_BYTES, Digest, canonical_json, frame_digest, mask_digest
from ..key import Record, record_key
from ..movies import Movie, Source
from ..spec import SpaceSpec
from ..system import HAS_ABSTRACT, in_forked_child, start
from . import wire
from .addresses import (
    Address,
    identify,
    is_published,
    list_servers,
    listen,
    publish,
    this_process,
    withdraw,
)
from .client import choose_pixels
from .service import Service
from .wire import GONE, Connection

TELL_SECONDS = 2.0
"""How often a client that waits is told that it does."""
_LOOK_SECONDS = 0.2
_PUBLISHED_SECONDS = 1.0
_MOST_KEYS = 1 << 14
_log = logging.getLogger(__name__)
_servers: weakref.WeakSet[Server] = weakref.WeakSet()


class Server:
    """Serves an engine's records at a socket, in a thread for each connection.

    Parameters
    ----------
    service : Service
    standalone : bool
        Whether this process does nothing else.

    Raises
    ------
    ServiceError
        It can't listen; or nobody could find one that is `standalone`, as no folder for its
        description is this user's alone.
    """

    def __init__(self, service: Service, *, standalone: bool = False) -> None:
        self.service, self._closing = service, False
        self._connections: set[Connection] = set()
        self._threads: set[threading.Thread] = set()
        self.used = self._looked = time.monotonic()
        list(list_servers())  # removes what dead ones left
        process, root = this_process(), service.cache.store.root
        self.address = Address(
            f"{os.getpid()}-{secrets.token_hex(4)}", process.pid, process.started, process.host,
            identify(root), str(root), frozenset(), "", standalone, secrets.token_bytes(32),
        )  # fmt: skip
        try:
            # before it is published: whoever finds it can connect
            self._socket, self.address = listen(self.address)
        except OSError as error:
            raise ServiceError(f"can't listen for DataLoader workers: {error}") from error
        self._socket.settimeout(_LOOK_SECONDS)
        self._thread = threading.Thread(
            target=self._accept, name="feature_cache server", daemon=True
        )
        try:
            self.publish()
            if not start(self._thread):
                raise ServiceError("can't listen for DataLoader workers: no more threads start")
        except ServiceError:
            self.stop()
            self._socket.close()
            raise
        _servers.add(self)

    def publish(self) -> None:
        """Say which backbones there are now, where others look; workers of ours need not."""
        backbones = dict(self.service.backbones)
        devices = {str(getattr(b, "device", "cpu")) for b in backbones.values()}
        self.address = replace(
            self.address, backbones=frozenset(backbones), device=",".join(sorted(devices))
        )
        try:
            publish(self.address)
        except ServiceError as error:
            if self.address.standalone or not HAS_ABSTRACT:
                raise
            _log.info("found by its own workers only: %s", error)

    def __len__(self) -> int:
        """Count who is connected."""
        return len(self._connections)

    def stop(self) -> None:
        """Let nobody in any more; who waits is answered or told. Waits for nothing."""
        # not in a forked child, where `forget` has set it: the description is the parent's
        if not self._closing:
            self._closing = True
            withdraw(self.address.name)

    def close(self) -> None:
        """Stop, and wait a moment for the threads; the engine is closed before."""
        self.stop()
        deadline = time.monotonic() + 5.0
        for thread in [self._thread, *self._threads]:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def forget(self) -> None:
        """Close, in a forked child, what it inherited: the parent goes on with its own."""
        self._closing = True
        self._socket.close()
        for connection in self._connections:
            with suppress(OSError):
                connection.close()
        self._connections, self._threads = set(), set()

    # Threads

    def _accept(self) -> None:
        with self._socket:
            while not self._closing:
                try:
                    opened, _ = self._socket.accept()
                except TimeoutError:
                    self._stay_published()
                    continue
                except OSError as error:
                    _log.warning("can't take a connection: %s", error)
                    # such as too many open files: there may soon be fewer
                    time.sleep(_LOOK_SECONDS)
                    continue
                thread = threading.Thread(
                    target=self._talk, args=(opened,), name="feature_cache client", daemon=True
                )
                self._threads.add(thread)
                if not start(thread):
                    _log.warning("can't take a connection: no more threads start")
                    self._threads.discard(thread)
                    opened.close()  # who asks looks for another
                    time.sleep(_LOOK_SECONDS)

    def _stay_published(self) -> None:
        """Write the description anew where it vanished, as at the end of a login."""
        if time.monotonic() - self._looked < _PUBLISHED_SECONDS or self._closing:
            return
        self._looked = time.monotonic()
        if not is_published(self.address.name):
            self._publish_again()

    def _publish_again(self) -> None:
        with suppress(ServiceError):
            self.publish()
        if self._closing:  # by another thread, meanwhile
            withdraw(self.address.name)

    def _talk(self, opened: socket.socket) -> None:
        try:
            connection = wire.greet(opened, self.address.authkey, server=True)
        except (AuthenticationError, *GONE, ValueError, AssertionError) as error:
            stranger = isinstance(error, AuthenticationError | ValueError | AssertionError)
            level = logging.WARNING if stranger else logging.DEBUG
            _log.log(level, "a connection is refused: %r", error)
            self._threads.discard(threading.current_thread())
            return
        self._connections.add(connection)
        try:
            with connection:
                while self._wait_for(connection):
                    self.used = time.monotonic()
                    self._answer(connection, wire.receive(connection))
                    self.used = time.monotonic()
        except GONE as error:
            _log.debug("a client is gone: %r", error)
        finally:
            self._connections.discard(connection)
            self._threads.discard(threading.current_thread())

    def _wait_for(self, connection: Connection) -> bool:
        # only between conversations: one that has begun is brought to its end
        while not self._closing:
            if connection.poll(_LOOK_SECONDS):
                return True
        return False

    def _answer(self, connection: Connection, header: dict[str, Any]) -> None:
        try:
            if header.get("do") == "want":
                _Conversation(self.service, connection, header).run()
            else:
                raise ServiceError(f"unknown message {str(header.get('do'))[:40]!r}")
        except GONE as error:
            # ServiceError and StoreError are OSErrors too, and don't say that the client is gone
            if isinstance(error, FeatureCacheError):
                wire.send(connection, {"error": wire.error_text(error)})
            raise
        except Exception as error:
            wire.send(connection, {"error": wire.error_text(error)})
            # Only before pixels are sent is it known where the next message begins.
            raise EOFError from error


class _Conversation:
    """One client asks for some records."""

    def __init__(self, service: Service, connection: Connection, header: dict[str, Any]) -> None:
        self.service, self.engine, self.connection = service, service.engine, connection
        self.header = header
        self.keys = _read_keys(header)
        self.need, self.batch_size = int(header["need"]), int(header["batch_size"])
        self.is_ahead = bool(header.get("ahead"))
        if not (0 <= self.need <= len(self.keys) and 1 <= self.batch_size <= _MOST_KEYS):
            raise ServiceError(f"{self.need} of {len(self.keys)} keys, {self.batch_size} at once")
        self.draw = Draw.from_json(header["draw"])
        self.spec = _find_spec(service, header)
        self.space = service.cache.space(self.spec)
        service.progress.add(hits=int(header.get("hits", 0)))

    def run(self) -> None:
        promises = self.engine.find(self.space, self.keys)
        lacking = [i for i, promise in enumerate(promises) if promise is None]
        named = self._read_named(choose_pixels(lacking, self.need, self.batch_size))
        told = {"pixels": [], "named": [*named]} if named else {"pixels": lacking}
        wire.send(self.connection, told)
        self.service.progress.add(misses=sum(i < self.need for i in lacking))
        if lacking and not named:
            named = dict(self._receive_pixels(set(lacking)))
        for i, promise in named.items():
            promises[i] = promise
        self._send_records([self._wait(promise) for promise in promises[: self.need]])

    def _read_named(self, numbers: Sequence[int]) -> dict[int, Promise]:
        """Have frames read here, by the names that the client gave; none where that can't be."""
        if "source" not in self.header or not numbers:
            return {}
        try:
            movie = self._open_named(str(self.header["name"]), str(self.header["origin"]))
            # for the key alone: what is read here is compared with these digests (`MovieKeys.read`)
            movie.know(
                {
                    t: (bytes.fromhex(frame), None if mask is None else bytes.fromhex(mask))
                    for t, frame, mask in self.header["digests"]
                }
            )
            frames = {i: self._know_named(movie, i) for i in numbers}
        except (FeatureCacheError, OSError) as error:
            _log.info("pixels are asked for: %s", error)
            return {}
        return self.service.submit(movie, frames, self.batch_size, ahead=self.is_ahead)

    def _know_named(self, movie: MovieFeatures, number: int) -> int:
        """Give a frame that is there, under the key that was asked for."""
        t = self.header["frames"][number]
        if not 0 <= t < len(movie):
            raise MovieError(f"{movie.name} has {len(movie)} frames here, and {t} is asked for")
        if movie.key(t) != self.keys[number]:
            raise ServiceError(f"{movie.where(t)} came with other digests than its key stands for")
        return int(t)

    def _open_named(self, name: str, origin: str) -> MovieFeatures:
        source = canonical_json(self.header["source"])
        opened = _open_source(source)
        backbone = self.service.backbones[self.spec.backbone.digest.hex()]
        return MovieFeatures(
            self.service.cache, opened.frames, opened.masks, backbone, self.spec, self.draw, name,
            origin, Source.from_json(json.loads(source)),
        )  # fmt: skip

    def _receive_pixels(self, lacking: set[int]) -> Iterator[tuple[int, Promise]]:
        described = wire.receive(self.connection)["frames"]
        numbers = [int(frame["number"]) for frame in described]
        if not set(numbers) <= lacking or len(set(numbers)) < len(numbers):
            raise ServiceError(f"frames {numbers} came, asked were {sorted(lacking)}")
        sizes = [_pixel_bytes(frame, self.spec) for frame in described]
        held = sum(sizes)
        while not self.engine.reserve(held, TELL_SECONDS, ahead=self.is_ahead):
            wire.send(self.connection, {"wait": True})
        try:
            wire.send(self.connection, {"go": True})
            promises = [Promise() for _ in described]
            received = [
                self._receive_frame(frame, size, promise)
                for frame, size, promise in zip(described, sizes, promises, strict=True)
            ]
            self.engine.submit(received)
            # from here on the requests give it back
            held = 0
        finally:
            self.engine.give_back(held)
        yield from zip(numbers, promises, strict=True)

    def _receive_frame(self, header: dict[str, Any], size: int, promise: Promise) -> Request:
        """Read a frame and its mask, and check that they are those of the key."""
        key, where = self.keys[int(header["number"])], str(header["where"])
        sent = [
            wire.receive_array(self.connection, header["frame"], "<f4")
            for _ in range(int(header["seen"]))
        ]
        mask = None
        if header["mask"] is not None:
            mask = wire.receive_array(self.connection, header["mask"], "<i4")
        seen = [Frame(pixels, None, frame_digest(pixels, where), where) for pixels in sent]
        masked = None if mask is None else mask_digest(mask, where)
        context = self.spec.backbone.context
        own = seen[context.before]
        read = Frame(own.pixels, mask, own.digest, where, tuple(seen) if any(context) else ())
        if record_key(self.spec.digest, read.seen_digest, masked, self.draw) != key:
            raise FrameError(f"{where} came with other pixels than its key stands for")
        provenance = header["provenance"]
        if not isinstance(provenance, dict):
            raise ServiceError(f"the provenance of {where} is no object")
        wanted = Wanted(key, self.space, self.spec, self.draw, lambda: provenance, promise)
        model = self.service.model(self.spec.backbone)
        digest = read.seen_digest
        request = Request(model, digest, lambda: read, [wanted], self.batch_size, self.is_ahead)
        request.nbytes = size
        return request

    def _wait(self, promise: Promise | None) -> Record | Exception:
        if promise is None:
            return MissingRecordError("no pixels were sent for a record that is asked for")
        while True:
            try:
                return promise.wait(TELL_SECONDS)
            except TimeoutError:
                self.engine.check()
                wire.send(self.connection, {"wait": True})
            except Exception as error:  # noqa: BLE001 - it goes to who asked for the record
                return error

    def _send_records(self, records: Sequence[Record | Exception]) -> None:
        headers: list[dict[str, Any]] = []
        arrays: list[np.ndarray[Any, Any]] = []
        for record in records:
            if isinstance(record, Exception):
                headers.append({"error": wire.error_text(record)})
                continue
            features, labels = record.features, record.labels
            length = None if labels is None else len(labels)
            headers.append({"features": list(features.shape), "labels": length})
            arrays += [features] if labels is None else [features, labels]
        wire.send(self.connection, {"records": headers}, arrays)


@lru_cache(maxsize=256)
def _open_source(source: str) -> Movie:
    return Source.from_json(json.loads(source)).open()


def _read_keys(header: dict[str, Any]) -> list[Digest]:
    keys = [bytes.fromhex(key) for key in header["keys"]]
    if len(keys) > _MOST_KEYS or any(len(key) != DIGEST_BYTES for key in keys):
        raise ServiceError(f"{len(keys)} keys: expected at most {_MOST_KEYS}, of 16 bytes")
    return keys


def _find_spec(service: Service, header: dict[str, Any]) -> SpaceSpec:
    backbone = service.backbones.get(str(header["backbone"]))
    if backbone is None:
        raise MissingRecordError("this server has no such backbone (any more)")
    spec = SpaceSpec(backbone.spec, header["pooling"], header["dtype"])
    if spec.digest.hex() != header["space"]:
        raise ServiceError(
            f"space {spec.folder_name} is another one for the client: do both run the same "
            "version of feature_cache?"
        )
    return spec


def _pixel_bytes(header: dict[str, Any], spec: SpaceSpec) -> int:
    frame, mask, seen = header["frame"], header["mask"], header["seen"]
    if mask is not None and mask != frame:
        raise ServiceError(f"a frame of {str(frame)[:40]} with a mask of {str(mask)[:40]}")
    if seen != 1 + sum(spec.backbone.context):
        raise ServiceError(f"{str(seen)[:40]} frames for {spec.backbone.context}")
    return wire.array_bytes(frame, "<f4") * (seen + (mask is not None))


def _forget_inherited() -> None:
    for server in list(_servers):
        server.forget()
    _servers.clear()


in_forked_child(_forget_inherited)
