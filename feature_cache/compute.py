"""Frames to records: normalise, draw, embed, pool."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from .augment import Draw
from .errors import BackboneError, FrameError
from .hashing import Digest, digest_bytes
from .key import Record
from .pooling import Regions, pool
from .spec import Normalization, SpaceSpec

if TYPE_CHECKING:
    from .backbones.base import Backbone

_log = logging.getLogger(__name__)

Pixels = NDArray[np.float32]


class ConstantFrameWarning(UserWarning):
    """A frame without contrast: normalised to zeros."""


@dataclass(frozen=True, slots=True)
class Job:
    """One record to compute.

    Parameters
    ----------
    frame : (H, W) or (Z, H, W) float32
        Pixels as loaded.
    mask : same shape, int32; None for a grid
    digest : bytes, 16
        Of the frame.
    where : str
        What to call the frame in an error.
    """

    frame: Pixels
    mask: NDArray[np.int32] | None
    digest: Digest
    where: str


def normalize(frame: Pixels, normalization: Normalization, where: str = "the frame") -> Pixels:
    """Map a frame's pixels to 0..1 in a new array.

    Parameters
    ----------
    frame : (H, W) or (Z, H, W) float32, finite; not changed
    normalization : Normalization
    where : str
        What to call the frame in a warning.

    Returns
    -------
    same shape, float32
        All zeros, with a `ConstantFrameWarning`, where the two percentiles are equal.

    Raises
    ------
    FrameError
        The percentiles are too far apart for float32.

    Notes
    -----
    The percentiles, and clipping, are those of ``percentile_norm`` in trackastra-pretrained-feats
    0.0.2, which works in place and gives NaN for a constant frame.
    """
    if normalization.name == "none":
        return frame.copy()
    low, high = np.percentile(frame, (normalization.low, normalization.high)).astype(np.float32)
    if not high > low:
        warnings.warn(
            f"{where} is constant between its percentiles {normalization.low} and "
            f"{normalization.high}: it is normalised to zeros",
            ConstantFrameWarning,
            stacklevel=2,
        )
        return np.zeros_like(frame)
    with np.errstate(over="ignore"):  # an outlier's infinity is clipped to 0 or 1
        span, above = high - low, frame - low
    if not np.isfinite(span):
        raise FrameError(
            f"{where} goes from {low:.4g} to {high:.4g}, too far for float32: rescale its pixels"
        )
    return np.clip(above / span, np.float32(0), np.float32(1))


def compute_records(
    jobs: Iterable[Job], spec: SpaceSpec, backbone: Backbone, draw: Draw, batch_size: int
) -> Iterator[Record]:
    """Compute records in batches, one for each job, in order.

    Holds one batch at a time.

    Parameters
    ----------
    jobs : iterable of Job
    spec : SpaceSpec
        Its pooling and storage dtype.
    backbone : Backbone
    draw : Draw
        Applied to frames and masks alike.
    batch_size : int
        Slices in a batch, at most (but always a whole frame).

    Raises
    ------
    BackboneError
        The embedding has a wrong shape, or NaN, or does not fit the storage dtype.
    """
    for batch in _batches(jobs, batch_size):
        images = [prepare_frame(job, spec.backbone.normalization) for job in batch]
        grids = embed_frames(batch, images, backbone, draw)
        for job, grid in zip(batch, grids, strict=True):
            yield make_record(job, grid, spec, draw)


def _batches(jobs: Iterable[Job], batch_size: int) -> Iterator[list[Job]]:
    batch: list[Job] = []
    for job in jobs:
        full = batch and len(batch) * _depth(job.frame) >= batch_size
        if batch and (full or batch[0].frame.shape != job.frame.shape):
            yield batch
            batch = []
        batch.append(job)
    if batch:
        yield batch


def _depth(array: NDArray[Any]) -> int:
    return 1 if array.ndim == 2 else len(array)


def _slices(array: NDArray[Any]) -> NDArray[Any]:
    return array[None] if array.ndim == 2 else array


def prepare_frame(job: Job, normalization: Normalization) -> Pixels:
    """Normalise a frame: (1, H, W), or (Z, H, W) for a stack, float32. Errors as `normalize`."""
    return _slices(normalize(job.frame, normalization, job.where))


def embed_frames(
    jobs: list[Job], images: list[Pixels], backbone: Backbone, draw: Draw
) -> list[Pixels]:
    """Embed whole frames of one shape as one batch.

    Parameters
    ----------
    jobs : list of Job
    images : list of (Z, H, W) float32
        Of `prepare_frame`, one for each job; before the draw.
    backbone : Backbone
    draw : Draw

    Returns
    -------
    list of (gh, gw, C), or (Z, gh, gw, C) for stacks, float32

    Raises
    ------
    BackboneError
        The embedding has a wrong shape, or NaN.
    """
    batch = torch.from_numpy(np.concatenate(images))
    if not draw.is_identity:
        digests = list(chain.from_iterable(map(_slice_digests, jobs)))
        batch = draw.apply(batch.to(getattr(backbone, "device", "cpu")), digests=digests)
    grids = torch.as_tensor(backbone.embed(batch)).float().cpu().numpy()
    _check_grids(grids, len(batch), backbone, jobs)
    stacks = grids.reshape(len(jobs), -1, *grids.shape[1:])
    return [s[0] if j.frame.ndim == 2 else s for s, j in zip(stacks, jobs, strict=True)]


def _slice_digests(job: Job) -> list[Digest]:
    """Give one digest a slice, so that noise differs from slice to slice."""
    if job.frame.ndim == 2:
        return [job.digest]
    return [digest_bytes(job.digest, z.to_bytes(4, "big")) for z in range(len(job.frame))]


def _check_grids(grids: Pixels, count: int, backbone: Backbone, batch: list[Job]) -> None:
    spec = backbone.spec
    if grids.ndim != 4 or grids.shape[0] != count or grids.shape[3] != spec.width:
        raise BackboneError(
            f"{spec.name} gave shape {grids.shape} for {count} frames from {batch[0].where} on: "
            f"expected ({count}, gh, gw, {spec.width})"
        )
    if not np.isfinite(grids).all():
        bad = np.flatnonzero(~np.isfinite(grids).all(axis=(1, 2, 3)))[0]
        job = batch[int(bad) * len(batch) // count]
        raise BackboneError(
            f"{spec.name} gave NaN or infinity for {job.where} (compute dtype {spec.dtype}): "
            "nothing of this batch is stored; try dtype float32"
        )


def make_record(job: Job, grid: Pixels, spec: SpaceSpec, draw: Draw) -> Record:
    """Make a frame's record from its grid: pool it where the space says so, and round it.

    Raises
    ------
    BackboneError
        A number does not fit the storage dtype.
    FrameError
        There is no mask, and the pooling needs one.
    """
    if spec.pooling is None:
        return Record(_store_as(grid, spec, job), None)
    if job.mask is None:
        raise FrameError(f"{job.where} has no mask, and pooling {spec.pooling} needs one")
    regions = Regions.of_mask(job.mask)
    mask, centroids = _draw_mask(job.mask, regions, draw)
    features = pool(grid, mask, spec.pooling, labels=regions.labels, centroids=centroids)
    return Record(_store_as(features, spec, job), regions.labels)


def _draw_mask(
    mask: NDArray[np.int32], regions: Regions, draw: Draw
) -> tuple[NDArray[np.int32], NDArray[np.float64] | None]:
    """Map a mask, and the centroid of each of its regions, by a draw."""
    if draw.is_identity:
        return mask, None
    drawn = np.stack([draw.apply_mask(plane) for plane in _slices(mask)])
    centroids = regions.centroids()
    mapped = draw.map_points(centroids[:, 1:], shape=mask.shape[-2:])
    points = np.column_stack([centroids[:, 0], mapped])
    return (drawn[0] if mask.ndim == 2 else drawn), points


def _store_as(features: Pixels, spec: SpaceSpec, job: Job) -> NDArray[np.floating[Any]]:
    with np.errstate(over="ignore"):
        stored = features.astype(spec.dtype)
    if not np.isfinite(stored).all():
        raise BackboneError(
            f"an embedding of {job.where} reaches {np.abs(features).max():.4g}, too large for "
            f"storage dtype {spec.dtype}: use dtype float32"
        )
    return stored
