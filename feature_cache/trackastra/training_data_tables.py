"""The tables of a movie's training data: as arrays of a record, and as upstream has them."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from trackastra.data import wrfeat as _wrfeat

from ..hashing import JSON
from ..key import Record
from .lazy_arrays import AssociationLinks, Distances, Stack

Arrays = dict[str, NDArray[Any]]


def to_record(arrays: Arrays, facts: Mapping[str, JSON]) -> Record:
    """Write arrays as the bits of a record."""
    head: list[JSON] = [[name, a.dtype.str, list(a.shape)] for name, a in arrays.items()]
    text = json.dumps({"arrays": head, "facts": facts}).encode()
    text += b" " * (-len(text) % 8)
    parts = [len(text).to_bytes(8, "little"), text]
    for array in arrays.values():
        parts += [array.tobytes(), bytes(-array.nbytes % 8)]
    bits = np.frombuffer(b"".join(parts), np.float16)
    return Record(bits.reshape(1, -1, 1), None)


def from_record(record: Record) -> tuple[Arrays, dict[str, Any]]:
    """Read what `to_record` wrote, into memory of its own."""
    raw = bytearray(np.ascontiguousarray(record.features).reshape(-1).view(np.uint8))
    end = 8 + int.from_bytes(raw[:8], "little")
    about = json.loads(bytes(raw[8:end]))
    arrays = {}
    for name, dtype, shape in about["arrays"]:
        count = int(np.prod(shape))
        arrays[name] = np.frombuffer(raw, dtype, count, end).reshape(shape)
        end += arrays[name].nbytes + -arrays[name].nbytes % 8
    return arrays, about["facts"]


@dataclass(frozen=True)
class Detections:
    """The regions of one detection folder, all frames one after the other."""

    labels: NDArray[Any]
    times: NDArray[Any]
    """(N,), as labels are."""
    coords: NDArray[Any]
    """(N, D), or (0,) where there are none."""
    ends: NDArray[np.int64]
    """(T + 1,) int64. Frame t has the regions from ends[t] to ends[t + 1]."""
    lines: NDArray[np.int32]
    """(2, N) int32. `first` and `last` of `AssociationLinks`."""
    features: Mapping[str, NDArray[Any]]
    """Trackastra's shallow features, (N, K) float32 each; empty where it measures them later."""

    @classmethod
    def of(
        cls,
        tables: tuple[Any, Any, Any],
        features: Mapping[str, NDArray[Any]],
        count: int,
        matching: Mapping[int, Mapping[int, int]],
        order: Mapping[int, tuple[int, int]],
    ) -> Detections:
        """Take regions as upstream found them in `count` frames, and what they match.

        The tables are labels (N,), times (N,) and coords (N, D), features (N, K) each. In each
        frame, `matching` maps labels to tracks; `order` is from `order_tracks`.
        """
        labels, times, coords = tables
        ends = np.searchsorted(times, np.arange(count + 1)).astype(np.int64)
        lines = np.full((2, len(labels)), -1, np.int32)
        for i, (label, t) in enumerate(zip(labels.tolist(), times.tolist(), strict=True)):
            lines[:, i] = order.get(matching[t].get(label, 0), (-1, -1))
        return cls(labels, times, coords, ends, lines, features)

    def to_arrays(self, number: int) -> Arrays:
        """Name the tables, as those of one folder of several."""
        own = {n: getattr(self, n) for n in ("labels", "times", "coords", "ends", "lines")}
        features = {f"features {name}": values for name, values in self.features.items()}
        return {f"{number} {name}": array for name, array in {**own, **features}.items()}

    @classmethod
    def from_arrays(cls, arrays: Arrays, number: int) -> Detections:
        """Find the tables of one folder."""
        own = {
            name.split(" ", 1)[1]: array
            for name, array in arrays.items()
            if name.startswith(f"{number} ")
        }
        features = {n: own.pop(n) for n in list(own) if n.startswith("features ")}
        named = {name.removeprefix("features "): array for name, array in features.items()}
        return cls(**own, features=named)

    def properties(self, *, listed: bool) -> dict[int, dict[str, Any]]:
        """Give upstream's ``properties_by_time``."""
        found: dict[int, dict[str, Any]] = {}
        for t in range(len(self.ends) - 1):
            part = slice(self.ends[t], self.ends[t + 1])
            coords, labels = self.coords[part], self.labels[part]
            found[t] = {"coords": coords, "labels": labels}
            if listed:
                found[t] = {"coords": list(coords), "labels": labels.tolist()}
        return found

    def windows(self, data: Any, images: Stack, masks: Stack) -> Iterator[dict[str, Any]]:
        """Give upstream's windows."""
        size, axes = data.window_size, masks.ndim - 1
        for t in range(len(self.ends) - size):
            part = slice(int(self.ends[t]), int(self.ends[t + size]))
            empty = part.start == part.stop
            coords = self.coords[part]
            first, last = self.lines[:, part]
            window: dict[str, Any] = {
                "coords": np.zeros((0, axes), int) if empty else coords,
                "t1": t,
                "img": images.part(t, t + size),
                "mask": masks.part(t, t + size),
                "assoc_matrix": AssociationLinks(first, last),
                "labels": self.labels[part],
                "timepoints": self.times[part],
            }
            if data.features == "wrfeat":
                window["wrfeat"] = _wrfeat.WRFeatures(
                    coords=coords,
                    labels=window["labels"],
                    timepoints=window["timepoints"],
                    features=OrderedDict((k, v[part]) for k, v in self.features.items()),
                )
            elif data.sanity_dist:
                window["assoc_matrix"] = Distances(window["coords"])
            yield window
