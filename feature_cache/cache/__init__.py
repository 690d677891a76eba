"""Where the two wings meet: records are looked up in the store, and computed by backbones."""

from ..engine import GRID_DTYPE, Progress, grid_spec
from .cache import FeatureCache, open_to_fill
from .folder import OpenCache
from .movie_features import MovieFeatures
from .movie_requests import check_batch_size, request_all, warm_movies

__all__ = [
    "GRID_DTYPE",
    "FeatureCache",
    "MovieFeatures",
    "OpenCache",
    "Progress",
    "check_batch_size",
    "grid_spec",
    "open_to_fill",
    "request_all",
    "warm_movies",
]
