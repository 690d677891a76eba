"""One movie in any format has the same keys: what is computed of one is there for all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile
import torch
import zarr

from feature_cache import Movie
from feature_cache.movies import write_movie
from feature_cache.testing import FakeBackbone
from old_files import age, hurry
from synthetic import make_movie

FRAMES, MASKS, TRACKS = make_movie()
Open = Callable[[Path], tuple[Any, Any]]
"""Write a movie to a folder; give what stands for its frames and its masks."""


def movie_folder(folder: Path) -> tuple[Any, Any]:
    write_movie(folder / "01", FRAMES, MASKS, TRACKS)
    return Movie.open(folder / "01"), None


def image_files(folder: Path) -> tuple[Any, Any]:
    frames, masks = [], []
    for t, (frame, mask) in enumerate(zip(FRAMES, MASKS, strict=True)):
        frames.append(folder / f"frame {t}.tif")
        masks.append(str(folder / f"mask {t}.tif"))
        tifffile.imwrite(frames[-1], frame)
        tifffile.imwrite(masks[-1], mask)
    return frames, masks


def npy_files(folder: Path) -> tuple[Any, Any]:
    np.save(folder / "frames.npy", FRAMES)
    np.save(folder / "masks.npy", MASKS)
    return Movie.open(folder / "frames.npy", masks=folder / "masks.npy"), None


def zarr_arrays(version: int) -> Open:
    def write(folder: Path) -> tuple[Any, Any]:
        for name, images in (("frames", FRAMES), ("masks", MASKS)):
            zarr.create_array(
                folder / f"{name}.zarr",
                data=images,
                chunks=(1, 32, 32),
                zarr_format=version,
                config={"write_empty_chunks": True},
            )
        return Movie.open(folder / "frames.zarr", masks=folder / "masks.zarr"), None

    return write


def ome_zarr(version: int) -> Open:
    def write(folder: Path) -> tuple[Any, Any]:
        for place, images in (("", FRAMES), ("labels/cells", MASKS)):
            axes = [{"name": name} for name in "tczyx"]
            image = [{"axes": axes, "datasets": [{"path": "0"}]}]
            told: dict[str, Any] = {"multiscales": image}
            root = folder / "movie.zarr" / place
            write_group(root, version, told)
            zarr.create_array(
                root / "0",
                data=images[:, None, None],
                chunks=(1, 1, 1, 32, 32),
                zarr_format=version,
                config={"write_empty_chunks": True},
            )
        write_group(folder / "movie.zarr" / "labels", version, {"labels": ["cells"]})
        return Movie.open(folder / "movie.zarr"), None

    return write


def write_group(folder: Path, version: int, told: dict[str, Any]) -> None:
    attributes = told if version == 2 else {"ome": told}
    zarr.create_group(folder, zarr_format=version, attributes=attributes)


def czi(folder: Path) -> tuple[Any, Any]:
    pytest.importorskip("bioio_czi", reason="needs the extra bioio")
    from pylibCZIrw import czi

    with czi.create_czi(str(folder / "movie.czi")) as file:
        for t, frame in enumerate(FRAMES):
            file.write(frame[..., None], plane={"T": t})
        file.write_metadata("movie")
    np.save(folder / "masks.npy", MASKS)
    return Movie.open(folder / "movie.czi", masks=folder / "masks.npy"), None


FILES: dict[str, Open] = {
    "npy": npy_files,
    "zarr 2": zarr_arrays(2),
    "zarr 3": zarr_arrays(3),
    "OME-Zarr 0.4": ome_zarr(2),
    "OME-Zarr 0.5": ome_zarr(3),
    "CZI": czi,
}
ARRAYS: dict[str, Open] = {
    "list of files": image_files,
    "arrays": lambda _: (FRAMES, MASKS),
    "lists": lambda _: (list(FRAMES), list(MASKS)),
    "torch": lambda _: (torch.tensor(FRAMES.astype("f4")), torch.tensor(MASKS)),
    "dask": lambda _: (da.from_array(FRAMES), da.from_array(MASKS)),
    "zarr in memory": lambda _: (
        zarr.create_array({}, data=FRAMES),
        zarr.create_array({}, data=MASKS, zarr_format=2),
    ),
}


@pytest.mark.parametrize("kind", FILES | ARRAYS)
def test_any_format_has_the_records_of_a_folder_of_tiffs(cache, tmp_path, kind):
    expected = cache.get_or_compute(*movie_folder(tmp_path), FakeBackbone())
    frames, masks = (FILES | ARRAYS)[kind](tmp_path)
    before = cache.stats()["computed"]
    records = cache.get_or_compute(frames, masks, FakeBackbone())
    assert cache.stats()["computed"] == before
    for record, other in zip(records, expected, strict=True):
        np.testing.assert_array_equal(record.features, other.features)
        np.testing.assert_array_equal(record.labels, other.labels)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note which images are read."""
    names: list[str] = []
    from feature_cache.movies import arrays, bioformats, zarrs

    for reader in (arrays.NpyImages, bioformats.BioImages, zarrs.ZarrImages):

        def read(images: Any, t: int, whole: Any = reader.__getitem__) -> np.ndarray:
            names.append(images.name_of(t))
            return whole(images, t)

        monkeypatch.setattr(reader, "__getitem__", read)
    return names


@pytest.mark.parametrize("kind", FILES)
def test_files_that_are_unchanged_are_not_read_again(cache, tmp_path, monkeypatch, reads, kind):
    monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
    hurry(monkeypatch)
    (tmp_path / "files").mkdir()
    given = FILES[kind](tmp_path / "files")
    age(tmp_path / "files")
    keys = cache.movie(*given, FakeBackbone()).keys()
    assert len(reads) == 12
    again = cache.movie(*given, FakeBackbone())
    np.testing.assert_array_equal(again.keys(), keys)
    assert len(reads) == 12
