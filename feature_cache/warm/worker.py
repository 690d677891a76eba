"""What a Dask worker does with a unit: loads the backbone once, computes, commits, counts."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from ..backbones import load_backbone
from ..cache import FeatureCache
from ..errors import BackboneError
from ..hashing import Digest
from ..movies import Movie
from ..spec import BackboneSpec, SpaceSpec
from .commits import Budget
from .grids import StoredGrids
from .plan import Task, Unit
from .report import PART_FAILS, Failure, Tally
from .run import work_off
from .sources import Source

if TYPE_CHECKING:
    from ..augment import Draw
    from ..backbones.base import Backbone


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to load a backbone: what goes to workers in place of a model.

    Parameters
    ----------
    name, weights, device, dtype, options
        As `load_backbone`; options as pairs.
    """

    name: str
    weights: str | None = None
    device: str | None = None
    dtype: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def load(self) -> Backbone:
        """Load it; errors as `load_backbone`."""
        return load_backbone(self.name, self.weights, self.device, self.dtype, **dict(self.options))


@dataclass(frozen=True, slots=True)
class Order:
    """A unit as it goes to a worker: all by name, and small.

    Attributes
    ----------
    recipe : Recipe or None
        None where all is pooled from stored grids.
    digests : mapping
        Of each frame and its mask, as the plan found them.
    max_bytes : int or None
        What this unit may add to the cache.
    """

    root: str
    codec: str
    layers: tuple[str, ...]
    recipe: Recipe | None
    source: Source
    specs: tuple[SpaceSpec, ...]
    draw: Draw
    origin: str
    digests: Mapping[int, tuple[Digest, Digest | None]]
    wanted: tuple[tuple[int, tuple[int, ...]], ...]
    grids: frozenset[int]
    batch_size: int
    max_bytes: int | None = None

    @property
    def frames(self) -> list[int]:
        """List the frames."""
        return [t for t, _ in self.wanted]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker did with a unit, in records."""

    computed: int
    elsewhere: int
    failures: tuple[Failure, ...] = ()
    stopped: bool = False
    """Whether it stopped as it may add no more bytes."""


def compute_order(order: Order) -> Outcome:
    """Compute a unit and commit its records, on a worker.

    Raises
    ------
    BackboneError
        The worker's weights are not those of the plan.
    StoreError
        The cache can't be written from here.
    """
    tally = Tally()
    cache = _open_cache(order.root, order.codec, order.layers)
    backbone = _backbone_of(order)
    try:
        task = _bind(cache, backbone, order)
    except PART_FAILS as error:
        records = sum(len(spaces) for _, spaces in order.wanted)
        return Outcome(0, 0, (Failure(order.source.path, str(error), records),))
    budget = None if order.max_bytes is None else Budget(order.max_bytes, 0)
    work_off(cache, [Unit(task, order.wanted)], [backbone], order.batch_size, tally, budget)
    cache.counter.save()
    stopped = budget is not None and budget.spent
    return Outcome(tally.computed, tally.elsewhere, tuple(tally.failures), stopped)


def _bind(cache: FeatureCache, backbone: Backbone, order: Order) -> Task:
    movie, spec = _open_movie(order.source), order.specs[0]
    pooled = next((one for one in order.specs if one.pooling is not None), spec)
    features = cache.movie(
        movie.frames,
        None if pooled.pooling is None else movie.masks,
        backbone,
        pooling=pooled.pooling,
        dtype=pooled.dtype,
        name=movie.name,
    )
    features.know(order.digests)
    return Task(features.with_draw(order.draw, order.origin), order.specs, (), order.grids)


@lru_cache(maxsize=8)
def _open_cache(root: str, codec: str, layers: tuple[str, ...]) -> FeatureCache:
    return FeatureCache(root, codec=codec, layers=layers)


@lru_cache(maxsize=32)
def _open_movie(source: Source) -> Movie:
    return source.open()


_loading = threading.Lock()
_loaded: dict[Recipe, _OneAtATime] = {}


def _backbone_of(order: Order) -> Backbone:
    wanted = order.specs[0].backbone
    if order.recipe is None:
        return StoredGrids(wanted)
    with _loading:
        if order.recipe not in _loaded:
            _loaded[order.recipe] = _OneAtATime(order.recipe.load())
        backbone = _loaded[order.recipe]
        found = backbone.spec
    if found != wanted:
        raise BackboneError(
            f"{order.recipe.name} is another here than where the plan was made: weights "
            f"{found.weights[:8]}, expected {wanted.weights[:8]}, or other options; have workers "
            "use the same weights and the same version of feature-cache"
        )
    return backbone


class _OneAtATime:
    """A backbone for several threads of a worker: one embeds while others read and write."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone, self._lock = backbone, threading.Lock()
        self.device = getattr(backbone, "device", "cpu")

    @property
    def spec(self) -> BackboneSpec:
        return self._backbone.spec

    def embed(self, frames: Any) -> Any:
        with self._lock:
            return self._backbone.embed(frames)
