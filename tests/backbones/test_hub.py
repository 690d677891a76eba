from __future__ import annotations

import logging
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

    def download(repo, filename, revision=None, local_files_only=False):
        asked.append(local_files_only)
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 8s")
        raise LocalEntryNotFoundError("no such file\nand more lines")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    return asked


def test_looks_in_the_local_cache_then_asks_the_hub(calls, monkeypatch, caplog):
    from huggingface_hub.constants import HF_HUB_CACHE

    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    with pytest.raises(BackboneError) as caught:
        hub_file("facebook/x", "x.pt")
    assert calls == [True, False]
    assert caplog.messages[1:] == ["x.pt of facebook/x is not on this machine: asking the hub"]
    assert str(caught.value) == (
        "no weights: x.pt of facebook/x is not in the hub's cache on this machine "
        f"({HF_HUB_CACHE}), and the hub can't be reached; where there is a network: "
        "hf download facebook/x x.pt; or pass weights=<path of a checkpoint> (--weights)"
    )


@pytest.mark.parametrize("error", [PermissionError, RuntimeError])
def test_what_the_hub_says_is_told(monkeypatch, error):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def download(repo, filename, revision=None, local_files_only=False):
        if local_files_only:
            raise LocalEntryNotFoundError("not here")
        raise error("the disk says no.\nand more lines")

    monkeypatch.setattr(hub, "hf_hub_download", download)
    with pytest.raises(BackboneError) as caught:
        hub_file("facebook/x", "x.pt")
    assert str(caught.value) == (
        f"can't get x.pt of facebook/x on the hub: {error.__name__}, the disk says no; "
        "pass weights=<path of a checkpoint> or weights='random:<seed>'"
    )


def test_a_file_that_is_there_needs_no_network(monkeypatch, tmp_path):
    def download(repo, filename, revision=None, local_files_only=False):
        assert local_files_only
        return str(tmp_path / filename)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    assert hub_file("facebook/x", "x.pt") == tmp_path / "x.pt"


@pytest.mark.parametrize("repo", ["a/b/c", "https://huggingface.co/a/b", "a b/c"])
def test_a_name_that_is_none(repo):
    with pytest.raises(BackboneError, match="is no repository of the hub: expected <owner>/<name>"):
        hub_file(repo, "x.pt")


def test_a_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match="pip install huggingface_hub"):
        hub_file("facebook/x", "x.pt")


def test_a_missing_package_of_a_backbone_names_its_extra(monkeypatch):
    for package in ("huggingface_hub", "transformers"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingDependencyError) as caught:
        hub_file("facebook/dinov2-base", "model.safetensors")
    assert str(caught.value) == (
        "the backbone 'facebook/dinov2-base' needs the package 'huggingface_hub'; install it with: "
        'pip install "feature-cache[transformers]"'
    )
