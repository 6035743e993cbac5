"""Where language models are measured: one thread, and a cache of texts of its own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _surroundings(single_thread: None, own_texts_cache: None) -> None:
    """The matrices are small."""
