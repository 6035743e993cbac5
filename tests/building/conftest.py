"""The bank that most claims about builds are made of."""

from __future__ import annotations

from pathlib import Path

import pytest

import svdbank


@pytest.fixture(scope="session")
def smollm2_full_bank(smollm2: Path, device: str, tmp_path_factory: pytest.TempPathFactory) -> svdbank.Bank:
    """SmolLM2's 210 linear weights, rank 128, both sides."""
    return svdbank.build(smollm2, tmp_path_factory.mktemp("smollm2-full") / "bank", device=device)
