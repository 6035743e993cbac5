"""On a base in bfloat16 the factors keep their float32 digits, and what is frozen stays frozen, however a folder is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import svdbank
from svdbank.bank.reading import Bank
from svdbank.peft import get_peft_model, load_adapter, use_bank
from tests.peft.models import factors, lora_layers, mica, only_a_trains, trainable

TARGETS = ["query", "word_embeddings"]

#: What a user may hand on to PEFT; the second makes PEFT put the tensors of the file in place of its own.
OPTIONS: list[dict[str, Any]] = [{}, {"low_cpu_mem_usage": True}]


@pytest.fixture(scope="module")
def folder(minilm_bank: Bank, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MiCA adapter on embeddings and linear weights whose A is drawn at random."""
    place = tmp_path_factory.mktemp("narrow") / "adapter"
    svdbank.init(minilm_bank.path, rank=4, output=place, targets=TARGETS)
    tensors = load_file(place / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    for key, value in tensors.items():
        if "_A" in key:
            value.copy_(torch.randn(value.shape, generator=generator))
    save_file(tensors, place / "adapter_model.safetensors", metadata={"format": "pt"})
    return place


def differs(model: nn.Module, folder: Path) -> float:
    """Largest difference of the model's factors from the folder's."""
    saved = load_file(folder / "adapter_model.safetensors")
    found = 0.0
    for module, layer in lora_layers(model).items():
        for name, own in zip("AB", factors(layer), strict=True):
            [key] = [key for key in saved if key.startswith(f"base_model.model.{module}.lora_") and f"_{name}" in key]
            found = max(found, float((saved[key] - own.detach().float().cpu()).abs().max()))
    return found


def gram(model: nn.Module) -> float:
    """Largest entry of BᵀB − 1."""
    Bs = [factors(layer)[1].detach().double() for layer in lora_layers(model).values()]
    return max(float((B.T @ B - torch.eye(B.shape[1], dtype=B.dtype, device=B.device)).abs().max()) for B in Bs)


#: Orthogonality of float32 columns.
EXACT = 1e-6


@pytest.mark.parametrize("options", OPTIONS, ids=["", "low-cpu"])
@pytest.mark.parametrize("route", ["load_adapter", "with the bank", "use_bank", "one more", "Transformers"])
def test_a_folder_keeps_its_digits_and_b_its_freeze(
    route: str, options: dict[str, Any], bert: Callable[..., nn.Module], minilm_bank: Bank, folder: Path
) -> None:
    base: Any = bert(torch.bfloat16)
    name = "default"
    if route == "load_adapter":
        model = load_adapter(base, folder, **options)
    elif route == "with the bank":
        model = load_adapter(base, folder, bank=minilm_bank, **options)
    elif route == "use_bank":
        with use_bank(minilm_bank):
            model = peft.PeftModel.from_pretrained(base, folder, is_trainable=True, **options)
    elif route == "one more":
        model = load_adapter(base, folder, adapter_name="other", is_trainable=False, **options)
        load_adapter(model, folder, adapter_name=name, **options)
        model.set_adapter(name)
    else:
        with use_bank(minilm_bank):
            base.load_adapter(str(folder), is_trainable=True, **options)
        model = base
    assert differs(model, folder) == 0 and gram(model) < EXACT
    assert only_a_trains(model), sorted(trainable(model))
    assert all(parameter.dtype == torch.float32 for layer in lora_layers(model).values() for parameter in factors(layer))


def test_a_fresh_adapter_has_the_bank_s_digits_and_b_frozen(bert: Callable[..., nn.Module], minilm_bank: Bank) -> None:
    model = get_peft_model(bert(torch.bfloat16), mica(4, target_modules=TARGETS), bank=minilm_bank)
    assert gram(model) < EXACT and only_a_trains(model)
    with use_bank(minilm_bank):
        model = peft.get_peft_model(bert(torch.bfloat16), mica(4, target_modules=TARGETS))
    assert gram(model) < EXACT and only_a_trains(model)


@pytest.mark.parametrize("options", OPTIONS, ids=["", "low-cpu"])
def test_milora_s_factors_are_those_that_were_taken_from_the_weight(
    options: dict[str, Any], bert: Callable[..., nn.Module], minilm_bank: Bank, tmp_path: Path
) -> None:
    svdbank.init(minilm_bank.path, rank=4, output=tmp_path / "a", targets=["query"], method="milora")
    model = load_adapter(bert(torch.bfloat16), tmp_path / "a", bank=minilm_bank, **options)
    assert differs(model, tmp_path / "a") == 0


def test_an_adapter_of_plain_peft_keeps_its_digits_and_is_narrowed_where_that_is_asked_for(
    bert: Callable[..., nn.Module], tmp_path: Path
) -> None:
    peft.get_peft_model(bert(), peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)).save_pretrained(tmp_path)
    for options in OPTIONS:
        assert differs(load_adapter(bert(torch.bfloat16), tmp_path, **options), tmp_path) == 0
    narrow = load_adapter(bert(torch.bfloat16), tmp_path, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
    assert {factors(layer)[0].dtype for layer in lora_layers(narrow).values()} == {torch.bfloat16}


def test_plain_peft_has_both_losses(bert: Callable[..., nn.Module], folder: Path) -> None:
    """What docs/peft.md says of it. Where this fails, PEFT has mended it."""
    plain = peft.PeftModel.from_pretrained(bert(torch.bfloat16), folder, is_trainable=True, low_cpu_mem_usage=True)
    assert not only_a_trains(plain) and gram(plain) > 1e-4
