"""Pooling as tensors against `pool_frame`, here on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_cache import IDENTITY, POOLINGS, Draw, FrameError, UnknownNameError, pooling_torch
from feature_cache.augment import Affine, Elastic, Scale, hflip, quarter_turn
from feature_cache.pooling import pool_frame
from feature_cache.pooling_torch import pool_on
from feature_cache.regions import Regions
from feature_cache.rounding import ROUNDING

BOUND = ROUNDING["float32"] / 256
DRAWS = [
    IDENTITY,
    Draw.of(quarter_turn()),
    Draw.of(Scale(0.1), hflip()),
    Draw.of(Affine(degrees=30, scale=0.5, shift_y=0.4), Elastic(1.0, 8.0)),
]


def pool_both(grid, mask, draw, modes=POOLINGS):
    """Give what `pool_frame` and `pool_on` make of a frame."""
    regions = Regions.of_mask(mask)
    shape = grid.shape[:3] if grid.ndim == 4 else (1, *grid.shape[:2])
    fallback = torch.from_numpy(regions.cells_of_centroids(draw, shape))
    rows = draw.apply_rows(torch.from_numpy(regions.rows))
    return (
        pool_frame(grid, regions, draw, modes),
        pool_on(torch.from_numpy(grid), rows, fallback, modes),
    )


def assert_agree(expected, found):
    for mode, one, other in zip(POOLINGS, expected, found, strict=True):
        assert other.dtype == torch.float32
        assert other.shape == one.shape
        np.testing.assert_allclose(other, one, rtol=0, atol=BOUND, err_msg=mode)


@st.composite
def frames(draw):
    depth = draw(st.sampled_from([0, 1, 3]))
    height, width, blocks = (draw(st.integers(1, most)) for most in (40, 40, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    choice = [0, 0, 0, 1, 300, 2**31 - 1, *range(5, draw(st.sampled_from([6, 20, 300])))]
    labels = rng.choice(choice, (max(depth, 1), height, width))
    mask = np.kron(labels, np.ones((1, blocks, blocks), np.int64))[:, :height, :width]
    shape = (len(mask), draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 5)))
    grid = rng.standard_normal(shape).astype(np.float32)
    if draw(st.booleans()):
        grid = np.round(grid)
    grid *= np.float32(draw(st.sampled_from([1.0, 1.0, 1e30, 1e-42])))
    return (grid, mask) if depth else (grid[0], mask[0])


@settings(max_examples=100, deadline=None)
@given(case=frames(), draw=st.sampled_from(DRAWS))
def test_agrees_with_pool_frame(case, draw):
    if case[1].any():
        assert_agree(*pool_both(*case, draw))


def test_regions_in_parts_are_the_same(monkeypatch):
    rng = np.random.default_rng(2)
    grid = rng.standard_normal((2, 9, 11, 6)).astype(np.float32)
    mask = np.kron(rng.integers(0, 90, (2, 20, 25)), np.ones((1, 2, 2), int))
    whole = pool_both(grid, mask, DRAWS[2])
    monkeypatch.setattr(pooling_torch, "_VOTES_AT_ONCE", 7 * grid[..., 0].size)
    monkeypatch.setattr(pooling_torch, "_NUMBERS_AT_ONCE", 50)
    parts = pool_both(grid, mask, DRAWS[2])[1]
    assert_agree(*whole)
    for mode, one, other in zip(POOLINGS, whole[1], parts, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-7, msg=mode)


def test_one_pixel_and_no_region():
    grid = np.random.default_rng(0).standard_normal((4, 4, 3)).astype(np.float32)
    mask = np.zeros((16, 16), np.uint8)
    empty = torch.empty(0, dtype=torch.int64)
    rows = torch.from_numpy(mask)[None]
    for pooled in pool_on(torch.from_numpy(grid), rows, empty, POOLINGS):
        assert pooled.shape == (0, 3)
    mask[9, 14] = 1
    assert_agree(*pool_both(grid, mask, IDENTITY))


def test_what_is_left_of_no_region_takes_the_cell_of_its_centroid():
    grid = np.random.default_rng(0).standard_normal((4, 4, 3)).astype(np.float32)
    mask = np.zeros((64, 64), int)
    mask[:40, :40], mask[57, 9], mask[8, 57] = 1, 5, 300
    draw = Draw.of(Scale(0.1), hflip())
    assert np.unique(draw.apply_mask(mask)).tolist() == [0, 1]
    for pooled in pool_both(grid, mask, draw)[1]:
        for vector, cell in zip(pooled[1:], [(3, 3), (0, 0)], strict=True):
            np.testing.assert_allclose(vector, grid[cell] / np.linalg.norm(grid[cell]), atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_grids_of_other_dtypes(dtype):
    rng = np.random.default_rng(1)
    grid = torch.from_numpy(rng.standard_normal((5, 6, 4))).to(dtype)
    regions = Regions.of_mask(rng.integers(0, 5, (20, 30)))
    fallback = torch.from_numpy(regions.cells_of_centroids(IDENTITY, (1, 5, 6)))
    found = pool_on(grid, torch.from_numpy(regions.rows), fallback, POOLINGS)
    assert_agree(pool_frame(grid.float().numpy(), regions, IDENTITY, POOLINGS), found)


def test_bad_calls():
    grid, rows = torch.ones(2, 2, 3), torch.ones(1, 4, 4, dtype=torch.uint8)
    fallback = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(UnknownNameError, match="did you mean 'mean_patches_exact'"):
        pool_on(grid, rows, fallback, ["mean_patches_exakt"])
    with pytest.raises(FrameError, match="does not belong to a mask of 2 slices"):
        pool_on(grid, rows.expand(2, 4, 4), fallback, ["nearest_patch"])
