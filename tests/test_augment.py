"""Draws: canonical form, agreement of image, mask and points, reproducible copies."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as tv

from feature_cache.augment import (
    D4,
    IDENTITY,
    OPERATIONS,
    PRESETS,
    Affine,
    Augmentations,
    Blur,
    Brightness,
    Contrast,
    Draw,
    Elastic,
    Entry,
    Noise,
    Operation,
    Policy,
    Scale,
    hflip,
    quarter_turn,
    sampling,
    vflip,
)
from feature_cache.augment.bounded_cache import Kept
from feature_cache.errors import DrawError, FrameError, UnknownNameError
from feature_cache.hashing import canonical_json, digest_array, digest_json, frame_digest

SHAPES = [(1, 1), (1, 6), (2, 2), (5, 5), (6, 4), (7, 10), (12, 9)]
ELEMENTS = [
    "identity",
    "flip_horizontal",
    "flip_vertical",
    "rotate_90",
    "rotate_180",
    "rotate_270",
    "transpose",
    "transverse",
]
EVERY_KIND = [
    D4("rotate_90"),
    D4("transverse"),
    Scale(0.83),
    Scale(1.3),
    Affine(degrees=11.0, shear_degrees=5.0, scale=1.07, shift_y=0.04, shift_x=-0.06),
    Elastic(amplitude=1.5, smoothing=12.0, seed=3),
    Brightness(1.2),
    Contrast(0.77),
    Contrast(1.4),
    Blur(3, 0.8),
    Blur(5, 1.7),
    Noise(0.05, seed=4),
]


def make_frames(shape: tuple[int, int], count: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((count, *shape), generator=generator)


def digests_of(frames: torch.Tensor) -> list[bytes]:
    return [frame_digest(frame.numpy()) for frame in frames]


def make_mask(shape: tuple[int, int], seed: int = 0, dtype: str = "int32") -> np.ndarray:
    return np.random.RandomState(seed).permutation(np.prod(shape)).reshape(shape).astype(dtype)


def apply_one_by_one(operations: Sequence[Operation], frames: torch.Tensor) -> torch.Tensor:
    """Apply operations as they were written, without canonical form."""
    digests = digests_of(frames)
    return reduce(lambda image, operation: operation.apply(image, digests), operations, frames)


def mask_one_by_one(operations: Sequence[Operation], mask: np.ndarray) -> np.ndarray:
    return reduce(lambda labels, operation: operation.apply_mask(labels), operations, mask)


shapes = st.sampled_from(SHAPES)
turns = st.one_of(
    st.just(hflip()),
    st.just(vflip()),
    st.integers(-5, 5).map(quarter_turn),
    st.sampled_from(ELEMENTS).map(D4),
)
identities = st.sampled_from(
    [
        D4("identity"),
        Scale(1.0),
        Brightness(1),
        Contrast(1.0),
        Blur(5, 0.0),
        Blur(5, 0.05),
        Blur(1, 3.0),
        Noise(0.0, 9),
        Affine(),
        Affine(degrees=-0.0),
        Elastic(0.0, 20.0, 1),
    ]
)
pixels = st.one_of(
    st.sampled_from([0.5, 0.81, 1.0, 1.37]).map(Scale),
    st.sampled_from([0.0, 0.7, 1.0, 1.31]).map(Brightness),
    st.sampled_from([0.0, 0.7, 1.0, 1.31]).map(Contrast),
    st.sampled_from([(3, 0.6), (5, 2.0), (7, 0.3), (5, 0.03)]).map(lambda kernel: Blur(*kernel)),
    st.sampled_from([0.0, 0.1]).map(lambda sigma: Noise(sigma, 5)),
    st.sampled_from([0.0, 15.0, 180.0, -180.0]).map(Affine),
    st.sampled_from([0.0, 1.0]).map(lambda amplitude: Elastic(amplitude, 8.0, 2)),
)
words = st.lists(st.one_of(turns, turns, identities, pixels), max_size=7)


# ---------------------------------------------------------------- canonical form


@given(words, shapes, st.integers(0, 3))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_canonical_form_never_changes_pixels_masks_or_points(word, shape, seed):
    draw, frames, mask = Draw.of(*word), make_frames(shape, 2, seed), make_mask(shape, seed)
    expected = apply_one_by_one(word, frames)
    got = draw.apply(frames, digests=digests_of(frames))
    assert torch.equal(got, expected)
    np.testing.assert_array_equal(draw.apply_mask(mask), mask_one_by_one(word, mask))
    assert draw.output_shape(shape) == tuple(expected.shape[1:])
    points, size = np.array([[0.0, 0.0], [shape[0] - 1.0, shape[1] / 3]]), shape
    mapped = points
    for operation in word:
        mapped, size = operation.map_points(mapped, size), operation.output_shape(size)
    np.testing.assert_allclose(draw.map_points(points, shape), mapped, atol=1e-9)


@given(words)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_canonical_form_is_a_fixed_point_and_survives_json_and_pickle(word):
    draw = Draw.of(*word)
    assert Draw(draw.operations).operations == draw.operations
    assert all(operation.simplify() == operation for operation in draw.operations)
    text = canonical_json(draw.to_json())
    again = Draw.from_json(json.loads(text))
    assert again == draw
    assert hash(again) == hash(draw)
    assert canonical_json(again.to_json()) == text
    assert pickle.loads(pickle.dumps(draw)) == draw


@given(st.lists(turns, max_size=8), shapes)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_any_word_of_turns_is_one_of_eight_elements(word, shape):
    draw, frames = Draw.of(*word), make_frames(shape)
    assert len(draw.operations) <= 1
    assert all(isinstance(operation, D4) for operation in draw.operations)
    assert torch.equal(draw.apply(frames), apply_one_by_one(word, frames))


@pytest.mark.parametrize(
    ("element", "by_numpy"),
    [
        ("flip_horizontal", np.fliplr),
        ("flip_vertical", np.flipud),
        ("rotate_90", np.rot90),
        ("rotate_180", lambda image: np.rot90(image, 2)),
        ("rotate_270", lambda image: np.rot90(image, 3)),
        ("transpose", np.transpose),
        ("transverse", lambda image: np.rot90(image.T, 2)),
    ],
)
def test_an_element_does_what_its_name_says(element, by_numpy):
    frames = make_frames((5, 8))
    expected = by_numpy(frames[0].numpy())
    np.testing.assert_array_equal(Draw.of(D4(element)).apply(frames)[0], expected)
    np.testing.assert_array_equal(D4(element).apply_mask(frames[0].numpy()), expected)


def test_the_elements_are_a_group():
    table = {(a, b): D4(a).then(D4(b)).element for a in ELEMENTS for b in ELEMENTS}
    for a in ELEMENTS:
        assert table["identity", a] == table[a, "identity"] == a
        assert sorted(table[a, b] for b in ELEMENTS) == sorted(ELEMENTS)
        for b in ELEMENTS:
            for c in ELEMENTS:
                assert table[table[a, b], c] == table[a, table[b, c]]
    assert table["rotate_90", "flip_vertical"] != table["flip_vertical", "rotate_90"]


def test_what_gives_the_same_pixels_has_the_same_json():
    same = [
        (Draw.of(hflip(), vflip()), Draw.of(quarter_turn(2))),
        (Draw.of(quarter_turn(), quarter_turn(3)), IDENTITY),
        (Draw.of(Brightness(1.1), hflip()), Draw.of(hflip(), Brightness(1.1))),
        (Draw.of(hflip(), Contrast(1.1), Blur(3, 1), hflip()), Draw.of(Contrast(1.1), Blur(3, 1))),
        (Draw.of(Scale(0.9), hflip(), Scale(1), hflip()), Draw.of(Scale(0.9))),
        (Draw.of(Affine(180)), Draw.of(Affine(-180.0))),
        (Draw.of(Affine(180)), Draw.of(quarter_turn(2))),
    ]
    for one, other in same:
        assert one == other
        assert canonical_json(one.to_json()) == canonical_json(other.to_json())


@pytest.mark.parametrize(
    "first",
    [
        Brightness(1.1),
        Contrast(1.1),
        Scale(0.9),
        Blur(3, 1.0),
        Noise(0.1),
        Affine(3.0),
        Elastic(1, 8),
    ],
)
def test_what_is_not_exact_is_not_merged_and_keeps_its_order(first):
    assert Draw.of(first, first).operations == (first, first)
    assert Draw.of(first, Brightness(0.7)) != Draw.of(Brightness(0.7), first)


@pytest.mark.parametrize("barrier", [Scale(0.9), Noise(0.1), Affine(3.0), Elastic(1, 8)])
def test_turns_stay_on_their_side_of_what_they_do_not_commute_with(barrier):
    draw = Draw.of(hflip(), barrier, Brightness(0.9), hflip())
    assert draw.operations == (hflip(), barrier, hflip(), Brightness(0.9))


def test_parameters_are_kept_to_six_digits_as_plain_numbers():
    draw = Draw.of(Brightness(np.float32(1.1)), Scale(0.123456789), Blur(np.int64(3), 1))
    assert draw.to_json() == [
        {"name": "brightness", "factor": 1.1},
        {"name": "scale", "factor": 0.123457},
        {"name": "blur", "kernel": 3, "sigma": 1.0},
    ]
    kinds = [type(value) for item in draw.to_json() for value in item.values()]
    assert kinds == [str, float, str, float, str, int, float]


def test_a_draw_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        IDENTITY.operations = ()
    with pytest.raises(FrozenInstanceError):
        hflip().element = "identity"


# ---------------------------------------------------------------- against other implementations


def test_intensities_agree_with_torchvision():
    frames = make_frames((31, 44), 3)
    image = frames[:, None]
    pairs = [
        (Contrast(1.3), tv.adjust_contrast(image, 1.3)),
        (Contrast(0.2), tv.adjust_contrast(image, 0.2)),
        (Blur(5, 1.3), tv.gaussian_blur(image, [5, 5], [1.3, 1.3])),
        (Blur(3, 0.4), tv.gaussian_blur(image, [3, 3], [0.4, 0.4])),
    ]
    for operation, expected in pairs:
        torch.testing.assert_close(
            Draw.of(operation).apply(frames), expected[:, 0], atol=5e-7, rtol=0
        )
    bright = Draw.of(Brightness(1.4)).apply(frames)
    assert torch.equal(bright, (frames * 1.4).clamp(0, 1))
    assert bright.max() == 1.0


@pytest.mark.parametrize("factor", [0.8, 0.5, 0.9137, 1.6])
@pytest.mark.parametrize("size", [(37, 52), (64, 64), (90, 98), (700, 1100)])
def test_scale_equals_interpolate(factor, size):
    frames, mask = make_frames(size, 2), make_mask(size)
    shape = Scale(factor).output_shape(size)
    expected = interpolate(frames[:, None], size=shape, mode="bilinear", align_corners=False)
    assert torch.equal(Draw.of(Scale(factor)).apply(frames), expected[:, 0].clamp(0, 1))
    labels = torch.from_numpy(mask)[None, None].double()
    nearest = interpolate(labels, size=shape, mode="nearest-exact")[0, 0]
    np.testing.assert_array_equal(Draw.of(Scale(factor)).apply_mask(mask), nearest.numpy())


def test_scaled_masks_equal_interpolate_where_pixels_tie():
    for size in range(5, 130):
        for factor in (0.8, 0.8013, 0.85, 0.8571, 0.9, 0.95):
            line = np.arange(size)[None]
            ours = Scale(factor).apply_mask(np.repeat(line, 2, axis=0))
            values = torch.from_numpy(line)[None, None].double()
            theirs = interpolate(values, size=(1, ours.shape[1]), mode="nearest-exact")
            np.testing.assert_array_equal(ours[0], theirs[0, 0, 0].numpy())


def test_affine_agrees_with_scipy():
    operation = Affine(degrees=17.0, shear_degrees=-8.0, scale=0.9, shift_y=0.07, shift_x=-0.11)
    shape = (41, 30)
    frames, mask = make_frames(shape), make_mask(shape)
    inverse = np.linalg.inv(Draw.of(operation).matrix(shape))
    expected = ndimage.affine_transform(
        frames[0].double().numpy(), inverse, order=1, mode="grid-constant", cval=0.0
    )
    np.testing.assert_allclose(Draw.of(operation).apply(frames)[0], expected, atol=1e-6)
    labels = ndimage.affine_transform(mask, inverse, order=0, mode="grid-constant", cval=0)
    np.testing.assert_array_equal(Draw.of(operation).apply_mask(mask), labels)


def test_affine_of_ninety_degrees_is_a_quarter_turn_of_a_square():
    for size in (8, 9):
        frames, mask = make_frames((size, size)), make_mask((size, size))
        turn, affine = Draw.of(quarter_turn()), Draw.of(Affine(degrees=90.0))
        assert torch.equal(affine.apply(frames), turn.apply(frames))
        np.testing.assert_array_equal(affine.apply_mask(mask), turn.apply_mask(mask))
        np.testing.assert_array_equal(affine.matrix((size, size)), turn.matrix((size, size)))


def test_affine_shifts_by_fractions_of_the_frame():
    draw = Draw.of(Affine(shift_y=0.25, shift_x=-0.5))
    np.testing.assert_allclose(draw.map_points([[1, 9]], (8, 10)), [[3, 4]], atol=1e-12)


@pytest.mark.parametrize(
    ("affine", "mapped"),
    [
        (Affine(shear_degrees=45.0), [7, 8]),
        (Affine(scale=2.0), [9, 7]),
        (Affine(degrees=90.0), [4, 7]),
        (Affine(degrees=90.0, shear_degrees=45.0), [2, 7]),
        (Affine(degrees=90.0, shear_degrees=45.0, scale=2.0, shift_y=0.1), [0.1, 9]),
    ],
)
def test_affine_shears_then_scales_then_turns_then_shifts(affine, mapped):
    """The point is 2 below and 1 right of the centre (5, 5)."""
    found = Draw.of(affine).map_points([[7, 6]], (11, 11))
    np.testing.assert_allclose(found, [mapped], atol=1e-9)


def test_elastic_agrees_with_scipys_sampling():
    shape, operation = (40, 33), Elastic(2.0, 16.0, seed=7)
    frames, mask = make_frames(shape), make_mask(shape)
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    dy, dx = operation._field(shape)(y, x)
    assert 0.3 < np.abs([dy, dx]).max() <= 2.0
    source = [y + dy, x + dx]
    image = frames[0].double().numpy()
    expected = ndimage.map_coordinates(image, source, order=1, mode="grid-constant", cval=0.0)
    np.testing.assert_allclose(Draw.of(operation).apply(frames)[0], expected, atol=1e-6)
    labels = ndimage.map_coordinates(mask, source, order=0, mode="grid-constant", cval=0)
    np.testing.assert_array_equal(Draw.of(operation).apply_mask(mask), labels)


def test_the_elastic_field_is_as_smooth_as_promised():
    field = Elastic(2.0, 16.0, seed=1)._field((200, 200))
    y, x = np.arange(200.0)[:, None], np.arange(200.0)[None, :]
    for displacement in field(y, x):
        steepest = max(np.abs(np.diff(displacement, axis=axis)).max() for axis in (0, 1))
        assert 0.02 < steepest <= 2 * 2.0 / 16.0


# ---------------------------------------------------------------- image, mask and points agree


@given(st.lists(turns, min_size=1, max_size=4), shapes)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_turns_map_image_mask_and_points_exactly(word, shape):
    draw, mask = Draw.of(*word), make_mask(shape)
    points = np.argwhere(mask >= 0)
    mapped = draw.map_points(points, shape)
    index = mapped.astype(int)
    np.testing.assert_array_equal(index, mapped)
    labels = mask[points[:, 0], points[:, 1]]
    np.testing.assert_array_equal(draw.apply_mask(mask)[index[:, 0], index[:, 1]], labels)
    image = draw.apply(torch.from_numpy(mask)[None].float())[0].numpy()
    np.testing.assert_array_equal(image[index[:, 0], index[:, 1]], labels)


def blobs(shape: tuple[int, int], radius: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Draw numbered disks on a jittered lattice; give the mask and the centres (y, x)."""
    random = np.random.RandomState(1)
    lattice = np.mgrid[12 : shape[0] - 10 : 17, 12 : shape[1] - 10 : 17].reshape(2, -1).T
    centers = lattice + random.randint(-2, 3, lattice.shape)
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = np.zeros(shape, np.uint16)
    for label, (cy, cx) in enumerate(centers, start=1):
        mask[(y - cy) ** 2 + (x - cx) ** 2 <= radius**2] = label
    return mask, centers


