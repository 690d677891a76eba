"""Messages between a server and its clients: a JSON header, then raw arrays. Nothing is pickled.

A conversation is one of

::

    -> {"do": "want", "pooling", "dtype", "backbone", "space", "draw", "keys", "need", …,
        where the movie is in files: "source", "frames": [their numbers],
        "digests": [[frame, digest, digest of the mask], …] of all that the backbone sees}
    <- {"pixels": [numbers of the keys whose frames are to be sent]}, none where "named" lists those
       that the server reads by itself; then straight to the records
    -> {"frames": [{"number", "frame": shape, "seen": how many of it, "mask": shape, …}, …]}
    <- {"go": true}, after memory for them is set aside
    -> the arrays: of each, all frames that the backbone sees, then the mask
    <- {"records": [{"features": shape, "labels": length} or {"error": [class, message]}, …]}
    <- the arrays: features, labels, …

Sizes in headers are checked before anything is allocated. While a client waits, it is told so every
few seconds, so that silence means that the server hangs.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Iterable, Mapping
from multiprocessing import AuthenticationError
from multiprocessing import connection as mp
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import errors
from ..errors import BackboneError, FeatureCacheError, ServiceError
from ..system import limit_waiting

HEADER_BYTES = 1 << 22
"""The longest header that is read."""
BLOCKED_SECONDS = 30.0
"""How long the other side may take in the middle of a message."""
GREETING_SECONDS = 5.0
"""How long it may take to prove that it knows the key."""

Connection = mp.Connection
GONE = (EOFError, OSError)
"""What a connection raises when the other side is gone, or blocked for too long."""


def greet(opened: socket.socket, authkey: bytes, *, server: bool) -> Connection:
    """Make a connection of a socket: each side proves to the other that it knows the key.

    Raises
    ------
    AuthenticationError
        The other side doesn't know it.
    EOFError, OSError
        It is gone, or doesn't answer.
    """
    opened.setblocking(True)
    limit_waiting(opened, GREETING_SECONDS)
    # `Connection` takes the descriptor away; limits are the socket's, by whichever they are set
    file = opened.dup()
    made = mp.Connection(opened.detach())
    try:
        first, second = mp.deliver_challenge, mp.answer_challenge
        for step in (first, second) if server else (second, first):
            step(made, authkey)
        limit_waiting(file, BLOCKED_SECONDS)
    except (AuthenticationError, *GONE, ValueError, AssertionError):
        made.close()
        raise
    finally:
        file.close()
    return made


def send(
    connection: Connection, header: Mapping[str, Any], arrays: Iterable[NDArray[Any]] = ()
) -> None:
    """Send a header, and the bytes of arrays that it describes."""
    connection.send_bytes(json.dumps(header).encode())
    for array in arrays:
        connection.send_bytes(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def receive(connection: Connection) -> dict[str, Any]:
    """Read a header.

    Raises
    ------
    EOFError, OSError
        The other side is gone; or sends what is no header (ServiceError).
    """
    try:
        plain = json.loads(connection.recv_bytes(HEADER_BYTES))
    except (ValueError, RecursionError) as error:
        raise ServiceError(f"the other side sends what is no message: {error}") from error
    if not isinstance(plain, dict):
        raise ServiceError(f"the other side sends a {type(plain).__name__}, expected an object")
    return plain


def array_bytes(shape: object, dtype: str) -> int:
    """Give the size of an array that a header describes; ServiceError for what is no shape."""
    lengths: list[Any] = shape if isinstance(shape, list) else [None]
    if len(lengths) > 4 or not all(type(n) is int and 0 <= n < 1 << 40 for n in lengths):
        raise ServiceError(f"the other side sends shape {str(shape)[:80]}: expected a few lengths")
    return math.prod(lengths) * np.dtype(dtype).itemsize


def receive_array(connection: Connection, shape: list[int], dtype: str) -> NDArray[Any]:
    """Read an array of a shape that was checked; ServiceError where the bytes don't fit."""
    expected = array_bytes(shape, dtype)
    data = connection.recv_bytes(max(1, expected))
    if len(data) != expected:
        raise ServiceError(f"an array of {shape} {dtype} came with {len(data)} bytes")
    return np.frombuffer(data, dtype).reshape(shape)


def error_text(error: BaseException) -> list[str]:
    """Describe an error for another process."""
    return [type(error).__name__, str(error)]


def make_error(name: str, message: str) -> FeatureCacheError:
    """Make the error that `error_text` described."""
    kind = getattr(errors, name, None)
    if not (isinstance(kind, type) and issubclass(kind, FeatureCacheError)):
        return BackboneError(f"{name}: {message}")
    try:
        return kind(message)
    except TypeError:  # one that takes more than a message
        return FeatureCacheError(message)
