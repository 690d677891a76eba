from __future__ import annotations

import sys

import pytest

from feature_cache import BackboneError, MissingDependencyError
from feature_cache.backbones.hub import hub_file

hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub")


@pytest.fixture
def calls(monkeypatch):
    """A hub that has nothing in its cache, and what it was asked."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repo, filename, local_files_only=False):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError("no such file\nand more lines")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return asked


def test_looks_in_the_local_cache_then_asks_the_hub(calls):
    with pytest.raises(BackboneError) as caught:
        hub_file("facebook/x", "x.pt")
    assert calls == [True, False]
    assert str(caught.value) == (
        "can't get x.pt of the hub's repository facebook/x: LocalEntryNotFoundError, no such file; "
        "pass weights=<path of a checkpoint> or weights='random:<seed>'"
    )


def test_a_file_that_is_there_needs_no_network(monkeypatch, tmp_path):
    def download(repo, filename, local_files_only=False):
        assert local_files_only
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub_file("facebook/x", "x.pt") == tmp_path / "x.pt"


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        hub_file("facebook/x", "x.pt")
