"""Adapters that plain PEFT saved for ``all-linear`` on experts and routers, through every verb."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import svdbank
from svdbank.adapter.settings import CONFIG, WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.core.errors import CheckpointError
from svdbank.peft import load_adapter
from tests.peft.models import quiet

TOKENS = torch.arange(1, 25).reshape(2, 12)
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
RANK = 3
#: DeepSeek-V3 has a dense layer and shared experts, whose names PEFT takes for those of experts.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 4, "intermediate_size": 40}),
    "qwen2-moe": (
        "Qwen2Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "deepseek-v3": (
        "DeepseekV3",
        {
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 12,
        },
    ),
}


def fresh(kind: str) -> nn.Module:
    import transformers

    name, own = KINDS[kind]
    torch.manual_seed(0)
    with quiet():
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**{**SHAPE, **own})).eval()


@pytest.fixture(scope="module", params=KINDS)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Bank]:
    place = tmp_path_factory.mktemp("parameters")
    with quiet():
        fresh(request.param).save_pretrained(place / "model")
    return request.param, place / "model", svdbank.build(place / "model", place / "bank", rank=8, device="cpu")


def saved_by_peft(kind: str, folder: Path, seed: int, **options: Any) -> Any:
    """A plain LoRA for all-linear with values, alpha twice the rank."""
    model = peft.get_peft_model(
        fresh(kind), peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", **options)
    )
    generator = torch.Generator().manual_seed(seed)
    for name, value in model.named_parameters():
        if ".lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.1
    with quiet():
        model.save_pretrained(str(folder))
    return model


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def near(one: Tensor, other: Tensor, most: float = 1e-5) -> bool:
    return float((one.double() - other.double()).norm()) <= most * float(other.double().norm())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rslora", [False, True])
def test_what_plain_peft_saved_is_read_as_it_acts(moe: tuple[str, Path, Bank], tmp_path: Path, rslora: bool) -> None:
    kind, source, bank = moe
    model = saved_by_peft(kind, tmp_path / "lora", 1, use_rslora=rslora)
    merged = dict(model.merge_and_unload().named_parameters())
    svdbank.fuse(source, tmp_path / "lora", tmp_path / "fused")
    fused = dict(type(fresh(kind)).from_pretrained(tmp_path / "fused").named_parameters())
    base = dict(fresh(kind).named_parameters())
    assert fused.keys() == merged.keys()
    assert all(near(fused[name], merged[name]) for name in merged)
    adapter = svdbank.read_adapter(tmp_path / "lora", bank=bank)
    for key, weight in adapter.weights.items():
        path, _, expert = key.rpartition(".")
        name = path if weight.kind == "expert" else f"{key}.weight"
        change = merged[name].double() - base[name].double()
        change = change[int(expert)] if weight.kind == "expert" else change
        assert near(weight.delta(), change, 1e-4), key  # a difference of float32 values some hundred times larger
    config = json.loads((tmp_path / "lora" / CONFIG).read_bytes())
    assert ("gate.weight" in (config["target_parameters"] or ())) == (kind != "qwen2-moe")
    assert any(weight.kind == "parameter" for weight in adapter.weights.values()) == (kind != "qwen2-moe")


@pytest.mark.filterwarnings("ignore")
def test_every_verb_takes_it(moe: tuple[str, Path, Bank], tmp_path: Path) -> None:
    kind, source, bank = moe
    one, two = saved_by_peft(kind, tmp_path / "one", 1), saved_by_peft(kind, tmp_path / "two", 2)
    ours, theirs = svdbank.read_adapter(tmp_path / "one"), svdbank.read_adapter(tmp_path / "two")
    assert ours.weights.keys() == theirs.weights.keys()

    svdbank.merge([tmp_path / "one", tmp_path / "two"], output=tmp_path / "merged", weights=[0.5, 0.25])
    merged = svdbank.read_adapter(tmp_path / "merged")
    for key, weight in merged.weights.items():
        assert near(weight.delta(), 0.5 * ours.delta(key) + 0.25 * theirs.delta(key)), key
        assert weight.kind == ours.weights[key].kind
    svdbank.stack([tmp_path / "one", tmp_path / "two"], output=tmp_path / "stacked", bank=bank)
    svdbank.export(tmp_path / "one", to="lora", output=tmp_path / "exported")
    svdbank.export(tmp_path / "one", inference=True, to="lora", output=tmp_path / "served")
    assert svdbank.compare([tmp_path / "one", tmp_path / "two"]).pairs
    expected = {"exported": logits(one), "served": logits(one), "one": logits(one)}
    for name in ("merged", "stacked", "exported", "served", "one"):
        plain = peft.PeftModel.from_pretrained(fresh(kind), tmp_path / name)
        loaded = load_adapter(fresh(kind), tmp_path / name, bank=bank)
        assert torch.equal(logits(loaded), logits(plain)), name
        assert near(logits(plain), expected.get(name, logits(plain))), name
        svdbank.fuse(source, tmp_path / name, tmp_path / f"{name}.fused")
        fused = type(fresh(kind)).from_pretrained(tmp_path / f"{name}.fused")
        assert near(logits(fused), logits(plain), 1e-4), name  # the model of changed weights, in sums of another order
    assert not near(logits(two), logits(one), 1e-3)
    report = svdbank.init(bank, output=tmp_path / "beside", rank=2, beside=[tmp_path / "one"], base_model=str(source))
    assert report.band == (0, 2)
    # A bank holds all directions of a small matrix: any LoRA is a combination of them, and stands on none.
    assert not [name for name in report.left_out if "shared_expert_gate" not in name]


@pytest.mark.filterwarnings("ignore")
def test_a_fresh_folder_loads_in_plain_peft_with_every_value_and_b_stays_here(
    moe: tuple[str, Path, Bank], tmp_path: Path
) -> None:
    kind, source, bank = moe
    report = svdbank.init(bank, output=tmp_path / "fresh", rank=RANK, base_model=str(source))
    assert any("B trains too" in note for note in report.notes)
    assert "trains too" in (tmp_path / "fresh" / "README.md").read_text()
    small = {name for name in bank.names if "shared_expert_gate" in name}
    assert set(report.left_out) == small and any("left out" in note for note in report.notes) == bool(small)
    written = load_file(tmp_path / "fresh" / WEIGHTS)
    plain = peft.PeftModel.from_pretrained(fresh(kind), tmp_path / "fresh", is_trainable=True)
    read = peft.get_peft_model_state_dict(plain)
    assert written.keys() == read.keys() and all(torch.equal(written[key], read[key]) for key in written)
    assert any(".lora_B." in name and value.requires_grad for name, value in plain.named_parameters())
    for bank_or_not in (bank, None):
        model = load_adapter(fresh(kind), tmp_path / "fresh", bank=bank_or_not)
        assert all(".lora_A." in name for name, value in model.named_parameters() if value.requires_grad)
    again = load_adapter(model, tmp_path / "fresh", adapter_name="second", bank=bank)
    again.set_adapter("second")
    assert all(".lora_A.second." in name for name, value in again.named_parameters() if value.requires_grad)


def test_a_folder_of_fewer_parameters_than_its_config_names_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    saved_by_peft("mixtral", tmp_path / "lora", 1)
    file = tmp_path / "lora" / WEIGHTS
    save_file({key: value for key, value in load_file(file).items() if "experts.base_layer" not in key}, file)
    with pytest.raises(CheckpointError, match=r"experts: the config targets gate_up_proj, down_proj, .* factors for 1"):
        svdbank.read_adapter(tmp_path / "lora")