RESAMPLED = [
    Draw.of(Scale(0.8)),
    Draw.of(Scale(0.937)),
    Draw.of(Scale(1.7)),
    Draw.of(Affine(degrees=9.0, shear_degrees=4.0, scale=0.95, shift_y=0.02, shift_x=0.03)),
    Draw.of(Affine(degrees=-163.0)),
    Draw.of(Elastic(3.0, 24.0, seed=11)),
    Draw.of(quarter_turn(), Scale(0.8), Elastic(2.0, 16.0), hflip(), Affine(degrees=5.0)),
]


@pytest.mark.parametrize("draw", RESAMPLED, ids=lambda draw: canonical_json(draw.to_json())[:60])
@pytest.mark.parametrize("shape", [(97, 120), (110, 83)])
def test_a_points_label_is_the_masks_label_under_the_mapped_point(draw, shape):
    mask, centers = blobs(shape)
    offsets = np.array([[0, 0], [2.5, 0], [-1.7, 2.2], [0.4, -3.0]])
    mapped_mask = draw.apply_mask(mask)
    image = draw.apply(torch.from_numpy((mask > 0).astype(np.float32))[None])[0].numpy()
    assert mapped_mask.shape == image.shape == draw.output_shape(shape)
    assert mapped_mask.dtype == mask.dtype
    seen = 0
    for label, center in enumerate(centers, start=1):
        for y, x in draw.map_points(center + offsets, shape):
            row, column = round(y), round(x)
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                assert mapped_mask[row, column] == label
                assert image[row, column] > 0.95
                seen += 1
    assert seen > 0.8 * len(centers) * len(offsets)


