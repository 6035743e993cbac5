"""bitsandbytes bases on the CPU, with bases from the unquantised weights: what PEFT cannot initialise at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank.peft import UnverifiedBaseWarning, attachment, get_peft_model, load_adapter, use_bank
from tests.peft.models import factors, lora_layers, mica, only_a_trains, place, quiet, same, trainable, without_svd

KINDS = ["nf4", "int8"]
RANK = 8
#: Two layers of SmolLM2 are a model of their own: its weights are real, its speed is a test's.
SHORT = {"num_hidden_layers": 2}

pytestmark = [
    pytest.mark.filterwarnings("ignore::svdbank.peft.UnverifiedBaseWarning"),
    pytest.mark.filterwarnings("ignore:MatMul8bitLt"),
]


@pytest.fixture
def short(smollm2: Path, device: str) -> Callable[..., Any]:
    """The first two layers of SmolLM2, in bfloat16 or quantised by bitsandbytes as Transformers loads them."""
    return shortened(smollm2, device)


def shortened(smollm2: Path, device: str) -> Callable[..., Any]:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    def load(kind: str = "bf16") -> Any:
        quantisation = {
            "bf16": None,
            "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32),
            "int8": BitsAndBytesConfig(load_in_8bit=True),
        }[kind]
        with quiet():
            return AutoModelForCausalLM.from_pretrained(
                smollm2, dtype=torch.bfloat16, quantization_config=quantisation, device_map=device, **SHORT
            )

    return load


def frozen_and_the_banks(model: nn.Module, bank: Bank, adapter: str = "default") -> bool:
    layers = lora_layers(model, adapter)
    return len(layers) == 14 and all(
        not factors(layer, adapter)[1].requires_grad
        and same(factors(layer, adapter)[1], bank[f"{module}.weight"].left(layer.r[adapter]))
        for module, layer in layers.items()
    )


def steps(model: nn.Module, windows: Tensor, count: int) -> list[float]:
    windows = windows.to(place(model))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    losses = []
    for _ in range(count):
        loss = model(input_ids=windows, labels=windows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_base_trains_and_its_adapter_works_on_the_bf16_base(
    kind: str, short: Callable[..., Any], smollm2_bank: Bank, legal_windows: Tensor, tmp_path: Path
) -> None:
    windows = legal_windows[:2, :32]
    base = peft.prepare_model_for_kbit_training(short(kind), use_gradient_checkpointing=False)
    with without_svd(), pytest.warns(UnverifiedBaseWarning, match="14 of 14"):
        model = get_peft_model(base, mica(RANK, task_type="CAUSAL_LM"), bank=smollm2_bank)
    assert type(next(iter(lora_layers(model).values()))).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    assert attachment(model).state == "unverified" and only_a_trains(model)
    losses = steps(model, windows, 6)
    assert losses[-1] < losses[0] - 0.1
    assert frozen_and_the_banks(model, smollm2_bank)

    model.save_pretrained(tmp_path / "a")
    plain = short()
    windows = windows.to(place(plain))
    with torch.no_grad():
        before = float(plain(input_ids=windows, labels=windows).loss)
        with without_svd():
            full = load_adapter(plain, tmp_path / "a", bank=smollm2_bank)
        after = float(full.eval()(input_ids=windows, labels=windows).loss)
    assert attachment(full).state == "verified" and frozen_and_the_banks(full, smollm2_bank)
    assert after < before - 0.1  # what it learnt on the quantised base it knows on the full one
    with without_svd():
        back = load_adapter(short(kind), tmp_path / "a", bank=smollm2_bank)
    assert only_a_trains(back) and frozen_and_the_banks(back, smollm2_bank)
    assert steps(back, windows, 1)[0] < losses[0] - 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_takes_no_gradient_away(
    kind: str, short: Callable[..., Any], smollm2_bank: Bank, legal_windows: Tensor
) -> None:
    """bitsandbytes packs 4-bit weights for AVX512-BF16 at the first evaluation, and no gradient passes those."""
    windows = legal_windows[:2, :32]

    def gradients(*, evaluated: bool) -> dict[str, Tensor]:
        model = get_peft_model(short(kind), mica(RANK), bank=smollm2_bank)
        tokens = windows.to(place(model))
        if evaluated:
            with torch.no_grad():
                model.eval()(input_ids=tokens)
        model.train()(input_ids=tokens, labels=tokens).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    fresh, evaluated = gradients(evaluated=False), gradients(evaluated=True)
    assert len(fresh) == 14 and all(grad.any() for grad in fresh.values())
    assert fresh.keys() == evaluated.keys() and all(torch.equal(fresh[name], evaluated[name]) for name in fresh)


def test_a_plain_lora_that_is_loaded_keeps_its_gradients_too(
    short: Callable[..., Any], legal_windows: Tensor, tmp_path: Path
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False)
    peft.get_peft_model(short("bf16"), config).save_pretrained(tmp_path / "lora")
    model = load_adapter(short("nf4"), tmp_path / "lora")
    tokens = legal_windows[:1, :16].to(place(model))
    with torch.no_grad():
        model.eval()(input_ids=tokens)
    model.train()(input_ids=tokens, labels=tokens).loss.backward()
    first = factors(lora_layers(model)["model.layers.0.mlp.down_proj"], "default")[0]
    # What a packed weight stops is the gradient of layers before it.
    unpacked = [m.weight for n, m in model.named_modules() if n.endswith("up_proj")]
    assert first.grad is not None and bool(first.grad.any())
    assert len(unpacked) == 2 and not any(getattr(w.quant_state, "packing_format_for_cpu", False) for w in unpacked)


def test_a_base_that_was_packed_before_is_not_trained(smollm2: Path, smollm2_bank: Bank, tmp_path: Path) -> None:
    """On the CPU, which alone packs."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu

    short = shortened(smollm2, "cpu")
    get_peft_model(short("nf4"), mica(RANK), bank=smollm2_bank).save_pretrained(tmp_path / "a")
    model = short("nf4")
    weight = model.model.layers[1].mlp.up_proj.weight
    weight.data, _ = _convert_weight_packed_for_cpu(
        weight.data, weight.quant_state
    )  # what an evaluation does where the CPU can
    with pytest.raises(OptionError, match=r"packed 1 weights .*model\.layers\.1\.mlp\.up_proj"):
        get_peft_model(model, mica(RANK), bank=smollm2_bank)
    with use_bank(smollm2_bank):
        served = peft.PeftModel.from_pretrained(model, tmp_path / "a", is_trainable=False)
    assert not trainable(served)


