"""The objects in a dataset of the Hugging Face Hub, by huggingface_hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import StoreError
from ...forks import Lock
from .connection import enter_process, talking
from .objects import SMALL_BYTES, Objects
from .streams import Progress, tell

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PLACE = re.compile(r"hf://datasets/([^/@]+/[^/@]+)(?:@([^/]+))?(?:/(.*))?")
_OF_THE_HUB = {".gitattributes", "README.md"}
_WAIT_SECONDS = 60.0


class HubObjects(Objects):
    """The objects below ``hf://datasets/<owner>/<name>[@<revision>][/<folder>]``.

    The dataset must be there. What is put at once is one commit there.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        super().__init__(url, options)
        found = _PLACE.fullmatch(self.url)
        if found is None:
            raise StoreError(
                f"{url} names no dataset: expected hf://datasets/<owner>/<name>[@<revision>]/<folder>"
            )
        self._repo, self._revision, self._top = found[1], found[2], f"{found[3] or ''}/".lstrip("/")
        self._putting = Lock()

    def size(self, name: str) -> int | None:
        """Give the size of an object; None where there is none."""
        with talking("read", f"{self.url}/{name}"):
            found = self._hub().get_paths_info(self._repo, [self._top + name], **self._where)
        return getattr(found[0], "size", None) if found else None

    def list_all(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the names of all objects below a prefix, relative to it, and their sizes."""
        for path, size in self._list(prefix, recursive=True):
            if size is not None:
                yield path.removeprefix(prefix), size

    def list_level(self, prefix: str) -> tuple[list[str], list[str]]:
        """Give the paths of folders and of objects right below a prefix."""
        found = [one for one in self._list(prefix, recursive=False) if one[0] not in _OF_THE_HUB]
        folders = [path for path, size in found if size is None]
        return folders, [path for path, size in found if size is not None]

    def _list(self, prefix: str, *, recursive: bool) -> Iterator[tuple[str, int | None]]:
        """Give what is below a prefix, and the sizes; None for folders."""
        from huggingface_hub.errors import EntryNotFoundError

        folder = f"{self._top}{prefix}".rstrip("/") or None
        with talking("list", f"{self.url}/{prefix}"):
            tree = self._hub().list_repo_tree(
                self._repo, folder, recursive=recursive, **self._where
            )
            try:
                # Nothing was asked yet: this is where a folder turns out not to be there.
                for one in tree:
                    yield one.path.removeprefix(self._top), getattr(one, "size", None)
            except EntryNotFoundError:
                return

    def get(self, name: str) -> bytes | None:
        """Read a small object; None where there is none."""
        data = self.get_piece(name, 0, SMALL_BYTES + 1)
        if data is not None and len(data) > SMALL_BYTES:
            raise StoreError(f"{self.url}/{name} has more than {SMALL_BYTES} bytes")
        return data

    def get_piece(self, name: str, start: int, length: int) -> bytes | None:
        """Read a piece of an object; None where there is none."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.errors import EntryNotFoundError

        utils: Any = import_module("huggingface_hub.utils")
        with talking("read", f"{self.url}/{name}"):
            hub = self._hub()
            address = hf_hub_url(self._repo, self._top + name, **self._where, endpoint=hub.endpoint)
            headers = utils.build_hf_headers(token=hub.token)
            headers["Range"] = f"bytes={start}-{start + length - 1}"
            answer = utils.http_backoff("GET", address, headers=headers, timeout=_WAIT_SECONDS)
            try:
                utils.hf_raise_for_status(answer)
            except EntryNotFoundError:
                return None
            return bytes(answer.content)

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, durably."""
        self._commit({name: data})

    def put_new(self, name: str, data: bytes) -> None:
        """Put an object where there is none; one that is there has the same meaning, and stays."""
        if self.size(name) is None:
            self.put(name, data)

    def put_files(self, files: Mapping[str, Path], progress: Progress | None) -> None:
        """Send files, by name."""
        self._commit(files)
        tell(progress, sum(file.stat().st_size for file in files.values()))

    def _commit(self, data: Mapping[str, Path | bytes]) -> None:
        from huggingface_hub import CommitOperationAdd

        adds = [CommitOperationAdd(self._top + name, given) for name, given in data.items()]
        with talking("write", f"{self.url}/{next(iter(data))}"), self._putting:
            self._hub().create_commit(
                self._repo, adds, commit_message="feature-cache push", **self._where
            )

    @property
    def _where(self) -> dict[str, Any]:
        return {"repo_type": "dataset", "revision": self._revision}

    def _hub(self) -> HfApi:
        from huggingface_hub import HfApi

        enter_process(self.url)
        return HfApi(**self.options)
