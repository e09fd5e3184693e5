"""The kernels' threads end when nobody holds them."""

import sys
from pathlib import Path

import pytest

from octavo.kernels import library
from tests.builds import needs_kernels


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="nowhere to count threads")
def test_threads_end_with_their_object():
    def count():
        return len(list(Path("/proc/self/task").iterdir()))

    before = count()
    threads = library.KernelThreads(library.load(), 4)
    assert count() == before + 3  # the caller is the fourth
    del threads
    assert count() == before
