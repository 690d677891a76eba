"""How fast frames were computed on this device the last time: for estimates of time."""

from __future__ import annotations

import json
import logging
import platform
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..backbones.several_layers import Layers, specs_of
from ..hashing import digest_json
from ..memo import memo_folder, memo_is_off
from ..system import replace

if TYPE_CHECKING:
    from ..backbones.base import Backbone

_ENOUGH_FRAMES = 16
_log = logging.getLogger(__name__)


def recall_rate(backbone: Backbone | Layers) -> float | None:
    """Give the frames a second of the last run on such a device; None where there was none."""
    if memo_is_off():
        return None
    try:
        rate = json.loads(_file_of(backbone).read_text("utf-8"))["frames_per_second"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(rate) if type(rate) in (int, float) and rate > 0 else None


def remember_rate(backbone: Backbone | Layers, frames: int, seconds: float) -> None:
    """Remember the pace of a run, in the user's memo; one of a few frames says nothing.

    Nor does one that ended within a tick of a coarse clock, such as that of Windows.
    """
    if frames < _ENOUGH_FRAMES or seconds <= 0 or memo_is_off():
        return
    file = _file_of(backbone)
    temporary = file.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"frames_per_second": frames / seconds}), "utf-8")
        replace(temporary, file)
    except OSError as error:
        _log.info("can't remember the pace in %s: %s", file.parent, error)


def _file_of(backbone: Backbone | Layers) -> Path:
    specs = [spec.to_json() for spec in specs_of(backbone)]
    about: list[Any] = [*specs, _name_device(getattr(backbone, "device", "cpu"))]
    return memo_folder() / f"{digest_json(about).hex()}.rate"


def _name_device(device: object) -> str:
    """Name a kind of device; another host is another kind, where it is no GPU."""
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device} of {platform.node()}"
