"""The command that computes for others: serve."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from .options import BackboneOption, CacheOption, WeightsOption, parse_age, parse_size

if TYPE_CHECKING:
    from ..service import Host

_LOOK_SECONDS = 0.2


def serve(
    cache: CacheOption,
    backbone: BackboneOption,
    weights: WeightsOption = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: the best.")] = None,
    compute_dtype: Annotated[
        str, typer.Option(help="Of the computation: float32, bfloat16 or float16.")
    ] = "float32",
    codec: Annotated[str, typer.Option(help="Storage: raw, zstd or blosc.")] = "raw",
    idle: Annotated[
        str | None, typer.Option(help="End when nobody was connected for so long, such as 10m.")
    ] = None,
    memory: Annotated[str, typer.Option(help="Pixels that may wait to be computed.")] = "2GiB",
) -> None:
    """Compute features for the trainings on this host that miss them, until stopped.

    Trainings find it by themselves. SIGTERM and Ctrl-C commit what is computed.

    Example: feature-cache serve --cache features --backbone facebook/dinov2-small --device cuda:1
    """
    from ..backbones import load_backbone
    from ..cache import FeatureCache
    from ..service import open_host

    seconds = None if idle is None else parse_age(idle)
    model = load_backbone(backbone, weights, device, compute_dtype)
    opened = FeatureCache(cache, codec=codec)
    user = _User()
    host = open_host(
        opened, [model], user,
        standalone=True, memory_bytes=parse_size(memory), progress=True,
    )  # fmt: skip
    typer.echo(f"serving {model.spec.name} for {opened.store.root}; Ctrl-C ends it", err=True)
    try:
        _wait(host, seconds)
    except KeyboardInterrupt:
        pass
    finally:
        host.close()
        opened.counter.save()
        typer.echo(host.engine.progress.text, err=True)


class _User:
    """Who uses the engine: this command."""


def _wait(host: Host, idle_seconds: float | None) -> None:
    """Wait until nobody was there for some time."""
    while host.server is not None and not host.engine.closing:
        time.sleep(_LOOK_SECONDS)
        idle = not len(host.server) and time.monotonic() - host.server.used
        if idle_seconds is not None and idle and idle > idle_seconds:
            return
