"""One thread for small matrices: two only wait for each other, and for whatever else the machine runs.

``SVDBANK_TEST_THREADS`` asks for another count (``tests/processors.py``): sums then run in another order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from svdbank.solver import pinned_threads


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    if "test_threads" in request.node.nodeid:  # they set the counts themselves
        yield
        return
    with pinned_threads(int(os.environ.get("SVDBANK_TEST_THREADS", "1"))):
        yield
