"""What kind of file system a folder is on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

_NETWORK = frozenset(
    {
        *("9p", "acfs", "afs", "beegfs", "ceph", "cifs", "davfs", "glusterfs", "gpfs", "lustre"),
        *("ncpfs", "nfs", "nfs4", "orangefs", "panfs", "pvfs2", "smb2", "smb3", "smbfs"),
        *("virtiofs", "weka", "wekafs"),
    }
)


@dataclass(frozen=True, slots=True)
class FileSystem:
    """A mounted file system.

    Attributes
    ----------
    type : str
        Such as ``"ext4"`` or ``"nfs4"``; ``"unknown"`` where the system doesn't tell.
    mount : str
        Where it is mounted.
    """

    type: str
    mount: str

    @property
    def is_network(self) -> bool:
        """Whether other hosts may use it too; also where that is not known."""
        return self.type in _NETWORK or self.type.startswith("fuse") or self.type == "unknown"


def find_file_system(path: Path) -> FileSystem:
    """Find what a path is on; the path need not exist."""
    place = path.expanduser().resolve()
    mounts = {part.mountpoint: part.fstype for part in psutil.disk_partitions(all=True)}
    for folder in (place, *place.parents):
        if str(folder) in mounts:
            return FileSystem(mounts[str(folder)] or "unknown", str(folder))
    return FileSystem("unknown", "/")
