"""What an evaluation found: shares, gains, and a verdict."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..hashing import JSON
from ..units import count_text
from .intervals import Share

RANDOM = "random:0"
"""The weights that every network is compared with."""
_ENOUGH = 0.95
"""A share that leaves little to gain."""


@dataclass(frozen=True, slots=True)
class Setup:
    """Features that are compared: a backbone with its layer and weights, and a pooling.

    Attributes
    ----------
    name : str
        Of the backbone.
    layer, pooling : str
    weights : str or None
        Of one's own, or ``random:<seed>``: what the network brings without having learnt anything.
    width : int
    bytes : float
        Of a frame's record, on average.
    seconds : float or None
        Of embedding a frame, for all poolings at once; None where all was in the cache, and it is
        not known from before.
    """

    name: str
    layer: str
    pooling: str
    weights: str | None
    width: int
    bytes: float
    seconds: float | None

    def __str__(self) -> str:
        """Name it in full."""
        return f"{self.features}, {self.pooling}"

    @property
    def features(self) -> str:
        """Name backbone, layer and weights."""
        own = "random weights" if self.weights == RANDOM else f"weights {self.weights}"
        return f"layer {self.layer} of {self.name}{f' with {own}' if self.weights else ''}"

    @property
    def random(self) -> bool:
        """Whether the weights are random."""
        return self.weights is not None and self.weights.startswith("random:")

    def to_json(self) -> dict[str, JSON]:
        """Give all of it."""
        told = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {**told, "random": self.random}


@dataclass(frozen=True, slots=True)
class Score:
    """What a setup finds at a step.

    Attributes
    ----------
    setup : Setup
    alone : Share
        Of the cells whose parent is found by the features alone.
    combined : Share
        By features with place, or with place and shape, whichever finds more without them.
    gain : Share
        Of `combined` over that; the intervals of all gains of an evaluation hold at once.
    behind : Share
        What the setup that finds most at this step finds more; these hold at once, too.
    """

    setup: Setup
    alone: Share
    combined: Share
    gain: Share
    behind: Share

    def to_json(self) -> dict[str, JSON]:
        """Give the setup and the shares."""
        names = ("alone", "combined", "gain", "behind")
        return {**self.setup.to_json(), **{name: getattr(self, name).to_json() for name in names}}


@dataclass(frozen=True, slots=True)
class Step:
    """What is found so many frames later.

    Attributes
    ----------
    step : int
    cells, frames : int
        With a parent in the frame `step` before; the frames that these are in.
    candidates : float
        Within reach of a cell, on average.
    chance : float
        The share that is found by choosing any candidate.
    position, shape : Share
        By place alone, less the drift of the movie where that finds more; by place and shape.
    shape_gain : Share
        Of the latter over the former.
    scores : tuple of Score
        In the order in which the setups were named.
    """

    step: int
    cells: int
    frames: int
    candidates: float
    chance: float
    position: Share
    shape: Share
    shape_gain: Share
    scores: tuple[Score, ...]

    @property
    def best(self) -> Score | None:
        """The setup that surely gains most, learnt weights before random ones; None for none."""
        sure = [score for score in self.scores if score.gain.is_positive]
        return max(sure, key=lambda s: (not s.setup.random, s.gain.value), default=None)

    @property
    def ranking(self) -> list[Score]:
        """The setups, that which finds most with place and shape first."""
        return sorted(self.scores, key=lambda score: -score.combined.value)

    def describe(self) -> str:
        """Say what is looked at."""
        return (
            f"step {self.step}: {count_text(self.cells, 'cell')} in "
            f"{count_text(self.frames, 'frame')}, {self.candidates:.1f} candidates each "
            f"(chance {self.chance:.3f})"
        )

    @property
    def verdict(self) -> str:
        """Say in a sentence whether features help at this step, and which."""
        best = self.best
        if best is not None:
            return f"{best.setup}: {best.gain.signed()}{self._beside(best)}"
        if self._is_enough(self.position):
            return "position is enough here: features add nothing"
        if self._is_enough(self.shape):
            return "position and shape are enough here: features add nothing"
        if self._is_chance(self.position) and self._is_chance(self.shape):
            return (
                "nothing tells these cells apart: position and shape are at chance, and features "
                "add nothing"
            )
        most = max((score.gain.high for score in self.scores), default=0.0)
        shape = f"; shape adds {self.shape_gain.signed()} to position"
        return (
            f"features add nothing here to position and shape that {self.cells:,} cells in "
            f"{self.frames} frames could show ({most:+.3f} at most)"
            f"{shape if self.shape_gain.is_positive else ''}"
        )

    def _is_enough(self, share: Share) -> bool:
        """Whether a share leaves little to gain, and is surely more than half of all."""
        return share.value >= _ENOUGH and share.low > 0.5

    def _is_chance(self, share: Share) -> bool:
        """Whether a share is at chance, and so surely that it isn't halfway to finding all."""
        return share.low <= self.chance and share.high < (1 + self.chance) / 2

    def _beside(self, best: Score) -> str:
        """Say what random weights of the same network bring, and what is not surely worse."""
        parts = []
        for score in self.scores:
            learnt = replace(score.setup, weights=best.setup.weights, seconds=best.setup.seconds)
            if score.setup.weights == RANDOM != best.setup.weights and learnt == best.setup:
                parts.append(f"random weights: {score.gain.value:+.3f}")
        peers = [
            str(score.setup)
            for score in self.scores
            if score is not best and score.gain.is_positive and not score.behind.is_positive
        ]
        parts += [f"as good: {', and '.join(peers)}"] if peers else []
        return "".join(f"; {part}" for part in parts)

    def to_json(self) -> dict[str, JSON]:
        """Give all of it."""
        return {
            "step": self.step,
            "cells": self.cells,
            "frames": self.frames,
            "candidates": self.candidates,
            "chance": self.chance,
            "position": self.position.to_json(),
            "position_and_shape": self.shape.to_json(),
            "shape_gain": self.shape_gain.to_json(),
            "setups": [score.to_json() for score in self.scores],
            "verdict": self.verdict,
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Which features tell the cells of movies apart.

    Attributes
    ----------
    movies : dict of str to str
        Where the links of each movie come from: ``"man_track.txt"``, with what cells it lacks, or
        ``"overlap"``. Movies of arrays are called by their number.
    steps : tuple of Step
    """

    movies: dict[str, str]
    steps: tuple[Step, ...]

    @property
    def verdict(self) -> str:
        """The verdict of the step at which features surely bring most, or that they bring none."""
        helped = [(step.best.gain.low, step) for step in self.steps if step.best is not None]
        if helped:
            _, step = max(helped, key=lambda one: one[0])
            return f"at step {step.step}, {step.verdict}"
        last = self.steps[-1]
        return f"at step {last.step}, {last.verdict}"

    def to_json(self) -> dict[str, JSON]:
        """Give all of it."""
        steps: list[JSON] = [step.to_json() for step in self.steps]
        return {"movies": dict(self.movies), "steps": steps, "verdict": self.verdict}
