"""``fuse`` writes the base plus the adapter: PEFT's own merge, in bounded memory, with everything else as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import svdbank
from svdbank.core.errors import BankError, CheckpointError, OptionError, WrongBaseError
from tests.building.small import write_small_checkpoint
from tests.fusion.conftest import adapter, headers_of, logits, reloaded, saved, small_model, tensors_of

#: Sums of float32: PEFT scales the product, fuse the factor, so each entry of ΔW differs by a few roundings of 2⁻²⁴.
ROUNDING = 8 * 2.0**-24

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama-untied", {"target_modules": "all-linear"}),
    "rslora": ("llama-tied", {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "patterns": (
        "llama-untied",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 2, "layers.0.self_attn.k_proj": 6},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "embedding and head": ("llama-untied", {"target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "experts, stored one by one": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "experts, stored stacked and transposed": ("gpt-oss", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "whole modules": ("llama-untied", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "encoder": ("bert-masked", {"target_modules": ["query", "value"]}),
}


def _difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest difference of an entry, relative to the largest entry of its tensor."""
    assert one.keys() == other.keys()
    return max(
        float((one[n].double() - other[n].double()).abs().max() / one[n].double().abs().max().clamp_min(1e-30)) for n in one
    )


@pytest.mark.parametrize("kind", KINDS)
def test_fuse_is_pefts_merge_for_every_kind_of_lora(kind: str, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    base = saved(small_model(name), tmp_path / "base", shard="200KB")
    with_adapter = adapter(small_model(name), tmp_path / "adapter", **config)
    expected = logits(with_adapter)
    report = svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    # The figures are of float32 weights: nearly every entry moves, and nearly all of ΔW arrives.
    assert report.changed > 0.9 * report.elements
    assert report.error < 1e-4
    merged = with_adapter.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", max_shard_size="200KB")
    assert _difference(tensors_of(tmp_path / "fused"), tensors_of(tmp_path / "merged")) < ROUNDING
    plain = reloaded(tmp_path / "fused")
    # float32 through two or three layers; logits are of order 1
    assert float((logits(plain) - expected).abs().max()) < 2e-5


def test_smollm2_fused_is_pefts_merge_and_has_the_logits_of_base_and_adapter(smollm2: Path, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    with_adapter = adapter(model, tmp_path / "adapter", r=16, lora_alpha=32, target_modules="all-linear", size=0.01)
    expected = logits(with_adapter)
    report = svdbank.fuse(smollm2, tmp_path / "adapter", tmp_path / "fused", dtype="float32")
    assert len(report.weights) == 210
    assert report.dtype == "float32"
    merged = dict(with_adapter.merge_and_unload().state_dict())
    merged.pop("lm_head.weight")  # tied: not stored
    assert _difference(tensors_of(tmp_path / "fused"), merged) < ROUNDING
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    assert plain.dtype == torch.float32
    # Thirty layers of float32 sums in another order; logits reach 20.
    assert float((logits(plain) - expected).abs().max()) < 1e-3
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "fused").encode("the same tokens")


def test_what_the_adapter_does_not_touch_stays_byte_for_byte(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied", dtype=torch.bfloat16), tmp_path / "base", shard="100KB")
    adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    report = svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    assert len(list(base.glob("*.safetensors"))) > 3
    assert headers_of(tmp_path / "fused") == headers_of(base)
    before, after = tensors_of(base), tensors_of(tmp_path / "fused")
    touched = {weight.name for weight in report.weights}
    assert {
        name for name in before if not torch.equal(before[name].view(torch.int16), after[name].view(torch.int16))
    } == touched
    assert touched == {name for name in before if "q_proj" in name or "up_proj" in name}
    others = {path.name for path in base.iterdir() if path.suffix != ".safetensors"}
    assert others == {path.name for path in (tmp_path / "fused").iterdir() if path.suffix != ".safetensors"}
    for name in others:
        assert (tmp_path / "fused" / name).read_bytes() == (base / name).read_bytes(), name


def test_the_figures_are_those_of_the_dense_sum(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied", dtype=torch.bfloat16), tmp_path / "base")
    adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["v_proj"], size=0.005)
    report = svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    before, after = tensors_of(base), tensors_of(tmp_path / "fused")
    for weight in report.weights:
        A, B = (factors[f"base_model.model.{weight.module}.lora_{side}.weight"].double() for side in "AB")
        delta = 2.0 * B @ A
        W = before[weight.name]
        stored = (W.float() + delta.float()).bfloat16()
        assert torch.equal(after[weight.name], stored)
        assert weight.elements == W.numel()
        assert weight.changed == int((stored.view(torch.int16) != W.view(torch.int16)).sum())
        realised = stored.double() - W.double()
        assert math.isclose(weight.norm, float(delta.norm()), rel_tol=1e-6)
        assert math.isclose(weight.error, float((realised - delta).norm() / delta.norm()), rel_tol=1e-5)
    assert any("--dtype float32" in note for note in report.notes), "this small a change is worth a warning"


def test_an_adapter_that_bfloat16_swallows_whole_is_an_error_and_float32_keeps_it(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied", dtype=torch.bfloat16), tmp_path / "base")
    with torch.no_grad():
        adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["v_proj"], size=1e-6)
    with pytest.raises(OptionError, match=r"not one of 6,144 elements changed.*bfloat16") as caught:
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    assert caught.value.hint is not None and "--dtype float32" in caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]
    report = svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused", dtype="float32")
    assert report.changed > 0
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "fused").values()} == {torch.float32}
    assert reloaded(tmp_path / "fused").dtype == torch.float32