@pytest.mark.parametrize("draw", RESAMPLED, ids=lambda draw: canonical_json(draw.to_json())[:60])
def test_mapped_regions_lie_where_their_pixels_points_go(draw):
    """Centroid and area of a mapped region, against its pixels mapped as points with an area."""
    shape = (140, 120)
    mask, _ = blobs(shape)
    mapped_mask = draw.apply_mask(mask)
    whole = [label for label in range(1, mask.max() + 1) if is_whole(mapped_mask == label)]
    assert len(whole) > 20
    pixels = np.argwhere(mask)
    every_area = np.abs(np.linalg.det(draw.jacobians(pixels, shape)))
    every_point, labels = draw.map_points(pixels, shape), mask[mask > 0]
    errors, growth = [], []
    for label in whole:
        areas, points = every_area[labels == label], every_point[labels == label]
        found = np.argwhere(mapped_mask == label)
        errors.append(found.mean(axis=0) - areas @ points / areas.sum())
        growth.append(len(found) / areas.sum() - 1.0)
    # Nearest-neighbour edges can move a disk's flat sides by half a pixel a resampling; on
    # average they don't.
    assert np.abs(errors).max() < 0.8
    assert np.abs(np.mean(errors, axis=0)).max() < 0.1
    assert np.abs(growth).max() < 0.2
    assert abs(np.mean(growth)) < 0.05


