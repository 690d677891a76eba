"""The objects below a URL: listed, read and written with obstore."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from ...errors import StoreError
from ...system import sync_file, sync_folder
from ..files import share_with_group, writing
from ..url import READ_ONLY, WRITABLE, url_folder
from .connection import connect, enter_process, talking
from .streams import PIECE_BYTES, Progress, each, read_pieces, tell

if TYPE_CHECKING:
    from obstore import Bytes
    from obstore.store import ObjectStore

SMALL_BYTES = 1 << 28
_OBJECTS_AT_ONCE = 8


class Objects:
    """The objects below a URL, by their names relative to it; all errors are ours.

    May be shared by threads, and opens its client when it is first needed.

    Parameters
    ----------
    url : str
    options : mapping
        For obstore's ``from_url``.

    Attributes
    ----------
    folder : Path or None
        Where they are, if it is a folder (``file://``).
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.url, self.options = url.rstrip("/"), dict(options)
        self.folder = url_folder(url)
        self._client: ObjectStore | None = None

    @property
    def is_listed(self) -> bool:
        """Whether the place says what is in it, and takes more; a plain web server does neither."""
        return not self.url.startswith(READ_ONLY)

    def check_listed(self, doing: str) -> None:
        """Raise StoreError where a plain web server can't do something."""
        if not self.is_listed:
            raise StoreError(
                f"can't {doing} {self.url}: a web server only gives what is asked for by name; "
                f"read it below a folder (layers=[{self.url!r}], --layer {self.url}), and send to "
                f"{', '.join(WRITABLE)} alone"
            )

    def size(self, name: str) -> int | None:
        """Give the size of an object; None where there is none."""
        import obstore

        with talking("read", f"{self.url}/{name}"):
            try:
                return int(obstore.head(self._open(), name)["size"])
            except FileNotFoundError:
                return None

    def list_all(self, prefix: str) -> Iterator[tuple[str, int]]:
        """Give the names of all objects below a prefix, relative to it, and their sizes."""
        import obstore

        with talking("list", f"{self.url}/{prefix}"):
            for part in obstore.list(self._open(), prefix, chunk_size=1000):
                for meta in part:
                    if meta["path"].startswith(prefix):
                        yield meta["path"].removeprefix(prefix), meta["size"]

    def list_level(self, prefix: str) -> tuple[list[str], list[str]]:
        """Give the paths of folders and of objects right below a prefix."""
        import obstore

        self.check_listed("list")

        with talking("list", f"{self.url}/{prefix}"):
            found = obstore.list_with_delimiter(self._open(), prefix or None)
        return list(found["common_prefixes"]), [meta["path"] for meta in found["objects"]]

    def get(self, name: str) -> bytes | None:
        """Read a small object; None where there is none."""
        import obstore

        with talking("read", f"{self.url}/{name}"):
            try:
                found = obstore.get(self._open(), name)
            except FileNotFoundError:
                return None
            if found.meta["size"] > SMALL_BYTES:
                raise ValueError(f"it has {found.meta['size']} bytes, expected {SMALL_BYTES}")
            return found.bytes().to_bytes()

    def get_piece(self, name: str, start: int, length: int) -> Bytes | bytes | None:
        """Read a piece of an object; None where there is none."""
        import obstore

        with talking("read", f"{self.url}/{name}"):
            try:
                return obstore.get_range(self._open(), name, start=start, length=length)
            except FileNotFoundError:
                return None

    def put(self, name: str, data: bytes) -> None:
        """Write a small object, durably."""
        self._put(name, data, "overwrite")

    def _put(self, name: str, data: bytes, mode: Literal["create", "overwrite"]) -> None:
        import obstore

        with talking("write", f"{self.url}/{name}"):
            obstore.put(self._open(), name, data, mode=mode)
        self.settle([name])

    def put_new(self, name: str, data: bytes) -> None:
        """Put an object where there is none; one that is there has the same meaning, and stays."""
        from obstore.exceptions import AlreadyExistsError, NotSupportedError

        try:
            self._put(name, data, "create")
        except StoreError as error:
            if isinstance(error.__cause__, NotSupportedError):
                self.put(name, data)
            elif not isinstance(error.__cause__, AlreadyExistsError):
                raise

    def put_files(self, files: Mapping[str, Path], progress: Progress | None) -> None:
        """Send files, by name, large ones in pieces; `settle` makes them durable."""
        each(lambda item: self._put_file(*item, progress), files.items(), _OBJECTS_AT_ONCE)

    def _put_file(self, name: str, file: Path, progress: Progress | None) -> None:
        import obstore

        small = file.stat().st_size <= PIECE_BYTES
        data = file.read_bytes() if small else read_pieces(file, progress)
        with talking("write", f"{self.url}/{name}"):
            obstore.put(self._open(), name, data, chunk_size=PIECE_BYTES, max_concurrency=2)
        if isinstance(data, bytes):
            tell(progress, len(data))

    def settle(self, names: Iterable[str]) -> None:
        """Make what was put durable, and open to its group, where the remote is a folder.

        Only these objects are touched: beside them, another process may be putting its own.
        """
        if self.folder is None:
            return
        files = [PurePosixPath(name) for name in names]
        root, *folders = sorted({folder for file in files for folder in file.parents})
        with writing(self.folder):
            for path in (*folders, *files):
                with suppress(PermissionError):  # another user put it just now, and shares it
                    share_with_group(self.folder / path)
            for file in files:
                sync_file(self.folder / file)
            for folder in (*reversed(folders), root):
                sync_folder(self.folder / folder)

    def _open(self) -> ObjectStore:
        enter_process(self.url)
        if self._client is None:
            with talking("open", self.url):
                self._client = connect(self.url, self.options)
        return self._client
