"""A backbone at work: from frames to records, fewer at once where memory does not suffice."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..augment import Draw
from ..backbones.state import undisturbed
from ..backbones.witness import Witness
from ..errors import BackboneError, FeatureCacheError, StoreError
from ..hashing import DIGEST_BYTES
from ..key import Record, record_key
from ..pooling import pool_frame
from ..spec import BackboneSpec, Bounds, SpaceSpec
from .frame import Frame

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..store import Space

Grid: TypeAlias = NDArray[np.float32]
"""(gh, gw, C), or (Z, gh, gw, C) for a stack."""

GRID_DTYPE = "float32"
"""Grids in any other dtype are rounded: what is pooled from them has other bits."""

_log = logging.getLogger(__name__)
_locks: dict[tuple[bytes, str], threading.RLock] = {}
"""By backbone and device: one batch at a time, however many engines a process has."""


def grid_spec(backbone: BackboneSpec) -> SpaceSpec:
    """Give the space of the grids from which poolings are computed bit by bit."""
    return SpaceSpec(backbone, None, GRID_DTYPE)


@dataclass(frozen=True, slots=True, eq=False)
class Embedding:
    """A frame under one draw, which goes through the backbone once for all its records.

    Attributes
    ----------
    specs : tuple of SpaceSpec
        The spaces of these records.
    """

    frame: Frame
    draw: Draw
    specs: tuple[SpaceSpec, ...]
    shape: tuple[int, int] = field(init=False)
    """(H, W) that the backbone sees."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", self.draw.output_shape(self.frame.shape))


