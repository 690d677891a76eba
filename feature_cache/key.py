"""Record keys, and the record that a key stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .augment import Draw
from .hashing import Digest, canonical_json, digest_bytes

Keys: TypeAlias = NDArray[np.uint8]
"""(n, 16) uint8, one record key a row."""


def record_key(space: Digest, frame: Digest, mask: Digest | None, draw: Draw) -> Digest:
    """Make the key of one frame's record.

    Equal keys mean equal numbers; whatever changes the numbers changes the key.

    Parameters
    ----------
    space : bytes
        `feature_cache.spec.SpaceSpec.digest`.
    frame : bytes
        `feature_cache.hashing.frame_digest`; of several frames that are seen, `window_digest`.
    mask : bytes or None
        `feature_cache.hashing.mask_digest`; None where whole grids are kept.
    draw : Draw

    Returns
    -------
    bytes, 16
    """
    masked = b"\0" if mask is None else b"\1" + mask
    return digest_bytes(space, frame, masked, _text_of(draw))


def window_digest(frames: Sequence[Digest]) -> Digest:
    """Digest what a backbone sees: the digests of frames, in order; that of one is its own."""
    return frames[0] if len(frames) == 1 else digest_bytes(*frames)


@lru_cache(maxsize=1024)
def _text_of(draw: Draw) -> bytes:
    return canonical_json(draw.to_json()).encode()


@dataclass(frozen=True, slots=True)
class Record:
    """The features of one frame under one draw.

    Attributes
    ----------
    features : (N, C), or a grid (gh, gw, C) or (Z, gh, gw, C), float16 or float32, read-only
        In the storage dtype, the same numbers on a hit and on a miss.
    labels : (N,) int32, ascending; None for a grid
        The label of each row, as in the mask.
    """

    features: NDArray[np.floating[Any]]
    labels: NDArray[np.int32] | None
