"""One bank that the adapter tests share, and adapters on it that look trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank


@pytest.fixture(scope="session")
def pair_bank(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    """MiniLM's queries and values, 40 minor and 8 principal triplets of each."""
    folder = tmp_path_factory.mktemp("pair") / "bank"
    return svdbank.build(minilm, folder, rank=40, principal=8, targets=("query", "value"))


@pytest.fixture
def trained(pair_bank: Bank, tmp_path: Path) -> Callable[..., Path]:
    """``trained("name", seed, **options of init)``: a folder whose factors moved as training moves them."""

    def make(name: str, seed: int = 0, **options: object) -> Path:
        chosen: dict[str, object] = {"rank": 4, "targets": ("query", "value"), **options}
        svdbank.init(pair_bank, output=tmp_path / name, **chosen)  # type: ignore[arg-type]
        tensors = load_file(tmp_path / name / WEIGHTS)
        generator = torch.Generator().manual_seed(seed)
        frozen = options.get("method", "mica") == "mica"
        for key, value in tensors.items():
            if "lora_A" in key or not frozen:
                tensors[key] = value + 0.05 * torch.randn(value.shape, generator=generator)
        save_file(tensors, tmp_path / name / WEIGHTS, metadata={"format": "pt"})
        return tmp_path / name

    return make


@pytest.fixture(autouse=True)
def _one_thread(single_thread: None) -> None:
    """The matrices are small."""
