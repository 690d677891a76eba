"""Misses computed once, for every process of this host, by the one that owns the device."""

from .addresses import list_servers, runtime_folder
from .misses import Misses, StandIn, check_writable
from .process_engines import Host, close_all, open_host
from .read_ahead import ReadAhead
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
