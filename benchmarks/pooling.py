"""Pooling against trackastra-pretrained-feats, on the same grids and masks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from skimage.measure import regionprops

from feature_cache.pooling import POOLINGS, pool, region_labels

from .data import load_real, make_grids
from .harness import OURS, Case, Options, interleave, seconds_each

THEIRS = "trackastra-pretrained-feats"
MODES = [mode for mode in POOLINGS if mode not in ("max_patches_bbox", "median_patches_bbox")]
QUICK_MODES = ("nearest_patch", "mean_patches_exact")


def run(options: Options) -> list[Case]:
    """Compare modes at 150 regions and 64 x 64, then regions and grids at `mean_patches_exact`."""
    main, others = "mean_patches_exact", QUICK_MODES if options.quick else MODES
    wanted = [(mode, 150, 64) for mode in others]
    if not options.quick:
        wanted += [(main, count, 64) for count in (5, 50, 500)]
        wanted += [(main, 150, side) for side in (16, 128, 256)]
    return [compare(mode, count, side, options) for mode, count, side in wanted]


def make_mask(folder: Path, count: int) -> NDArray[np.int32]:
    """Give a mask with so many cells of HeLa: from a frame, or from several, made smaller."""
    mask = load_real(folder)["masks"][0].astype(np.int32)
    times = math.ceil(math.sqrt(count / len(region_labels(mask))))
    more = [np.where(mask > 0, mask + i * mask.max(), 0) for i in range(times**2)]
    mask = np.block([more[i : i + times] for i in range(0, times**2, times)])[::times, ::times]
    labels = region_labels(mask)
    kept = labels[np.linspace(0, len(labels) - 1, count).astype(int)]
    return np.where(np.isin(mask, kept), mask, 0)


def compare(mode: str, count: int, side: int, options: Options) -> Case:
    [grid] = make_grids(options.folder, 1, (side, side, 256))
    mask = make_mask(options.folder, count)
    sides: dict[str, Callable[[Any], object]] = {OURS: lambda _: pool(grid, mask, mode)}
    theirs = open_theirs(grid, mask, mode, options.folder)
    sides[OURS](None)
    try:
        if theirs is not None:
            theirs()
            sides[THEIRS] = lambda _: theirs()
    except IndexError as error:  # its boxes are transposed, which leads out of a frame's grid
        print(f"{THEIRS} is left out of {mode}: {error}")
    measured = {
        name: lambda call=call: seconds_each(call, [None], 0.05) for name, call in sides.items()
    }
    title = f"{mode}, {count} regions, {side} x {side} x 256"
    return Case(title, OURS, interleave(measured, min(options.rounds, 5)))


def open_theirs(
    grid: NDArray[np.float32], mask: NDArray[np.int32], mode: str, folder: Path
) -> Callable[[], object] | None:
    """Give upstream's own pooling of a grid; the regions are listed before, as it wants them."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # importing it warns of its own dependencies
            import trackastra_pretrained_feats.pretrained_features as upstream
    except ImportError as error:
        print(f"{THEIRS} is left out: {error}")
        return None

    class Given(upstream.FeatureExtractor):  # type: ignore[misc,name-defined]
        def _run_model(self, images: object, **_: object) -> None:
            raise AssertionError("the grid is given")

        def _load_features(self) -> torch.Tensor:
            return torch.from_numpy(grid).reshape(1, -1, grid.shape[-1])

    extractor = Given(image_size=mask.shape, save_path=folder, device="cpu", mode=mode)
    extractor.hidden_state_size = grid.shape[-1]
    extractor.input_size = (grid.shape[0] * 16, grid.shape[1] * 16)
    extractor.final_grid_size = grid.shape[:2]
    regions = regionprops(mask)
    times = np.zeros(len(regions), int)
    labels = np.array([region.label for region in regions])
    centroids = np.array([region.centroid for region in regions])
    return lambda: extractor.extract_embedding(mask[None], times, labels, centroids)
