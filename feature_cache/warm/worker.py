"""What a Dask worker does with a unit: loads the backbone once, computes, commits, counts."""

from __future__ import annotations

import signal
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch

from ..backbones import load_backbone
from ..backbones.several_layers import specs_of
from ..cache import FeatureCache
from ..engine import PART_FAILS, Budget, Failure, Tally
from ..errors import BackboneError
from ..forks import Lock
from ..hashing import Digest
from ..movies import Movie, Source
from ..spec import SpaceSpec
from .local import compute_units
from .plan import Spot, Task, Unit, bind_movie
from .push import Pushing
from .stored_grids import StoredGrids

if TYPE_CHECKING:
    from ..augment import Draw
    from ..backbones.base import Backbone


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to load a backbone: what goes to workers in place of a model.

    Parameters
    ----------
    name, weights
        As `load_backbone`; options are in the name.
    device : str, optional
        As `load_backbone`. Of several, apart by commas, a worker started on this machine takes one,
        by its number; by default, of the GPUs there are.
    """

    name: str
    weights: str | None = None
    device: str | None = None

    def load(self) -> Backbone:
        """Load it; errors as `load_backbone`."""
        device = choose_device(self.device, _own_number())
        return load_backbone(self.name, self.weights, device)


def choose_device(devices: str | None, number: int | None) -> str | None:
    """Choose a worker's device: of those named, or else of the GPUs; None for the best there is.

    Examples
    --------
    >>> choose_device("cuda:0,cuda:1", 1)
    'cuda:1'
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = devices.split(",") if devices else [f"cuda:{i}" for i in range(gpus)]
    if number is None:
        return names[0] if devices else None
    return names[number % len(names)] if names else None


def _own_number() -> int | None:
    """Give the number of this worker among those started together; None for any other."""
    with suppress(ValueError, ImportError):
        name = import_module("distributed").get_worker().name
        return int(name) if isinstance(name, int) or str(name).isdecimal() else None
    return None


@dataclass(frozen=True, slots=True)
class Order:
    """A unit as it goes to a worker: all by name, and small."""

    root: str
    codec: str
    layers: tuple[str, ...]
    recipe: Recipe | None
    """None where all is pooled from stored grids."""
    source: Source
    specs: tuple[SpaceSpec, ...]
    copies: tuple[tuple[Draw, str], ...]
    """Each draw, and how people call it."""
    digests: Mapping[int, tuple[Digest, Digest | None]]
    """Of each frame and its mask, as the plan found them."""
    wanted: tuple[tuple[int, tuple[Spot, ...]], ...]
    grids: frozenset[tuple[int, int]]
    batch_size: int | None
    push: str | None = None
    """Where the packs are sent."""
    max_bytes: int | None = None
    """What this unit may add to the cache."""
    name: str = ""
    """By which `stop_orders` knows it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker did with a unit, in records."""

    computed: int
    elsewhere: int
    failures: tuple[Failure, ...] = ()
    stopped: bool = False
    """Whether it stopped as it may add no more bytes, or was told to."""


def compute_order(order: Order) -> Outcome:
    """Compute a unit and commit its records, on a worker.

    Raises
    ------
    BackboneError
        The worker's weights are not those of the plan.
    StoreError
        The cache can't be written from here, or the remote can't.
    """
    tally = Tally()
    cache = _open_cache(order.root, order.codec, order.layers)
    pushing = None if order.push is None else _open_pushing(cache, order.push)
    backbone = _backbone_of(order)
    try:
        task = _bind(cache, backbone, order)
    except PART_FAILS as error:
        records = sum(len(spaces) for _, spaces in order.wanted)
        return Outcome(0, 0, (Failure(order.source.path, str(error), records),))
    budget = _at_work[order.name] = Budget(
        _NO_LIMIT if order.max_bytes is None else order.max_bytes, 0
    )
    try:
        units = [Unit(task, order.wanted)]
        compute_units(cache, units, order.batch_size, tally, budget, pushing)
    finally:
        _at_work.pop(order.name, None)
    # the cache stays open for other units, and the worker may be killed before it is closed
    cache.counter.save()
    failures = (*tally.failures, *(pushing.finish() if pushing is not None else ()))
    return Outcome(tally.computed, tally.elsewhere, failures, budget.is_over)


_NO_LIMIT = 1 << 62
_at_work: dict[str, Budget] = {}


def stop_orders(names: Collection[str]) -> None:
    """End orders that this worker is at, soon; what is computed by then is committed."""
    for name in names:
        budget = _at_work.get(name)
        if budget is not None:
            budget.stopped = True


def dask_setup(_: object) -> None:
    """Leave Ctrl-C, which a terminal sends to all at once, to the process that started this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _bind(cache: FeatureCache, backbone: Backbone, order: Order) -> Task:
    features = bind_movie(cache, _open_movie(order.source), backbone, order.specs)
    features.know(order.digests)
    copies = tuple(features.with_draw(draw, origin) for draw, origin in order.copies)
    return Task(copies, order.specs, dict(order.wanted), order.grids)


@lru_cache(maxsize=8)
def _open_cache(root: str, codec: str, layers: tuple[str, ...]) -> FeatureCache:
    return FeatureCache(root, codec=codec, layers=layers, create=False)


@lru_cache(maxsize=8)
def _open_pushing(cache: FeatureCache, url: str) -> Pushing:
    return Pushing(cache, url)


@lru_cache(maxsize=32)
def _open_movie(source: Source) -> Movie:
    return source.open()


_loading = Lock()
_loaded: dict[Recipe, Backbone] = {}


def _backbone_of(order: Order) -> Backbone:
    wanted = order.specs[0].backbone
    if order.recipe is None:
        return StoredGrids(wanted)
    with _loading:
        if order.recipe not in _loaded:
            _loaded[order.recipe] = order.recipe.load()
        backbone = _loaded[order.recipe]
        found = specs_of(backbone)
    if not {spec.backbone for spec in order.specs} <= {*found}:
        raise BackboneError(
            f"{order.recipe.name} is another here than where the plan was made: weights "
            f"{found[0].weights[:8]}, expected {wanted.weights[:8]}, or other options; have "
            "workers use the same weights and the same version of feature-cache"
        )
    return backbone
