"""Small models of real transformers classes, saved by transformers itself, once a session."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small models of real classes, by name."""
    from tests.checkpoint.small_models import build

    return build(tmp_path_factory.mktemp("models"))
