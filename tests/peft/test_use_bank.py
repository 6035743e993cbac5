"""``use_bank``: trainers that call PEFT or Transformers themselves get the bank's bases, and B stays frozen whatever they do."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import Embedding, LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError
from svdbank.peft import attachment, get_peft_model, use_bank
from tests.peft.models import factors, lora_layers, mica, only_a_trains, same, trainable, without_svd

Load = Callable[..., nn.Module]
PLACES = [
    (LoraLayer, "mica_init"),
    (Embedding, "mica_init"),
    (BaseTuner, "inject_adapter"),
    (BaseTuner, "_cast_adapter_dtype"),
    (LoraModel, "add_weighted_adapter"),
    (PeftAdapterMixin, "add_adapter"),
    (PeftAdapterMixin, "load_adapter"),
]


def peft_as_it_is() -> list[object]:
    return [owner.__dict__[name] for owner, name in PLACES]


def b_is_the_banks(model: nn.Module, bank: Bank, adapter: str = "default") -> bool:
    layers = lora_layers(model, adapter)
    return bool(layers) and all(
        same(factors(layer, adapter)[1], bank[f"{module}.weight"].left(layer.r[adapter])) for module, layer in layers.items()
    )


@pytest.fixture
def saved(bert: Load, minilm_bank: Bank, tmp_path: Path) -> Path:
    """A MiCA adapter as PEFT saves it, with a trained A."""
    model = get_peft_model(bert(), mica(4), bank=minilm_bank)
    for layer in lora_layers(model).values():
        nn.init.normal_(factors(layer)[0], std=0.01)
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_peft_called_by_others_takes_the_banks_bases(bert: Load, minilm_bank: Bank, no_svd: list[str]) -> None:
    with use_bank(minilm_bank) as bank:
        assert bank is minilm_bank
        model = peft.get_peft_model(bert(), mica(4, init_lora_weights="MiCA", target_modules=["query", "word_embeddings"]))
    assert b_is_the_banks(model, minilm_bank) and only_a_trains(model)
    assert len(attachment(model).weights) == 7


def test_transformers_own_add_adapter_takes_them_too(bert: Load, minilm_bank: Bank, no_svd: list[str]) -> None:
    model = bert()
    with use_bank(minilm_bank):
        model.add_adapter(mica(4))
    assert b_is_the_banks(model, minilm_bank) and only_a_trains(model)
    assert attachment(model).state == "verified"


def test_transformers_own_load_adapter_leaves_b_frozen(bert: Load, minilm_bank: Bank, saved: Path, no_svd: list[str]) -> None:
    model = bert()
    with use_bank(minilm_bank):
        model.load_adapter(str(saved), is_trainable=True)
    assert only_a_trains(model) and b_is_the_banks(model, minilm_bank)
    assert any(factors(layer)[0].any() for layer in lora_layers(model).values())
    model.set_adapter("default")
    assert only_a_trains(model)


def test_transformers_load_adapter_without_the_block_trains_b(bert: Load, saved: Path) -> None:
    """The fault of PEFT and Transformers that the block repairs; when this fails, the repair can go."""
    model = bert()
    model.load_adapter(str(saved), is_trainable=True)
    assert any("lora_B" in name for name in trainable(model))


@pytest.mark.parametrize("low", [False, True])
def test_from_pretrained_and_load_adapter_run_no_svd(
    low: bool, bert: Load, minilm_bank: Bank, saved: Path, no_svd: list[str]
) -> None:
    with use_bank(minilm_bank):
        model = peft.PeftModel.from_pretrained(bert(), saved, is_trainable=True, low_cpu_mem_usage=low)
        model.load_adapter(saved, "second", is_trainable=True, low_cpu_mem_usage=low)
    assert b_is_the_banks(model, minilm_bank) and b_is_the_banks(model, minilm_bank, "second")
    model.set_adapter("second")
    assert only_a_trains(model, "second")
    model.set_adapter("default")
    assert only_a_trains(model)
    model.set_requires_grad("second")
    assert not any("lora_B" in name for name in trainable(model))


@pytest.mark.parametrize("kind", ["linear", "cat"])
def test_a_weighted_adapter_is_peft_s_without_its_svds(kind: str, bert: Load, minilm_bank: Bank, saved: Path) -> None:
    # cat needs rank 4 · 10 = 40, more than the bank's 32: nothing is looked up for factors that are overwritten.
    adapters = ["default", "second"] * (1 if kind == "linear" else 5)

    def combine() -> dict[str, Any]:
        model = peft.PeftModel.from_pretrained(bert(), saved, is_trainable=True, low_cpu_mem_usage=True)
        model.load_adapter(saved, "second", low_cpu_mem_usage=True)
        model.add_weighted_adapter(adapters, [0.5] * len(adapters), "both", combination_type=kind)
        return lora_layers(model)

    with use_bank(minilm_bank), without_svd():
        ours = combine()
    theirs = combine()
    for module, layer in ours.items():
        assert torch.equal(layer.get_delta_weight("both"), theirs[module].get_delta_weight("both"))


def test_other_initialisations_are_left_alone(bert: Load, minilm_bank: Bank) -> None:
    with use_bank(minilm_bank):
        model = peft.get_peft_model(bert(), mica(4, init_lora_weights=True))
    A, B = factors(next(iter(lora_layers(model).values())))
    assert A.any() and not B.any() and B.requires_grad


def test_leaving_the_block_gives_peft_back_also_after_an_error(bert: Load, minilm_bank: Bank) -> None:
    before = peft_as_it_is()
    with use_bank(minilm_bank):
        inside = peft_as_it_is()
        assert all(ours is not theirs for ours, theirs in zip(inside, before, strict=True))
    assert peft_as_it_is() == before
    with pytest.raises(RuntimeError, match="trainer"), use_bank(minilm_bank):
        raise RuntimeError("the trainer failed")
    with pytest.raises(BankError), use_bank(minilm_bank):
        peft.get_peft_model(bert(), mica(33))
    assert peft_as_it_is() == before


def test_blocks_nest_and_the_innermost_bank_counts(bert: Load, llama: Load, minilm_bank: Bank, smollm2_bank: Bank) -> None:
    before = peft_as_it_is()
    with use_bank(smollm2_bank):
        with use_bank(minilm_bank):
            assert b_is_the_banks(peft.get_peft_model(bert(), mica(4)), minilm_bank)
        with pytest.raises(BankError):
            peft.get_peft_model(bert(), mica(4))
        assert peft_as_it_is() != before
    assert peft_as_it_is() == before


def test_other_threads_keep_peft_s_own_behaviour(bert: Load, minilm_bank: Bank) -> None:
    model, done = bert(), threading.Event()
    seen: list[nn.Module] = []

    def other() -> None:
        torch.set_num_threads(1)
        seen.append(peft.get_peft_model(model, mica(4, target_modules=["query"], layers_to_transform=[0])))
        done.set()

    with use_bank(minilm_bank):
        thread = threading.Thread(target=other)
        thread.start()
        assert done.wait(60)
        thread.join()
    B = factors(next(iter(lora_layers(seen[0]).values())))[1]
    assert B.any() and not hasattr(seen[0], "svdbank_attachments")


def test_a_wrapper_put_around_ours_survives(bert: Load, minilm_bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody else patches PEFT inside the block: leaving it must not throw their patch away."""
    calls = []
    with use_bank(minilm_bank):
        ours = LoraLayer.mica_init

        def theirs(self: LoraLayer, adapter_name: str) -> None:
            calls.append(adapter_name)
            ours(self, adapter_name)

        monkeypatch.setattr(LoraLayer, "mica_init", theirs)
    assert LoraLayer.mica_init is theirs
    peft.get_peft_model(bert(), mica(4, target_modules=["query"], layers_to_transform=[0]))
    assert calls == ["default"]
    # What monkeypatch puts back is our wrapper, which passes everything through; give the class its own function again.
    monkeypatch.undo()
    LoraLayer.mica_init = ours.__wrapped__


def test_a_layer_made_outside_a_model_is_an_error(minilm_bank: Bank) -> None:
    from peft.tuners.lora import Linear

    with use_bank(minilm_bank), pytest.raises(BankError, match="outside a model"):
        Linear(nn.Linear(384, 384), "default", mica(4), r=4, lora_alpha=4)
