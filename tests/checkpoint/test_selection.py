"""What is decomposed is what PEFT's ``all-linear`` selects on the loaded model, and its bytes are the module's weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

from svdbank.checkpoint import decomposable, open_checkpoint
from svdbank.core.errors import CheckpointError, OptionError
from tests.checkpoint.attacks import tensors_file
from tests.checkpoint.small_models import WITH_EXPERTS, configurations, load


def peft_all_linear(model: nn.Module) -> set[str]:
    config = _maybe_include_all_linear_layers(LoraConfig(target_modules="all-linear"), model)
    assert isinstance(config.target_modules, set)
    return config.target_modules


def module_matrix(model: nn.Module, name: str) -> torch.Tensor:
    """The (out, in) matrix of a module, in the orientation of PEFT's SVD."""
    module = model.get_submodule(name)
    transposed = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    return module.weight.mT if transposed else module.weight


DENSE = sorted(set(configurations()) - set(WITH_EXPERTS))


@pytest.mark.parametrize("name", DENSE)
def test_the_default_selection_is_pefts_all_linear_and_the_bytes_are_the_modules_weights(
    models: dict[str, Path], name: str
) -> None:
    model = load(name)
    with open_checkpoint(models[name]) as checkpoint:
        specs, _ = decomposable(checkpoint)
        assert {spec.module for spec in specs} == peft_all_linear(model)
        for spec in specs:
            assert spec.name == f"{spec.module}.weight"
            assert torch.equal(checkpoint.read(spec), module_matrix(model, spec.module)), spec.name


def test_minilm_as_it_ships_agrees_with_transformers_and_peft(minilm: Path) -> None:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm)
    with open_checkpoint(minilm) as checkpoint:
        specs, _ = decomposable(checkpoint)
        assert {spec.module for spec in specs} == peft_all_linear(model)
        assert len(specs) == 37
        for spec in specs:
            assert torch.equal(checkpoint.read(spec), module_matrix(model, spec.module))


@pytest.mark.parametrize("name", ["llama-sharded", "llama-bf16"])
def test_shards_and_dtypes_change_neither_names_nor_values(models: dict[str, Path], name: str) -> None:
    model = load("llama-untied").to(torch.bfloat16 if name == "llama-bf16" else torch.float32)
    with open_checkpoint(models[name]) as checkpoint, open_checkpoint(models["llama-untied"]) as single:
        specs, _ = decomposable(checkpoint)
        assert [(s.name, s.family, s.layer) for s in specs] == [(s.name, s.family, s.layer) for s in decomposable(single)[0]]
        assert name != "llama-sharded" or len(checkpoint.files) > 3
        for spec in specs:
            matrix = checkpoint.read(spec)
            assert matrix.dtype is model.dtype
            assert torch.equal(matrix, module_matrix(model, spec.module))


@pytest.mark.parametrize(
    "name",
    [
        "llama-untied",
        "llama-tied",
        "gpt2",
        "gpt-neox",
        "bert-masked",
        "nomic-bert",
        "roberta-masked",
        "t5",
        "opt",
        "llava",
        "mixtral",
    ],
)
def test_embeddings_and_output_head_come_on_request_in_pefts_orientation(models: dict[str, Path], name: str) -> None:
    model = load(name)
    names = {module: key for key, module in model.named_modules()}
    ends = {names[model.get_input_embeddings()]: "embedding", names[model.get_output_embeddings()]: "head"}
    with open_checkpoint(models[name]) as checkpoint:
        specs, _ = decomposable(checkpoint, list(ends))
        assert {spec.module: spec.kind for spec in specs} == ends
        for spec in specs:
            assert torch.equal(checkpoint.read(spec), module_matrix(model, spec.module))
        everything = decomposable(checkpoint, ["all-linear", *ends])[0]
        modules = {spec.module for spec in everything if ".experts." not in spec.module and spec.kind != "router"}
        assert modules == peft_all_linear(model) | set(ends)
        # PEFT adapts the parameter `weight` of a router.
        assert any(spec.kind == "router" for spec in everything) == (name == "mixtral")


def test_a_tied_head_reads_the_embeddings_bytes_with_the_sides_exchanged(models: dict[str, Path]) -> None:
    with open_checkpoint(models["llama-tied"]) as checkpoint:
        assert "lm_head.weight" not in checkpoint.tensors
        (embedding, head), _ = decomposable(checkpoint, ["embed_tokens", "lm_head"])
        if embedding.kind == "head":
            embedding, head = head, embedding
        assert embedding.sources == head.sources
        assert (embedding.operation, head.operation) == ("transpose", "as_is")
        assert torch.equal(checkpoint.read(embedding), checkpoint.read(head).mT)


def test_every_tensor_is_either_used_or_left_out_with_a_reason(models: dict[str, Path]) -> None:
    for name, folder in models.items():
        with open_checkpoint(folder) as checkpoint:
            for targets in (["all-linear"], [r".*(query|q_proj|q_b_proj|c_attn|query_key_value|qkv_proj|\.q)"]):
                specs, skips = decomposable(checkpoint, targets)
                used = {source.name for spec in specs for source in spec.sources}
                assert sorted([*used, *(skip.name for skip in skips)]) == sorted(checkpoint.tensors), name
                assert all(skip.reason and skip.shape == checkpoint.tensors[skip.name].shape for skip in skips)


