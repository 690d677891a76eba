"""Chance as a function of seeds: what upstream draws from generators of its own, and of all."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.random import mtrand

from ..dataset import Drawn
from ..hashing import JSON, digest_json


def mix_seeds(*parts: JSON) -> int:
    """Give one seed, 32 bits, for several numbers and words."""
    return int.from_bytes(digest_json(parts)[:4], "big")


@contextmanager
def seeded_numpy(seed: int, generator: np.random.RandomState | None = None) -> Iterator[None]:
    """Have NumPy's global functions draw from a generator, seeded; then they go on as before.

    But for the second of a pair of normal numbers: keeping it costs more than a sample's crop.
    """
    # exchanged, not reseeded: the state of the generator that others use stays as it was
    before = mtrand.get_bit_generator()
    mtrand.set_bit_generator((generator or np.random.RandomState())._bit_generator)
    try:
        np.random.seed(seed)
        yield
    finally:
        mtrand.set_bit_generator(before)


class Randomness:
    """What a `CTCData` draws for a sample: its crop, augmentation, and shift.

    Its cropper and augmenter are copied, and their generators, each unseeded, become one, from
    which NumPy's global functions draw too while a sample is made.

    Parameters
    ----------
    data : CTCData
        Changed: it has the copies then.

    Attributes
    ----------
    seed : int or None
        Of samples whose index says nothing of its draw; None leaves these to chance.
    """

    def __init__(self, data: Any) -> None:
        self.seed: int | None = None
        self._generator = np.random.RandomState()
        data.cropper, data.augmenter = copy.deepcopy((data.cropper, data.augmenter))
        for part in (data.cropper, *getattr(data.augmenter, "augmentations", ())):
            if isinstance(getattr(part, "_rng", None), np.random.RandomState):
                part._rng = self._generator

    def of(self, n: int) -> AbstractContextManager[None]:
        """Draw as a sample's place in an epoch says, in this block."""
        if isinstance(n, Drawn):
            return self._seeded(mix_seeds("sample", n.seed, *n.place))
        if self.seed is not None:
            return self._seeded(mix_seeds("sample", self.seed, int(n)))
        return nullcontext()

    @contextmanager
    def _seeded(self, seed: int) -> Iterator[None]:
        before = torch.get_rng_state()
        # not `torch.manual_seed`, which seeds the generators of devices too
        torch.default_generator.manual_seed(seed)
        try:
            with seeded_numpy(seed, self._generator):
                yield
        finally:
            torch.set_rng_state(before)
