"""MiLoRA and PiSSA: part of the base moves into the adapter, and the sum stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import svdbank
from svdbank.adapter.methods import initial_factors, restored, restored_alpha
from svdbank.bank.reading import Bank
from svdbank.core.errors import BankError, OptionError, WrongBaseError
from svdbank.peft import attachment, get_peft_model, load_adapter, use_bank
from tests.peft.models import factors, lora_layers, mica, place, quiet, same, trainable, without_svd

Load = Callable[..., nn.Module]
TOKENS = torch.arange(1000, 1032).reshape(2, 16)
METHODS = ["milora", "pissa"]
UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9}  # unit roundoff: half the distance of 1 to its neighbour


def config(method: str, rank: int = 6, **options: Any) -> Any:
    return mica(rank, init_lora_weights=method, **options)


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(TOKENS.to(place(model))).last_hidden_state.cpu()


def logical(layer: Any, weight: Tensor) -> Tensor:
    """(out, in) of a base weight as it lies in memory, on the CPU."""
    weight = weight.detach().cpu()
    embedding = bool(len(layer.lora_embedding_A))
    return weight.T if embedding or getattr(layer, "fan_in_fan_out", False) else weight


def triplets(bank: Bank, name: str, rank: int, method: str) -> tuple[Tensor, Tensor, Tensor]:
    if method == "pissa":
        return tuple(
            read([name], rank)[name].double() for read in (bank.principal_left, bank.principal_sigma, bank.principal_right)
        )
    return tuple(read([name], rank)[name].double() for read in (bank.left, bank.sigma, bank.right))


def mixing(sigma: Tensor, rank: int) -> float:
    """Angle by which PEFT's float32 SVD may turn the ``rank`` largest directions into the others: its rounding over the gap (Wedin).

    ``sigma`` descends. Rounding is 32 ε σ_1: LAPACK promises a modest multiple of ε σ_1 without saying which (seen on MiniLM: up to 1), and
    every processor has its own.
    """
    return 32 * torch.finfo(torch.float32).eps * float(sigma[0] / (sigma[rank - 1] - sigma[rank]))


VARIANTS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "rank_pattern": {"target_modules": ["query", "key"], "rank_pattern": {"query": 4, "layer.1.attention.self.key": 8}},
    "alpha_pattern": {"target_modules": ["query", "key"], "alpha_pattern": {"key": 3}, "lora_alpha": 16},
    "rslora": {"target_modules": ["query"], "use_rslora": True},
    "layers_to_transform": {"target_modules": ["query"], "layers_to_transform": [1, 3]},
    "exclude_modules": {"target_modules": ["query", "value"], "exclude_modules": ["layer.0.attention.self.query", "value"]},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("method", METHODS)
def test_the_adapter_holds_the_banks_triplets_and_the_base_the_rest(
    method: str, variant: str, bert: Load, minilm_bank: Bank, no_svd: list[str]
) -> None:
    base = {name: p.detach().clone() for name, p in bert().named_parameters()}
    model = get_peft_model(bert(), config(method, **VARIANTS[variant]), bank=minilm_bank)
    layers = lora_layers(model)
    assert attachment(model).method == method and len(attachment(model).weights) == len(layers)
    plain = lora_layers(peft.get_peft_model(bert(), mica(6, init_lora_weights=True, **VARIANTS[variant])))
    assert {m: (layer.r, layer.scaling) for m, layer in layers.items()} == {m: (p.r, p.scaling) for m, p in plain.items()}
    for module, layer in layers.items():
        A, B = factors(layer)
        assert A.requires_grad and B.requires_grad and A.dtype == B.dtype == torch.float32
        A, B = A.detach().cpu(), B.detach().cpu()
        U, sigma, V = triplets(minilm_bank, f"{module}.weight", layer.r["default"], method)
        part = layer.scaling["default"] * B.double() @ A.double()
        # A and B are rounded once to float32, each by 2^-24 of an entry at most.
        assert (part - U @ sigma.diag() @ V.T).norm() <= 4 * 2.0**-24 * sigma.norm()
        W, rest = (logical(layer, w).double() for w in (base[f"{module}.weight"], layer.get_base_layer().weight))
        # One rounding of W' to float32, and a float32 dot product of length r (Higham, γ_r) before it.
        allowed = (
            (layer.r["default"] + 2) * 2.0**-24 * (W.abs() + layer.scaling["default"] * B.double().abs() @ A.double().abs())
        )
        assert ((rest + part - W).abs() <= allowed).all(), module
    assert {n.split(".")[-3] for n in trainable(model) if "embedding_" not in n} <= {"lora_A", "lora_B"}


@pytest.mark.parametrize("method", METHODS)
def test_transformers_conv1d_loses_its_part_in_its_own_orientation(method: str, device: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=16, n_embd=24, n_layer=2, n_head=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with quiet():
        model.save_pretrained(tmp_path / "gpt2")
    bank = svdbank.build(tmp_path / "gpt2", tmp_path / "bank", rank=8, principal=8, targets=("c_attn", "c_fc"), device="cpu")
    targets = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    layers = lora_layers(get_peft_model(model.to(device), config(method, 4, **targets), bank=bank))
    assert len(layers) == 4
    for module, layer in layers.items():
        W, rest = before[f"{module}.weight"], layer.get_base_layer().weight.cpu()
        U, sigma, V = triplets(bank, f"{module}.weight", 4, method)
        assert W.shape == (V.shape[0], U.shape[0])  # (in, out)
        # Rounded once to float32, after a float32 dot product of length 4.
        assert (rest + (U @ sigma.diag() @ V.T).T - W).abs().max() <= 8 * 2.0**-24 * (W.abs().max() + sigma[0]), module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_the_first_outputs_are_the_bases_within_rounding(
    method: str, dtype: torch.dtype, bert: Load, minilm_bank: Bank
) -> None:
    """The yardstick: what one unit in the last place of every adapted weight, up or down at random, does to the output."""
    reference = output(bert(dtype))
    shaken = bert(dtype)
    generator = torch.Generator().manual_seed(0)
    for module in shaken.encoder.modules():
        if isinstance(module, nn.Linear):
            sign = (torch.randint(0, 2, module.weight.shape, generator=generator) * 2 - 1).to(module.weight.device)
            module.weight.data = (module.weight.data.double() * (1 + 2 * UNIT[dtype] * sign)).to(dtype)
    yardstick = (output(shaken) - reference).float().norm()
    model = get_peft_model(bert(dtype), config(method, 8), bank=minilm_bank)
    # W' is rounded by half a unit at most; the sum W' x + s B A x once more for each of PEFT's three products.
    assert (output(model) - reference).float().norm() <= 2 * yardstick
    found = attachment(model)
    assert found.state == "verified"
    # Each entry is rounded by its unit roundoff at most, after a float32 sum, and the residual is no larger than the weight.
    assert 0 < found.rounding <= UNIT[dtype] + 10 * 2.0**-24


def test_milora_takes_out_the_smallest_and_pissa_the_largest(bert: Load, minilm_bank: Bank) -> None:
    name = "encoder.layer.0.attention.self.value.weight"
    sigma = torch.linalg.svdvals(bert().get_parameter(name).cpu().double())
    left = {
        method: torch.linalg.svdvals(
            lora_layers(get_peft_model(bert(), config(method, 8), bank=minilm_bank))[name.removesuffix(".weight")]
            .get_base_layer()
            .weight.cpu()
            .double()
        )
        for method in METHODS
    }
    tolerance = 1e-6 * float(sigma[0])  # W' is float32
    assert (left["milora"] - torch.cat([sigma[:-8], torch.zeros(8)])).abs().max() <= tolerance
    assert (left["pissa"] - torch.cat([sigma[8:], torch.zeros(8)])).abs().max() <= tolerance


def test_pissa_starts_where_pefts_own_starts(bert: Load, minilm_bank: Bank) -> None:
    ours = lora_layers(get_peft_model(bert(), config("pissa", 4, target_modules=["value"]), bank=minilm_bank))
    theirs = lora_layers(peft.get_peft_model(bert().cpu(), config("pissa", 4, target_modules=["value"])))
    for module, layer in ours.items():
        rival = theirs[module]
        sigma = triplets(minilm_bank, f"{module}.weight", 5, "pissa")[1]
        difference = layer.get_delta_weight("default").cpu() - rival.get_delta_weight("default")
        assert difference.norm() <= mixing(sigma, 4) * sigma.norm(), module
        assert layer.scaling == rival.scaling


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_after_training_plain_lora_of_twice_the_rank_on_the_unchanged_base_is_the_same_model(
    method: str, rslora: bool, bert: Load, minilm_bank: Bank
) -> None:
    model = get_peft_model(bert(), config(method, 4, lora_alpha=8, use_rslora=rslora), bank=minilm_bank)
    _train(model)
    alpha = restored_alpha(8, rslora=rslora)
    plain = peft.get_peft_model(bert(), mica(8, init_lora_weights=True, lora_alpha=alpha, use_rslora=rslora))
    start = lora_layers(plain)
    for module, layer in lora_layers(model).items():
        name = f"{module}.weight"
        U, sigma, V = triplets(minilm_bank, name, 4, method)
        largest = minilm_bank[name].certificate.sigma_max
        A0, B0 = initial_factors(method, U.float(), sigma, V.float(), layer.scaling["default"], sigma_max=largest)
        A, B = restored(*(factor.detach().cpu() for factor in factors(layer)), A0, B0)
        for factor, value in zip(factors(start[module]), (A, B), strict=True):
            assert factor.shape == value.shape
            factor.data.copy_(value)
    trained, exported, untouched = output(model), output(plain), output(bert())
    # What training changed is far above what rounding changes.
    assert (trained - untouched).norm() > 1e-2 * untouched.norm()
    assert (trained - exported).norm() <= 1e-5 * untouched.norm()


def test_a_saved_milora_adapter_reloads_to_the_bit_and_plain_peft_refuses_it(
    bert: Load, minilm_bank: Bank, tmp_path: Path, no_svd: list[str]
) -> None:
    model = get_peft_model(bert(), config("milora", 4), bank=minilm_bank)
    _train(model)
    model.save_pretrained(tmp_path / "a")
    again = load_adapter(bert(), tmp_path / "a", bank=minilm_bank)
    assert torch.equal(output(again), output(model))
    for module, layer in lora_layers(again).items():
        rival = lora_layers(model)[module]
        assert same(layer.get_base_layer().weight, rival.get_base_layer().weight)
        assert all(same(a, b) for a, b in zip(factors(layer), factors(rival), strict=True))
    # The same factors on the unchanged base would be another model. PEFT knows no such initialisation and says so.
    for low in (False, True):
        with pytest.raises(ValueError, match="milora"):
            peft.PeftModel.from_pretrained(bert(), tmp_path / "a", low_cpu_mem_usage=low)
    with pytest.raises(ValueError, match="milora"):
        bert().load_adapter(str(tmp_path / "a"))
    with pytest.raises(OptionError, match=r"belongs to the base without") as caught:
        load_adapter(bert(), tmp_path / "a")
    assert "export --to lora" in str(caught.value.hint)


def test_trainers_get_milora_too(bert: Load, minilm_bank: Bank, no_svd: list[str]) -> None:
    with use_bank(minilm_bank):
        model = peft.get_peft_model(bert(), config("MiLoRA", 4, target_modules=["query"]))
    assert attachment(model).method == "milora" and model.peft_config["default"].init_lora_weights == "milora"
    assert {name.split(".")[-3] for name in trainable(model)} == {"lora_A", "lora_B"}


def test_merging_a_fresh_milora_adapter_gives_the_base_back(bert: Load, minilm_bank: Bank) -> None:
    merged = get_peft_model(bert(), config("milora", 4), bank=minilm_bank).merge_and_unload()
    base = bert()
    # Two roundings of an entry: W' and the sum.
    assert all((p - base.get_parameter(n)).norm() <= 2 * 2.0**-24 * p.norm() for n, p in merged.named_parameters())


def test_a_base_that_lost_its_residual_is_not_shared(bert: Load, minilm_bank: Bank) -> None:
    changed = get_peft_model(bert(), config("milora", 4, target_modules=["query"]), bank=minilm_bank)
    with use_bank(minilm_bank):
        with pytest.raises(OptionError, match="milora moved into the adapter 'default'"):
            changed.add_adapter("second", mica(4))
        plain = get_peft_model(bert(), mica(4, target_modules=["value"]), bank=minilm_bank)
        with pytest.raises(OptionError, match="already there: default"):
            plain.add_adapter("second", config("milora", 4))
    assert list(plain.peft_config) == ["default"]


def test_weights_that_cannot_be_changed_are_refused(
    llama: Load, bert: Load, smollm2: Path, minilm_bank: Bank, tmp_path: Path
) -> None:
    bank = svdbank.build(smollm2, tmp_path / "bank", rank=4, side="both", targets=("embed_tokens",))
    with pytest.raises(OptionError, match="another module shares"):
        get_peft_model(llama(), config("milora", 4, target_modules=["embed_tokens"]), bank=bank)
    from transformers import AutoModel

    shape = bert().config
    with torch.device("meta"), quiet():
        empty = AutoModel.from_config(shape)
    with pytest.raises(OptionError, match=r"not loaded, first encoder\.layer\.0"):
        get_peft_model(empty, config("milora", 4), bank=minilm_bank)


def test_a_bank_without_the_side_a_method_needs_is_refused(bert: Load, minilm: Path, minilm_bank: Bank, tmp_path: Path) -> None:
    one = svdbank.build(minilm, tmp_path / "left", rank=4, side="left", targets=("query",))
    both = svdbank.build(minilm, tmp_path / "both", rank=4, side="both", targets=("query",))
    with pytest.raises(BankError, match="left and right vectors") as caught:
        get_peft_model(bert(), config("milora", 4, target_modules=["query"]), bank=one)
    assert "--side both" in str(caught.value.hint)
    with pytest.raises(BankError, match="holds the smallest only") as caught:
        get_peft_model(bert(), config("pissa", 4, target_modules=["query"]), bank=both)
    assert "--principal" in str(caught.value.hint)
    with pytest.raises(BankError, match="rank 9 was asked for, but the bank stores 8 of the 384 largest"):
        get_peft_model(bert(), config("pissa", 9), bank=minilm_bank)


@pytest.mark.parametrize("option", [{"use_dora": True}])
def test_combinations_without_a_meaning_are_refused(option: dict[str, Any], bert: Load, minilm_bank: Bank) -> None:
    for method in ("mica", "milora", "pissa"):
        with pytest.raises(OptionError, match="use_dora cannot be combined"):
            get_peft_model(bert(), config(method, 4, **option), bank=minilm_bank)


def _train(model: nn.Module, steps: int = 3) -> None:
    """A few steps towards a fixed random target: enough to move A and B well away from their start."""
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(*TOKENS.shape, 384, generator=generator).to(place(model))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        (model.eval()(TOKENS.to(place(model))).last_hidden_state - target).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["milora", "pissa"])
def test_a_folder_of_init_gives_the_base_s_outputs_or_an_error(
    method: str, bert: Load, device: str, minilm: Path, minilm_bank: Bank, tmp_path: Path
) -> None:
    options = {"rank": 8, "method": method, "targets": ("query", "value")}
    svdbank.init(minilm_bank, output=tmp_path / "fresh", **options)
    svdbank.init(minilm_bank, output=tmp_path / "beside", residual_out=tmp_path / "residual", base_model=str(minilm), **options)
    expected = output(bert())
    for folder in ("fresh", "beside"):
        with without_svd():
            model = load_adapter(bert(), tmp_path / folder, bank=minilm_bank)
        assert attachment(model).method == method and attachment(model).state == "verified"
        # The base was rounded to float32 once, and six layers of sums run in another order.
        assert (output(model) - expected).abs().max() <= 2e-5
    with pytest.raises(OptionError, match="belongs to the base without"):
        load_adapter(bert(), tmp_path / "fresh")
    if method == "milora":
        for low in (False, True):
            with pytest.raises(ValueError, match="milora"):
                peft.PeftModel.from_pretrained(bert(), tmp_path / "fresh", low_cpu_mem_usage=low)
    else:  # PEFT has PiSSA: it decomposes again, and is right as far as its own float32 goes
        with quiet():
            plain = peft.PeftModel.from_pretrained(bert(), tmp_path / "fresh")
        base = bert()
        for module, layer in lora_layers(plain).items():
            W = base.get_parameter(f"{module}.weight").double()
            whole = layer.get_base_layer().weight.double() + layer.get_delta_weight("default").double()
            sigma = torch.linalg.svdvals(W)
            assert (whole - W).norm() <= mixing(sigma, 8) * sigma[:8].norm(), module
    from transformers import AutoModel

    with quiet():
        residual = AutoModel.from_pretrained(tmp_path / "residual").to(device)
    with pytest.raises(WrongBaseError) as caught:
        load_adapter(residual, tmp_path / "beside", bank=minilm_bank)
    assert "leave bank= out" in str(caught.value.hint)
    assert (output(load_adapter(residual, tmp_path / "beside")) - expected).abs().max() <= 2e-5
