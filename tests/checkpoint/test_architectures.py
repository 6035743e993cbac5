"""What the table says of each architecture is what transformers does: every matrix of the loaded model, to the bit, or a stated skip."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.checkpoint.configuration import facts
from svdbank.checkpoint.naming.architectures import ARCHITECTURES
from svdbank.checkpoint.naming.correspondence import correspondence
from svdbank.checkpoint.naming.matrices import by_table, by_tree
from svdbank.checkpoint.naming.tree import ModuleTree
from svdbank.core.errors import OptionError
from svdbank.core.specs import WeightSpec
from tests.checkpoint.attacks import tensors_file
from tests.checkpoint.every_architecture import model_of
from tests.checkpoint.small_models import STACKED_IN_OUT, WITH_EXPERTS, configurations
from tests.peft.models import quiet

EVERYTHING = (".*",)


def matrices(model: nn.Module, *, experts_in_out: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every (out, in) matrix that a linear or embedding module or an expert of the model has, by the name a bank gives it."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield f"{path}.weight", module.weight.detach()
        elif isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D":
            yield f"{path}.weight", module.weight.detach().mT
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and path.endswith(".experts"):
                for expert, matrix in enumerate(parameter.detach()):
                    yield f"{path}.{name}.{expert}", matrix.mT if experts_in_out else matrix


def loaded_again(name: str, folder: Path) -> nn.Module:
    """The model as transformers loads it from the folder; nothing may be missing or left over."""
    kind, _ = configurations()[name]
    with quiet():
        model, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"], report
    return model


def assert_same(model: nn.Module, folder: Path, *, experts_in_out: bool = False) -> list[WeightSpec]:
    """Specs and modules are the same set with the same values, and what else has two dimensions is skipped with a reason."""
    with open_checkpoint(folder) as checkpoint:
        specs, skips = decomposable(checkpoint, EVERYTHING)
        byname = {spec.name: spec for spec in specs}
        assert len(byname) == len(specs)
        wanted = dict(matrices(model, experts_in_out=experts_in_out))
        once: dict[int, str] = {}  # a tied matrix stands under one name at least
        for name, matrix in wanted.items():
            if name in byname:
                once[matrix.data_ptr()] = name
        for name, matrix in wanted.items():
            assert name in byname or matrix.data_ptr() in once, f"{name} is silently missing"
            if name in byname:
                assert torch.equal(checkpoint.read(byname[name]), matrix), name
                assert byname[name].stacked == (
                    byname[name].module.endswith(("gate_up_proj", "down_proj")) and ".experts." in name
                )
        names = correspondence(checkpoint.tensors, facts(checkpoint.config)).names
        skipped = {names[skip.name]: skip.reason for skip in skips}
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and name not in wanted and f"{name}.0" not in wanted:
                assert skipped.get(name) or name in byname, f"{name} is neither decomposed nor skipped"
        # What is decomposed and is no linear module is a router: a bare parameter of transformers 5.
        routers = byname.keys() - wanted.keys()
        assert all(re.search(r"\.(gate|router)\.weight$", name) for name in routers), routers
        return specs


@pytest.mark.parametrize("name", sorted(configurations()))
def test_every_matrix_of_the_loaded_model_is_in_the_plan_with_its_values(models: dict[str, Path], name: str) -> None:
    assert_same(loaded_again(name, models[name]), models[name], experts_in_out=name in STACKED_IN_OUT)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_all_linear_takes_every_expert_in_order_and_the_routers(models: dict[str, Path], name: str) -> None:
    with open_checkpoint(models[name]) as checkpoint:
        specs, _ = decomposable(checkpoint)
        experts: dict[str, list[WeightSpec]] = {}
        for spec in specs:
            if spec.name != f"{spec.module}.weight":
                experts.setdefault(spec.module, []).append(spec)
        assert {path.rpartition(".")[2] for path in experts} == {"gate_up_proj", "down_proj"}
        for path, members in experts.items():
            assert [spec.expert for spec in members] == [0, 1, 2, 3]
            assert [spec.name for spec in members] == [f"{path}.{e}" for e in range(4)]
            assert len({spec.family for spec in members}) == 1 and members[0].layer is not None
        only = decomposable(checkpoint, ["experts.down_proj"])[0]
        assert {spec.module for spec in only} == {path for path in experts if path.endswith(".experts.down_proj")}
        assert any(re.search(r"\.(gate|router)$", spec.module) for spec in specs)


def test_an_expert_fused_from_two_tensors_is_hashed_in_their_order_and_read_into_one_buffer(models: dict[str, Path]) -> None:
    import hashlib

    with open_checkpoint(models["mixtral"]) as checkpoint:
        spec = next(spec for spec in decomposable(checkpoint, ["gate_up_proj"])[0] if spec.expert == 2)
        assert spec.operation == "concat"
        assert [source.name.rpartition("experts.")[2] for source in spec.sources] == ["2.w1.weight", "2.w3.weight"]
        matrix, digest = checkpoint.read_hashed(spec)
        stored = load_file(models["mixtral"] / "model.safetensors")
        parts = [stored[source.name] for source in spec.sources]
        assert torch.equal(matrix, torch.cat(parts)) and matrix.is_contiguous()
        assert digest == hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def renamed(folder: Path, target: Path, rename: dict[str, str]) -> Path:
    """The same checkpoint with other tensor names, as older or newer tools write them."""
    target.mkdir()
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        for pattern, replacement in rename.items():
            name = re.sub(pattern, replacement, name)
        tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    (target / "config.json").write_bytes((folder / "config.json").read_bytes())
    return target


#: How checkpoints on the Hub are laid out where ``save_pretrained`` of today writes another layout.
LAYOUTS = {
    "gpt2": {r"^transformer\.": ""},
    "llava": {r"^vision_tower\.": "vision_tower.vision_model."},
    "llava-of-experts": {
        r"^language_model\.lm_head": "lm_head",
        r"^language_model\.model\.": "model.language_model.",
        r"^(vision_tower|multi_modal_projector)\.": r"model.\1.",
    },
    "gemma3-vision": {
        r"^language_model\.model\.": "model.language_model.",
        r"^(vision_tower|multi_modal_projector)\.": r"model.\1.",
    },
    "siglip": {r"^": "vision_model."},
    "llama-untied": {r"^model\.": ""},
    "vit": {r"^vit\.": ""},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_layouts_of_the_same_checkpoint_give_the_same_names_and_values(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    folder = renamed(models[name], tmp_path / "renamed", LAYOUTS[name])
    with open_checkpoint(folder) as other, open_checkpoint(models[name]) as own:
        assert set(other.tensors) != set(own.tensors)
        assert [spec.name for spec in decomposable(other)[0]] == [spec.name for spec in decomposable(own)[0]]
    assert_same(loaded_again(name, folder), folder)


def test_a_part_of_a_fused_expert_that_is_not_here_is_said(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    expert = "model.layers.0.block_sparse_moe.experts.{}.{}.weight"
    tensors = {expert.format(e, part): torch.ones(4, 2) for e in range(3) for part in ("w1", "w3") if (e, part) != (1, "w3")}
    tensors |= {expert.format(e, "w2"): torch.ones(2, 4) for e in range(3)}
    with open_checkpoint(tensors_file(tmp_path / "model.safetensors", tensors)) as checkpoint:
        specs, skips = decomposable(checkpoint)
        assert {spec.module for spec in specs} == {"model.layers.0.mlp.experts.down_proj"}
        assert len(skips) == 5 and all("w3 of expert 1 is not here" in skip.reason for skip in skips)
        with pytest.raises(OptionError, match=r"gate_up_proj, which cannot be decomposed: .*w3 of expert 1"):
            decomposable(checkpoint, ["gate_up_proj"])


def test_experts_that_do_not_stack_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe"}')
    expert = "model.layers.0.mlp.experts.{}.{}.weight"
    tensors = {expert.format(e, "down_proj"): torch.ones(2 + e, 4) for e in range(2)}
    tensors |= {
        expert.format(e, p): torch.ones(4, 2 if p == "up_proj" else 3) for e in range(2) for p in ("gate_proj", "up_proj")
    }
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.ones(4, 2)
    with open_checkpoint(tensors_file(tmp_path / "model.safetensors", tensors)) as checkpoint:
        specs, skips = decomposable(checkpoint)
    assert [spec.name for spec in specs] == ["model.layers.0.mlp.up_proj.weight"]
    assert {re.sub(r".*, and ", "", skip.reason) for skip in skips} == {
        "its experts differ in shape or dtype",
        "gate_proj and up_proj differ in columns or dtype",
    }


def test_two_tensors_that_are_loaded_under_one_name_are_not_decomposed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"]}')
    tensors = {name: torch.ones(3, 2) for name in ("embed_out.weight", "lm_head.weight", "gpt_neox.layers.0.mlp.dense.weight")}
    with open_checkpoint(tensors_file(tmp_path / "model.safetensors", tensors)) as checkpoint:
        specs, skips = decomposable(checkpoint, EVERYTHING)
    assert [spec.module for spec in specs] == ["gpt_neox.layers.0.mlp.dense"]
    assert all("loaded as lm_head.weight, and so is" in skip.reason for skip in skips) and len(skips) == 2


def test_stacked_experts_of_an_architecture_outside_the_table_are_an_error_when_asked_for(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "new_moe"}')
    tensors = {"model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 6, 2), "model.layers.0.q_proj.weight": torch.ones(4, 2)}
    with open_checkpoint(tensors_file(tmp_path / "model.safetensors", tensors)) as checkpoint:
        specs, skips = decomposable(checkpoint)
        assert [spec.name for spec in specs] == ["model.layers.0.q_proj.weight"]  # names agree one to one
        assert "stacked experts" in skips[0].reason and "'new_moe'" in skips[0].reason
        with pytest.raises(OptionError, match="'new_moe'"):
            decomposable(checkpoint, ["experts.gate_up_proj"])


def assert_table_and_tree_agree(folder: Path) -> None:
    """The same matrices under the same names, of the same bytes; the tree may take for linear what a table by names takes for a router."""
    with open_checkpoint(folder) as checkpoint:
        about = facts(checkpoint.config)
        model = ModuleTree(checkpoint.config, about)
        table, tree = (
            by_table(checkpoint.tensors, about),
            by_tree(checkpoint.tensors, model, model.made_from(checkpoint.tensors)),
        )
    assert tree.decided.endswith(f": {about.architectures[0]}")
    assert (table.tied is None) == (tree.tied is None)
    known, seen = ({(role.module, parameter.expert): (role, parameter) for role, parameter in m.found} for m in (table, tree))
    assert seen.keys() <= known.keys()
    assert all(known[key][0].kind == "router" for key in known.keys() - seen.keys())
    for key, (role, parameter) in seen.items():
        other = known[key][0]
        assert (role.module, role.transposed) == (other.module, other.transposed) and parameter.sources == known[key][1].sources
        assert role.kind == other.kind or (role.kind, other.kind) == ("linear", "router"), key


@pytest.mark.parametrize("name", sorted(configurations()))
def test_the_table_and_the_module_tree_agree(models: dict[str, Path], name: str) -> None:
    with open_checkpoint(models[name]) as checkpoint:
        listed = facts(checkpoint.config).model_type in ARCHITECTURES
    if listed:
        assert_table_and_tree_agree(models[name])


@pytest.mark.soak
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_row_of_the_table_is_what_transformers_does(model_type: str, tmp_path: Path) -> None:
    with quiet():
        model = model_of(model_type)
        model.save_pretrained(tmp_path / model_type)
    experts = sum(1 for _, parameter in model.named_parameters() if parameter.ndim == 3 and ".experts." in _)
    specs = assert_same(model, tmp_path / model_type, experts_in_out=model_type in ("gpt_oss", "llama4", "llama4_text"))
    row = ARCHITECTURES[model_type]
    assert bool(row.experts or row.stacks or model_type == "llama4") == bool(experts)
    assert_table_and_tree_agree(tmp_path / model_type)
    if row.conv1d:
        assert {spec.operation for spec in specs if spec.kind == "linear"} == {"transpose"}


def test_more_stacked_experts_than_any_model_has_are_not_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("svdbank.checkpoint.naming.correspondence.MAX_SLICES", 7)  # the real bound takes a minute to reach
    (tmp_path / "config.json").write_text('{"model_type": "granitemoe"}')
    name = "model.layers.{}.block_sparse_moe.input_linear.weight"
    tensors = {name.format(layer): torch.ones(3, 4, 2) for layer in range(3)}
    with open_checkpoint(tensors_file(tmp_path / "model.safetensors", tensors)) as checkpoint:
        specs, skips = decomposable(checkpoint)
    assert len(specs) == 6 and [(skip.name, "more than 7" in skip.reason) for skip in skips] == [(name.format(2), True)]


def test_experts_that_are_modules_of_their_own_are_not_slices(tmp_path: Path) -> None:
    tensors = {f"model.layers.0.mlp.experts.{e}.up_proj.weight": torch.ones(4, 2) for e in range(2)}
    with open_checkpoint(tensors_file(tmp_path / "model.safetensors", tensors)) as checkpoint:
        specs, _ = decomposable(checkpoint)
    assert [(spec.module, spec.expert, spec.stacked) for spec in specs] == [
        (f"model.layers.0.mlp.experts.{e}.up_proj", e, False) for e in range(2)
    ]


def test_the_documented_table_is_the_tables() -> None:
    page = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    table = page.partition("## The table")[2].partition("\n## ")[0]
    documented = [name for row in re.findall(r"^\|.*\|(.*)\|$", table, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)]
    assert sorted(documented) == sorted(ARCHITECTURES)
