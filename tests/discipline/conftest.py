"""A pretended device with the project's rules."""

from __future__ import annotations

from collections.abc import Iterator

# Before a device is pretended: bitsandbytes, which PEFT imports, looks for CUDA's libraries where it believes in one.
import peft  # noqa: F401
import pytest
import torch

from svdbank.adapter import recognition
from svdbank.solver import devices, pinned_threads
from tests.discipline.allowed import ALLOWED
from tests.discipline.pretended import PretendedDevice


@pytest.fixture
def pretended() -> Iterator[PretendedDevice]:
    """The device, present for the length of a test."""
    _forget()
    with pinned_threads(1), PretendedDevice(ALLOWED).present() as device:
        for name in ("cuda", "cuda:0"):  # once a process: no part of what a weight costs
            devices.start(torch.device(name))
        yield device
    _forget()


def _forget() -> None:
    """What the code under test keeps of devices, by their names: a real one must not get a pretended one's."""
    recognition._positions.cache_clear()
    devices.kind_of.cache_clear()
    devices._started.clear()


@pytest.fixture(autouse=True)
def _own_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
