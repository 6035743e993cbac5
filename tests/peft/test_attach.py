"""``svdbank.peft.get_peft_model``: PEFT's adapter, with the bank's basis in place of an SVD."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.peft import attachment, get_peft_model
from tests.peft.models import factors, float32_angle, lora_layers, mica, only_a_trains, place, quiet, same, sine

Load = Callable[..., nn.Module]


def test_b_is_the_banks_to_the_bit_and_a_is_zero(llama: Load, smollm2_bank: Bank, no_svd: list[str]) -> None:
    model = get_peft_model(llama(), mica(16), bank=smollm2_bank)
    layers = lora_layers(model)
    assert len(layers) == 210
    for module, layer in layers.items():
        A, B = factors(layer)
        assert same(B, smollm2_bank[f"{module}.weight"].left(16))
        assert not A.any() and A.dtype == B.dtype == torch.float32
    assert only_a_trains(model)
    found = attachment(model)
    assert found.state == "verified" and len(found.weights) == 210
    assert set(found.seconds) == {"surgery", "recognise", "read", "copy"}


def test_the_fresh_adapter_changes_no_output(llama: Load, smollm2_bank: Bank) -> None:
    base = llama().eval()
    tokens = torch.arange(100, 116, device=place(base))[None]
    with torch.no_grad():
        before = base(tokens).logits
        after = get_peft_model(base, mica(8), bank=smollm2_bank).eval()(tokens).logits
    assert torch.equal(before, after)  # A = 0: what is added is exactly zero


SMALL = ["query", "key"]

VARIANTS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rank_pattern": {"target_modules": SMALL, "rank_pattern": {"query": 4, "layer.1.attention.self.key": 20}},
    "alpha_pattern": {"target_modules": SMALL, "alpha_pattern": {"key": 3}, "lora_alpha": 16},
    "rslora": {"target_modules": SMALL, "use_rslora": True},
    "layers_to_transform": {"target_modules": SMALL, "layers_to_transform": [1, 3]},
    "exclude_modules": {"target_modules": [*SMALL, "value"], "exclude_modules": ["layer.0.attention.self.query", "value"]},
    "regex": {"target_modules": r"encoder\.layer\.[02]\.(.*\.)?(query|dense)"},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "dropout": {"target_modules": SMALL, "lora_dropout": 0.1},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_option_means_what_it_means_in_peft(variant: str, bert: Load, minilm_bank: Bank) -> None:
    ours = lora_layers(get_peft_model(bert(), mica(6, **VARIANTS[variant]), bank=minilm_bank))
    # On the CPU: a GPU's float32 SVD is worse than LAPACK's, whose error the tolerance describes.
    theirs = lora_layers(peft.get_peft_model(bert().cpu(), mica(6, **VARIANTS[variant])))
    assert list(ours) == list(theirs)
    for module, layer in ours.items():
        rival = theirs[module]
        assert layer.r == rival.r and layer.scaling == rival.scaling
        for own, other in zip(factors(layer), factors(rival), strict=True):
            assert own.shape == other.shape and own.dtype == other.dtype and own.requires_grad == other.requires_grad
        rank = layer.r["default"]
        assert sine(factors(layer)[1], factors(rival)[1]) <= float32_angle(minilm_bank, f"{module}.weight", rank), module


def test_transformers_conv1d_is_decomposed_in_its_own_orientation(tmp_path: Path, device: str) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=2))
    with quiet():
        model.save_pretrained(tmp_path / "gpt2")
    bank = svdbank.build(tmp_path / "gpt2", tmp_path / "bank", rank=8, targets=("c_attn", "c_fc"), device=device)
    config = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    ours = lora_layers(get_peft_model(model.to(device), mica(4, **config), bank=bank))
    assert len(ours) == 4
    theirs = lora_layers(peft.get_peft_model(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2"), mica(4, **config)))
    for module, layer in ours.items():
        A, B = factors(layer)
        assert B.shape == (layer.out_features, 4) and A.shape == (4, layer.in_features)
        assert sine(B, factors(theirs[module])[1]) <= float32_angle(bank, f"{module}.weight", 4)


@pytest.mark.parametrize("spelling", ["MiCA", "MICA", "Mica"])
def test_any_capitalisation_freezes_b(spelling: str, bert: Load, minilm_bank: Bank) -> None:
    config = mica(4, init_lora_weights=spelling)
    model = get_peft_model(bert(), config, bank=minilm_bank)
    assert only_a_trains(model)
    assert model.peft_config["default"].init_lora_weights == "mica"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_b_is_cast_to_the_dtype_of_the_weight_as_peft_casts(dtype: torch.dtype, bert: Load, minilm_bank: Bank) -> None:
    model = get_peft_model(bert(dtype), mica(4), bank=minilm_bank, autocast_adapter_dtype=False)
    for module, layer in lora_layers(model).items():
        B = factors(layer)[1]
        assert B.dtype == dtype and same(B, minilm_bank[f"{module}.weight"].left(4).to(dtype))
    assert attachment(model).state == "verified"


def test_a_bf16_checkpoint_is_recognised_in_any_dtype(llama: Load, smollm2_bank: Bank) -> None:
    config = {"target_modules": ["q_proj"]}
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        model = llama(torch.bfloat16).double() if dtype == torch.float64 else llama(dtype)
        assert attachment(get_peft_model(model, mica(4, **config), bank=smollm2_bank)).state == "verified"


def test_a_model_cast_down_and_up_again_is_recognised(bert: Load, minilm_bank: Bank) -> None:
    model = bert().to(torch.bfloat16).float()
    assert attachment(get_peft_model(model, mica(4), bank=minilm_bank)).state == "verified"


def test_a_bank_of_the_bare_model_serves_the_model_with_a_head(minilm: Path, minilm_bank: Bank, device: str) -> None:
    from transformers import AutoModelForMaskedLM

    with quiet():
        model = AutoModelForMaskedLM.from_pretrained(minilm)
    attached = get_peft_model(model.to(device), mica(4, target_modules=["query", "value"]), bank=minilm_bank)
    layers = lora_layers(attached)
    assert len(layers) == 12 and all(module.startswith("bert.encoder.") for module in layers)
    for module, layer in layers.items():
        assert same(factors(layer)[1], minilm_bank[f"{module.removeprefix('bert.')}.weight"].left(4))


def test_a_bank_of_the_model_with_a_head_serves_the_bare_model(minilm: Path, bert: Load, tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    with quiet():
        AutoModelForMaskedLM.from_pretrained(minilm).save_pretrained(tmp_path / "model")
    bank = svdbank.build(tmp_path / "model", tmp_path / "bank", rank=4, side="left", targets=("query",))
    assert all(name.startswith("bert.") for name in bank)
    layers = lora_layers(get_peft_model(bert(), mica(4, target_modules=["query"]), bank=bank))
    for module, layer in layers.items():
        assert same(factors(layer)[1], bank[f"bert.{module}.weight"].left(4))


def test_a_second_adapter_is_attached_beside_the_first(bert: Load, minilm_bank: Bank) -> None:
    from svdbank.peft import use_bank

    model = get_peft_model(bert(), mica(4), bank=minilm_bank)
    with use_bank(minilm_bank):
        model.add_adapter("second", mica(8, target_modules=["query"]))
    model.set_adapter("second")
    assert only_a_trains(model, "second")
    for module, layer in lora_layers(model, "second").items():
        assert same(factors(layer, "second")[1], minilm_bank[f"{module}.weight"].left(8))
    model.set_adapter("default")
    assert only_a_trains(model, "default")


@pytest.mark.parametrize("init", [True, "gaussian", "pissa_niter_4"])
def test_a_config_that_takes_nothing_from_a_bank_is_refused(init: Any, bert: Load, minilm_bank: Bank) -> None:
    with pytest.raises(OptionError, match="takes nothing from a bank"):
        get_peft_model(bert(), mica(4, init_lora_weights=init), bank=minilm_bank)


def test_weight_tying_is_refused_rather_than_silently_broken(bert: Load, minilm_bank: Bank) -> None:
    config = mica(4, target_modules=["word_embeddings"], ensure_weight_tying=True)
    with pytest.raises(OptionError, match="ensure_weight_tying"):
        get_peft_model(bert(), config, bank=minilm_bank)


def test_the_bank_may_be_named_by_its_folder(bert: Load, minilm_bank: Bank) -> None:
    assert attachment(get_peft_model(bert(), mica(4), bank=minilm_bank.path)).bank == str(minilm_bank.path)
