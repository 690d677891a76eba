"""Small movies, good and bad, a backbone that other processes know by name, and a Dask cluster."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
import tifffile

from callers import PLUGIN, Work
from feature_cache import Augmentations, FeatureCache
from feature_cache.movies import write_movie
from feature_cache.testing import FakeBackbone
from shared_folder import Lab, contents
from synthetic import make_movie

Contents: TypeAlias = dict[tuple[str, bytes], Any]
HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that makes processes which have it in their path know the backbone by name."""
    folder = tmp_path_factory.mktemp("plugins")
    info = folder / "contract-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: contract\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[feature_cache.backbones]\n{PLUGIN} = callers:load\n")
    paths = [str(folder), str(HERE), str(HERE.parent)]
    with pytest.MonkeyPatch.context() as patch:
        joined = [*paths, os.environ.get("PYTHONPATH", "")]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, joined)))
        patch.setattr(sys, "path", [*paths, *sys.path])
        yield folder


@pytest.fixture(scope="session")
def dask(plugins: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a Dask cluster of one worker."""
    with Lab(tmp_path_factory.mktemp("dask")).cluster(1) as cluster:
        yield cluster.address


class Movies:
    """Movies by name, each written when it is first asked for.

    ``"one"`` has six frames, ``"two"`` four of another shape, ``"stack"`` three of five slices,
    ``"long"`` 24 and ``"first of long"`` the first of these alone; any other name a movie of
    six frames of its own. ``"bad <kind>"`` is ``"one"`` with a bad frame 3: ``nan``, ``cut`` or
    ``two-valued``; ``"worse …"`` has a bad frame 1 too. ``"of <n>"`` has so many larger ones.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        root = self.folder / name.replace(" ", "-") / "01"
        if not root.exists():
            self._write(name, root)
        return root

    def _write(self, name: str, root: Path) -> None:
        match name.split():
            case ["one"]:
                write_movie(root, *make_movie())
            case ["two"]:
                write_movie(root, *make_movie(4, 40, 56, seed=1))
            case ["stack"]:
                frames, masks, tracks = make_movie(15, cells=4, seed=2)
                parts = (array.reshape(3, 5, *array.shape[1:]) for array in (frames, masks))
                tracks[:, 2] = 2
                write_movie(root, *parts, tracks)
            case ["long"]:
                write_movie(root, *make_movie(24, seed=3))
            case ["first", "of", other]:
                frames, masks = (tifffile.imread(file) for file in files_of(self[other], 0))
                tracks = np.array([[label, 0, 0, 0] for label in np.setdiff1d(masks, 0)])
                write_movie(root, frames[None], masks[None], tracks)
            case ["of", count]:
                write_movie(root, *make_movie(int(count), 192, 192, seed=4))
            case ["bad", kind]:
                copy_movie(self["one"], root)
                spoil(root, 3, kind)
            case ["worse", kind]:
                copy_movie(self[f"bad {kind}"], root)
                spoil(root, 1, kind)
            case _:
                write_movie(root, *make_movie(seed=sum(name.encode())))


def files_of(root: Path, t: int) -> tuple[Path, Path]:
    return root / f"t{t:03d}.tif", Path(f"{root}_GT") / "TRA" / f"man_track{t:03d}.tif"


def copy_movie(source: Path, root: Path) -> None:
    for end in ("", "_GT"):
        shutil.copytree(f"{source}{end}", f"{root}{end}")


def spoil(root: Path, t: int, kind: str) -> None:
    """Make a frame bad, and other than a bad frame before."""
    file = files_of(root, t)[0]
    frame = tifffile.imread(file)
    match kind:
        case "nan":
            frame = frame.astype(np.float32)
            frame[t, t] = np.nan
        case "two-valued":
            frame = np.where(np.add(*np.indices(frame.shape)) % (t + 1), 100, 900).astype(np.uint16)
        case "cut":
            file.write_bytes(file.read_bytes()[:-400])
            return
    tifffile.imwrite(file, frame, photometric="minisblack", compression="zlib")


@pytest.fixture(scope="session")
def movies(tmp_path_factory: pytest.TempPathFactory) -> Movies:
    return Movies(tmp_path_factory.mktemp("movies"))


@pytest.fixture
def make_work(
    plugins: Path, movies: Movies, tmp_path: Path, request: pytest.FixtureRequest
) -> Callable[..., Work]:
    """Make work in a cache of this test's own, by the names of movies."""

    def make(*names: str, cache: str = "cache", **options: Any) -> Work:
        return Work(tmp_path / cache, tuple(movies[name] for name in names), **options)

    return make


@pytest.fixture(scope="session")
def right_records(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Work], Contents]:
    """Give the records of a work, as `get_or_compute` gives them one by one."""
    known: dict[Any, Contents] = {}

    def compute(work: Work) -> Contents:
        asked = work.movies, work.copies, work.poolings, work.dim
        if asked not in known:
            cache = FeatureCache(tmp_path_factory.mktemp("right") / "cache")
            draws = Augmentations("default", copies=work.copies, seed=0).draws()
            for movie in work.movies:
                for pooling in work.poolings:
                    for draw in draws:
                        cache.get_or_compute(
                            movie, None, FakeBackbone(work.dim, 8), pooling=pooling, draw=draw
                        )
            known[asked] = contents(cache.store.root)
        return known[asked]

    return compute
