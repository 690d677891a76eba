"""Records computed again: wrong numbers whose checksum is right are found, and nothing else."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from feature_cache import Augmentations, FeatureCache, Movie, StoreError, load_backbone
from feature_cache.key import Record
from feature_cache.movies import write_movie
from feature_cache.recompute import choose_records, recompute
from feature_cache.spec import SpaceSpec
from feature_cache.store import NewRecord, Pack, Space, read_provenance
from feature_cache.store.maintenance import repair
from feature_cache.store.maintenance.compact import alone
from feature_cache.testing import FakeBackbone
from synthetic import make_movie

BACKBONE, OTHER = FakeBackbone(dim=6), FakeBackbone(dim=6, seed=1)


def bind(cache: FeatureCache, root: Path, backbone=BACKBONE, **options):
    movie = Movie.open(root)
    return cache.movie(movie.frames, movie.masks, backbone, name=movie.name, **options)


def again(cache: FeatureCache, *backbones, count=None, **options):
    chosen = choose_records(cache.store.spaces(), count)
    return recompute(chosen, backbones=backbones or (BACKBONE,), **options)


def change(
    space: Space, edit: Callable[[np.ndarray, np.ndarray | None], object], *, row: int = 1
) -> bytes:
    """Write a space's last pack anew, one record edited, checksums right; give the key."""
    name = space.pack_names()[-1]
    pack, provenance = Pack(space.packs_folder / name), read_provenance(space.packs_folder / name)
    sources, entries = provenance.pop("records"), []
    for i, source in enumerate(sources):
        record = pack.record(i)
        features = record.features.copy()
        labels = None if record.labels is None else record.labels.copy()
        if i == row:
            edit(features, labels)
        entries.append(NewRecord(pack.keys[i].tobytes(), Record(features, labels), source))
    shutil.rmtree(pack.path)
    space.write(entries, provenance, pack.features.codec)
    return entries[row].key


def spoil(features: np.ndarray, labels: np.ndarray | None) -> None:
    features[(0,) * features.ndim] += 0.25


@pytest.fixture
def mixed(cache, tmp_path) -> FeatureCache:
    """Spaces of regions and grids, in both dtypes, with copies, of 2D and 3D movies."""
    frames, masks, tracks = make_movie(frames=4)
    flat, thick = tmp_path / "flat" / "01", tmp_path / "thick" / "01"
    write_movie(flat, frames, masks, tracks)
    write_movie(thick, frames.reshape(2, 2, 48, 64), masks.reshape(2, 2, 48, 64), tracks)
    for root in (flat, thick):
        plain = bind(cache, root)
        for copy, draw in enumerate(Augmentations("default", copies=2, seed=1).draws()):
            plain.with_draw(draw, f"copy {copy}").warm()
        bind(cache, root, pooling=None).warm()
        bind(cache, root, pooling=None, dtype="float32").warm()
        bind(cache, root, FakeBackbone(dim=6, seed=1), dtype="float32").warm()
    assert len(cache.spaces()) == 4
    return cache


class TestWhatIsRight:
    def test_everything_agrees(self, mixed):
        found = again(mixed, BACKBONE, OTHER)
        assert (found.agree, found.wrong, found.unknown) == (3 * 6 + 3 * 6, [], {})
        assert mixed.verify(recompute="all", backbones=[BACKBONE, OTHER]) == []

    def test_rounding_agrees(self, mixed):
        def step(features, labels):
            place = np.unravel_index(np.abs(features).argmax(), features.shape)
            features[place] = np.nextafter(features[place], features.dtype.type(0))

        for space in mixed.store.spaces():
            change(space, step)
        assert again(mixed, BACKBONE, OTHER).wrong == []

    def test_a_backbone_is_loaded_as_the_spec_says(self, cache, small_folder):
        made = load_backbone("efficientnet-lite0", "random:4", "cpu", layer="stride-8")
        bind(cache, small_folder(), made).warm()
        found = again(cache, weights=["random:3", "random:4"], device="cpu", batch_size=4)
        assert (found.agree, found.unknown) == (6, {})

    def test_progress_counts_all_records(self, mixed):
        counts = []
        again(mixed, BACKBONE, progress=counts.append)
        assert sum(counts) == 36

    def test_an_empty_cache(self, cache):
        assert again(cache).agree == 0
        assert cache.verify(recompute=10) == []


