"""Remotes: whole packs in an object store, in the layout that they have on disk.

::

    <url>/CACHEDIR.TAG  zarr.json                     format version
      spaces/<space>/zarr.json                        the space's full spec
      spaces/<space>/packs/<pack>/                    see `feature_cache.store.pack`
      tables/<space>                                  names, keys and sizes of packs of a space

An object store has no rename: a pack is there when its group's ``zarr.json`` is, which is sent
after all its other objects. Equal names mean equal records, so only missing packs are moved, and
what was moved before a run was killed is not moved again. Nothing is believed that comes from a
remote: names are checked before they become paths, and every record of a pack before it is
committed.

Whatever runs obstore can't be used in a process forked after that: it would wait forever. So a
remote, of any kind, is pickled without its client, and says so in such a process.
"""

from __future__ import annotations

from ..url import SCHEMES
from .remote import Remote, open_remote
from .remote_space import RemoteSpace
from .streams import PIECE_BYTES, Progress
from .transfer import (
    PackPlace,
    TransferFailure,
    TransferPlan,
    TransferReport,
    find_missing,
    plan_pull,
    plan_push,
    pull,
    push,
)

__all__ = [
    "PIECE_BYTES",
    "SCHEMES",
    "PackPlace",
    "Progress",
    "Remote",
    "RemoteSpace",
    "TransferFailure",
    "TransferPlan",
    "TransferReport",
    "find_missing",
    "open_remote",
    "plan_pull",
    "plan_push",
    "pull",
    "push",
]
