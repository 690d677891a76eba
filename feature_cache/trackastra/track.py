"""Tracking a movie from its files: ``feature-cache track``."""

from __future__ import annotations

import os
import shutil
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from trackastra.model import Trackastra, model_api
from trackastra.tracking import track_greedy, write_to_geff

from ..cache import FeatureCache
from ..errors import MovieError, NoMasksError, UnknownNameError
from ..movies import Movie, read_tracks
from ..movies.movie import tracks_file
from .inference import cached_inference
from .metrics import check_result, score_tracks, write_tracks
from .model_features import find_model
from .patching import replaced

MODES = ("greedy", "greedy_nodiv", "ilp")
DEVICES = ("cuda", "mps", "cpu", "automatic")


def track_movie(
    movie: Movie,
    model: str | os.PathLike[str],
    cache: FeatureCache | str | os.PathLike[str],
    folder: Path,
    *,
    mode: str = "greedy",
    threshold: float = 0.5,
    weights: str | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Track the cells of a movie with masks, on cached features of the model's own kind.

    The model is a folder, or the name of one of Trackastra's own. Masks, ``man_track.txt`` and
    ``tracks.zarr`` (GEFF) are written to `folder`, over an earlier result. The threshold, 0 to 1,
    is the least a link may weigh for the two greedy modes: less finds more links, of a model that
    is little trained above all, and more wrong ones. The weights are the backbone's, as of
    `cached_inference`.

    Returns
    -------
    dict
        ``tracks`` and ``cells``, how many; ``unlinked``, how many cells are in none of them;
        ``scores``, as `score_tracks`, where the movie's masks are tracked ones, or else empty.

    Warns
    -----
    UserWarning
        The movie's own tracks can't be compared with: they have no links, or don't fit its masks.

    Raises
    ------
    NoMasksError
        The movie has no masks.
    UnknownNameError
        No such mode or device.
    BackboneError
        No such model, or its features are not to be had: as `cached_inference`.
    MovieError
        The movie has a single frame.
    MovieError, NotWrittenError
        As `write_tracks`; before it begins.
    """
    if movie.masks is None:
        raise NoMasksError(
            f"{movie.name} has no masks: name them, as for Movie.open (detections=… or masks=…; "
            "--detections, --masks)"
        )
    if len(movie) < 2:
        raise MovieError(f"{movie.name} has {len(movie)} frame: expected 2 or more, to link cells")
    if mode not in MODES:
        raise UnknownNameError("mode", mode, MODES)
    if device is not None and device not in DEVICES:
        raise UnknownNameError("device", device, DEVICES)
    check_result(folder, len(movie))
    place = find_model(model, "train_config.yaml")
    frames, masks = (
        np.stack([images[t] for t in range(len(images))]) for images in (movie.frames, movie.masks)
    )
    linking = partial(track_greedy, threshold=threshold)
    with cached_inference(cache, weights=weights), replaced(model_api, "track_greedy", linking):
        tracker = Trackastra.from_folder(place, device=device)
        graph, _ = tracker.track(frames, masks, mode=mode)
    write_tracks(graph, masks, folder)
    geff = folder / "tracks.zarr"
    shutil.rmtree(geff, ignore_errors=True)
    write_to_geff(graph, masks, outdir=geff)
    tracks = read_tracks(folder / "man_track.txt")
    every = sum(len(np.unique(mask[mask > 0])) for mask in masks)
    return {
        "tracks": len(tracks),
        "cells": len(graph),
        "unlinked": every - len(graph),
        "scores": _score(movie, folder),
    }


def _score(movie: Movie, folder: Path) -> dict[str, float]:
    """Compare with the tracks that stand beside the movie's masks, where there are any."""
    truth = tracks_file(movie)
    if truth is None:
        return {}
    try:
        return score_tracks(truth.parent, folder)
    except (MovieError, ValueError) as error:  # the result is written, whatever the truth is worth
        warnings.warn(
            f"the tracks are not compared with those of {truth.parent}: {error}", stacklevel=2
        )
        return {}
