"""A thousand random changes of what records are made of: none served stale, none made in vain."""

from __future__ import annotations

import io
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

from feature_cache import FeatureCache, Movie, Normalization
from feature_cache.augment import IDENTITY, Draw, Scale, hflip, quarter_turn, vflip
from feature_cache.backbones.base import Backbone
from feature_cache.engine import Frame, compute_records
from feature_cache.hashing import frame_digest
from feature_cache.key import Record
from feature_cache.movies import write_movie
from feature_cache.rounding import records_agree
from feature_cache.spec import SpaceSpec
from feature_cache.testing import FakeBackbone
from old_files import hurry
from test_witness import Tiny

TIMES, FRAMES, SHAPE = 1000, 2, (16, 24)
OLD = 10**9
DRAWS = [
    ("none", IDENTITY),
    ("none", Draw.of(hflip(), hflip())),
    ("half a turn", Draw.of(quarter_turn(2))),
    ("half a turn", Draw.of(hflip(), vflip())),
    ("flip", Draw.of(hflip())),
    ("scale", Draw.of(Scale(1.5))),
]
"""By what they do: the same in two ways is the same."""
OPTIONS = {
    "kind": ["fake", "file"],
    "seed": [0, 1],
    "stride": [4, 8],
    "low": [1.0, 2.0],
    "pooling": ["mean_patches_exact", "max_patches_bbox"],
    "dtype": ["float16", "float32"],
    "draw": list(range(len(DRAWS))),
}


