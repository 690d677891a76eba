"""Grids that are stored: whatever is pooled from them needs no model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..augment import Draw
from ..compute import Grid, Job
from ..errors import StoreError
from ..hashing import DIGEST_BYTES
from ..key import record_key
from ..spec import BackboneSpec, SpaceSpec

if TYPE_CHECKING:
    from .cache import FeatureCache

GRID_DTYPE = "float32"
"""Grids in any other dtype are rounded: what is pooled from them has other bits."""

_log = logging.getLogger(__name__)


def grid_spec(backbone: BackboneSpec) -> SpaceSpec:
    """Give the space of the grids from which poolings are computed bit by bit."""
    return SpaceSpec(backbone, None, GRID_DTYPE)


class Grids:
    """The float32 grids of one backbone that a cache, or a layer of it, holds.

    Parameters
    ----------
    cache : FeatureCache
    backbone : BackboneSpec
    """

    def __init__(self, cache: FeatureCache, backbone: BackboneSpec) -> None:
        self.spec = grid_spec(backbone)
        self._digest, self._space = self.spec.digest, cache.space(self.spec)

    def find(self, jobs: Sequence[Job], draw: Draw) -> list[Grid | None]:
        """Read the grids of frames under a draw, verified; None where there is none.

        One that is damaged, or can't be read, counts as none, with a warning in the log.

        Returns
        -------
        list of (gh, gw, C), or (Z, gh, gw, C), float32
        """
        keys = [record_key(self._digest, job.digest, None, draw) for job in jobs]
        try:
            rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, DIGEST_BYTES)
            records = self._space.read(rows)
        except StoreError as error:
            _log.warning("grids that are stored are not used: %s", error)
            return [None] * len(jobs)
        return [
            None if one is None else one.features.astype(np.float32, copy=False) for one in records
        ]