def is_whole(region: np.ndarray) -> bool:
    """Whether a region is there and at least three pixels away from the border."""
    return bool(region.any()) and region.sum() == region[3:-3, 3:-3].sum()


@pytest.mark.parametrize("draw", RESAMPLED, ids=lambda draw: canonical_json(draw.to_json())[:60])
def test_a_spot_of_light_moves_with_its_point(draw):
    shape, centers = (97, 121), np.array([[40.0, 45.3], [55.5, 70.0], [48.2, 60.7]])
    y, x = np.mgrid[: shape[0], : shape[1]]
    spots = [np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * 2.5**2)) for cy, cx in centers]
    mapped = draw.apply(torch.from_numpy(np.array(spots, np.float32))).double().numpy()
    found = [ndimage.center_of_mass(spot) for spot in mapped]
    # Bilinear sampling blurs unevenly, an elastic field isn't linear under the spot.
    atol = 0.25 if draw.matrix(shape) is None else 0.03
    np.testing.assert_allclose(found, draw.map_points(centers, shape), atol=atol)


@pytest.mark.parametrize(
    "draw", RESAMPLED[:5], ids=lambda draw: canonical_json(draw.to_json())[:60]
)
def test_the_matrix_is_the_map_of_points(draw):
    points = np.random.RandomState(0).uniform(-5, 80, (50, 2))
    matrix = draw.matrix((60, 75))
    by_matrix = (np.c_[points, np.ones(50)] @ matrix.T)[:, :2]
    np.testing.assert_allclose(draw.map_points(points, (60, 75)), by_matrix, atol=1e-9)
    jacobians = draw.jacobians(points, (60, 75))
    np.testing.assert_array_equal(jacobians, np.broadcast_to(matrix[:2, :2], (50, 2, 2)))


def test_the_matrix_composes_over_changing_shapes():
    draw, shape = Draw.of(quarter_turn(), Scale(0.8), hflip(), Affine(degrees=5.0)), (20, 31)
    points = np.array([[0.0, 0.0], [19.0, 30.0], [3.5, 7.25]])
    by_matrix = (np.c_[points, np.ones(3)] @ draw.matrix(shape).T)[:, :2]
    np.testing.assert_allclose(draw.map_points(points, shape), by_matrix, atol=1e-9)
    assert draw.output_shape(shape) == (25, 16)


def test_an_elastic_part_has_no_matrix_but_jacobians():
    draw, shape = Draw.of(hflip(), Elastic(3.0, 24.0)), (80, 90)
    assert draw.matrix(shape) is None
    points = np.random.RandomState(0).uniform(10, 70, (30, 2))
    jacobians = draw.jacobians(points, shape)
    step = np.array([0.02, -0.03])
    moved = draw.map_points(points + step, shape) - draw.map_points(points, shape)
    np.testing.assert_allclose(moved, jacobians @ step, atol=2e-3)
    assert (np.linalg.det(jacobians) < -0.3).all()


@pytest.mark.parametrize(("amplitude", "smoothing"), [(0.25, 2.0), (4.0, 32.0), (12.5, 100.0)])
def test_elastic_points_invert_the_field_to_a_billionth_of_a_pixel(amplitude, smoothing):
    shape, operation = (150, 130), Elastic(amplitude, smoothing, seed=5)
    points = np.random.RandomState(0).uniform(-10, 160, (500, 2))
    mapped = Draw.of(operation).map_points(points, shape)
    dy, dx = operation._field(shape)(mapped[:, 0], mapped[:, 1])
    assert np.abs(mapped + np.stack([dy, dx], axis=1) - points).max() < 1e-9
    assert np.abs(mapped - points).max() > 0.2 * amplitude


def test_what_comes_from_outside_is_zero():
    draw, frames = Draw.of(Affine(shift_x=0.5)), make_frames((6, 8)) + 0.1
    assert (draw.apply(frames)[:, :, :4] == 0).all()
    assert (draw.apply(frames)[:, :, 4:] > 0).all()
    mask = draw.apply_mask(np.full((6, 8), 7, np.uint8))
    np.testing.assert_array_equal(mask[0], [0, 0, 0, 0, 7, 7, 7, 7])


# ---------------------------------------------------------------- the same bits as tensors


def sample_plainly(frame: np.ndarray, source: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """Sample between pixels: coordinates in float64, weights and sums in float32."""

    def taps(axis, size):
        low = np.floor(axis)
        for index, weight in ((low, 1.0 - (axis - low)), (low + 1.0, axis - low)):
            weight = np.where((index >= 0) & (index < size), weight, 0.0)
            yield np.clip(index, 0, size - 1).astype(int), weight.astype(np.float32)

    total = np.zeros(frame.shape, np.float32)
    for y, weight_y in taps(source[0], frame.shape[0]):
        for x, weight_x in taps(source[1], frame.shape[1]):
            total += frame[y, x] * (weight_y * weight_x)
    return np.clip(total, 0, 1)


@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (301, 307)])
@pytest.mark.parametrize("seed", range(4))
def test_affine_has_the_bits_of_its_formula_in_numpy(shape, seed):
    """A frame of several strips too."""
    rng = np.random.default_rng(seed)
    operation = Affine(*(rng.uniform(-1, 1, 5) * (180, 50, 0.5, 0.4, 0.4) + (0, 0, 0.9, 0, 0)))
    (a, b), (c, d) = operation.matrix(shape)[:2, :2]
    centre, shift = (
        (np.array(shape) - 1) / 2,
        np.array(shape) * (operation.shift_y, operation.shift_x),
    )
    y = np.arange(shape[0])[:, None] - (centre[0] + shift[0])
    x = np.arange(shape[1])[None] - (centre[1] + shift[1])
    determinant = a * d - b * c
    source = (
        (d * y - b * x) / determinant + centre[0],
        (a * x - c * y) / determinant + centre[1],
    )
    [frame] = make_frames(shape)
    found = Draw.of(operation).apply(frame[None])[0].numpy()
    np.testing.assert_array_equal(found, sample_plainly(frame.numpy(), source))


