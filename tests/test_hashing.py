from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feature_cache import FrameError
from feature_cache.hashing import (
    canonical_json,
    digest_array,
    digest_json,
    frame_digest,
    mask_digest,
    state_digest,
)

LEAVES = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text()
PLAIN = st.recursive(
    LEAVES | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_canonical_json_is_json_and_keeps_the_value(value):
    import json

    assert json.loads(canonical_json(value)) == value


@given(st.dictionaries(st.text(), st.integers(), min_size=2))
def test_canonical_json_ignores_the_order_of_keys(value):
    backwards = dict(reversed(list(value.items())))
    assert canonical_json(value) == canonical_json(backwards)


def test_equal_values_share_one_form():
    assert canonical_json((1, np.int64(2), np.float32(0.5))) == canonical_json([1, 2, 0.5])
    assert canonical_json(-0.0) == canonical_json(0.0)
    assert canonical_json(1) != canonical_json(1.0)
    assert canonical_json(True) != canonical_json(1)


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"a": [1, {2, 3}]}, r"\$\.a\[1\] is a set"),
        ({"scale": float("nan")}, r"\$\.scale is nan"),
        ([float("inf")], r"\$\[0\] is inf"),
        ({"a": {1: 2}}, r"\$\.a has the key 1"),
        (np.zeros(3), r"\$ is a ndarray"),
        ({"f": len}, r"\$\.f is a builtin_function_or_method"),
        (b"x", r"\$ is a bytes"),
    ],
)
def test_what_cannot_be_hashed_is_a_type_error_that_names_it(value, place):
    with pytest.raises(TypeError, match=place):
        digest_json(value)


def test_golden_digests():
    """A change here means other keys: raise KEY_VERSION."""
    frame = np.arange(12, dtype=np.uint16).reshape(3, 4)
    assert digest_json({"a": [1, 2.5, None, "é"]}).hex() == "04cac3f0ad6be46634834a8b4bd73c44"
    assert frame_digest(frame).hex() == "7ae56a794f38778fd555fb8135c93b4e"
    assert mask_digest(frame).hex() == "8e2ab7b6f683ee122a966a62ca263823"
    assert state_digest([("w", frame), ("b", frame[0])]).hex() == "29056264beea10809f9514c8d1b8861a"


def test_digests_do_not_depend_on_the_process():
    code = (
        "import numpy as np; from feature_cache.hashing import digest_json, frame_digest;"
        "print(digest_json({'b': 1, 'a': [2.5]}).hex(), frame_digest(np.eye(3)).hex())"
    )
    here = f"{digest_json({'a': [2.5], 'b': 1}).hex()} {frame_digest(np.eye(3)).hex()}"
    for seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == here


FRAMES = hnp.arrays(np.uint16, hnp.array_shapes(min_dims=2, max_dims=3, max_side=8))


@given(FRAMES)
def test_a_frame_is_its_pixels(frame):
    digest = frame_digest(frame)
    assert frame_digest(frame.astype(np.float32)) == digest
    assert frame_digest(frame.astype(np.float64)) == digest
    assert frame_digest(frame.astype(">u2")) == digest
    assert frame_digest(np.asfortranarray(frame)) == digest
    padded = np.zeros((*frame.shape[:-1], 2 * frame.shape[-1]), np.uint16)
    padded[..., ::2] = frame
    assert frame_digest(padded[..., ::2]) == digest


@pytest.mark.parametrize("shape", [(1, 1 << 16), (1, (1 << 16) + 1), (3, 300, 257)])
def test_large_frames_and_masks_of_other_dtypes_agree(shape):
    pixels = np.random.default_rng(0).integers(0, 1 << 16, shape).astype(np.uint16)
    views = (pixels.astype(np.float32), pixels.astype(">u2"), np.asfortranarray(pixels))
    assert {frame_digest(view) for view in views} == {frame_digest(pixels)}
    assert {mask_digest(view) for view in (pixels.astype(np.int64), *views[1:])} == {
        mask_digest(pixels)
    }
    changed = pixels.copy()
    changed.flat[-1] ^= 1
    assert frame_digest(changed) != frame_digest(pixels)


@given(FRAMES, st.data())
def test_one_pixel_or_another_shape_is_another_frame(frame, data):
    place = tuple(data.draw(st.integers(0, n - 1)) for n in frame.shape)
    other = frame.copy()
    other[place] ^= 1
    assert frame_digest(other) != frame_digest(frame)
    assert mask_digest(other) != mask_digest(frame)


def test_shape_dtype_and_kind_are_part_of_a_digest():
    flat = np.arange(12, dtype=np.uint16)
    assert frame_digest(flat.reshape(3, 4)) != frame_digest(flat.reshape(4, 3))
    assert digest_array(flat) != digest_array(flat.astype(np.int32))
    assert frame_digest(flat.reshape(3, 4)) != mask_digest(flat.reshape(3, 4))


def test_a_hash_leaves_its_input_alone():
    frame = np.array([[-0.0, 1.5]])
    before = frame.copy()
    assert frame_digest(frame) == frame_digest(np.abs(frame))
    assert np.array_equal(np.signbit(frame), np.signbit(before))


@pytest.mark.parametrize(
    ("frame", "error", "message"),
    [
        (np.full((4, 4), np.nan), FrameError, "16 NaN or infinite pixels of 16"),
        (np.array([[1.0, np.inf]]), FrameError, "1 NaN or infinite"),
        (np.array([[1e300, 0]]), FrameError, "1 NaN or infinite"),
        (np.zeros((4, 4), complex), TypeError, "dtype complex128"),
        (np.zeros(4), FrameError, r"shape \(4,\)"),
        (np.zeros((0, 4)), FrameError, r"shape \(0, 4\)"),
        (np.array([["a"]]), TypeError, "dtype <U1"),
    ],
)
def test_bad_frames(frame, error, message):
    with pytest.raises(error, match=message):
        frame_digest(frame, "frame 3")


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (np.zeros((4, 4)), TypeError, "dtype float64"),
        (np.array([[-1, 2]]), FrameError, "labels from -1 to 2"),
        (np.array([[2**31]]), FrameError, "expected 0 to 2147483647"),
        (np.zeros((2, 2, 2, 2), int), FrameError, "shape"),
    ],
)
def test_bad_masks(mask, error, message):
    with pytest.raises(error, match=message):
        mask_digest(mask)


def test_weights_are_told_apart_by_name_shape_and_value():
    weights = np.arange(6.0)
    digests = {
        state_digest([("a", weights), ("b", weights)]),
        state_digest([("a", weights), ("c", weights)]),
        state_digest([("a", weights), ("b", weights.reshape(2, 3))]),
        state_digest([("a", weights), ("b", weights + 1e-9)]),
        state_digest([("a", weights), ("b", weights.astype(np.float32))]),
    }
    assert len(digests) == 5
    assert state_digest([("b", weights), ("a", weights)]) in digests
    with pytest.raises(ValueError, match="two tensors named 'a'"):
        state_digest([("a", weights), ("a", weights)])
