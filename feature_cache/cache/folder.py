"""A cache's folder and those below it, opened: spaces, usage, and the engine that fills them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..backbones.several_layers import Layers
from ..engine import MEMORY_BYTES, Budget, Engine, Model, Written, grid_spec
from ..errors import UnknownNameError
from ..hashing import Digest
from ..spec import BackboneSpec, SpaceSpec
from ..store import CODECS, Counter, Mode, Space, Store
from ..store.layers import layer_space, open_layers

if TYPE_CHECKING:
    from ..backbones.base import Backbone


class OpenCache:
    """The folders of a cache; see `FeatureCache`."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        mode: Mode = "a",
        codec: str = "raw",
        *,
        layers: Sequence[str | os.PathLike[str]] = (),
        promote: bool = False,
        create: bool = True,
    ) -> None:
        if codec not in CODECS:
            raise UnknownNameError("codec", codec, CODECS)
        self.store = Store(root, mode, create=create)
        self.codec, self.promote = codec, promote
        self.layers = open_layers(layers)
        self._spaces: dict[Digest, Space] = {}
        self.counter = Counter(self.store)
        weakref.finalize(self, self.counter.save)

    def __repr__(self) -> str:
        """Show root and mode."""
        return f"FeatureCache({str(self.store.root)!r}, mode={self.store.mode!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the same folder elsewhere; the counters belong to this process."""
        layers = tuple(layer.place for layer in self.layers)
        open_again = partial(type(self), layers=layers, promote=self.promote, create=False)
        return open_again, (str(self.store.root), self.store.mode, self.codec)

    def space(self, spec: SpaceSpec) -> Space:
        """Give the space of a spec, opened once."""
        digest = spec.digest
        if digest not in self._spaces:
            top = self.store.space(spec)
            self._spaces[digest] = layer_space(top, spec, self.layers, promote=self.promote)
        return self._spaces[digest]

    @property
    def was_asked(self) -> bool:
        """Whether anything was asked of a space, through this object."""
        return bool(self._spaces)

    def spaces(self) -> list[Space]:
        """List the spaces on disk, here and in folders below."""
        return [space for store in self.stores() for space in store.spaces()]

    def stores(self) -> list[Store]:
        """Give the folders: this one, and those below it."""
        return [self.store, *(cache for cache in self.layers if isinstance(cache, Store))]

    def open_engine(
        self,
        *,
        budget: Budget | None = None,
        written: Written | None = None,
        memory_bytes: int | None = None,
        computed: Callable[[int], None] = lambda _: None,
    ) -> Engine:
        """Make an engine that computes for this cache; parameters as `Engine`."""
        return Engine(
            self.store.claims,
            self.counter,
            self.codec,
            budget=budget,
            written=written,
            memory_bytes=memory_bytes or MEMORY_BYTES,
            computed=computed,
        )

    def open_model(self, backbone: Backbone | Layers, spec: BackboneSpec) -> Model:
        """Make what computes with a backbone, or pools what it has stored here in float32.

        Parameters
        ----------
        backbone : Backbone or Layers
        spec : BackboneSpec
            Of which the keys were made; of several layers, their own are taken.
        """
        specs = backbone.specs if isinstance(backbone, Layers) else (spec,)
        return Model(backbone, specs, {spec: self.space(grid_spec(spec)) for spec in specs})