class TestWhatIsWrong:
    def test_each_is_found_with_all_that_names_it(self, mixed):
        keys = {change(space, spoil).hex() for space in mixed.store.spaces()}
        assert mixed.verify(deep=True) == []
        found = again(mixed, BACKBONE, OTHER)
        assert {one.record for one in found.wrong} == keys
        assert found.agree == 36 - 4
        for one in found.wrong:
            assert one.kind == "wrong"
            plain = one.to_json()
            assert plain["movie"].endswith("/01 TRA")
            assert plain["difference"] > plain["bound"] > 0
            assert isinstance(plain["draw"], list)
            assert plain["frame"] in range(4)
            assert one.lost[0] in one.message

    def test_labels_that_are_others(self, cache, small_folder):
        bind(cache, small_folder()).warm()

        def rename(features, labels):
            labels[-1] += 1

        change(cache.store.spaces()[0], rename)
        [one] = again(cache).wrong
        assert "labels, shape or dtype are others" in one.message
        assert one.to_json()["difference"] is None

    def test_repair_sets_one_record_aside_and_loses_no_other(self, mixed):
        keys = [change(space, spoil) for space in mixed.store.spaces()]
        wrong = {key.hex() for key in keys}
        before = contents(mixed)
        found = mixed.verify(recompute="all", backbones=[BACKBONE, OTHER], repair=True)
        assert {one.record for one in found} == wrong
        assert contents(mixed) == {key: one for key, one in before.items() if key not in wrong}
        assert len(list((mixed.store.root / "quarantine").iterdir())) == 4
        assert mixed.verify(recompute="all", backbones=[BACKBONE, OTHER], deep=True) == []

    def test_repair_finds_it_where_its_pack_was_merged_meanwhile(self, cache, small_folder):
        movie = bind(cache, small_folder())
        movie.compute(range(3))
        key = change(cache.store.spaces()[0], spoil).hex()
        wrong, before = again(cache).wrong, contents(cache)
        movie.compute(range(3, 6))
        cache.compact()
        repair(cache.store.root, wrong)
        left = contents(cache)
        assert (len(left), before.keys() - left.keys()) == (5, {key})

    def test_a_record_that_is_alone_in_its_pack(self, cache, small_folder):
        bind(cache, small_folder(frames=1)).warm()
        change(cache.store.spaces()[0], spoil, row=0)
        assert len(cache.verify(recompute="all", backbones=[BACKBONE], repair=True)) == 1
        assert cache.stats()["records"] == 0

    def test_after_a_repair_the_right_numbers_are_served_in_this_process(self, cache, small_folder):
        movie = bind(cache, small_folder())
        right = [record.features.copy() for record in movie.get_or_compute()]
        change(cache.store.spaces()[0], spoil)
        movie = bind(FeatureCache(cache.store.root), small_folder())
        served = [record.features for record in movie.get()]
        assert not all(map(np.array_equal, served, right))
        movie.cache.verify(recompute="all", backbones=[BACKBONE], repair=True)
        assert movie.contains().tolist().count(False) == 1
        again = [record.features for record in movie.get_or_compute()]
        assert all(map(np.array_equal, again, right))

    def test_nothing_is_moved_without_repair_or_while_others_compact(self, cache, small_folder):
        bind(cache, small_folder()).warm()
        change(cache.store.spaces()[0], spoil)
        [space], before = cache.store.spaces(), contents(cache)
        assert len(cache.verify(recompute="all", backbones=[BACKBONE])) == 1
        with alone(space), pytest.raises(StoreError, match="is being compacted: repair it again"):
            cache.verify(recompute="all", backbones=[BACKBONE], repair=True)
        assert contents(cache) == before

    def test_all_copies_of_a_record_are_looked_at(self, cache, small_folder):
        bind(cache, small_folder()).warm()
        [space] = cache.store.spaces()
        pack = Pack(space.packs_folder / space.pack_names()[0])
        wrong = Record(pack.record(2).features + np.float16(1), pack.record(2).labels)
        source = read_provenance(pack.path)["records"][2]
        space.write([NewRecord(pack.keys[2].tobytes(), wrong, source)], {})
        found = again(cache)
        assert (found.agree, len(found.wrong)) == (6, 1)


def contents(cache: FeatureCache) -> dict[str, bytes]:
    found = {}
    for space in FeatureCache(cache.store.root, "r").spaces():
        for name in space.pack_names():
            pack = Pack(space.packs_folder / name)
            for row, key in enumerate(pack.keys):
                record = pack.record(row)
                labels = b"" if record.labels is None else record.labels.tobytes()
                found[key.tobytes().hex()] = record.features.tobytes() + labels
    return found