class Model:
    """Makes records of frames with one backbone.

    Parameters
    ----------
    backbone : Backbone
    spec : BackboneSpec
        Of which the keys were made; the backbone is compared with it before each batch.
    grids : Space, optional
        Where its float32 grids are; what is pooled from them needs no backbone.
    """

    def __init__(self, backbone: Backbone, spec: BackboneSpec, grids: Space | None = None) -> None:
        self.backbone, self.spec, self.grids = backbone, spec, grids
        self.device = getattr(backbone, "device", "cpu")
        self._witness = Witness(backbone, spec)
        self._grid_space = grid_spec(spec).digest
        self._most_slices: int | None = None
        self._lock = _locks.setdefault((spec.digest, str(self.device)), threading.RLock())

    def prepare(self, frame: Frame) -> None:
        """Normalise a frame, once for all its draws. FrameError where that can't be."""
        frame.normalized(self.spec.normalization)

    def find_grid(self, embedding: Embedding) -> Grid | None:
        """Read the grid of a frame under a draw, verified, where it is stored in float32.

        Only for what is pooled. One that is damaged, or can't be read, counts as none, with a
        warning in the log.
        """
        if self.grids is None or any(spec.pooling is None for spec in embedding.specs):
            return None
        key = record_key(self._grid_space, embedding.frame.digest, None, embedding.draw)
        try:
            [found] = self.grids.read(np.frombuffer(key, np.uint8).reshape(1, DIGEST_BYTES))
        except StoreError as error:
            _log.warning("grids that are stored are not used: %s", error)
            return None
        return None if found is None else found.features.astype(np.float32, copy=False)

    # Embedding

    def embed(self, batch: Sequence[Embedding]) -> Iterator[Grid | FeatureCacheError]:
        """Embed frames that the backbone sees in one shape, as one batch if that can be.

        Where a batch fails it is halved, down to the frame that is to blame.

        Yields
        ------
        (gh, gw, C), or (Z, gh, gw, C) for stacks, float32
            In order; or the error that a frame is to blame for: BackboneError where the backbone
            is not the one that the keys say (`Witness`), raises, or gives a wrong shape or NaN, or
            where one frame is too much for the device's memory.
        """
        parts = [range(len(batch))] if batch else []
        while parts:
            part = parts.pop()
            chosen = batch[part.start : part.stop]
            outcome = self._attempt(chosen) if self._fits(chosen) else None
            if isinstance(outcome, list):
                yield from outcome
            elif outcome is not None and len(part) == 1:
                yield outcome
            else:
                half = len(part) // 2
                parts += [part[half:], part[:half]]

    def _fits(self, batch: Sequence[Embedding]) -> bool:
        most = self._most_slices
        return most is None or len(batch) == 1 or _count_slices(batch) <= most

    def _attempt(self, batch: Sequence[Embedding]) -> list[Grid] | FeatureCacheError:
        """Embed one batch; where memory ran out, nothing holds on to it."""
        try:
            with self._lock:
                self._witness.check()
                return self._embed(batch)
        except Exception as error:  # noqa: BLE001 - it goes to those who asked for the frame
            if _is_out_of_memory(error):
                return self._lower(batch, error)
            return _as_ours(error, self.spec.name, batch[0].frame.where)

    def _embed(self, batch: Sequence[Embedding]) -> list[Grid]:
        with undisturbed(self.device):
            images = self._draw_all(batch)
            grids = torch.as_tensor(self.backbone.embed(images)).float().cpu().numpy()
        self._check_grids(grids, len(images), batch)
        ends = np.cumsum([each.frame.depth for each in batch])
        stacks = np.split(grids, ends[:-1])
        return [
            stack[0] if each.frame.pixels.ndim == 2 else stack
            for stack, each in zip(stacks, batch, strict=True)
        ]

    def _draw_all(self, batch: Sequence[Embedding]) -> torch.Tensor:
        """Give what the backbone sees, (B, H', W'); frames of one draw are drawn at once."""
        parts = []
        for draw, group in groupby(batch, key=lambda each: each.draw):
            frames = [each.frame for each in group]
            rule = self.spec.normalization
            images = torch.from_numpy(np.concatenate([f.normalized(rule) for f in frames]))
            self._check_range(images, frames[0])
            if not draw.is_identity:
                digests = list(chain.from_iterable(frame.slice_digests() for frame in frames))
                images = draw.apply(images.to(self.device), digests=digests, bounds=self._bounds)
                self._check_range(images, frames[0])
            parts.append(images)
        return parts[0] if len(parts) == 1 else torch.cat([p.to(self.device) for p in parts])

    @property
    def _bounds(self) -> Bounds | None:
        return self.spec.normalization.range

    def _check_range(self, images: torch.Tensor, first: Frame) -> None:
        """Check that the backbone sees the range that its normalisation promises."""
        if (bounds := self._bounds) is None:
            return
        low, high = (float(value) for value in torch.aminmax(images))
        if not bounds[0] <= low <= high <= bounds[1]:
            raise BackboneError(
                f"{first.where}, or a frame of its batch, has pixels from {low:.6g} to {high:.6g} "
                f"for {self.spec.name}: its normalisation promises {bounds[0]:g} to {bounds[1]:g}"
            )

    def _check_grids(self, grids: Grid, count: int, batch: Sequence[Embedding]) -> None:
        spec, first = self.spec, batch[0].frame.where
        if grids.ndim != 4 or grids.shape[0] != count or grids.shape[3] != spec.width:
            raise BackboneError(
                f"{spec.name} gave shape {grids.shape} for {count} frames from {first} on: "
                f"expected ({count}, gh, gw, {spec.width})"
            )
        if not np.isfinite(grids).all():
            bad = int(np.flatnonzero(~np.isfinite(grids).all(axis=(1, 2, 3)))[0])
            owners = np.repeat(range(len(batch)), [each.frame.depth for each in batch])
            advice = "look at the frame" if spec.dtype == "float32" else "try dtype float32"
            raise BackboneError(
                f"{spec.name} gave NaN or infinity for {batch[owners[bad]].frame.where} (compute "
                f"dtype {spec.dtype}): nothing of it is stored; {advice}"
            )

    def _lower(self, batch: Sequence[Embedding], error: Exception) -> BackboneError:
        """Take fewer frames at once from now on; say what to lower where it was only one."""
        name = self.spec.name
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.empty_cache()
        if len(batch) > 1:
            fewer = len(batch) // 2
            self._most_slices = _count_slices(batch[:fewer])
            _log.warning(
                "%s on %s: out of memory with %d frames at once, going on with %d; a batch size "
                "of %d would have done", name, self.device, len(batch), fewer, fewer,
            )  # fmt: skip
        first = batch[0].frame
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return BackboneError(
            f"{name} ran out of memory on {self.device} with one frame, {first.where} of shape "
            f"{first.pixels.shape}: lower its input_size, use dtype bfloat16 or a smaller model, "
            f"or free the device ({reason})"
        )

    # Pooling

    def make_records(self, embedding: Embedding, grid: Grid) -> list[Record]:
        """Make a frame's records of its grid, one for each space: pooled, rounded and checked.

        Raises
        ------
        BackboneError
            A number does not fit the storage dtype.
        FrameError
            There is no mask, and a pooling needs one.
        """
        frame = embedding.frame
        modes = list(dict.fromkeys(s.pooling for s in embedding.specs if s.pooling is not None))
        pooled: dict[str | None, NDArray[np.floating[Any]]] = {None: grid}
        labels = None
        if modes:
            regions = frame.regions()
            labels = regions.labels
            pooled.update(zip(modes, pool_frame(grid, regions, embedding.draw, modes), strict=True))
        return [
            Record(
                _store_as(pooled[spec.pooling], spec, frame),
                None if spec.pooling is None else labels,
            )
            for spec in embedding.specs
        ]


