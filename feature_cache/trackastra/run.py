"""Run a training script that is not changed, with cached features.

``python -m feature_cache.trackastra.run --cache features train.py --features …``
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from lightning.fabric.strategies.launchers import subprocess_script as _fabric
from lightning.pytorch.strategies.launchers import subprocess_script as _pytorch

from ..errors import FeatureCacheError
from .patching import patch, replaced


def run(
    script: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    arguments: Annotated[list[str] | None, typer.Argument(help="Of the script.")] = None,
    *,
    cache: Annotated[
        Path, typer.Option(help="The cache's folder.", envvar="FEATURE_CACHE_DIR", metavar="FOLDER")
    ],
    backbone: Annotated[
        str | None, typer.Option(help="In the place of the script's own choice.")
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Of the backbone: a checkpoint, or random:<seed>.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cuda:0; default: the best.")] = None,
    dtype: Annotated[str, typer.Option(help="Of what is stored.")] = "float16",
    seed: Annotated[int, typer.Option(help="Of augmented copies.")] = 0,
    policy: Annotated[str, typer.Option(help="Of augmented copies.")] = "default",
    geometry: Annotated[
        str, typer.Option(help="Coordinates of a copy: map them as its pixels, or keep them.")
    ] = "map",
    on_miss: Annotated[
        str, typer.Option(help="What is missing: compute it, or stop with an error.")
    ] = "compute",
) -> None:
    """Run a Trackastra training SCRIPT with cached features, under feature_cache's patch().

    Our options come before the script, its own after it.
    """
    arguments = arguments or []
    ours = sys.argv[1 : len(sys.argv) - len(arguments)]
    with ExitStack() as stack:
        stack.enter_context(
            patch(
                cache, backbone=backbone, weights=weights, device=device, dtype=dtype, seed=seed,
                policy=policy, geometry=geometry, on_miss=on_miss,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        stack.enter_context(_launched_alike([sys.executable, "-m", __spec__.name, *ours]))
        stack.enter_context(replaced(sys, "argv", [str(script), *arguments]))
        stack.enter_context(replaced(sys, "path", [str(script.resolve().parent), *sys.path[1:]]))
        runpy.run_path(str(script), run_name="__main__")


@contextmanager
def _launched_alike(command: list[str]) -> Iterator[None]:
    """Have Lightning start its other ranks as this one, not by the script alone."""

    def of_rank() -> list[str]:
        return [*command, *sys.argv[1:]]

    with (
        replaced(_fabric, "_basic_subprocess_cmd", of_rank),
        replaced(_pytorch, "_basic_subprocess_cmd", of_rank),
    ):
        yield


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
app.command(context_settings={"allow_interspersed_args": False})(run)


def main() -> None:
    """Run it; errors of ours become one line and exit status 2, the script's stay as they are."""
    try:
        app()
    except FeatureCacheError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
