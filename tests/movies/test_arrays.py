"""Arrays of any library are the movie that NumPy's would be; anything else is told."""

from __future__ import annotations

import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import tifffile
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_cache import FrameError, MovieError
from feature_cache.errors import FrameTypeError
from feature_cache.hashing import frame_digest
from feature_cache.movies import ReadOptions
from feature_cache.movies.arrays import images_of, open_npy

PLANES = np.random.default_rng(0).integers(0, 1000, (5, 20, 30)).astype(np.uint16)
VOLUMES = np.random.default_rng(1).normal(size=(4, 3, 20, 30)).astype(np.float32)


def check_same(images: Any, expected: np.ndarray) -> None:
    assert len(images) == len(expected)
    assert images.shape == expected.shape[1:]
    for t, image in enumerate(expected):
        assert type(images[t]) is np.ndarray
        assert images[t].shape == image.shape
        assert frame_digest(images[t]) == frame_digest(image)


class Lazy:
    """What people write themselves: a length, and an image for each number."""

    def __init__(self, movie: np.ndarray) -> None:
        self.movie = movie

    def __len__(self) -> int:
        return len(self.movie)

    def __getitem__(self, t: int) -> np.ndarray:
        return self.movie[t]


def as_memmap(movie: np.ndarray, folder: Path) -> np.ndarray:
    mapped = np.memmap(folder / "raw", movie.dtype, "w+", shape=movie.shape)
    mapped[:] = movie
    return mapped


def as_zarr(version: int) -> Callable[[np.ndarray, Path], Any]:
    def write(movie: np.ndarray, folder: Path) -> Any:
        array = zarr.create_array(
            folder / "movie", shape=movie.shape, dtype=movie.dtype, zarr_format=version
        )
        array[:] = movie
        return array

    return write


def as_h5(movie: np.ndarray, folder: Path) -> Any:
    h5py = pytest.importorskip("h5py")
    return h5py.File(folder / "movie.h5", "w").create_dataset("movie", data=movie)


def as_xarray(movie: np.ndarray, dims: list[str] | None = None) -> Any:
    return pytest.importorskip("xarray").DataArray(da.from_array(movie), dims=dims)


def as_named_zarr(movie: np.ndarray, dims: list[str]) -> Any:
    return zarr.create_array({}, data=movie, dimension_names=dims)


def as_xarrays_zarr(movie: np.ndarray, dims: list[str]) -> Any:
    return zarr.create_array({}, data=movie, zarr_format=2, attributes={"_ARRAY_DIMENSIONS": dims})


KINDS: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "numpy": lambda movie, _: movie,
    "big endian": lambda movie, _: movie.astype(movie.dtype.newbyteorder(">")),
    "fortran": lambda movie, _: np.asfortranarray(movie),
    "memmap": as_memmap,
    "list": lambda movie, _: list(movie),
    "tuple of lists": lambda movie, _: tuple(movie.tolist()),
    "own class": lambda movie, _: Lazy(movie),
    "torch": lambda movie, _: torch.tensor(movie),
    "torch with a gradient": lambda movie, _: torch.tensor(movie.astype("f4"), requires_grad=True),
    "list of tensors": lambda movie, _: [torch.tensor(image) for image in movie],
    "dask": lambda movie, _: da.from_array(movie, chunks=2),
    "list of dask": lambda movie, _: list(da.from_array(movie, chunks=2)),
    "zarr 2": as_zarr(2),
    "zarr 3": as_zarr(3),
    "h5py": as_h5,
    "xarray without names": lambda movie, _: as_xarray(movie),
}


