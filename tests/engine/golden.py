"""What records are, frozen: movies, draws and spaces, and the digest of each record.

The backbone does no arithmetic that machines disagree on, so that the digests are of what is done
around it: reading, normalising, drawing, pooling and rounding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from feature_cache import POOLINGS, Augmentations, BackboneSpec, Draw, Normalization, Record
from feature_cache.augment import (
    D4,
    Affine,
    Blur,
    Brightness,
    Contrast,
    Elastic,
    Noise,
    Scale,
    hflip,
)
from feature_cache.hashing import digest_array, digest_bytes

HEIGHT, WIDTH, SLICES = 48, 40, 3
FILE = Path(__file__).with_name("golden.json")

Compute: TypeAlias = Callable[..., Sequence[Record]]
"""As `FeatureCache.get_or_compute`, in whatever way."""


class Cells:
    """A grid cell's embedding is its own pixels, and a one: nothing is rounded.

    Parameters
    ----------
    stride : int
        Pixels of a cell.
    steps : int, optional
        Pixels are cut to so many steps, for draws whose last bit machines disagree on.
    normalization : Normalization, optional
    """

    def __init__(
        self, stride: int = 4, steps: int | None = None, normalization: Normalization | None = None
    ) -> None:
        self.steps = steps
        self.spec = BackboneSpec(
            name="cells", revision=1, weights="00" * 16, layer=f"steps {steps}",
            width=stride**2 + 1, stride=stride, channels="single",
            normalization=normalization or Normalization(),
        )  # fmt: skip

    def embed(self, frames: torch.Tensor) -> torch.Tensor:
        """Embed frames (B, H, W) into (B, ceil(H / stride), ceil(W / stride), stride² + 1)."""
        stride = self.spec.stride
        if self.steps is not None:
            frames = (frames * self.steps).floor()
        below, beside = (-length % stride for length in frames.shape[1:])
        padded = torch.nn.functional.pad(frames, (0, beside, 0, below))
        batch, height, width = padded.shape
        cells = padded.reshape(batch, height // stride, stride, width // stride, stride)
        cells = cells.swapaxes(2, 3).reshape(batch, height // stride, width // stride, stride**2)
        return torch.nn.functional.pad(cells, (0, 1), value=1.0)


@dataclass(frozen=True)
class Space:
    """A pooling and a storage dtype."""

    pooling: str | None
    dtype: str

    def __str__(self) -> str:
        """Name it."""
        return f"{self.pooling or 'grids'} {self.dtype}"


SPACES = [
    Space(pooling, dtype) for dtype in ("float32", "float16") for pooling in (*POOLINGS, None)
]
DRAWS = {
    "identity": Draw(),
    **{
        f"d4 {element}": Draw.of(D4(element))
        for element in (
            "flip_horizontal", "flip_vertical", "rotate_90", "rotate_180", "rotate_270",
            "transpose", "transverse",
        )
    },
    "scale 0.83": Draw.of(Scale(0.83)),
    "scale 1.3": Draw.of(Scale(1.3)),
    "affine": Draw.of(
        Affine(degrees=11.0, shear_degrees=5.0, scale=1.07, shift_y=0.04, shift_x=-0.06)
    ),
    "elastic": Draw.of(Elastic(amplitude=1.5, smoothing=12.0, seed=3)),
    "brightness": Draw.of(Brightness(1.2)),
    "contrast": Draw.of(Contrast(0.77)),
    "blur": Draw.of(Blur(5, 1.7)),
    "noise": Draw.of(Noise(0.05, seed=4)),
    "regions vanish": Draw.of(Scale(0.1)),
    "regions leave": Draw.of(Affine(shift_y=0.6, shift_x=-0.4)),
    "all at once": Draw.of(
        Contrast(1.4), hflip(), Affine(degrees=-30.0, scale=0.7), Noise(0.02, seed=1), Blur(3, 0.8),
        Elastic(amplitude=2.0, smoothing=16.0, seed=1), D4("rotate_90"), Brightness(0.9),
    ),
    **{f"copy {k}": Augmentations("default", copies=5, seed=0).draw(k) for k in range(1, 6)},
}  # fmt: skip


def pixels(dtype: str = "uint16", shape: tuple[int, ...] = (HEIGHT, WIDTH)) -> NDArray[Any]:
    """Draw a frame that has all that its dtype can have: noise, a gradient, and outliers."""
    values = np.random.Generator(np.random.Philox(7)).integers(0, 200, shape)
    values += np.arange(WIDTH) % 50
    frame = values.reshape(shape)
    match np.dtype(dtype).kind:
        case "b":
            return frame > 130
        case "i":
            frame = frame * 1_000 - 90_000
        case "f":
            frame = frame / 7 - 9.1
    frame.reshape(-1)[[3, 777]] = frame.max() * 3 // 2, frame.min()
    return np.clip(frame, 0, 255).astype(dtype) if dtype == "uint8" else frame.astype(dtype)


def labels(shape: tuple[int, ...] = (HEIGHT, WIDTH), most: int = 900) -> NDArray[np.int32]:
    """Draw a mask: cells, in two pieces, of one pixel, at the corners, and large ones."""
    mask = np.zeros(shape, np.int32)
    mask[..., 3:12, 5:17] = 2
    mask[..., 14:15, 30:31] = 3
    mask[..., 20:33, 8:9] = 5
    mask[..., 20:25, 30:34] = mask[..., 36:40, 2:4] = 7
    mask[..., 28:44, 18:36] = 40
    mask[..., 33:39, 22:30] = 41
    mask[..., -1, -1] = most
    mask[..., 0, 0] = 1
    mask.reshape(-1, WIDTH)[:3, 20:22] = 6  # of a stack, in one slice alone
    return mask


@dataclass(frozen=True)
class Scene:
    """A frame with its mask, and the draws that it is computed under.

    Attributes
    ----------
    frame : (H, W) or (Z, H, W)
    mask : same shape, int32
    draws : dict of Draw
    normalization : Normalization
    """

    frame: NDArray[Any]
    mask: NDArray[np.int32]
    draws: dict[str, Draw]
    normalization: Normalization = field(default_factory=Normalization)

    def backbone(self, draw: Draw) -> Cells:
        """Give the backbone: exact, or, where pixels are resized by torch, in steps."""
        resized = any(isinstance(operation, Scale) for operation in draw.operations)
        return Cells(steps=61 if resized else None, normalization=self.normalization)


def _scenes() -> dict[str, Scene]:
    plain = {"identity": Draw()}
    few = {name: DRAWS[name] for name in ("identity", "d4 transpose", "affine", "blur")}
    others = ("scale 0.83", "elastic", "noise", "regions vanish", "all at once", "copy 1")
    dtypes = ("bool", "uint8", "int32", "float32", "float64")
    bright = np.zeros((HEIGHT, WIDTH), np.uint16)
    bright[30, 20], bright[14, 30] = 900, 30_000
    stack = (SLICES, HEIGHT, WIDTH)
    return {
        "uint16": Scene(pixels(), labels(), DRAWS),
        "uint16 stack": Scene(
            pixels(shape=stack), labels(stack), few | {name: DRAWS[name] for name in others}
        ),
        **{dtype: Scene(pixels(dtype), labels(), plain) for dtype in dtypes},
        "constant": Scene(np.full((HEIGHT, WIDTH), 7, np.uint16), labels(), few),
        "few bright pixels": Scene(bright, labels(), plain),
        "no region": Scene(pixels(), np.zeros((HEIGHT, WIDTH), np.int32), few),
        "huge labels": Scene(pixels(), labels(most=2**31 - 1), few),
        "as loaded": Scene(pixels("float32"), labels(), few, Normalization("none")),
    }


SCENES = _scenes()


def digest_record(record: Record) -> str:
    """Give shape, and 16 hex digits that stand for dtype, shape and bytes of all that it holds."""
    parts = [digest_array(record.features)]
    if record.labels is not None:
        parts.append(digest_array(record.labels))
    shape = "x".join(map(str, record.features.shape))
    return f"{shape} {digest_bytes(*parts).hex()[:16]}"


def spaces_of(draw: Draw) -> list[Space]:
    """Give the spaces whose records are frozen: in float16 where there is no draw, for brevity."""
    return [space for space in SPACES if space.dtype == "float32" or draw.is_identity]


def digests(scene: Scene, draw: Draw, compute: Compute) -> list[str]:
    """Compute a scene under a draw in each space, and digest its records."""
    backbone = scene.backbone(draw)
    found = []
    for space in spaces_of(draw):
        [record] = compute(
            scene.frame[None], None if space.pooling is None else scene.mask[None], backbone,
            pooling=space.pooling, draw=draw, dtype=space.dtype,
        )  # fmt: skip
        found.append(digest_record(record))
    return found


def read_golden() -> dict[str, dict[str, list[str]]]:
    """Read what is frozen: for each scene and draw, its record in each space."""
    golden: dict[str, dict[str, list[str]]] = json.loads(FILE.read_text())
    return golden


def write_golden(compute: Compute) -> None:
    """Freeze the records that are computed now, in the place of those before."""
    found = {
        name: {kind: digests(scene, draw, compute) for kind, draw in scene.draws.items()}
        for name, scene in SCENES.items()
    }
    FILE.write_text(json.dumps(found, indent=0) + "\n")
