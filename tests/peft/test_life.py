"""What PEFT does with adapters after attaching: switching, mixing, swapping, merging. B is the bank's throughout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import svdbank
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, WrongBaseError
from svdbank.peft import attachment, get_peft_model, load_adapter, use_bank
from tests.peft.models import factors, lora_layers, mica, only_a_trains, place, same, trainable, without_svd

Load = Callable[..., nn.Module]
TOKENS = torch.arange(1000, 1048).reshape(3, 16)


def b_is_the_banks(model: nn.Module, bank: Bank, adapter: str = "default") -> bool:
    layers = lora_layers(model, adapter)
    return bool(layers) and all(
        same(factors(layer, adapter)[1], bank[f"{module}.weight"].left(layer.r[adapter])) for module, layer in layers.items()
    )


def move(model: nn.Module, seed: int, adapter: str = "default") -> None:
    """Give A values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model, adapter).values():
        A = factors(layer, adapter)[0]
        A.data.copy_(torch.randn(A.shape, generator=generator) * 0.2)


def output(model: nn.Module, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens.to(place(model)), **options).last_hidden_state.cpu()


@pytest.fixture
def two(bert: Load, minilm_bank: Bank) -> Any:
    """A model with two trained adapters of different rank and targets."""
    model = get_peft_model(bert(), mica(4), bank=minilm_bank)
    with use_bank(minilm_bank):
        model.add_adapter("second", mica(8, target_modules=["query", "value"]))
    move(model, 1)
    move(model, 2, "second")
    return model


def test_switching_and_freezing_leave_b_alone(two: Any, minilm_bank: Bank, no_svd: list[str]) -> None:
    for adapter in ("second", "default", "second"):
        two.set_adapter(adapter)
        assert only_a_trains(two, adapter)
        two.train()
        two(input_ids=TOKENS.to(place(two))).last_hidden_state.square().mean().backward()
        assert all(factors(layer, adapter)[1].grad is None for layer in lora_layers(two, adapter).values())
        optimizer = torch.optim.SGD([p for p in two.parameters() if p.requires_grad], lr=0.1)
        optimizer.step()
        optimizer.zero_grad()
    two.base_model.set_adapter(["default", "second"])
    assert not any("_B." in name for name in trainable(two))
    two.set_requires_grad(["default", "second"])
    assert not any("_B." in name for name in trainable(two))
    two.delete_adapter("default")
    two.set_adapter("second")
    assert only_a_trains(two, "second") and b_is_the_banks(two, minilm_bank, "second")


def test_one_batch_of_several_adapters_is_each_adapter_on_its_rows(two: Any, minilm_bank: Bank) -> None:
    mixed = output(two, adapter_names=["default", "second", "__base__"])
    alone = []
    for adapter in ("default", "second"):
        two.set_adapter(adapter)
        alone.append(output(two))
    with two.disable_adapter():
        alone.append(output(two))
    assert (alone[0][0] - alone[2][0]).abs().max() > 1e-2  # the adapters matter
    for row, single in enumerate(alone):
        # The same products over one row instead of three: float32 sums in another order.
        assert torch.allclose(mixed[row], single[row], rtol=0, atol=2e-5)
    assert b_is_the_banks(two, minilm_bank) and b_is_the_banks(two, minilm_bank, "second")


def test_merging_and_unmerging_give_the_outputs_and_the_base_back(two: Any, bert: Load, minilm_bank: Bank) -> None:
    two.set_adapter("default")
    apart = output(two)
    two.merge_adapter()
    assert torch.allclose(output(two), apart, rtol=0, atol=2e-5)
    two.unmerge_adapter()
    for module, layer in lora_layers(two).items():
        base = layer.get_base_layer().weight
        original = bert().get_parameter(f"{module}.weight") if module.endswith("layer.0.attention.self.query") else base
        # Two roundings, of W + ΔW and of the difference, each relative to the larger.
        assert (base - original).abs().max() <= 2.0**-22 * (
            original.abs().max() + layer.get_delta_weight("default").abs().max()
        )
    assert b_is_the_banks(two, minilm_bank) and b_is_the_banks(two, minilm_bank, "second")
    merged = two.merge_and_unload()
    assert torch.allclose(output(merged), apart, rtol=0, atol=2e-5)
    assert not any("lora_" in name for name, _ in merged.named_parameters())


