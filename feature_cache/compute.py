"""Frames to records: normalise, draw, embed, pool."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from .augment import Draw
from .backbones.state import undisturbed
from .backbones.witness import Witness
from .errors import BackboneError, FrameError
from .hashing import Digest, digest_bytes
from .key import Record
from .normalize import Pixels, normalize
from .pooling import Regions, pool_frame
from .spec import BackboneSpec, Bounds, Normalization, SpaceSpec

if TYPE_CHECKING:
    from .backbones.base import Backbone

_log = logging.getLogger(__name__)

Grid: TypeAlias = NDArray[np.float32]
"""(gh, gw, C), or (Z, gh, gw, C) for a stack."""
FindGrids: TypeAlias = Callable[[Sequence["Job"], Draw], Sequence[Grid | None]]
"""Gives the grids of frames under a draw that need not be embedded, None for the others."""


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
    for job, grid in compute_grids(jobs, Embedder(backbone, spec.backbone), draw, batch_size):
        if isinstance(grid, Exception):
            raise grid
        yield make_record(job, grid, spec, draw)


def compute_grids(
    jobs: Iterable[Job],
    embedder: Embedder,
    draw: Draw,
    batch_size: int,
    *,
    find: FindGrids | None = None,
    blame: tuple[type[Exception], ...] = (),
) -> Iterator[tuple[Job, Grid | Exception]]:
    """Compute grids in batches, one for each job, in order. Holds one batch at a time.

    Parameters
    ----------
    jobs, draw, batch_size
        As `compute_records`.
    embedder, blame
        As `Embedder.embed`.
    find : callable, optional
        What it finds is not embedded.
    """
    for batch in _batches(jobs, batch_size):
        found = find(batch, draw) if find is not None else [None] * len(batch)
        missing = [job for job, grid in zip(batch, found, strict=True) if grid is None]
        fresh = embedder.embed(missing, draw, blame=blame)
        for job, grid in zip(batch, found, strict=True):
            yield job, next(fresh) if grid is None else grid


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


class Embedder:
    """Embeds frames, fewer at once where the device's memory does not suffice.

    Parameters
    ----------
    backbone : Backbone
    spec : BackboneSpec
        Of which the keys were made; the backbone is compared with it before each batch.
    """

    def __init__(self, backbone: Backbone, spec: BackboneSpec) -> None:
        self.backbone, self._witness = backbone, Witness(backbone, spec)
        self._most_slices: int | None = None

    def embed(
        self,
        jobs: Sequence[Job],
        draw: Draw,
        images: Sequence[Pixels] | None = None,
        *,
        blame: tuple[type[Exception], ...] = (),
    ) -> Iterator[Grid | Exception]:
        """Embed whole frames of one shape, as one batch if that can be.

        Parameters
        ----------
        jobs : sequence of Job
        draw : Draw
        images : sequence of (Z, H, W) float32, optional
            What `prepare_frame` gives, where that was done before.
        blame : tuple of Exception types
            Errors that cost only their frame: the batch is halved, down to the frame to blame.

        Yields
        ------
        (gh, gw, C), or (Z, gh, gw, C) for stacks, float32
            In order; or the error that a frame is to blame for. One for which there is no memory
            is a BackboneError.

        Raises
        ------
        BackboneError
            The backbone is not the one that the keys say (`Witness`), the embedding has a wrong
            shape, or NaN; unless it is among `blame`.
        """
        parts = [range(len(jobs))] if jobs else []
        while parts:
            part = parts.pop()
            outcome: list[Grid] | Exception | None = None
            if self._fits(jobs[part.start], len(part)):
                chosen = jobs[part.start : part.stop]
                given = None if images is None else images[part.start : part.stop]
                outcome = self._attempt(chosen, draw, given, blame)
            if isinstance(outcome, list):
                yield from outcome
            elif isinstance(outcome, Exception) and len(part) == 1:
                yield outcome
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]

    def _fits(self, job: Job, count: int) -> bool:
        most = self._most_slices
        return most is None or count == 1 or count * _depth(job.frame) <= most

    def _attempt(
        self,
        jobs: Sequence[Job],
        draw: Draw,
        images: Sequence[Pixels] | None,
        blame: tuple[type[Exception], ...],
    ) -> list[Grid] | Exception:
        """Embed one batch; where memory ran out, nothing holds on to it."""
        try:
            self._witness.check()
            normalization = self._witness.spec.normalization
            images = images or [prepare_frame(job, normalization) for job in jobs]
            return embed_frames(jobs, images, self.backbone, draw)
        except Exception as error:
            if _is_out_of_memory(error):
                return self._lower(jobs, error)
            if not isinstance(error, blame):
                raise
            return error

    def _lower(self, jobs: Sequence[Job], error: Exception) -> BackboneError:
        """Take fewer frames at once from now on; say what to lower where it was only one."""
        name, device = self.backbone.spec.name, getattr(self.backbone, "device", "the device")
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        if len(jobs) > 1:
            fewer = len(jobs) // 2
            self._most_slices = fewer * _depth(jobs[0].frame)
            _log.warning(
                "%s on %s: out of memory with %d frames at once, going on with %d; a batch size "
                "of %d would have done", name, device, len(jobs), fewer, fewer,
            )  # fmt: skip
        first = jobs[0]
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return BackboneError(
            f"{name} ran out of memory on {device} with one frame, {first.where} of shape "
            f"{first.frame.shape}: lower its input_size, use dtype bfloat16 or a smaller model, "
            f"or free the device ({reason})"
        )


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether there is no memory left; torch has several ways to say so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text or "alloc_cpu" in text
    return isinstance(error, RuntimeError) and said


def embed_frames(
    jobs: Sequence[Job], images: Sequence[Pixels], backbone: Backbone, draw: Draw
) -> list[Grid]:
    """Embed whole frames of one shape as one batch.

    Parameters
    ----------
    jobs : sequence of Job
    images : sequence of (Z, H, W) float32
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
    bounds, device = backbone.spec.normalization.range, getattr(backbone, "device", "cpu")
    _check_range(batch, bounds, backbone, jobs)
    with undisturbed(device):
        if not draw.is_identity:
            digests = list(chain.from_iterable(map(slice_digests, jobs)))
            batch = draw.apply(batch.to(device), digests=digests, bounds=bounds)
            _check_range(batch, bounds, backbone, jobs)
        grids = torch.as_tensor(backbone.embed(batch)).float().cpu().numpy()
    _check_grids(grids, len(batch), backbone, jobs)
    stacks = grids.reshape(len(jobs), -1, *grids.shape[1:])
    return [s[0] if j.frame.ndim == 2 else s for s, j in zip(stacks, jobs, strict=True)]


