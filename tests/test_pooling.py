from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from feature_cache import IDENTITY, POOLINGS, Draw, FrameError, UnknownNameError, pooling
from feature_cache.augment import Affine, Brightness, Elastic, Scale, hflip, quarter_turn, vflip
from feature_cache.pooling import pool, pool_frame
from feature_cache.regions import Regions

AGGREGATE = {"mean": np.mean, "max": np.max, "median": np.median}


def brute_force(grid, mask, mode):
    """Pool region by region, pixel by pixel, as the docstring says."""
    (height, width), (gh, gw) = mask.shape, grid.shape[:2]
    row = [min(int(y * (gh / height)), gh - 1) for y in range(height)]
    column = [min(int(x * (gw / width)), gw - 1) for x in range(width)]
    unit = grid.astype(np.float64)
    unit = unit / (np.linalg.norm(unit, axis=-1, keepdims=True) + 1e-8)
    pooled = []
    for label in np.unique(mask[mask > 0]):
        ys, xs = np.nonzero(mask == label)
        if mode == "nearest_patch":
            cy, cx = ys.mean(), xs.mean()
            cells = [(min(int(cy * (gh / height)), gh - 1), min(int(cx * (gw / width)), gw - 1))]
        elif mode.endswith("_exact"):
            cells = [(row[y], column[x]) for y, x in zip(ys, xs, strict=True)]
        else:
            rows = range(row[ys.min()], row[ys.max()] + 1)
            columns = range(column[xs.min()], column[xs.max()] + 1)
            cells = [(r, c) for r in rows for c in columns]
        vectors = np.stack([unit[cell] for cell in cells])
        aggregate = AGGREGATE.get(mode.split("_")[0], np.mean)
        pooled.append(aggregate(vectors, axis=0))
    return np.stack(pooled) if pooled else np.zeros((0, grid.shape[-1]))


@st.composite
def cases(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    gh, gw = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    grid = rng.normal(size=(gh, gw, draw(st.integers(1, 5)))).astype(np.float32)
    labels = rng.choice([0, 0, 1, 2, 7, 300, 2**31 - 1], (height, width))
    blocks = draw(st.integers(1, 6))
    mask = np.kron(labels, np.ones((blocks, blocks), np.int64))[:height, :width]
    return grid, mask


@pytest.mark.parametrize("mode", POOLINGS)
@settings(max_examples=60)
@given(case=cases())
def test_equals_brute_force(mode, case):
    grid, mask = case
    expected = brute_force(grid, mask, mode)
    found = pool(grid, mask, mode)
    assert found.dtype == np.float32
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("mode", POOLINGS)
def test_rows_and_columns_are_not_swapped(mode):
    """Each cell has its own direction; a region in one cell takes exactly that cell."""
    gh, gw = 3, 7
    grid = np.eye(gh * gw, dtype=np.float32).reshape(gh, gw, -1)
    mask = np.zeros((gh * 10, gw * 10), np.int32)
    mask[22:28, 41:49] = 1  # row 2, column 4
    [vector] = pool(grid, mask, mode)
    assert vector.argmax() == 2 * gw + 4
    assert vector.max() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("shape", [(700, 1100), (33, 47), (5, 3)])
def test_frames_that_are_no_multiple_of_the_grid(mode, shape):
    """The last pixels lie in the last cells (H // grid runs off, or falls short)."""
    grid = np.random.default_rng(0).normal(size=(16, 24, 4)).astype(np.float32)
    mask = np.zeros(shape, np.int32)
    mask[-1, -1] = 9
    expected = grid[int((shape[0] - 1) * 16 / shape[0]), int((shape[1] - 1) * 24 / shape[1])]
    [vector] = pool(grid, mask, mode)
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-6)


@pytest.mark.parametrize("mode", POOLINGS)
def test_empty_mask(mode):
    assert pool(np.ones((2, 2, 3), np.float32), np.zeros((8, 8), int), mode).shape == (0, 3)


@pytest.mark.parametrize("mode", POOLINGS)
def test_a_region_without_a_pixel_takes_the_cell_of_its_centroid(mode):
    grid = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    mask = np.zeros((16, 16), int)
    mask[:4, :4] = 1
    labels = np.array([1, 5, 6], np.int32)
    centroids = np.array([[1.5, 1.5], [9.0, 14.0], [-50.0, 99.0]])
    pooled = pool(grid, mask, mode, labels=labels, centroids=centroids)
    for vector, cell in zip(pooled, [(0, 0), (2, 3), (0, 3)], strict=True):
        np.testing.assert_allclose(vector, grid[cell] / np.linalg.norm(grid[cell]), atol=1e-6)


def test_labels_choose_and_leave_out():
    grid = np.random.default_rng(0).normal(size=(4, 4, 3)).astype(np.float32)
    mask = np.repeat(np.arange(4), 4).reshape(4, 4)
    every = pool(grid, mask, "mean_patches_exact")
    chosen = pool(grid, mask, "mean_patches_exact", labels=np.array([1, 3], np.int32))
    np.testing.assert_array_equal(chosen, every[[0, 2]])