@pytest.mark.parametrize("shape", [(1, 1), (7, 10), (301, 307)])
def test_elastic_has_the_bits_of_its_field_in_numpy(shape):
    operation = Elastic(2.0, 16.0, seed=7)
    y, x = np.arange(shape[0], dtype=float)[:, None], np.arange(shape[1], dtype=float)[None]
    dy, dx = operation._field(shape)(y, x)
    for one, other in zip(
        (dy, dx), operation._field(shape)(*map(torch.from_numpy, (y, x))), strict=True
    ):
        np.testing.assert_array_equal(one, other)
    [frame] = make_frames(shape)
    found = Draw.of(operation).apply(frame[None])[0].numpy()
    np.testing.assert_array_equal(found, sample_plainly(frame.numpy(), (y + dy, x + dx)))


@given(words, shapes, st.sampled_from(["bool", "uint8", "int16", "uint16", "int32", "uint32"]))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_rows_on_a_device_are_drawn_as_masks_are(word, shape, dtype):
    draw = Draw.of(*word)
    planes = np.stack([make_mask(shape, seed, dtype) for seed in range(2)])
    before, rows = planes.copy(), torch.from_numpy(planes)
    drawn = draw.apply_rows(rows)
    assert drawn.dtype == (torch.uint8 if dtype == "uint8" else torch.int32)
    expected = np.stack([draw.apply_mask(plane) for plane in planes])
    np.testing.assert_array_equal(drawn, expected)
    np.testing.assert_array_equal(planes, before)


def test_where_masks_come_from_is_kept_up_to_so_many_bytes():
    kept, made = Kept(limit=2000), []

    def make(number, size=1000):
        made.append(number)
        return np.full(size, number, np.uint8)

    def get(number):
        array = kept.get(number, lambda: make(number))
        assert (array == number).all()
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 9

    for number in (1, 2, 1, 3, 1, 2):  # 2 was used longest ago when 3 comes
        get(number)
    assert made == [1, 2, 3, 2]
    assert kept.get("large", lambda: make(0, 2001)).nbytes == 2001
    assert kept.get("large", lambda: make(0, 2001)).nbytes == 2001
    get(2)
    assert made == [1, 2, 3, 2, 0, 0]


def test_threads_share_what_is_kept():
    kept = Kept(limit=64 * 40)
    keys = np.random.default_rng(0).integers(0, 60, 4000).tolist()
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda key: kept.get(key, lambda: np.full(64, key, np.uint8))[0], keys)
        assert list(found) == keys


# ---------------------------------------------------------------- batches, noise, inputs


@pytest.mark.parametrize("operation", EVERY_KIND, ids=lambda operation: operation.name)
@pytest.mark.parametrize("shape", [(9, 12), (64, 81)])
def test_a_frames_result_is_the_same_in_every_batch_and_thread_count(operation, shape):
    frames = make_frames(shape, 5)
    digests, draw = digests_of(frames), Draw.of(operation)
    whole = draw.apply(frames, digests=digests)
    for i in range(5):
        alone = draw.apply(frames[i : i + 1], digests=digests[i : i + 1])
        assert torch.equal(whole[i], alone[0])
    backwards = draw.apply(frames.flip(0), digests=digests[::-1])
    assert torch.equal(backwards.flip(0), whole)
    strided = frames.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(draw.apply(strided, digests=digests), whole)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        assert torch.equal(draw.apply(frames, digests=digests), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("operation", EVERY_KIND, ids=lambda operation: operation.name)
def test_strips_in_which_a_cpu_computes_do_not_show(monkeypatch, operation):
    frames = make_frames((37, 29), 2)
    draw, digests = Draw.of(operation), digests_of(frames)
    expected = draw.apply(frames, digests=digests)
    for pixels in 1, 3 * 58, 17 * 58:
        monkeypatch.setattr(sampling, "_STRIP_PIXELS", pixels)
        assert torch.equal(draw.apply(frames, digests=digests), expected)


def test_contrast_does_not_depend_on_threads_and_batch_where_torchvision_does():
    frames = make_frames((701, 1103), 2)
    draw, threads = Draw.of(Contrast(1.13)), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results += [
                draw.apply(frames),
                torch.cat([draw.apply(frame[None]) for frame in frames]),
            ]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("operation", EVERY_KIND, ids=lambda operation: operation.name)
def test_inputs_are_never_changed_and_results_stay_in_range(operation):
    frames, mask = make_frames((21, 34), 2), make_mask((21, 34))
    frames[0, :3] = 1.0
    frames[1, :, :3] = 0.0
    points = np.array([[1.0, 2.0], [20.0, 33.0]])
    frames_before, mask_before, points_before = frames.clone(), mask.copy(), points.copy()
    draw = Draw.of(operation)
    result = draw.apply(frames, digests=digests_of(frames))
    draw.apply_mask(mask)
    draw.map_points(points, (21, 34))
    draw.jacobians(points, (21, 34))
    assert torch.equal(frames, frames_before)
    np.testing.assert_array_equal(mask, mask_before)
    np.testing.assert_array_equal(points, points_before)
    assert 0.0 <= result.min() <= result.max() <= 1.0
    assert result.dtype == torch.float32
    assert result.is_contiguous()


def test_the_identity_changes_nothing():
    frames, mask = make_frames((5, 7)), make_mask((5, 7))
    assert IDENTITY.is_identity
    assert IDENTITY.to_json() == []
    assert not Draw.of(hflip()).is_identity
    assert torch.equal(IDENTITY.apply(frames), frames)
    np.testing.assert_array_equal(IDENTITY.apply_mask(mask), mask)
    np.testing.assert_array_equal(IDENTITY.matrix((5, 7)), np.eye(3))


def test_noise_is_normal_and_a_function_of_seed_and_content():
    frames = torch.full((2, 300, 400), 0.5)
    frames[1] += 1e-3
    draw, digests = Draw.of(Noise(0.05, seed=1)), digests_of(frames)
    noise = (draw.apply(frames, digests=digests) - frames) / 0.05
    assert abs(float(noise.mean())) < 0.01
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)
    assert float((noise**4).mean()) == pytest.approx(3.0, abs=0.1)
    beyond_one_sigma = float((noise.abs() > 1).double().mean())
    assert beyond_one_sigma == pytest.approx(0.3173, abs=0.005)
    neighbours = np.corrcoef(noise[0, :, 1:].flatten(), noise[0, :, :-1].flatten())[0, 1]
    frames_apart = np.corrcoef(noise[0].flatten(), noise[1].flatten())[0, 1]
    assert max(abs(neighbours), abs(frames_apart)) < 0.01
    other_seed = Draw.of(Noise(0.05, seed=2)).apply(frames, digests=digests)
    assert not torch.equal(other_seed, draw.apply(frames, digests=digests))


