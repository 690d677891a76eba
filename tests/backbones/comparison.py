"""How far two grids are apart."""

from __future__ import annotations

import torch


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference of any number, relative to the largest number."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
