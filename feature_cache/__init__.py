"""A content-hashed, Zarr-backed cache of foundation-model features for training.

Everything public is listed in ``__init__.pyi`` and loaded when it is first used: importing this
package loads neither torch nor zarr.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
