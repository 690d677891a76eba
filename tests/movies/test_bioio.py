"""Files of microscopes are the movie that their pixels are: files of Zeiss written here."""

from __future__ import annotations

import multiprocessing
import pickle
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from feature_cache import MovieError, MovieNotFoundError
from feature_cache.errors import MissingDependencyError
from feature_cache.hashing import frame_digest
from feature_cache.movies import ReadOptions
from feature_cache.movies.arrays import images_of
from feature_cache.movies.bioformats import open_bioio
from test_zarr import check_same, read_after_fork

VOLUMES = np.random.default_rng(0).integers(0, 60000, (4, 2, 3, 40, 50)).astype(np.uint16)
"""(T, C, Z, Y, X)."""

pytest.importorskip("bioio_czi", reason="needs the extra bioio")


def write_czi(file: Path, movie: np.ndarray, scenes: int = 1) -> Path:
    from pylibCZIrw import czi

    with czi.create_czi(str(file)) as opened:
        for scene in range(scenes):
            for t, c, z in np.ndindex(movie.shape[:3]):
                plane = movie[t, c, z]
                opened.write(
                    plane if plane.ndim == 3 else plane[..., None],
                    plane={"T": t, "C": c, "Z": z},
                    location=(1000 * scene, 0),
                    **({"scene": scene} if scenes > 1 else {}),
                )
        opened.write_metadata("movie")
    return file


def tag(name: str, *inside: str, **attributes: object) -> str:
    told = "".join(f' {key}="{value}"' for key, value in attributes.items())
    return f"<{name}{told}>{''.join(inside)}</{name}>"


def lif_element(name: str, image: np.ndarray) -> str:
    """Describe an image (T, C, Z, Y, X) uint16 as Leica does."""
    steps = dict(zip("TCZYX", zip(image.shape, image.strides, strict=True), strict=True))
    channels = [
        tag(
            "ChannelDescription",
            DataType=0,
            ChannelTag=0,
            Resolution=16,
            Min=0,
            Max=1,
            Unit="",
            NameOfMeasuredQuantity="",
            LUTName="Gray",
            IsLUTInverted=0,
            BitInc=0,
            BytesInc=channel * steps["C"][1],
        )
        for channel in range(steps["C"][0])
    ]
    dimensions = [
        tag(
            "DimensionDescription",
            DimID=number,
            NumberOfElements=steps[axis][0],
            BytesInc=steps[axis][1],
            Origin=0,
            Length=1,
            Unit="m",
            BitInc=0,
        )
        for number, axis in ((1, "X"), (2, "Y"), (3, "Z"), (4, "T"))
    ]
    described = tag("Channels", *channels) + tag("Dimensions", *dimensions)
    data = tag("Data", tag("Image", tag("ImageDescription", described)))
    memory = tag("Memory", Size=image.nbytes, MemoryBlockID=f"Mem{name}")
    return tag("Element", data, memory, Name=name)


def write_lif(file: Path, images: dict[str, np.ndarray]) -> Path:
    """Write images as a file of Leica: XML that describes them, and a block of memory each."""
    children = tag("Children", *(lif_element(*item) for item in images.items()))
    project = tag("Element", children, Name="project")
    parts = [(tag("LMSDataContainerHeader", project, Version=2), b"", b"")]
    for name, image in images.items():
        parts.append((f"Mem{name}", struct.pack("<BQ", 0x2A, image.nbytes), image.tobytes()))
    with file.open("wb") as opened:
        for text, size, pixels in parts:
            head = size + struct.pack("<BI", 0x2A, len(text)) + text.encode("utf-16-le")
            opened.write(struct.pack("<II", 0x70, len(head)) + head + pixels)
    return file


@pytest.mark.parametrize("channel", [0, 1])
def test_volumes_of_a_channel(tmp_path, channel):
    images = open_bioio(write_czi(tmp_path / "movie.czi", VOLUMES), ReadOptions(channel))
    check_same(images, VOLUMES[:, channel])
    assert images.files_of(1) == (tmp_path / "movie.czi",)
    assert images.name_of(1) == "movie.czi[1]"
    assert images.place == str(tmp_path / "movie.czi")
    assert "bioio-czi" in images.recipe
    assert f"channel {channel}" in images.recipe


def test_planes(tmp_path):
    file = write_czi(tmp_path / "MOVIE.CZI", VOLUMES[:, :1, :1].astype(np.uint8))
    check_same(open_bioio(file), VOLUMES[:, 0, 0].astype(np.uint8))


