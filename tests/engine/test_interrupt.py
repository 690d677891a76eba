"""What is brought to its end, whatever happens meanwhile."""

from __future__ import annotations

import threading

from feature_cache.engine import finish


def test_what_is_to_be_finished_is_where_no_thread_starts(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    done = []
    finish(lambda: done.append(True))
    assert done
