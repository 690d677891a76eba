"""An evaluation as one page of HTML: a plot and a table a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .page import load_style, load_templates

if TYPE_CHECKING:
    from ..evaluation import Evaluation, Share, Step

WIDTH, ROW, _LEFT, _RIGHT = 720, 26, 12, 12
"""Of a plot, in its own units."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of a plot, and of the table below it."""

    name: str
    share: Share
    alone: Share | None
    gain: Share | None
    seconds: float | None = None
    bytes: int | None = None


def _rows_of(step: Step) -> Iterator[_Row]:
    yield _Row("position", step.position, None, None)
    yield _Row("position and shape", step.shape, None, step.shape_gain)
    for score in step.ranking:
        setup = score.setup
        yield _Row(
            str(setup), score.combined, score.alone, score.gain, setup.seconds, round(setup.bytes)
        )


def _place(share: float) -> float:
    """Say where a share is on the plot's axis."""
    inside = min(1.0, max(0.0, share))
    return round(_LEFT + inside * (WIDTH - _LEFT - _RIGHT), 1)


def render_evaluation(evaluation: Evaluation) -> str:
    """Write an evaluation as HTML. It loads nothing, and names are never taken as markup.

    Raises
    ------
    MissingDependencyError
        The extra ``report`` is not installed.
    """
    return (
        load_templates()
        .get_template("evaluation.html")
        .render(
            evaluation=evaluation,
            steps=[(step, list(_rows_of(step))) for step in evaluation.steps],
            place=_place,
            width=WIDTH,
            row_height=ROW,
            style=load_style(),
        )
    )
