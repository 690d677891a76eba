"""The right wing: records on disk. Knows zarr, and nothing of torch."""

from .claims import Claims
from .index import Index
from .inspect import count_regions, inspect, record_regions, record_sources
from .pack import Pack, Span, read_provenance
from .space import Mode, Space
from .store import FORMAT_VERSION, Store
from .usage import Counter, Run, Usage, read_runs, sum_usage
from .writer import CODECS, Entry

__all__ = [
    "CODECS",
    "FORMAT_VERSION",
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
    "count_regions",
    "inspect",
    "read_provenance",
    "read_runs",
    "record_regions",
    "record_sources",
    "sum_usage",
]
