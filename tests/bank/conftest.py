"""A small bank, and the places far away where it may lie."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import svdbank
from tests.building.small import write_small_checkpoint
from tests.checkpoint.hub_server import LocalHub


@pytest.fixture(scope="session")
def near(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> svdbank.Bank:
    """Six weights of 24x40, ranks up to 24: two chunks of vectors a weight and side."""
    folder = tmp_path_factory.mktemp("near")
    return svdbank.build(write_small_checkpoint(folder / "model", minilm, layers=6), folder / "bank", rank=24)


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache that has seen nothing."""
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """What the real client asks in this process, with a cache of its own."""
    with LocalHub() as running:
        running.point(monkeypatch, tmp_path / "hub")
        yield running
