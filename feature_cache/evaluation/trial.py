"""Which features tell the cells of a movie apart, before any training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..backbones import load_backbone
from ..backbones.base import TorchBackbone
from ..backbones.name import join_name, split_name
from ..backbones.several_layers import LayeredBackbone, Layers, specs_of
from ..backbones.tiles import Tiled
from ..cache import FeatureCache, MovieFeatures, open_to_fill, warm_movies
from ..engine import Tally
from ..errors import MovieError
from ..movies import Given, Movie
from ..spec import SpaceSpec
from ..warm.frame_rates import recall_rate, remember_rate
from ..warm.plan import bind_movie
from .cells import Cells, Floats
from .intervals import Bootstrap
from .linker import (
    Terms,
    compare_distances,
    compare_features,
    compare_places,
    compare_shapes,
    find_nearest,
    find_parents,
)
from .links import link_movies
from .result import RANDOM, Evaluation, Score, Setup, Step

if TYPE_CHECKING:
    from ..backbones.base import Backbone


def evaluate(
    movies: Given | Sequence[Movie | str | Path],
    backbones: Sequence[str | Backbone],
    cache: FeatureCache | str | Path,
    *,
    layers: Sequence[str] = (),
    poolings: Sequence[str] = ("mean_patches_exact",),
    steps: Sequence[int] = (1,),
    random_weights: bool = True,
    device: str | None = None,
    dtype: str = "float16",
    batch_size: int | None = 8,
    progress: Callable[[str, int], AbstractContextManager[Any]] | None = None,
) -> Evaluation:
    """Find out which features tell the cells of movies apart, without training a tracker.

    For each cell whose parent is known, the parent is to be found among the cells within reach, so
    many frames before: by place, by place and shape, by features alone, and by features with what
    of place and shape finds most. A linear linker is fitted on one half of the time and tested on
    the other, both ways. Whatever is embedded is in the cache afterwards.

    Parameters
    ----------
    movies : movie, path, or sequence of these
        With masks. Links come from man_track.txt beside the masks; where there is none, cells that
        overlap most in consecutive frames are linked.
    backbones : sequence of str or Backbone
        Names, with options behind them if need be.
    cache : FeatureCache or path
    layers : sequence of str
        Each backbone that is named is compared at each of these, in place of its own.
    poolings : sequence of str
    steps : sequence of int
        How many frames lie between a cell and its candidates.
    random_weights : bool
        Also compare each network that is named with itself with random weights.
    device : str, optional
    dtype : str
        Storage dtype.
    batch_size : int or None
        As `MovieFeatures.compute`.
    progress : callable, optional
        Called with each backbone's name and the number of its records; gives a context whose
        ``update(n)`` counts them.

    Raises
    ------
    ValueError
        No movie, backbone, pooling or step; a step below 1.
    MovieError
        A movie has no masks or no cells; there are too few links; some movies are flat, others not.
    BackboneError, UnknownNameError, FrameError, StoreError
        As `FeatureCache.get_or_compute`.
    """
    given = [movies] if isinstance(movies, Movie | str | Path) else movies
    _check_given(given, backbones, poolings, steps)
    arms = [arm for one in backbones for arm in _make_arms(one, layers, random_weights, device)]
    store = cache if isinstance(cache, FeatureCache) else open_to_fill(cache)
    opened = [Movie.of(movie) for movie in given]
    cells = [Cells.of(movie) for movie in opened]
    if len({one.places.shape[1] for one in cells}) != 1:
        raise MovieError(f"{len(cells)} movies, some of stacks, some flat: evaluate them apart")
    trials = [_Trial(cells, step) for step in dict.fromkeys(steps)]
    setups: dict[SpaceSpec, Setup] = {}
    while arms:
        arm = arms.pop(0)  # its network is let go with it
        specs = [
            SpaceSpec(layer, pooling, dtype)
            for layer in specs_of(arm.backbone)
            for pooling in dict.fromkeys(poolings)
        ]
        views = _open_views(store, opened, arm.backbone, [s for s in specs if s not in setups])
        if not views:
            continue
        total = sum(len(view) for movie in views for view in movie)
        with nullcontext() if progress is None else progress(arm.name, total) as bar:
            seconds = _warm(arm.backbone, views, batch_size, getattr(bar, "update", None))
        for space in zip(*views, strict=True):
            records = [view.get_or_compute(batch_size=batch_size) for view in space]
            spec, stored = space[0].spec, [record for movie in records for record in movie]
            setups[spec] = Setup(
                name=arm.name,
                layer=spec.backbone.layer,
                pooling=str(spec.pooling),
                weights=arm.weights,
                width=spec.backbone.width,
                bytes=sum(record.features.nbytes for record in stored) / len(stored),
                seconds=seconds,
            )
            features = np.concatenate(
                [one.select(found) for one, found in zip(cells, records, strict=True)]
            )
            for trial in trials:
                trial.add(features)
        del arm, views, space
    found = tuple(trial.finish(list(setups.values()), len(trials)) for trial in trials)
    truths: dict[str, str] = {}
    for number, one in enumerate(cells, start=1):
        name = one.movie or f"movie {number}"
        truths[f"{name} ({number})" if name in truths else name] = one.truth  # as of two channels
    return Evaluation(truths, found)


def _check_given(*given: Sequence[Any]) -> None:
    for what, values in zip(("movie", "backbone", "pooling", "step"), given, strict=True):
        if not len(values) or isinstance(values, str):
            raise ValueError(f"{what}s are {values!r}: expected a list of one or more")
    low = [step for step in given[-1] if step < 1]
    if low:
        raise ValueError(f"step {low[0]}: expected 1 or more, the frames that lie between")


def _open_views(
    cache: FeatureCache,
    movies: Sequence[Movie],
    backbone: Backbone | Layers,
    specs: Sequence[SpaceSpec],
) -> list[list[MovieFeatures]]:
    """Bind each movie to each space, where there is any."""
    if not specs:
        return []
    firsts = [bind_movie(cache, movie, backbone, specs) for movie in movies]
    return [[first.in_space(spec) for spec in specs] for first in firsts]


@dataclass(frozen=True, slots=True, eq=False)
class _Arm:
    """A backbone to compare, or several layers of one; what it is called, but for its layers."""

    backbone: Backbone | Layers
    name: str
    weights: str | None


def _make_arms(
    one: str | Backbone, layers: Sequence[str], twins: bool, device: str | None
) -> Iterator[_Arm]:
    """Make a backbone; its twin with random weights next.

    No weights are loaded yet, so that all mistakes in names are found before anything is embedded.
    """
    if not isinstance(one, str):
        yield _Arm(one, one.spec.name, _weights_of(one))
        return
    name, told = split_name(one)
    weights = told.pop("weights", None)
    wanted = layers or told.get("layer", "").split(",")
    shown = join_name(name, {option: told[option] for option in told if option != "layer"})
    is_random = weights is not None and weights.startswith("random:")
    for chosen in (weights, RANDOM):
        made = [
            load_backbone(
                join_name(name, told | ({"layer": layer} if layer else {})), chosen, device
            )
            for layer in wanted
        ]
        for backbone in (
            [Layers(made)]
            if made[1:] and all(isinstance(one, LayeredBackbone) for one in made)
            else made
        ):
            yield _Arm(backbone, shown, chosen)
        if is_random or not (twins and all(map(_has_weights, made))):
            return


def _weights_of(backbone: Backbone) -> str | None:
    weights = getattr(backbone, "weights", None)
    return weights if isinstance(weights, str) else None


def _has_weights(backbone: Backbone) -> bool:
    """Tell whether a backbone is a network of ours, which can have random weights."""
    inner = backbone.backbone if isinstance(backbone, Tiled) else backbone
    return isinstance(inner, TorchBackbone)


def _warm(
    backbone: Backbone | Layers,
    views: Sequence[Sequence[MovieFeatures]],
    batch_size: int | None,
    progress: Callable[[int], Any] | None,
) -> float | None:
    """Compute what is missing; give the seconds a frame, of this run or of the last."""
    frames = sum(map(_count_missing, views))
    started = time.perf_counter()
    warm_movies(views, batch_size=batch_size, progress=progress)
    seconds = time.perf_counter() - started
    if frames:
        remember_rate(backbone, frames, seconds)
        return seconds / frames
    rate = recall_rate(backbone)
    return None if rate is None else 1 / rate


def _count_missing(views: Sequence[MovieFeatures]) -> int:
    """Count the frames of a movie that a space lacks; frames that fail are warming's to name."""
    good = views[0].hash_frames(range(len(views[0])), Tally())
    there = [view.contains(good) for view in views]
    return int((~np.all(there, axis=0)).sum())


