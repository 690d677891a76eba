"""Pooling against trackastra-pretrained-feats, on the same grids and masks.

And all that is done on a CPU for the records of a frame and its copies, but for the backbone and
the draws of its pixels: against doing it for each copy by itself.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from skimage.measure import regionprops

from feature_cache import Augmentations, Draw
from feature_cache.normalize import normalize
from feature_cache.pooling import POOLINGS, pool, pool_frame
from feature_cache.regions import Regions
from feature_cache.spec import Normalization

from .data import load_real, make_grids
from .harness import OURS, Case, Options, interleave, seconds_each

THEIRS = "trackastra-pretrained-feats"
MODES = [mode for mode in POOLINGS if mode not in ("max_patches_bbox", "median_patches_bbox")]
QUICK_MODES = ("nearest_patch", "mean_patches_exact")
EACH = "each copy by itself, pixel by pixel"
SIDE, CELLS, COPIES = 1024, 200, 15
COPIED = f"CPU a record at {SIDE} x {SIDE}, {CELLS} regions, {COPIES} default copies"


def run(options: Options) -> list[Case]:
    """Compare modes at 150 regions and 64 x 64, then regions and grids at `mean_patches_exact`.

    Then the records of a frame and its copies, by what is done for them.
    """
    main, others = "mean_patches_exact", QUICK_MODES if options.quick else MODES
    wanted = [(mode, 150, 64) for mode in others]
    if not options.quick:
        wanted += [(main, count, 64) for count in (5, 50, 500)]
        wanted += [(main, 150, side) for side in (16, 128, 256)]
    modes = [compare(mode, count, side, options) for mode, count, side in wanted]
    return modes + compare_copies(options)


def make_mask(folder: Path, count: int) -> NDArray[np.int32]:
    """Give a mask with so many cells of HeLa: from a frame, or from several, made smaller."""
    mask = load_real(folder)["masks"][0].astype(np.int32)
    times = math.ceil(math.sqrt(count / len(Regions.of_mask(mask).labels)))
    more = [np.where(mask > 0, mask + i * mask.max(), 0) for i in range(times**2)]
    mask = np.block([more[i : i + times] for i in range(0, times**2, times)])[::times, ::times]
    labels = Regions.of_mask(mask).labels
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


def compare_copies(options: Options) -> list[Case]:
    """Compare the CPU time of a record: normalising, regions, pooling, all; no backbone."""
    frame, mask = make_frame(options.folder)
    [grid] = make_grids(options.folder, 1, (64, 64, 256))
    augmentations = Augmentations("default", copies=COPIES, seed=0)
    draws = [augmentations.draw(copy) for copy in range(COPIES + 1)]
    regions, mode = Regions.of_mask(mask), "mean_patches_exact"

    def pool_copies(known: Regions) -> None:
        for draw in draws:
            pool_frame(grid, known, draw, [mode])

    def ours() -> None:
        normalize(frame, Normalization())
        pool_copies(Regions.of_mask(mask))

    stages: dict[str, tuple[Callable[[], object], Callable[[Draw], object]]] = {
        "normalising": (
            lambda: normalize(frame, Normalization()),
            lambda _: normalize_plainly(frame),
        ),
        "regions": (lambda: Regions.of_mask(mask), lambda _: list_pixels(mask)),
        "pooling": (
            lambda: pool_copies(regions),
            lambda draw: pool_plainly(grid, draw.apply_mask(mask), regions.labels),
        ),
        "all": (
            ours,
            lambda draw: (
                normalize_plainly(frame),
                list_pixels(mask),
                pool_plainly(grid, draw.apply_mask(mask), regions.labels),
            ),
        ),
    }
    cases = []
    for stage, (shared, each) in stages.items():
        sides = {
            OURS: lambda call=shared: cpu_seconds(call) / len(draws),
            EACH: lambda call=each: cpu_seconds(lambda: list(map(call, draws))) / len(draws),
        }
        cases.append(Case(f"{COPIED}: {stage}", OURS, interleave(sides, options.rounds)))
    return cases


def make_frame(folder: Path) -> tuple[NDArray[np.uint16], NDArray[np.int32]]:
    """Give a square of HeLa and itself around it, a tenth smaller, with so many of its cells."""
    real = load_real(folder)
    frame, mask = real["frames"][0].astype(np.uint16) * 16, real["masks"][0].astype(np.int32)
    corner = np.arange(SIDE) * 11 // 10
    more = [np.where(mask > 0, mask + i * mask.max(), 0) for i in range(4)]
    square = np.block([more[:2], more[2:]])[np.ix_(corner, corner)]
    labels = Regions.of_mask(square).labels
    kept = labels[np.linspace(0, len(labels) - 1, CELLS).astype(int)]
    return np.tile(frame, (2, 2))[np.ix_(corner, corner)], np.where(
        np.isin(square, kept), square, 0
    )


def cpu_seconds(call: Callable[[], object]) -> float:
    """Run once; whatever else the machine does is not counted."""
    began = time.process_time()
    call()
    return time.process_time() - began


def normalize_plainly(frame: NDArray[np.uint16]) -> NDArray[np.float32]:
    pixels = frame.astype(np.float32)
    low, high = np.percentile(pixels, (1, 99.8)).astype(np.float32)
    return np.clip((pixels - low) / (high - low), np.float32(0), np.float32(1))


def list_pixels(
    mask: NDArray[np.int32], labels: NDArray[np.int32] | None = None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give each foreground pixel's place and row, of the labels or of those that are there."""
    places = np.flatnonzero(mask)
    values = mask.reshape(-1)[places]
    labels = np.flatnonzero(np.bincount(values)) if labels is None else labels
    rows = np.zeros(labels[-1] + 1, np.int64)
    rows[labels] = np.arange(len(labels))
    return places, rows[values]


def pool_plainly(
    grid: NDArray[np.float32], mask: NDArray[np.int32], labels: NDArray[np.int32]
) -> NDArray[np.float32]:
    """Pool as `mean_patches_exact` does: a table of regions and cells, pixel by pixel."""
    height, width, channels = grid.shape
    places, rows = list_pixels(mask, labels)
    y, x = np.divmod(places, mask.shape[1])
    cells = y * height // mask.shape[0] * width + x * width // mask.shape[1]
    pairs = np.bincount(rows * height * width + cells, minlength=len(labels) * height * width)
    votes = sparse.csr_array(pairs.reshape(len(labels), -1).astype(np.float32))
    used = grid.reshape(-1, channels)[votes.indices]
    used /= np.linalg.norm(used, axis=-1, keepdims=True) + np.float32(1e-8)
    votes.indices = np.arange(votes.nnz)
    votes = sparse.csr_array((votes.data, votes.indices, votes.indptr), (len(labels), votes.nnz))
    return np.asarray(votes @ used / np.maximum(votes.sum(axis=1), 1)[:, None], np.float32)
