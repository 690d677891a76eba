"""Operations that change intensities: brightness, contrast, blur, noise."""

# ruff: noqa: D102 -- what overrides a method of Operation is documented there

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ..hashing import Digest, digest_bytes, digest_json
from ..spec import UNIT_RANGE, Bounds
from .operation import Operation
from .parameters import SEED, Allowed, Stream
from .sampling import blur, change_contrast, upload

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Brightness(Operation):
    """Multiply intensities by `factor` and clamp to 0..1, torchvision's ``adjust_brightness``.

    Parameters
    ----------
    factor : float
        0 to 10.
    """

    factor: float

    name: ClassVar[str] = "brightness"
    allowed: ClassVar[Mapping[str, Allowed]] = {"factor": Allowed(0.0, 10.0)}
    commutes_with_d4: ClassVar[bool] = True
    needs_unit_range: ClassVar[bool] = True

    def simplify(self) -> Operation | None:
        return None if self.factor == 1.0 else self

    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        return frames.mul(self.factor).clamp_(0, 1)


@dataclass(frozen=True, slots=True)
class Contrast(Operation):
    """Blend each frame with its mean, ``factor * frame + (1 - factor) * mean``, clamped to 0..1.

    torchvision's ``adjust_contrast`` to the last bits, which here don't depend on batch and
    threads.

    Parameters
    ----------
    factor : float
        0 to 10.
    """

    factor: float

    name: ClassVar[str] = "contrast"
    allowed: ClassVar[Mapping[str, Allowed]] = {"factor": Allowed(0.0, 10.0)}
    commutes_with_d4: ClassVar[bool] = True
    needs_unit_range: ClassVar[bool] = True

    def simplify(self) -> Operation | None:
        return None if self.factor == 1.0 else self

    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        return change_contrast(frames, self.factor)


@dataclass(frozen=True, slots=True)
class Blur(Operation):
    """Convolve with a Gaussian of `sigma` pixels on `kernel` x `kernel` pixels, mirrored borders.

    torchvision's ``gaussian_blur`` to the last bits, which here don't depend on the batch. A sigma
    so small that only the kernel's centre is left in float32 (below about 0.07) is the identity.

    Parameters
    ----------
    kernel : int
        Odd, 1 to 99.
    sigma : float
        Pixels, 0 to 50.
    """

    kernel: int
    sigma: float

    name: ClassVar[str] = "blur"
    allowed: ClassVar[Mapping[str, Allowed]] = {
        "kernel": Allowed(1, 99, "odd"),
        "sigma": Allowed(0.0, 50.0),
    }
    commutes_with_d4: ClassVar[bool] = True

    def simplify(self) -> Operation | None:
        return self if any(self._weights()[1:]) else None

    def _weights(self) -> list[float]:
        """Give the kernel from its centre outwards, as float32 numbers."""
        if self.sigma == 0.0:
            return [1.0]
        distances = range(self.kernel // 2 + 1)
        heights = [math.exp(-0.5 * (distance / self.sigma) ** 2) for distance in distances]
        total = heights[0] + 2.0 * sum(heights[1:])
        return [float(np.float32(height / total)) for height in heights]

    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        return blur(frames, self._weights(), bounds)


@dataclass(frozen=True, slots=True)
class Noise(Operation):
    """Add Gaussian noise of standard deviation `sigma`, clamped to 0..1.

    The noise is a function of `seed` and of the frame's content digest: a frame gets the same in
    every batch, and two frames get different ones.

    Parameters
    ----------
    sigma : float
        0 to 1, in units of the normalised intensities.
    seed : int
        0 to 2**63 - 1.
    """

    sigma: float
    seed: int = 0

    name: ClassVar[str] = "noise"
    allowed: ClassVar[Mapping[str, Allowed]] = {"sigma": Allowed(0.0, 1.0), "seed": SEED}
    needs_digests: ClassVar[bool] = True
    needs_unit_range: ClassVar[bool] = True

    def simplify(self) -> Operation | None:
        return None if self.sigma == 0.0 else self

    def apply(
        self, frames: Tensor, digests: Sequence[Digest], bounds: Bounds | None = UNIT_RANGE
    ) -> Tensor:
        own = digest_json(["noise", self.seed])
        noisy = frames.clone()
        for frame, digest in zip(noisy, digests, strict=True):
            normals = Stream(digest_bytes(own, digest)).normals(frame.numel())
            noise = upload(normals, frame.device).view(frame.shape)
            frame.add_(noise.mul_(self.sigma))
        return noisy.clamp_(0.0, 1.0)
