"""Sanity checks of a whole pipeline: features that know nothing, and features that know all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import BackboneError, FrameError, UnknownNameError
from ..hashing import state_digest
from ..spec import BackboneSpec, Normalization
from .base import Frozen, find_device, name_subclass

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class _DebugBackbone(Frozen, ABC):
    """A backbone without a network, computed with NumPy."""

    revision: ClassVar[int] = 1
    width: ClassVar[int]

    def __init__(
        self, name: str, weights: str | Path | None, device: str | None, dtype: str | None
    ) -> None:
        if dtype not in (None, "float32"):
            raise UnknownNameError(f"compute dtype of {name}", str(dtype), ["float32"])
        self.name, self.weights, self.device = name, weights, find_device(device or "cpu")

    def _make_spec(
        self, layer: str, stride: int, weights: tuple[str, NDArray[Any]], **terms: Any
    ) -> BackboneSpec:
        """Describe it, with what it computes by in the place of weights."""
        if stride < 1:
            raise BackboneError(f"{self.name}: stride {stride}, expected 1 or more")
        return BackboneSpec(
            self.name, self.revision, state_digest([weights]).hex(), layer, self.width, stride,
            channels="single", extra=name_subclass(type(self)), **terms,
        )  # fmt: skip

    def embed(self, frames: Tensor) -> Tensor:
        """Embed frames (B, H, W) float32 into grids (B, gh, gw, width) float32."""
        if frames.ndim != 3:
            raise FrameError(
                f"frames of shape {tuple(frames.shape)} for {self.name}: expected (B, H, W)"
            )
        arrays = frames.detach().cpu().numpy().astype(np.float32, copy=False)
        grids = [self._embed_frame(np.ascontiguousarray(frame)) for frame in arrays]
        return torch.from_numpy(np.stack(grids)).to(self.device)

    @abstractmethod
    def _embed_frame(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """Embed one frame (H, W) into a grid (gh, gw, width)."""


class RandomNoise(_DebugBackbone):
    """Noise, uniform in -2..2: a tracker that gains from it gains from something else.

    Each cell's noise is a pseudo-random function of that cell's pixels, its place and the seed. So
    it is the same whenever the same frame is embedded, as a cache needs; any change of a pixel
    gives its cell unrelated numbers. (trackastra-pretrained-feats draws from one generator, and
    gives a frame other numbers each time.)

    Parameters
    ----------
    name, device, dtype
        As `TorchBackbone`.
    weights : str, optional
        ``"random:<seed>"``; by default seed 0.
    stride : int
        Pixels of a cell.
    """

    width = 128

    def __init__(
        self,
        name: str = "debug/random",
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        stride: int = 8,
    ) -> None:
        super().__init__(name, weights, device, dtype)
        prefix, _, seed = str(weights or "random:0").partition(":")
        if prefix != "random" or not seed.isdecimal():
            raise BackboneError(f"{name} has no checkpoint: weights must be 'random:<seed>'")
        self.seed = np.array([int(seed) % 2**64], dtype=np.uint64)
        self.seed.flags.writeable = False
        self.spec = self._make_spec("noise", stride, ("seed", self.seed))

    def _embed_frame(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        """Hash each pixel with its place, add up each cell's, and stretch the sums to noise."""
        places = np.arange(frame.size, dtype=np.uint64).reshape(frame.shape) * _GOLDEN
        cells = _mix(_mix(places ^ _mix(self.seed + _GOLDEN)) ^ (frame + 0).view(np.uint32))
        for axis, length in enumerate(frame.shape):
            cells = np.add.reduceat(cells, _starts(length, self.spec.stride), axis=axis)
        channels = np.arange(1, self.width + 1, dtype=np.uint64) * _GOLDEN
        bits = _mix(_mix(cells)[..., None] + channels) >> np.uint64(40)
        return bits.astype(np.float32) * np.float32(4 / 2**24) - np.float32(2)


class EncodedLabels(_DebugBackbone):
    """The pixel under each cell's centre, encoded: perfect features, of frames that are labels.

    A backbone sees frames, never masks. So give it label images as frames: then two regions have
    equal features if and only if they have equal labels, and a tracker can hardly fail. Of any
    other frame it encodes the intensities as loaded (there is no normalisation).
    (trackastra-pretrained-feats takes the labels from the masks, whatever the frames hold, and
    writes their binary digits.)

    Parameters
    ----------
    name, device, dtype
        As `TorchBackbone`.
    weights : None
        There are none.
    stride : int
        Pixels of a cell; 1 keeps even regions of one pixel apart.

    Notes
    -----
    Sines and cosines of 32 wavelengths, from 2 (the parity of a label) to 2**25 in equal ratios:
    the length of every vector is the same, so normalising loses nothing.
    """

    width = 64

    def __init__(
        self,
        name: str = "debug/encoded_labels",
        weights: str | Path | None = None,
        device: str | None = None,
        dtype: str | None = None,
        stride: int = 4,
    ) -> None:
        super().__init__(name, weights, device, dtype)
        if weights is not None:
            raise BackboneError(f"{name} has no weights, found weights={str(weights)!r}")
        self.wavelengths = 2.0 ** np.linspace(1, 25, self.width // 2)
        self.wavelengths.flags.writeable = False
        known = "wavelengths", self.wavelengths
        normalization = Normalization("none")
        self.spec = self._make_spec("sines", stride, known, normalization=normalization)

    def _embed_frame(self, frame: NDArray[np.float32]) -> NDArray[np.float32]:
        rows, columns = (_centres(length, self.spec.stride) for length in frame.shape)
        values = frame[np.ix_(rows, columns)].astype(np.float64)[..., None]
        angles = 2 * np.pi * (values / self.wavelengths % 1)
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)


def _count(length: int, stride: int) -> int:
    return -(-length // stride)


def _starts(length: int, stride: int) -> NDArray[np.intp]:
    """First pixel of each cell, where cells span the frame as pooling divides it."""
    count = _count(length, stride)
    return -(-np.arange(count) * length // count)


def _centres(length: int, stride: int) -> NDArray[np.intp]:
    count = _count(length, stride)
    return (2 * np.arange(count) + 1) * length // (2 * count)


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64 bits (the finaliser of SplitMix64; Steele, Lea & Flood, 2014)."""
    with np.errstate(over="ignore"):
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
