"""Cached features in Trackastra: training data, training, and tracking.

The only package here that imports trackastra. Written for, and tested with, trackastra 0.5.5 and
0.5.6.
Everything public is listed in ``__init__.pyi`` and loaded when it is first used.
"""

import lazy_loader

from ..errors import BrokenDependencyError, MissingDependencyError, importing

try:
    with importing("trackastra", __name__, 'pip install "feature-cache[trackastra]"'):
        import trackastra as _trackastra  # noqa: F401
except (MissingDependencyError, BrokenDependencyError) as _error:
    _error.name = __name__  # so that `python -m` says it in one line, without a traceback
    raise

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
