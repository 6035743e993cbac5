"""Adapters of older Transformers: experts that were modules, and modules under other names, held against dense sums in float64."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import svdbank
from svdbank.core.errors import OptionError, SvdbankError
from svdbank.peft import load_adapter
from tests.checkpoint.small_models import configurations
from tests.peft.models import quiet

RANK, ALPHA = 4, 8


@dataclass(frozen=True)
class Family:
    """``old`` gives the name that a parameter had in older Transformers; ``names`` the expert's modules, as they were called."""

    model: str
    experts: str = "mlp.experts"
    names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")


MIXTURES = {
    "qwen3-moe": Family("qwen3-moe"),
    "mixtral": Family("mixtral", "block_sparse_moe.experts", ("w1", "w3", "w2")),
}


def small(name: str, dtype: torch.dtype = torch.float32) -> Any:
    cls, config = configurations()[name]
    torch.manual_seed(0)
    return cls(copy.deepcopy(config)).to(dtype).eval()


def save_as_lora(tensors: dict[str, Tensor], folder: Path, base: Path, **config: Any) -> Path:
    """A folder as PEFT writes it, of factors by module path."""
    folder.mkdir()
    save_file(
        {f"base_model.model.{key}": value.contiguous() for key, value in tensors.items()}, folder / "adapter_model.safetensors"
    )
    said = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "base_model_name_or_path": str(base), "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps(said | config))
    return folder


@dataclass(frozen=True)
class PerExpert:
    """An adapter whose experts were modules, and what each parameter of the loaded model becomes with it, float64."""

    folder: Path
    merged: dict[str, Tensor]
    start: dict[str, Tensor]

    def delta(self) -> dict[str, Tensor]:
        return {name: self.merged[name] - self.start[name] for name in self.start}