def _check_range(
    batch: torch.Tensor, bounds: Bounds | None, backbone: Backbone, jobs: Sequence[Job]
) -> None:
    """Check that a backbone sees the range that its normalisation promises."""
    if bounds is None:
        return
    low, high = (float(value) for value in torch.aminmax(batch))
    if not bounds[0] <= low <= high <= bounds[1]:
        raise BackboneError(
            f"{jobs[0].where}, or a frame of its batch, has pixels from {low:.6g} to {high:.6g} "
            f"for {backbone.spec.name}: its normalisation promises {bounds[0]:g} to {bounds[1]:g}"
        )


def slice_digests(job: Job) -> list[Digest]:
    """Give one digest a slice, so that noise differs from slice to slice."""
    if job.frame.ndim == 2:
        return [job.digest]
    return [digest_bytes(job.digest, z.to_bytes(4, "big")) for z in range(len(job.frame))]


def _check_grids(grids: Grid, count: int, backbone: Backbone, batch: Sequence[Job]) -> None:
    spec = backbone.spec
    if grids.ndim != 4 or grids.shape[0] != count or grids.shape[3] != spec.width:
        raise BackboneError(
            f"{spec.name} gave shape {grids.shape} for {count} frames from {batch[0].where} on: "
            f"expected ({count}, gh, gw, {spec.width})"
        )
    if not np.isfinite(grids).all():
        bad = np.flatnonzero(~np.isfinite(grids).all(axis=(1, 2, 3)))[0]
        job = batch[int(bad) * len(batch) // count]
        advice = "look at the frame" if spec.dtype == "float32" else "try dtype float32"
        raise BackboneError(
            f"{spec.name} gave NaN or infinity for {job.where} (compute dtype {spec.dtype}): "
            f"nothing of it is stored; {advice}"
        )


def make_record(job: Job, grid: Grid, spec: SpaceSpec, draw: Draw) -> Record:
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
    [features] = pool_frame(grid, regions, draw, [spec.pooling])
    return Record(_store_as(features, spec, job), regions.labels)


def _store_as(features: Pixels, spec: SpaceSpec, job: Job) -> NDArray[np.floating[Any]]:
    with np.errstate(over="ignore"):
        stored = features.astype(spec.dtype)
    if not np.isfinite(stored).all():
        raise BackboneError(
            f"an embedding of {job.where} reaches {np.abs(features).max():.4g}, too large for "
            f"storage dtype {spec.dtype}: use dtype float32"
        )
    return stored
