"""Backbones of other packages, by entry points of a distribution that is really on the path."""

from __future__ import annotations

import sys

import pytest

from feature_cache import BackboneError, UnknownNameError, list_backbones, load_backbone
from feature_cache.testing import check_backbone

MODULE = """
from feature_cache.testing import FakeBackbone

def one(name, weights, device, dtype, *, dim=8):
    return FakeBackbone(dim=dim)

def family(name, weights, device, dtype, **options):
    return FakeBackbone(dim=len(name))

def nothing(name, weights, device, dtype):
    return None
"""
ENTRIES = """
[feature_cache.backbones]
acme/one = acme_features:one
acme/family/ = acme_features:family
acme/nothing = acme_features:nothing
acme/gone = acme_features:gone
acme/absent = acme_absent:one
efficientnet-lite0 = acme_features:one
"""


@pytest.fixture
def acme(tmp_path, monkeypatch):
    (tmp_path / "acme_features.py").write_text(MODULE)
    info = tmp_path / "acme_features-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-features\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("acme_features", None)


@pytest.mark.usefixtures("acme")
class TestEntryPoints:
    def test_one_is_loaded_with_its_options_and_conforms(self):
        backbone = load_backbone("acme/one", dim=4)
        assert backbone.spec.width == 4
        check_backbone(backbone)

    def test_a_family_is_found_by_its_prefix(self):
        assert load_backbone("acme/family/abc", anything=1).spec.width == len("acme/family/abc")
        with pytest.raises(UnknownNameError, match="unknown backbone 'acme/family/'"):
            load_backbone("acme/family/")

    def test_they_are_listed(self):
        infos = {info.name: info for info in list_backbones()}
        info = infos["acme/family/<name>"]
        assert (info.install, info.width, info.installed) == (
            "pip install acme-features",
            None,
            True,
        )
        assert not infos["acme/absent"].installed

    def test_ours_can_not_be_replaced(self):
        assert type(load_backbone("efficientnet-lite0")).__name__ == "EfficientNetLite0"

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("acme/nothing", "gave no backbone for 'acme/nothing'"),
            ("acme/gone", "can't be loaded from acme_features:gone"),
            ("acme/absent", "can't be loaded from acme_absent:one"),
        ],
    )
    def test_what_is_no_backbone(self, name, message):
        with pytest.raises(BackboneError, match=message):
            load_backbone(name)

    def test_an_unknown_option(self):
        with pytest.raises(UnknownNameError, match=r"unknown option of acme/one 'dims'.*'dim'"):
            load_backbone("acme/one", dims=4)
        with pytest.raises(UnknownNameError, match="Known: weights, dtype"):
            load_backbone("acme/nothing", dim=4)
