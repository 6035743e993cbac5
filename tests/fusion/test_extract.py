"""``extract`` gives the best LoRA of a difference, and says how good that is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.adapter.reading import read_adapter
from svdbank.core.errors import NotFiniteError, OptionError
from svdbank.fusion.approximation import best_factors
from tests.building.small import write_small_checkpoint
from tests.fusion.conftest import adapter, logits, reloaded, saved, small_model, tensors_of

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40)])
@pytest.mark.parametrize("rank", [1, 7, 30])
def test_no_matrix_of_that_rank_keeps_more(shape: tuple[int, int], rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    D = torch.randn(shape, generator=generator, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(shape[1]).double())
    best = best_factors(D, rank)
    sigma = torch.linalg.svdvals(D)
    energy = float(sigma.square().sum())
    # float32 factors: each entry is off by 2⁻²⁴, of squares twice that
    assert abs(best.kept - float(sigma[:rank].square().sum())) < 1e-6 * energy
    # a bound up to the rounding of the float64 sums themselves
    assert -1e-13 * energy <= best.best - float(sigma[:rank].square().sum()) <= 1e-10 * energy
    assert torch.allclose(best.sigma, sigma[:rank], rtol=1e-7)
    assert torch.allclose(best.A.norm(dim=1), best.B.norm(dim=0), rtol=1e-5)


def test_a_difference_of_less_rank_gives_factors_of_that_rank_and_is_kept_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    D = torch.randn(40, 3, generator=generator).double() @ torch.randn(3, 60, generator=generator).double()
    best = best_factors(D, 16)
    assert best.A.shape == (3, 60)
    assert best.B.shape == (40, 3)
    assert best.kept > (1 - 1e-12) * best.energy


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama-untied", {"target_modules": "all-linear"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "experts": ("mixtral", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_fuse_added_extract_finds_again_and_peft_loads_it(kind: str, tmp_path: Path) -> None:
    name, config = KINDS[kind]
    base = saved(small_model(name), tmp_path / "base")
    expected = logits(adapter(small_model(name), tmp_path / "adapter", **config))
    svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    report = svdbank.extract(base, tmp_path / "fused", output=tmp_path / "extracted", rank=4)
    one, other = read_adapter(tmp_path / "adapter"), read_adapter(tmp_path / "extracted")
    assert (
        set(one.weights) == set(other.weights) == {w.module if w.name.endswith(".weight") else w.name for w in report.weights}
    )
    # float32 weights of norm far above that of ΔW: their rounding is what the difference holds besides
    assert (one - other).norm() < 1e-4 * one.norm()
    assert report.kept > 1 - 1e-8
    loaded = peft.PeftModel.from_pretrained(small_model(name), tmp_path / "extracted").eval()
    assert float((logits(loaded) - expected).abs().max()) < 1e-4


def test_what_is_equal_is_left_out_and_what_no_lora_holds_is_named(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["v_proj"], modules_to_save=["norm"])
    svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused")
    report = svdbank.extract(base, tmp_path / "fused", output=tmp_path / "extracted", rank=4)
    assert {weight.module.rpartition(".")[2] for weight in report.weights} == {"v_proj"}
    assert len(report.equal) == 18
    assert report.outside == tuple(sorted(name for name in tensors_of(base) if "norm" in name))
    assert report.minor is None
    with pytest.raises(OptionError, match="the same to the bit"):
        svdbank.extract(base, tmp_path / "fused", output=tmp_path / "no", targets="q_proj")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_values_in_another_dtype_are_no_difference(dtype: str, tmp_path: Path) -> None:
    base = saved(small_model("llama-untied", dtype=torch.bfloat16), tmp_path / "base")
    adapter(small_model("llama-untied"), tmp_path / "adapter", target_modules=["v_proj"])
    svdbank.fuse(base, tmp_path / "adapter", tmp_path / "fused", dtype=dtype)
    targets = ("q_proj", "v_proj")
    report = svdbank.extract(base, tmp_path / "fused", output=tmp_path / "extracted", rank=4, targets=targets)
    assert report.outside == () and all(weight.module.endswith("v_proj") for weight in report.weights)
    file = tmp_path / "fused" / "model.safetensors"
    tensors = load_file(file)
    tensors["model.norm.weight"][0] += 2**-7  # the spacing of bfloat16 at 1
    tensors["model.layers.0.self_attn.k_proj.weight"][-1, -1] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    report = svdbank.extract(base, tmp_path / "fused", output=tmp_path / "again", rank=4, targets=targets)
    assert report.outside == ("model.layers.0.self_attn.k_proj.weight", "model.norm.weight")


def test_the_share_in_the_minor_subspace_is_one_for_mica_and_small_for_noise(minilm: Path, tmp_path: Path) -> None:
    model = write_small_checkpoint(tmp_path / "model", minilm)
    bank = svdbank.build(model, tmp_path / "bank", rank=8)
    svdbank.init(bank, output=tmp_path / "adapter", rank=4)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: torch.ones_like(t) * 0.01 if "lora_A" in n else t for n, t in load_file(file).items()}, file)
    svdbank.fuse(model, tmp_path / "adapter", tmp_path / "fused")
    report = svdbank.extract(model, tmp_path / "fused", output=tmp_path / "extracted", rank=4, bank=bank)
    assert report.bank_rank == 8
    assert report.minor == pytest.approx(1, abs=1e-6)
    assert report.minor_kept == pytest.approx(1, abs=1e-6)
    noisy = tmp_path / "noisy"
    noisy.mkdir()
    (noisy / "config.json").write_text((model / "config.json").read_text())
    generator = torch.Generator().manual_seed(0)
    save_file(
        {n: t + torch.randn(t.shape, generator=generator) for n, t in tensors_of(model).items()}, noisy / "model.safetensors"
    )
    report = svdbank.extract(model, noisy, output=tmp_path / "noise", rank=4, bank=str(bank.path))
    # 8 of 24 directions of a random matrix
    assert report.minor == pytest.approx(8 / 24, abs=0.1)


HEAD, EMBEDDING = "lm_head", "model.embed_tokens"


@pytest.mark.parametrize(
    ("one", "other", "targets", "held", "outside"),
    [
        ("tied", "tied, moved", [EMBEDDING], [EMBEDDING], [f"{HEAD}.weight"]),
        ("tied", "tied, moved", [HEAD], [HEAD], [f"{EMBEDDING}.weight"]),
        ("tied", "tied, moved", [EMBEDDING, HEAD], [EMBEDDING, HEAD], []),
        ("tied", "head moved", [HEAD], [HEAD], []),
        ("tied", "both moved", [HEAD], [HEAD], [f"{EMBEDDING}.weight"]),
        ("tied", "both moved", [EMBEDDING, HEAD], [EMBEDDING, HEAD], []),
        ("both moved", "tied", [EMBEDDING, HEAD], [EMBEDDING, HEAD], []),
    ],
)
def test_a_tied_embedding_and_head_are_two_weights_and_what_the_adapter_lacks_of_them_is_named(
    one: str, other: str, targets: list[str], held: list[str], outside: list[str], tmp_path: Path
) -> None:
    models = {name: _ends(name) for name in {one, other}}
    base, finetuned = (saved(models[name], tmp_path / name) for name in (one, other))
    report = svdbank.extract(base, finetuned, output=tmp_path / "extracted", rank=64, targets=targets)
    assert sorted(weight.module for weight in report.weights) == sorted(held)
    assert report.outside == tuple(outside)
    assert report.kept > 1 - 1e-10
    loaded = peft.PeftModel.from_pretrained(reloaded(base), tmp_path / "extracted").eval()
    off = float((logits(loaded) - logits(models[other])).abs().max())
    # the whole difference is there exactly where nothing is named
    assert off < 1e-4 if not outside else off > 0.1


def _ends(name: str) -> Any:
    model: Any = small_model("llama-tied")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        if "tied" not in name:
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            model.config.tie_word_embeddings = False
        moved = {"head moved": [model.lm_head], "both moved": [model.lm_head, model.model.embed_tokens]}
        for module in moved.get(name, [model.lm_head] if "moved" in name else []):
            module.weight += 0.1 * torch.randn(module.weight.shape, generator=generator)
    return model


def test_a_larger_vocabulary_is_no_matter_to_the_modules_that_are_named(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    finetuned: Any = adapter(small_model("llama-untied"), tmp_path / "adapter", size=0.1).merge_and_unload()
    expected = logits(finetuned)
    finetuned.resize_token_embeddings(1216)
    saved(finetuned, tmp_path / "grown")
    report = svdbank.extract(base, tmp_path / "grown", output=tmp_path / "out", rank=4, targets=["q_proj", "v_proj"])
    assert report.outside == ("lm_head.weight", "model.embed_tokens.weight")
    loaded = peft.PeftModel.from_pretrained(reloaded(base), tmp_path / "out").eval()
    assert float((logits(loaded) - expected).abs().max()) < 1e-4
    with pytest.raises(OptionError, match=r"1200×64.*1216×64.*vocabulary"):
        svdbank.extract(base, tmp_path / "grown", output=tmp_path / "no", targets=["q_proj", "lm_head"])


def test_a_module_that_is_never_called_is_named_and_not_in_the_adapter(tmp_path: Path) -> None:
    base = saved(small_model("t5"), tmp_path / "base")
    finetuned: Any = small_model("t5")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in (finetuned.shared.weight, finetuned.encoder.block[0].layer[0].SelfAttention.q.weight):
            weight += 0.1 * torch.randn(weight.shape, generator=generator)
    saved(finetuned, tmp_path / "finetuned")
    report = svdbank.extract(base, tmp_path / "finetuned", output=tmp_path / "out", rank=64, targets=[r"shared|.*\.q"])
    assert [weight.module for weight in report.weights] == ["encoder.block.0.layer.0.SelfAttention.q"]
    assert report.outside == ("lm_head.weight", "shared.weight")


def test_settings_that_differ_are_named(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    finetuned: Any = adapter(small_model("llama-untied"), tmp_path / "adapter").merge_and_unload()
    finetuned.config.rms_norm_eps, finetuned.config.use_cache, finetuned.config.bos_token_id = 1e-2, False, 7
    saved(finetuned, tmp_path / "finetuned")
    report = svdbank.extract(base, tmp_path / "finetuned", output=tmp_path / "out", rank=4)
    assert report.settings == ("rms_norm_eps",)
    with pytest.raises(OptionError, match="same to the bit") as caught:
        svdbank.extract(base, tmp_path / "finetuned", output=tmp_path / "no", targets="o_proj")
    assert "model.layers.0.self_attn.q_proj.weight" in str(caught.value.hint)


def test_models_that_do_not_correspond_are_refused(tmp_path: Path) -> None:
    base = saved(small_model("llama-untied"), tmp_path / "base")
    grown = small_model("llama-untied")
    grown.resize_token_embeddings(1216)  # type: ignore[operator]
    saved(grown, tmp_path / "grown")
    saved(small_model("gpt2"), tmp_path / "gpt2")
    saved(small_model("llama-untied", intermediate_size=96), tmp_path / "narrow")
    for name, why in {
        "grown": "1200×64.*1216×64.*vocabulary",
        "gpt2": "not of one architecture",
        "narrow": "64×160.*64×96",
    }.items():
        with pytest.raises(OptionError, match=why):
            svdbank.extract(base, tmp_path / name, output=tmp_path / "extracted")
    broken = {n: t.clone() for n, t in tensors_of(base).items()}
    broken["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text((base / "config.json").read_text())
    save_file(broken, tmp_path / "broken" / "model.safetensors")
    with pytest.raises(NotFiniteError, match=r"layers\.0\.self_attn\.q_proj"):
        svdbank.extract(base, tmp_path / "broken", output=tmp_path / "extracted")
    assert not (tmp_path / "extracted").exists()
