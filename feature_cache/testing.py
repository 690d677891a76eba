"""For tests, ours and those of packages around us: a backbone without a model.

Examples
--------
>>> import torch
>>> backbone = FakeBackbone(dim=4, stride=8)
>>> backbone.embed(torch.zeros(2, 16, 24)).shape
torch.Size([2, 2, 3, 4])
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .hashing import frame_digest, state_digest
from .spec import BackboneSpec, Normalization


class FakeBackbone:
    """A deterministic stand-in: each grid cell is a fixed random projection of its pixels.

    Parameters
    ----------
    dim : int
        Channels of the grid.
    stride : int
        Pixels of a cell; the last cell of a frame may be smaller.
    seconds_per_frame : float
        How long embedding a frame takes.
    log : path, optional
        A file that gets one line, the digest of the frame, for each frame embedded, from any
        number of processes.
    seed : int
        Other seeds are other weights.
    normalization : Normalization, optional
    """

    def __init__(
        self,
        dim: int = 16,
        stride: int = 8,
        seconds_per_frame: float = 0.0,
        log: str | os.PathLike[str] | None = None,
        *,
        seed: int = 0,
        normalization: Normalization | None = None,
    ) -> None:
        self.seconds_per_frame = seconds_per_frame
        self.log = Path(log) if log is not None else None
        self.projection = np.random.Generator(np.random.Philox(seed)).standard_normal(
            (stride * stride + 1, dim)
        )
        self.spec = BackboneSpec(
            name="fake",
            revision=1,
            weights=state_digest([("projection", self.projection)]).hex(),
            layer="projection",
            width=dim,
            stride=stride,
            channels="single",
            normalization=normalization or Normalization(),
        )

    def embed(self, frames: Tensor) -> Tensor:
        """Embed frames (B, H, W) into (B, ceil(H / stride), ceil(W / stride), dim) float32."""
        arrays = torch.as_tensor(frames).detach().cpu().numpy()
        return torch.from_numpy(np.stack([self._embed_frame(frame) for frame in arrays]))

    def _embed_frame(
        self, frame: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    ) -> np.ndarray[tuple[int, int, int], np.dtype[np.float32]]:
        time.sleep(self.seconds_per_frame)
        if self.log is not None:
            with open(self.log, "ab", buffering=0) as log:
                log.write(frame_digest(frame).hex().encode() + b"\n")
        stride, dim = self.spec.stride, self.spec.width
        gh, gw = (-(-length // stride) for length in frame.shape)
        padded = np.zeros((gh * stride, gw * stride))
        padded[: frame.shape[0], : frame.shape[1]] = frame
        cells = padded.reshape(gh, stride, gw, stride).swapaxes(1, 2).reshape(gh, gw, -1)
        grid = np.einsum("ijk,kc->ijc", cells, self.projection[:-1]) + self.projection[-1]
        return np.tanh(grid / stride).astype(np.float32).reshape(gh, gw, dim)
