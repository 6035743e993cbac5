"""A bank of a multimodal model serves its language model loaded alone, and a language model's bank the same weights in a multimodal one."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import svdbank
from svdbank.adapter.naming import Elsewhere, elsewhere
from svdbank.core.errors import BankError
from svdbank.peft import attachment, get_peft_model
from svdbank.peft.lookup import UnverifiedBaseWarning
from tests.architectures import plain, small

RANK, STORED = 2, 4
IN_THE_WHOLE = r".*language_model.*(q|k|v|o|gate|up|down)_proj"
ALONE = r".*(q|k|v|o|gate|up|down)_proj"

Pair = tuple[nn.Module, nn.Module, Path, Path]


@pytest.fixture(scope="module", params=["qwen2_vl", "llava", "gemma3"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A multimodal model and its language model alone, each as its folder gives it back, and banks of both."""
    from transformers import AutoModelForCausalLM

    root = tmp_path_factory.mktemp(request.param)
    whole: Any
    whole, lost = small.saved(small.small_model(request.param), root / "whole")
    text = whole.model.language_model
    if request.param == "qwen2_vl":  # has no causal class of its own
        alone: Any = copy.deepcopy(text)
    else:
        alone = AutoModelForCausalLM.from_config(copy.deepcopy(text.config))
        alone.model.load_state_dict(text.state_dict())
        alone.lm_head.weight.data = whole.lm_head.weight.data.clone()
    alone, more = small.saved(alone, root / "alone")
    assert not lost and not more
    for name in ("whole", "alone"):
        svdbank.build(root / name, root / f"{name}.bank", rank=STORED, device="cpu")
    return whole, alone, root / "whole.bank", root / "alone.bank"


def attached(model: nn.Module, bank: Path, targets: str) -> Any:
    config = LoraConfig(r=RANK, init_lora_weights="mica", target_modules=targets)
    return get_peft_model(copy.deepcopy(model), config, bank=bank)


def layers_of(model: nn.Module) -> int:
    return sum(path.rpartition(".")[2].endswith("_proj") and ".layers." in f".{path}" for path, _ in model.named_modules())


def assert_right(adapted: Any, count: int) -> None:
    found = list(plain.matrices(adapted))
    assert len(found) == count
    for matrix in found:
        distance, most = plain.minor_distance(matrix)
        assert distance <= most, matrix.path
    assert attachment(adapted).state == "verified"


def test_the_whole_serves_the_part(pair: Pair) -> None:
    _, alone, bank, _ = pair
    assert_right(attached(alone, bank, ALONE), layers_of(alone))


def test_the_part_serves_the_whole(pair: Pair) -> None:
    whole, alone, _, bank = pair
    assert_right(attached(whole, bank, IN_THE_WHOLE), layers_of(alone))


def test_other_values_under_other_paths_are_no_basis(pair: Pair) -> None:
    _, alone, bank, _ = pair
    other: Any = copy.deepcopy(alone)
    for parameter in other.parameters():
        parameter.data = parameter.data + 0.01
    with pytest.raises(BankError, match=r"holds no basis for .*layers"):
        attached(other, bank, ALONE)


def test_names_alone_do_where_nothing_can_be_read_and_one_is_part_of_the_other(pair: Pair) -> None:
    _, alone, bank, _ = pair
    with pytest.warns(UnverifiedBaseWarning):
        adapted = attached(copy.deepcopy(alone).to("meta"), bank, ALONE)
    assert all("language_model.layers." in name for name in attachment(adapted).weights)


def test_an_encoder_is_no_part_of_a_decoder() -> None:
    held = ["model.encoder.layers.0.fc1", "model.text.layers.0.fc1", "lm_head"]
    found = elsewhere(["model.decoder.layers.0.fc1", "layers.0.fc1", "fc1", "language_model.lm_head"], held)
    assert found["model.decoder.layers.0.fc1"] == [
        Elsewhere(held[0], "model.decoder", "model.encoder"),
        Elsewhere(held[1], "model.decoder", "model.text"),
    ]
    assert not any(place.is_part for place in found["model.decoder.layers.0.fc1"])
    assert [place.theirs for place in found["layers.0.fc1"]] == ["model.encoder", "model.text"]  # two: values have to say which
    assert all(place.is_part for place in found["layers.0.fc1"]) and found["fc1"] == []
    assert found["language_model.lm_head"] == [Elsewhere("lm_head", "language_model", "")]
    assert Elsewhere("", "model.language_model", "model").is_part and Elsewhere("", "model", "model.language_model").is_part


def test_values_say_which_of_two(tmp_path: Path) -> None:
    """Two towers of one shape in the bank, and a model that is the second of them."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    values = {
        f"model.{side}.layers.{i}.fc": torch.randn(8, 6, generator=generator) for side in ("one", "two") for i in range(2)
    }
    save_file({f"{name}.weight": value for name, value in values.items()}, tmp_path / "model.safetensors")
    bank = svdbank.build(tmp_path / "model.safetensors", tmp_path / "bank", rank=4, device="cpu")

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.ModuleDict({"fc": nn.Linear(6, 8, bias=False)}) for _ in range(2))
            for i, layer in enumerate(self.layers):
                layer["fc"].weight.data = values[f"model.two.layers.{i}.fc"].clone()  # type: ignore[index]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    adapted = attached(Part(), bank.path, ".*fc")
    assert attachment(adapted).weights == tuple(f"model.two.layers.{i}.fc.weight" for i in range(2))
