from __future__ import annotations

import re

import numpy as np
import pytest

from feature_cache import Augmentations, Draw, MissingRecordError, Normalization, load_backbone
from feature_cache.augment import Brightness
from feature_cache.spec import differences
from feature_cache.store import Store, inspect
from feature_cache.testing import FakeBackbone


@pytest.fixture
def warm(cache, small):
    """A cache with six frames of a movie called "movie", and copies 0 to 2 of seed 42."""
    movie = cache.movie(*small, FakeBackbone(), name="movie")
    augmentations = Augmentations("default", copies=2, seed=42)
    for copy, draw in enumerate(augmentations.draws()):
        movie.with_draw(draw, augmentations.name_of(copy)).get_or_compute()
    return cache


def reasons(cache, small, backbone=None, name="movie", **options):
    explained = cache.explain(*small, backbone or FakeBackbone(), name=name, **options)
    return [(e.hit, e.reason) for e in explained]


def test_a_hit(warm, small):
    assert reasons(warm, small) == [(True, "stored")] * 6


def test_an_empty_cache(cache, small):
    assert reasons(cache, small) == [(False, "the cache is empty")] * 6


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"backbone": FakeBackbone(seed=1)},
            r"weights differ: xxh3 \w{8}… stored, xxh3 \w{8}… asked",
        ),
        ({"dtype": "float32"}, "dtype differs: float16 stored, float32 asked"),
        (
            {"pooling": "max_patches_exact"},
            "pooling.name differs: mean_patches_exact stored, max_patches_exact asked",
        ),
        (
            {"backbone": FakeBackbone(normalization=Normalization(high=99.0))},
            r"normalization.high differs: 99.8 stored, 99.0 asked",
        ),
    ],
)
def test_another_space(warm, small, options, expected):
    for hit, reason in reasons(warm, small, **options):
        assert not hit
        assert re.search(expected, reason)
        assert "fake mean_patches_exact float16" in reason


def test_another_backbone_is_one_thing_that_differs(warm, small):
    expected = (
        "this frame is stored in the space 'fake mean_patches_exact float16', where the backbone "
        "is another: fake stored, debug/random asked"
    )
    assert reasons(warm, small, load_backbone("debug/random")) == [(False, expected)] * 6


def test_changed_pixels_and_labels(warm, small):
    frames, masks = small[0].copy(), small[1].copy()
    frames[2, 0, 0] += 1
    masks[4, 0, 0] = 9
    explained = reasons(warm, (frames, masks))
    assert [hit for hit, _ in explained] == [True, True, False, True, False, True]
    assert re.fullmatch(
        r"pixels differ from the record stored for this frame before: xxh3 .*", explained[2][1]
    )
    assert re.match(r"labels differ from the mask stored with this frame", explained[4][1])


def test_another_movie(warm, small):
    other = small[0][:, ::-1]
    expected = "neither this frame nor this movie was ever computed with this backbone and pooling"
    assert reasons(warm, (other, small[1]), name="other") == [(False, expected)] * 6


def test_a_frame_that_a_movie_got_later(warm, small):
    frames, masks = (np.concatenate([part, part[:1, ::-1]]) for part in small)
    expected = "only other frames of this movie were computed with this backbone and pooling"
    assert reasons(warm, (frames, masks))[5:] == [(True, "stored"), (False, expected)]
    assert reasons(warm, (frames, masks), name="no such name")[6] == (False, expected)


def ask(cache, frames, masks, name):
    """Bind a movie, and ask for it as whoever warms or wraps it does."""
    movie = cache.movie(frames, masks, FakeBackbone(), name=name)
    movie.want([movie])
    return movie


def test_a_movie_that_shares_frames_is_spoken_of_as_it_was_asked_for(warm, small):
    frames, masks = small[0][2:5].copy(), small[1][2:5]
    assert ask(warm, frames, masks, "part").warm() == 0
    frames[1, 0, 0] += 1
    hit, missed, _ = reasons(warm, (frames, masks), name="part")
    assert hit == (True, "stored")
    assert re.match(r"pixels differ from the record stored for this frame before", missed[1])


