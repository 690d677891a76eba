"""Run a training script, or Trackastra's own command, that is not changed, with cached features.

``python -m feature_cache.trackastra.run --cache features train.py --features …``, or
``… --cache features trackastra track -i movie -m masks --model-custom model``
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from lightning.fabric.strategies.launchers import subprocess_script as _fabric
from lightning.pytorch.strategies.launchers import subprocess_script as _pytorch

from ..cache import FeatureCache
from ..command_errors import run_command
from ..errors import MissingDependencyError
from ..train_options import find_seed
from .inference import cached_inference
from .patching import patch, replaced


def run(
    script: Annotated[str, typer.Argument(help="A file, or an installed command's name.")],
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
    dtype: Annotated[
        str | None, typer.Option(help="Of what is stored; default: float16, or a model's own.")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(help="Of augmented copies; default: the script's --seed or configuration's."),
    ] = None,
    policy: Annotated[str, typer.Option(help="Of augmented copies.")] = "default",
    geometry: Annotated[
        str, typer.Option(help="Coordinates of a copy: map them as its pixels, or keep them.")
    ] = "map",
    on_miss: Annotated[
        str, typer.Option(help="What is missing: compute it, or stop with an error.")
    ] = "compute",
) -> None:
    """Run a SCRIPT that trains or tracks with Trackastra, on cached features.

    Under patch() and cached_inference() of feature_cache. Our options come before the script, its
    own after it.
    """
    begin = _find_script(script)
    arguments = arguments or []
    ours = sys.argv[1 : len(sys.argv) - len(arguments)]
    opened = FeatureCache(cache)
    with ExitStack() as stack:
        stack.enter_context(
            patch(
                opened, backbone=backbone, weights=weights, device=device, dtype=dtype or "float16",
                seed=find_seed(arguments) if seed is None else seed,
                policy=policy, geometry=geometry, on_miss=on_miss,  # type: ignore[arg-type]
            )
        )  # fmt: skip
        with suppress(MissingDependencyError):  # this Trackastra tracks without such features
            stack.enter_context(
                cached_inference(opened, backbone=backbone, weights=weights, dtype=dtype)
            )
        stack.enter_context(_launched_alike([sys.executable, "-m", __spec__.name, *ours]))
        stack.enter_context(replaced(sys, "argv", [script, *arguments]))
        begin()
    if not opened.was_asked:
        typer.echo(
            f"{script} asked nothing of {cache}: it loads no CTCData of pretrained_feats or "
            "pretrained_feats_aug, and tracks by no model that was trained on these",
            err=True,
        )


def _find_script(script: str) -> Callable[[], object]:
    """Give what runs a file, or a command of an installed package."""
    if Path(script).is_file():
        folder = str(Path(script).resolve().parent)

        def run_file() -> None:
            with replaced(sys, "path", [folder, *sys.path[1:]]):
                runpy.run_path(script, run_name="__main__")

        return run_file
    for command in entry_points(group="console_scripts", name=script):
        return command.load()
    raise typer.BadParameter(f"{script} is neither a file nor the command of an installed package")


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
    run_command(app, f"python -m {__spec__.name}")


if __name__ == "__main__":
    main()