def test_channels_are_chosen(tmp_path):
    file = write_czi(tmp_path / "movie.czi", VOLUMES)
    with pytest.raises(MovieError, match=r"has 2 channels .*: choose one, such as channel=0"):
        open_bioio(file)
    with pytest.raises(MovieError, match="channel 2 was asked for: expected 0 to 1"):
        open_bioio(file, ReadOptions(channel=2))


def test_a_colour_image(tmp_path):
    colour = np.zeros((2, 1, 1, 40, 50, 3), np.uint8)
    with pytest.raises(MovieError, match=r"has 3 channels \(axes TCZYXS"):
        open_bioio(write_czi(tmp_path / "movie.czi", colour))


def test_leica(tmp_path):
    file = write_lif(tmp_path / "movie.lif", {"one": VOLUMES})
    images = open_bioio(file, ReadOptions(channel=1))
    check_same(images, VOLUMES[:, 1])
    assert "bioio-lif" in images.recipe
    write_lif(file, {"one": VOLUMES, "two": VOLUMES})
    with pytest.raises(MovieError, match=r"has 2 scenes \(.*one.*two\):"):
        open_bioio(file, ReadOptions(channel=1))


def test_several_scenes(tmp_path):
    file = write_czi(tmp_path / "movie.czi", VOLUMES, scenes=2)
    with pytest.raises(MovieError, match=r"has 2 scenes \(.*\): a movie is one; export each"):
        open_bioio(file, ReadOptions(channel=0))


@pytest.mark.parametrize("suffix", [".czi", ".nd2", ".lif"])
def test_what_is_no_such_file(tmp_path, suffix):
    file = tmp_path / f"movie{suffix}"
    with pytest.raises(MovieNotFoundError, match="no such file"):
        open_bioio(file)
    for content in (b"", b"II*\0 and something else"):
        file.write_bytes(content)
        with pytest.raises(MovieError, match=r"can't read .*restore the file or leave it out"):
            open_bioio(file)


def test_a_file_cut_short(tmp_path):
    """At any place: the right pixels, or an error."""
    file = write_czi(tmp_path / "movie.czi", VOLUMES[:, :1])
    whole, errors = file.read_bytes(), 0
    for size in range(len(whole) - 1, 0, -len(whole) // 12):
        file.write_bytes(whole[:size])
        try:
            images = [open_bioio(file)[t] for t in range(4)]
        except MovieError:
            errors += 1
        else:
            check_same(images_of(images), VOLUMES[:, 0])
    assert errors > 10


def test_a_file_that_changes(tmp_path):
    file = write_czi(tmp_path / "movie.czi", VOLUMES[:, :1])
    images = open_bioio(file)
    images[0]
    file.unlink()
    write_czi(file, VOLUMES[:2, :1])
    with pytest.raises(MovieError, match="changed since it was opened"):
        images[0]
    check_same(open_bioio(file), VOLUMES[:2, 0])


@pytest.mark.parametrize("package", ["bioio", "bioio_czi"])
def test_a_package_that_is_missing(tmp_path, monkeypatch, package):
    file = write_czi(tmp_path / "movie.czi", VOLUMES)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError, match=r'pip install "feature-cache\[bioio\]"'):
        open_bioio(file)


class TestShared:
    @pytest.fixture
    def images(self, tmp_path: Path) -> Any:
        return open_bioio(write_czi(tmp_path / "movie.czi", VOLUMES), ReadOptions(channel=1))

    def test_pickles_are_small(self, images):
        pickled = pickle.dumps(images)
        assert len(pickled) < 1000
        check_same(pickle.loads(pickled), VOLUMES[:, 1])

    def test_threads(self, images):
        times = list(range(4)) * 10
        with ThreadPoolExecutor(4) as pool:
            read = list(pool.map(images.__getitem__, times))
        for t, image in zip(times, read, strict=True):
            assert frame_digest(image) == frame_digest(VOLUMES[t, 1])

    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_right_after_a_fork(self, images):
        images[0]
        context = multiprocessing.get_context("fork")
        digests = context.Queue()
        child = context.Process(target=read_after_fork, args=(images, digests))
        child.start()
        found = [digests.get(timeout=60) for _ in range(4)]
        child.join()
        assert found == [frame_digest(image) for image in VOLUMES[:, 1]]
