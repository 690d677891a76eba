"""Cached features in Trackastra: training data, training, and tracking.

The only package here that imports trackastra. Written for, and tested with, trackastra 0.5.6.
Everything public is listed in ``__init__.pyi`` and loaded when it is first used.
"""

import lazy_loader

from ..errors import MissingDependencyError

try:
    import trackastra as _trackastra  # noqa: F401
except ImportError as _error:
    _missing = MissingDependencyError(
        "trackastra", "feature_cache.trackastra", 'pip install "feature-cache[trackastra]"'
    )
    _missing.name = __name__  # so that `python -m` says it in one line, without a traceback
    raise _missing from _error

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