def per_expert(
    family: Family,
    base: Path,
    folder: Path,
    *,
    seed: int = 1,
    only: tuple[str, ...] | None = None,
    experts: tuple[int, ...] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> PerExpert:
    """Factors for q_proj and every expert's matrices, or for ``only`` some of them and of some ``experts``."""
    settings = settings or {}
    model = small(family.model, torch.float64)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    merged = {name: value.clone() for name, value in start.items()}
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def factors(module: str, out: int, into: int) -> Tensor:
        rank = by_pattern(settings.get("rank_pattern", {}), module, RANK)
        alpha = by_pattern(settings.get("alpha_pattern", {}), module, ALPHA)
        A, B = (0.1 * torch.randn(*shape, generator=generator) for shape in ((rank, into), (out, rank)))
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = A, B
        return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank) * (B.double() @ A.double())

    gate, up, down = family.names
    for name in start:
        if name.endswith("q_proj.weight"):
            merged[name] += factors(name.removesuffix(".weight"), *start[name].shape)
        if name.endswith("experts.gate_up_proj"):
            path = name.removesuffix("mlp.experts.gate_up_proj")
            count, rows, into = start[name].shape
            for expert in experts or range(count):
                module = f"{path}{family.experts}.{expert}"
                for own, block in ((gate, slice(0, rows // 2)), (up, slice(rows // 2, rows))):
                    if only is None or own in only:
                        merged[name][expert, block] += factors(f"{module}.{own}", rows // 2, into)
                if only is None or down in only:
                    merged[name.replace("gate_up", "down")][expert] += factors(f"{module}.{down}", into, rows // 2)
    targets = ["q_proj", *(only or family.names)]
    return PerExpert(save_as_lora(tensors, folder, base, target_modules=targets, **settings), merged, start)


def stored(model: Any, folder: Path, *, one_by_one: bool) -> Path:
    """In a folder, with experts one by one or as they are loaded."""
    model.save_pretrained(folder, save_original_format=one_by_one)
    return folder


def by_pattern(patterns: Mapping[str, int], module: str, default: int) -> int:
    return next((value for end, value in patterns.items() if module.endswith(f".{end}")), default)


def loaded(name: str, folder: Path) -> dict[str, Tensor]:
    return dict(configurations()[name][0].from_pretrained(folder, dtype=torch.float32).double().state_dict())


def with_peft(name: str, folder: Path) -> dict[str, Tensor]:
    """What PEFT makes of a folder on the fresh model, every parameter in float64."""
    import peft

    model = peft.PeftModel.from_pretrained(small(name, torch.float64), folder, autocast_adapter_dtype=False).double()
    return dict(model.merge_and_unload().state_dict())


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest difference of any parameter, relative to its largest entry."""
    return max(float((found[name].double() - wanted[name]).abs().max() / wanted[name].abs().max()) for name in wanted)


#: Of float32: the factors, their sum, the weight.
EXACT = 1e-6


@pytest.fixture(autouse=True)
def _quiet(single_thread: None) -> Any:
    with quiet():
        yield


@pytest.mark.parametrize("one_by_one", [True, False], ids=["stored one by one", "stored fused"])
@pytest.mark.parametrize("name", MIXTURES)
def test_fuse_adds_per_expert_factors_to_their_rows(name: str, one_by_one: bool, tmp_path: Path) -> None:
    base = stored(small(name), tmp_path / "base", one_by_one=one_by_one)
    adapter = per_expert(MIXTURES[name], base, tmp_path / "adapter")
    svdbank.fuse(base, adapter.folder, tmp_path / "fused")
    assert off(loaded(name, tmp_path / "fused"), adapter.merged) < EXACT
    assert off(with_peft(name, adapter.folder), adapter.merged) < EXACT, "PEFT's own reading is the same"
    model = load_adapter(small(name), adapter.folder, is_trainable=False)
    assert off(dict(model.double().merge_and_unload().state_dict()), adapter.merged) < EXACT


@pytest.mark.parametrize("name", MIXTURES)
def test_fuse_takes_some_experts_and_one_of_the_fused_pair(name: str, tmp_path: Path) -> None:
    base = stored(small(name), tmp_path / "base", one_by_one=False)
    some = per_expert(MIXTURES[name], base, tmp_path / "some", only=MIXTURES[name].names[1:2], experts=(2,))
    svdbank.fuse(base, some.folder, tmp_path / "fused")
    assert off(loaded(name, tmp_path / "fused"), some.merged) < EXACT
    model = load_adapter(small(name), some.folder, is_trainable=False)  # which PEFT refuses to translate
    assert off(dict(model.double().merge_and_unload().state_dict()), some.merged) < EXACT


@pytest.mark.parametrize(
    "settings", [{"use_rslora": True}, {"alpha_pattern": {"gate_proj": 3}}, {"rank_pattern": {"experts.1.down_proj": 2}}]
)
def test_scales_of_per_expert_adapters_are_those_they_were_trained_with(settings: dict[str, Any], tmp_path: Path) -> None:
    base = stored(small("qwen3-moe"), tmp_path / "base", one_by_one=True)
    one = per_expert(MIXTURES["qwen3-moe"], base, tmp_path / "one", settings=settings)
    svdbank.fuse(base, one.folder, tmp_path / "fused")
    assert off(loaded("qwen3-moe", tmp_path / "fused"), one.merged) < EXACT
    model = load_adapter(small("qwen3-moe"), one.folder, is_trainable=False)
    assert off(dict(model.double().merge_and_unload().state_dict()), one.merged) < EXACT
    for number, options in enumerate(({"to": "lora"}, {"inference": True})):
        out = tmp_path / f"out-{number}"
        if "use_rslora" in settings and "to" in options:  # the folder would be right, and plain PEFT would misread it
            with pytest.raises(
                OptionError, match="is an expert that was a module, and PEFT gives such with rsLoRA another scale"
            ):
                svdbank.export(one.folder, output=out, **options)
            continue
        svdbank.export(one.folder, output=out, **options)
        if "use_rslora" in settings:
            assert off(with_peft("qwen3-moe", out), one.merged) < EXACT
        model = load_adapter(small("qwen3-moe"), out, is_trainable=False)
        assert off(dict(model.double().merge_and_unload().state_dict()), one.merged) < EXACT


@pytest.mark.parametrize("name", MIXTURES)
def test_merge_stack_compare_and_export_of_per_expert_adapters(name: str, tmp_path: Path) -> None:
    base = stored(small(name), tmp_path / "base", one_by_one=True)
    one, two = (per_expert(MIXTURES[name], base, tmp_path / f"adapter-{seed}", seed=seed) for seed in (1, 2))
    svdbank.merge([one.folder, two.folder], output=tmp_path / "merged", weights=[0.75, 0.5])
    wanted = {key: one.start[key] + 0.75 * one.delta()[key] + 0.5 * two.delta()[key] for key in one.start}
    assert off(with_peft(name, tmp_path / "merged"), wanted) < EXACT
    svdbank.stack([one.folder, two.folder], output=tmp_path / "stack")
    svdbank.stack([tmp_path / "stack"], output=tmp_path / "again", scale={"adapter-1": 0.75, "adapter-2": 0.5})
    assert off(with_peft(name, tmp_path / "again"), wanted) < EXACT
    svdbank.fuse(base, tmp_path / "again", tmp_path / "fused")
    assert off(loaded(name, tmp_path / "fused"), wanted) < EXACT
    flat = [torch.cat([value.flatten() for value in each.delta().values()]) for each in (one, two)]
    report = svdbank.compare([one.folder, two.folder])
    assert report.adapters[0].norm == pytest.approx(float(flat[0].norm()), rel=1e-6)
    assert report.pairs[0].all.cosine == pytest.approx(float(torch.nn.functional.cosine_similarity(*flat, dim=0)), abs=1e-6)
    for number, options in enumerate(({"to": "lora"}, {"inference": True})):
        svdbank.export(one.folder, output=tmp_path / f"exported-{number}", **options)
        assert off(with_peft(name, tmp_path / f"exported-{number}"), one.merged) < EXACT


def stacked(name: str, folder: Path, seed: int = 5) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of the fused parameters, as PEFT saves it now, and ΔW of each."""
    import peft

    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    )
    model = peft.get_peft_model(small(name), config)
    generator = torch.Generator().manual_seed(seed)
    for own, parameter in model.named_parameters():
        if "lora_" in own:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    merged = model.double().merge_and_unload().state_dict()
    start = small(name, torch.float64).state_dict()
    return folder, {key: merged[key] - start[key] for key in start}


@pytest.mark.parametrize("name", MIXTURES)
def test_a_per_expert_adapter_and_one_of_fused_parameters_become_one_that_peft_loads(name: str, tmp_path: Path) -> None:
    base = stored(small(name), tmp_path / "base", one_by_one=True)
    one = per_expert(MIXTURES[name], base, tmp_path / "one")
    other, delta = stacked(name, tmp_path / "other")
    path = other / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}))
    svdbank.stack([one.folder, other], output=tmp_path / "stack")
    wanted = {key: one.merged[key] + delta[key] for key in delta}
    assert off(with_peft(name, tmp_path / "stack"), wanted) < EXACT
    svdbank.merge([other, one.folder], output=tmp_path / "merged", weights=[1, 1])
    assert off(with_peft(name, tmp_path / "merged"), wanted) < EXACT


@pytest.mark.parametrize("name", MIXTURES)
def test_without_the_base_the_two_kinds_are_not_put_together(name: str, tmp_path: Path) -> None:
    one = per_expert(MIXTURES[name], tmp_path / "nowhere", tmp_path / "one")
    other, delta = stacked(name, tmp_path / "other")
    for verb in (svdbank.stack, svdbank.merge):
        with pytest.raises(SvdbankError, match=r"experts\.0") as caught:
            verb([one.folder, other], output=tmp_path / "out")
        assert "--base" in (caught.value.hint or "")
    base = stored(small(name), tmp_path / "base", one_by_one=True)
    svdbank.stack([one.folder, other], output=tmp_path / "out", base=base)
    assert off(with_peft(name, tmp_path / "out"), {key: one.merged[key] + delta[key] for key in delta}) < EXACT


#: (what a name of the loaded model begins with or holds, what it was in older Transformers), the first that fits a name.
OLDER = {
    "llava": (
        (r"^model\.language_model\.", "language_model.model."),
        (r"^model\.vision_tower\.", "vision_tower.vision_model."),
        (r"^model\.multi_modal_projector\.", "multi_modal_projector."),
        (r"^lm_head\.", "language_model.lm_head."),
    ),
    "vit": ((r"layers\.(\d+)\.attention\.q_proj", r"encoder.layer.\1.attention.attention.query"),),
    "siglip": ((r"^encoder\.", "vision_model.encoder."),),
    "gpt-neox": ((r"^lm_head\.", "embed_out."),),
}
OLDER["gemma3-vision"] = OLDER["llava"]
TARGETS = {"gpt-neox": ["query_key_value", "lm_head"], "llava": ["q_proj", "linear_1", "lm_head"]}


def older(name: str, key: str) -> str:
    for pattern, replacement in OLDER[name]:
        changed = re.sub(pattern, replacement, key)
        if changed != key:
            return changed
    return key


def of_older_names(name: str, base: Path, folder: Path, seed: int = 1, **config: Any) -> tuple[Path, dict[str, Tensor]]:
    """An adapter as older Transformers named its modules, and every parameter with it, float64."""
    import peft

    targets = TARGETS.get(name, ["q_proj"])
    model = peft.get_peft_model(
        small(name), peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, init_lora_weights=False)
    )
    torch.manual_seed(seed)
    tensors, merged = {}, dict(small(name, torch.float64).state_dict())
    for key, value in peft.get_peft_model_state_dict(model).items():
        if "lora_" not in key:
            continue
        tensors[older(name, key.removeprefix("base_model.model."))] = 0.1 * torch.randn(value.shape)
    for key in tensors:
        if "lora_A" in key:
            module = key.removesuffix(".lora_A.weight")
            own = next(other for other in merged if older(name, other) == f"{module}.weight")
            merged[own] = merged[own] + ALPHA / RANK * (tensors[f"{module}.lora_B.weight"].double() @ tensors[key].double())
    ends = sorted({key.split(".lora_")[0].rpartition(".")[2] for key in tensors})
    assert any(older(name, key) != key for key in merged)
    return save_as_lora(tensors, folder, base, target_modules=ends, **{"task_type": None} | config), merged