def _count_slices(batch: Sequence[Embedding]) -> int:
    return sum(each.frame.depth for each in batch)


def _store_as(
    features: NDArray[np.floating[Any]], spec: SpaceSpec, frame: Frame
) -> NDArray[np.floating[Any]]:
    with np.errstate(over="ignore"):
        stored = features.astype(spec.dtype)
    if not np.isfinite(stored).all():
        raise BackboneError(
            f"an embedding of {frame.where} reaches {np.abs(features).max():.4g}, too large for "
            f"storage dtype {spec.dtype}: use dtype float32"
        )
    return stored


def _is_out_of_memory(error: Exception) -> bool:
    """Tell whether there is no memory left; torch has several ways to say so."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    said = "out of memory" in text or "can't allocate memory" in text or "alloc_cpu" in text
    return isinstance(error, RuntimeError) and said


def _as_ours(error: Exception, name: str, where: str) -> FeatureCacheError:
    """Give an error of ours for whatever a backbone raises; it names the frame."""
    if isinstance(error, FeatureCacheError):
        return error
    ours = BackboneError(f"{name} failed for {where}: {type(error).__name__}: {error}")
    ours.__cause__ = error
    return ours


def compute_records(
    frames: Iterable[Frame], spec: SpaceSpec, backbone: Backbone, draw: Draw, batch_size: int
) -> Iterator[Record]:
    """Compute records without a cache, one for each frame, in order.

    Parameters as `compute_each`.

    Raises
    ------
    BackboneError, FrameError
        As `Model.embed` and `Model.make_records`.
    """
    model = Model(backbone, spec.backbone)
    for _, record in compute_each(frames, model, spec, draw, batch_size):
        if isinstance(record, Exception):
            raise record
        yield record


def compute_each(
    frames: Iterable[Frame], model: Model, spec: SpaceSpec, draw: Draw, batch_size: int
) -> Iterator[tuple[Frame, Record | FeatureCacheError]]:
    """Compute the record of each frame, or the error in its place, in order.

    Parameters
    ----------
    frames : iterable of Frame
        Held a batch at a time.
    model : Model
    spec : SpaceSpec
    draw : Draw
    batch_size : int
        Slices in a batch, at most (but always a whole frame).
    """
    wanted = (Embedding(frame, draw, (spec,)) for frame in frames)
    for batch in cut_batches(wanted, batch_size):
        for each, grid in zip(batch, model.embed(batch), strict=True):
            try:
                if isinstance(grid, Exception):
                    raise grid
                yield each.frame, model.make_records(each, grid)[0]
            except FeatureCacheError as error:
                yield each.frame, error


def cut_batches(wanted: Iterable[Embedding], batch_size: int) -> Iterator[list[Embedding]]:
    """Cut embeddings into batches of one shape, in order."""
    batch: list[Embedding] = []
    for each in wanted:
        full = batch and _count_slices(batch) >= batch_size
        if batch and (full or batch[0].shape != each.shape):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


Progress = Callable[[int], None]
"""Called with the number of frames or records just done."""