class World:
    """A movie and a checkpoint in files, what else a request says, and all of it in memory."""

    def __init__(self, folder: Path) -> None:
        self.rng = np.random.default_rng(0)
        self.root, self.checkpoint = folder / "movie" / "01", folder / "last.pt"
        self.frames = list(self.rng.integers(0, 1000, (FRAMES, *SHAPE)).astype(np.uint16))
        self.masks = list(self.rng.integers(0, 4, (FRAMES, *SHAPE)).astype(np.uint16))
        self.past = [(self.frames[0], self.masks[0])]
        self.options = {name: values[0] for name, values in OPTIONS.items()}
        self.networks = {f"random:{seed}": Tiny("tiny", f"random:{seed}", "cpu") for seed in (0, 1)}
        write_movie(
            self.root, self.frames, self.masks, np.array([[1, 0, FRAMES - 1, 0]]), overwrite=True
        )
        for t in range(FRAMES):
            self.write(t)
        self.write_weights("random:0")

    def write_weights(self, weights: str) -> None:
        self.weights, content = weights, io.BytesIO()
        torch.save(self.networks[weights].module.state_dict(), content)
        self.replace(self.checkpoint, content.getvalue())

    def write(self, t: int, dtype: str = "uint16", compression: str | None = None) -> None:
        for file, image in (
            (self.root / f"t{t:03d}.tif", self.frames[t].astype(dtype)),
            (Path(f"{self.root}_GT") / "TRA" / f"man_track{t:03d}.tif", self.masks[t]),
        ):
            content = io.BytesIO()
            tifffile.imwrite(content, image, compression=compression)
            self.replace(file, content.getvalue())

    def replace(self, file: Path, content: bytes) -> None:
        """Give a file other content in one of the ways of the world, each of which keeps times."""
        how = self.rng.choice(["in place", "renamed", "removed first", "archive"])
        if how == "archive":
            member = tarfile.TarInfo(file.name)
            member.size, member.mtime = len(content), OLD
            packed = io.BytesIO()
            with tarfile.open(fileobj=packed, mode="w") as archive:
                archive.addfile(member, io.BytesIO(content))
            packed.seek(0)
            file.unlink(missing_ok=True)  # as tar does: the inode may come again
            with tarfile.open(fileobj=packed) as archive:
                archive.extractall(file.parent, filter="data")
            return
        if how == "removed first":
            file.unlink(missing_ok=True)
        place = file.with_suffix(".new") if how == "renamed" else file
        place.write_bytes(content)
        os.utime(place, (OLD, OLD))
        place.replace(file)

    def mutate(self) -> str:
        """Change one thing, or nothing that matters; say what."""
        t = int(self.rng.integers(FRAMES))
        place = tuple(int(self.rng.integers(n)) for n in SHAPE)
        what = str(self.rng.choice(
            ["pixel", "label", "the past", "swap", "same", "move", "weights", *["option"] * 5]
        ))  # fmt: skip
        if what in ("pixel", "label"):
            images, limit = (self.frames, 1000) if what == "pixel" else (self.masks, 4)
            images[t] = images[t].copy()
            images[t][place] = self.rng.integers(limit)
            self.past.append((self.frames[t], self.masks[t]))
            self.write(t)
        elif what == "the past":
            self.frames[t], self.masks[t] = self.past[self.rng.integers(len(self.past))]
            self.write(t)
        elif what == "swap":
            self.frames.reverse()
            for t in range(FRAMES):
                self.write(t)
        elif what == "same":
            self.write(t, str(self.rng.choice(["uint16", "float32"])), "zlib")
        elif what == "move":
            parent = self.root.parent.with_name(f"movie{self.rng.integers(10**9)}")
            shutil.move(self.root.parent, parent)
            self.root = parent / "01"
        elif what == "weights":
            self.write_weights(f"random:{self.rng.integers(2)}")
        else:
            name = str(self.rng.choice(list(OPTIONS)))
            values = OPTIONS[name]
            self.options[name] = values[self.rng.integers(len(values))]
            what = f"{name} {self.options[name]}"
        return what

    def identities(self) -> list[tuple[object, ...]]:
        """Say by other means than the package what each record is made of."""
        given = dict(self.options, draw=DRAWS[self.options["draw"]][0])
        if given["kind"] == "file":
            given.update(seed=0, stride=8, low=1.0, weights=self.weights)
        request = tuple(sorted(given.items()))
        return [
            (frame.astype(np.float32).tobytes(), mask.astype(np.int32).tobytes(), request)
            for frame, mask in zip(self.frames, self.masks, strict=True)
        ]

    def backbone(self, weights: object) -> Backbone:
        if self.options["kind"] == "file":
            return Tiny("tiny", weights, "cpu")
        normalization = Normalization(low=self.options["low"])
        seed, stride = self.options["seed"], self.options["stride"]
        return FakeBackbone(8, stride, seed=seed, normalization=normalization)

    def expect(self, t: int) -> tuple[SpaceSpec, Record]:
        """Compute a record from memory."""
        backbone = self.backbone(self.weights)
        if isinstance(backbone, Tiny):
            backbone = self.networks[self.weights]
        spec = SpaceSpec(backbone.spec, self.options["pooling"], self.options["dtype"])
        frame, mask = self.frames[t].astype(np.float32), self.masks[t].astype(np.int32)
        job = Frame(frame, mask, frame_digest(frame), "frame")
        [record] = compute_records([job], spec, backbone, DRAWS[self.options["draw"]][1], 1)
        return spec, record


@pytest.mark.slow
def test_a_thousand_mutations(tmp_path, monkeypatch):
    monkeypatch.setenv("FEATURE_CACHE_MEMO", str(tmp_path / "memo"))
    hurry(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    world, cache = World(tmp_path), FeatureCache(tmp_path / "cache")
    expected: dict[tuple[object, ...], tuple[SpaceSpec, Record]] = {}
    stale, needless, hits, story = [], [], 0, []
    for number in range(TIMES):
        story.append(f"{number}: {world.mutate()}")
        movie, options = Movie.open(world.root), world.options
        features = cache.movie(
            movie.frames, movie.masks, world.backbone(world.checkpoint),
            pooling=options["pooling"], dtype=options["dtype"], draw=DRAWS[options["draw"]][1],
        )  # fmt: skip
        there, identities = features.contains().tolist(), world.identities()
        for t, record in enumerate(features.get_or_compute()):
            known = identities[t] in expected
            if not known:
                expected[identities[t]] = world.expect(t)
            spec, right = expected[identities[t]]
            if (there[t] and not known) or not records_agree(record, right, spec):
                stale.append(story[-1])
            elif known and not there[t] and identities[t] not in identities[:t]:
                needless.append(story[-1])
            hits += there[t]
    assert not stale, stale
    assert not needless, needless
    assert len(expected) > TIMES // 2
    assert hits > TIMES // 4