@pytest.mark.parametrize("name", OLDER)
def test_each_key_goes_through_the_renames_of_the_models_type(name: str, tmp_path: Path) -> None:
    base = stored(small(name), tmp_path / "base", one_by_one=True)
    folder, merged = of_older_names(name, base, tmp_path / "one")
    two, other = of_older_names(name, base, tmp_path / "two", seed=2)
    start = small(name, torch.float64).state_dict()
    model = load_adapter(small(name), folder, is_trainable=False)
    assert off(dict(model.double().merge_and_unload().state_dict()), merged) < EXACT
    svdbank.fuse(base, folder, tmp_path / "fused")
    assert off(loaded(name, tmp_path / "fused"), merged) < EXACT
    svdbank.merge([folder, two], output=tmp_path / "merged", weights=[0.5, 0.75])
    wanted = {key: 0.5 * merged[key] + 0.75 * other[key] - 0.25 * start[key] for key in start}
    assert off(with_peft(name, tmp_path / "merged"), wanted) < EXACT
    svdbank.stack([folder, two], output=tmp_path / "stack")
    assert off(with_peft(name, tmp_path / "stack"), {key: merged[key] + other[key] - start[key] for key in start}) < EXACT
    for number, options in enumerate(({"to": "lora"}, {"inference": True})):
        svdbank.export(folder, output=tmp_path / f"exported-{number}", **options)
        model = load_adapter(small(name), tmp_path / f"exported-{number}", is_trainable=False)
        assert off(dict(model.double().merge_and_unload().state_dict()), merged) < EXACT


