"""What a cache holds for some frames of a movie, beside what the frames show."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..augment import Augmentations
from ..backbones import load_backbone
from ..backbones.from_spec import is_named, name_in_full
from ..backbones.name import split_name
from ..cache import FeatureCache, MovieFeatures
from ..errors import CorruptRecordError, MovieError
from ..hashing import DIGEST_BYTES, canonical_json
from ..key import Keys, Record
from ..movies import Source
from ..spec import KEY_VERSION, STORAGE_DTYPES, BackboneSpec, Normalization, SpaceSpec
from ..store import Pack, Space
from ..warm import StoredGrids
from .warm_command import WarmOptions

if TYPE_CHECKING:
    from ..backbones.base import Backbone

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FrameView:
    """One frame as the backbone saw it, and what is stored for it.

    Attributes
    ----------
    number : int
    file : str
    image : (H, W) float32 in 0..1
        Normalised, and under the draw; of a stack, one slice.
    mask : (H, W) int32, or None
        Under the draw.
    grid : (gh, gw, C), or None
        Of the same slice.
    regions : Record or None
        The vectors of the regions.
    """

    number: int
    file: str
    image: NDArray[np.float32]
    mask: NDArray[np.int32] | None
    grid: NDArray[Any] | None
    regions: Record | None


@dataclass(frozen=True, slots=True)
class Strip:
    """Some frames of a movie.

    Attributes
    ----------
    movie : str
        Its name.
    space : str
        What was looked for, as the name of a space.
    copy : str
        Which copy; empty for the movie itself.
    slice : tuple of (int, int), or None
        Which slice of a stack is shown, and of how many.
    masked : bool
        Whether regions were asked for, or grids alone.
    command : str
        What warms the movie.
    frames : tuple of FrameView
    """

    movie: str
    space: str
    copy: str
    slice: tuple[int, int] | None
    masked: bool
    command: str
    frames: tuple[FrameView, ...]

    @property
    def missing(self) -> tuple[int, ...]:
        """Name the frames whose record is not there."""
        return tuple(
            view.number
            for view in self.frames
            if (view.regions if self.masked else view.grid) is None
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """Which records of a movie to show.

    Attributes
    ----------
    backbone, weights, pooling, dtype : as the command line has them
        A pooling of None shows grids alone.
    policy, seed, copy : the copy; 0 is the movie itself
    """

    backbone: str
    weights: str | None = None
    pooling: str | None = "mean_patches_exact"
    dtype: str = "float16"
    policy: str = "default"
    seed: int = 0
    copy: int = 0

    @property
    def augmentations(self) -> Augmentations:
        """The copies up to the one that is shown."""
        return Augmentations(self.policy, self.copy, self.seed)

    def warm_options(self, cache: Path) -> WarmOptions:
        """Give what warms it."""
        return WarmOptions(
            str(cache), self.backbone, self.pooling, self.dtype, self.weights,
            self.copy, self.seed, self.policy,
        )  # fmt: skip


def find_backbone(cache: FeatureCache, choice: Choice) -> Backbone | StoredGrids:
    """Find a backbone's spec: in the cache, where there is one of that name, without its model.

    Raises
    ------
    UnknownNameError, MissingDependencyError, BackboneError
        As `feature_cache.load_backbone`, which is asked where the cache knows none of that name,
        or several, or where weights were named.
    """
    found = {
        canonical_json(space.spec["backbone"]): space.spec["backbone"]
        for space in cache.spaces()
        if space.spec["backbone"]["name"] == split_name(choice.backbone)[0]
        and space.spec["key_version"] == KEY_VERSION
    }
    specs = [BackboneSpec.from_json(plain) for plain in found.values()]
    specs = [spec for spec in specs if is_named(spec, choice.backbone)]
    if choice.weights is None and len(specs) == 1:
        return StoredGrids(specs[0])
    return load_backbone(choice.backbone, choice.weights)


def spread_frames(count: int, wanted: int) -> list[int]:
    """Choose consecutive frames around the middle of a movie: over them, cells can be followed.

    >>> spread_frames(20, 4)
    [8, 9, 10, 11]
    """
    first = max(0, (count - wanted) // 2)
    return list(range(first, min(count, first + wanted)))


def look_at(
    cache: FeatureCache, source: Source, choice: Choice, frames: Sequence[int] | int
) -> Strip:
    """Read frames of a movie, and what is stored for them. Computes nothing, changes nothing.

    Reading counts as no use of the cache. Layers that are remote are left out.

    Parameters
    ----------
    cache : FeatureCache
        In mode ``"r"``.
    source : Source
        How the movie is opened.
    choice : Choice
    frames : sequence of int, or int
        Which, or how many from the middle of the movie.

    Raises
    ------
    MovieError
        The movie can't be read, or has no such frame.
    FeatureCacheError
        As `find_backbone`; names that are unknown.
    """
    backbone = find_backbone(cache, choice)
    spec = SpaceSpec(backbone.spec, choice.pooling, choice.dtype)
    draw = choice.augmentations.draw(choice.copy)
    wanted = source if choice.pooling else replace(source, detections=None, masks=None)
    movie = wanted.open()
    numbers = spread_frames(len(movie), frames) if isinstance(frames, int) else list(frames)
    if absent := [t for t in numbers if t not in range(len(movie))]:
        raise MovieError(f"{movie.name} has no frame {absent[0]}: expected 0 to {len(movie) - 1}")
    features = cache.movie(
        movie, None, backbone, pooling=choice.pooling, dtype=choice.dtype, draw=draw
    )
    viewer = _Viewer(cache, features, numbers)
    # a bare name stands for whatever is stored, but for the defaults where it is warmed
    named = choice.backbone if "?" in choice.backbone else name_in_full(backbone.spec)
    return Strip(
        movie=movie.name,
        space=spec.folder_name,
        copy=choice.augmentations.name_of(choice.copy) if choice.copy else "",
        slice=viewer.slice,
        masked=choice.pooling is not None,
        command=replace(choice, backbone=named).warm_options(cache.store.root).command(wanted),
        frames=tuple(viewer.view(t) for t in numbers),
    )


class _Viewer:
    """Puts together what is shown of frames."""

    def __init__(
        self,
        cache: FeatureCache,
        features: MovieFeatures,
        numbers: Sequence[int],
    ) -> None:
        self.features = features
        self.slice = self._choose_slice(numbers)
        masked = features.spec.pooling is not None
        self._regions = _read(cache, features, numbers) if masked else {}
        specs = [SpaceSpec(features.spec.backbone, None, dtype) for dtype in STORAGE_DTYPES]
        own = [features.spec] if not masked else []
        self._grids: dict[int, Record] = {}
        for spec in dict.fromkeys((*own, *reversed(specs))):
            absent = [t for t in numbers if t not in self._grids]
            self._grids |= _read(cache, features.in_space(spec), absent)

    def _choose_slice(self, numbers: Sequence[int]) -> tuple[int, int] | None:
        """Choose the slice in which most pixels of the first frame's regions lie."""
        first = self.features.frames[numbers[0]]
        if first.ndim == 2:
            return None
        if self.features.masks is None:
            return len(first) // 2, len(first)
        mask = self.features.masks[numbers[0]]
        return int((mask > 0).sum(axis=(1, 2)).argmax()), len(first)

    def view(self, t: int) -> FrameView:
        frame = self.features.read(t)
        z = self.slice[0] if self.slice else 0
        normalization = self.features.spec.backbone.normalization
        image = frame.normalized(normalization)[z : z + 1]
        drawn = self.features.draw.apply(
            torch.from_numpy(image),
            digests=frame.slice_digests()[z : z + 1],
            bounds=normalization.range,
        )
        grid = self._grids[t].features if t in self._grids else None
        return FrameView(
            number=t,
            file=self.features.frames.name_of(t),
            image=_stretch(drawn[0].numpy(), normalization),
            mask=self._draw_mask(frame.mask, z),
            grid=grid[z] if grid is not None and grid.ndim == 4 else grid,
            regions=self._regions.get(t),
        )

    def _draw_mask(self, mask: NDArray[np.int32] | None, z: int) -> NDArray[np.int32] | None:
        if mask is None:
            return None
        return self.features.draw.apply_mask(mask if mask.ndim == 2 else mask[z])


