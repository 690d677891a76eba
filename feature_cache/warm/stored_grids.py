"""What stands for a model where all is pooled from stored grids."""

from __future__ import annotations

from typing import NoReturn

from torch import Tensor

from ..backbones.from_spec import is_named
from ..cache import GRID_DTYPE, FeatureCache
from ..errors import BackboneError, MissingRecordError, UnknownNameError
from ..spec import KEY_VERSION, BackboneSpec, describe


class StoredGrids:
    """Stands where the backbone of a spec does, for grids that are all stored; holds no model."""

    def __init__(self, spec: BackboneSpec) -> None:
        self.spec = spec

    @classmethod
    def find(cls, cache: FeatureCache, name: str | None = None) -> StoredGrids:
        """Find the float32 grids of a cache.

        Parameters
        ----------
        cache : FeatureCache
        name : str, optional
            Of the backbone, with options, or the beginning of the space's folder; needed where
            there are several.

        Raises
        ------
        MissingRecordError
            There are none.
        UnknownNameError
            There are several, or none of that name.
        """
        found = {
            space.name: space.spec["backbone"]
            for space in cache.spaces()
            if space.spec["pooling"] is None
            and space.spec["dtype"] == GRID_DTYPE
            and space.spec["key_version"] == KEY_VERSION
        }
        if not found:
            others = sorted({describe(space.spec) for space in cache.spaces()})
            raise MissingRecordError(
                f"{cache.store.root} holds no grids in {GRID_DTYPE} (it holds: "
                f"{', '.join(others) or 'nothing'}): warm with --dense original or all first"
            )
        wanted = {
            folder: plain
            for folder, plain in found.items()
            if name is None
            or folder.startswith(name)
            or is_named(BackboneSpec.from_json(plain), name)
        }
        if len(wanted) != 1:
            raise UnknownNameError("space of grids", name or "(not named)", sorted(found))
        return cls(BackboneSpec.from_json(next(iter(wanted.values()))))

    def embed(self, frames: Tensor) -> NoReturn:
        """Raise BackboneError: a grid that should be stored is gone."""
        raise BackboneError(
            f"a grid of {self.spec.name} is gone from the cache, and --from-grids loads no model"
        )