@pytest.mark.parametrize("mode", ["mean_patches_exact", "max_patches_exact", "nearest_patch"])
def test_a_stack_pools_over_all_slices(mode):
    rng = np.random.default_rng(0)
    grid = rng.normal(size=(3, 4, 5, 2)).astype(np.float32)
    mask = np.zeros((3, 8, 10), int)
    mask[0, :4, :4], mask[1:, 4:, 6:] = 1, 2
    unit = grid / np.linalg.norm(grid, axis=-1, keepdims=True)
    pooled = pool(grid, mask, mode)
    if mode == "nearest_patch":
        expected = [unit[0, 0, 0], unit[1, 2, 3]]
    else:
        cells = [unit[0, :2, :2].reshape(-1, 2), unit[1:, 2:, 3:].reshape(-1, 2)]
        expected = [AGGREGATE[mode.split("_")[0]](c, axis=0) for c in cells]
    np.testing.assert_allclose(pooled, expected, atol=1e-6)


@pytest.mark.parametrize("mode", POOLINGS)
@pytest.mark.parametrize("scale", [1e20, 3e37, 1e-30, 1e-43])
def test_huge_and_tiny_vectors_have_length_1_too(mode, scale):
    rng = np.random.default_rng(3)
    directions = rng.integers(1, 9, (6, 6, 5)).astype(np.float32)
    grid = (directions * np.float32(scale)).astype(np.float32)
    grid[0, 0] = directions[0, 0]
    mask = np.repeat(np.arange(1, 10).reshape(3, 3), 8, 0).repeat(8, 1)
    exact = grid.astype(np.float64)
    exact /= np.linalg.norm(exact, axis=-1, keepdims=True)
    expected = pool(exact, mask, mode)
    np.testing.assert_allclose(pool(grid, mask, mode), expected, rtol=1e-5)


def test_a_zero_vector_stays_one():
    assert not pool(
        np.zeros((2, 2, 3), np.float32), np.ones((4, 4), int), "mean_patches_exact"
    ).any()


DRAWS = [
    IDENTITY,
    Draw.of(hflip()),
    Draw.of(quarter_turn()),
    Draw.of(Scale(0.31), vflip()),
    Draw.of(Scale(1.7)),
    Draw.of(Affine(degrees=30, shear_degrees=5, scale=0.5, shift_y=0.1, shift_x=0.3)),
    Draw.of(quarter_turn(3), Elastic(1.0, 8.0, 3), Scale(0.8), Affine(scale=1.4), Brightness(1.2)),
]


def plain(grid, mask, draw, mode):
    """Pool a drawn frame one region at a time, in the arithmetic that is promised."""
    grid, mask = (grid[None], mask[None]) if mask.ndim == 2 else (grid, mask)
    drawn = np.stack([draw.apply_mask(plane) for plane in mask])
    sizes, shape = drawn.shape, grid.shape[:3]

    def cell_of(point):
        scaled = [int(p * (n / size)) for p, n, size in zip(point, shape, sizes, strict=True)]
        return tuple(int(np.clip(p, 0, n - 1)) for p, n in zip(scaled, shape, strict=True))

    pooled = []
    for label in np.unique(mask[mask > 0]):
        pixels = np.argwhere(drawn == label)
        cells = [cell_of(pixel) for pixel in pixels]
        if not len(pixels):
            z, *point = np.argwhere(mask == label).mean(axis=0)
            cells = [cell_of((z, *draw.map_points([point], mask.shape[1:])[0]))]
        elif mode == "nearest_patch":
            cells = [cell_of(pixels.mean(axis=0))]
        elif mode.endswith("_bbox"):
            spans = [range(min(axis), max(axis) + 1) for axis in zip(*cells, strict=True)]
            cells = list(product(*spans))
        votes = sorted(Counter(cells).items())
        weights = np.array([count for _, count in votes], np.float32)
        vectors = np.stack([grid[cell] for cell, _ in votes])
        vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True) + np.float32(1e-8)
        if mode.startswith("max"):
            pooled.append(vectors.max(axis=0))
        elif mode.startswith("median"):
            ranked = np.sort(np.repeat(vectors, weights.astype(int), axis=0), axis=0)
            middle = ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]
            pooled.append(middle / np.float32(2))
        else:
            [total] = sparse.csr_array(weights[None]) @ vectors
            pooled.append(total / weights.sum())
    return np.array(pooled, np.float32).reshape(-1, grid.shape[3])


@st.composite
def drawn_frames(draw):
    """Frames and stacks, and grids with equal numbers and zeros."""
    depth = draw(st.sampled_from([0, 1, 3]))
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    choice = [0, 0, 0, 1, 255, 256, 2**31 - 1, *range(5, 5 + draw(st.sampled_from([1, 9, 50])))]
    blocks = draw(st.integers(1, 6))
    labels = rng.choice(choice, (max(depth, 1), height, width))
    mask = np.kron(labels, np.ones((1, blocks, blocks), np.int64))[:, :height, :width]
    shape = (len(mask), draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 5)))
    grid = rng.standard_normal(shape).astype(np.float32)
    if draw(st.booleans()):
        grid = np.round(grid)
    mask = mask.astype(draw(st.sampled_from(["int32", "int64", "uint32"])))
    return (grid, mask) if depth else (grid[0], mask[0])


