"""What was read to be hashed, for who computes it next."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ..forks import Lock
from ..movies import Series

RECENT_BYTES = 256 << 20


class Recent:
    """Frames and masks as they were read; may be shared by threads.

    Parameters
    ----------
    most_bytes : int
        Where there is more, the oldest go.

    Examples
    --------
    >>> recent, images = Recent(most_bytes=8), Series(None, range(2))
    >>> recent.keep(images, 0, np.ones(4, "f4"))  # more than is kept
    >>> recent.keep(images, 1, np.ones(2, "f4"))
    >>> recent.take(images, 0), recent.take(images, 1), recent.take(images, 1)
    (None, array([1., 1.], dtype=float32), None)
    """

    def __init__(self, most_bytes: int = RECENT_BYTES) -> None:
        self._most_bytes, self._bytes = most_bytes, 0
        # By id, as images need have no hash: the movies of a run are alive as long as it is.
        self._images: dict[tuple[int, int], NDArray[np.generic]] = {}
        self._lock = Lock()

    def keep(self, images: Series, t: int, image: NDArray[np.generic]) -> None:
        """Keep image `t` of some images."""
        with self._lock:
            self._take(id(images), t)
            self._images[id(images), t] = image
            self._bytes += image.nbytes
            while self._bytes > self._most_bytes:
                self._take(*next(iter(self._images)))

    def take(self, images: Series, t: int) -> NDArray[np.generic] | None:
        """Give an image, and keep it no longer; None where it is not here."""
        with self._lock:
            return self._take(id(images), t)

    def drop(self, all_images: Iterable[Series | None], t: int) -> None:
        """Keep image `t` of each no longer."""
        for images in all_images:
            if images is not None:
                self.take(images, t)

    def _take(self, images: int, t: int) -> NDArray[np.generic] | None:
        image = self._images.pop((images, t), None)
        self._bytes -= 0 if image is None else image.nbytes
        return image
