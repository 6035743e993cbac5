"""Where training is tested: one thread, and a cache of texts of its own.

The Trainer and ``svdbank.eval`` choose their device by themselves: CUDA in a ``cuda`` test, the CPU in every other one, where
tests/conftest.py hides CUDA, also from the processes that a test starts.
"""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _surroundings(single_thread: None, own_texts_cache: None) -> None:
    """The matrices are small, and sums of floats come out the same in another process."""
