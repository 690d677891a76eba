"""File names and the times they stand for: right, or refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_cache import Movie, MovieError
from feature_cache.movies.times import check_pairs, check_steps, order_files


def order(*names: str) -> list[str]:
    timed = order_files([Path("folder", name) for name in names], Path("folder"), "frames")
    check_steps(timed)
    return [file.name for file in timed.files]


SCHEMES = {
    "Cell Tracking Challenge": "t{t:03}.tif",
    "not padded": "t{t}.tif",
    "nothing but a number": "{t}.tif",
    "a number in front": "{t:02}_phase.tif",
    "a constant number behind": "t{t:03}_c1.tif",
    "constant numbers on both sides": "exp12_t{t}_z07.tif",
    "Micro-Manager 1.4": "img_{t:09}_Default_000.tif",
    "Micro-Manager 2": "img_channel000_position000_time{t:09}_z000.tif",
    "ImageJ sequence": "movie{t:04}.tif",
    "ImageJ hyperstack sequence": "stack_t{t:03}_z001_c001.tif",
    "CellProfiler": "scan_{t:04}_Objects.tiff",
    "cellpose": "frame{t:02}_cp_masks.tif",
    "MetaMorph": "exp_w1GFP_s1_t{t}.TIF",
    "MetaMorph with thumbnail's name": "exp_w2TRITC_s10_t{t}.tif",
    "Opera Phenix": "r01c01f01p01-ch1sk{t}fk1fl1.tiff",
    "OME": "series.{t:02}.ome.tif",
    "a date in front": "20240105_pos_A3_{t:03}.tif",
    "spaces and brackets": "my movie ({t}).tif",
    "capitals": "T{t:03}.TIF",
    "a step": "t{t:03}0.tif",
    "a letter before a separator": "exp_s_{t:03}.tif",
}


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_schemes_of_programs_give_the_order_of_time(scheme):
    expected = [scheme.format(t=t) for t in range(12)]
    assert order(*sorted(expected)) == expected


def test_incucyte_counts_days_hours_and_minutes():
    clocks = [divmod(minutes, 60) for minutes in range(0, 3000, 90)]
    expected = [f"VID_B2_1_{h // 24:02}d{h % 24:02}h{m:02}m.tif" for h, m in clocks]
    assert order(*reversed(expected)) == expected


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["t0.tif", "t1.tif", "t1_c2.tif"], r"several kinds, such as t0\.tif and t1_c2\.tif"),
        (["a.tif", "b.tif"], "several kinds"),
        (["t000.tif", "t000_cp_masks.tif"], "several kinds"),
        (["t0_c0.tif", "t0_c1.tif", "t1_c0.tif", "t1_c1.tif"], "differ in 2 numbers"),
        (["t1_z1.tif", "t2_z2.tif"], "differ in 2 numbers"),
        (["2024-01-05_12-58.tif", "2024-01-05_13-00.tif"], "differ in 2 numbers"),
        (["img_c0.tif", "img_c1.tif"], "look like channels"),
        (["img_channel_0.tif", "img_channel_1.tif"], "look like channels"),
        (["img_000000000_Cy5_000.tif", "img_000000000_Cy5_001.tif"], "look like slices"),
        (["Position 1.tif", "Position 2.tif"], "look like positions"),
        (["img_Scene-1.tif", "img_Scene-2.tif"], "look like positions"),
        (["A - 1(fld 1 wv UV).tif", "A - 1(fld 2 wv UV).tif"], "look like positions"),
        (["img_w1.tif", "img_w2.tif"], "look like channels"),
        (["img_z000.tif", "img_z001.tif"], "look like slices"),
        (["img-Pos0.tif", "img-Pos1.tif"], "look like positions"),
        (["exp_s1.tif", "exp_s2.tif"], "look like positions"),
        (["t1.tif", "t01.tif"], r"of the same time, t01\.tif and t1\.tif"),
        (["t1.tif", "t2.tif", "t02.tif"], "of the same time"),
        (["t1.tif", "t1.TIF"], "of the same time"),
        (["t0.tif", "t1.tif", "t3.tif"], r"no frames between t1\.tif and t3\.tif.* time 2"),
        (["t0.tif", "t10.tif", "t30.tif"], "no frames between"),
        (["T1.tif", "t2.tif"], "several kinds"),
        (["t0.5.tif", "t1.0.tif"], "differ in 2 numbers"),
    ],
)
def test_names_that_tell_no_time_are_refused_in_a_line(names, message):
    with pytest.raises(MovieError, match=message) as raised:
        order(*names)
    assert "\n" not in str(raised.value)
    assert "; " in str(raised.value)  # what to do


def pair(frames: list[str], masks: list[str]) -> list[tuple[str, str]]:
    """Give the pairs, or raise, as `Movie.open` does."""
    one = order_files([Path("01", name) for name in frames], Path("01"), "frames")
    other = order_files([Path("TRA", name) for name in masks], Path("TRA"), "masks")
    check_pairs(one, other)
    check_steps(one)
    return [(a.name, b.name) for a, b in zip(one.files, other.files, strict=True)]


@pytest.mark.parametrize(
    ("frames", "masks", "message"),
    [
        ("t{}.tif", "mask{:03}.tif", None),
        ("img_{:09}_Default_000.tif", "m{}.tif", None),
        ("t{:03}_c1.tif", "t{:03}_c1_cp_masks.png", None),
        ("t{}.tif", "mask{}.tif", "frames 0"),
        ("t{}.tif", "mask{}.tif", "masks 11"),
        ("t{}.tif", "mask{}.tif", "frames 5"),
        ("t{}.tif", "mask{}.tif", "both 5"),
        ("t{}.tif", "mask{}.tif", "frames 0 masks 11"),
    ],
)
def test_pairs_have_the_same_numbers_whatever_the_padding(frames, masks, message):
    """As of a bug where 10 of 12 pairs were wrong: names without padding beside padded ones."""
    times = {"frames": set(range(12)), "masks": set(range(12))}
    for side, t in re.findall(r"(frames|masks|both) (\d+)", message or ""):
        for name in times if side == "both" else [side]:
            times[name].discard(int(t))
    there = [
        [form.format(t) for t in times[side]]
        for form, side in ((frames, "frames"), (masks, "masks"))
    ]
    if message is None:
        assert pair(*there) == [(frames.format(t), masks.format(t)) for t in range(12)]
    else:
        with pytest.raises(MovieError):
            pair(*there)


def test_an_only_frame_and_mask_have_the_same_numbers():
    assert pair(["t3_c1.tif"], ["mask3_1.tif"]) == [("t3_c1.tif", "mask3_1.tif")]
    assert pair(["frame.tif"], ["mask7.tif"])
    with pytest.raises(MovieError, match="expected the same numbers"):
        pair(["t3_c1.tif"], ["t4_c1.tif"])


@st.composite
def namings(draw):
    """Make names with up to three groups of numbers, of which one is the time, for some times."""
    texts = draw(
        st.lists(st.sampled_from(["", "_", "a", "img_", "-x", "t", "_t"]), min_size=1, max_size=4)
    )
    groups = len(texts) - 1
    at = draw(st.integers(0, groups - 1)) if groups else None
    constants = [draw(st.integers(0, 20)) for _ in range(groups)]

    def name(t: int) -> str:
        parts = [texts[0]]
        for i in range(groups):
            number = t if i == at else constants[i]
            width = draw(st.integers(1, 4))
            parts += [f"{number:0{width}}", texts[i + 1]]
        return "".join(parts) + ".tif"

    return name


@given(namings(), namings(), st.data())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_random_names_are_paired_right_or_refused(frame_name, mask_name, data):
    count = data.draw(st.integers(1, 14))
    there = []
    for name in (frame_name, mask_name):
        kept = data.draw(st.sets(st.integers(0, count - 1), min_size=1))
        there.append({name(t): t for t in sorted(kept)})
    frames, masks = there
    try:
        pairs = pair(list(frames), list(masks))
    except MovieError:
        return
    if all(re.search(r"\d", name) for name in (*frames, *masks)):  # or it is an only file
        assert [frames[one] for one, _ in pairs] == [masks[other] for _, other in pairs]
    times = [frames[one] for one, _ in pairs]
    assert times == sorted(times)


def write_folder(folder: Path, names: list[str], value: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for t, name in enumerate(names):
        image = np.zeros((6, 5), np.uint8)
        image[1:3, 1:4] = value or t + 1
        tifffile.imwrite(folder / name, image)


def test_a_folder_in_natural_order_with_hidden_twins_and_other_files(tmp_path):
    names = [f"t{t}.tif" for t in range(11)]
    write_folder(tmp_path / "01", names)
    write_folder(tmp_path / "masks", [f"m{t:02}.TIFF" for t in range(11)], value=3)
    for folder in ("01", "masks"):
        (tmp_path / folder / "._t000.tif").write_bytes(b"\0\5\26\7")
        (tmp_path / folder / ".DS_Store").write_bytes(b"\0")
        (tmp_path / folder / "Thumbs.db").write_bytes(b"\0")
        (tmp_path / folder / "notes.txt").write_text("mine")
    movie = Movie.open(tmp_path / "01", tmp_path / "masks")
    assert [int(movie.frames[t].max()) for t in range(11)] == list(range(1, 12))
    assert [row.frame for row in movie.table()] == names
    assert [row.time for row in movie.table()] == list(range(11))
    assert movie.table()[10].mask == "m10.TIFF"


def test_masks_beside_their_frames_are_named_by_a_pattern(tmp_path):
    """As cellpose leaves them."""
    write_folder(tmp_path, [f"t{t:03}.tif" for t in range(3)])
    write_folder(tmp_path, [f"t{t:03}_cp_masks.tif" for t in range(3)], value=9)
    with pytest.raises(MovieError, match="several kinds") as raised:
        Movie.open(tmp_path, detections=None)
    told = re.search("by a pattern, such as ([^,]+),", str(raised.value))[1]
    assert told == str(tmp_path / "t???.tif")
    movie = Movie.open(tmp_path / "t???.tif", tmp_path / "*_cp_masks.tif")
    assert [row.mask for row in movie.table()] == [f"t{t:03}_cp_masks.tif" for t in range(3)]
    assert int(movie.masks[2].max()) == 9
    assert int(movie.frames[2].max()) == 3


def test_files_of_several_formats_are_named_by_a_pattern(tmp_path):
    write_folder(tmp_path, [f"t{t:03}.tif" for t in range(3)])
    (tmp_path / "t000.png").write_bytes(b"")
    with pytest.raises(MovieError, match=r"several formats, \.png, \.tif: name those"):
        Movie.open(tmp_path, detections=None)
    assert len(Movie.open(tmp_path / "*.tif", detections=None)) == 3


def test_a_pattern_that_fits_nothing(tmp_path):
    with pytest.raises(MovieError, match="no image's name fits"):
        Movie.open(tmp_path / "*.tif", detections=None)