class _Trial:
    """One step: what is found by place and shape, and by each space of features."""

    def __init__(self, cells: Sequence[Cells], step: int) -> None:
        self.step, self.links = step, link_movies(cells, step)
        shapes = compare_shapes(np.concatenate([one.shapes for one in cells]))
        by_shape: list[Terms] = [compare_places, shapes]
        nearest, place = find_nearest(self.links), find_parents(self.links, [compare_places])
        self._place = max(nearest, place, key=np.mean)
        self._shape = find_parents(self.links, by_shape)
        choices: list[tuple[Floats, list[Terms]]] = [
            (nearest, [compare_distances]), (place, [compare_places]), (self._shape, by_shape)
        ]  # fmt: skip
        # What one half teaches of drift or of shape may mislead in the other.
        self._base, self._known = max(choices, key=lambda choice: choice[0].mean())
        self._found: list[tuple[Floats, Floats]] = []

    def add(self, features: NDArray[np.float32]) -> None:
        """Link by features (N, C) of all cells."""
        terms: Terms = compare_features(features)
        alone = find_parents(self.links, [terms])
        combined = find_parents(self.links, [*self._known, terms])
        self._found.append((alone, combined))

    def finish(self, setups: Sequence[Setup], steps: int) -> Step:
        """Say what was found, given the setups in the order in which their features came.

        Intervals of gains hold at once, for so many steps as well.
        """
        links, frames = self.links, Bootstrap(self.links.units)
        best = max((combined for _, combined in self._found), key=np.mean)
        gains = [combined - self._base for _, combined in self._found]
        comparisons = frames.count_independent(gains) * steps
        return Step(
            step=self.step,
            cells=len(links),
            frames=len(np.unique(links.units)),
            candidates=len(links.earlier) / len(links),
            chance=links.chance,
            position=frames.share(self._place),
            shape=frames.share(self._shape),
            shape_gain=frames.difference(self._shape - self._place),
            scores=tuple(
                Score(
                    setup=setup,
                    alone=frames.share(alone),
                    combined=frames.share(combined),
                    gain=frames.difference(gain, comparisons),
                    behind=frames.difference(best - combined, comparisons),
                )
                for setup, gain, (alone, combined) in zip(setups, gains, self._found, strict=True)
            ),
        )
