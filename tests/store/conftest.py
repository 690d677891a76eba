"""A cache folder, its store and its spaces."""

from __future__ import annotations

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
