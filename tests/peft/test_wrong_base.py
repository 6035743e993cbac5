"""What does not belong together is refused before anything changes, and says what and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, WrongBaseError
from svdbank.peft import UnverifiedBaseWarning, attachment, get_peft_model
from tests.peft.models import factors, lora_layers, mica, only_a_trains, train

Load = Callable[..., nn.Module]


def layer(model: nn.Module, index: int) -> nn.Module:
    found: nn.Module = model.get_submodule(f"encoder.layer.{index}.attention.self")
    return found


def test_a_fine_tuned_sibling_is_refused(llama: Load, smollm2_bank: Bank, legal_windows: Tensor) -> None:
    """What an instruct model is to its base: same names and shapes, other values."""
    sibling = llama(torch.bfloat16)
    train(sibling, legal_windows, steps=1, rate=1e-3)
    with pytest.raises(WrongBaseError, match=r"210 of 210 weights .* model\.layers\.0\.self_attn\.q_proj\.weight") as caught:
        get_peft_model(sibling, mica(4), bank=smollm2_bank)
    assert caught.value.exit_code == 12 and "svdbank build" in str(caught.value.hint)


def test_shuffled_layers_are_refused_by_name(bert: Load, minilm_bank: Bank) -> None:
    model = bert()
    one, other = layer(model, 1).query.weight, layer(model, 4).query.weight
    one.data, other.data = other.data, one.data
    with pytest.raises(WrongBaseError, match="2 of 37 weights") as caught:
        get_peft_model(model, mica(4), bank=minilm_bank)
    assert "layer.1.attention.self.query.weight" in str(caught.value)
    assert "layer.4.attention.self.query.weight" in str(caught.value)


def test_a_transposed_square_weight_is_refused(bert: Load, minilm_bank: Bank) -> None:
    model = bert()
    query = layer(model, 0).query
    query.weight.data = query.weight.data.T.contiguous()
    with pytest.raises(WrongBaseError, match="1 of 37 weights"):
        get_peft_model(model, mica(4), bank=minilm_bank)


def test_one_merged_adapter_is_enough_to_be_refused(bert: Load, minilm_bank: Bank) -> None:
    model = get_peft_model(bert(), mica(4, target_modules=["value"]), bank=minilm_bank)
    for attached in lora_layers(model).values():
        nn.init.normal_(factors(attached)[0])
    with pytest.raises(WrongBaseError, match="6 of 37 weights"):
        get_peft_model(model.merge_and_unload(), mica(4), bank=minilm_bank)


def test_another_shape_is_refused(minilm_bank: Bank) -> None:
    from transformers import BertConfig, BertModel

    small = BertModel(
        BertConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=96, vocab_size=50)
    )
    with pytest.raises(WrongBaseError, match=r"\(48, 48\) in the model, \(384, 384\) in the bank"):
        get_peft_model(small, mica(4), bank=minilm_bank)


def test_a_weight_the_bank_lacks_is_named_with_the_command_that_adds_it(bert: Load, minilm_bank: Bank) -> None:
    with pytest.raises(BankError, match="position_embeddings") as caught:
        get_peft_model(bert(), mica(4, target_modules=["query", "position_embeddings"]), bank=minilm_bank)
    assert "svdbank build" in str(caught.value.hint) and "--targets position_embeddings" in str(caught.value.hint)


def test_a_rank_above_the_banks_is_refused_with_the_numbers(bert: Load, minilm_bank: Bank) -> None:
    with pytest.raises(BankError, match="rank 33 was asked for, but the bank stores 32 of the 384") as caught:
        get_peft_model(bert(), mica(33), bank=minilm_bank)
    assert "--rank 33" in str(caught.value.hint)


def test_a_rank_above_the_weights_is_refused_with_the_numbers(bert: Load, minilm_bank: Bank) -> None:
    with pytest.raises(OptionError, match=r"rank 385 is outside 1\.\.384"):
        get_peft_model(bert(), mica(385), bank=minilm_bank)


def test_a_refused_attach_leaves_the_model_as_it_was(bert: Load, minilm_bank: Bank) -> None:
    model = bert()
    modules = dict(model.named_modules())
    states = {name: (id(p), p.requires_grad) for name, p in model.named_parameters()}
    with pytest.raises(BankError):
        get_peft_model(model, mica(33, modules_to_save=["pooler"]), bank=minilm_bank)
    assert dict(model.named_modules()) == modules
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == states
    assert only_a_trains(get_peft_model(model, mica(4), bank=minilm_bank))


def test_a_refused_second_adapter_leaves_the_first(bert: Load, minilm_bank: Bank) -> None:
    from svdbank.peft import use_bank

    model = get_peft_model(bert(), mica(4, target_modules=["query"]), bank=minilm_bank)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with use_bank(minilm_bank), pytest.raises(BankError):
        model.add_adapter("second", mica(33))
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    assert list(model.peft_config) == ["default"]
    with use_bank(minilm_bank):
        model.add_adapter("second", mica(8))
    assert len(lora_layers(model, "second")) == 37


def test_weights_on_meta_are_attached_unverified_and_say_so(minilm: Path, minilm_bank: Bank) -> None:
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(minilm))
    with pytest.warns(UnverifiedBaseWarning, match="37 of 37 weights"):
        attached = get_peft_model(model, mica(4), bank=minilm_bank)
    found = attachment(attached)
    assert found.state == "unverified" and len(found.unverified) == 37
    for module, attached_layer in lora_layers(attached).items():
        A, B = factors(attached_layer)
        assert B.device.type == "cpu" and torch.equal(B, minilm_bank[f"{module}.weight"].left(4)) and not A.any()


def test_nothing_attached_is_an_error_not_a_silence(bert: Load) -> None:
    with pytest.raises(OptionError, match="no bank was attached"):
        attachment(bert())
    with pytest.raises(svdbank.BankNotFoundError):
        get_peft_model(bert(), mica(4), bank="no/such/bank")
