"""A backbone at work: from frames to records, fewer at once where memory does not suffice."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from traceback import format_exception
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..augment import Draw
from ..backbones.base import mixes_sizes
from ..backbones.several_layers import Layers
from ..backbones.witness import Witness
from ..errors import BackboneError, FeatureCacheError, FrameError, StoreError
from ..forks import Lock
from ..hashing import DIGEST_BYTES
from ..key import Record, record_key
from ..rounding import difference, rounding_bound
from ..spec import BackboneSpec, SpaceSpec
from .cpu import DrawnFrames, Embedding, Grids, Plain, count_slices
from .device import PLAIN, OnDevice, is_plain
from .frame import Frame

if TYPE_CHECKING:
    from ..backbones.base import Backbone
    from ..store import Space

FIRST_BATCH, MOST_AT_ONCE = 8, 64
"""Slices of the first batch, and of any, where nobody says how many."""
PROOFS = 8
"""How many records of each space are computed in the plain way too, on any device but a CPU."""
GRID_DTYPE = "float32"
"""Grids in any other dtype are rounded: what is pooled from them has other bits."""

_log = logging.getLogger(__name__)
_locks: dict[tuple[bytes, str], Lock] = {}
"""By backbone and device: one batch at a time, however many engines a process has."""


def grid_spec(backbone: BackboneSpec) -> SpaceSpec:
    """Give the space of the grids from which poolings are computed bit by bit."""
    return SpaceSpec(backbone, None, GRID_DTYPE)


class Model:
    """Makes records of frames with one backbone.

    Parameters
    ----------
    backbone : Backbone or Layers
    specs : tuple of BackboneSpec
        Of its layers, of which the keys were made; it is compared with them before each batch.
    grids : mapping of BackboneSpec to Space
        Where the float32 grids of each are; what is pooled from them needs no backbone.

    Attributes
    ----------
    digest : bytes
        Of the spec.
    fitting : int
        Slices that are embedded at once where nobody says how many: by the memory that the first
        batch took on a GPU.
    """

    def __init__(
        self,
        backbone: Backbone | Layers,
        specs: tuple[BackboneSpec, ...],
        grids: Mapping[BackboneSpec, Space] = MappingProxyType({}),
    ) -> None:
        self.backbone, self.spec, self.grids = backbone, specs[0], grids
        self.digest = self.spec.digest
        self.device = getattr(backbone, "device", "cpu")
        self._witness = Witness(backbone, specs)
        self._most_slices: int | None = None
        self.fitting, self._is_measured = FIRST_BATCH, False
        self._lock = _locks.setdefault((self.digest, str(self.device)), Lock())
        self.mixes_sizes = _mixes_sizes(backbone)
        self._plain = Plain(backbone, specs)
        self._way = self._plain if is_plain(self.device) else OnDevice(backbone, specs)
        self._proofs: dict[SpaceSpec, int] = {}

    def prepare(self, frame: Frame) -> None:
        """Normalise a frame, once for all its draws.

        Raises
        ------
        BackboneError
            There is no memory for it on the device.
        FrameError
            That can't be.
        """
        try:
            self._way.prepare(frame)
        except Exception as error:
            if not _is_out_of_memory(error):
                raise
            raise _as_ours(error, self.spec.name, frame.where) from error

    def find_grids(self, embeddings: Sequence[Embedding]) -> list[Grids | None]:
        """Read the grids of frames under draws, verified, where they are stored in float32.

        Only for what is pooled, and where the grid of each layer is there. One that is damaged, or
        can't be read, counts as none, with a warning in the log.
        """
        found: list[Grids] = [{} for _ in embeddings]
        wanted: dict[BackboneSpec, list[int]] = defaultdict(list)
        for i, each in enumerate(embeddings):
            for layer, part in each.by_layer().items():
                if layer in self.grids and None not in map(_pooling, part.specs):
                    wanted[layer].append(i)
        for layer, numbers in wanted.items():
            space = grid_spec(layer).digest
            keys = [
                record_key(space, each.frame.seen_digest, None, each.draw)
                for each in (embeddings[i] for i in numbers)
            ]
            rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, DIGEST_BYTES)
            try:
                records = self.grids[layer].read(rows)
            except StoreError as error:
                _log.warning("grids that are stored are not used: %s", error)
                continue
            for i, record in zip(numbers, records, strict=True):
                if record is not None:
                    found[i][layer] = record.features.astype(np.float32, copy=False)
        return [
            grids if grids.keys() >= each.by_layer().keys() else None
            for grids, each in zip(found, embeddings, strict=True)
        ]

    # Embedding

    def embed(self, batch: Sequence[Embedding]) -> Iterator[Any]:
        """Embed frames that can go through the backbone together, as one batch if there is room.

        Where a batch fails it is halved, down to the frame that is to blame.

        Yields
        ------
        grid, or FeatureCacheError
            In order: what `make_records` takes; or the error that a frame is to blame for, a
            BackboneError where the backbone is not the one that the keys say (`Witness`), raises,
            or gives a wrong shape or NaN, or where one frame is too much for the device's memory.
        """
        parts = [range(len(batch))] if batch else []
        while parts:
            part = parts.pop()
            chosen = batch[part.start : part.stop]
            # None: too many slices, halved without an attempt
            outcome = self._attempt(chosen) if self._fits(chosen) else None
            if isinstance(outcome, list):
                yield from outcome
            elif outcome is not None and len(part) == 1:
                yield outcome
            else:
                half = len(part) // 2
                # the first half comes next, so that all are given in order
                parts += [part[half:], part[:half]]

    def _fits(self, batch: Sequence[Embedding]) -> bool:
        most = self._most_slices
        return most is None or len(batch) == 1 or count_slices(batch) <= most

    def _attempt(self, batch: Sequence[Embedding]) -> list[Any] | FeatureCacheError:
        """Embed one batch; where memory ran out, nothing holds on to it."""
        try:
            # not under the lock: drawn while another thread's batch is embedded
            groups = self._way.draw(batch)
            with self._lock:
                # Nothing may come between: a network that changes then would not be noticed.
                changed = self._look_at_network()
                return self._measure(groups) if changed is None else changed
        except Exception as error:  # noqa: BLE001 - it goes to those who asked for the frame
            if _is_out_of_memory(error):
                return self._lower(batch, error)
            return _as_ours(error, self.spec.name, batch[0].frame.where)

    def _look_at_network(self) -> BackboneError | None:
        try:
            self._witness.check()
        except BackboneError as error:
            return error  # whatever the frame
        return None

    def _measure(self, groups: Sequence[DrawnFrames]) -> list[Any]:
        """Embed a batch; see how many fit by what the first takes, where that can be seen."""
        device = torch.device(self.device)
        if self._is_measured or device.type != "cuda":
            return self._way.embed(groups)
        self._is_measured = True
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        grids = self._way.embed(groups)
        taken = torch.cuda.max_memory_allocated(device) - before
        free = torch.cuda.mem_get_info(device)[0]
        self.fitting = count_fitting(free, taken, sum(len(group.images) for group in groups))
        return grids

    def _lower(self, batch: Sequence[Embedding], error: Exception) -> BackboneError:
        """Take fewer frames at once from now on; say what to lower where it was only one."""
        name = self.spec.name
        _give_back_memory()
        if len(batch) > 1:
            fewer = len(batch) // 2
            self._most_slices = count_slices(batch[:fewer])
            _log.warning(
                "%s on %s: out of memory with %d frames at once, going on with %d; a batch size "
                "of %d would have done", name, self.device, len(batch), fewer, fewer,
            )  # fmt: skip
        # of several frames nobody hears this: they are halved, and tried again
        first = batch[0].frame
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return BackboneError(
            f"{name} ran out of memory on {self.device} with one frame, {first.where} of shape "
            f"{first.pixels.shape}: lower its input_size, use dtype bfloat16 or a smaller model, "
            f"or free the device ({reason})"
        )

    # Records

    def make_records(self, embedding: Embedding, grids: Grids) -> list[Record]:
        """Make a frame's records of its grids, one for each space: pooled, rounded and checked.

        Raises
        ------
        BackboneError
            A number does not fit the storage dtype, or the device gives others than the CPU.
        FrameError
            There is no mask, and a pooling needs one.
        """
        # from the store, or computed in the plain way: no device has them
        is_here = all(isinstance(grid, np.ndarray) for grid in grids.values())
        way = self._plain if is_here else self._way
        try:
            try:
                records = _make_all(way, embedding, grids)
            except Exception as error:
                # the grids are good: only to pool them there was no memory
                if not (isinstance(way, OnDevice) and _is_out_of_memory(error)):
                    raise
                parts = embedding.by_layer()
                here = {layer: way.fetch(parts[layer], grid) for layer, grid in grids.items()}
                way, records = self._plain, _make_all(self._plain, embedding, here)
            if way is not self._plain:
                self._prove(embedding, records)
        except Exception as error:  # noqa: BLE001 - also of a device
            ours = _as_ours(error, self.spec.name, embedding.frame.where)
            # what nobody expects has itself as the cause, by which `Tally` knows it
            raise ours from ours.__cause__ or error.__cause__
        return records

    def _prove(self, embedding: Embedding, records: Sequence[Record]) -> None:
        """Compare the first records of each space on a device with those of the plain way."""
        unproved = [spec for spec in embedding.specs if self._proofs.get(spec, 0) < PROOFS]
        if not unproved:
            return
        expected = _make_all(self._plain, embedding, self._embed_plainly(embedding))
        for spec, one, other in zip(embedding.specs, records, expected, strict=True):
            apart, bound = difference(one, other), rounding_bound(spec)
            # not `>`, which NaN would pass
            if not apart <= bound:
                raise BackboneError(
                    f"{self.spec.name} on {self.device} gives other numbers for "
                    f"{embedding.frame.where} than when pixels are normalised and grids pooled on "
                    f"the CPU: up to {apart:.3g} of the largest in a vector, where rounding "
                    f"explains {bound:.3g}; nothing of it is stored: set {PLAIN}=1, and report it"
                )
            self._proofs[spec] = self._proofs.get(spec, 0) + 1
        # normalised here for the comparison alone; a frame of a window lives on
        for frame in embedding.frame.seen:
            frame.image = None

    def _embed_plainly(self, embedding: Embedding) -> Grids:
        """Embed a frame in the plain way; once more where other batches had left no memory."""
        with self._lock:
            try:
                return self._plain.embed(self._plain.draw([embedding]))[0]
            except Exception as error:
                if not _is_out_of_memory(error):
                    raise
            # not in the `except`, which holds on to what was taken
            _give_back_memory()
            return self._plain.embed(self._plain.draw([embedding]))[0]


_pooling = attrgetter("pooling")


def _mixes_sizes(backbone: Backbone | Layers) -> bool:
    members = backbone.members if isinstance(backbone, Layers) else (backbone,)
    return all(map(mixes_sizes, members))


def _make_all(way: Plain | OnDevice, embedding: Embedding, grids: Grids) -> list[Record]:
    """Make the records of all layers, in the order of the spaces."""
    records: dict[SpaceSpec, Record] = {}
    for layer, part in embedding.by_layer().items():
        records.update(zip(part.specs, way.make_records(part, grids[layer]), strict=True))
    return [records[spec] for spec in embedding.specs]


def count_fitting(free: int, taken: int, slices: int) -> int:
    """Give how many slices to embed at once, given what some of them took; half is left to others.

    Examples
    --------
    >>> count_fitting(free=40 << 30, taken=8 << 30, slices=8)
    20
    """
    fitting = free // 2 * slices // max(1, taken)
    return min(MOST_AT_ONCE, max(FIRST_BATCH, fitting))


def _give_back_memory() -> None:
    """Give back what torch keeps of a device's memory and doesn't use."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.empty_cache()


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
        is_named = where in str(error) or not isinstance(error, BackboneError | FrameError)
        return error if is_named else type(error)(f"{where}: {error}")
    ours = BackboneError(f"{name} failed for {where}: {type(error).__name__}: {error}")
    # A traceback holds on to all the frames' pixels, for as long as somebody keeps the error.
    ours.add_note("".join(format_exception(error)))
    ours.__cause__ = error.with_traceback(None)
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
    model = Model(backbone, (spec.backbone,))
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
    for batch in cut_batches(wanted, batch_size, model.mixes_sizes):
        for each, grid in zip(batch, model.embed(batch), strict=True):
            try:
                if isinstance(grid, Exception):
                    raise grid
                yield each.frame, model.make_records(each, grid)[0]
            except FeatureCacheError as error:
                yield each.frame, error


def cut_batches(
    wanted: Iterable[Embedding], batch_size: int, mixes_sizes: bool
) -> Iterator[list[Embedding]]:
    """Cut embeddings into batches, in order; of one shape unless sizes are mixed."""
    batch: list[Embedding] = []
    for each in wanted:
        full = batch and count_slices(batch) >= batch_size
        if batch and (full or not (mixes_sizes or batch[0].shape == each.shape)):
            yield batch
            batch = []
        batch.append(each)
    if batch:
        yield batch


Progress = Callable[[int], None]
"""Called with the number of frames or records just done."""
