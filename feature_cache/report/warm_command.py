"""The command that warms what is missing."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..backbones.from_spec import name_in_full
from ..movies import Source
from ..spec import KEY_VERSION, BackboneSpec

_DEFAULTS = {
    "pooling": "mean_patches_exact",
    "dtype": "float16",
    "seed": "0",
    "policy": "default",
}


@dataclass(frozen=True, slots=True)
class WarmOptions:
    """What the command ``warm`` is given beside the movie.

    Attributes
    ----------
    cache, backbone, dtype : str
    pooling : str or None
        None keeps grids.
    weights : str or None
        As they were named; a cache knows only their digest.
    copies, seed : int
    policy : str
        Empty where there are no copies.
    """

    cache: str
    backbone: str
    pooling: str | None
    dtype: str
    weights: str | None = None
    copies: int = 0
    seed: int = 0
    policy: str = ""

    @classmethod
    def of_spec(
        cls, spec: Mapping[str, Any], cache: str, copies: int = 0, seed: int = 0, policy: str = ""
    ) -> WarmOptions:
        """Give the options for a space, by its spec as JSON."""
        pooling = (spec["pooling"] or {}).get("name")
        backbone = str(spec["backbone"]["name"])
        if spec["key_version"] == KEY_VERSION:
            backbone = name_in_full(BackboneSpec.from_json(spec["backbone"]))
        return cls(cache, backbone, pooling, str(spec["dtype"]), None, copies, seed, policy)

    @property
    def text(self) -> str:
        """The command, with ``{movie}`` where `quote_movie` goes."""
        return f"feature-cache warm {{movie}} {shlex.join(self._words())}"

    def command(self, source: Source) -> str:
        """Give the whole command, to be pasted into a shell."""
        return self.text.replace("{movie}", quote_movie(source), 1)

    def _words(self) -> Iterator[str]:
        yield from ("--cache", self.cache, "--backbone", self.backbone)
        if self.weights is not None:
            yield from ("--weights", self.weights)
        values = {"pooling": self.pooling or "none", "dtype": self.dtype}
        if self.copies:
            yield from ("--copies", str(self.copies))
            values |= {"seed": str(self.seed), "policy": self.policy}
        for name, value in values.items():
            if value != _DEFAULTS[name]:
                yield from (f"--{name}", value)


def quote_movie(source: Source) -> str:
    """Write a movie as the command ``warm`` takes it, safe in a shell."""
    path = source.path
    words = [f"./{path}" if path.startswith("-") else path]
    detections = None if source.masks is not None else source.detections
    options = {
        "--detections": None if detections == "TRA" else detections,
        "--masks": source.masks,
        "--channel": source.channel,
        "--axes": source.axes,
    }
    for option, value in options.items():
        words += [option, str(value)] if value is not None else []
    return shlex.join(words)