def _stretch(image: NDArray[np.float32], normalization: Normalization) -> NDArray[np.float32]:
    """Bring pixels that were not normalised to 0..1."""
    if normalization.name != "none":
        return image
    low, high = float(image.min()), float(image.max())
    return (image - low) / (high - low or 1.0)


def _read(
    cache: FeatureCache, features: MovieFeatures, numbers: Sequence[int]
) -> dict[int, Record]:
    """Read records of some frames from all folders of a cache; those missing are left out."""
    keys = {t: features.key(t) for t in numbers}
    found: dict[bytes, Record] = {}
    for store in cache.stores():
        store.presence  # noqa: B018 - gc then knows what is read here
        absent = sorted({key for key in keys.values() if key not in found})
        rows = np.frombuffer(b"".join(absent), np.uint8).reshape(-1, DIGEST_BYTES)
        found |= _read_from(store.space(features.spec), rows)
    return {t: found[key] for t, key in keys.items() if key in found}


def _read_from(space: Space, keys: Keys) -> dict[bytes, Record]:
    """Read records of one space, verified; reading counts as no use of their packs."""
    wanted = {key.tobytes() for key in keys}
    found: dict[bytes, Record] = {}
    space.refresh()
    for name in space.packs_of(keys):
        try:
            pack = Pack(space.packs_folder / name)
            rows = [(i, key.tobytes()) for i, key in enumerate(pack.keys)]
            found |= {key: pack.record(i) for i, key in rows if key in wanted}
        except (FileNotFoundError, CorruptRecordError) as error:
            _log.warning("%s; what it holds is shown as missing", error)
    return found
