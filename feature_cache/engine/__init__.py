"""The only place that computes: frames in, records out, each once, whoever asks."""

from .batches import choose_batch
from .commit import Budget, Commits, Written
from .cpu import Embedding, Grids
from .engine import MEMORY_BYTES, PATIENCE_SECONDS, Engine
from .frame import Decoded, Frame
from .frame_claims import claim_name
from .interrupt import end_by_exit, finish, say_kept, was_interrupted
from .model import (
    GRID_DTYPE,
    Model,
    Progress,
    compute_each,
    compute_records,
    cut_batches,
    grid_spec,
)
from .outcome import PART_FAILS, Failure, FailureListener, FrameAnswer, Tally
from .request import Answer, Promise, Request, View, Wanted, request_frame

__all__ = [
    "GRID_DTYPE",
    "MEMORY_BYTES",
    "PART_FAILS",
    "PATIENCE_SECONDS",
    "Answer",
    "Budget",
    "Commits",
    "Decoded",
    "Embedding",
    "Engine",
    "Failure",
    "FailureListener",
    "Frame",
    "FrameAnswer",
    "Grids",
    "Model",
    "Progress",
    "Promise",
    "Request",
    "Tally",
    "View",
    "Wanted",
    "Written",
    "choose_batch",
    "claim_name",
    "compute_each",
    "compute_records",
    "cut_batches",
    "end_by_exit",
    "finish",
    "grid_spec",
    "request_frame",
    "say_kept",
    "was_interrupted",
]
