"""From attaching to reloading no decomposition runs, and B stays the bank's to the bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdbank
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, CheckpointError, WrongBaseError
from svdbank.peft import attachment, get_peft_model, load_adapter
from tests.peft.models import factors, lora_layers, mica, only_a_trains, quiet, same, train

Load = Callable[..., nn.Module]


def assert_b_is_the_banks(model: nn.Module, bank: Bank, adapter: str = "default") -> None:
    layers = lora_layers(model, adapter)
    assert layers
    for module, layer in layers.items():
        assert same(factors(layer, adapter)[1], bank[f"{module}.weight"].left(layer.r[adapter])), module


def test_attach_train_save_reload_and_load_on_a_bf16_checkpoint_in_float32(
    llama: Load, smollm2_bank: Bank, legal_windows: Tensor, tmp_path: Path, no_svd: list[str]
) -> None:
    model = get_peft_model(llama(torch.float32), mica(8, task_type="CAUSAL_LM"), bank=smollm2_bank)
    losses = train(model, legal_windows[:1], steps=3)
    assert losses[2] < losses[0]  # the same window three times
    assert_b_is_the_banks(model, smollm2_bank)
    assert only_a_trains(model)
    model.save_pretrained(tmp_path / "adapter")
    trained = {module: factors(layer)[0].clone() for module, layer in lora_layers(model).items()}
    assert all(A.any() for A in trained.values())

    again = load_adapter(llama(torch.float32), tmp_path / "adapter", bank=smollm2_bank)
    assert only_a_trains(again) and attachment(again).state == "verified"
    assert_b_is_the_banks(again, smollm2_bank)
    for module, layer in lora_layers(again).items():
        assert torch.equal(factors(layer)[0], trained[module])
    resumed = train(again, legal_windows[:1], steps=1)
    assert resumed[0] < losses[2]
    assert_b_is_the_banks(again, smollm2_bank)


@pytest.mark.parametrize("bank_given", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_load_adapter_needs_no_bank_and_freezes_b(
    bank_given: bool, trainable: bool, bert: Load, minilm_bank: Bank, tmp_path: Path, no_svd: list[str]
) -> None:
    svdbank.init(minilm_bank, rank=4, output=tmp_path / "one")
    svdbank.init(minilm_bank, rank=8, output=tmp_path / "two", targets=("query", "word_embeddings"))
    bank = minilm_bank if bank_given else None
    model = load_adapter(bert(), tmp_path / "one", bank=bank, is_trainable=trainable)
    assert only_a_trains(model) == trainable
    load_adapter(model, tmp_path / "two", bank=bank, adapter_name="two", is_trainable=trainable)
    assert_b_is_the_banks(model, minilm_bank)
    assert_b_is_the_banks(model, minilm_bank, "two")
    model.set_adapter("two")
    assert only_a_trains(model, "two")


def test_a_trained_embedding_survives_peft_s_save_and_our_load_with_its_tie(
    llama: Load, smollm2: Path, tmp_path: Path, legal_windows: Tensor
) -> None:
    """PEFT saves the whole embedding beside its factors; loaded on the meta device it would come apart from the head."""
    bank = svdbank.build(smollm2, tmp_path / "bank", rank=4, side="left", targets=("embed_tokens",))
    model = get_peft_model(llama(), mica(4, target_modules=["embed_tokens"]), bank=bank)
    assert only_a_trains(model)
    train(model, legal_windows, steps=1)
    assert_b_is_the_banks(model, bank)
    with quiet():
        model.save_pretrained(tmp_path / "adapter")
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter" / WEIGHTS))
    again = load_adapter(llama(), tmp_path / "adapter", bank=bank).get_base_model()
    assert again.lm_head.weight is again.model.embed_tokens.base_layer.weight
    layer = again.model.embed_tokens
    assert torch.equal(factors(layer)[0], factors(model.get_base_model().model.embed_tokens)[0])


def test_a_saved_config_in_capitals_still_freezes_b(bert: Load, minilm_bank: Bank, tmp_path: Path, no_svd: list[str]) -> None:
    svdbank.init(minilm_bank, rank=4, output=tmp_path / "a")
    config = (tmp_path / "a" / "adapter_config.json").read_text()
    (tmp_path / "a" / "adapter_config.json").write_text(config.replace('"mica"', '"MiCA"'))
    assert only_a_trains(load_adapter(bert(), tmp_path / "a"))


def test_a_plain_lora_folder_loads_as_in_peft(bert: Load, tmp_path: Path) -> None:
    model = peft.get_peft_model(bert(), mica(4, init_lora_weights=True, target_modules=["query"]))
    model.save_pretrained(tmp_path / "lora")
    names = {name for name, p in load_adapter(bert(), tmp_path / "lora").named_parameters() if p.requires_grad}
    assert any("lora_B" in name for name in names)


def test_an_adapter_of_another_base_is_refused(bert: Load, minilm: Path, minilm_bank: Bank, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(minilm / "model.safetensors")
    tensors["encoder.layer.0.attention.self.query.weight"][0, 0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    (other / "config.json").write_bytes((minilm / "config.json").read_bytes())
    bank = svdbank.build(other, tmp_path / "bank", rank=4, side="left", targets=("query",))
    svdbank.init(bank, rank=4, output=tmp_path / "adapter")
    with pytest.raises(WrongBaseError, match="other weights"):
        load_adapter(bert(), tmp_path / "adapter", bank=minilm_bank)


def test_an_adapter_that_lacks_factors_is_refused(bert: Load, minilm_bank: Bank, tmp_path: Path) -> None:
    svdbank.init(minilm_bank, rank=4, output=tmp_path / "a", targets=("query",))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    lacking = {key: value for key, value in tensors.items() if "layer.2." not in key}
    save_file(lacking, tmp_path / "a" / WEIGHTS)
    model = bert()
    before = dict(model.named_modules())
    with pytest.raises(CheckpointError, match=r"encoder\.layer\.2\.attention\.self\.query"):
        load_adapter(model, tmp_path / "a")
    assert dict(model.named_modules()) == before


def test_an_adapter_of_the_bare_model_loads_into_the_model_with_a_head(
    minilm: Path, device: str, minilm_bank: Bank, tmp_path: Path
) -> None:
    from transformers import AutoModelForMaskedLM

    svdbank.init(minilm_bank, rank=4, output=tmp_path / "a", targets=("query", "value"))
    for bank in (None, minilm_bank):
        with quiet():
            model = AutoModelForMaskedLM.from_pretrained(minilm)
        layers = lora_layers(load_adapter(model.to(device), tmp_path / "a", bank=bank))
        assert len(layers) == 12
        for module, layer in layers.items():
            assert same(factors(layer)[1], minilm_bank[f"{module.removeprefix('bert.')}.weight"].left(4))


def test_a_bank_that_lacks_the_adapters_weights_is_refused(bert: Load, minilm: Path, minilm_bank: Bank, tmp_path: Path) -> None:
    svdbank.init(minilm_bank, rank=4, output=tmp_path / "a", targets=("query",))
    keys = svdbank.build(minilm, tmp_path / "bank", rank=4, side="left", targets=("key",))
    with pytest.raises(BankError, match="lacks 6 weights"):
        load_adapter(bert(), tmp_path / "a", bank=keys)
