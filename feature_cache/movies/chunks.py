"""The files of a Zarr array's chunks, and whether those are whole whose decoder would not say."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from .axes import Layout


def list_chunks(array: Any, root: Path, layout: Layout, t: int) -> list[Path]:
    """List the files of the chunks, or shards, that image `t` is in; `root` is the array's."""
    lengths = array.shards or array.chunks
    starts = {"T": t, **dict.fromkeys("CS", layout.channel)}
    places = [
        [starts[axis] // length] if axis in starts and size > 1 else range(-(-size // length))
        for axis, size, length in zip(layout.axes, layout.shape, lengths, strict=True)
    ]
    encode = array.metadata.encode_chunk_key
    return [root / encode(place) for place in itertools.product(*places)]


def check_given(array: Any, layout: Layout, t: int) -> None:
    """Do as `check_blosc` where an array is Zarr's, in a folder here."""
    root = getattr(getattr(array, "store", None), "root", None)
    if isinstance(root, Path) and hasattr(array, "compressors"):
        check_blosc(array, root / array.path, layout, t)


def check_blosc(array: Any, root: Path, layout: Layout, t: int) -> None:
    """Raise ValueError where a chunk is cut short: Blosc decodes what lies behind it in memory."""
    names = [type(codec).__name__ for codec in array.compressors]
    if array.shards is not None or not any("Blosc" in name for name in names[-1:]):
        return
    for file in list_chunks(array, root, layout, t):
        if file.is_file() and not _is_whole(file):
            raise ValueError(f"{file.relative_to(root)} is not as long as it says")


def _is_whole(file: Path) -> bool:
    with file.open("rb") as handle:
        header = handle.read(16)
    return len(header) == 16 and file.stat().st_size == int.from_bytes(header[12:], "little")
