"""The command that computes for others: serve."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Annotated

import typer

from .options import (
    COMPUTING,
    BackboneOption,
    CacheOption,
    CodecOption,
    ComputeDtypeOption,
    WeightsOption,
    age_option,
    size_option,
)

if TYPE_CHECKING:
    from ..service import Host

_LOOK_SECONDS = 0.2
_ALONE_SECONDS = 60.0
"""Workers of a training come and go: between two epochs nobody may be there."""


def serve(
    cache: CacheOption,
    backbone: BackboneOption,
    weights: WeightsOption = None,
    device: Annotated[
        str | None,
        typer.Option(help="Such as cuda:0; default: the best.", rich_help_panel=COMPUTING),
    ] = None,
    compute_dtype: ComputeDtypeOption = None,
    codec: CodecOption = "raw",
    idle: Annotated[
        float | None,
        age_option(
            "End when nobody was connected for so long, such as 10m; default: a minute after the "
            "last one left."
        ),
    ] = None,
    memory: Annotated[
        int | None, size_option("Pixels that may wait to be computed; default: 2GiB.")
    ] = None,
) -> None:
    """Compute features for the trainings on this host that miss them.

    Trainings find it by themselves. It ends a minute after the last of them is gone; SIGTERM and
    Ctrl-C end it too. What is computed is committed.

    Example: feature-cache serve --cache features --backbone efficientnet-lite0 --idle 10m
    """
    from ..backbones import load_backbone
    from ..backbones.name import name_with_dtype
    from ..cache import FeatureCache
    from ..engine import say_kept
    from ..errors import ServiceError
    from ..service import open_host

    model = load_backbone(name_with_dtype(backbone, compute_dtype), weights, device)
    opened = FeatureCache(cache, codec=codec)
    user = _User()
    host = open_host(
        opened, [model], user,
        standalone=True, memory_bytes=memory, progress=True,
    )  # fmt: skip
    typer.echo(f"serving {model.spec.name} for {opened.store.root}; Ctrl-C ends it", err=True)
    try:
        _wait(host, idle)
        if (error := host.service.engine.error) is not None:
            raise ServiceError(f"what computes has ended: {error}") from error
    except (KeyboardInterrupt, SystemExit) as end:
        host.close()
        say_kept(host.service.engine.kept)
        if isinstance(end, SystemExit):
            raise
    finally:
        host.close()
        opened.counter.save()
        typer.echo(host.service.progress.text, err=True)


class _User:
    """Who uses the engine: this command."""


def _wait(host: Host, idle_seconds: float | None) -> None:
    """Wait until nobody was there for some time; without one, for some after the last user."""
    began = host.server.used if host.server is not None else 0.0
    while host.server is not None and not host.service.engine.closing:
        time.sleep(_LOOK_SECONDS)
        after_last = math.inf if host.server.used == began else _ALONE_SECONDS
        allowed = after_last if idle_seconds is None else idle_seconds
        if not len(host.server) and time.monotonic() - host.server.used > allowed:
            return
