from __future__ import annotations

import platform
import threading

import psutil
import pytest

from feature_cache.system import trim


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has malloc_trim")
def test_what_a_thread_freed_goes_back_to_the_system():
    kept = []

    def work() -> None:
        blocks = [b"x" * 100_000 for _ in range(2000)]
        kept.extend(blocks[::100])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = psutil.Process().memory_info().rss
    trim()
    assert psutil.Process().memory_info().rss < before - 100_000_000
    assert len(kept) == 20
