"""Where the two wings meet: records are looked up in the store, and computed by backbones."""

from .cache import FeatureCache
from .movie import Images, MovieFeatures, Progress, check_batch_size

__all__ = ["FeatureCache", "Images", "MovieFeatures", "Progress", "check_batch_size"]
