"""One file with the names, keys and sizes of many packs, so that opening need not read each pack.

``tables/<space>`` is never needed. What stands there of a pack is proved by the pack's name, which
is a digest of its keys and checksums; what is missing, old or damaged is read from the packs.
Whoever lists many packs that are not in it writes it anew.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..errors import CorruptRecordError
from ..hashing import DIGEST_BYTES
from ..key import Keys
from .files import make_folders, read_file, tree_bytes, write_bytes
from .pack import SALTS, find_salt
from .pack_contents import pack_name, read_contents

_MAGIC = b"feature_cache packs 1\n"
_HEAD = struct.Struct(f"<{len(_MAGIC)}sQQ")
_LIMIT = 1 << 36
_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PackTable:
    """Packs of one space.

    Attributes
    ----------
    names : tuple of str
    packs : (p, 3) int64
        How many records each has, what it takes on the disk in bytes, and the salt in its name.
    keys : (n, 16) uint8
        Of all records, pack after pack.
    checksums : (n,) uint64
    """

    names: tuple[str, ...]
    packs: NDArray[np.int64]
    keys: Keys
    checksums: NDArray[np.uint64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many records each has: (p,) int64."""
        return self.packs[:, 0]

    @property
    def sizes(self) -> NDArray[np.int64]:
        """What each takes on the disk, in bytes: (p,) int64."""
        return self.packs[:, 1]

    def choose(self, names: set[str]) -> PackTable:
        """Give those of some names that are in it."""
        return self._keep(np.array([name in names for name in self.names], bool))

    def proved(self) -> PackTable:
        """Give those whose name is the digest of their keys and checksums."""
        stops = np.cumsum(self.counts).tolist()
        rows = zip(self.names, [0, *stops], stops, self.packs[:, 2].tolist(), strict=False)
        kept = [
            pack_name(self.keys[a:b], self.checksums[a:b], salt) == name
            for name, a, b, salt in rows
        ]
        return self._keep(np.array(kept, bool))

    def _keep(self, kept: NDArray[np.bool_]) -> PackTable:
        if kept.all():
            return self
        names = tuple(name for name, keep in zip(self.names, kept.tolist(), strict=True) if keep)
        rows = np.repeat(kept, self.counts)
        return PackTable(names, self.packs[kept], self.keys[rows], self.checksums[rows])

    def extended(self, others: Iterable[PackTable]) -> PackTable:
        """Give the table with the packs of others too."""
        names, *columns = zip(
            *((one.names, one.packs, one.keys, one.checksums) for one in (self, *others)),
            strict=True,
        )
        return PackTable(tuple(chain(*names)), *map(np.concatenate, columns))


NO_PACKS = PackTable(
    (), np.empty((0, 3), np.int64), np.empty((0, DIGEST_BYTES), np.uint8), np.empty(0, np.uint64)
)


def read_rows(packs: Iterable[Path]) -> list[PackTable]:
    """Read what a table says of packs, in a table each; those gone or damaged are left out."""
    rows = []
    for pack in packs:
        with suppress(FileNotFoundError, CorruptRecordError):
            found = read_contents(pack)
            about = [[len(found.keys), tree_bytes(pack), find_salt(pack, found, pack.name)]]
            rows.append(
                PackTable((pack.name,), np.array(about, np.int64), found.keys, found.checksums)
            )
    return rows


def read_table(file: Path) -> PackTable:
    """Read a table; an empty one where there is none, or it is damaged."""
    try:
        return parse_table(read_file(file, _LIMIT))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        _log.info("%s is not used: %s", file, error)
    return NO_PACKS


def parse_table(data: bytes) -> PackTable:
    """Read what `encode_table` gave; ValueError where it is something else."""
    if len(data) < _HEAD.size + DIGEST_BYTES:
        raise ValueError("it was cut short")
    body = memoryview(data)[:-DIGEST_BYTES]
    if xxhash.xxh3_128_digest(body) != data[-DIGEST_BYTES:]:
        raise ValueError("its bytes are not those that were written")
    magic, packs, records = _HEAD.unpack_from(body)
    if magic != _MAGIC or len(body) != _HEAD.size + (packs + records) * (DIGEST_BYTES + 8) + (
        16 * packs
    ):
        raise ValueError("it is no table of packs")
    place = _HEAD.size

    def take(dtype: str, *shape: int) -> NDArray[Any]:
        nonlocal place
        array = np.frombuffer(body, dtype, int(np.prod(shape)), place).reshape(shape)
        place += array.nbytes
        return array

    plain = take("u1", packs, DIGEST_BYTES).tobytes().hex()
    step = 2 * DIGEST_BYTES
    names = tuple(plain[i : i + step] for i in range(0, len(plain), step))
    table = PackTable(
        names, take("<i8", packs, 3), take("u1", records, DIGEST_BYTES), take("<u8", records)
    )
    # A remote may say anything: counts that are too large can wrap to the right sum.
    if (table.packs < 0).any() or (table.counts > records).any() or table.counts.sum() != records:
        raise ValueError("its counts don't agree")
    if (table.packs[:, 2] >= SALTS).any():
        raise ValueError("it has a salt that no pack has")
    return table


def encode_table(table: PackTable) -> bytes:
    """Give the bytes of a table's file."""
    head = _HEAD.pack(_MAGIC, len(table.names), len(table.keys))
    columns = (table.packs.astype("<i8"), table.keys, table.checksums.astype("<u8"))
    names = bytes.fromhex("".join(table.names))
    body = b"".join([head, names, *(column.tobytes() for column in columns)])
    return body + xxhash.xxh3_128_digest(body)


def write_table(root: Path, file: Path, table: PackTable) -> None:
    """Write a table in place of the one before; where that fails, say so in the log and go on."""
    try:
        make_folders(file.parent, root)
        # Not durable: one that a crash tore fails its digest, and the packs are read instead.
        write_bytes(file, encode_table(table))
    except OSError as error:
        _log.debug("%s is not written: %s", file, error)