def test_both_adapters_are_saved_and_come_back(
    two: Any, bert: Load, minilm_bank: Bank, tmp_path: Path, no_svd: list[str]
) -> None:
    two.save_pretrained(tmp_path / "a")
    again = load_adapter(bert(), tmp_path / "a", bank=minilm_bank)
    load_adapter(again, tmp_path / "a" / "second", bank=minilm_bank, adapter_name="second")
    for adapter in ("default", "second"):
        two.set_adapter(adapter)
        again.set_adapter(adapter)
        assert torch.equal(output(again), output(two)) and only_a_trains(again, adapter)
        assert b_is_the_banks(again, minilm_bank, adapter)
        assert attachment(again, adapter).state == "verified"
    again.save_pretrained(tmp_path / "b")
    for name in ("", "second"):
        first, second = (load_file(tmp_path / side / name / WEIGHTS) for side in "ab")
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("rank", [4, 2])
def test_hotswapping_leaves_b_frozen_and_the_banks(
    rank: int, bert: Load, device: str, minilm_bank: Bank, tmp_path: Path, no_svd: list[str]
) -> None:
    for seed in (1, 2):
        made = get_peft_model(bert(), mica(rank if seed == 2 else 4), bank=minilm_bank)
        move(made, seed)
        made.save_pretrained(tmp_path / str(seed))
    model = load_adapter(bert(), tmp_path / "1", bank=minilm_bank)
    hotswap_adapter(model, str(tmp_path / "2"), adapter_name="default", torch_device=device)
    # The direct load is the same up to what a wider, zero-padded product rounds.
    assert torch.allclose(output(model), output(load_adapter(bert(), tmp_path / "2", bank=minilm_bank)), rtol=0, atol=2e-5)
    for module, layer in lora_layers(model).items():
        B = factors(layer)[1]
        assert same(B[:, :rank], minilm_bank[f"{module}.weight"].left(rank)) and not B[:, rank:].any()
    assert only_a_trains(model)
    model.set_adapter("default")
    assert only_a_trains(model)


def test_a_bfloat16_base_gets_the_banks_b_in_full(bert: Load, minilm_bank: Bank) -> None:
    """PEFT rounds B to the base's dtype before it trains in float32; then its columns are no longer orthonormal."""
    model = get_peft_model(bert(torch.bfloat16), mica(8), bank=minilm_bank)
    assert b_is_the_banks(model, minilm_bank)
    theirs = peft.get_peft_model(bert(torch.bfloat16), mica(8, target_modules=["query"], layers_to_transform=[0]))
    (B,) = (factors(layer)[1] for layer in lora_layers(theirs).values())
    assert B.dtype == torch.float32 and (B.T @ B - torch.eye(8, device=B.device)).abs().max() > 1e-4


def test_an_adapter_with_anothers_b_is_refused(bert: Load, minilm_bank: Bank, tmp_path: Path) -> None:
    svdbank.init(minilm_bank, rank=4, output=tmp_path / "a", targets=("query",))
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    key = next(key for key in tensors if "layer.3." in key and "lora_B" in key)

    def put(B: Tensor) -> Path:
        save_file({**tensors, key: B.contiguous()}, tmp_path / "a" / WEIGHTS)
        return tmp_path / "a"

    left = minilm_bank["encoder.layer.3.attention.self.query.weight"].left(32)
    generator = torch.Generator().manual_seed(0)
    random = torch.linalg.qr(torch.randn(384, 4, generator=generator))[0]
    for foreign in (random, torch.cat([left[:, -3:], random[:, :1]], 1), left[:, [0, 1, 30, 31]], torch.zeros(384, 4)):
        model = bert()
        before = dict(model.named_modules())
        with pytest.raises(WrongBaseError, match=r"B of 1 of 6 weights .*layer\.3\.attention\.self\.query"):
            load_adapter(model, put(foreign), bank=minilm_bank)
        assert dict(model.named_modules()) == before
        load_adapter(bert(), put(foreign))  # unchecked, as was asked for
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator))[0]
    # Another machine's bank (a rotation among close singular values), a later band, a copy in bfloat16: all of this bank.
    for own in (
        left[:, -4:] @ rotation,
        left[:, -8:-4],
        left[:, -4:].bfloat16().float(),
        left[:, -4:] @ rotation.bfloat16().float(),
    ):
        assert load_adapter(bert(), put(own), bank=minilm_bank) is not None