@pytest.mark.parametrize(
    ("digests", "message"),
    [
        (None, "pass digests="),
        ([b"0" * 16], "1 digests for 2 frames"),
        ([b"0" * 16, b"short"], r"digests\[1\].*16 bytes"),
        (["0" * 16, "0" * 16], r"digests\[0\].*16 bytes"),
    ],
)
def test_noise_without_a_digest_for_each_frame_is_an_error(digests, message):
    draw = Draw.of(hflip(), Noise(0.1))
    assert draw.needs_digests
    assert not Draw.of(hflip(), Noise(0.0)).needs_digests
    with pytest.raises(DrawError, match=message):
        draw.apply(make_frames((4, 5), 2), digests=digests)


# ---------------------------------------------------------------- copies

REPRODUCE = """
import sys
from tests.test_augment import fingerprint
print(fingerprint(int(sys.argv[1]), reverse=True))
"""
COPIES = 20


def fingerprint(copies: int, *, reverse: bool = False) -> str:
    """Digest JSON and pixels of copies 1 to 20 of every preset, drawn one way or the other."""
    frames = make_frames((14, 17), 2)
    digests, parts = digests_of(frames), {}
    order = range(COPIES, 0, -1) if reverse else range(1, COPIES + 1)
    for name in sorted(PRESETS, reverse=reverse):
        augmentations = Augmentations(name, copies=copies, seed=42)
        for k in order:
            draw = augmentations.draw(k)
            pixels = digest_array(draw.apply(frames, digests=digests).numpy()).hex()
            parts[f"{name} {k}"] = [draw.to_json(), pixels]
    return digest_json(parts).hex()


def test_draws_are_the_same_in_another_process_order_and_with_more_copies():
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"PYTHONHASHSEED": "4242", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", REPRODUCE, "1000"]
    there = subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert there.stdout.strip() == fingerprint(COPIES)


def test_copies_are_the_same_in_threads_and_in_any_order():
    augmentations = Augmentations(copies=500, seed=7)
    expected = [augmentations.draw(k).to_json() for k in range(501)]
    with ThreadPoolExecutor(8) as pool:
        backwards = list(pool.map(lambda k: augmentations.draw(k).to_json(), range(500, -1, -1)))
    assert backwards[::-1] == expected
    distinct = {canonical_json(draw) for draw in expected}
    assert len(distinct) > 490


def test_more_copies_leave_the_first_as_they_are():
    few, many = Augmentations(copies=8, seed=3), Augmentations(copies=15, seed=3)
    assert many.draws()[:9] == few.draws()
    assert len(many.draws()) == 16
    assert few.draw(0) == IDENTITY
    assert Augmentations(copies=0).draws() == (IDENTITY,)


def test_copies_depend_on_policy_and_seed():
    one = Augmentations(copies=20, seed=1).draws()[1:]
    assert not set(one) & set(Augmentations(copies=20, seed=2).draws()[1:])
    own = Augmentations(Policy.from_json(PRESETS["default"].to_json()), copies=20, seed=1)
    assert own.draws()[1:] == one
    assert Augmentations("none", copies=9).draws() == (IDENTITY,) * 10
    assert pickle.loads(pickle.dumps(own)) == own
    assert own.to_json() == Augmentations(copies=20, seed=1).to_json()


def test_flips_are_four_variants_however_many_copies():
    draws = set(Augmentations("flips", copies=200, seed=0).draws())
    assert draws == {IDENTITY, Draw.of(hflip()), Draw.of(vflip()), Draw.of(quarter_turn(2))}
    assert len(set(Augmentations("flips", copies=20, seed=0).draws())) <= 4


def test_the_default_policy_draws_what_the_predecessor_drew():
    """Look at the parts before canonical form, with an order, ranges and rates as stated."""
    count = 2000
    draws = Augmentations(copies=count, seed=5).draws()[1:]
    of_kind = {
        kind: [op for draw in draws for op in draw.operations if isinstance(op, kind)]
        for kind in OPERATIONS.values()
    }
    for kind in (Brightness, Contrast):
        factors = [operation.factor for operation in of_kind[kind]]
        assert len(factors) > 0.99 * count
        assert 0.7 <= min(factors) < 0.71
        assert 1.29 < max(factors) <= 1.3
    factors = [operation.factor for operation in of_kind[Scale]]
    assert 0.88 * count < len(factors) < 0.92 * count
    assert 0.8 <= min(factors) < 0.81
    assert 0.99 < max(factors) < 1.0
    assert {blur.kernel for blur in of_kind[Blur]} == {5}
    assert 1.9 < max(blur.sigma for blur in of_kind[Blur]) <= 2.0
    assert not of_kind[Noise] + of_kind[Affine] + of_kind[Elastic]
    turned = sum(
        draw.output_shape((2000, 3000))[0] > draw.output_shape((2000, 3000))[1] for draw in draws
    )
    assert 0.29 * count < turned < 0.38 * count  # half, and of these two in three swap the axes
    kinds = (Brightness, Contrast, Blur)
    first = [next(type(op) for op in draw.operations if isinstance(op, kinds)) for draw in draws]
    assert all(0.28 < first.count(kind) / count < 0.39 for kind in kinds)


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_policy_of_ones_own(shuffle):
    policy = Policy(
        (
            Entry.of("elastic", amplitude=(1, 2), smoothing=(16, 32)),
            Entry.of("affine", degrees=(-10, 10), shift_y=0.1),
            Entry.of("blur", 0.5, kernel=(3, 7), sigma=1),
            Entry.of("noise", sigma=0.1, seed=12),
            Entry.of("brightness", 0.0, factor=2.0),
        ),
        shuffle=shuffle,
    )
    draws = Augmentations(policy, copies=100).draws()[1:]
    operations = [operation for draw in draws for operation in draw.operations]
    affine = [operation for operation in operations if isinstance(operation, Affine)]
    assert {(a.shift_y, a.shift_x, a.scale) for a in affine} == {(0.1, 0.0, 1.0)}
    assert len({a.degrees for a in affine}) > 90
    assert {op.kernel for op in operations if isinstance(op, Blur)} == {3, 5, 7}
    assert {op.seed for op in operations if isinstance(op, Noise)} == {12}
    assert len({op.seed for op in operations if isinstance(op, Elastic)}) == 100
    assert not [op for op in operations if isinstance(op, Brightness)]
    orders = {tuple(type(op) for op in draw.operations) for draw in draws}
    assert (len(orders) > 10) if shuffle else (len(orders) == 2)
    assert Policy.from_json(json.loads(json.dumps(policy.to_json()))) == policy


