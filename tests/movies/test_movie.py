from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st

from feature_cache import (
    FeatureCache,
    FrameError,
    Movie,
    MovieError,
    MovieNotFoundError,
    NoMasksError,
)
from feature_cache.movies import link_by_overlap, read_tracks, tracks_of_labels, write_movie
from feature_cache.testing import FakeBackbone
from synthetic import make_movie


def truth_of(root: Path) -> Path:
    return Path(f"{root}_GT") / "TRA"


def test_reads_what_was_written(small_folder):
    root = small_folder()
    frames, masks, tracks = make_movie()
    movie = Movie.open(root)
    assert len(movie) == len(frames)
    for t in range(len(movie)):
        assert np.array_equal(movie.frames[t], frames[t])
        assert movie.frames[t].dtype == np.uint16
        assert np.array_equal(movie.masks[t], masks[t])
        assert movie.masks[t].dtype == np.int32
    assert np.array_equal(movie.tracks, tracks)
    assert movie.frames.name_of(3) == "t003.tif"


def test_opening_reads_no_image(small_folder):
    root = small_folder()
    for file in root.glob("*.tif"):
        file.write_bytes(b"broken")
    movie = Movie.open(root)
    with pytest.raises(MovieError, match=r"t002\.tif is cut short, or damaged"):
        movie.frames[2]


@pytest.mark.parametrize("form", ["01", "01_GT/TRA", "01_ERR_SEG", "img"])
def test_layouts(small_folder, form):
    root = small_folder()
    if form == "01_ERR_SEG":
        shutil.move(truth_of(root), f"{root}_ERR_SEG")
    if form == "img":
        (root / "img").mkdir()
        for file in list(root.glob("*.tif")):
            shutil.move(file, root / "img")
        shutil.move(truth_of(root), root / "TRA")
    path = root if form == "img" else root.parent / form
    movie = Movie.open(path)
    assert np.array_equal(movie.frames[1], make_movie()[0][1])
    assert np.array_equal(movie.masks[1], make_movie()[1][1])


def test_slices_and_downscaling(small_folder):
    root = small_folder(frames=10)
    frames, masks, _ = make_movie(frames=10)
    movie = Movie.open(root, slice_pct=(0.2, 0.9), downscale_temporal=2, downscale_spatial=3)
    expected = frames[2:9:2, ::3, ::3]
    assert len(movie) == len(expected)
    assert np.array_equal(movie.frames[3], expected[3])
    assert np.array_equal(movie.masks[3], masks[2:9:2, ::3, ::3][3])


def add_silver_truth(root: Path) -> None:
    folder = Path(f"{root}_ST") / "SEG"
    folder.mkdir(parents=True)
    for file in sorted(truth_of(root).glob("*.tif")):
        mask = tifffile.imread(file)
        mask[40:46, 50:60] = 5
        tifffile.imwrite(folder / file.name.replace("track", "seg"), mask)


@pytest.mark.parametrize("form", ["plain", "silver", "img", "detections"])
def test_masks_are_those_of_trackastra(small_folder, form):
    """What is warmed by path must have the keys of what is trained on."""
    from joblib import parallel_config
    from trackastra.data import CTCData

    root = small_folder()
    detections = "TRA"
    if form == "silver":
        add_silver_truth(root)
    if form == "img":
        (root / "img").mkdir()
        for file in list(root.glob("*.tif")):
            shutil.move(file, root / "img")
        shutil.move(truth_of(root), root / "TRA")
    if form == "detections":
        shutil.copytree(truth_of(root), f"{root}_ERR_SEG")
        detections = "ERR_SEG"
    with parallel_config(backend="sequential"):
        data = CTCData(str(root), window_size=3, detection_folders=[detections])
    movie = Movie.open(root, detections=detections)
    masks = data.det_masks[detections]
    assert len(masks) == len(movie)
    assert all(np.array_equal(movie.masks[t], masks[t]) for t in range(len(movie)))


