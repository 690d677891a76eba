"""Misses computed once, for every process of this host, by the one that owns the device."""

from .ahead import ReadAhead
from .engine import MEMORY_BYTES, Engine
from .hosting import Host, close_all, open_host
from .misses import Misses, StandIn, check_writable
from .place import list_servers, runtime_folder

__all__ = [
    "MEMORY_BYTES",
    "Engine",
    "Host",
    "Misses",
    "ReadAhead",
    "StandIn",
    "check_writable",
    "close_all",
    "list_servers",
    "open_host",
    "runtime_folder",
]
