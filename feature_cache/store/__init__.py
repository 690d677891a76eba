"""The right wing: records on disk. Knows zarr, and nothing of torch."""

from .array import CODECS
from .claims import Claims
from .counters import Counter, Run, Usage, read_runs, sum_usage
from .index import Index
from .inspection import count_regions, inspect, record_regions, record_sources
from .pack import Pack, Span, read_provenance
from .requested_movies import Asked, add_asked, read_asked
from .space import Mode, Space
from .store import FORMAT_VERSION, Store
from .writer import NewRecord

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
    "Asked",
    "Claims",
    "Counter",
    "Index",
    "Mode",
    "NewRecord",
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
