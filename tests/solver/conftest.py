"""One thread for small matrices: two only wait for each other, and for whatever else the machine runs.

``SVDBANK_TEST_THREADS`` asks for another count (``tests/processors.py``): sums then run in another order.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from svdbank.solver import pinned_threads
from svdbank.solver.devices import start


@pytest.fixture(autouse=True)
def called_once(request: pytest.FixtureRequest) -> None:
    """What a process calls before its first solve has been called: a test may put something else in the place of a routine."""
    name = request.getfixturevalue("device") if "device" in request.fixturenames else "cpu"
    for device in {torch.device(name), torch.empty(0, device=name).device}:  # cuda, and as a tensor says it: cuda:0
        start(device)


@pytest.fixture(autouse=True)
def one_thread(request: pytest.FixtureRequest) -> Iterator[None]:
    if "test_threads" in request.node.nodeid:  # they set the counts themselves
        yield
        return
    with pinned_threads(int(os.environ.get("SVDBANK_TEST_THREADS", "1"))):
        yield