@pytest.mark.parametrize("movie", [PLANES, VOLUMES], ids=["planes", "volumes"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_array_is_the_same_movie(tmp_path, movie, kind):
    check_same(images_of(KINDS[kind](movie, tmp_path)), movie)


def test_images_pass_unchanged():
    images = images_of(PLANES)
    assert images_of(images) is images


def test_images_of_several_shapes_are_a_list():
    movie = [PLANES[0], PLANES[1][:10], VOLUMES[0]]
    images = images_of(movie)
    assert [images[t].shape for t in range(3)] == [(20, 30), (10, 30), (3, 20, 30)]


def test_a_plain_array_keeps_a_single_slice():
    assert images_of(VOLUMES[:, :1])[0].shape == (1, 20, 30)


@pytest.mark.parametrize("name", [as_named_zarr, as_xarrays_zarr, as_xarray])
def test_axes_that_an_array_names_count(name):
    swapped = np.ascontiguousarray(VOLUMES.transpose(1, 3, 2, 0))
    named = name(swapped, ["channel", "x", "y", "time"])
    check_same(images_of(named, ReadOptions(channel=1)), VOLUMES[:, 1])
    check_same(images_of(name(VOLUMES[:, :1], ["t", "z", "y", "x"])), VOLUMES[:, 0])


def test_axes_that_are_told_count():
    swapped = VOLUMES.transpose(1, 0, 2, 3)
    check_same(images_of(swapped, ReadOptions(axes="ZTYX")), VOLUMES)
    check_same(images_of(VOLUMES[:, :1], ReadOptions(axes="TZYX")), VOLUMES[:, 0])


def test_axes_of_length_1_need_no_letter():
    movie = VOLUMES[:, None, :, None]
    check_same(images_of(movie, ReadOptions(axes="TZYX")), VOLUMES)
    named = as_named_zarr(movie, ["t", "position", "z", "phase", "y", "x"])
    check_same(images_of(named), VOLUMES)


@settings(max_examples=30)
@given(st.data())
def test_any_order_of_any_axes(data):
    """Against what NumPy says of the same axes."""
    others = data.draw(st.sets(st.sampled_from("CZ")))
    axes = "".join(data.draw(st.permutations(["T", "Y", "X", *sorted(others)])))
    shape = data.draw(st.tuples(*(st.integers(1, 4) for _ in axes)))
    array = np.arange(math.prod(shape)).reshape(shape)
    lengths = dict(zip(axes, shape, strict=True))
    channel = data.draw(st.integers(0, lengths.get("C", 1) - 1))
    expected = np.einsum(f"{axes}->{''.join(c for c in 'TCZYX' if c in axes)}", array)
    expected = expected[:, channel] if "C" in axes else expected
    expected = expected[:, 0] if lengths.get("Z") == 1 else expected
    check_same(images_of(array, ReadOptions(channel, axes)), expected)
    names = as_named_zarr(array, list(axes))
    check_same(images_of(names, ReadOptions(channel)), expected)


def test_what_is_told_of_frames_goes_for_masks():
    told = ReadOptions(channel=2, axes="TCZYX", labels=True)
    check_same(images_of(VOLUMES, told), VOLUMES)


def test_bfloat16_tensors_are_exact():
    tensor = torch.tensor(VOLUMES[:, 0]).to(torch.bfloat16)
    check_same(images_of(tensor), tensor.float().numpy())


def test_one_image_is_computed_at_a_time():
    seen: list[int] = []

    def note(image: np.ndarray) -> np.ndarray:
        seen.append(int(image[0, 0, 0]))
        return image

    images = images_of(da.from_array(PLANES, chunks=(1, -1, -1)).map_blocks(note, meta=PLANES[:0]))
    assert seen == []
    images[3]
    assert seen == [PLANES[3, 0, 0]]


def test_dask_arrays_are_computed_in_the_thread_that_asks():
    """The threads of a pool would be gone after a fork, and waited for, for ever."""
    names: list[str] = []

    def note(image: np.ndarray) -> np.ndarray:
        names.append(threading.current_thread().name)
        return image

    images_of(da.from_array(PLANES, chunks=(1, -1, -1)).map_blocks(note, meta=PLANES[:0]))[0]
    assert set(names) == {threading.current_thread().name}


def test_masked_pixels_stay_masked():
    images = images_of(np.ma.masked_less(PLANES, 500))
    with pytest.raises(FrameError, match="masked"):
        frame_digest(images[0])
    with pytest.raises(FrameError, match="masked"):
        frame_digest(images_of([np.ma.masked_less(PLANES[0], 500)])[0])


def test_a_list_of_paths_is_one_of_image_files(tmp_path):
    names = ["second.tif", "first.tif"]
    for name, image in zip(names, PLANES, strict=False):
        tifffile.imwrite(tmp_path / name, image)
    images = images_of([tmp_path / names[0], str(tmp_path / names[1])])
    check_same(images, PLANES[:2])
    assert images.files_of(0) == (tmp_path / "second.tif",)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("pos/01", r"frames is the path 'pos/01': open it, by Movie\.open\(path\)"),
        (Path("pos/01"), r"open it, by Movie\.open"),
        (PLANES[0], r"shape \(20, 30\), one image: .*pass frames\[None\]"),
        (PLANES[0, 0], r"shape \(30,\): expected \(T, H, W\) or \(T, Z, H, W\)"),
        (PLANES[0].tolist(), r"frames\[0\] has shape \(30,\): .*pass \[image\]"),
        (iter(PLANES), r"a .*iterator, which can be read only once: pass list\(frames\)"),
        ((image for image in PLANES), r"a generator, which can be read only once"),
        ({0: PLANES[0]}, r"a dict: .*list\(frames\.values\(\)\)"),
        ({1, 2}, r"a set, which has no order"),
        (None, r"a NoneType: pass an array"),
        (7, r"a int: pass an array"),
        (PLANES[None, None], r"shape \(1, 1, 5, 20, 30\): .*such as frames\[:, 0\]"),
        *(
            (np.zeros((*front, count)), r"looks like channels: .*pass frames\[\.\.\., 0\]")
            for front in [(5, 20, 30), (20, 30)]
            for count in (1, 2, 3, 4)
        ),
        ([np.zeros((20, 30, 3))], r"frames\[0\] has shape .*pass image\[\.\.\., 0\]"),
        (np.array([PLANES[0], PLANES[1][:3]], object), "dtype object: .*are a list"),
        (np.array(["a", "b"]), "dtype <U1: expected bool"),
        (np.zeros((2, 3, 4), complex), "dtype complex128: expected bool"),
        ([PLANES[0], [[1, 2], [3]]], r"can't read frames\[1\]"),
        (["t0.tif", PLANES[0]], r"frames\[0\] is 't0\.tif' and frames\[1\] 'an image'"),
        (["pos/01", "pos/02"], r"'pos/01': a list of paths is one of image files"),
        ([PLANES[0], "t0.tif"], r"expected all paths or all images"),
    ],
)
def test_what_is_no_movie(wrong, message):
    with pytest.raises((FrameError, MovieError), match=message):
        images_of(wrong)