# ---------------------------------------------------------------- golden values


def test_golden_draws():
    found = {
        name: [draw.to_json() for draw in Augmentations(name, copies=5, seed=0).draws()[1:]]
        for name in PRESETS
    }
    assert canonical_json(found) == canonical_json(json.loads(GOLDEN_DRAWS))


def test_golden_pixels():
    ramp = np.arange(7 * 10, dtype=np.float32).reshape(1, 7, 10) / np.float32(128)
    frames = torch.from_numpy(ramp)
    digests = [b"0123456789abcdef"]
    ours = [operation for operation in EVERY_KIND if not isinstance(operation, Scale)]
    results = [Draw.of(operation).apply(frames, digests=digests) for operation in ours]
    assert [digest_array(result.numpy()).hex() for result in results] == GOLDEN_PIXELS


GOLDEN_DRAWS = """{
  "none": [
    [],
    [],
    [],
    [],
    []
  ],
  "flips": [
    [{"element": "rotate_180", "name": "d4"}],
    [{"element": "rotate_180", "name": "d4"}],
    [],
    [{"element": "rotate_180", "name": "d4"}],
    [{"element": "rotate_180", "name": "d4"}]
  ],
  "geometric": [
    [{"factor": 0.9541, "name": "scale"}, {"element": "flip_horizontal", "name": "d4"}],
    [{"element": "flip_vertical", "name": "d4"}, {"factor": 0.8849, "name": "scale"},
     {"element": "rotate_180", "name": "d4"}],
    [{"element": "transpose", "name": "d4"}, {"factor": 0.8905, "name": "scale"},
     {"element": "flip_vertical", "name": "d4"}],
    [{"factor": 0.9292, "name": "scale"}, {"element": "flip_vertical", "name": "d4"}],
    [{"element": "rotate_180", "name": "d4"}]
  ],
  "intensity": [
    [{"factor": 1.03, "name": "contrast"}, {"factor": 0.9747, "name": "brightness"},
     {"name": "noise", "seed": 1880931765, "sigma": 0.02}],
    [{"factor": 0.9781, "name": "contrast"},
     {"name": "noise", "seed": 3992190849, "sigma": 0.02},
     {"factor": 0.9879, "name": "brightness"}],
    [{"factor": 1.038, "name": "contrast"}, {"factor": 1.05, "name": "brightness"},
     {"name": "noise", "seed": 2031323989, "sigma": 0.02}],
    [{"factor": 0.9926, "name": "brightness"},
     {"name": "noise", "seed": 2540347801, "sigma": 0.02},
     {"factor": 1.004, "name": "contrast"}],
    [{"name": "noise", "seed": 2922983766, "sigma": 0.02},
     {"factor": 0.9871, "name": "brightness"}, {"factor": 0.9941, "name": "contrast"}]
  ],
  "default": [
    [{"factor": 0.966, "name": "brightness"}, {"factor": 0.832, "name": "scale"},
     {"element": "flip_horizontal", "name": "d4"},
     {"kernel": 5, "name": "blur", "sigma": 0.185}, {"factor": 0.8176, "name": "contrast"}],
    [{"element": "flip_vertical", "name": "d4"},
     {"kernel": 5, "name": "blur", "sigma": 1.062}, {"factor": 0.96, "name": "contrast"},
     {"factor": 0.7462, "name": "brightness"}, {"factor": 0.91, "name": "scale"},
     {"element": "rotate_90", "name": "d4"}],
    [{"factor": 1.298, "name": "contrast"},
     {"kernel": 5, "name": "blur", "sigma": 0.07463}, {"factor": 0.9808, "name": "scale"},
     {"element": "transpose", "name": "d4"}, {"factor": 0.7403, "name": "brightness"}],
    [{"element": "transpose", "name": "d4"}, {"factor": 1.261, "name": "brightness"},
     {"factor": 1.09, "name": "contrast"}, {"factor": 0.977, "name": "scale"},
     {"element": "flip_vertical", "name": "d4"},
     {"kernel": 5, "name": "blur", "sigma": 0.85}],
    [{"element": "flip_vertical", "name": "d4"}, {"factor": 0.8094, "name": "brightness"},
     {"factor": 1.127, "name": "contrast"}, {"kernel": 5, "name": "blur", "sigma": 1.528},
     {"factor": 0.9776, "name": "scale"}]
  ]
}"""

