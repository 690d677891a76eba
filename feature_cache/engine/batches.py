"""Which of the frames that are read go through the backbone together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .request import Part


def choose_batch(ready: Sequence[Part]) -> list[Part]:
    """Choose the next batch: what is waited for first, and what goes with it.

    Frames under one draw come first, as they are drawn at once; others that go through the network
    with them fill the batch, whatever their draw and movie.
    """
    first = _first_of(ready)
    alike = _alike(ready, first)
    draws = dict.fromkeys([first.draw, *(part.draw for part in alike)])
    rank = {draw: n for n, draw in enumerate(draws)}
    chosen: list[Part] = []
    slices = 0
    for part in sorted(alike, key=lambda part: rank[part.draw]):
        if chosen and slices >= first.request.batch_size:
            break
        chosen.append(part)
        slices += part.depth
    return sorted(chosen, key=lambda part: (rank[part.draw], part.embedding.frame.shape))


def is_full(ready: Sequence[Part]) -> bool:
    """Tell whether there is a whole batch."""
    first = _first_of(ready)
    slices = (part.depth for part in ready if _goes_with(part, first))
    return any(total >= first.request.batch_size for total in accumulate(slices))


def _first_of(ready: Sequence[Part]) -> Part:
    return min(ready, key=lambda part: (part.request.ahead, part.request.number))


def _alike(ready: Sequence[Part], first: Part) -> list[Part]:
    """Give what can be in one batch with a part, in order."""
    alike = [part for part in ready if _goes_with(part, first)]
    return sorted(alike, key=lambda part: (part.request.ahead, part.request.number))


def _goes_with(part: Part, first: Part) -> bool:
    """Tell whether two parts can be in one batch: of one backbone, which sees them in one shape."""
    model = first.request.model
    return part.request.model is model and (model.mixes_sizes or part.shape == first.shape)
