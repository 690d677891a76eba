"""Which of the frames that are read go through the backbone together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .request import Part


def choose_batch(ready: Sequence[Part]) -> list[Part]:
    """Choose the next batch of parts that are ordered by rank.

    Frames under the draw of the first come first, as they are drawn at once; others that go through
    the network with them fill the batch, whatever their draw and movie.
    """
    first = ready[0]
    alike = [part for part in ready if _goes_with(part, first)]
    order = {draw: n for n, draw in enumerate(dict.fromkeys(part.draw for part in alike))}
    chosen: list[Part] = []
    slices = 0
    # a stable sort: under one draw, parts stay in the order of their ranks
    for part in sorted(alike, key=lambda part: order[part.draw]):
        # one part at least: a stack may have more slices than a batch
        if chosen and slices >= first.request.batch_size:
            break
        chosen.append(part)
        slices += part.depth
    # frames that are drawn at once lie together: `draw_groups` groups neighbours only
    return sorted(chosen, key=lambda part: (order[part.draw], part.embedding.frame.shape))


def is_full(ready: Sequence[Part]) -> bool:
    """Tell whether there is a whole batch in parts that are ordered by rank."""
    if not ready:
        return False
    first = ready[0]
    slices = (part.depth for part in ready if _goes_with(part, first))
    return any(total >= first.request.batch_size for total in accumulate(slices))


def _goes_with(part: Part, first: Part) -> bool:
    """Tell whether two parts can be in one batch: of one backbone, which sees them in one shape."""
    model = first.request.model
    return part.request.model is model and (model.mixes_sizes or part.shape == first.shape)
