"""The right wing: records on disk. Knows zarr, and nothing of torch."""

from .index import Index
from .inspect import inspect, record_sources
from .pack import CODECS, Entry, Pack, read_provenance
from .store import FORMAT_VERSION, Mode, Space, Store
from .usage import Counter, Usage

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "Counter",
    "Entry",
    "Index",
    "Mode",
    "Pack",
    "Space",
    "Store",
    "Usage",
    "inspect",
    "read_provenance",
    "record_sources",
]
