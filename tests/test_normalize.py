"""Normalisation: numpy's percentiles to the bit, on the CPU and as tensors."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from feature_cache import FrameError
from feature_cache.hashing import frame_pixels
from feature_cache.normalize import ConstantFrameWarning, normalize, normalize_on
from feature_cache.spec import Normalization

DTYPES = (
    *("bool", "uint8", "int8", "uint16", "int16", ">u2", ">i2", "uint32", "int32", "uint64"),
    *("int64", "float16", "float32", "float64"),
)


def by_numpy(frame: np.ndarray, normalization: Normalization) -> np.ndarray | None:
    """Normalise with numpy.percentile; None where the pixels are too far apart."""
    pixels = frame_pixels(frame)
    if normalization.name == "none":
        return pixels
    with np.errstate(over="ignore", invalid="ignore"):
        percentiles = np.percentile(pixels, (normalization.low, normalization.high))
        low, high = percentiles.astype(np.float32)
        if not high > low:
            low, high = pixels.min(), pixels.max()
        if not high > low:
            return np.zeros_like(pixels)
        if not np.isfinite(high - low):
            return None
        return np.clip((pixels - low) / (high - low), np.float32(0), np.float32(1))


@st.composite
def frames(draw):
    """Frames of every dtype: of any values, of few, of large ones, and constant."""
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, min_side=1, max_side=9))
    kind = draw(st.sampled_from(["any", "few", "constant", "large", "whole"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    limits = (0, 1) if dtype.kind == "b" else (0, 200)
    if dtype.kind == "i":
        limits = -100, 100
    if kind == "any" and dtype.kind == "f":
        values = draw(st.floats(1e-3, 1e4)) * rng.standard_normal(shape)
    elif kind == "any" and dtype.kind in "ui":
        info = np.iinfo(dtype)
        values = rng.integers(info.min, info.max, shape, dtype.newbyteorder("="), endpoint=True)
    elif kind == "few":
        values = np.where(rng.random(shape) < 0.01, limits[1], limits[0])
    elif kind == "constant":
        values = np.full(shape, draw(st.integers(*limits)))
    elif kind == "large" and dtype.itemsize >= 4:
        values = rng.choice([1, 2**24 + 1, 2**30], shape) * (
            3e38 / 2**30 if dtype.kind == "f" else 1
        )
    else:
        values = rng.integers(*limits, shape, endpoint=True)
    return values.astype(dtype)


normalizations = st.one_of(
    st.just(Normalization()),
    st.just(Normalization("none")),
    st.just(Normalization(low=0, high=100)),
    st.tuples(st.floats(0, 100), st.floats(0, 100))
    .filter(lambda pair: pair[0] != pair[1])
    .map(lambda pair: Normalization("percentile", min(pair), max(pair))),
)


@settings(max_examples=200, deadline=None)
@given(frame=frames(), normalization=normalizations)
def test_equals_numpys_percentiles_to_the_bit(frame, normalization):
    expected, before = by_numpy(frame, normalization), frame.copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantFrameWarning)
        if expected is None:
            with pytest.raises(FrameError, match="too far for float32"):
                normalize(frame, normalization)
        else:
            for same in frame, frame_pixels(frame), np.asfortranarray(frame):
                found = normalize(same, normalization)
                assert found.dtype == np.float32
                np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(frame, before)


@settings(max_examples=200, deadline=None)
@given(frame=frames(), other=st.integers(0, 3), normalization=normalizations)
def test_tensors_have_the_same_bits_each_frame_by_itself(frame, other, normalization):
    batch = np.stack(
        [frame, np.roll(frame, other), frame[::-1], np.full_like(frame, frame.flat[0])]
    )
    batch = batch.astype(batch.dtype.newbyteorder("="))
    found = normalize_on(torch.from_numpy(batch), normalization)
    assert found.pixels.shape == batch.shape
    assert found.pixels.dtype == torch.float32
    for i, one in enumerate(batch):
        expected = by_numpy(one, normalization)
        if expected is not None:
            np.testing.assert_array_equal(found.pixels[i], expected)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "float32", "float64", "int64"])
@pytest.mark.parametrize("shape", [(333, 517), (3, 500, 401)])
def test_larger_frames_have_numpys_bits_too(dtype, shape):
    rng = np.random.default_rng(1)
    frame = (rng.gamma(2.0, 40.0, shape) % 250).astype(dtype)
    expected = by_numpy(frame, Normalization())
    np.testing.assert_array_equal(normalize(frame, Normalization()), expected)
    found = normalize_on(torch.from_numpy(frame[None]), Normalization())
    found.check(["the frame"])
    np.testing.assert_array_equal(found.pixels[0], expected)


def test_whole_numbers_with_one_other_among_them():
    """Whether a frame of floats can be counted is not told from some of its pixels."""
    frame = np.arange(40_000, dtype=np.float32).reshape(200, 200)
    frame[0, 1:4] = 399.25, 399.5, 399.75
    expected = by_numpy(frame, Normalization())
    np.testing.assert_array_equal(normalize(frame, Normalization()), expected)
    assert not np.array_equal(expected, by_numpy(np.floor(frame), Normalization()))


def test_is_clipped_between_the_percentiles():
    frame = np.arange(10_000, dtype=np.float32).reshape(100, 100)
    low, high = np.percentile(frame, (1, 99.8))
    expected = np.clip((frame - low) / (high - low), 0, 1)
    np.testing.assert_allclose(normalize(frame, Normalization()), expected, atol=1e-6)


@given(hnp.arrays(np.uint16, (8, 8)))
def test_never_changes_its_input_and_stays_in_range(frame):
    pixels = frame.astype(np.float32)
    before = pixels.copy()
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantFrameWarning)
        result = normalize(pixels, Normalization())
    assert np.array_equal(pixels, before)
    assert not np.shares_memory(result, pixels)
    assert result.dtype == np.float32
    assert result.min() >= 0
    assert result.max() <= 1


@pytest.mark.parametrize("value", [0, 7, 65535])
def test_a_constant_frame_is_zeros_with_a_warning(value):
    frame = np.full((4, 4), value, np.float32)
    with pytest.warns(ConstantFrameWarning, match="frame 3 is constant"):
        assert not normalize(frame, Normalization(), "frame 3").any()


@pytest.mark.filterwarnings("error")
def test_few_bright_cells_on_black_are_seen():
    """Both percentiles are 0: the features were those of a black frame."""
    frame = np.zeros((100, 100), np.float32)
    frame[40:43, 50:53] = [[300, 400, 600]] * 3
    expected = frame / np.float32(600)
    assert np.array_equal(normalize(frame, Normalization()), expected)
    assert np.array_equal(normalize(frame - 5, Normalization()), expected)


def test_a_range_beyond_float32_is_an_error():
    frame = np.linspace(-3e38, 3e38, 64, dtype=np.float64).astype(np.float32).reshape(8, 8)
    with pytest.raises(FrameError, match=r"frame 3 goes from .* too far for float32"):
        normalize(frame, Normalization(), "frame 3")


def test_none_leaves_the_pixels():
    frame = np.array([[1.0, 300.0]], np.float32)
    assert np.array_equal(normalize(frame, Normalization("none")), frame)


def test_tensors_say_which_frame_is_constant_and_which_too_wide():
    frames = torch.arange(48, dtype=torch.float32).reshape(3, 4, 4)
    frames[1] = 7
    with pytest.warns(ConstantFrameWarning, match="frame 8 is constant"):
        normalize_on(frames, Normalization()).check(["frame 7", "frame 8", "frame 9"])
    frames[2] = torch.linspace(-3e38, 3e38, 16).reshape(4, 4)
    frames[1, 0, 0] = 8
    with pytest.raises(FrameError, match=r"frame 9 goes from .* too far for float32"):
        normalize_on(frames, Normalization()).check(["frame 7", "frame 8", "frame 9"])
    frames[2, 0, 0] = torch.nan
    with pytest.raises(FrameError, match=r"frame 9 goes from .* to nan"):
        normalize_on(frames, Normalization(low=0, high=100)).check(
            ["frame 7", "frame 8", "frame 9"]
        )
    normalize_on(frames, Normalization("none")).check(["frame 7", "frame 8", "frame 9"])