def test_into_changes_the_other_model_and_takes_its_files(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    instruct = saved(small_model("llama-untied", seed=5), tmp_path / "instruct")
    (instruct / "chat_template.jinja").write_text("{{ instruct }}")
    adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["q_proj"])
    svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused", into=instruct)
    expected = adapter(small_model("llama-untied", seed=5), tmp_path / "again", target_modules=["q_proj"]).merge_and_unload()
    assert _difference(tensors_of(tmp_path / "fused"), dict(expected.state_dict())) < ROUNDING
    assert (tmp_path / "fused" / "chat_template.jinja").read_text() == "{{ instruct }}"
    narrow = saved(small_model("llama-untied", intermediate_size=96, hidden_size=32), tmp_path / "narrow")
    with pytest.raises(OptionError, match="q_proj"):
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "no", into=narrow)


@pytest.fixture(scope="module")
def recorded(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small checkpoint and a MiCA adapter of its bank that was trained, so to speak; it records the base's hashes."""
    folder = tmp_path_factory.mktemp("recorded")
    model = write_small_checkpoint(folder / "model", minilm)
    bank = svdbank.build(model, folder / "bank", rank=8)
    svdbank.init(bank, output=folder / "adapter", rank=4)
    file = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(3)
    save_file({n: torch.randn(t.shape, generator=generator) * 0.1 if "lora_A" in n else t for n, t in tensors.items()}, file)
    return model, folder / "adapter"


@pytest.mark.parametrize("layer", [0, 1])
def test_one_byte_of_another_base_is_refused_unless_into_names_it(
    layer: int, recorded: tuple[Path, Path], tmp_path: Path
) -> None:
    model, own = recorded
    other = tmp_path / "other"
    other.mkdir()
    tensors = load_file(model / "model.safetensors")
    tensors[f"encoder.layer.{layer}.attention.self.query.weight"][3, 5] *= 1.5
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    (other / "config.json").write_text((model / "config.json").read_text())
    with pytest.raises(WrongBaseError) as caught:
        svdbank.fuse(other, own, tmp_path / "fused")
    assert caught.value.exit_code == 12
    assert [path.name for path in tmp_path.iterdir()] == ["other"]
    with pytest.raises(WrongBaseError):
        # MODEL is still the adapter's base, whatever is changed: here it is not.
        svdbank.fuse(_without_first_row(model, tmp_path), own, tmp_path / "fused", into=other)
    svdbank.fuse(model, own, tmp_path / "fused", into=other)
    assert svdbank.fuse(model, own, tmp_path / "fused too").changed > 0


def _without_first_row(model: Path, folder: Path) -> Path:
    changed = folder / "changed"
    changed.mkdir()
    tensors = {name: tensor * 1.01 for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    (changed / "config.json").write_text((model / "config.json").read_text())
    return changed


@pytest.mark.parametrize("method", ["milora", "pissa"])
def test_milora_and_pissa_are_added_as_what_they_changed(method: str, minilm: Path, tmp_path: Path) -> None:
    """Trained factors sit on ``W − s B₀A₀``; on W itself they add ``s(BA − B₀A₀)``."""
    model = write_small_checkpoint(tmp_path / "model", minilm)
    bank = svdbank.build(model, tmp_path / "bank", rank=8, principal=8)
    svdbank.init(
        bank, output=tmp_path / "adapter", rank=4, method=method, residual_out=tmp_path / "residual", base_model=str(model)
    )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    trained = {n: t + torch.randn(t.shape, generator=generator) * 0.05 for n, t in load_file(file).items()}
    save_file(trained, file)
    svdbank.fuse(model, tmp_path / "adapter", tmp_path / "fused", bank=bank)
    residual, fused = tensors_of(tmp_path / "residual"), tensors_of(tmp_path / "fused")
    for name in fused:
        A, B = (trained[f"base_model.model.{name.removesuffix('.weight')}.lora_{side}.weight"] for side in "AB")
        # float32 throughout; the residual was rounded once more
        assert torch.allclose(fused[name], residual[name] + B @ A, atol=2e-6)
    (tmp_path / "adapter" / "svdbank.json").unlink()
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": method}))
    svdbank.fuse(model, tmp_path / "adapter", tmp_path / "again", bank=bank.path)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "fused" / "model.safetensors").read_bytes()
    with pytest.raises(BankError, match="needs the bank"):
        svdbank.fuse(model, tmp_path / "adapter", tmp_path / "no")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"target_modules": ["q_proj"], "use_dora": True}, "DoRA"),
    "biases": ({"target_modules": ["q_proj"], "bias": "all"}, "biases"),
    "trained tokens": ({"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, "trained tokens"),
    "a tied head": ({"target_modules": ["q_proj", "lm_head"]}, "one tensor"),
    "a tied embedding": ({"target_modules": ["embed_tokens"]}, "one tensor"),
    "a whole tied head": ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "lm_head.*cannot be carried over"),
    "a whole tied embedding": (
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        "embed_tokens.*are one tensor",
    ),
    "a changed base": ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "olora"),
}


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_sum_on_this_base_is_refused_with_the_reason(kind: str, tmp_path: Path) -> None:
    config, why = REFUSED[kind]
    base = saved(small_model("llama-tied"), tmp_path / "base")
    adapter(small_model("llama-tied"), tmp_path / "adapter", **config)
    with pytest.raises((OptionError, CheckpointError), match=why) as caught:
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    assert caught.value.hint
    assert not (tmp_path / "fused").exists()


