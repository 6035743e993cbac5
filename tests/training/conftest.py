"""The small model, its bank and legal text, made once a session.

The Trainer and ``svdbank.eval`` choose their device by themselves: CUDA in a ``cuda`` test, the CPU in every other one, where
tests/conftest.py hides CUDA, also from the processes that a test starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import svdbank
from svdbank.bank.reading import Bank
from tests.training.models import cut_smollm2, write_jsonl


@pytest.fixture(scope="session")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_smollm2(smollm2, tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def small_bank(small: Path) -> Bank:
    """In the cache of this session, where train finds it."""
    return svdbank.build(small, rank=32, principal=8, device="cpu")


@pytest.fixture(scope="session")
def legal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginnings of 20 licences as JSON lines: some 90 blocks of 32 tokens."""
    from svdbank.lm.packaged import licence_texts

    return write_jsonl(tmp_path_factory.mktemp("texts") / "legal.jsonl", [text[:500] for text in licence_texts()[:20]])


@pytest.fixture(scope="session", autouse=True)
def _own_texts_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What datasets keeps of the tests' texts stays out of the user's cache."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture(autouse=True)
def _one_thread(single_thread: None) -> None:
    """The matrices are small, and sums of floats come out the same in another process."""
