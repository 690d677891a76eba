"""What people get who install the package, built once from the checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import feature_cache

pytestmark = pytest.mark.slow
ROOT = Path(feature_cache.__file__).parents[1]
VERSION = feature_cache.__version__


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that was built from it."""
    pytest.importorskip("build")
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built / f"feature_cache-{VERSION}-py3-none-any.whl")


@pytest.fixture(scope="module")
def sdist(built: Path) -> list[str]:
    base = f"feature_cache-{VERSION}"
    with tarfile.open(built / f"{base}.tar.gz") as opened:
        return [name.removeprefix(f"{base}/") for name in opened.getnames()]


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    return message_from_bytes(wheel.read(f"feature_cache-{VERSION}.dist-info/METADATA"))


def sources() -> set[str]:
    """Name the files of the package: modules, stubs, templates."""
    files = (file for file in ROOT.glob("feature_cache/**/*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}


def test_the_wheel_is_the_package_and_nothing_else(wheel):
    names = set(wheel.namelist())
    package = {name for name in names if name.startswith("feature_cache/")}
    assert sources() <= package
    assert {"feature_cache/py.typed", "feature_cache/__init__.pyi"} <= package
    assert all(name.startswith(f"feature_cache-{VERSION}.dist-info/") for name in names - package)
    assert not [name for name in names if "__pycache__" in name]


def test_the_sdist_has_package_and_tests(sdist):
    assert sources() <= set(sdist)
    wanted = {"pyproject.toml", "README.md", "LICENSE", "tests/conftest.py", "docs/index.md"}
    assert wanted <= set(sdist)
    assert {name.split("/")[0] for name in sdist} <= {
        *("feature_cache", "tests", "docs", "mkdocs.yml", "pyproject.toml"),
        *("README.md", "CHANGELOG.md", "CITATION.cff", "LICENSE", "PKG-INFO", ".gitignore"),
    }


def test_the_metadata(metadata):
    trove = pytest.importorskip("trove_classifiers")
    assert metadata["Version"] == VERSION
    assert metadata["License-Expression"] == "BSD-3-Clause"
    assert metadata.get_all("Project-URL") is None
    assert set(metadata.get_all("Classifier")) <= trove.classifiers
    assert "Typing :: Typed" in metadata.get_all("Classifier")


def test_nothing_optional_is_required(metadata):
    core = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    names = " ".join(core)
    for package in ("torchvision", "timm", "transformers", "sam2", "trackastra", "obstore"):
        assert package not in names
    assert all(">=" in line for line in core)


def test_the_command_is_there(wheel):
    scripts = wheel.read(f"feature_cache-{VERSION}.dist-info/entry_points.txt").decode()
    assert "feature-cache = feature_cache.cli:main" in scripts
