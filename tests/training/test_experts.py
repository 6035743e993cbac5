"""``train`` on a model with experts fused into one parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from tests.lm.models import VOCABULARY, cut_tokenizer
from tests.peft.models import quiet


@pytest.fixture(scope="module")
def moe(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Mixtral with SmolLM2's first tokens."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder = tmp_path_factory.mktemp("moe") / "model"
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        max_position_embeddings=64,
    )
    with quiet():
        MixtralForCausalLM(config).save_pretrained(folder)
    cut_tokenizer(smollm2, folder)
    return folder


@pytest.fixture(scope="module")
def moe_bank(moe: Path) -> Bank:
    return svdbank.build(moe, rank=8, device="cpu")


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("method", ["mica", "milora"])
def test_experts_train(method: str, moe: Path, moe_bank: Bank, legal: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rank": 4,
        "length": 32,
        "batch_size": 2,
        "steps": 8,
        "log_steps": 1,
        "held_out": 0.5,
        "held_out_blocks": 64,
        "dropout": 0.0,
        "dtype": "float32",  # a GPU would choose bfloat16
    }
    report = svdbank.train(moe, output=tmp_path / "law", data=str(legal), method=method, learning_rate=2e-2, **options)
    # Weights are random and documents ten: no more is asked than that it falls, by a thousand times what another order of sums makes.
    assert report.held_out is not None and report.held_out.change < -1e-3 and report.kept == "best"
    law = svdbank.read_adapter(tmp_path / "law", bank=moe_bank)
    experts = {key: weight for key, weight in law.weights.items() if weight.kind == "expert"}
    assert len(experts) == 2 * 2 * 3 and len(law.weights) == len(experts) + 2 * 4
    if method == "mica":
        assert all(weight.in_bank and weight.total().factors[0].any() for weight in law.weights.values())
        for key, weight in experts.items():
            assert torch.equal(weight.total().factors[1].flip(1), moe_bank[key].left(4)), key
    assert not any("mlp.gate" in key and weight.kind == "linear" for key, weight in law.weights.items())  # the router
    # Written for the unchanged base: measured there by the ordinary way, it is what training measured at its end.
    scores = svdbank.eval(moe, data=[str(legal)], adapters={"law": tmp_path / "law"}, length=32, tokens=512).scores
    assert scores[1].loss < scores[0].loss


@pytest.mark.usefixtures("device")
def test_a_rate_is_looked_for_along_experts_and_looking_for_it_changes_nothing(
    moe: Path, moe_bank: Bank, legal: Path, tmp_path: Path, device: str
) -> None:
    options: dict[str, Any] = {"data": str(legal), "rank": 4, "length": 32, "batch_size": 2, "steps": 2, "held_out": 0}
    options |= {"dropout": 0.0, "dtype": "float32", "targets": ["mlp.experts.down_proj"]}
    found = svdbank.train(moe, output=tmp_path / "found", **options)
    svdbank.train(moe, output=tmp_path / "given", learning_rate=found.learning_rate, **options)
    assert found.calibration is not None
    assert all(change for _, change in found.calibration.curve)
    # Random weights: no rate raises their loss so far, which is said.
    assert found.calibration.limit is None and "--learning-rate" in found.calibration.why
    if device == "cpu":  # sums of a GPU may come in any order
        one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("found", "given"))
        assert one.read_bytes() == other.read_bytes()


def test_dropout_on_experts_is_an_error_before_the_work(moe: Path, moe_bank: Bank, legal: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="dropout") as caught:
        svdbank.train(moe, output=tmp_path / "law", data=str(legal), rank=4, length=32, steps=1, held_out=0.2)
    assert "--dropout 0" in str(caught.value.hint)
    report = svdbank.train(
        moe, output=tmp_path / "law", data=str(legal), rank=4, length=32, steps=1, held_out=0.2, targets=["q_proj"], force=True
    )
    assert report.trainable_parameters == 2 * 4 * 24


def test_an_adapter_on_other_experts_beneath_is_refused_before_the_work_and_the_hint_is_a_way(
    moe: Path, moe_bank: Bank, legal: Path, tmp_path: Path
) -> None:
    svdbank.init(moe_bank, output=tmp_path / "beneath", rank=2, targets=["experts.down_proj", "q_proj"])
    options: dict[str, Any] = {"data": str(legal), "rank": 2, "length": 32, "steps": 1, "held_out": 0.0, "dropout": 0.0}
    options |= {"dtype": "float32", "on_top_of": str(tmp_path / "beneath")}
    with pytest.raises(OptionError, match=r"gate_up_proj is in one of them alone") as caught:
        svdbank.train(moe, output=tmp_path / "law", **options)
    assert caught.value.hint == "--targets mlp.experts.down_proj"
    svdbank.train(moe, output=tmp_path / "law", targets=["mlp.experts.down_proj"], **options)
