"""Folders as programs and people leave them: the right frames with the right masks, or one line.

Each goes through Python, the command ``warm`` and `wrap`; a third outcome there is none.
"""

from __future__ import annotations

import copy
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr

from feature_cache import FeatureCache, Movie, MovieError
from feature_cache.cli import main
from feature_cache.movies import write_movie
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

COUNT = 11
FRAMES, MASKS, TRACKS = make_movie(frames=COUNT, height=24, width=32, cells=3)
STACKS = np.stack([FRAMES, FRAMES[::-1], FRAMES // 2], axis=1)
LABELS = np.stack([MASKS] * 3, axis=1)
RIGHT = ""
"""Nothing to say: it is read."""


def write(folder: Path, names: str, images: Any, **options: Any) -> None:
    """Write a file for each time, its name made of the time."""
    folder.mkdir(parents=True, exist_ok=True)
    for t, image in enumerate(images):
        put = write_png if names.lower().endswith(".png") else tifffile.imwrite
        put(
            folder / names.format(t=t, t1=t + 1, t10=10 * t, day=t // 8, hour=3 * t % 24),
            image,
            **options,
        )


def write_png(file: Path, image: Any) -> None:
    file.write_bytes(imagecodecs.png_encode(image))


def truth(root: Path) -> Path:
    return Path(f"{root}_GT") / "TRA"


def named(frames: str, masks: str = "mask{t:03}.tif") -> Callable[[Path], None]:
    """Write frames and masks under names of a scheme."""

    def make(root: Path) -> None:
        write(root, frames, FRAMES)
        write(truth(root), masks, MASKS)

    return make


def stored(images: Any = FRAMES, labels: Any = MASKS, **options: Any) -> Callable[[Path], None]:
    """Write frames in a way that TIFFs are written."""

    def make(root: Path) -> None:
        write(root, "t{t:03}.tif", images, **options)
        write(truth(root), "man_track{t:03}.tif", labels, photometric="minisblack")

    return make


def labelled(images: Any = MASKS, **options: Any) -> Callable[[Path], None]:
    """Write masks in a way that TIFFs are written."""

    def make(root: Path) -> None:
        write(root, "t{t:03}.tif", FRAMES)
        write(truth(root), "man_track{t:03}.tif", images, **options)

    return make


def then(make: Callable[[Path], None], *changes: Callable[[Path], None]) -> Callable[[Path], None]:
    def both(root: Path) -> None:
        make(root)
        for change in changes:
            change(root)

    return both


def without(*patterns: str) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        for pattern in patterns:
            [file] = root.parent.glob(pattern)
            file.unlink()

    return change


def beside(name: str, content: bytes | Any = b"") -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root.parent / name
        file.parent.mkdir(exist_ok=True, parents=True)
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            tifffile.imwrite(file, content)

    return change


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        file = root.parent / name
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep)])

    return change


def thumbnails(root: Path) -> None:
    """Write a small first page into each file, marked as such."""
    truth_of = truth(root)
    write(truth_of, "m{t:03}.tif", MASKS)
    root.mkdir()
    for t, frame in enumerate(FRAMES):
        with tifffile.TiffWriter(root / f"t{t:03}.tif") as file:
            file.write(frame[::4, ::4], subfiletype=1, metadata=None)
            file.write(frame, metadata=None)


def ome_series(root: Path) -> None:
    """Write OME-TIFFs a timepoint, each of whose XML names them all."""
    write(truth(root), "m{t:03}.tif", MASKS)
    root.mkdir()
    planes = "".join(
        f'<TiffData FirstT="{t}" FirstZ="0" FirstC="0" IFD="0" PlaneCount="1">'
        f'<UUID FileName="t{t:03}.ome.tif">urn:uuid:00000000-0000-0000-0000-{t:012}</UUID>'
        "</TiffData>"
        for t in range(COUNT)
    )
    for t, frame in enumerate(FRAMES):
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" '
            f'UUID="urn:uuid:00000000-0000-0000-0000-{t:012}"><Image ID="Image:0">'
            '<Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="32" SizeY="24" '
            f'SizeC="1" SizeZ="1" SizeT="{COUNT}"><Channel ID="Channel:0:0" SamplesPerPixel="1"/>'
            f"{planes}</Pixels></Image></OME>"
        )
        tifffile.imwrite(root / f"t{t:03}.ome.tif", frame, description=xml, metadata=None)