def test_a_convolution_is_reported_as_left_out(models: dict[str, Path]) -> None:
    with open_checkpoint(models["vit"]) as checkpoint:
        reasons = {skip.name: skip.reason for skip in decomposable(checkpoint)[1]}
    (patches,) = [name for name in reasons if name.endswith("patch_embeddings.projection.weight")]
    assert "4-D" in reasons[patches] and "convolution" in reasons[patches]


def test_families_are_slugs_shared_by_one_role_and_shape_in_layer_order(models: dict[str, Path]) -> None:
    for folder in models.values():
        with open_checkpoint(folder) as checkpoint:
            specs, _ = decomposable(checkpoint)
        families: dict[str, list] = {}
        for spec in specs:
            assert re.fullmatch(r"[a-z0-9][a-z0-9._-]*", spec.family)
            families.setdefault(spec.family, []).append(spec)
        for members in families.values():
            assert len({(s.out_features, s.in_features, s.kind, s.operation, s.dtype) for s in members}) == 1
            layers = [s.layer for s in members if s.layer is not None]
            assert layers == sorted(layers)
        assert [s.family for s in specs] == sorted(s.family for s in specs)


def test_a_familys_name_does_not_depend_on_what_else_is_targeted(models: dict[str, Path]) -> None:
    with open_checkpoint(models["gemma3"]) as checkpoint:
        whole = {spec.name: spec for spec in decomposable(checkpoint)[0]}
        for spec in decomposable(checkpoint, ["q_proj", "down_proj"])[0]:
            assert whole[spec.name] == spec


def test_roles_that_slug_alike_are_told_apart_by_a_short_hash(tmp_path: Path) -> None:
    names = {
        "Proj.0.q.weight": torch.ones(2, 3),
        "proj.1.q.weight": torch.ones(2, 3),
        "proj.2.q.weight": torch.ones(2, 3).half(),
    }
    path = tensors_file(tmp_path / "model.safetensors", names)
    with open_checkpoint(path) as checkpoint:
        families = {spec.name: spec.family for spec in decomposable(checkpoint)[0]}
    assert len(set(families.values())) == 3
    assert all(re.fullmatch(r"proj\.q-2x3-[0-9a-f]{8}", family) for family in families.values())


def test_layer_and_expert_are_read_from_the_name_and_a_router_is_one(tmp_path: Path) -> None:
    expert = "model.layers.{}.mlp.experts.{}.up_proj.weight"
    names = {expert.format(layer, e): torch.ones(4, 2) for layer in (0, 10, 2) for e in (0, 1, 11, 3)}
    names["model.layers.0.mlp.gate.weight"] = torch.ones(4, 2)
    with open_checkpoint(tensors_file(tmp_path / "model.safetensors", names)) as checkpoint:
        specs, skips = decomposable(checkpoint)
        routers = [spec for spec in specs if spec.kind == "router"]
        specs = [spec for spec in specs if spec.kind == "linear"]
        assert [(s.layer, s.expert) for s in specs] == [(layer, e) for layer in (0, 2, 10) for e in (0, 1, 3, 11)]
        assert {s.family for s in specs} == {"model.layers.mlp.experts.up_proj-4x2"}
        assert [spec.name for spec in routers] == ["model.layers.0.mlp.gate.weight"] and not skips
        assert [s.module for s in decomposable(checkpoint, ["gate"])[0]] == ["model.layers.0.mlp.gate"]


@pytest.mark.parametrize(
    ("targets", "said", "hint"),
    [
        (["q_prj"], r"'q_prj' matches no module; there are: .*k_proj ×3", "q_proj"),
        (["q_proj", "nothing_like_it"], "'nothing_like_it' matches no module", None),
        ([r".*\.(query|key)"], "matches no module", None),
        (["input_layernorm"], "cannot be decomposed: a vector", None),
        (["self_attn"], "matches no module", None),
    ],
)
def test_a_target_that_matches_nothing_is_an_error_that_lists_what_there_is(
    models: dict[str, Path], targets: list[str], said: str, hint: str | None
) -> None:
    with open_checkpoint(models["llama-untied"]) as checkpoint, pytest.raises(OptionError, match=said) as caught:
        decomposable(checkpoint, targets)
    assert caught.value.hint and (hint is None or hint in caught.value.hint)


def test_a_quantised_checkpoint_is_refused_with_its_scheme(tmp_path: Path) -> None:
    tensors_file(tmp_path / "model.safetensors", {"a.weight": torch.ones(2, 2)})
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')
    with pytest.raises(CheckpointError, match="GPTQ"):
        open_checkpoint(tmp_path)


def test_codes_that_need_scales_are_left_out(tmp_path: Path) -> None:
    path = tensors_file(
        tmp_path / "model.safetensors",
        {
            "a.weight": torch.ones(2, 2),
            "b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn),
            "c.weight": torch.ones(2, 2).char(),
        },
    )
    with open_checkpoint(path) as checkpoint:
        specs, skips = decomposable(checkpoint)
    assert [spec.name for spec in specs] == ["a.weight"]
    assert {skip.name: skip.reason for skip in skips} == {
        "b.weight": "stored as F8_E4M3: codes, not values",
        "c.weight": "stored as I8: codes, not values",
    }
