"""What classes say of matrices that names and shapes would take for something else, and of tensors that are shared or nowhere."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import svdbank
from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.checkpoint.naming.matrices import matrices
from tests.architectures import plain, small

RANK = 2


def made(model_type: str, folder: Path) -> tuple[nn.Module, str]:
    """A small model whose vocabulary is as large as the merger is wide, loaded from its folder, and the merger's matrix."""
    model = small.small_model(model_type)
    module, width = next(
        (path, linear.out_features)
        for path, linear in model.named_modules()
        if isinstance(linear, nn.Linear) and path.endswith("merger.linear_fc1") and "deepstack" not in path
    )
    anything, generator = model, torch.Generator().manual_seed(3)
    anything.resize_token_embeddings(width, mean_resizing=False)
    small.fill(model, 3)
    for parameter in model.parameters():
        if parameter.shape[:1] == (width,):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    loaded, lost = small.saved(model, folder)
    assert not lost and loaded.config.get_text_config().vocab_size == width
    return loaded, module


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5"])
def test_a_merger_as_wide_as_the_vocabulary_is_linear_and_fused(model_type: str, tmp_path: Path) -> None:
    base, module = made(model_type, tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        specs, _ = decomposable(checkpoint)
        spec = next(spec for spec in specs if spec.module == module)
        assert spec.kind == "linear" and (spec.out_features, spec.in_features) == base.get_submodule(module).weight.shape

    adapted, generator = plain.attached(base, RANK, lora_alpha=2 * RANK), torch.Generator().manual_seed(1)
    for name, value in adapted.named_parameters():
        if ".lora_" in name:
            value.data = torch.randn(value.shape, generator=generator) * 0.1
    adapted.save_pretrained(str(tmp_path / "lora"))
    assert module in {matrix.path for matrix in plain.matrices(adapted)}
    merged = dict(adapted.merge_and_unload().named_parameters())
    svdbank.fuse(tmp_path / "model", tmp_path / "lora", tmp_path / "fused")
    fused = dict(type(base).from_pretrained(tmp_path / "fused").named_parameters())
    assert merged.keys() == fused.keys()
    for name, values in merged.items():
        assert float((fused[name] - values).norm()) <= 1e-5 * float(values.norm()), name


def test_tensors_that_the_class_does_not_have_are_left_out_with_that_reason(tmp_path: Path) -> None:
    """Transformers writes shieldgemma2's language model under names that it does not read again."""
    _, lost = small.saved(small.small_model("shieldgemma2"), tmp_path / "model")
    assert lost
    with open_checkpoint(tmp_path / "model") as checkpoint:
        specs, skips = decomposable(checkpoint)
        assert specs and {skip.reason for skip in skips if "language_model.model." in skip.name} == {
            "no parameter of Gemma3ForConditionalGeneration"
        }


def test_a_linear_module_that_shares_another_ones_tensor_has_its_own_basis(tmp_path: Path) -> None:
    base, _ = small.saved(small.small_model("zamba"), tmp_path / "model")
    with open_checkpoint(tmp_path / "model") as checkpoint:
        specs = {spec.module: spec for spec in decomposable(checkpoint)[0]}
        wanted = {path for path, module in base.named_modules() if isinstance(module, nn.Linear) and path != "lm_head"}
        assert wanted <= specs.keys()
        for path in wanted:
            assert torch.equal(checkpoint.read(specs[path]), base.get_submodule(path).weight), path


@pytest.mark.parametrize("blocks", ["one of them", "each"])
def test_a_change_of_a_linear_module_that_shares_its_tensor_is_not_fused(blocks: str, tmp_path: Path) -> None:
    """PEFT's own merge would change the others too. What is on no shared tensor is fused."""
    from peft import LoraConfig, get_peft_model

    base, _ = small.saved(small.small_model("zamba"), tmp_path / "model")
    shared = r".*shared_transf.*\.down_proj" if blocks == "each" else r".*layers\.2\.shared_transf.*\.down_proj"
    for name, targets in (("shared", shared), ("own", r".*mamba.*\.(in|out)_proj")):
        adapted: Any = get_peft_model(copy.deepcopy(base), LoraConfig(r=RANK, target_modules=targets))
        for parameter, value in adapted.named_parameters():
            if ".lora_" in parameter:
                value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) * 0.1
        adapted.save_pretrained(str(tmp_path / name))
    with pytest.raises(svdbank.OptionError, match=r"layers\.2\.shared_transf.* are one tensor") as caught:
        svdbank.fuse(tmp_path / "model", tmp_path / "shared", tmp_path / "fused")
    assert "--untie" not in str(caught.value.hint) and "PEFT" in str(caught.value.hint)
    with pytest.raises(svdbank.OptionError, match=r"are one tensor"):
        svdbank.fuse(tmp_path / "model", tmp_path / "shared", tmp_path / "fused", untie=True)

    svdbank.fuse(tmp_path / "model", tmp_path / "own", tmp_path / "fused")
    merged, fused = adapted.merge_and_unload(), type(base).from_pretrained(tmp_path / "fused")
    for (name, values), own in zip(merged.named_parameters(), fused.parameters(), strict=True):
        assert float((own - values).norm()) <= 1e-6 * float(values.norm()), name


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of a type that the table does not have, and of a multimodal one."""
    folders = {name: tmp_path_factory.mktemp(name) / "model" for name in ("minimax_m2", "qwen3_5_moe")}
    for name, folder in folders.items():
        small.small_model(name).save_pretrained(folder)
    return folders


def modules_with(folder: Path, config: dict[str, Any], into: Path) -> tuple[set[str], str]:
    """What is decomposed of the model's weights beside a configuration with other values, and who knew."""
    into.mkdir()
    shutil.copy(folder / "model.safetensors", into)
    written = json.loads((folder / "config.json").read_text()) | config
    (into / "config.json").write_text(json.dumps({key: value for key, value in written.items() if value is not None}))
    with open_checkpoint(into) as checkpoint:
        specs, _ = decomposable(checkpoint)
        return {spec.name for spec in specs}, matrices(checkpoint).decided


@pytest.mark.parametrize("name", ["minimax_m2", "qwen3_5_moe"])
@pytest.mark.parametrize(
    "config",
    [
        {"architectures": None},
        {"architectures": ["TheirsForCausalLM"], "auto_map": {"AutoModelForCausalLM": "x.TheirsForCausalLM"}},
    ],
)
def test_a_known_type_without_a_known_class_is_the_one_with_a_head(
    name: str, config: dict[str, Any], two: dict[str, Path], tmp_path: Path
) -> None:
    usual, decided = modules_with(two[name], {}, tmp_path / "usual")
    found, by = modules_with(two[name], config, tmp_path / "other")
    assert found == usual and by == decided and "Transformers" in by


def test_where_the_class_has_none_of_the_tensors_the_error_says_so(two: dict[str, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "model").mkdir()
    tensors = {f"other.{name}": value for name, value in load_file(two["minimax_m2"] / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text((two["minimax_m2"] / "config.json").read_text())
    with pytest.raises(svdbank.OptionError, match=r"no matrices at all; of \d+ others, no parameter of MiniMaxM2ForCausalLM"):
        svdbank.plan(tmp_path / "model")
