"""Adapter folders come from strangers: what is read is checked, and PEFT's own are understood."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.folder import AdapterFolder, read_folder
from svdbank.adapter.settings import CACHE, CONFIG, WEIGHTS
from svdbank.core.errors import CheckpointError
from tests.peft.models import factors, lora_layers, mica, quiet


@pytest.fixture
def saved(minilm: Path, tmp_path: Path) -> tuple[torch.nn.Module, Path]:
    """A LoRA that PEFT made and saved, with ranks and alphas by pattern."""
    from transformers import AutoModel

    with quiet():
        base = AutoModel.from_pretrained(minilm)
    config = mica(
        4,
        init_lora_weights=True,
        target_modules=["query", "value", "word_embeddings"],
        lora_alpha=6,
        use_rslora=True,
        rank_pattern={"value": 2, "layer.1.attention.self.query": 3},
        alpha_pattern={"layer.0.attention.self.value": 9},
    )
    model = peft.get_peft_model(base, config)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=True)
    return model, tmp_path / "saved"


def test_factors_and_scales_are_peft_s(saved: tuple[torch.nn.Module, Path]) -> None:
    model, folder = saved
    read = read_folder(folder)
    assert isinstance(read, AdapterFolder) and read.cache is None
    layers = lora_layers(model)
    assert set(read.factors) == set(layers)
    for module, layer in layers.items():
        A, B = factors(layer)
        assert torch.equal(read.factors[module].A, A) and torch.equal(read.factors[module].B, B)
        assert read.factors[module].embedding == ("embeddings" in module)
        assert read.scale(module) == pytest.approx(layer.scaling["default"], rel=1e-12)


def test_a_folder_that_is_no_adapter_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no adapter here") as caught:
        read_folder(tmp_path)
    assert "svdbank init" in str(caught.value.hint)


@pytest.mark.parametrize("read", ["read_adapter", "fuse", "export", "slim"])
def test_a_mistyped_adapter_is_said_to_be_missing_and_the_one_beside_it_is_named(
    read: str, saved: tuple[torch.nn.Module, Path], minilm: Path, tmp_path: Path
) -> None:
    """Only a near name of a folder that holds an adapter is; for others it is said how to make one."""
    root = saved[1].parent
    (root / "lwa-notes").mkdir()
    saved[1].rename(root / "law")

    def attempt(folder: Path) -> str:
        with pytest.raises(CheckpointError, match="no such folder") as caught:
            if read == "fuse":
                svdbank.fuse(minilm, folder, tmp_path / "out")
            elif read == "read_adapter":
                svdbank.read_adapter(folder)
            else:
                svdbank.export(folder, to="lora" if read == "export" else "slim", output=tmp_path / "out")
        return str(caught.value.hint)

    assert attempt(root / "lwa") == f"did you mean {root / 'law'}?"
    assert "svdbank init" in attempt(root / "medicine") and "svdbank init" in attempt(root / "none" / "law")


def test_pickled_weights_are_refused(saved: tuple[torch.nn.Module, Path]) -> None:
    folder = saved[1]
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="pickle"):
        read_folder(folder)


@pytest.mark.parametrize("damage", ["nan", "inf", "rank", "half", "cut", "empty", "one-dimensional"])
def test_tensors_that_cannot_be_meant_are_refused(damage: str, saved: tuple[torch.nn.Module, Path]) -> None:
    path = saved[1] / WEIGHTS
    tensors = load_file(path)
    key = next(key for key in tensors if "query.lora_A" in key)
    if damage in ("nan", "inf"):
        tensors[key][0, 0] = float(damage)
    elif damage == "rank":
        tensors[key] = tensors[key][:1].clone()
    elif damage == "half":
        del tensors[key]
    elif damage == "one-dimensional":
        tensors[key] = tensors[key].flatten()
    elif damage == "empty":
        tensors = {"unrelated": torch.zeros(1)}
    save_file(tensors, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError):
        read_folder(saved[1])


@pytest.mark.parametrize(
    "config",
    ["[]", "{", '{"peft_type": "IA3", "r": 4, "lora_alpha": 4}', '{"peft_type": "LORA"}', '{"r": "4", "lora_alpha": 1}'],
)
def test_configs_that_do_not_fit_are_refused(config: str, saved: tuple[torch.nn.Module, Path]) -> None:
    (saved[1] / CONFIG).write_text(config)
    with pytest.raises(CheckpointError, match=CONFIG):
        read_folder(saved[1])


def test_fields_of_a_config_that_we_do_not_know_are_not_used(saved: tuple[torch.nn.Module, Path]) -> None:
    config = json.loads((saved[1] / CONFIG).read_text())
    config["auto_mapping"] = {"base_model_class": "os.system"}
    (saved[1] / CONFIG).write_text(json.dumps(config))
    assert not hasattr(read_folder(saved[1]).settings, "auto_mapping")


def test_a_cache_file_that_lies_about_its_form_is_refused(saved: tuple[torch.nn.Module, Path]) -> None:
    (saved[1] / CACHE).write_text('{"format": 2}')
    with pytest.raises(CheckpointError, match=CACHE):
        read_folder(saved[1])
