"""Fused experts: one basis an expert, through PEFT's ``target_parameters``, where PEFT itself has no MiCA."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, WrongBaseError
from svdbank.core.specs import Progress
from svdbank.peft import attachment, get_peft_model, load_adapter, use_bank
from tests.peft.models import mica, place, quiet, same, sine, trainable, without_svd

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TOKENS = torch.arange(1, 25).reshape(2, 12)
RANK = 4


def mixtral() -> nn.Module:
    """(E, out, in) parameters, two layers of three experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1}
    return MixtralForCausalLM(
        MixtralConfig(vocab_size=64, num_hidden_layers=2, num_local_experts=3, max_position_embeddings=64, **shape)
    ).eval()


def gpt_oss() -> nn.Module:
    """(E, in, out) parameters: the module says ``is_transposed``."""
    from transformers import GptOssConfig, GptOssForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 12}
    return GptOssForCausalLM(
        GptOssConfig(
            vocab_size=64, num_hidden_layers=2, num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64, **shape
        )
    ).eval()


MODELS = {"mixtral": mixtral, "gpt_oss": gpt_oss}
Make = Callable[[str], nn.Module]


@pytest.fixture
def fresh(device: str) -> Make:
    """A fresh model on the test's device at each call, by name."""
    return lambda name: MODELS[name]().to(device)


@pytest.fixture(scope="module")
def banks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bank]:
    place = tmp_path_factory.mktemp("experts")
    found = {}
    for name, make in MODELS.items():
        with quiet():
            make().save_pretrained(place / name)
        targets = ("q_proj", "gate_up_proj", "down_proj")
        found[name] = svdbank.build(place / name, place / f"{name}.bank", rank=8, side="both", targets=targets, device="cpu")
    return found


def config(**options: Any) -> Any:
    return mica(RANK, target_modules=["q_proj"], target_parameters=EXPERTS, **options)


def wrappers(model: nn.Module, adapter: str = "default") -> dict[str, Any]:
    """PEFT's layers of fused parameters by parameter path."""
    from peft.tuners.lora.layer import ParamWrapper

    return {
        f"{name.replace('.base_layer', '')}.{module.parameter_name}": module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ParamWrapper) and adapter in module.lora_A
    }


def expert_b(layer: Any, expert: int, adapter: str = "default") -> Tensor:
    """(out, r): PEFT lays B out expert-minor."""
    B = layer.lora_B[adapter].weight
    return B.reshape(B.shape[0], -1, layer.num_experts)[:, :, expert]


def matrix(layer: Any, expert: int) -> Tensor:
    """(out, in) as the bank sees it."""
    values = layer.get_param()[expert].detach()
    return values.T if getattr(layer.get_base_layer(), "is_transposed", False) else values


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS.to(place(model))).logits.cpu()


def step(model: nn.Module, rate: float = 0.05) -> None:
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    for _ in range(2):
        optimizer.zero_grad()
        tokens = TOKENS.to(place(model))
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    model.eval()


@pytest.mark.parametrize("name", MODELS)
def test_each_expert_gets_its_own_minor_directions_and_only_a_trains(
    name: str, fresh: Make, banks: dict[str, Bank], tmp_path: Path
) -> None:
    base = fresh(name)
    before = logits(base)
    with without_svd():
        model = get_peft_model(base, config(), bank=banks[name])
    found = attachment(model)
    assert found.state == "verified" and len(found.weights) == 2 * (1 + 2 * 3)
    assert torch.equal(logits(model), before)
    layers = wrappers(model)
    assert len(layers) == 4
    for module, layer in layers.items():
        for expert in range(3):
            own = banks[name][f"{module}.{expert}"].left(RANK)
            assert same(expert_b(layer, expert), own)
            U = torch.linalg.svd(matrix(layer, expert).cpu().double())[0][:, : min(matrix(layer, expert).shape)]
            assert sine(own, U[:, -RANK:]) < 1e-6  # the bank's vectors are float32
    assert trainable(model) and all(".lora_A." in parameter for parameter in trainable(model))
    step(model)
    assert not torch.allclose(logits(model), before)
    assert all(
        same(expert_b(layer, e), banks[name][f"{module}.{e}"].left(RANK)) for module, layer in layers.items() for e in range(3)
    )
    model.set_adapter("default")
    assert all(".lora_A." in parameter for parameter in trainable(model))

    model.save_pretrained(tmp_path / "a")
    with without_svd():
        again = load_adapter(fresh(name), tmp_path / "a", bank=banks[name])
        unchecked = load_adapter(fresh(name), tmp_path / "a")
    assert torch.equal(logits(again), logits(model)) and torch.equal(logits(unchecked), logits(model))
    assert all(".lora_A." in parameter for parameter in trainable(again) | trainable(unchecked))
    with pytest.raises(ValueError, match="mica"):
        peft.PeftModel.from_pretrained(fresh(name), tmp_path / "a")

    trained = logits(model)
    # Merging adds the same float32 delta in another order.
    assert (logits(model.merge_and_unload()) - trained).abs().max() <= 1e-5 * trained.abs().max()


@pytest.mark.parametrize("method", ["mica", "milora"])
def test_what_one_expert_learns_stays_in_its_own_matrix(method: str, fresh: Make, banks: dict[str, Bank]) -> None:
    base = {name: p.detach().clone() for name, p in fresh("mixtral").named_parameters()}
    model = get_peft_model(fresh("mixtral"), config(init_lora_weights=method), bank=banks["mixtral"])
    for module, layer in wrappers(model).items():
        delta = layer.get_delta_weight("default")
        whole = layer.get_param() + delta
        # One rounding of W' to float32 and one of the sum.
        assert (whole - base[module]).abs().max() <= 4 * 2.0**-24 * base[module].abs().max(), module
        with torch.no_grad():
            layer.lora_A["default"].weight[RANK : 2 * RANK] += 1.0  # rows of expert 1
        changed = layer.get_delta_weight("default") - delta
        assert changed[1].any() and not changed[0].any() and not changed[2].any()