class TestWhatCanNotBeCompared:
    @pytest.fixture
    def warmed(self, cache, small_folder):
        bind(cache, small_folder()).warm()
        bind(cache, small_folder(), pooling=None).warm()
        return small_folder()

    def test_a_movie_that_is_gone(self, cache, warmed):
        shutil.rmtree(warmed)
        found = again(cache)
        assert found.agree == 0
        [(what, reason)] = found.unknown
        assert (what, found.unknown[what, reason]) == ("movie", 12)
        assert f"no movie at {warmed}" in reason
        assert cache.verify(recompute="all", backbones=[BACKBONE]) == []

    def test_one_that_was_never_in_files(self, cache, small):
        cache.get_or_compute(*small, BACKBONE)
        assert again(cache).unknown == {
            ("movie", "what was computed from arrays can't be read again"): 6
        }

    def test_one_frame_that_is_gone(self, cache, warmed):
        (warmed / "t005.tif").unlink()
        (Path(f"{warmed}_GT") / "TRA" / "man_track005.tif").unlink()
        found = again(cache)
        reasons = [f"{name} has no frame t005.tif any more" for name in (f"{warmed} TRA", warmed)]
        assert found.agree == 10
        assert found.unknown == {("movie", reason): 1 for reason in reasons}

    def test_changed_pixels(self, cache, warmed):
        image = tifffile.imread(warmed / "t001.tif")
        tifffile.imwrite(warmed / "t001.tif", image + 1)
        found = again(cache)
        assert (found.agree, found.unknown.total()) == (10, 2)
        assert {what for what, _ in found.unknown} == {"movie"}

    def test_changed_labels_leave_the_grids(self, cache, warmed):
        file = Path(f"{warmed}_GT") / "TRA" / "man_track003.tif"
        tifffile.imwrite(file, tifffile.imread(file) * 2)
        found = again(cache)
        assert (found.agree, found.unknown.total(), found.wrong) == (11, 1, [])

    def test_without_masks_there_are_still_the_grids(self, cache, warmed):
        shutil.rmtree(f"{warmed}_GT")
        assert (again(cache).agree, again(cache).unknown.total()) == (6, 6)

    def test_a_damaged_file_is_that_frame_alone(self, cache, warmed):
        frame = warmed / "t004.tif"
        frame.write_bytes(frame.read_bytes()[:300])
        found = again(cache)
        assert (found.agree, found.unknown.total()) == (10, 2)
        assert "is cut short, or damaged" in str(found.unknown)

    def test_other_weights(self, cache, warmed):
        found = again(cache, OTHER)
        assert {what for what, _ in found.unknown} == {"weights"}
        assert found.unknown.total() == 12
        assert "unknown backbone 'fake'" in str(found.unknown)

    def test_weights_that_were_replaced(self, cache, small_folder, tmp_path):
        for seed in range(2):
            state = load_backbone("efficientnet-lite0", f"random:{seed}").module.state_dict()
            torch.save(state, tmp_path / f"{seed}.pt")
        file = tmp_path / "last.pt"
        shutil.copy(tmp_path / "0.pt", file)
        bind(cache, small_folder(), load_backbone("efficientnet-lite0", file)).warm()
        shutil.copy(tmp_path / "1.pt", file)
        found = again(cache, weights=[str(file)])
        assert found.agree == 0
        [(what, reason)] = found.unknown
        assert what == "weights"
        assert "weights differ: xxh3" in reason
        assert again(cache, weights=[str(file), str(tmp_path / "0.pt")]).agree == 6

    def test_another_key_version_or_pooling(self, cache, warmed):
        for field, value in (("key_version", 0), ("pooling", {"name": "gone", "revision": 1})):
            space = cache.space(SpaceSpec(BACKBONE.spec))
            spec = {**space.spec, field: value}
            other = Space(space.path.with_name(f"other-{field}"), spec, "a")
            pack = Pack(space.packs_folder / space.pack_names()[0])
            sources = read_provenance(pack.path)["records"]
            other.write([NewRecord(pack.keys[0].tobytes(), pack.record(0), sources[0])], {})
        found = again(cache)
        assert (found.agree, found.unknown.total(), found.wrong) == (12, 2, [])
        assert {what for what, _ in found.unknown} == {"weights"}
        assert "key version 0" in str(found.unknown)

    def test_a_frame_that_can_not_be_computed(self, cache, warmed):
        class Broken(FakeBackbone):
            def embed(self, frames):
                return super().embed(frames) * torch.nan

        found = again(cache, Broken(dim=6))
        assert found.unknown.total() == 12
        assert {what for what, _ in found.unknown} == {"error"}

    def test_a_damaged_pack_is_for_the_checksums(self, cache, warmed):
        [chunk, *_] = cache.store.root.glob("spaces/*mean*/packs/*/features/c.0.0")
        data = bytearray(chunk.read_bytes())
        data[3] ^= 1
        chunk.write_bytes(data)
        found = again(cache)
        assert (found.agree, found.wrong) == (11, [])
        assert [(what, count) for (what, _), count in found.unknown.items()] == [("record", 1)]
        assert [one.kind for one in cache.verify(recompute="all")] == ["damaged"]

    def test_they_are_counted_in_the_log_of_verify(self, cache, warmed, caplog):
        shutil.rmtree(f"{warmed}_GT")
        cache.verify(recompute="all", backbones=[BACKBONE])
        assert (
            "12 records computed again: 6 agree, 0 differ, 6 can't be compared, as their movie "
            "is gone or changed"
        ) in caplog.text


