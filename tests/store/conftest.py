"""A cache folder, its store and its spaces."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_cache.store import Space, Store
from samples import make_spec


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def space(root: Path) -> Space:
    """A space of regions, float16, in a new cache."""
    return Store(root).space(make_spec())


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that any user may read, where tests may become another user."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)