@settings(max_examples=25, deadline=None)
@given(case=drawn_frames(), draw=st.sampled_from(DRAWS))
def test_a_drawn_frame_is_pooled_as_region_by_region_to_the_bit(case, draw):
    grid, mask = case
    regions = Regions.of_mask(mask)
    assert np.array_equal(regions.labels, np.unique(mask[mask != 0]))
    together = pool_frame(grid, regions, draw, POOLINGS)
    for mode, pooled in zip(POOLINGS, together, strict=True):
        assert pooled.dtype == np.float32
        np.testing.assert_array_equal(pooled, plain(grid, mask, draw, mode), mode)
        [alone] = pool_frame(grid, regions, draw, [mode])
        np.testing.assert_array_equal(alone, pooled)


def test_medians_of_many_votes_are_taken_in_parts_with_the_same_bits(monkeypatch):
    rng = np.random.default_rng(4)
    grid = rng.standard_normal((3, 30, 40, 7)).astype(np.float32)
    mask = rng.integers(0, 6, (3, 80, 100)) * (rng.random((3, 80, 100)) < 0.7)
    mask[0, :40, :50] = np.arange(2000).reshape(40, 50) + 6
    expected = pool(grid, mask, "median_patches_exact")
    monkeypatch.setattr(pooling, "_MEDIAN_NUMBERS", 64)
    assert np.array_equal(pool(grid, mask, "median_patches_exact"), expected)
    np.testing.assert_array_equal(expected, plain(grid, mask, IDENTITY, "median_patches_exact"))


def test_a_region_that_a_draw_shrinks_to_nothing_takes_the_cell_where_its_centroid_goes():
    grid = np.random.default_rng(0).standard_normal((4, 4, 3)).astype(np.float32)
    mask = np.zeros((64, 64), int)
    mask[:40, :40], mask[57, 9], mask[8, 57] = 1, 5, 300
    draw = Draw.of(Scale(0.1), hflip())
    assert np.unique(draw.apply_mask(mask)).tolist() == [0, 1]
    for pooled in pool_frame(grid, Regions.of_mask(mask), draw, POOLINGS):
        for vector, cell in zip(pooled[1:], [(3, 3), (0, 0)], strict=True):
            np.testing.assert_allclose(vector, grid[cell] / np.linalg.norm(grid[cell]), atol=1e-6)


def test_memory_does_not_grow_with_pairs_of_regions_and_cells():
    """It was up to 256 bytes a pixel, 16 GB for a stack of 64 x 1024 x 1024."""
    mask = np.broadcast_to(1 + np.arange(512, dtype=np.int32)[:, None] % 500, (8, 512, 512))
    grid = np.ones((8, 128, 128, 1), np.float32)
    tracemalloc.start()
    try:
        pooled = pool(grid, mask, "mean_patches_exact")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert pooled.shape == (500, 1)
    assert peak < 120 * mask.size


def test_input_is_not_changed():
    grid, mask = np.ones((2, 2, 3), np.float32), np.ones((4, 4), int)
    for mode in POOLINGS:
        pool(grid, mask, mode)
    assert (grid == 1).all()
    assert (mask == 1).all()


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1))
def test_labels_ascend_without_background(values):
    labels = Regions.of_mask(np.array([values])).labels
    assert labels.dtype == np.int32
    assert labels.tolist() == sorted(set(values) - {0})


def test_bad_calls():
    grid, mask = np.ones((2, 2, 3), np.float32), np.ones((4, 4), int)
    with pytest.raises(UnknownNameError, match="did you mean 'mean_patches_exact'"):
        pool(grid, mask, "mean_patches_exakt")
    with pytest.raises(FrameError, match="does not belong to a mask"):
        pool(grid, np.ones((2, 4, 4), int), "nearest_patch")
    with pytest.raises(FrameError, match="no pixel of label 9"):
        pool(grid, mask, "nearest_patch", labels=np.array([1, 9], np.int32))


@pytest.mark.parametrize(
    ("labels", "centroids", "says"),
    [
        ([2, 1], None, "labels must be positive, and ascend"),
        ([1, 1], None, "labels must be positive, and ascend"),
        ([0, 1], None, "labels must be positive, and ascend"),
        ([[1]], None, "labels must be positive, and ascend"),
        ([1, 9], [[0.0, 0.0]], "1 centroids for 2 regions"),
        ([1, 9], [[0.0, 0.0], [np.nan, 0.0]], "a centroid that is no finite number"),
    ],
)
def test_labels_and_centroids_that_are_none(labels, centroids, says):
    grid, mask = np.ones((2, 2, 3), np.float32), np.array([[1, 1, 0, 2]] * 4)
    points = None if centroids is None else np.array(centroids)
    for kind in (np.int32, np.uint16):
        with pytest.raises(FrameError, match=says):
            pool(grid, mask, "mean_patches_exact", labels=np.array(labels, kind), centroids=points)
