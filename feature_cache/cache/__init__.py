"""Where the two wings meet: records are looked up in the store, and computed by backbones."""

from .cache import FeatureCache
from .grids import GRID_DTYPE, Grids, grid_spec
from .movie import MovieFeatures, Progress, check_batch_size

__all__ = [
    "GRID_DTYPE",
    "FeatureCache",
    "Grids",
    "MovieFeatures",
    "Progress",
    "check_batch_size",
    "grid_spec",
]
