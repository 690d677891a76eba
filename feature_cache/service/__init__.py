"""Misses computed once, for every process of this host, by the one that owns the device."""

from .ahead import ReadAhead
from .hosting import Host, close_all, open_host
from .misses import Misses, StandIn, check_writable
from .place import list_servers, runtime_folder
from .service import Service

__all__ = [
    "Host",
    "Misses",
    "ReadAhead",
    "Service",
    "StandIn",
    "check_writable",
    "close_all",
    "list_servers",
    "open_host",
    "runtime_folder",
]