GOLDEN_PIXELS = [
    "446c99433f93c4466ada6124ac1f2878",  # d4
    "49a1a6b755e98a00204e5ad27ad08b3f",  # d4
    "92a5c1c45a333bdb1bbd721c3e0d9fa9",  # affine
    "3e6a84404bab1c8cc3d651a7145e9c1c",  # elastic
    "7696cc9713b15798230e55fdecf15d1c",  # brightness
    "99afe53633e0b4a4b09505004a3f40b1",  # contrast
    "cb80844440241fc6360932dccbb2fb34",  # contrast
    "6581fd23d28b6dc49c36d6a02ca7d989",  # blur
    "3cc72d9b81bef59cfa0945c4a404dd6f",  # blur
    "ff68ae6f50332ea56845e1a0c0a7d78b",  # noise
]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Scale(0), r"scale factor is 0: expected a number from 0\.1 to 10"),
        (lambda: Scale(float("nan")), "scale factor is nan"),
        (lambda: Scale("0.9"), "scale factor is '0.9'"),
        (lambda: Scale(True), "scale factor is True"),
        (lambda: Brightness(-0.1), "brightness factor is -0.1: expected a number from 0 to 10"),
        (lambda: Contrast(11), "contrast factor is 11: expected a number from 0 to 10"),
        (lambda: Blur(4, 1.0), "blur kernel is 4: expected an odd integer from 1 to 99"),
        (lambda: Blur(5.0, 1.0), "blur kernel is 5.0: expected an odd integer"),
        (lambda: Blur(5, -1), "blur sigma is -1: expected a number from 0 to 50"),
        (lambda: Noise(-0.1), "noise sigma is -0.1: expected a number from 0 to 1"),
        (lambda: Noise(0.1, -1), "noise seed is -1: expected an integer from 0 to 9223372036"),
        (lambda: Noise(0.1, 1.5), "noise seed is 1.5: expected an integer"),
        (lambda: Affine(degrees=181), "affine degrees is 181: expected a number from -180 to 180"),
        (lambda: Affine(shear_degrees=90), "affine shear_degrees is 90: .* from -60 to 60"),
        (lambda: Affine(scale=0), r"affine scale is 0: expected a number from 0\.1 to 10"),
        (lambda: Affine(shift_x=5), "affine shift_x is 5: expected a number from -1 to 1"),
        (lambda: Elastic(4, 16), r"elastic amplitude is 4\.0 .* 0 to smoothing / 8 = 2\.0"),
        (lambda: Elastic(0.1, 1), "elastic smoothing is 1: expected a number from 2 to 10000"),
        (lambda: D4("rotate_45"), "d4 element is 'rotate_45': expected one of identity, flip"),
        (lambda: D4(["identity"]), "d4 element is"),
        (lambda: quarter_turn(0.5), "quarter_turn turns is 0.5: expected an integer"),
        (lambda: Draw.of("hflip"), "operation 0 of the draw is 'hflip': expected an Operation"),
        (lambda: Draw.from_json({"name": "d4"}), "the draw is .* expected a list"),
        (lambda: Draw.from_json(["d4"]), "operation 0 is 'd4': expected an object"),
        (lambda: Draw.from_json([{"name": "zoom"}]), "name 'zoom': expected one of d4, scale"),
        (lambda: Draw.from_json([{"element": "identity"}]), "operation 0 has the name None"),
        (
            lambda: Draw.from_json([{"name": "blur", "kernel": 3}]),
            r"operation 0 \(blur\) has the parameters kernel: expected kernel, sigma",
        ),
        (
            lambda: Draw.from_json([{"name": "scale", "factor": 0.9, "preserve": True}]),
            r"\(scale\) has the parameters factor, preserve: expected factor",
        ),
        (lambda: Draw.from_json([{"name": "scale", "factor": 0}]), "scale factor is 0"),
        (lambda: Augmentations(copies=-1), "copies is -1: expected an integer from 0"),
        (lambda: Augmentations(copies=2.5), "copies is 2.5: expected an integer from 0"),
        (lambda: Augmentations(seed=-1), "seed is -1: expected an integer from 0"),
        (lambda: Augmentations(seed="0"), "seed is '0': expected an integer"),
        (lambda: Augmentations(policy=None), "policy is None: expected a Policy or one of"),
        (lambda: Augmentations(copies=3).draw(4), "copy is 4: expected an integer from 0 to 3"),
        (lambda: Augmentations(copies=3).draw(-1), "copy is -1: expected an integer from 0 to 3"),
        (lambda: Entry.of("hflip", 1.2), "hflip probability is 1.2: .* from 0 to 1"),
        (lambda: Entry.of("hflip", -0.1), "hflip probability is -0.1: .* from 0 to 1"),
        (lambda: Entry.of("mixup"), "operation is 'mixup': expected one of hflip, vflip"),
        (lambda: Entry.of("scale"), "scale lacks a range of factor: expected a number from 0.1"),
        (lambda: Entry.of("scale", factor=(0, 1)), "policy's scale factor is 0: expected a number"),
        (lambda: Entry.of("scale", factor=(1.0, 0.8)), "from 1.0 to 0.8: expected the lower"),
        (lambda: Entry.of("scale", factor=(0.8, 0.9, 1.0)), "scale factor is"),
        (lambda: Entry.of("scale", size=3), "scale has no parameter 'size': expected factor"),
        (lambda: Entry.of("hflip", size=3), "hflip has no parameter 'size': expected none"),
        (lambda: Entry.of("blur", kernel=(3, 4), sigma=1), "blur kernel is 4: .* odd integer"),
        (
            lambda: Entry.of("elastic", amplitude=(0, 4), smoothing=(16, 40)),
            "elastic amplitude is 4.0 with smoothing 16.0",
        ),
        (lambda: Policy(("hflip",)), "entry 0 of the policy is 'hflip': expected an Entry"),
        (lambda: Policy((), shuffle=1), "shuffle is 1: expected True or False"),
        (lambda: Policy.from_json([]), r"the policy is \[\]: expected an object"),
        (lambda: Policy.from_json({"entry": []}), "field 'entry': expected entries, shuffle"),
        (lambda: Policy.from_json({"entries": [{"p": 1}]}), "field 'p': expected operation"),
        (lambda: Policy.from_json({"entries": [{}]}), "operation is None: expected one of"),
    ],
)
def test_bad_input_names_the_field_and_what_is_allowed(make, message):
    with pytest.raises(DrawError, match=message):
        make()


def test_an_unknown_policy_lists_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"did you mean 'flips'.*none, flips, geometric"):
        Augmentations("flip")


def test_bad_frames_masks_and_points():
    draw = Draw.of(hflip())
    with pytest.raises(TypeError, match=r"float64: expected torch\.float32"):
        draw.apply(make_frames((4, 5)).double())
    with pytest.raises(FrameError, match=r"\(4, 5\): expected \(B, H, W\)"):
        draw.apply(make_frames((4, 5))[0])
    with pytest.raises(TypeError, match="float32: expected integer labels"):
        draw.apply_mask(np.zeros((4, 5), np.float32))
    with pytest.raises(FrameError, match=r"\(2, 4, 5\): expected \(H, W\)"):
        draw.apply_mask(np.zeros((2, 4, 5), np.int32))
    with pytest.raises(TypeError, match=r"float32: expected integers"):
        draw.apply_rows(make_frames((4, 5)))
    with pytest.raises(FrameError, match=r"\(4, 5\): expected \(Z, H, W\)"):
        draw.apply_rows(torch.zeros((4, 5), dtype=torch.int32))
    for points in ([1.0, 2.0], [[1.0, 2.0, 3.0]], [[np.nan, 0.0]]):
        with pytest.raises(FrameError, match=r"expected finite numbers of shape \(N, 2\)"):
            draw.map_points(points, (4, 5))
    for shape in ((4,), (0, 5), (4.0, 5)):
        with pytest.raises(FrameError, match=r"expected \(H, W\), both positive integers"):
            draw.output_shape(shape)
    assert draw.map_points(np.zeros((0, 2)), (4, 5)).shape == (0, 2)
