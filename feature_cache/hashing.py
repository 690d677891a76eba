"""Canonical JSON and digests: the ground that every key stands on.

A digest is 16 bytes of xxh3-128. It is fast, and not cryptographic: whoever may write to a
shared cache is trusted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import xxhash
from numpy.typing import NDArray

from .errors import FrameError, FrameTypeError

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
Digest: TypeAlias = bytes
"""16 bytes, xxh3-128, big-endian as xxhash gives them."""

DIGEST_BYTES = 16
_FLOAT32, _INT32 = np.dtype(np.float32), np.dtype(np.int32)
_LARGEST = np.iinfo(_INT32).max
_BLOCK = 1 << 16
"""Pixels converted at once: they stay in the processor's cache until they are hashed."""


def canonical_json(value: object) -> str:
    """Write `value` as JSON in the one way that equal values share.

    Keys sorted, no spaces, ASCII, floats as their shortest exact form, ``-0.0`` as ``0.0``.
    NumPy scalars count as the Python numbers they hold, tuples as lists.

    Raises
    ------
    TypeError
        For anything else, and for NaN or infinity; the message names the place.

    Examples
    --------
    >>> canonical_json({"b": (1, 2.0), "a": None})
    '{"a":null,"b":[1,2.0]}'
    """
    return _encode(_plain(value, "$"))


_encode = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False).encode


def _plain(value: object, where: str) -> JSON:
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{where} is {value!r}: only finite numbers can enter a key")
        return value + 0.0
    if isinstance(value, list | tuple):
        if all(type(item) in (int, str) for item in value):
            return list(value)  # such as the places of samples, of which there are many
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {_text(key, where): _plain(item, f"{where}.{key}") for key, item in value.items()}
    raise TypeError(
        f"{where} is a {type(value).__name__}, which can't enter a key: "
        "expected None, bool, int, float, str, list, tuple or a mapping of these"
    )