def test_kinds_that_are_wrong_are_type_errors():
    for wrong in ("pos/01", None, {}, iter([])):
        with pytest.raises(FrameTypeError):
            images_of(wrong)


def test_a_group_of_arrays(tmp_path):
    group = zarr.create_group(tmp_path / "group")
    with pytest.raises(FrameTypeError, match="a Group: pass one of the arrays in it"):
        images_of(group)


def test_a_named_array_without_time():
    named = as_named_zarr(PLANES, ["z", "y", "x"])
    with pytest.raises(MovieError, match=r"frames has axes ZYX .* and no time: .*axes='TYX'"):
        images_of(named)


def test_channels_are_chosen():
    named = as_named_zarr(VOLUMES, ["t", "c", "y", "x"])
    with pytest.raises(
        MovieError, match=r"frames has 3 channels .*: choose one, such as channel=0"
    ):
        images_of(named)
    with pytest.raises(MovieError, match="3 channels, and channel 3 was asked for: expected 0 to"):
        images_of(named, ReadOptions(channel=3))
    with pytest.raises(MovieError, match=r"3 channels .*: save the one that holds the labels"):
        images_of(named, ReadOptions(labels=True))
    with pytest.raises(MovieError, match="1 channel, and channel 1 was asked for"):
        images_of(PLANES, ReadOptions(channel=1))


@pytest.mark.parametrize("axes", ["TY", "TYXX", "TYQ", "TYY"])
def test_axes_that_make_no_movie(axes):
    with pytest.raises(MovieError, match="expected"):
        images_of(PLANES, ReadOptions(axes=axes))


