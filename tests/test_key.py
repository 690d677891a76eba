from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields, replace

import pytest

from feature_cache import IDENTITY, BackboneSpec, Draw, Normalization, SpaceSpec, UnknownNameError
from feature_cache.key import record_key
from feature_cache.pooling import POOLINGS
from feature_cache.spec import STORAGE_DTYPES

SPEC = BackboneSpec(
    name="model",
    revision=1,
    weights="00" * 16,
    layer="last",
    width=8,
    stride=16,
    mean=(0.5,),
    std=(0.25,),
    extra={"no_mem_embed": True},
)
CHANGES = {
    "name": "other",
    "revision": 2,
    "weights": "01" + "00" * 15,
    "layer": "first",
    "width": 9,
    "stride": 8,
    "input_size": (1024, 1024),
    "resize": "bilinear",
    "channels": "repeat-2",
    "mean": (0.25,),
    "std": (0.5,),
    "dtype": "bfloat16",
    "normalization": Normalization(high=99.9),
    "extra": {"no_mem_embed": False},
    "context": (2, 0),
}


def test_every_field_of_a_backbone_changes_the_space():
    assert set(CHANGES) == {field.name for field in fields(BackboneSpec)}
    specs = [SPEC, *(replace(SPEC, **{name: value}) for name, value in CHANGES.items())]
    assert len({SpaceSpec(spec).digest for spec in specs}) == len(CHANGES) + 1


def test_pooling_dtype_and_normalisation_change_the_space():
    spaces = [SpaceSpec(SPEC, p, d) for p in (*POOLINGS, None) for d in STORAGE_DTYPES]
    assert len({space.digest for space in spaces}) == len(spaces)
    norms = [Normalization(), Normalization(low=2.0), Normalization("none")]
    digests = {SpaceSpec(replace(SPEC, normalization=n)).digest for n in norms}
    assert len(digests) == 3


def test_the_range_that_is_promised_is_in_the_key():
    assert Normalization().range == (0.0, 1.0)
    assert Normalization("none").range is None
    assert Normalization().to_json()["range"] == [0.0, 1.0]
    assert Normalization("none").to_json() == {"name": "none", "range": None}


def test_a_normalisation_of_another_version_is_not_taken_for_this_one():
    plain = SPEC.to_json()
    for other in {"name": "percentile", "low": 1.0, "high": 99.8}, {"name": "none"}:
        with pytest.raises(TypeError, match=r"expected \{'name'"):
            BackboneSpec.from_json({**plain, "normalization": other})


def test_a_spec_cannot_be_changed_into_another():
    terms = {"percentiles": [1.0, 99.0], "nested": {"a": 1}}
    spec = replace(SPEC, extra=terms, mean=[0.5])
    before = SpaceSpec(spec).digest
    terms["percentiles"][0], terms["nested"]["a"] = 2.0, 2
    for change in (
        lambda: spec.extra.update(a=1),
        lambda: spec.extra["nested"].update(a=1),
        lambda: spec.extra["percentiles"].append(3),
        lambda: spec.mean.append(3),
        lambda: setattr(spec, "dtype", "bfloat16"),
        lambda: setattr(spec.normalization, "low", 2.0),
    ):
        with pytest.raises(AttributeError):
            change()
    assert SpaceSpec(spec).digest == before
    spec.to_json()["extra"]["percentiles"][0] = 2.0
    assert pickle.loads(pickle.dumps(spec)) == copy.deepcopy(spec) == spec
    assert SpaceSpec(pickle.loads(pickle.dumps(spec))).digest == before


def test_constants_without_effect_do_not():
    plain, other = Normalization("none"), Normalization("none", low=3.0)
    assert plain.to_json() == other.to_json()


def test_specs_come_back_from_json():
    for name, value in CHANGES.items():
        spec = replace(SPEC, **{name: value})
        again = BackboneSpec.from_json(json.loads(json.dumps(spec.to_json())))
        assert again == spec
        assert SpaceSpec(again).digest == SpaceSpec(spec).digest


def test_whole_numbers_given_as_floats_are_the_same():
    assert (
        SpaceSpec(replace(SPEC, mean=(1,))).digest == SpaceSpec(replace(SPEC, mean=(1.0,))).digest
    )


def test_every_part_changes_the_key():
    space, frame, mask = b"s" * 16, b"f" * 16, b"m" * 16
    keys = {
        record_key(space, frame, mask, IDENTITY),
        record_key(b"t" * 16, frame, mask, IDENTITY),
        record_key(space, b"g" * 16, mask, IDENTITY),
        record_key(space, frame, b"n" * 16, IDENTITY),
        record_key(space, frame, None, IDENTITY),
        record_key(space, frame, mask, Draw.from_json([{"name": "brightness", "factor": 1.5}])),
    }
    assert len(keys) == 6
    assert all(len(key) == 16 for key in keys)


def test_golden_keys():
    """A change here means that caches written before are not found any more: raise KEY_VERSION."""
    assert SpaceSpec(SPEC).digest.hex() == "ac8129cbd5d70222d242f7097a0bf345"
    assert SpaceSpec(SPEC, None, "float32").digest.hex() == "662638215b686eb820f3964a31418b01"
    assert (
        record_key(b"s" * 16, b"f" * 16, b"m" * 16, IDENTITY).hex()
        == "47f1cc7d4ca258d4dca094d08a32718d"
    )
    assert (
        record_key(b"s" * 16, b"f" * 16, None, IDENTITY).hex() == "e20b11ca59c441b2009a5d9b6d890ae9"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpaceSpec(SPEC, "mean_patch_exact"), "did you mean 'mean_patches_exact'"),
        (lambda: SpaceSpec(SPEC, dtype="float61"), "unknown storage dtype 'float61'"),
        (lambda: Normalization("minmax"), "unknown normalisation 'minmax'"),
    ],
)
def test_unknown_names(make, message):
    with pytest.raises(UnknownNameError, match=message):
        make()


def test_percentiles_out_of_order():
    with pytest.raises(ValueError, match=r"0 <= low < high <= 100"):
        Normalization(low=50, high=50)


def test_slug_is_safe_as_a_folder_name():
    space = SpaceSpec(replace(SPEC, name="../facebook/sam2.1 hiera\n"))
    assert space.slug == "facebook-sam2.1-hiera-mean_patches_exact-float16"