def remove(*patterns):
    def change(root: Path) -> None:
        for pattern in patterns:
            for path in list(root.parent.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def other_shape(root: Path) -> None:
    tifffile.imwrite(truth_of(root) / "man_track002.tif", np.zeros((3, 3), np.uint16))


def half_labels(root: Path) -> None:
    tifffile.imwrite(truth_of(root) / "man_track002.tif", np.full((48, 64), 0.5, np.float32))


@pytest.mark.parametrize("form", ["exp_1_GT/TRA", "exp_1_ERR_SEG", "exp_1/TRA"])
def test_a_name_with_underlines_is_no_other_movie(tmp_path, form):
    frames, masks, tracks = make_movie(frames=3)
    for name in ("exp", "exp_1"):
        write_movie(tmp_path / name, frames + (name == "exp"), masks, tracks)
        for folder in (f"{name}_ERR_SEG", f"{name}/TRA"):
            shutil.copytree(tmp_path / f"{name}_GT" / "TRA", tmp_path / folder)
    movie = Movie.open(tmp_path / form)
    assert movie.root == tmp_path / "exp_1"
    assert np.array_equal(movie.frames[1], frames[1])


def test_other_detections_than_those_in_the_path(tmp_path):
    """As in a training that names ``01_GT/TRA``, and folders of detections beside it."""
    frames, masks, tracks = make_movie(frames=2)
    write_movie(tmp_path / "01", frames, masks, tracks)
    write_movie(tmp_path / "other", frames, masks + (masks > 0), tracks)
    shutil.copytree(truth_of(tmp_path / "other"), tmp_path / "01_ERR_SEG")
    for path, detections, found in [
        ("01_GT/TRA", "TRA", "TRA"),
        ("01_GT/TRA", "ERR_SEG", "ERR_SEG"),
        ("01_ERR_SEG", "TRA", "ERR_SEG"),
        ("01_ERR_SEG", "ERR_SEG", "ERR_SEG"),
        ("01", "ERR_SEG", "ERR_SEG"),
    ]:
        movie = Movie.open(tmp_path / path, detections=detections)
        assert movie.name == f"{tmp_path / '01'} {found}"
        assert movie.source.detections == movie.detections == found
        assert np.array_equal(movie.masks[0], masks[0] + (masks[0] > 0) * (found == "ERR_SEG"))
    with pytest.raises(NoMasksError, match="01 has no masks 'GONE'"):
        Movie.open(tmp_path / "01_GT" / "TRA", detections="GONE")


@pytest.mark.parametrize("named", [{"detections": ""}, {"detections": "."}, {"masks": "01"}])
def test_frames_are_not_their_own_masks(small_folder, monkeypatch, named):
    monkeypatch.chdir(small_folder(frames=2).parent)
    with pytest.raises(MovieError, match="01 was named for the frames and for the masks: name"):
        Movie.open("01", **named)
    tifffile.imwrite("movie.tif", make_movie()[0], metadata={"axes": "TYX"})
    with pytest.raises(MovieError, match=r"movie\.tif was named for the frames and for the masks"):
        Movie.open("movie.tif", "movie.tif")


def test_places_in_the_current_folder(small_folder, monkeypatch):
    root = small_folder(frames=3)
    monkeypatch.chdir(f"{root}_GT")
    assert Movie.open("TRA").root == root


def test_an_only_file_says_whether_its_planes_are_times(tmp_path):
    frames, masks, tracks = make_movie(frames=5)
    write_movie(tmp_path / "01", frames[None], masks[None], tracks)
    assert Movie.open(tmp_path / "01").frames.shape == frames.shape
    tifffile.imwrite(tmp_path / "01" / "t000.tif", frames)
    with pytest.raises(MovieError, match=r"only frame, and .* open the file itself .*TYX.*ZYX"):
        Movie.open(tmp_path / "01")
    assert Movie.open(tmp_path / "01", axes="ZYX").frames.shape == frames.shape


def test_links_that_lead_nowhere_are_missing_frames(small_folder):
    root = small_folder(frames=4)
    (root / "t003.tif").unlink()
    (root / "t003.tif").symlink_to("gone.tif")
    with pytest.raises(MovieError, match=r"can't read .*t003\.tif"):
        Movie.open(root, detections=None).frames[3]


@pytest.mark.parametrize(
    ("path", "part", "message"),
    [("x" * 300, (0, 1), "too long"), ("01", (0.1, 0.2), r"slice_pct .* leaves none of 4 frames")],
)
def test_what_gives_no_frame(small_folder, path, part, message):
    root = small_folder(frames=4)
    with pytest.raises(MovieError, match=message):
        Movie.open(root.parent / path, slice_pct=part)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (remove("01"), MovieNotFoundError, "no movie at .*01: no such folder"),
        (remove("01_GT"), MovieError, "has no masks 'TRA': looked for .*01_GT/TRA"),
        (remove("01/*.tif"), MovieError, r"01 has no frames: expected images \(\.tif"),
        (remove("01_GT/TRA/*.tif"), MovieError, "has no masks"),
        (
            remove("01/t004.tif"),
            MovieError,
            r"has 5 frames and .* has 6 masks \(man_track004\.tif has no frame\)",
        ),
    ],
)
def test_what_is_missing_is_named_when_opening(small_folder, change, error, message):
    root = small_folder()
    change(root)
    with pytest.raises(error, match=message):
        Movie.open(root)