def test_a_second_adapter_over_the_same_experts(fresh: Make, banks: dict[str, Bank]) -> None:
    model = get_peft_model(fresh("mixtral"), config(), bank=banks["mixtral"])
    with use_bank(banks["mixtral"]), without_svd():
        model.add_adapter("second", config())
    model.set_adapter("second")
    assert all(".lora_A.second" in parameter for parameter in trainable(model))
    for module, layer in wrappers(model, "second").items():
        assert same(expert_b(layer, 2, "second"), banks["mixtral"][f"{module}.2"].left(RANK))


def test_an_exchanged_expert_is_refused_by_name(fresh: Make, banks: dict[str, Bank]) -> None:
    model = fresh("mixtral")
    experts = model.get_parameter("model.layers.1.mlp.experts.down_proj").data
    experts[[0, 2]] = experts[[2, 0]]
    with pytest.raises(WrongBaseError, match=r"2 of 14 weights .*down_proj\.0"):
        get_peft_model(model, config(), bank=banks["mixtral"])


def test_plain_peft_has_no_mica_for_experts() -> None:
    """What makes a freeze of our own necessary; when this fails, PEFT can do it."""
    with pytest.raises(ValueError, match="variant"):
        peft.get_peft_model(mixtral(), config())


def qwen2_moe() -> nn.Module:
    """A shared expert with a gate of one row."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    own = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    shape = {"hidden_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    return Qwen2MoeForCausalLM(Qwen2MoeConfig(vocab_size=64, num_hidden_layers=2, **shape, **own)).eval()


def test_all_linear_takes_routers_and_a_rank_above_them_is_an_error_whose_hint_works(tmp_path: Path) -> None:
    with quiet():
        mixtral().save_pretrained(tmp_path / "model")
    bank = svdbank.build(tmp_path / "model", tmp_path / "bank", rank=8, device="cpu")
    assert {bank[name].kind for name in bank.names if name.endswith("mlp.gate.weight")} == {"router"}
    with pytest.raises(
        OptionError, match=r"rank 4 is outside 1\.\.3, what model.layers.0.mlp.gate of shape \(3, 24\)"
    ) as caught:
        get_peft_model(mixtral(), mica(RANK), bank=bank)
    assert "rank_pattern={'gate.weight': 3}" in str(caught.value.hint)
    model = get_peft_model(mixtral(), mica(RANK, rank_pattern={"gate.weight": 3}), bank=bank)
    layers = wrappers(model)
    assert len(layers) == 6
    for layer in (1, 0):
        own = layers[f"model.layers.{layer}.mlp.gate.weight"]
        assert same(own.lora_B["default"].weight, bank[f"model.layers.{layer}.mlp.gate.weight"].left(3))
        experts = layers[f"model.layers.{layer}.mlp.experts.gate_up_proj"]  # of two matrices: PEFT gives it twice the rank
        assert same(expert_b(experts, 1), bank[f"model.layers.{layer}.mlp.experts.gate_up_proj.1"].left(2 * RANK))
    assert all(".lora_A." in parameter for parameter in trainable(model))


def test_a_gate_of_one_row_is_left_out_as_the_hint_says(tmp_path: Path) -> None:
    with quiet():
        qwen2_moe().save_pretrained(tmp_path / "model")
    bank = svdbank.build(tmp_path / "model", tmp_path / "bank", rank=8, device="cpu")
    with pytest.raises(
        OptionError, match=r"rank 4 is outside 1\.\.1, what .*shared_expert_gate .*; so it is of 1 more"
    ) as caught:
        get_peft_model(qwen2_moe(), mica(RANK), bank=bank)
    assert "exclude_modules=['shared_expert_gate']" in str(caught.value.hint)
    model = get_peft_model(qwen2_moe(), mica(RANK, exclude_modules=["shared_expert_gate"]), bank=bank)
    assert not any("shared_expert_gate" in name for name in trainable(model))


def test_a_bank_without_routers_says_which_build_adds_them_and_that_solves_only_those(
    banks: dict[str, Bank], tmp_path: Path
) -> None:
    with quiet():
        mixtral().save_pretrained(tmp_path / "model")
    before = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
    bank = svdbank.build(tmp_path / "model", tmp_path / "bank", rank=8, targets=before, device="cpu")
    with pytest.raises(BankError, match=r"no basis for model.layers.0.mlp.gate, model.layers.1.mlp.gate") as caught:
        get_peft_model(mixtral(), mica(3), bank=bank)
    assert "svdbank build MODEL --targets gate adds them" in str(caught.value.hint)
    solved = []

    def told(progress: Progress) -> None:
        if progress.stage == "decompose":
            solved.append(progress.total)

    bank = svdbank.build(tmp_path / "model", tmp_path / "bank", rank=8, targets=["gate"], device="cpu", progress=told)
    assert set(solved) == {2}
    get_peft_model(mixtral(), mica(3), bank=bank)


def test_a_second_adapter_may_spell_the_same_parameters_otherwise(fresh: Make, banks: dict[str, Bank]) -> None:
    model = get_peft_model(fresh("mixtral"), config(), bank=banks["mixtral"])
    other = mica(RANK, target_modules=["q_proj"], target_parameters=["gate_up_proj", "experts.down_proj"])
    with use_bank(banks["mixtral"]):
        model.add_adapter("second", other)
    assert len(wrappers(model, "second")) == 4
