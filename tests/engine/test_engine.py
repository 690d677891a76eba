"""What the engine does where its stages meet."""

from __future__ import annotations

import threading

import numpy as np

from feature_cache import FeatureCache
from feature_cache.testing import FakeBackbone


def test_as_many_frames_are_read_at_once_as_there_are_cores(tmp_path, small, monkeypatch):
    frames, masks = small
    monkeypatch.setattr("feature_cache.engine.engine.count_cores", lambda: 4)
    together = threading.Barrier(4, timeout=30)

    class Together:
        """Frames whose first four are given when all are asked for at once."""

        def __len__(self) -> int:
            return len(frames)

        def __getitem__(self, t: int) -> np.ndarray:
            if threading.current_thread().name == "feature_cache read" and t < 4:
                together.wait()
            return frames[t]

    movie = FeatureCache(tmp_path).movie(Together(), masks, FakeBackbone())
    movie.compute(range(4))
    assert not together.broken
    assert movie.contains(range(4)).all()
