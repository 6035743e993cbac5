"""A Hub on this machine with a small base, banks of it built once, and a process that is logged in."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import svdbank
from tests.building.small import write_small_checkpoint
from tests.checkpoint.hub_server import LocalHub

BASE = "org/base"
BASE_CARD = b"---\nlicense: other\nlicense_name: small\nlicense_link: LICENSE.md\n---\n# Base\n"
LICENCE = b"Do with it what you like.\n"


@pytest.fixture(scope="session")
def small_base(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two weights of MiniLM, 24 x 40."""
    return write_small_checkpoint(tmp_path_factory.mktemp("base") / "small", minilm)


@pytest.fixture(scope="session")
def base_files(small_base: Path) -> dict[str, bytes]:
    """What the base's repository holds."""
    files = {path.name: path.read_bytes() for path in small_base.iterdir()}
    return {**files, "README.md": BASE_CARD, "LICENSE.md": LICENCE}


@pytest.fixture(scope="session")
def built_banks(small_base: Path, base_files: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Banks of the same weights: ``folder`` built from a folder, ``hub`` from the Hub, ``small`` with fewer ranks."""
    folder = tmp_path_factory.mktemp("banks")
    svdbank.build(small_base, folder / "folder", rank=18, device="cpu")
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.point(patch, folder / "home")
        hub.commit(BASE, base_files)
        svdbank.build(BASE, folder / "hub", rank=18, device="cpu")
        svdbank.build(BASE, folder / "less", rank=2, device="cpu")
    return {name: folder / name for name in ("folder", "hub", "less")}


@pytest.fixture
def hub(base_files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """A Hub that holds the base, of which this process is a user."""
    with LocalHub() as running:
        running.point(monkeypatch, tmp_path / "hf", token=running.login("me"))
        monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "svdbank"))
        running.commit(BASE, base_files)
        yield running


@pytest.fixture
def banks(built_banks: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of the banks, to be harmed."""
    return {name: Path(shutil.copytree(path, tmp_path / name)) for name, path in built_banks.items()}