def palette(root: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    stored((FRAMES // 8).astype(np.uint8), photometric="palette", colormap=colours)(root)


def palette_masks(root: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 65535, (3, 256)).astype(np.uint16)
    labelled(MASKS.astype(np.uint8), photometric="palette", colormap=colours)(root)


def img_folder(root: Path) -> None:
    write(root / "img", "t{t:03}.tif", FRAMES)
    write(root / "TRA", "man_track{t:03}.tif", MASKS)


def silver(*missing: int) -> Callable[[Path], None]:
    def change(root: Path) -> None:
        folder = Path(f"{root}_ST") / "SEG"
        write(folder, "man_seg{t:03}.tif", MASKS)
        for t in missing:
            (folder / f"man_seg{t:03}.tif").unlink()

    return change


def bytes_missing(root: Path) -> None:
    """Lower the count of bytes that a strip says to have."""
    stored()(root)
    file = root / "t003.tif"
    with tifffile.TiffFile(file, mode="r+b") as opened:
        tag = opened.pages[0].tags["StripByteCounts"]
        tag.overwrite(tuple(n - 1 for n in tag.value))


def pages_swapped_header(root: Path) -> None:
    """Have a file say that its directory starts behind its end."""
    stored()(root)
    file = root / "t004.tif"
    content = bytearray(file.read_bytes())
    content[4:8] = struct.pack("<I", len(content) + 100)
    file.write_bytes(content)


PADDED, PLAIN = "t{t:03}.tif", "t{t}.tif"
KINDS: dict[str, tuple[Callable[[Path], None], str]] = {
    # Names: right
    "Cell Tracking Challenge": (named(PADDED, "man_track{t:03}.tif"), RIGHT),
    "img and TRA in a folder": (img_folder, RIGHT),
    "names without padding": (named(PLAIN, "mask{t}.tif"), RIGHT),
    "padded frames, plain masks": (named(PADDED, "mask{t}.tif"), RIGHT),
    "plain frames, padded masks": (named(PLAIN), RIGHT),
    "numbers alone": (named("{t}.tif", "{t:04}.tif"), RIGHT),
    "from 1 on": (named("t{t1}.tif", "mask{t1:03}.tif"), RIGHT),
    "in steps of ten": (named("t{t10:04}.tif", "mask{t10}.tif"), RIGHT),
    "a constant behind the time": (named("t{t:03}_c1.tif", "t{t:03}_c1_mask.tif"), RIGHT),
    "a constant before it": (named("pos3_t{t}.tif", "pos3_t{t:02}.tif"), RIGHT),
    "Micro-Manager 1.4": (named("img_{t:09}_Default_000.tif"), RIGHT),
    "Micro-Manager 2": (named("img_channel000_position000_time{t:09}_z000.tif"), RIGHT),
    "ImageJ sequence": (named("movie{t:04}.tif"), RIGHT),
    "MetaMorph": (named("exp_w1GFP_s1_t{t1}.TIF", "mask{t1}.tif"), RIGHT),
    "Incucyte": (
        named("V_A1_1_{day:02}d{hour:02}h00m.tif", "M_A1_1_{day:02}d{hour:02}h00m.tif"),
        RIGHT,
    ),
    "CellProfiler masks": (named(PADDED, "t{t:03}_Objects.tiff"), RIGHT),
    "Opera Phenix": (named("r01c01f01p01-ch1sk{t1}fk1fl1.tiff", "mask{t1}.tif"), RIGHT),
    "capital endings": (named("t{t:03}.TIFF", "m{t:03}.Tif"), RIGHT),
    "PNG": (named("t{t:03}.png", "m{t:03}.png"), RIGHT),
    "PNG masks of TIFF frames": (named(PADDED, "m{t:03}.PNG"), RIGHT),
    "spaces and brackets": (named("my movie ({t}).tif"), RIGHT),
    "twins of macOS": (
        then(
            named(PADDED), beside("01/._t000.tif", b"\0\5\26\7"), beside("01_GT/TRA/._mask000.tif")
        ),
        RIGHT,
    ),
    "notes beside the frames": (
        then(named(PADDED), beside("01/notes.txt"), beside("01/Thumbs.db")),
        RIGHT,
    ),
    "silver truth": (then(named(PADDED), silver()), RIGHT),
    "the last time is missing on both sides": (
        then(named(PADDED), without("01/t010.tif", "01_GT/TRA/mask010.tif")),
        RIGHT,
    ),
    # Names: refused
    "a frame is missing": (
        then(named(PADDED), without("01/t004.tif")),
        r"mask004\.tif has no frame\b",
    ),
    "a mask is missing": (
        then(named(PLAIN), without("01_GT/TRA/mask000.tif")),
        r"t0\.tif has no mask\b",
    ),
    "one is missing on each side": (
        then(named(PADDED), without("01/t000.tif", "01_GT/TRA/mask010.tif")),
        r"t001\.tif in .* would go with mask000\.tif",
    ),
    "one is missing, with a number behind": (
        then(
            named("t{t:03}_c1.tif", "t{t:03}_c1.tif"),
            without("01/t003_c1.tif", "01_GT/TRA/t008_c1.tif"),
        ),
        r"t004_c1\.tif in .* would go with t003_c1\.tif",
    ),
    "a hole on both sides": (
        then(named(PADDED), without("01/t004.tif", "01_GT/TRA/mask004.tif")),
        r"no frames between t003\.tif and t005\.tif",
    ),
    "numbers that differ by one": (named("t{t1:03}.tif"), r"would go with"),
    "two channels": (
        then(named("t{t:03}_c0.tif"), lambda root: write(root, "t{t:03}_c1.tif", FRAMES)),
        "differ in 2 numbers",
    ),
    "two channels by name": (
        then(
            named("img_{t:09}_DAPI_000.tif"),
            lambda root: write(root, "img_{t:09}_GFP_000.tif", FRAMES),
        ),
        "several kinds",
    ),
    "cellpose masks beside the frames": (
        then(named(PADDED), lambda root: write(root, "t{t:03}_cp_masks.tif", MASKS)),
        "several kinds",
    ),
    "slices as files": (named("a_z{t:03}.tif", "a_z{t:03}.tif"), "look like slices"),
    "a time twice": (then(named(PLAIN), beside("01/t01.tif", FRAMES[0])), "of the same time"),
    "a projection beside the frames": (
        then(named(PADDED), beside("01/MAX.tif", FRAMES[0])),
        "several kinds",
    ),
    "previews beside the frames": (then(named(PADDED), beside("01/t000.png")), "several formats"),
    "names without a number": (
        then(
            named(PADDED),
            lambda root: [
                f.rename(f.with_stem("abcdefghijk"[i]))
                for i, f in enumerate(sorted(root.glob("*.tif")))
            ],
        ),
        "several kinds",
    ),
    "silver truth of other times": (then(named(PADDED), silver(3)), "no silver mask"),
    "no masks": (lambda root: write(root, PADDED, FRAMES), "has no masks 'TRA'"),
    "no frames": (lambda root: (root.mkdir(), write(truth(root), PADDED, MASKS)), "has no frames"),
    "frames of JPEG": (
        then(lambda root: write(truth(root), PADDED, MASKS), beside("01/t000.jpg")),
        r"found \.jpg",
    ),
    # Files: right
    "big-endian": (stored(byteorder=">"), RIGHT),
    "BigTIFF": (stored(bigtiff=True), RIGHT),
    "LZW": (stored(compression="lzw"), RIGHT),
    "deflate with a predictor": (stored(compression="zlib", predictor=True), RIGHT),
    "zstd": (stored(compression="zstd"), RIGHT),
    "packbits": (stored(compression="packbits"), RIGHT),
    "tiles": (stored(tile=(16, 16)), RIGHT),
    "strips of a row": (stored(rowsperstrip=1), RIGHT),
    "float32": (stored(FRAMES.astype(np.float32)), RIGHT),
    "float64": (stored(FRAMES / 3), RIGHT),
    "8 bit": (stored((FRAMES // 8).astype(np.uint8)), RIGHT),
    "signed": (stored(FRAMES.astype(np.int16) - 200), RIGHT),
    "masks of 32 bit": (labelled(MASKS.astype(np.int32)), RIGHT),
    "masks of 8 bit": (labelled(MASKS.astype(np.uint8)), RIGHT),
    "masks in float": (labelled(MASKS.astype(np.float32)), RIGHT),
    "masks with a palette": (palette_masks, RIGHT),
    "without metadata": (stored(metadata=None), RIGHT),
    "written as ImageJ": (stored(imagej=True), RIGHT),
    "written as OME": (stored(ome=True), RIGHT),
    "OME files that name the whole series": (ome_series, RIGHT),
    "a thumbnail first": (thumbnails, RIGHT),
    "volumes of 3 slices": (stored(STACKS, LABELS), RIGHT),
    "volumes of 3 slices by ImageJ": (
        stored(STACKS, LABELS, imagej=True, metadata={"axes": "ZYX"}),
        RIGHT,
    ),
    # Files: refused
    "RGB": (stored(np.stack([FRAMES // 8] * 3, -1).astype(np.uint8), photometric="rgb"), "channel"),
    "channels by ImageJ": (
        stored(STACKS, LABELS, imagej=True, metadata={"axes": "CYX"}),
        "channel",
    ),
    "channels by OME": (stored(STACKS, LABELS, ome=True, metadata={"axes": "CYX"}), "channel"),
    "a movie in each file": (
        stored(STACKS, LABELS, imagej=True, metadata={"axes": "TYX"}),
        "timepoint",
    ),
    "a palette": (palette, "palette"),
    "min-is-white": (
        stored((FRAMES // 8).astype(np.uint8), photometric="miniswhite"),
        "min-is-white",
    ),
    "complex numbers": (stored(FRAMES.astype(np.complex64)), "complex"),
    "NaN": (stored(np.where(FRAMES > 300, np.nan, FRAMES).astype(np.float32)), "NaN"),
    "a file cut in half": (then(stored(), cut("01/t005.tif", 0.5)), "cut short, or damaged"),
    "a file cut by a byte": (then(stored(), cut("01/t005.tif", 0.9999)), "cut short, or damaged"),
    "an empty file": (then(stored(), cut("01/t005.tif", 0)), r"t005\.tif"),
    "a compressed mask cut": (
        then(labelled(compression="zlib"), cut("01_GT/TRA/man_track002.tif", 0.8)),
        "cut short",
    ),
    "strips of too few bytes": (bytes_missing, r"t003\.tif"),
    "a directory behind the end": (pages_swapped_header, r"t004\.tif"),
    "text in place of a TIFF": (
        then(stored(), beside("01/t006.tif", b"no image at all")),
        r"t006\.tif",
    ),
    "masks of halves": (labelled(MASKS / 2), "no labels"),
    "masks below zero": (labelled(-MASKS.astype(np.int16)), "labels from"),
    "masks of another shape": (labelled(MASKS[:, :20]), "expected the same"),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """A `CTCData`, to be told that it read another folder."""
    pytest.importorskip("trackastra")
    from joblib import parallel_config
    from trackastra.data import CTCData

    root = tmp_path_factory.mktemp("loaded") / "01"
    write_movie(root, FRAMES, MASKS, TRACKS)
    with parallel_config(backend="sequential"):
        return CTCData(str(root), window_size=2)


def run_command(monkeypatch: Any, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["feature-cache", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.filterwarnings("ignore:.*are stored as RGB:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_python_warm_and_wrap_agree(kind, tmp_path, monkeypatch, capsys, loaded):
    make, message = KINDS[kind]
    root = tmp_path / "01"
    make(root)
    backbone, cache = FakeBackbone(), FeatureCache(tmp_path / "python")
    command = [
        "warm",
        str(root),
        "--cache",
        str(tmp_path / "command"),
        "--backbone",
        "debug/random",
    ]
    status = run_command(monkeypatch, *command)
    out, err = capsys.readouterr()
    if message:
        with pytest.raises((MovieError, ValueError), match=message) as raised:
            cache.get_or_compute(root, backbone=backbone)
        assert "\n" not in str(raised.value)
        assert status in (1, 2)
        assert re.search(message, err)
        assert "Traceback" not in err
    else:
        check_pixels(root)
        records = cache.get_or_compute(root, backbone=backbone)
        assert [record.labels.tolist() for record in records] == [[1, 2, 3]] * len(records)
        assert status == 0, err
        assert f"{len(records)} records: 0 were there, {len(records)} computed" in out
    check_wrap(root, cache, backbone, loaded, kind, message)


def check_pixels(root: Path) -> None:
    """Compare with what was written, up to the kind's own scale and dtype."""
    movie = Movie.open(root)
    for t in range(len(movie)):
        frame, mask = movie.frames[t].astype(float), movie.masks[t]
        plane = frame if frame.ndim == 2 else frame[0]
        assert np.array_equal(mask if mask.ndim == 2 else mask[0], MASKS[t])
        variants = [FRAMES[t], FRAMES[t] // 8, FRAMES[t] - 200.0, FRAMES[t] / 3]
        assert any(np.array_equal(plane, variant) for variant in variants)
        if frame.ndim == 3:
            assert np.array_equal(frame, STACKS[t])


def check_wrap(
    root: Path, cache: FeatureCache, backbone: FakeBackbone, loaded: Any, kind: str, message: str
) -> None:
    """See that `wrap` reads the frames that were computed, in that order, or refuses."""
    from feature_cache.trackastra import wrap

    data = copy.copy(loaded)
    data.root = root
    if message:
        if not re.search(
            "man_track|masks? (of|in|below|cut)", f"{message} {kind}"
        ):  # which it holds
            with pytest.raises((MovieError, ValueError)):
                wrap(data, cache, backbone, on_miss="error")[0]
        return
    movie = Movie.open(root)
    masks = [movie.masks[t] for t in range(len(movie))]
    data.det_masks = {"TRA": np.stack(masks) if masks[0].ndim == 3 else np.stack(masks)[:, None]}
    data.windows, data.end_frame = data.windows[: len(masks) - 1], len(masks)
    folders = [movie.frames.source.files[0].parent, movie.masks.source.files[0].parent]
    in_order = all(
        [file.name for file in sorted(folder.glob("*.tif"))]
        == [images.name_of(t) for t in range(len(movie))]
        for folder, images in zip(folders, (movie.frames, movie.masks), strict=True)
    )
    if not in_order:  # `CTCData` sorts as text, and knows *.tif alone
        with pytest.raises(MovieError, match="CTCData reads"):
            wrap(data, cache, backbone)
        return
    wrapped = wrap(data, cache, backbone, on_miss="error")
    assert wrapped.feature_cache_extras.tokens.movies[0].contains().all()


def test_there_are_enough_kinds():
    refused = [kind for kind, (_, message) in KINDS.items() if message]
    assert len(KINDS) >= 80
    assert len(refused) >= 30


STACK_FILES: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "ImageJ": (
        lambda file: tifffile.imwrite(file, FRAMES, imagej=True, metadata={"axes": "TYX"}),
        {},
        RIGHT,
    ),
    "OME": (
        lambda file: tifffile.imwrite(file, FRAMES, ome=True, metadata={"axes": "TYX"}),
        {},
        RIGHT,
    ),
    "unnamed axes": (lambda file: tifffile.imwrite(file, FRAMES), {}, "axes="),
    "unnamed axes, told": (lambda file: tifffile.imwrite(file, FRAMES), {"axes": "TYX"}, RIGHT),
    "slices of ImageJ": (
        lambda file: tifffile.imwrite(file, FRAMES, imagej=True, metadata={"axes": "ZYX"}),
        {},
        "axes=",
    ),
    "channels": (
        lambda file: tifffile.imwrite(file, STACKS, imagej=True, metadata={"axes": "TCYX"}),
        {},
        "channel",
    ),
    "a channel": (
        lambda file: tifffile.imwrite(file, STACKS, imagej=True, metadata={"axes": "TCYX"}),
        {"channel": 0},
        RIGHT,
    ),
}


@pytest.mark.parametrize("kind", STACK_FILES)
def test_stacks_in_one_file(kind, tmp_path):
    make, options, message = STACK_FILES[kind]
    make(tmp_path / "movie.tif")
    tifffile.imwrite(tmp_path / "masks.tif", MASKS)
    zarr.save_array(str(tmp_path / "masks.zarr"), MASKS)
    for masks in ("masks.tif", "masks.zarr"):
        if message:
            with pytest.raises(MovieError, match=message):
                Movie.open(tmp_path / "movie.tif", tmp_path / masks, **options)
            continue
        movie = Movie.open(tmp_path / "movie.tif", tmp_path / masks, **options)
        assert all(np.array_equal(movie.frames[t], FRAMES[t]) for t in range(COUNT))
        assert all(np.array_equal(movie.masks[t], MASKS[t]) for t in range(COUNT))


def test_masks_that_fit_no_axes_say_what_is_wrong_with_their_file(tmp_path):
    tifffile.imwrite(tmp_path / "movie.tif", STACKS, imagej=True, metadata={"axes": "TZYX"})
    tifffile.imwrite(tmp_path / "masks.tif", MASKS)
    with pytest.raises(MovieError, match=r"masks\.tif does not say what all its axes are"):
        Movie.open(tmp_path / "movie.tif", tmp_path / "masks.tif")
