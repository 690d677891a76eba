"""Checkpoints on disk: which file a path stands for, and whether it is what was asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import BackboneError
from .base import load_checkpoint


def read_tensors(file: Path, prefixes: Sequence[str]) -> dict[str, Tensor]:
    """Read the tensors whose names start with a prefix, which is cut off.

    Of several, the first that any name starts with is taken; ``""`` takes all. The file is
    ``.safetensors``, or a state dict that torch can read with ``weights_only=True``.

    Raises
    ------
    BackboneError
        It is no such file, or no name starts with any of the prefixes.
    """
    tensors = load_checkpoint(file)
    for prefix in prefixes:
        chosen = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        if chosen:
            return chosen
    raise BackboneError(
        f"{file} is a checkpoint of another model: none of its {len(tensors)} tensors is named "
        f"{' or '.join(f'{prefix}…' for prefix in prefixes)}; the first is "
        f"{next(iter(tensors), None)!r}"
    )


def as_json(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Give a mapping as a JSON file would."""
    told: dict[str, Any] = json.loads(json.dumps(dict(plain)))
    return told


def check_config(folder: Path, wanted: Mapping[str, Any], model: str, part: str = "") -> None:
    """Check that the ``config.json`` beside a checkpoint, if there, describes this architecture.

    All that is `wanted` must be so where the file, or that `part` of it, says anything of it; where
    there is a ``vision_config``, that counts.

    Raises
    ------
    BackboneError
        It can't be read, or a value differs.
    """
    file = folder / "config.json"
    if not file.is_file():
        return
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise BackboneError(f"{file} is no JSON: {error}") from error
    config = config.get(part, {}) if part else config
    config = config.get("vision_config", config)
    for name, value in as_json(wanted).items():
        if name in config and config[name] != value:
            raise BackboneError(
                f"{file} does not describe {model}: {name} is {config[name]!r}, expected {value!r}"
            )
