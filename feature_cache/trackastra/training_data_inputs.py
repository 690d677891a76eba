"""What a movie's training data are made of: folders, hashed, tracks and options."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache.movie_keys import in_files
from ..errors import NoMasksError
from ..hashing import (
    JSON,
    Digest,
    canonical_json,
    digest_array,
    digest_json,
    frame_digest,
    mask_digest,
)
from ..memo import Fingerprint, Memo
from ..movies import ReadOptions, Series
from ..movies.image_files import ImageFiles
from ..movies.movie import detection_places
from .ctc_options import DEFAULTS
from .lazy_arrays import Hashed, ImageFrames, MaskFrames, NoFrames, Stack

OF_SAMPLES = ("augment", "crop_size", "max_tokens", "return_dense")
"""Options that change samples, and no table."""
_READERS = 4


def hash_folder(folder: Path, data: Any, *, labels: bool) -> Hashed:
    """Hash the images that `CTCData` reads of a folder; those that the memo knows are not read."""
    files = ImageFiles(tuple(sorted(folder.glob("*.tif"))), ReadOptions(labels=labels))
    part = range(len(files))[data.start_frame : data.end_frame : data.downscale_temporal]
    images = Series(files, part, data.downscale_spatial, labels=labels)
    kind, digest = ("mask", mask_digest) if labels else ("frame", frame_digest)

    def hash_one(memo: Memo, t: int) -> Digest:
        def compute() -> Fingerprint:
            image = images[t]
            return Fingerprint(digest(image, str(folder / images.name_of(t))), image.shape)

        place = in_files(images, t, kind)
        return (compute() if place is None else memo.fingerprint(compute=compute, **place)).digest

    times = range(len(images))
    contexts = [copy_context() for _ in times]
    with Memo() as memo, ThreadPoolExecutor(_READERS, "feature_cache hash") as readers:
        first = [hash_one(memo, t) for t in times[:1]]  # alone: it opens the memo's page
        others = readers.map(lambda c, t: c.run(hash_one, memo, t), contexts[1:], times[1:])
        return Hashed(images, (*first, *others))


def find_silver(masks: Path) -> Path | None:
    """Give the silver truth that upstream's ``_correct_gt_with_st`` merges into masks."""
    if not str(masks).endswith("_GT/TRA"):
        return None
    place = masks.parents[1] / masks.parent.stem.replace("_GT", "_ST") / "SEG"
    return place if place.exists() else None


@dataclass(frozen=True)
class Inputs:
    """All that the tables of a movie are made from: its folders, hashed, tracks, and options."""

    truth: Path
    frames: Path | None
    """None where no intensity enters."""
    detections: tuple[tuple[str, Path], ...]
    """By the name that they were asked for by."""
    hashed: Mapping[Path, Hashed]
    """Each of these folders, and silver truth."""
    tracks: Digest | None
    """Of the times from the first frame on."""

    @classmethod
    def of(cls, data: Any) -> Inputs:
        """Find and hash what a `CTCData` is about to load."""
        tracks = None
        if data.use_gt:
            table = data._load_tracklet_links(data.gt_tra_folder)
            table[["t1", "t2"]] -= data.start_frame  # digests of frames don't say where they begin
            tracks = digest_array(table.to_numpy(np.int64))
        detections = [(name, find_detections(data, name)) for name in data.detection_folders]
        found = tuple((name, folder) for name, folder in detections if folder is not None)
        masks = dict.fromkeys([data.gt_mask_folder, *(folder for _, folder in found)])
        silver = [place for place in map(find_silver, masks) if place is not None]
        hashed = {f: hash_folder(f, data, labels=True) for f in dict.fromkeys([*masks, *silver])}
        if data.img_folder is not None:
            hashed[data.img_folder] = hash_folder(data.img_folder, data, labels=False)
        return cls(data.gt_mask_folder, data.img_folder, found, hashed, tracks)

    def to_json(self, options: Mapping[str, Any]) -> dict[str, JSON]:
        """Give all that the tables are a function of, beside versions."""
        given = {**DEFAULTS, **options}
        for name in (*OF_SAMPLES, "detection_folders"):
            given.pop(name, None)
        detections: list[JSON] = [
            None if folder == self.truth else self._digests(folder) for _, folder in self.detections
        ]
        return {
            "truth": self._digests(self.truth),
            "tracks": None if self.tracks is None else self.tracks.hex(),
            "frames": None if self.frames is None else self._digest(self.frames),
            "detections": detections,
            "options": json.loads(canonical_json(given)),  # NumPy's numbers are numbers, too
        }

    def _digests(self, masks: Path) -> list[JSON]:
        silver = find_silver(masks)
        return [self._digest(masks), None if silver is None else self._digest(silver)]

    def _digest(self, folder: Path) -> str:
        return digest_json([digest.hex() for digest in self.hashed[folder].digests]).hex()

    def masks_of(self, folder: Path, shape: tuple[int, ...], data: Any) -> Stack:
        """Give masks as `CTCData` holds them."""
        own, silver = self.hashed[folder], find_silver(folder)
        frames = MaskFrames(own, None if silver is None else self.hashed[silver], data.ndim == 3)
        return Stack(frames, range(len(own.digests)), shape, np.int32)

    def images_of(self, truth: Stack, shape: tuple[int, ...], data: Any) -> Stack:
        """Give frames as `CTCData` holds them."""
        if self.frames is None:
            return Stack(NoFrames(truth.frames), truth.times, shape, np.int32)
        emptied = truth.frames if data.compress else None
        frames = ImageFrames(self.hashed[self.frames], data.ndim == 3, emptied, data.features)
        return Stack(frames, truth.times, shape, np.float32)


def missing_detections(root: Path, names: Sequence[str]) -> NoMasksError:
    """Say where detections of some names were looked for."""
    places = [str(place) for name in names for place in detection_places(root, name)]
    return NoMasksError(
        f"{root} has no masks {', '.join(map(repr, names))}: looked for {', '.join(places)}; name "
        "the detection folder (detection_folders)"
    )


def find_detections(data: Any, name: str) -> Path | None:
    """Find a detection folder as upstream does."""
    if data.root / name == data.gt_mask_folder:
        return Path(data.gt_mask_folder)
    return next((place for place in detection_places(data.root, name) if place.exists()), None)