def test_masks_of_arrays_at_a_place_that_cannot_be_looked_into(small):
    with pytest.raises(MovieError, match=r"can't look into x{300}: .* too long"):
        Movie.of(small[0], "x" * 300)


def test_a_list_of_masks_is_read_as_their_folder_is(tmp_path, small):
    (tmp_path / "masks").mkdir()
    files = [tmp_path / "masks" / f"{t}.tif" for t in range(len(small[1]))]
    for file, mask in zip(files, small[1], strict=True):
        tifffile.imwrite(file, mask.astype(np.float32))
    for masks in (files, tmp_path / "masks"):
        found = Movie.of(small[0], masks).masks[1]
        assert found.dtype == np.int32
        assert np.array_equal(found, small[1][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slice_pct": 0.5}, "slice_pct is 0.5, expected 0 <= from < to <= 1"),
        ({"downscale_temporal": 2.0}, r"downscale is \(2.0, 1\) \(time, space\), expected whole"),
        ({"channel": "0"}, "channel is '0', expected a whole number from 0 on"),
        ({"axes": ("T", "Y", "X")}, r"axes is \('T', 'Y', 'X'\), expected text as 'TYX'"),
    ],
)
def test_options_of_another_kind(small_folder, options, message):
    with pytest.raises(MovieError, match=message):
        Movie.open(small_folder(frames=1), **options)


def test_a_mask_of_another_shape(small_folder, cache):
    from feature_cache.testing import FakeBackbone

    root = small_folder()
    other_shape(root)
    movie = Movie.open(root)
    with pytest.raises(MovieError, match=r"frame 2 of .*01 \(t002.tif\) has shape \(48, 64\)"):
        cache.get_or_compute(movie.frames, movie.masks, FakeBackbone())


def test_a_mask_that_holds_no_labels(small_folder):
    root = small_folder()
    half_labels(root)
    with pytest.raises(
        MovieError, match=r"float32 values that are no labels, such as 0.5: expected whole"
    ):
        Movie.open(root).masks[2]


def test_silver_truth_of_another_length(small_folder):
    root = small_folder()
    add_silver_truth(root)
    (Path(f"{root}_ST") / "SEG" / "man_seg003.tif").unlink()
    with pytest.raises(
        MovieError,
        match=r"SEG has 5 silver masks \(man_track003\.tif has no silver mask\): expected as many",
    ):
        Movie.open(root)


def test_frames_and_masks_of_other_times_are_no_pairs(small_folder):
    root = small_folder()
    (root / "t000.tif").unlink()
    (truth_of(root) / "man_track005.tif").unlink()
    with pytest.raises(MovieError, match=r"t001\.tif in .* would go with man_track000\.tif"):
        Movie.open(root)
    (truth_of(root) / "man_track000.tif").rename(truth_of(root) / "man_track005.tif")
    assert len(Movie.open(root)) == 5


def test_masks_of_a_stack_that_lack_a_time(small_folder, small):
    """As many as frames, but all behind the gap would go with another frame."""
    root = small_folder()
    (truth_of(root) / "man_track005.tif").rename(truth_of(root) / "man_track006.tif")
    tifffile.imwrite(root.with_name("movie.tif"), small[0], metadata={"axes": "TYX"})
    for frames in (root.with_name("movie.tif"), small[0]):
        with pytest.raises(MovieError, match=r"has no masks between man_track004.tif and man_tr"):
            Movie.of(frames, truth_of(root))


def test_silver_truth_of_other_times(small_folder):
    root = small_folder()
    add_silver_truth(root)
    silver = Path(f"{root}_ST") / "SEG"
    (silver / "man_seg005.tif").rename(silver / "man_seg006.tif")
    with pytest.raises(MovieError, match=r"man_track005\.tif in .* would go with man_seg006"):
        Movie.open(root)


