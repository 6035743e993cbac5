"""Eight adapters of a small real model, trained on legal text, of other ranks, scales, bands, targets and programs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdbank
from svdbank.adapter.folder import read_folder
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.lm.packaged import licence_texts
from svdbank.lm.windows import token_windows
from svdbank.peft import load_adapter
from tests.peft.models import lora_layers, quiet, train


@pytest.fixture(autouse=True)
def _surroundings(single_thread: None, own_texts_cache: None) -> None:
    """The matrices are small."""


#: What ``svdbank init`` is asked for; ``plain`` is PEFT's own LoRA.
KINDS: dict[str, dict[str, Any]] = {
    "law": {"rank": 8, "band": (0, 8)},
    "code": {"rank": 8, "band": (0, 8), "alpha": 4},
    "med": {"rank": 8, "band": (8, 16), "rslora": True},
    "news": {"rank": 4, "band": (4, 8), "alpha": 12},
    "chat": {"rank": 16, "band": (0, 16)},
    "verse": {"rank": 8, "band": (16, 24), "targets": ["q_proj", "v_proj"]},
    "milo": {"rank": 4, "method": "milora"},
    "plain": {},
}


def base(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="session")
def windows(small: Path) -> Tensor:
    from transformers import AutoTokenizer

    return token_windows(licence_texts()[:60], AutoTokenizer.from_pretrained(small), count=16, length=32)


@pytest.fixture(scope="session")
def trained(small: Path, small_bank: Bank, windows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two steps each on other windows. Read only."""
    root = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    for number, (name, kind) in enumerate(KINDS.items()):
        own = windows[2 * number : 2 * number + 2]
        if name == "plain":
            model = peft.get_peft_model(base(small), peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
            train(model, own, steps=2, rate=1e-2)
            model.save_pretrained(root / name)
            continue
        svdbank.init(small_bank, output=root / name, base_model=str(small), task_type="CAUSAL_LM", **kind)
        model = load_adapter(base(small), root / name, bank=small_bank)
        train(model, own, steps=2, rate=1e-2)
        tensors = load_file(root / name / WEIGHTS)
        for module, layer in lora_layers(model).items():
            for factor, weight in (("A", layer.lora_A), ("B", layer.lora_B)):
                tensors[f"base_model.model.{module}.lora_{factor}.weight"] = weight["default"].weight.detach().clone()
        save_file(tensors, root / name / WEIGHTS, metadata={"format": "pt"})
    return {name: root / name for name in KINDS}


def dense(folder: Path) -> dict[str, Tensor]:
    """``s B A`` of each module in float64, from the A and B of the file and the α and r of the config."""
    read = read_folder(folder)
    return {module: read.scale(module) * (pair.B.double() @ pair.A.double()) for module, pair in read.factors.items()}


def dense_sum(folders: list[Path], weights: list[float]) -> dict[str, Tensor]:
    total: dict[str, Tensor] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in dense(folder).items():
            total[module] = total.get(module, 0) + weight * delta
    return total


def relative_error(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest of any weight, Frobenius."""
    assert found.keys() == wanted.keys()
    return max(float((found[key] - wanted[key]).norm() / wanted[key].norm()) for key in wanted)


@pytest.fixture
def logits(small: Path, windows: Tensor) -> Any:
    """What the small model says with a folder that PEFT itself loads, and knows nothing of svdbank."""

    def of(folder: Path) -> Tensor:
        bare = folder.with_name(f"{folder.name}-as-peft-sees-it")
        bare.mkdir()
        for name in ("adapter_config.json", WEIGHTS):
            shutil.copy(folder / name, bare)
        model = peft.PeftModel.from_pretrained(base(small), bare).eval()
        with torch.inference_mode():
            found: Tensor = model(input_ids=windows[:2]).logits
        return found

    return of
