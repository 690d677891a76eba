"""An engine and its backbones, at the service of this process and others of its host."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..cache import MovieFeatures, OpenCache
from ..engine import Model, Promise, request_frame
from ..errors import MissingRecordError
from ..spec import BackboneSpec
from .filling import Progress

if TYPE_CHECKING:
    from ..backbones.base import Backbone

_log = logging.getLogger(__name__)


class Service:
    """Computes what is missed in one cache, as long as somebody uses it.

    Parameters
    ----------
    cache : OpenCache
    memory_bytes : int, optional
        Pixels that may wait to be computed.
    progress : bool
        Whether to show a line on stderr, where that is a terminal.

    Attributes
    ----------
    engine : Engine
    backbones : dict of str to Backbone
        By the hex digest of their spec.
    """

    def __init__(
        self, cache: OpenCache, *, memory_bytes: int | None = None, progress: bool = False
    ) -> None:
        self.cache, self.progress = cache, Progress(progress)
        self.engine = cache.open_engine(memory_bytes=memory_bytes, computed=self.progress.count)
        self.backbones: dict[str, Backbone] = {}
        self._models: dict[str, Model] = {}
        self._lock = threading.RLock()

    def add_backbone(self, backbone: Backbone) -> None:
        """Serve a backbone."""
        with self._lock:
            self.backbones.setdefault(backbone.spec.digest.hex(), backbone)

    def model(self, spec: BackboneSpec) -> Model:
        """Give what computes with a backbone. MissingRecordError where it is not served."""
        digest = spec.digest.hex()
        # one a backbone: what it learns of memory, and proves, is of all its batches
        with self._lock:
            if digest not in self._models:
                backbone = self.backbones.get(digest)
                if backbone is None:
                    raise MissingRecordError(f"{spec.name} is not served here")
                self._models[digest] = self.cache.open_model(backbone, spec)
            return self._models[digest]

    def submit(
        self, movie: MovieFeatures, frames: Mapping[int, int], batch_size: int, *, ahead: bool
    ) -> dict[int, Promise]:
        """Have numbered frames of a movie read and computed; promise the record of each."""
        model = self.model(movie.spec.backbone)
        promises = {i: Promise() for i in frames}
        requests = [
            request_frame(model, t, [(movie, promises[i])], batch_size) for i, t in frames.items()
        ]
        for request in requests:
            request.ahead = ahead
        self.engine.submit(requests)
        return promises

    def close(self) -> None:
        """Commit what is computed, and end."""
        self.engine.close()
        if (late := self.engine.late) is not None:
            _log.error("%s", late)
        self.progress.close()