@pytest.mark.parametrize("line", ["1 2 3", "1 2 3 x", "1 2 3 4 5", "1 -2 3 0", f"1 2 {10**19} 0"])
def test_broken_tracks(small_folder, line):
    root = small_folder()
    file = truth_of(root) / "man_track.txt"
    file.write_text(f"1 0 5 0\n{line}\n")
    with pytest.raises(MovieError, match=f"has the line '{line}'"):
        _ = Movie.open(root).tracks
    file.unlink()
    with pytest.raises(MovieError, match="no tracks at"):
        read_tracks(file)


class TestLinkByOverlap:
    def test_follows_moving_cells_whatever_their_labels(self):
        _, masks, _ = make_movie()
        rng = np.random.default_rng(0)
        shuffled = []
        for mask in masks:
            lookup = np.concatenate([[0], rng.permutation(np.arange(1, 6)) + 10])
            shuffled.append(lookup[mask])
        linked, tracks = link_by_overlap(shuffled)
        assert tracks.tolist() == [[label, 0, 5, 0] for label in range(1, 6)]
        for label in range(1, 6):
            same = {int(masks[t][linked[t] == label].min()) for t in range(6)}
            assert len(same) == 1

    def test_division_gives_two_daughters(self):
        before, after = np.zeros((2, 8, 12), int)
        before[2:6, 1:11], after[2:6, 1:5], after[2:6, 7:11] = 3, 8, 9
        linked, tracks = link_by_overlap([before, before, after, after])
        assert tracks.tolist() == [[1, 0, 1, 0], [2, 2, 3, 1], [3, 2, 3, 1]]
        assert set(np.unique(linked[2])) == {0, 2, 3}

    def test_appearing_and_vanishing(self):
        empty, one = np.zeros((4, 4), int), np.eye(4, dtype=int)
        linked, tracks = link_by_overlap([empty, one, empty, one])
        assert tracks.tolist() == [[1, 1, 1, 0], [2, 3, 3, 0]]
        assert not linked[2].any()

    @given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=4))
    def test_regions_keep_their_shape(self, seeds):
        masks = [
            np.kron(np.random.default_rng(s).integers(0, 5, (3, 4)), np.ones((2, 2), int))
            for s in seeds
        ]
        linked, tracks = link_by_overlap(masks)
        for t, (mask, new) in enumerate(zip(masks, linked, strict=True)):
            pairs = {(int(a), int(b)) for a, b in zip(mask.flat, new.flat, strict=True)}
            assert len(pairs) == len(np.unique(mask)) == len(np.unique(new))
            alive = {int(n) for n, first, last, _ in tracks if first <= t <= last}
            assert alive == set(np.unique(new).tolist()) - {0}


@pytest.mark.parametrize("given", [("s3://lab/01",), ("01", "https://lab/masks.zarr")])
def test_urls_are_no_folders(small_folder, monkeypatch, given):
    monkeypatch.chdir(small_folder().parent)
    with pytest.raises(MovieNotFoundError, match="is a URL: movies are read from folders"):
        Movie.open(*given)


def test_label_images_are_the_masks_of_an_ome_zarr_image(tmp_path):
    import zarr

    frames, masks, _ = make_movie()
    image = zarr.create_group(tmp_path / "movie.zarr")
    put_image(image, frames)
    with pytest.raises(NoMasksError, match=r"name them \(masks=…, --masks PATH\)"):
        Movie.open(tmp_path / "movie.zarr")
    labels = image.create_group("labels", attributes={"ome": {"version": "0.5", "labels": ["a"]}})
    put_image(labels.create_group("a"), masks)
    movie = Movie.open(tmp_path / "movie.zarr")
    assert np.array_equal(movie.frames[2], frames[2])
    assert np.array_equal(movie.masks[2], masks[2])
    labels.attrs["ome"] = {"version": "0.5", "labels": ["a", "b"]}
    with pytest.raises(NoMasksError, match=r"several label images, a, b: name one"):
        Movie.open(tmp_path / "movie.zarr")
    named = Movie.open(tmp_path / "movie.zarr", tmp_path / "movie.zarr" / "labels" / "a")
    assert np.array_equal(named.masks[2], masks[2])


def put_image(group, pixels) -> None:
    axes = [{"name": name} for name in "tyx"]
    scale = {"axes": axes, "datasets": [{"path": "0"}]}
    group.attrs["ome"] = {"version": "0.5", "multiscales": [scale]}
    group.create_array("0", data=pixels)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tracks_in_any_encoding_of_editors(small_folder, encoding):
    root = small_folder()
    file = truth_of(root) / "man_track.txt"
    file.write_text(file.read_text(), encoding)
    assert np.array_equal(Movie.open(root).tracks, make_movie()[2])


