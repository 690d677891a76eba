"""What it costs to see, before each batch, that a backbone is the one that the keys say."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch

from feature_cache import FeatureCache, Movie, load_backbone
from feature_cache.backbones.witness import Witness
from feature_cache.warm import plan_warm, run_warm

from .batches import BATCH
from .harness import OURS, Case, Options, interleave, seconds_each
from .warming import write_frames

WITHOUT = "without the witness"
BARE = f"embedding a batch of {BATCH}"
MODELS = (("efficientnet-lite0", 224), ("timm/vit_tiny_patch16_224", 224))


def run(options: Options) -> list[Case]:
    """Compare warming, in processor time, with and without; and the check with its batch."""
    models = MODELS[:1] if options.quick else MODELS
    return [
        compare_warming(options),
        *(compare_check(name, size, options) for name, size in models),
    ]


def compare_warming(options: Options) -> Case:
    frames = 16 if options.quick else 64
    movie = Movie.open(write_frames(options.folder / "witness" / "01", frames))
    backbone = load_backbone("efficientnet-lite0", "random:0", "cpu")

    def warm(*, witnessed: bool) -> float:
        plan = plan_warm(FeatureCache(tempfile.mkdtemp(dir=options.folder)), [movie], backbone)
        with nullcontext() if witnessed else patch.object(Witness, "check", lambda _: None):
            began = time.process_time()
            run_warm(plan, batch_size=BATCH)
            return time.process_time() - began

    def side(*, witnessed: bool) -> Callable[[], float]:
        return lambda: warm(witnessed=witnessed)

    warm(witnessed=True)
    sides = {WITHOUT: side(witnessed=False), OURS: side(witnessed=True)}
    name = f"warming {frames} frames of 512x512, processor time"
    return Case(name, WITHOUT, interleave(sides, options.rounds))


def compare_check(name: str, size: int, options: Options) -> Case:
    backbone = load_backbone(name, "random:0", "cpu")
    batch, witness = torch.rand(BATCH, size, size), Witness(backbone, (backbone.spec,))

    def side(call: Callable[[], object], budget: float) -> Callable[[], float]:
        call()
        return lambda: seconds_each(lambda _: call(), [None], budget)

    sides = {BARE: side(lambda: backbone.embed(batch), 0.5), OURS: side(witness.check, 0.05)}
    return Case(f"the check of {name}, {size}x{size}", BARE, interleave(sides, options.rounds))
