"""Which features tell these cells apart: an answer before any training.

::

    cells       where cells are, their shapes, and which cell each comes from
    links       the candidates within reach of each
    linker      which of them is the parent, by a weighted sum of likenesses
    intervals   bootstrap over frames
    result      shares, gains, and the verdict
    trial       all of it, for the spaces of a cache
"""

from .intervals import Share
from .result import Evaluation, Score, Setup, Step
from .trial import evaluate

__all__ = ["Evaluation", "Score", "Setup", "Share", "Step", "evaluate"]