def test_an_array_that_fails_when_it_is_read():
    def fail(block: np.ndarray) -> np.ndarray:
        raise OSError("the disk is gone")

    images = images_of(da.from_array(PLANES, chunks=(1, -1, -1)).map_blocks(fail, meta=PLANES[:0]))
    with pytest.raises(MovieError, match="can't read image 2: the disk is gone"):
        images[2]


@pytest.mark.parametrize("t", [5, -6])
def test_an_image_that_is_not_there(t):
    with pytest.raises(IndexError):
        images_of(PLANES)[t]


def save_two(file: Path) -> None:
    with file.open("wb") as opened:
        np.savez(opened, a=PLANES, b=PLANES)


class TestNpy:
    @pytest.mark.parametrize("movie", [PLANES, VOLUMES, np.asfortranarray(PLANES)])
    def test_is_the_same_movie(self, tmp_path, movie):
        np.save(tmp_path / "movie.npy", movie)
        images = open_npy(tmp_path / "movie.npy")
        check_same(images, movie)
        assert images.files_of(2) == (tmp_path / "movie.npy",)
        assert (images.name_of(2), images.place) == ("movie.npy[2]", str(tmp_path / "movie.npy"))

    def test_axes_are_told(self, tmp_path):
        np.save(tmp_path / "movie.npy", VOLUMES.transpose(2, 3, 0, 1))
        told = ReadOptions(axes="YXTC", channel=2)
        check_same(open_npy(tmp_path / "movie.npy", told), VOLUMES[:, 2])

    def test_a_pickle_is_small(self, tmp_path):
        np.save(tmp_path / "movie.npy", np.zeros((50, 64, 64)))
        images = open_npy(tmp_path / "movie.npy")
        pickled = pickle.dumps(images)
        assert len(pickled) < 2000
        check_same(pickle.loads(pickled), np.zeros((50, 64, 64)))

    def test_a_file_that_changes(self, tmp_path):
        np.save(tmp_path / "movie.npy", PLANES)
        images = open_npy(tmp_path / "movie.npy")
        np.save(tmp_path / "movie.npy", PLANES.transpose(0, 2, 1))
        with pytest.raises(MovieError, match="changed since it was opened"):
            images[0]

    @pytest.mark.parametrize(
        ("name", "write", "message"),
        [
            ("a_seg.npy", lambda file: file.touch(), "Cellpose .*export the masks as TIFF or PNG"),
            ("a.npy", lambda file: file.touch(), r"can't read .*a\.npy: damaged"),
            ("a.npy", lambda file: file.write_bytes(b"text"), "damaged, or not written by"),
            ("a.npy", lambda file: np.save(file, {"a": 1}), "damaged, or not written by"),
            ("a.npy", lambda file: np.save(file, PLANES[0]), r"shape \(20, 30\) and does not name"),
            ("a.npy", lambda file: np.save(file, np.zeros((5, 20, 30, 3))), "axes='TYXC' .*'TZYX'"),
            ("a.npy", lambda file: np.save(file, np.zeros((5, 20, 30, 1))), "looks like channels"),
            ("a.npy", lambda file: np.save(file, np.zeros((20, 30, 3))), "are, axes='TYX' .* is X"),
            ("a.npy", lambda file: np.save(file, np.array(["a"])), "holds <U1: expected"),
            ("a.npy", lambda file: save_two(file), "several arrays .*: save one by"),
            ("a.npy", lambda file: None, "can't read .*a.npy: No such file"),
        ],
    )
    def test_what_is_no_movie(self, tmp_path, name, write, message):
        write(tmp_path / name)
        with pytest.raises(MovieError, match=message):
            open_npy(tmp_path / name)

    def test_a_header_in_zeros(self, tmp_path):
        file = tmp_path / "movie.npy"
        np.save(file, PLANES)
        content = file.read_bytes()
        file.write_bytes(content[:43] + bytes(64) + content[107:])
        with pytest.raises(MovieError, match="damaged"):
            open_npy(file)

    @pytest.mark.parametrize("size", [0, 4, 60, 130, 400, 2000])
    def test_a_file_cut_short(self, tmp_path, size):
        file = tmp_path / "movie.npy"
        np.save(file, PLANES)
        file.write_bytes(file.read_bytes()[:size])
        with pytest.raises(MovieError, match="can't read"):
            open_npy(file)
