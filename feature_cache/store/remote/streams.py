"""How bytes move: in pieces, many at once, and told of as they go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from ...errors import StoreError
from ..files import make_folders

PIECE_BYTES = 8 << 20
"""What is asked for, or sent, in one request."""
PACKS_AT_ONCE = 4
"""How many packs are moved at the same time."""

T = TypeVar("T")
R = TypeVar("R")
Progress = Callable[[int], object]
"""Is told of each number of bytes just moved."""


def make_files(folder: Path, sizes: Mapping[str, int]) -> None:
    """Make files of the sizes that are to come, still without content."""
    folder.mkdir()
    for name, size in sizes.items():
        file = folder / name
        make_folders(file.parent, folder)
        with open(file, "wb") as opened:
            # In full size, as its pieces come in any order.
            opened.truncate(size)


def cut(name: str, size: int) -> Iterator[tuple[str, int, int]]:
    """Cut an object into pieces: its name, start and length of each."""
    for start in range(0, size, PIECE_BYTES):
        yield name, start, min(PIECE_BYTES, size - start)


def read_pieces(file: Path, progress: Progress | None) -> Iterator[bytes]:
    """Read a file by pieces, each of which is told when the next is asked for."""
    with open(file, "rb") as opened:
        while piece := opened.read(PIECE_BYTES):
            yield piece
            tell(progress, len(piece))


def tell(progress: Progress | None, count: int) -> None:
    """Tell a number of bytes to whoever wants to know."""
    if progress is not None:
        progress(count)


def each(act: Callable[[T], R], items: Iterable[T], at_once: int) -> list[R]:
    """Do something with many items at once; the first error cancels those not begun.

    StoreError where no thread starts, as while an interpreter ends.
    """
    # It is left when none runs any more: the caller may remove the files that they write.
    with ThreadPoolExecutor(at_once) as pool:
        try:
            futures = [pool.submit(act, item) for item in items]
        except RuntimeError as error:
            raise StoreError(f"no thread starts to move packs: {error}") from error
        try:
            return [future.result() for future in as_completed(futures)]
        finally:
            for future in futures:
                future.cancel()
