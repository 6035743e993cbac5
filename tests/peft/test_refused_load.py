"""A refused ``load_adapter`` leaves the model as it was: its modules, its values, what trains, and other adapters on it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import svdbank
from svdbank.core.errors import SvdbankError
from svdbank.peft import load_adapter
from tests.adapter.every import TOKENS, off, small_gpt2
from tests.adapter.settings import Case, logits, save, small_llama, wrapped


def _other_modules(folder: Path) -> None:
    _rewrite(folder, lambda tensors: {key.replace("layers.1", "layers.7"): value for key, value in tensors.items()})


def _other_shapes(folder: Path) -> None:
    """The last of the tensors, so that PEFT has put the others in by then."""
    _rewrite(
        folder,
        lambda tensors: {
            key: value[..., :5] if "1.self_attn.v_proj.lora_A" in key else value for key, value in tensors.items()
        },
    )


def _lacking(folder: Path) -> None:
    _rewrite(folder, lambda tensors: {key: value for key, value in tensors.items() if "layers.1" not in key})


def _whole_of_another_shape(folder: Path) -> None:
    _rewrite(folder, lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.zeros(7, 48)})
    _set(folder, modules_to_save=["lm_head"])


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(path)).items()}, path)


def _set(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


REFUSED = {
    "other modules": _other_modules,
    "other shapes": _other_shapes,
    "modules without factors": _lacking,
    "a whole tensor of another shape": _whole_of_another_shape,
}


def state(model: nn.Module) -> dict[str, Any]:
    """What may not change: modules by path and identity, parameters with their bits and flags, notes of PEFT."""
    return {
        "modules": [(path, id(module), module.training) for path, module in model.named_modules()],
        "parameters": [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()],
        "notes": sorted(name for name in vars(model) if name != "_modules"),
        "adapters": sorted(getattr(model, "peft_config", {}) or {}),
        "active": getattr(model, "active_adapters", None) if hasattr(model, "peft_config") else None,
    }


def assert_as_it_was(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    for key in ("modules", "notes", "adapters", "active"):
        assert after[key] == before[key], key
    assert len(after["parameters"]) == len(before["parameters"])
    for (*one, old), (*other, new) in zip(before["parameters"], after["parameters"], strict=True):
        assert one == other and torch.equal(old, new), one[0]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(Case(), wrapped(Case(), small_llama(), 1, {}), tmp_path / "adapter")


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_adapter_leaves_a_bare_model_as_it_was(kind: str, trainable: bool, folder: Path) -> None:
    model = small_llama().train()
    before, plain = state(model), logits(model.eval(), TOKENS)
    model.train()
    REFUSED[kind](folder)
    with pytest.raises(SvdbankError):
        load_adapter(model, folder, is_trainable=trainable)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model.eval(), TOKENS), plain)


@pytest.mark.parametrize("name", ["default", "another"])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_adapter_leaves_those_that_are_there(kind: str, name: str, folder: Path, tmp_path: Path) -> None:
    good = save(
        Case({"modules_to_save": ["norm"]}),
        wrapped(Case({"modules_to_save": ["norm"]}), small_llama(), 2, {}),
        tmp_path / "good",
    )
    model = load_adapter(small_llama(), good)
    before, plain = state(model), logits(model, TOKENS)
    REFUSED[kind](folder)
    with pytest.raises(SvdbankError):
        load_adapter(model, folder, adapter_name=name)
    assert_as_it_was(model, before)
    assert torch.equal(logits(model, TOKENS), plain)


def test_after_a_refusal_a_right_adapter_loads(folder: Path, tmp_path: Path) -> None:
    model = small_llama()
    other = save(
        Case({}, model="gpt2"),
        wrapped(Case({"target_modules": ["c_attn"], "fan_in_fan_out": True}, model="gpt2"), small_gpt2(), 1, {}),
        tmp_path / "other",
    )
    with pytest.raises(SvdbankError):
        load_adapter(model, other)
    expected = logits(wrapped(Case(), small_llama(), 1, {}), TOKENS)
    assert off(logits(load_adapter(model, folder, is_trainable=False).eval(), TOKENS), expected) < 1e-6


def test_a_mica_folder_of_another_bank_leaves_the_model_as_it_was(folder: Path, tmp_path: Path) -> None:
    small_llama(seed=3).save_pretrained(tmp_path / "other")
    bank = svdbank.build(tmp_path / "other", tmp_path / "bank", rank=8)
    svdbank.init(bank, output=tmp_path / "mica", rank=4, targets=["q_proj"])
    model = small_llama()
    before = state(model)
    with pytest.raises(SvdbankError):
        load_adapter(model, tmp_path / "mica", bank=bank)
    assert_as_it_was(model, before)
