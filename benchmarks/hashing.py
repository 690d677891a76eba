"""Hashing frames and masks against loading them, digests that are remembered, and a long folder."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from feature_cache import FeatureCache, Movie
from feature_cache.hashing import frame_digest, mask_digest
from feature_cache.movies import Images, write_movie
from feature_cache.movies.tiff import read_tiff
from feature_cache.testing import FakeBackbone
from feature_cache.warm import plan_warm

from .data import load_real
from .harness import OURS, Case, Options, compare_calls, interleave, seconds_of


def run(options: Options) -> list[Case]:
    """Compare a frame with its mask, 700 x 1100, hashed and loaded; and a movie's keys."""
    real = load_real(options.folder)
    frames = [np.roll(f, 7 * i, 0) for i in range(5) for f in real["frames"]]
    masks = [np.roll(m, 7 * i, 0) for i in range(5) for m in real["masks"]]
    root = options.folder / "hashing" / "01"
    write_movie(root, frames, masks, np.array([[1, 0, len(frames) - 1, 0]]))
    return [
        compare_frame(root, options),
        compare_movie(root, options),
        compare_folder(options),
    ]


def compare_frame(root: Path, options: Options) -> Case:
    movie = Movie.open(root)
    files = [(movie.frames.files_of(t)[0], movie.masks.files_of(t)[0]) for t in range(len(movie))]
    loaded = {pair: [read_tiff(file) for file in pair] for pair in files}

    def load(pair: tuple[Path, Path]) -> None:
        for file in pair:
            read_tiff(file)

    def digest(pair: tuple[Path, Path]) -> None:
        frame, mask = loaded[pair]
        frame_digest(frame)
        mask_digest(mask)

    def sha256(pair: tuple[Path, Path]) -> None:
        frame, mask = loaded[pair]
        hashlib.sha256(np.ascontiguousarray(frame, np.float32).data)
        hashlib.sha256(np.ascontiguousarray(mask, np.int32).data)

    sides = {"reading the TIFFs": load, OURS: digest, "the same by sha256": sha256}
    name = "frame and mask, 700 x 1100"
    return compare_calls(name, "reading the TIFFs", sides, files, options.rounds, 0.2)


def compare_movie(root: Path, options: Options) -> Case:
    """Compare the keys of a movie that is opened anew, its digests remembered or not."""
    time.sleep(2)  # younger files are not remembered
    memo = options.folder / "memo"
    cache = FeatureCache(options.folder / "hashing" / "cache")

    def side(setting: str) -> Callable[[], float]:
        def measure() -> float:
            os.environ["FEATURE_CACHE_MEMO"] = setting
            return seconds_of(keys)

        return measure

    def keys() -> None:
        movie = Movie.open(root)
        cache.movie(movie.frames, movie.masks, FakeBackbone()).keys()

    sides = {"read and hashed": side("off"), f"{OURS}, remembered": side(str(memo))}
    for call in sides.values():
        call()
    values = interleave(sides, options.rounds)
    os.environ["FEATURE_CACHE_MEMO"] = "off"
    return Case("keys of a movie of 20 frames", "read and hashed", values)


@dataclass(frozen=True)
class Guessed(Images):
    """Files sorted as text, the first series of each: what version 0.1.0 took for a movie."""

    files: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, t: int) -> np.ndarray[Any, Any]:
        with tifffile.TiffFile(self.files[t]) as opened:
            return np.asarray(opened.series[0].asarray())

    @property
    def shape(self) -> tuple[int, ...]:
        return self[0].shape

    @property
    def place(self) -> str:
        return str(self.files[0].parent)


def compare_folder(options: Options) -> Case:
    """Compare opening and planning a folder of many small frames, read as known and as guessed."""
    count = 500 if options.quick else 10_000
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 4000, (8, 64, 64)).astype(np.uint16)
    masks = np.kron(
        rng.permuted([range(64)] * 8, axis=1).reshape(8, 8, 8), np.ones((8, 8), np.uint16)
    )
    root = options.folder / "folder" / "01"
    shown = [t % 8 for t in range(count)]
    write_movie(root, frames[shown], masks[shown], np.zeros((0, 4), int))
    cache = FeatureCache(options.folder / "folder" / "cache")

    def guessed() -> None:
        files, truth = (
            tuple(sorted(folder.glob("*.tif"))) for folder in (root, Path(f"{root}_GT") / "TRA")
        )
        plan_warm(cache, [(Guessed(files), Guessed(truth))], FakeBackbone())

    def known() -> None:
        plan_warm(cache, [Movie.open(root)], FakeBackbone())

    sides = {"as text, series 0": guessed, OURS: known}
    values = interleave(
        {name: lambda c=c: seconds_of(c) for name, c in sides.items()}, options.rounds
    )
    return Case(f"opening and planning {count:,} frames", "as text, series 0", values)
