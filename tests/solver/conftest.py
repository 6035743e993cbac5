"""One thread for small matrices: two only wait for each other, and for whatever else the machine runs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from svdbank.solver import pinned_threads


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    if "test_threads" in request.node.nodeid:  # they set the counts themselves
        yield
        return
    with pinned_threads(1):
        yield
