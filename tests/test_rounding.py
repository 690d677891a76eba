from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feature_cache import FeatureCache, load_backbone
from feature_cache.backbones.base import Backbone
from feature_cache.key import Record
from feature_cache.rounding import difference, records_agree
from feature_cache.spec import SpaceSpec
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

SPEC = SpaceSpec(FakeBackbone().spec)
MODELS = {
    "efficientnet-lite0": ("efficientnet-lite0", None, None),
    "convnext": ("timm/convnext_atto", "random:0", None),
    "dinov2 in bfloat16": ("facebook/dinov2-small", "random:0", "bfloat16"),
}


def record(values, dtype=np.float16, labels=(1,)) -> Record:
    return Record(np.atleast_2d(np.asarray(values, dtype)), np.array(labels, np.int32))


class TestBound:
    @given(hnp.arrays(np.float16, (1, 5), elements=st.floats(1 / 1024, 60_000, width=16)))
    def test_a_step_of_float16_agrees_and_three_do_not(self, values):
        moved, largest = values.copy(), values.argmax()
        agrees = []
        for _ in range(4):
            agrees.append(records_agree(record(values), record(moved), SPEC))
            moved[0, largest] = np.nextafter(moved[0, largest], np.float16(0))
        assert agrees in ([True, True, False, False], [True, True, True, False])

    def test_numbers_are_compared_with_the_largest_of_their_own_vector(self):
        one = Record(np.array([[1, 0.001], [1000, 1]], np.float32), np.array([1, 2], np.int32))
        for row, agrees in (0, False), (1, True):
            features = one.features.copy()
            features[row, 1] += 0.01
            assert records_agree(one, Record(features, one.labels), SPEC) == agrees

    @pytest.mark.parametrize(
        "other",
        [
            record([1, 2], labels=(2,)),
            record([1, 2], np.float32),
            record([1, 2, 3]),
            record([1, np.nan]),
            Record(np.ones((1, 1, 2), np.float16), None),
        ],
    )
    def test_what_is_no_rounding(self, other):
        assert not records_agree(record([1, 2]), other, SPEC)
        assert not records_agree(other, record([1, 2]), SPEC)

    def test_nothing_agrees_with_nothing(self):
        empty = Record(np.empty((0, 4), np.float16), np.empty(0, np.int32))
        assert difference(empty, empty) == 0
        assert difference(record([0, 0]), record([0, 0])) == 0


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def compute(folder: Path, backbone: Backbone, batch_size: int) -> list[Record]:
    frames, masks, _ = make_movie()
    return FeatureCache(folder).get_or_compute(frames, masks, backbone, batch_size=batch_size)


def agree(one: list[Record], other: list[Record], backbone: Backbone) -> list[bool]:
    spec = SpaceSpec(backbone.spec)
    return [records_agree(a, b, spec) for a, b in zip(one, other, strict=True)]


@pytest.mark.parametrize(
    "model",
    ["efficientnet-lite0", "convnext", pytest.param("dinov2 in bfloat16", marks=pytest.mark.slow)],
)
def test_threads_and_batches_agree(tmp_path, threads, model):
    name, weights, dtype = MODELS[model]
    backbone = load_backbone(name, weights, "cpu", dtype)
    runs = []
    for count, batch_size in (2, 6), (1, 6), (2, 1), (1, 4):
        torch.set_num_threads(count)
        runs.append(compute(tmp_path / f"{count}-{batch_size}", backbone, batch_size))
    for records in runs[1:]:
        assert all(agree(runs[0], records, backbone))


def test_another_precision_does_not_agree(tmp_path):
    backbones = [
        load_backbone("efficientnet-lite0", device="cpu", dtype=d) for d in (None, "bfloat16")
    ]
    exact, rough = (compute(tmp_path, backbone, 6) for backbone in backbones)
    assert not any(agree(exact, rough, backbones[0]))


@pytest.mark.slow
def test_processes_agree(tmp_path):
    """One process with two threads, one with one: as a warming with workers has."""
    code = """
import sys, torch
from pathlib import Path
from feature_cache import load_backbone
from test_rounding import compute
torch.set_num_threads(int(sys.argv[2]))
compute(Path(sys.argv[1]), load_backbone("efficientnet-lite0", device="cpu"), 3)
"""
    backbone = load_backbone("efficientnet-lite0", device="cpu")
    frames, masks, _ = make_movie()
    runs = []
    for threads in 1, 2:
        folder = tmp_path / str(threads)
        command = [sys.executable, "-c", code, folder, str(threads)]
        subprocess.run(command, check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
        runs.append(FeatureCache(folder, "r").movie(frames, masks, backbone).get())
    assert all(agree(*runs, backbone))