def test_labels_that_are_cells_over_time_are_tracks(tmp_path):
    frames, masks, tracks = make_movie()
    found = tracks_of_labels(masks)
    assert np.array_equal(found[:, :3], tracks[np.argsort(tracks[:, 0]), :3])
    assert not found[:, 3].any()
    stacks = tmp_path / "frames.tif", tmp_path / "masks.tif"
    for file, images in zip(stacks, (frames, masks), strict=True):
        tifffile.imwrite(file, np.stack(list(images)))
    movie = Movie.open(*stacks, axes="TYX")
    write_movie(tmp_path / "mine" / "01", movie.frames, movie.masks, found)
    written = Movie.open(tmp_path / "mine" / "01")
    assert np.array_equal(written.tracks, found)
    for t in range(len(frames)):
        assert np.array_equal(written.frames[t], frames[t])
        assert np.array_equal(written.masks[t], masks[t])


def test_a_movie_is_written_whole_or_not_at_all(tmp_path):
    frames, masks, tracks = make_movie(5)
    with pytest.raises(MovieError, match="5 frames and 4 masks: expected as many masks"):
        write_movie(tmp_path / "01", iter(frames), masks[:4], tracks)
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # over itself, too
        write_movie(tmp_path / "01", frames, masks, tracks)
    says = r"01 holds images already, of which t003.tif is none of this movie of 3 frames: choose"
    with pytest.raises(MovieError, match=says):
        write_movie(tmp_path / "01", frames[:3], masks[:3], tracks)
    assert len(Movie.open(tmp_path / "01")) == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda f, m, t: (f + 1, m, t), "01 holds images already, of which t000.tif is none of"),
        (lambda f, m, t: (f, m * 2, t * [2, 1, 1, 2]), "of which man_track000.tif is none of"),
        (lambda f, m, t: (f, m, t[:-1]), "man_track.txt has other tracks: choose another folder"),
        (lambda f, m, t: (f, m + 0.7, t), "mask 0 has dtype float64: expected integer labels"),
        (
            lambda f, m, t: (f, m, t[:, :3]),
            r"tracks have shape \(.*, 3\) and dtype int64: expected",
        ),
    ],
)
def test_a_movie_that_is_there_stays(tmp_path, change, says):
    root, (frames, masks, tracks) = tmp_path / "01", make_movie(5)
    frames, masks = np.stack(list(frames)), np.stack(list(masks))
    write_movie(root, frames, masks, tracks)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*.t*")}
    others = change(frames, masks, tracks)
    with pytest.raises((MovieError, FrameError), match=says):
        write_movie(root, *others)
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.t*")} == before
    if "none of" in says or "other tracks" in says:
        write_movie(root, *(part[:4] for part in others[:2]), others[2], overwrite=True)
        written = Movie.open(root)
        assert len(written) == 4
        assert np.array_equal(written.tracks, others[2])
        assert np.array_equal(written.frames[0], others[0][0])


def test_frames_of_ones_own_stay_whatever_their_names(tmp_path):
    (tmp_path / "01").mkdir()
    (tmp_path / "01" / "raw1.png").write_bytes(b"mine")
    with pytest.raises(MovieError, match=r"of which raw1.png is none of this movie"):
        write_movie(tmp_path / "01", *make_movie(5))
    assert [file.name for file in tmp_path.rglob("*.*")] == ["raw1.png"]


def test_no_labels_are_no_tracks():
    assert tracks_of_labels([np.zeros((4, 4), int)]).shape == (0, 4)


def test_a_slice_of_frames_or_masks_is_a_series_with_the_same_keys(tmp_path, small_folder):
    root = small_folder()
    movie = Movie.open(root)
    frames, masks = movie.frames[1:5:2], movie.masks[1:5:2]
    assert [len(frames), frames.name_of(1), frames.files_of(0)] == [
        *(2, movie.frames.name_of(3), movie.frames.files_of(1)),
    ]
    assert np.array_equal(frames[1], movie.frames[3])
    assert np.array_equal(masks[-1], movie.masks[3])
    assert len(movie.frames[9:]) == 0
    cache = FeatureCache(tmp_path / "cache")
    whole = cache.get_or_compute(movie, backbone=FakeBackbone(8, 4))
    found = cache.get(frames, masks, FakeBackbone(8, 4))
    for record, t in zip(found, (1, 3), strict=True):
        assert record is not None
        assert np.array_equal(record.features, whole[t].features)
