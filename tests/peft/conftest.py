"""Real models on the test's device and their banks, made once a session on the CPU; fresh models for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import svdbank
from svdbank.bank.reading import Bank
from tests.peft.models import quiet, without_svd

#: Embeddings stand beside the linear weights, so that one bank serves every MiniLM test.
MINILM_TARGETS = ("all-linear", "word_embeddings")


@pytest.fixture(scope="session")
def smollm2_bank(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return svdbank.build(smollm2, tmp_path_factory.mktemp("smollm2") / "bank", rank=32, side="left", device="cpu")


@pytest.fixture(scope="session")
def minilm_bank(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    place = tmp_path_factory.mktemp("minilm") / "bank"
    return svdbank.build(minilm, place, rank=32, side="both", principal=8, targets=MINILM_TARGETS, device="cpu")


@pytest.fixture
def llama(smollm2: Path, device: str) -> Callable[..., nn.Module]:
    """A fresh SmolLM2 at each call, float32 by default."""
    from transformers import AutoModelForCausalLM

    def load(dtype: torch.dtype = torch.float32) -> nn.Module:
        with quiet():
            return AutoModelForCausalLM.from_pretrained(smollm2, dtype=dtype).to(device)

    return load


@pytest.fixture
def bert(minilm: Path, device: str) -> Callable[..., nn.Module]:
    """A fresh MiniLM encoder at each call."""
    from transformers import AutoModel

    def load(dtype: torch.dtype = torch.float32) -> nn.Module:
        with quiet():
            return AutoModel.from_pretrained(minilm, dtype=dtype).to(device)

    return load


@pytest.fixture(scope="session")
def legal_windows(smollm2: Path) -> Tensor:
    """(40, 64) tokens of licence texts."""
    from transformers import AutoTokenizer

    from svdbank.lm.packaged import licence_texts
    from svdbank.lm.windows import token_windows

    return token_windows(licence_texts(), AutoTokenizer.from_pretrained(smollm2), count=40, length=64)


@pytest.fixture
def no_svd() -> Iterator[list[str]]:
    with without_svd() as called:
        yield called


@pytest.fixture(autouse=True)
def _one_thread(single_thread: None) -> None:
    """The matrices are small."""
