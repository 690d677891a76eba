"""The right wing: records on disk. Knows zarr, and nothing of torch."""

from .array import CODECS
from .asked import Asked, add_asked, read_asked
from .claims import Claims
from .index import Index
from .inspect import count_regions, inspect, record_regions, record_sources
from .pack import Pack, Span, read_provenance
from .space import Mode, Space
from .store import FORMAT_VERSION, Store
from .usage import Counter, Run, Usage, read_runs, sum_usage
from .writer import Entry

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "Asked",
    "Claims",
    "Counter",
    "Entry",
    "Index",
    "Mode",
    "Pack",
    "Run",
    "Space",
    "Span",
    "Store",
    "Usage",
    "add_asked",
    "count_regions",
    "inspect",
    "read_asked",
    "read_provenance",
    "read_runs",
    "record_regions",
    "record_sources",
    "sum_usage",
]
