"""Which of the frames that are read go through the backbone together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .request import Part


def choose_batch(ready: Sequence[Part]) -> list[Part]:
    """Choose the next batch: what is waited for first, and what goes with it.

    Frames under one draw come first, as they are drawn at once; others of the same shape fill the
    batch, whatever their draw and movie.
    """
    first = _first_of(ready)
    alike = sorted(_alike(ready, first), key=lambda part: part.draw != first.draw)
    others = [part for part in alike if part.draw != first.draw]
    same = alike[: len(alike) - len(others)]
    order = {part.draw: n for n, part in reversed(list(enumerate(others)))}
    chosen: list[Part] = []
    slices = 0
    for part in [*same, *sorted(others, key=lambda part: order[part.draw])]:
        if chosen and slices >= first.request.batch_size:
            break
        chosen.append(part)
        slices += part.depth
    return chosen


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
    """Tell whether two parts can be in one batch: of one backbone, seen in one shape."""
    return part.request.model is first.request.model and part.shape == first.shape