class TestChoice:
    @pytest.fixture
    def spaces(self, cache, small_folder):
        for name, frames, options in (
            ("few", 2, {"dtype": "float32"}),
            ("some", 9, {}),
            ("more", 9, {"pooling": None}),
        ):
            bind(cache, small_folder(name, frames=frames), **options).warm()
        return sorted(cache.store.spaces(), key=len)

    def chosen(self, spaces, count, seed=0):
        return {one.space.name: one.rows for one in choose_records(spaces, count, seed)}

    @pytest.mark.parametrize(
        ("count", "shares"),
        [
            (8, [2, 3, 3]),
            (1, [1]),
            (3, [1, 1, 1]),
            (19, [2, 8, 9]),
            (99, [2, 9, 9]),
            (None, [2, 9, 9]),
        ],
    )
    def test_is_spread_over_the_spaces(self, spaces, count, shares):
        assert sorted(map(len, self.chosen(spaces, count).values())) == shares

    def test_is_of_one_record_at_least(self, cache):
        with pytest.raises(ValueError, match="0 records to compute again: expected 1 or more"):
            cache.verify(recompute=0)

    def test_is_a_function_of_the_seed(self, spaces):
        assert self.chosen(spaces, 9) == self.chosen(spaces, 9)
        assert len({str(self.chosen(spaces, 9, seed)) for seed in range(5)}) > 1

    def test_is_of_records_not_of_places(self, cache, spaces):
        for space in spaces:
            pack = Pack(space.packs_folder / space.pack_names()[0])
            space.write([NewRecord(pack.keys[0].tobytes(), pack.record(0), {})], {})
        everything = choose_records(cache.store.spaces(), None)
        assert sum(len(one.rows) for one in everything) == 20 + 3
        assert self.chosen(cache.store.spaces(), 20) == self.chosen(cache.store.spaces(), None)


def test_a_frame_is_found_by_its_file_where_its_number_is_another(cache, small_folder):
    root = small_folder()
    bind(cache, root).warm()
    for folder, name in ((root, "t000.tif"), (Path(f"{root}_GT") / "TRA", "man_track000.tif")):
        (folder / name).unlink()
    found = again(cache)
    assert (found.agree, found.unknown.total()) == (5, 1)


def test_a_movie_is_opened_again_as_it_was(cache, small_folder, tmp_path):
    frames, masks, _ = make_movie()
    for name, images in (("stack.tif", frames), ("masks.tif", masks)):
        tifffile.imwrite(tmp_path / name, images, photometric="minisblack")
    part = Movie.open(
        small_folder(frames=12), slice_pct=(0.5, 1.0), downscale_temporal=2, downscale_spatial=2
    )
    stack = Movie.open(tmp_path / "stack.tif", tmp_path / "masks.tif", axes="TYX")
    for movie, records in ((part, 3), (stack, 6)):
        assert cache.movie(movie, backbone=BACKBONE).warm() == records
    found = again(cache)
    assert (found.agree, found.unknown) == (9, {})
    (tmp_path / "stack.tif").unlink()
    assert (again(cache).agree, again(cache).unknown.total()) == (3, 6)
