"""Draws: sampled augmentations with every parameter explicit.

`Augmentations` is the distribution, `Augmentations.draw` gives copy k of it as a `Draw`, and a
`Draw` maps frames (on their device), masks and points alike.

Pixels are points with whole coordinates (y, x) at their centres, so a frame covers -0.5 to
H - 0.5, and centroids as scikit-image's ``regionprops`` measures them can be mapped as they are.
Flips and quarter turns are exact in all three. Where pixels have to be resampled, frame and mask
take the same inverse map (the frame bilinear, the mask nearest neighbour), and points its
inverse.
"""

from __future__ import annotations

from .draw import IDENTITY, OPERATIONS, Draw
from .geometry import D4, Affine, Elastic, Scale, hflip, quarter_turn, vflip
from .intensity import Blur, Brightness, Contrast, Noise
from .operation import Operation
from .policy import PRESETS, Augmentations, Entry, Policy

__all__ = [
    "D4",
    "IDENTITY",
    "OPERATIONS",
    "PRESETS",
    "Affine",
    "Augmentations",
    "Blur",
    "Brightness",
    "Contrast",
    "Draw",
    "Elastic",
    "Entry",
    "Noise",
    "Operation",
    "Policy",
    "Scale",
    "hflip",
    "quarter_turn",
    "vflip",
]