def test_an_adapter_of_another_model_or_of_nothing_is_an_error_before_the_work(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    adapter(small_model("gpt2"), tmp_path / "gpt2", target_modules=["c_attn"], fan_in_fan_out=True)
    adapter(small_model("llama-untied", intermediate_size=96), tmp_path / "narrow", target_modules=["up_proj"])
    adapter(small_model("llama-untied"), tmp_path / "zero", target_modules=["q_proj"], size=0.0)
    for name, why in {"gpt2": "this model lacks.*c_attn", "zero": "changes nothing"}.items():
        with pytest.raises(OptionError, match=why):
            svdbank.fuse(base, tmp_path / name, tmp_path / "fused")
    with pytest.raises(WrongBaseError, match=r"160×64.*96×64"):
        svdbank.fuse(base, tmp_path / "narrow", tmp_path / "fused")
    for place in (base, tmp_path / "zero"):
        with pytest.raises(OptionError, match="lies inside"):
            svdbank.fuse(base, tmp_path / "zero", place / "fused")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(OptionError, match="not an empty folder"):
        svdbank.fuse(base, tmp_path / "gpt2", tmp_path / "used")
    assert not (tmp_path / "fused").exists()


def test_a_resized_vocabulary_is_refused(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    grown = small_model("llama-untied")
    grown.resize_token_embeddings(1216)  # type: ignore[operator]
    adapter(grown, tmp_path / "adapter", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(OptionError, match="vocabulary that was resized"):
        svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
