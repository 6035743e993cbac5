"""Experts through the whole life of an adapter folder: written, read, trained by PEFT, converted and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import svdbank
from svdbank.adapter.folder import read_folder
from svdbank.adapter.settings import WEIGHTS
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.peft import load_adapter
from tests.peft.models import quiet, without_svd

TOKENS = torch.arange(1, 25).reshape(2, 12)
SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
#: Transposed parameters (gpt-oss: E, in, out) and plain ones (E, out, in).
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 3, "intermediate_size": 40}),
    "qwen3-moe": ("Qwen3Moe", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 12}),
    "gpt-oss": ("GptOss", {"num_local_experts": 3, "num_experts_per_tok": 2, "intermediate_size": 40, "head_dim": 12}),
}


def fresh(kind: str) -> nn.Module:
    import transformers

    name, own = KINDS[kind]
    torch.manual_seed(0)
    with quiet():
        return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SHAPE, **own)).eval()


@pytest.fixture(scope="module", params=KINDS)
def moe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Bank]:
    place = tmp_path_factory.mktemp("moe")
    with quiet():
        fresh(request.param).save_pretrained(place / "model")
    targets = ("q_proj", "gate_up_proj", "down_proj")
    return request.param, svdbank.build(place / "model", place / "bank", rank=8, side="both", targets=targets)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS).logits


def trained(model: Any) -> Any:
    """Two steps of Adam."""
    optimizer = torch.optim.Adam([p for p in model.train().parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        optimizer.zero_grad()
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
    return model


def same_files(one: Path, other: Path) -> bool:
    return {p.name: p.read_bytes() for p in one.iterdir()} == {p.name: p.read_bytes() for p in other.iterdir()}


def same_tensors(one: Path, other: Path) -> bool:
    ours, theirs = load_file(one / WEIGHTS), load_file(other / WEIGHTS)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_an_adapter_on_experts_goes_all_ways(moe: tuple[str, Bank], tmp_path: Path) -> None:
    kind, bank = moe
    report = svdbank.init(bank, output=tmp_path / "fresh", rank=4)
    assert report.weights == 2 * (1 + 2 * 3)
    settings = read_folder(tmp_path / "fresh").settings
    assert settings.target_parameters is not None and len(settings.target_parameters) == 4
    with without_svd():
        model = load_adapter(fresh(kind), tmp_path / "fresh", bank=bank)
    assert torch.equal(logits(model), logits(fresh(kind)))
    trained(model).save_pretrained(tmp_path / "law")  # by PEFT: svdbank.json is gone

    law = svdbank.read_adapter(tmp_path / "law", bank=bank)
    assert len(law.weights) == report.weights and all(weight.in_bank for weight in law.weights.values())
    assert {band for key in law.weights for band in law.bands(key)} == {(0, 4)}
    for key, weight in law.weights.items():
        name = key if weight.kind == "expert" else f"{key}.weight"
        assert torch.equal(weight.total().factors[1].flip(1), bank[name].left(4)), key
    # What is read is what PEFT adds to each expert, in the layout of a bank (out, in).
    layers = {name: module for name, module in model.get_base_model().named_modules() if hasattr(module, "get_delta_weight")}
    for name, layer in layers.items():
        delta = layer.get_delta_weight("default")
        path = name.replace(".base_layer", "")
        if not hasattr(layer, "parameter_name"):
            assert torch.allclose(law.delta(path), delta, atol=1e-6)  # one rounding of entries below 1
            continue
        for expert in range(3):
            values = delta[expert].mT if getattr(layer.get_base_layer(), "is_transposed", False) else delta[expert]
            assert torch.allclose(law.delta(f"{path}.{layer.parameter_name}.{expert}"), values, atol=1e-6)

    svdbank.export(tmp_path / "law", to="lora", output=tmp_path / "lora")
    assert same_tensors(tmp_path / "law", tmp_path / "lora")
    for source in ("fresh", "law", "lora"):
        slim = svdbank.export(tmp_path / source, to="slim", output=tmp_path / f"{source}.slim", bank=bank)
        assert slim.share < 0.75 and not slim.notes
        svdbank.export(tmp_path / f"{source}.slim", output=tmp_path / f"{source}.back", bank=bank)
        assert same_files(tmp_path / source, tmp_path / f"{source}.back")
        assert same_tensors(tmp_path / source, tmp_path / f"{source}.back")
    write_adapter(law, tmp_path / "written")
    again = svdbank.read_adapter(tmp_path / "written", bank=bank)
    assert all(torch.equal(again.delta(key), law.delta(key)) for key in law.weights)

    expected = logits(model)
    with without_svd():
        back = load_adapter(fresh(kind), tmp_path / "law.back", bank=bank)
        plain = peft.PeftModel.from_pretrained(fresh(kind), tmp_path / "lora")
        written = peft.PeftModel.from_pretrained(fresh(kind), tmp_path / "written")
    assert torch.equal(logits(back), expected) and torch.equal(logits(plain), expected)
    assert (logits(written) - expected).abs().max() <= 1e-5 * expected.abs().max()  # columns in another order


def test_milora_on_experts_is_exported_for_the_unchanged_base(moe: tuple[str, Bank], tmp_path: Path) -> None:
    kind, bank = moe
    svdbank.init(bank, output=tmp_path / "fresh", rank=4, method="milora")
    with without_svd():
        model = load_adapter(fresh(kind), tmp_path / "fresh", bank=bank)
    # W' is rounded once, and sums run in another order.
    assert (logits(model) - logits(fresh(kind))).abs().max() <= 1e-5 * logits(model).abs().max()
    trained(model).save_pretrained(tmp_path / "law")
    svdbank.export(tmp_path / "law", to="lora", output=tmp_path / "lora", bank=bank)
    assert {pair.A.shape[0] % 8 for pair in read_folder(tmp_path / "lora").factors.values()} == {0}
    plain = peft.PeftModel.from_pretrained(fresh(kind), tmp_path / "lora")
    # Twice the rank and the base as it was: other sums, after steps that made the factors some hundred times larger.
    assert (logits(plain) - logits(model)).abs().max() <= 1e-4 * logits(model).abs().max()
