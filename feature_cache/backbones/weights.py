"""Where the weights of backbones are on disk, found without loading a model or asking a network."""

from __future__ import annotations

import os
from pathlib import Path
from types import MappingProxyType

import platformdirs

COTRACKER_CHECKPOINT = "scaled_offline.pth"
COTRACKER_COPY = "facebookresearch_co-tracker_main"
"""The folder in which torch.hub keeps CoTracker's code."""
MICRO_SAM_MODELS = (
    *("vit_b_lm", "vit_l_lm", "vit_b_em_organelles", "vit_l_em_organelles"),
    *("vit_b_histopathology", "vit_l_histopathology", "vit_h_histopathology"),
    "vit_b_medical_imaging",
)
"""``micro_sam/util.py`` at 3acdcd7, those of SAM's own architecture."""
SAM2_SIZES = MappingProxyType({"tiny": "t", "small": "s", "base-plus": "b+", "large": "l"})


def published_files(model: str) -> tuple[str, str]:
    """Name the configuration in SAM 2's package and the checkpoint on the hub.

    Examples
    --------
    >>> published_files("facebook/sam2.1-hiera-base-plus")
    ('configs/sam2.1/sam2.1_hiera_b+.yaml', 'sam2.1_hiera_base_plus.pt')
    """
    version, _, size = model.removeprefix("facebook/").partition("-hiera-")
    config = f"configs/{version}/{version}_hiera_{SAM2_SIZES[size]}.yaml"
    return config, f"{version}_hiera_{size.replace('-', '_')}.pt"


def cellpose_file(checkpoint: str) -> Path:
    """Name the file that cellpose keeps a checkpoint in."""
    chosen = os.environ.get("CELLPOSE_LOCAL_MODELS_PATH")
    return (Path(chosen) if chosen else Path.home() / ".cellpose" / "models") / checkpoint


def micro_sam_file(model: str) -> Path:
    """Name the file that micro_sam keeps a model in."""
    folder = os.environ.get("MICROSAM_CACHEDIR") or platformdirs.user_cache_dir("micro_sam")
    return Path(folder) / "models" / model


def torch_hub_folder() -> Path:
    """Name torch.hub's folder, without loading torch."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get("TORCH_HOME", f"{cache}/torch")).expanduser() / "hub"


def find_weights(name: str, hub: tuple[str, str] | None) -> Path | None:
    """Find the file of a backbone's own weights, if it is here; `hub` is its repository and file.

    Looks where the model's own programs and the Hugging Face hub keep files; asks no network.
    """
    local = _own_place(name)
    if local is not None and local.is_file():
        return local
    return None if hub is None else _find_in_hub_cache(*hub)


def _own_place(name: str) -> Path | None:
    """Name the file that the model's own program keeps."""
    family, _, model = name.partition("/")
    if family == "microsam":
        return micro_sam_file(model)
    if name == "mouseland/cellpose-sam":
        return cellpose_file("cpsam")
    if name == "facebookresearch/co-tracker":
        return torch_hub_folder() / "checkpoints" / COTRACKER_CHECKPOINT
    return None


def _find_in_hub_cache(repo: str, file: str) -> Path | None:
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    found = try_to_load_from_cache(repo, file)
    return Path(found) if isinstance(found, str) else None