def test_what_gc_let_go_of_is_known_to_have_been_asked_for(cache, small):
    ask(cache, *small, "movie").warm()
    cache.gc(max_bytes=0, dry_run=False)
    gone = "it was asked for, and was not computed yet, or gc has let go of it"
    assert reasons(cache, small) == [(False, gone)] * 6
    changed = small[0] + 1
    assert gone not in {reason for _, reason in reasons(cache, (changed, small[1]))}


def test_a_copy_that_was_never_warmed(warm, small):
    movie = warm.movie(*small, FakeBackbone(), name="movie")
    augmentations = Augmentations("default", copies=9, seed=42)
    assert {e.hit for e in movie.explain(augmentations, 2)} == {True}
    [explained] = movie.explain(augmentations, 9, [3])
    assert not explained.hit
    assert explained.reason == "copy 9 of seed 42 (default) was never warmed (0-2 were)"
    assert str(explained).startswith("miss frame 3 of movie: copy 9")


def test_copies_of_another_seed_are_told(warm, small):
    movie = warm.movie(*small, FakeBackbone(), name="movie")
    [explained] = movie.explain(Augmentations("default", copies=2, seed=7), 2, [3])
    assert explained.reason == (
        "copy 2 of seed 7 (default) was never warmed (the movie itself was, and copies of seed 42 "
        "(default))"
    )


def test_another_draw(warm, small):
    for hit, reason in reasons(warm, small, draw=Draw.of(Brightness(1.5))):
        assert not hit
        assert '[{"factor":1.5,"name":"brightness"}] asked' in reason


def test_nothing_is_computed(warm, small):
    before = warm.stats()["records"]
    reasons(warm, small, backbone=FakeBackbone(seed=5))
    assert warm.stats()["records"] == before


def test_differences_names_each_field_that_differs():
    stored, asked = {"a": 1, "b": {"c": [1], "d": 2}}, {"a": 1, "b": {"c": [2]}, "e": None}
    assert list(differences(stored, asked)) == [
        "b.c differs: [1] stored, [2] asked",
        "b.d differs: 2 stored, null asked",
    ]


class TestInspect:
    def test_a_record_shows_its_draw(self, warm, small):
        movie = warm.movie(*small, FakeBackbone(), name="movie")
        augmentations = Augmentations("default", copies=2, seed=42)
        [explained] = movie.explain(augmentations, 2, [3])
        shown = inspect(Store(warm.store.root, "r"), explained.key[:12])
        assert shown["kind"] == "record"
        assert shown["name"] == explained.key
        assert shown["draw"] == augmentations.draw(2).to_json()
        assert shown["origin"] == "copy 2 of seed 42 (default)"
        assert (shown["movie"], shown["frame"]) == ("movie", 3)
        assert shown["labels"] == [1, 2, 3, 4, 5]

    def test_a_space_and_a_pack(self, warm):
        store = Store(warm.store.root, "r")
        space = inspect(store, "fake-mean")
        assert space["kind"] == "space"
        assert space["records"] == 18
        assert space["spec"]["backbone"]["name"] == "fake"
        pack = inspect(store, space["packs"][0])
        assert pack["kind"] == "pack"
        assert len(pack["records"]) == 6
        assert {record["movie"] for record in pack["records"]} == {"movie"}
        assert set(pack["versions"]) >= {"torch", "zarr", "numpy"}

    def test_a_word_for_nothing_or_for_many(self, warm, small):
        store = Store(warm.store.root, "r")
        with pytest.raises(MissingRecordError, match="'xyz' begins no name"):
            inspect(store, "xyz")
        warm.get_or_compute(*small, FakeBackbone(), pooling="nearest_patch")
        with pytest.raises(MissingRecordError, match="begins 2 names: space fake-"):
            inspect(store, "fake")


def test_float_frames_explain_like_their_integers(warm, small):
    assert reasons(warm, (small[0].astype(np.float32), small[1]))[0] == (True, "stored")