def _text(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{where} has the key {key!r}: only strings can name a part of a key")
    return key


def digest_bytes(*parts: bytes | memoryview) -> Digest:
    """Digest the concatenation of `parts` (buffers must be C-contiguous)."""
    hasher = xxhash.xxh3_128()
    for part in parts:
        hasher.update(part)
    return hasher.digest()


def digest_json(value: object) -> Digest:
    """Digest `value` by its canonical JSON.

    Raises
    ------
    TypeError
        As `canonical_json`.
    """
    return digest_bytes(canonical_json(value).encode())


def digest_array(array: NDArray[np.generic]) -> Digest:
    """Digest dtype, shape and C-order bytes of `array`.

    Memory layout and byte order don't matter; the dtype does.
    """
    return _digest_as(array, array.dtype)


def _digest_as(array: NDArray[np.generic], dtype: np.dtype[Any]) -> Digest:
    """Digest `array` as if it had another dtype, converted block by block: no copy is made."""
    hasher = xxhash.xxh3_128(canonical_json([dtype.name, list(array.shape)]).encode())
    flat, stored = np.ascontiguousarray(array).reshape(-1), dtype.newbyteorder("<")
    blocks = [flat] if flat.dtype == stored else np.split(flat, range(_BLOCK, flat.size, _BLOCK))
    for block in blocks:
        hasher.update(block.astype(stored, copy=False).view(np.uint8).data)
    return hasher.digest()


def frame_digest(frame: NDArray[np.generic], where: str = "the frame") -> Digest:
    """Digest a frame by its pixels as float32, before normalisation.

    A uint16 frame and its float32 copy agree; so do a frame and a view of it in another memory
    layout.

    Parameters
    ----------
    frame : (H, W) or (Z, H, W), bool, integer or float
        The frame as loaded.
    where : str
        What to call the frame in an error.

    Raises
    ------
    FrameTypeError
        If the pixels are no real numbers; also a TypeError.
    FrameError
        If a pixel is NaN or infinite, or the shape is not that of a frame.
    """
    checked = _check_frame(frame, where)
    if checked.dtype.kind == "f":
        checked = frame_pixels(checked, where)
    return _digest_as(checked, _FLOAT32)


def frame_pixels(frame: NDArray[np.generic], where: str = "the frame") -> NDArray[np.float32]:
    """Give a frame's pixels as a new float32 array, checked as in `frame_digest`."""
    frame = _check_frame(frame, where)
    with np.errstate(over="ignore"):  # what is too large is infinite, and told below
        pixels = np.ascontiguousarray(frame, dtype=np.float32)
    if frame.dtype.kind == "f":
        bad = int(pixels.size - np.count_nonzero(np.isfinite(pixels)))
        if bad:
            raise FrameError(
                f"{where} has {bad} NaN or infinite pixels of {pixels.size} (as float32): "
                "replace them, or leave the frame out"
            )
        pixels = pixels + np.float32(0)  # -0.0 is 0.0
    return pixels


def _check_frame(frame: NDArray[np.generic], where: str) -> NDArray[np.generic]:
    """Raise what can be told of a frame by its kind and shape."""
    frame = _without_mask(frame, where)
    if frame.dtype.kind not in "buif":
        hint = "; open files with Movie.open, or pass arrays" if frame.dtype.kind in "UO" else ""
        raise FrameTypeError(
            f"{where} has dtype {frame.dtype}: expected bool, integer or float pixels{hint}"
        )
    if frame.ndim not in (2, 3) or frame.size == 0:
        hint = "; frames is a movie (T, H, W): pass frame[None] for one frame"
        raise FrameError(
            f"{where} has shape {frame.shape}: expected (H, W) or (Z, H, W), none of them 0"
            f"{hint if frame.ndim == 1 else ''}"
        )
    return frame


def mask_digest(mask: NDArray[np.generic], where: str = "the mask") -> Digest:
    """Digest an instance mask by its labels as int32.

    Parameters
    ----------
    mask : (H, W) or (Z, H, W), bool or integer
        0 is background.
    where : str
        What to call the mask in an error.

    Raises
    ------
    FrameTypeError
        If the labels are not integers; also a TypeError.
    FrameError
        If a label is negative or above 2**31 - 1, or the shape is not that of a mask.
    """
    return _digest_as(_check_mask(mask, where), _INT32)


def mask_labels(mask: NDArray[np.generic], where: str = "the mask") -> NDArray[np.int32]:
    """Give a mask's labels as a new or shared int32 array, checked as in `mask_digest`."""
    return np.ascontiguousarray(_check_mask(mask, where), dtype=_INT32)


def _without_mask(array: NDArray[np.generic], where: str) -> NDArray[np.generic]:
    """Give a plain array; of a masked one, whose masked pixels are anything, raise FrameError."""
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise FrameError(
            f"{where} is a masked array with masked pixels: fill them first, as by .filled(0)"
        )
    return np.asarray(array)


def _check_mask(mask: NDArray[np.generic], where: str) -> NDArray[np.generic]:
    mask = _without_mask(mask, where)
    if mask.dtype.kind not in "bui":
        raise FrameTypeError(
            f"{where} has dtype {mask.dtype}: expected integer labels; whole numbers become such "
            "by .astype(int)"
        )
    if mask.ndim not in (2, 3) or mask.size == 0:
        raise FrameError(
            f"{where} has shape {mask.shape}: expected (H, W) or (Z, H, W), none of them 0"
        )
    always_fits = mask.dtype.kind in "bu" and mask.dtype.itemsize < 4
    if not always_fits and (mask.min() < 0 or mask.max() > _LARGEST):
        raise FrameError(
            f"{where} has labels from {mask.min()} to {mask.max()}: expected 0 to {_LARGEST}; "
            "relabel it, with 0 as background"
        )
    return mask


def state_digest(tensors: Iterable[tuple[str, NDArray[np.generic]]]) -> Digest:
    """Digest named arrays (a model's weights), in whatever order they come.

    Parameters
    ----------
    tensors : iterable of (name, array)
        Names must be unique.

    Raises
    ------
    ValueError
        If a name comes twice.
    """
    parts: dict[str, str] = {}
    for name, array in tensors:
        if name in parts:
            raise ValueError(f"the weights have two tensors named {name!r}")
        parts[name] = digest_array(array).hex()
    return digest_json(parts)
