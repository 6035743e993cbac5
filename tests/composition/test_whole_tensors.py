"""Trained modules that adapters hold whole: ``W₀ + Σ wᵢ (Wᵢ − W₀)`` in float64, with W₀ from the base, or refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import svdbank
from svdbank.core.errors import OptionError
from tests.adapter.settings import small_llama
from tests.checkpoint.small_models import configurations
from tests.peft.models import quiet

#: Of float32: a sum of three rounded tensors, rounded once.
EXACT = 1e-6


@pytest.fixture(autouse=True)
def _quiet(single_thread: None) -> Iterator[None]:
    with quiet():
        yield


def model_of(kind: str) -> Any:
    if kind == "bert":
        cls, config = configurations()["bert-classifier"]
        torch.manual_seed(0)
        return cls(config).eval()
    return small_llama()


CASES = {
    "lm_head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embed_tokens": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "norm": ("llama", {"modules_to_save": ["norm"]}),
    "a norm of each layer and the head": ("llama", {"modules_to_save": ["input_layernorm", "lm_head"]}),
    "the head of a classifier": ("bert", {"modules_to_save": ["classifier"], "task_type": "SEQ_CLS"}),
}


def trained(kind: str, config: dict[str, Any], base: Path, folder: Path, seed: int) -> dict[str, Tensor]:
    """An adapter in a folder, and every tensor of its merged model in float64."""
    import peft

    targets = ["query", "value"] if kind == "bert" else ["q_proj", "v_proj"]
    start = type(model_of(kind)).from_pretrained(base)
    model = peft.get_peft_model(start, peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, **config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return dict(model.double().merge_and_unload().state_dict())


def with_peft(kind: str, base: Path, folder: Path) -> dict[str, Tensor]:
    import peft

    start = type(model_of(kind)).from_pretrained(base, dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(start, folder, autocast_adapter_dtype=False)
    return dict(loaded.double().merge_and_unload().state_dict())


def off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max() / (wanted[name].abs().max() + 1e-9)) for name in wanted)


@pytest.fixture(params=CASES)
def pair(
    request: pytest.FixtureRequest, tmp_path: Path
) -> tuple[str, Path, list[Path], dict[str, Tensor], list[dict[str, Tensor]]]:
    kind, config = CASES[request.param]
    base = tmp_path / "base"
    model_of(kind).save_pretrained(base)
    start = {name: value.double() for name, value in type(model_of(kind)).from_pretrained(base).state_dict().items()}
    folders = [tmp_path / "one", tmp_path / "two"]
    whole = [trained(kind, dict(config), base, folder, seed) for seed, folder in enumerate(folders, start=1)]
    return kind, base, folders, start, whole


def test_merge_stack_and_compare_count_from_the_bases_own(pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kind, base, folders, start, (one, two) = pair
    for number, weights in enumerate(([0.75, 0.25], [1.0, 1.0], [0.5, -0.25])):
        svdbank.merge(folders, output=tmp_path / f"merged-{number}", weights=weights)
        a, b = weights
        wanted = {name: start[name] + a * (one[name] - start[name]) + b * (two[name] - start[name]) for name in start}
        assert off(with_peft(kind, base, tmp_path / f"merged-{number}"), wanted) < EXACT
    svdbank.stack(folders, output=tmp_path / "stack", scale={"two": 0.5})
    wanted = {name: one[name] + 0.5 * (two[name] - start[name]) for name in start}
    assert off(with_peft(kind, base, tmp_path / "stack"), wanted) < EXACT
    svdbank.fuse(base, tmp_path / "stack", tmp_path / "fused")
    fused = type(model_of(kind)).from_pretrained(tmp_path / "fused").double().state_dict()
    assert off(dict(fused), wanted) < EXACT
    flat = [torch.cat([(own[name] - start[name]).flatten() for name in start]) for own in (one, two)]
    report = svdbank.compare(folders)
    assert [size.norm for size in report.adapters] == pytest.approx([float(own.norm()) for own in flat], rel=1e-6)
    cosine = float(torch.nn.functional.cosine_similarity(*flat, dim=0))
    assert report.pairs[0].all.cosine == pytest.approx(cosine, abs=1e-6)
    assert svdbank.compare([folders[0], f"again={folders[0]}"]).pairs[0].all.overlap == pytest.approx(1, abs=1e-6)


def test_two_of_one_merged_are_that_one(pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kind, base, folders, _, (one, _) = pair
    svdbank.merge([folders[0], f"again={folders[0]}"], output=tmp_path / "merged")
    assert off(with_peft(kind, base, tmp_path / "merged"), one) < EXACT


def nowhere(folders: list[Path]) -> None:
    """The base that they record is not on this machine."""
    for folder in folders:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "somebody/else"}))


def test_without_the_base_only_weights_that_sum_to_one_are_taken(pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    kind, base, folders, start, (one, two) = pair
    nowhere(folders)
    svdbank.merge(folders, output=tmp_path / "merged", weights=[0.75, 0.25])
    wanted = {name: 0.75 * one[name] + 0.25 * two[name] for name in start}
    assert off(with_peft(kind, base, tmp_path / "merged"), wanted) < EXACT
    refused = [
        lambda: svdbank.merge(folders, output=tmp_path / "out", weights=[1, 1]),
        lambda: svdbank.stack(folders, output=tmp_path / "out"),
        lambda: svdbank.compare(folders),
    ]
    for verb in refused:
        with pytest.raises(OptionError, match="modules_to_save") as caught:
            verb()
        assert "--base MODEL" in (caught.value.hint or "")
    svdbank.stack(folders, output=tmp_path / "out", base=base)
    wanted = {name: one[name] + two[name] - start[name] for name in start}
    assert off(with_peft(kind, base, tmp_path / "out"), wanted) < EXACT
    assert svdbank.compare(folders, base=base).pairs[0].all.weights > 0


def test_a_head_that_the_base_does_not_store_is_refused_by_name(tmp_path: Path) -> None:
    cls, config = configurations()["bert-classifier"]
    torch.manual_seed(0)
    classifier = cls(config)
    classifier.bert.save_pretrained(tmp_path / "base")  # the bare model: every classifier starts with a head drawn at random
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders, start=1):
        trained("bert", {"task_type": "SEQ_CLS"}, tmp_path / "base", folder, seed)
    svdbank.merge(folders, output=tmp_path / "merged", weights=[0.5, 0.5])
    for verb in (lambda: svdbank.stack(folders, output=tmp_path / "out"), lambda: svdbank.compare(folders)):
        with pytest.raises(OptionError, match="classifier"):
            verb()


def test_factors_and_a_whole_tensor_of_one_module_are_not_put_together(tmp_path: Path) -> None:
    model_of("llama").save_pretrained(tmp_path / "base")
    trained("llama", {"modules_to_save": ["lm_head"]}, tmp_path / "base", tmp_path / "whole", 1)
    import peft

    model = peft.get_peft_model(
        type(model_of("llama")).from_pretrained(tmp_path / "base"),
        peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "factors")
    folders = [tmp_path / "whole", tmp_path / "factors"]
    verbs = [
        lambda: svdbank.merge(folders, output=tmp_path / "out"),
        lambda: svdbank.stack(folders, output=tmp_path / "out"),
        lambda: svdbank.compare(folders),
    ]
    for verb in verbs:
        with pytest.raises(OptionError, match="is replaced whole"):
            verb()


def test_parts_of_a_stack_with_whole_tensors_are_not_told_apart(pair, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    _, _, folders, _, _ = pair
    svdbank.stack(folders, output=tmp_path / "stack")
    for options in ({"scale": {"one": 0.5}}, {"drop": ["one"]}):
        with pytest.raises(OptionError, match="modules_to_save"):
            svdbank.stack([tmp_path / "stack"], output=tmp_path / "out", **options)
