"""The shallow features of regions: Trackastra's sets of properties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from trackastra.data import wrfeat as _wrfeat
from trackastra.utils import normalize

from ..errors import UnknownNameError
from ..movies import Series
from .ctc_source import frames_of, masks_of, owners_of

Props = Literal["regionprops_small", "regionprops", "regionprops2"]

SHALLOW_FEATURES: Mapping[str, tuple[str, ...]] = {
    "regionprops_small": ("area", "inertia_tensor"),
    "regionprops": (
        "area",
        "intensity_mean",
        "intensity_max",
        "intensity_min",
        "inertia_tensor",
    ),
    "regionprops2": (
        "equivalent_diameter_area",
        "intensity_mean",
        "inertia_tensor",
        "border_dist",
    ),
}
"""The sets of shallow features, as in trackastra-pretrained-feats and Trackastra's pull request 61;
``"regionprops2"`` is what `CTCData` has by itself."""


def check_props(props: str | None, option: str = "additional_props") -> None:
    """Raise UnknownNameError for a set of shallow features that there is not."""
    if props is not None and props not in SHALLOW_FEATURES:
        raise UnknownNameError(option, props, SHALLOW_FEATURES)


def columns_of(props: str | None, ndim: int) -> tuple[str, ...]:
    """Name each column of the shallow features."""
    check_props(props)
    names = SHALLOW_FEATURES[props] if props is not None else ()
    return tuple(
        name for name in names for _ in range(ndim * ndim if name == "inertia_tensor" else 1)
    )


def exchange_shallow(data: Any, folders: Sequence[str], props: Props) -> list[dict[str, Any]]:
    """Give the dataset's windows with other shallow features, measured as `CTCData` does."""
    frames = frames_of(data)
    measured = {name: _measure(data, name, frames, props) for name in dict.fromkeys(folders)}
    windows = []
    for window, owner in zip(data.windows, owners_of(data, folders), strict=True):
        regions = measured[list(measured)[owner]][window["t1"] : window["t1"] + data.window_size]
        windows.append({**window, "wrfeat": _wrfeat.WRFeatures.concat(regions)})
    return windows


def _measure(data: Any, folder: str, frames: Series, props: Props) -> list[Any]:
    masks = masks_of(data, folder, planar=False)
    measured = []
    for t in range(len(frames)):
        mask = masks[t]
        mask = mask[None] if mask.ndim < data.ndim else mask
        image = normalize(frames[t].astype(np.float32)).reshape(mask.shape)
        measured.append(measure_regions(mask, image, t, props))
    return measured


def measure_regions(mask: NDArray[Any], image: NDArray[Any], t: int, props: str | None) -> Any:
    """Measure the regions of frame `t`: a `WRFeatures`, without features where `props` is None."""
    known = "regionprops2" if props == "regionprops2" else "regionprops"
    regions = _wrfeat.WRFeatures.from_mask_img(mask[None], image[None], known, t_start=t)
    wanted = SHALLOW_FEATURES[props] if props is not None else ()
    for name in set(regions.features) - set(wanted):
        del regions.features[name]
    return regions
