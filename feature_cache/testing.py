"""For tests, ours and those of packages around us: what can be known exactly.

`FakeBackbone` has no model, `check_backbone` is what a backbone of any package must pass, and
`moving_movie` makes movies whose tracks are exact.

Examples
--------
>>> import torch
>>> backbone = FakeBackbone(dim=4, stride=8)
>>> backbone.embed(torch.zeros(2, 16, 24)).shape
torch.Size([2, 2, 3, 4])
>>> check_backbone(backbone)
"""

from __future__ import annotations

import copy
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from .backbones.base import Frozen
from .backbones.witness import Witness
from .hashing import frame_digest, state_digest
from .movies import Masks, Tracks
from .spec import BackboneSpec, Context, Normalization, differences

if TYPE_CHECKING:
    from .backbones.base import Backbone


class FakeBackbone(Frozen):
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
    context : (int, int)
        As of `BackboneSpec`: each window is embedded as the mean of its frames, which weighs later
        ones more.
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
        context: tuple[int, int] = (0, 0),
    ) -> None:
        self.seconds_per_frame = seconds_per_frame
        self.log = Path(log) if log is not None else None
        self.projection = np.random.Generator(np.random.Philox(seed)).standard_normal(
            (stride * stride + 1, dim)
        )
        self.projection.flags.writeable = False
        self.spec = BackboneSpec(
            name="fake",
            revision=1,
            weights=state_digest([("projection", self.projection)]).hex(),
            layer="projection",
            width=dim,
            stride=stride,
            channels="single",
            normalization=normalization or Normalization(),
            context=Context(*context),
        )

    def embed(self, frames: Tensor) -> Tensor:
        """Embed frames (B, H, W) into (B, ceil(H / stride), ceil(W / stride), dim) float32."""
        arrays = torch.as_tensor(frames).detach().cpu().numpy()
        if any(self.spec.context):
            weights = np.arange(1, 2 + sum(self.spec.context), dtype=np.float32)
            arrays = np.einsum("btyx,t->byx", arrays, weights / weights.sum())
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


