"""Places by their looks: which of them are folders of this host, and which are elsewhere."""

from __future__ import annotations

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import NotACacheError, StoreError

READ_ONLY = ("https://", "http://")
HUB = "hf://datasets/"
WRITABLE = ("s3://", "gs://", "az://", HUB, "file://")
SCHEMES = (*WRITABLE, *READ_ONLY)

_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+(.*)", re.DOTALL)
"""With one slash as well: pathlib takes the other away."""


def parse_url(place: str) -> str | None:
    """Give the URL that a place is; None where it is a path."""
    found = _URL.fullmatch(place)
    if found is None or found[1] == "file":
        return None if found is None else place
    return f"{found[1]}://{found[2]}"


def url_folder(url: str) -> Path | None:
    """Give the folder that a ``file://`` URL names; None for the other kinds."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return None
    if parts.netloc or parts.query or parts.fragment or not parts.path.strip("/"):
        raise StoreError(f"{url} names no folder of this host: expected file:///path/of/folder")
    return Path(unquote(parts.path))


def find_folder(place: str | os.PathLike[str]) -> Path:
    """Give the folder that a path or a ``file://`` URL names, absolute; it need not be there.

    Raises
    ------
    NotACacheError
        For a URL of another kind, which would become a folder of that name.
    StoreError
        For a ``file://`` URL that names no folder of this host.
    """
    url = parse_url(os.fspath(place))
    if url is None:
        return Path(place).expanduser().absolute()
    folder = url_folder(url)
    if folder is None:
        cure = "name one"
        if url.startswith(READ_ONLY):
            cure = f"read it below a folder with --layer {url}"
        elif url.startswith(SCHEMES):
            cure = (
                f"bring it to one with feature-cache pull {url} --cache FOLDER, send to it with "
                f"push, or read it below a folder with --layer {url}"
            )
        raise NotACacheError(f"{url} is no folder, which a cache has to be here: {cure}")
    return folder
