"""A pretended device with the project's rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# Before a device is pretended: bitsandbytes, which PEFT imports, looks for CUDA's libraries where it believes in one.
import peft  # noqa: F401
import pytest
import torch

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core import probe
from svdbank.solver import batch, devices, pinned_threads
from tests.discipline.allowed import ALLOWED
from tests.discipline.pretended import PretendedDevice
from tests.peft.models import quiet

#: Of the adapters that are attached; the bank holds twice as much.
RANK = 8


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
    probe._positions.cache_clear()
    devices._kind_of.cache_clear()
    devices._started.clear()
    streams = getattr(batch, "_own", None)
    if streams is not None:
        streams.__dict__.clear()


@pytest.fixture(autouse=True)
def _own_seed() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two small layers, random values, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=128,
            max_position_embeddings=64,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bank(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Bank:
    return svdbank.build(llama, tmp_path_factory.mktemp("bank") / "bank", rank=2 * RANK, principal=RANK, device="cpu")