@pytest.mark.parametrize("kind", KINDS)
def test_b_stays_frozen_whatever_peft_does_next(
    kind: str, short: Callable[..., Any], smollm2_bank: Bank, tmp_path: Path
) -> None:
    model = get_peft_model(short(kind), mica(RANK), bank=smollm2_bank)
    model.save_pretrained(tmp_path / "a")
    with use_bank(smollm2_bank), without_svd():
        model.add_adapter("second", mica(4))
        model.load_adapter(str(tmp_path / "a"), "third", is_trainable=True)
    load_adapter(model, tmp_path / "a", adapter_name="fourth")
    for adapter in ("second", "third", "fourth", "default"):
        model.set_adapter(adapter)
        assert only_a_trains(model, adapter) and frozen_and_the_banks(model, smollm2_bank, adapter)
    model.set_requires_grad("second")
    model.base_model.enable_adapter_layers()
    assert not any("lora_B" in name for name, p in model.named_parameters() if p.requires_grad)
    with use_bank(smollm2_bank), without_svd():
        resumed = peft.PeftModel.from_pretrained(short(kind), tmp_path / "a", is_trainable=True)
    assert only_a_trains(resumed) and frozen_and_the_banks(resumed, smollm2_bank)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_alone_cannot(kind: str, short: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="float32, float16, or bfloat16"):
        peft.get_peft_model(short(kind), mica(RANK))


def test_methods_that_change_the_base_are_refused(short: Callable[..., Any], smollm2: Path, smollm2_bank: Bank) -> None:
    model = short("nf4")
    before = dict(model.named_modules())
    with pytest.raises(OptionError, match=r"14 modules are quantised, offloaded"):
        get_peft_model(model, mica(RANK, init_lora_weights="milora"), bank=smollm2_bank)
    assert dict(model.named_modules()) == before