def test_patterns_of_older_names_keep_their_meaning(tmp_path: Path) -> None:
    base = stored(small("llava"), tmp_path / "base", one_by_one=True)
    folder, merged = of_older_names(
        "llava", base, tmp_path / "one", alpha_pattern={"language_model.model.layers.0.self_attn.q_proj": 2 * ALPHA}
    )
    start = small("llava", torch.float64).state_dict()
    own = "model.language_model.layers.0.self_attn.q_proj.weight"
    merged[own] = start[own] + 2 * (merged[own] - start[own])
    svdbank.fuse(base, folder, tmp_path / "fused")
    assert off(loaded("llava", tmp_path / "fused"), merged) < EXACT
    model = load_adapter(small("llava"), folder, is_trainable=False)
    assert off(dict(model.double().merge_and_unload().state_dict()), merged) < EXACT


def test_an_adapter_of_older_names_and_one_of_todays_are_of_the_same_modules(tmp_path: Path) -> None:
    base = stored(small("llava"), tmp_path / "base", one_by_one=True)
    folder, _ = of_older_names("llava", base, tmp_path / "one")
    todays = load_adapter(small("llava"), folder)
    todays.peft_config["default"].base_model_name_or_path = str(base)
    todays.save_pretrained(tmp_path / "today")
    assert svdbank.compare([folder, tmp_path / "today"]).pairs[0].all.cosine == pytest.approx(1, abs=1e-6)


def test_without_the_base_plain_peft_loads_what_is_written_of_older_names(tmp_path: Path) -> None:
    folders = []
    parts = []
    for seed in (1, 2):
        folder, merged = of_older_names("gemma3-vision", tmp_path / "nowhere", tmp_path / f"adapter-{seed}", seed=seed)
        folders.append(folder)
        parts.append(merged)
    svdbank.export(folders[0], output=tmp_path / "served", inference=True)
    assert off(with_peft("gemma3-vision", tmp_path / "served"), parts[0]) < EXACT
    svdbank.merge(folders, output=tmp_path / "merged")
    wanted = {key: 0.5 * parts[0][key] + 0.5 * parts[1][key] for key in parts[0]}
    assert off(with_peft("gemma3-vision", tmp_path / "merged"), wanted) < EXACT