def test_an_adapter_of_the_same_name_gets_other_values_under_the_same_checks(
    bert: Load, minilm_bank: Bank, tmp_path: Path
) -> None:
    model = get_peft_model(bert(), mica(4, target_modules=["query"]), bank=minilm_bank)
    move(model, 1)
    model.save_pretrained(tmp_path / "a")
    fresh = get_peft_model(bert(), mica(4, target_modules=["query"]), bank=minilm_bank)
    assert torch.equal(output(load_adapter(fresh, tmp_path / "a", bank=minilm_bank)), output(model)) and only_a_trains(fresh)
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    save_file({key: value.flip(0).contiguous() for key, value in tensors.items()}, tmp_path / "a" / WEIGHTS)
    with pytest.raises(WrongBaseError, match="B of 6 of 6 weights"):
        load_adapter(fresh, tmp_path / "a", bank=minilm_bank)
    plain = peft.get_peft_model(bert(), mica(4, init_lora_weights=True, target_modules=["query"]))
    with pytest.raises(OptionError, match="starts from plain LoRA, the folder from mica"):
        load_adapter(plain, tmp_path / "a", bank=minilm_bank)
    assert b_is_the_banks(fresh, minilm_bank)


def test_transformers_refused_adapter_leaves_no_trace(bert: Load, minilm_bank: Bank) -> None:
    model = bert()
    notes = dict(model.__dict__)
    with use_bank(minilm_bank):
        with pytest.raises(BankError):
            model.add_adapter(mica(33))
        assert model.__dict__.keys() == notes.keys() and not model._hf_peft_config_loaded
        with pytest.raises(ValueError, match="No adapter loaded"):
            model.active_adapters()
        model.add_adapter(mica(4))
        assert only_a_trains(model) and list(model.peft_config) == ["default"]
        with pytest.raises(BankError):
            model.add_adapter(mica(33), "second")
        assert list(model.peft_config) == ["default"] and model._hf_peft_config_loaded
        assert only_a_trains(model) and b_is_the_banks(model, minilm_bank)


def test_layers_that_are_no_matrix_are_refused_with_their_name(minilm_bank: Bank) -> None:
    class Small(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.part = layer

    for layer in (nn.Conv2d(4, 4, 3), nn.Conv1d(4, 4, 3), nn.MultiheadAttention(8, 2)):
        with pytest.raises(OptionError, match=f"part: a {type(layer).__name__} is not one matrix"):
            get_peft_model(Small(layer), mica(2, target_modules=["part"]), bank=minilm_bank)


def test_no_route_computes_a_decomposition(bert: Load, device: str, minilm_bank: Bank, tmp_path: Path) -> None:
    """Every way in and out, with every decomposition of torch and numpy made to fail and counted."""
    with without_svd() as called:
        for method in ("mica", "milora", "pissa"):
            model = get_peft_model(bert(), mica(4, init_lora_weights=method), bank=minilm_bank)
            model.save_pretrained(tmp_path / method)
            load_adapter(bert(), tmp_path / method, bank=minilm_bank).merge_and_unload()
            with use_bank(minilm_bank):
                peft.get_peft_model(bert(), mica(4, init_lora_weights=method), low_cpu_mem_usage=True)
                bert().add_adapter(mica(4, init_lora_weights=method))
                bert().load_adapter(str(tmp_path / method), is_trainable=True)
                loaded = peft.PeftModel.from_pretrained(bert(), tmp_path / method, is_trainable=True)
                if method == "mica":
                    loaded.add_adapter("second", mica(8))
                    loaded.load_adapter(str(tmp_path / method), "third", is_trainable=True)
                    loaded.add_weighted_adapter(["default", "third"], [0.5, 0.5], "fourth", combination_type="cat")
                    peft.PeftModel.from_pretrained(bert(), tmp_path / method, low_cpu_mem_usage=True)
        svdbank.init(minilm_bank, rank=4, output=tmp_path / "fresh")
        load_adapter(bert(), tmp_path / "fresh")
        hotswap_adapter(load_adapter(bert(), tmp_path / "mica"), str(tmp_path / "fresh"), "default", torch_device=device)
    assert called == []