def check_backbone(
    backbone: Backbone,
    other: Backbone | None = None,
    *,
    shapes: tuple[tuple[int, int], ...] = ((96, 160), (176, 112)),
    tolerance: float = 1e-4,
) -> None:
    """Check that a backbone keeps what `Backbone` promises, on random frames of 0..1.

    It checks the spec (complete, comes back from JSON), the grid's shape against it, that numbers
    are finite, repeat, take no gradient, and depend on nothing that the spec does not say: not on
    the instance, training mode, the rest of the batch, its order or the caller's autocast. That the
    frames stay as they are, and that the grid lies on the frame as pooling takes it to: a bright
    square in a corner changes the cells of that corner most. (A default dtype other than float32
    is refused wherever something is computed for a cache.)

    Parameters
    ----------
    backbone : Backbone
    other : Backbone, optional
        The same, made once more; by default a deep copy.
    shapes : tuple of (height, width)
        Of the frames; of both orientations, so that axes that are swapped are found.
    tolerance : float
        By how much a frame's grid may change with the batch, relative to its largest value.

    Raises
    ------
    AssertionError
        Says which promise is broken, and how.
    """
    other = _copy(backbone) if other is None else other
    _check_spec(backbone)
    for seed, shape in enumerate(shapes):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.rand((3, *shape), generator=generator) * 0.5
        corner = (seed % 2 == 0, seed // 2 % 2 == 0)
        square = _corner(shape, *corner)
        frames = torch.stack([noise[0], noise[0].clone(), noise[1]])
        frames[1][square] = 1.0
        if any(backbone.spec.context):
            frames = torch.stack([frames] * (1 + sum(backbone.spec.context)), dim=1)
        grids = _check_embedding(backbone, frames)
        _check_rows(backbone, frames, grids, tolerance)
        if seed == 0:
            _check_twin(backbone, other, frames, grids, tolerance)
        _check_place(grids, corner, f"{backbone.spec.name} for frames of {shape}")


def _fail_unless(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def _check_spec(backbone: Backbone) -> None:
    spec = backbone.spec
    again = BackboneSpec.from_json(json.loads(json.dumps(spec.to_json())))
    _fail_unless(again == spec, f"{spec.name}: its spec comes back from JSON as {again}")
    _fail_unless(
        len(bytes.fromhex(spec.weights)) == 16,
        f"{spec.name}: weights {spec.weights!r} are no digest of 16 bytes in hex",
    )
    _fail_unless(
        spec.width > 0 and spec.stride > 0,
        f"{spec.name}: width {spec.width} and stride {spec.stride} must be positive",
    )
    Witness(backbone, (spec,)).check()


def _check_embedding(backbone: Backbone, frames: Tensor) -> Tensor:
    """Embed frames; check the grids' shape and values, and that the frames stay as they are."""
    spec, before = backbone.spec, frames.clone()
    grids = backbone.embed(frames)
    _fail_unless(torch.equal(frames, before), f"{spec.name} changed the frames it was given")
    _fail_unless(not grids.requires_grad, f"{spec.name} keeps a graph for gradients")
    fits = grids.ndim == 4 and (len(grids), grids.shape[3]) == (len(frames), spec.width)
    lengths = spec.input_size or tuple(frames.shape[-2:])
    spans = [
        length // spec.stride <= cells <= -(-length // spec.stride)
        for cells, length in zip(grids.shape[1:3], lengths, strict=False)
    ]
    padded = spec.input_size is not None and min(grids.shape[1:3]) > 0
    fits = fits and (any(spans) if padded else all(spans))
    _fail_unless(
        fits,
        f"{spec.name} gave {tuple(grids.shape)} for frames {tuple(frames.shape)}: its spec says "
        f"width {spec.width}, stride {spec.stride}, input size {spec.input_size}",
    )
    _fail_unless(bool(torch.isfinite(grids).all()), f"{spec.name} gave NaN or infinity")
    return grids.float().cpu()


def _check_rows(backbone: Backbone, frames: Tensor, grids: Tensor, tolerance: float) -> None:
    """Check that a frame's grid repeats, alone as in the batch."""
    name = backbone.spec.name
    alone = backbone.embed(frames[2:]).float().cpu()
    with torch.autocast("cpu", torch.bfloat16), torch.enable_grad():
        again = backbone.embed(frames[2:]).float().cpu()
    _fail_unless(
        torch.equal(alone, again),
        f"{name} gave other numbers for the same frame a second time (the second time inside "
        "torch.autocast, which must not matter)",
    )
    backwards = backbone.embed(frames.flip(0)).float().cpu().flip(0)
    for found, expected, what in (
        (alone[0], grids[2], "its batch"),
        (backwards, grids, "the order of its batch"),
    ):
        off = _distance(found, expected)
        _fail_unless(
            off <= tolerance,
            f"{name}: a frame's grid depends on {what}, by {off:.2g} of its largest value "
            f"(allowed: {tolerance:g})",
        )


def _distance(found: Tensor, expected: Tensor) -> float:
    """Give the largest difference, relative to the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _copy(backbone: Backbone) -> Backbone:
    try:
        return copy.deepcopy(backbone)
    except TypeError as error:
        raise AssertionError(
            f"{backbone.spec.name} can't be copied ({error}): pass the same made once more as other"
        ) from error


def _check_twin(
    backbone: Backbone, other: Backbone, frames: Tensor, grids: Tensor, tolerance: float
) -> None:
    """Check that another instance of equal spec gives the same numbers."""
    name = backbone.spec.name
    words = ("of one", "of the other")
    differing = "; ".join(differences(backbone.spec.to_json(), other.spec.to_json(), words))
    _fail_unless(not differing, f"{name}: two instances have other specs: {differing}")
    off = _distance(other.embed(frames).float().cpu(), grids)
    _fail_unless(
        off <= tolerance,
        f"{name}: two instances of equal spec give other numbers, by {off:.2g} of the largest "
        f"value (allowed: {tolerance:g}): put what makes the difference into the spec",
    )


def _corner(shape: tuple[int, ...], bottom: bool, right: bool) -> tuple[slice, ...]:
    """Select a third of each axis in one corner."""
    thirds = [-(-length // 3) for length in shape]
    return tuple(
        slice(length - third, None) if far else slice(0, third)
        for length, third, far in zip(shape, thirds, (bottom, right), strict=True)
    )


def _check_place(grids: Tensor, corner: tuple[bool, bool], what: str) -> None:
    """Check that grids 0 and 1, of frames that differ in a corner, differ most there."""
    change = (grids[1] - grids[0]).norm(dim=-1)
    inside = torch.zeros_like(change, dtype=torch.bool)
    inside[_corner(tuple(change.shape), *corner)] = True
    within, outside = float(change[inside].mean()), float(change[~inside].mean())
    _fail_unless(
        within > outside,
        f"{what}: a bright square in a corner changed that corner's cells by {within:.3g} on "
        f"average and the others by {outside:.3g}: does the grid lie on the frame, row by row?",
    )


def moving_movie(
    frame: NDArray[np.generic],
    mask: NDArray[np.integer],
    frames: int,
    seed: int,
    *,
    speed: float = 8.0,
    smoothness: float = 60.0,
    every: int = 1,
    size: tuple[int, int] | None = None,
    noise: float = 0.05,
) -> tuple[NDArray[np.float32], Masks, Tracks]:
    """Move a frame and its mask by smooth random deformations: a movie with exact tracks.

    In each step each pixel is displaced by a smooth random field, new for each step; the fields are
    composed over time. A label is the same cell throughout; one that leaves the field of view ends,
    and is another when it comes back. No cell divides.

    Parameters
    ----------
    frame : (H, W)
        Interpolated linearly; outside of it there is background, its median outside of cells.
    mask : (H, W) int
        Interpolated by nearest neighbour.
    frames : int
        How many to give.
    seed : int
        The same seed gives the same movie.
    speed : float
        Root mean square displacement in a step, in pixels, along each axis.
    smoothness : float
        Length over which displacements are alike, in pixels; several times `speed`, or cells tear.
    every : int
        Steps from one frame to the next: above 1, the frames between are left out.
    size : (int, int), optional
        Field of view, in the middle of `frame`, so that cells come and go; by default all of it.
    noise : float
        Of each frame, Gaussian, relative to the standard deviation of `frame`.

    Returns
    -------
    frames : (T, h, w) float32
    masks : (T, h, w) int32
        Without what is left of a cell of which less than a quarter is in view.
    tracks : (N, 4) int64
        As in man_track.txt.
    """
    seeds = np.random.SeedSequence(seed).spawn(2)
    motion, grain = (np.random.Generator(np.random.Philox(part)) for part in seeds)
    background = float(np.median(frame[mask == 0]))
    height, width = mask.shape
    view = _middle(mask.shape, size or (height, width))
    places = np.indices((height, width), dtype=np.float64)
    images, masks = [], []
    for t in range(frames):
        for _ in range(every if t else 0):
            places = _displace(places, _smooth_field((height, width), speed, smoothness, motion))
        image = ndimage.map_coordinates(
            frame.astype(np.float32), places, order=1, mode="constant", cval=background
        )
        image += noise * float(frame.std()) * grain.standard_normal(image.shape, np.float32)
        moved = ndimage.map_coordinates(mask, places, order=0, mode="constant").astype(np.int32)
        images.append(image[view])
        masks.append(_keep_in_view(moved, view))
    tracked, tracks = _name_visits(np.stack(masks))
    return np.stack(images), tracked, tracks


def _middle(shape: tuple[int, ...], size: tuple[int, int]) -> tuple[slice, ...]:
    if any(part > whole for part, whole in zip(size, shape, strict=True)):
        raise ValueError(f"size {size} is larger than the frame {shape}")
    starts = [(whole - part) // 2 for part, whole in zip(size, shape, strict=True)]
    return tuple(slice(start, start + part) for start, part in zip(starts, size, strict=True))


def _smooth_field(
    shape: tuple[int, int], speed: float, smoothness: float, random: np.random.Generator
) -> NDArray[np.float64]:
    """Draw displacements (2, H, W) as a sum of waves of random direction, length and phase."""
    waves = 64
    fields = []
    for _ in range(2):
        ky, kx = random.standard_normal((2, waves)) / smoothness
        phases = np.exp(2j * np.pi * random.random(waves))
        along_y = np.exp(1j * np.outer(np.arange(shape[0]), ky)) * phases
        along_x = np.exp(1j * np.outer(kx, np.arange(shape[1])))
        fields.append(speed * np.sqrt(2 / waves) * (along_y @ along_x).real)
    return np.stack(fields)


def _displace(places: NDArray[np.float64], field: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compose: where each pixel comes from, (2, H, W), after one step more."""
    targets = np.indices(field.shape[1:], dtype=np.float64)
    moved = [
        ndimage.map_coordinates(place - target, targets + field, order=1, mode="nearest")
        for place, target in zip(places, targets, strict=True)
    ]
    return np.stack(moved) + targets + field


def _keep_in_view(mask: Masks, view: tuple[slice, ...]) -> Masks:
    """Cut a mask, and erase the cells of which less than a quarter is left."""
    seen = mask[view]
    whole = np.bincount(mask.ravel())
    left = np.bincount(seen.ravel(), minlength=len(whole))
    return np.where((4 * left >= whole)[seen], seen, 0).astype(np.int32)


def _name_visits(masks: Masks) -> tuple[Masks, Tracks]:
    """Give each uninterrupted presence of a label in masks (T, H, W) a label of its own."""
    named = np.zeros_like(masks)
    tracks: list[list[int]] = []
    open_visits: dict[int, int] = {}
    for t, mask in enumerate(masks):
        labels = np.unique(mask[mask > 0]).tolist()
        open_visits = {label: open_visits[label] for label in labels if label in open_visits}
        lookup = np.zeros(int(mask.max()) + 1, np.int32)
        for label in labels:
            if label not in open_visits:
                tracks.append([len(tracks) + 1, t, t, 0])
                open_visits[label] = len(tracks)
            lookup[label] = open_visits[label]
            tracks[lookup[label] - 1][2] = t
        named[t] = lookup[mask]
    return named, np.array(tracks, np.int64).reshape(-1, 4)
