"""For each architecture: build from what ``save_pretrained`` wrote, attach, train a step; B spans what PEFT's own initialisation spans."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.basis import unresolved_ranks
from svdbank.core.errors import BankError, WrongBaseError
from svdbank.peft import attachment, get_peft_model
from tests.building.test_accuracy import BOUND
from tests.building.test_accuracy import sine as exact_sine
from tests.checkpoint.small_models import STACKED_IN_OUT, WITH_EXPERTS, configurations, load
from tests.peft.models import factors, float32_angle, lora_layers, mica, only_a_trains, quiet, sine
from tests.peft.test_experts import expert_b, wrappers

RANK = 4
#: More than the rank attached: the gap behind it says how well the subspace is determined.
STORED = 8

DENSE = (
    "llama-tied",
    "qwen3",
    "gemma3",
    "phi3",
    "gpt2",
    "mistral",
    "bert-masked",
    "vit",
    "siglip",
    "t5",
    "llava",
    "gemma3-vision",
)

#: Stacked parameters, for ``target_parameters``.
FUSED = [(name, parameter) for name in WITH_EXPERTS for parameter in ("experts.gate_up_proj", "experts.down_proj")]

Saved = Callable[[str], tuple[Path, Bank]]


@pytest.fixture(scope="session")
def saved() -> Iterator[Saved]:
    """Folder and bank of a small model, made at the first call; ``name:bf16`` for one saved in bfloat16.

    In memory where the system has such a folder: what these builds fsync nobody needs.
    """
    made: dict[str, tuple[Path, Bank]] = {}
    shared = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

    def get(name: str) -> tuple[Path, Bank]:
        if name not in made:
            root = Path(folder) / name.replace(":", "-")
            model = load(name.partition(":")[0])
            side = "both" if name in WITH_EXPERTS else "left"
            with quiet():
                (model.to(torch.bfloat16) if name.endswith(":bf16") else model).save_pretrained(root / "model")
            made[name] = root / "model", svdbank.build(root / "model", root / "bank", rank=STORED, side=side)
        return made[name]

    with tempfile.TemporaryDirectory(dir=shared) as folder:
        yield get


def loaded(name: str, folder: Path) -> nn.Module:
    kind, _ = configurations()[name.partition(":")[0]]
    with quiet():
        return kind.from_pretrained(folder, dtype="auto")


def attention_of(model: nn.Module) -> list[str]:
    """Linear modules outside the mixtures of experts, whose names PEFT turns into parameters."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and ".self_attn." in name]


def settings(name: str, model: nn.Module) -> Any:
    options: dict[str, Any] = {"fan_in_fan_out": True} if name.startswith("gpt2") else {}
    if name == "vit":
        options["exclude_modules"] = ["classifier"]  # two rows: no rank of 4
    if name.partition(":")[0] in WITH_EXPERTS:
        options["target_modules"] = attention_of(model)
    return mica(RANK, **options)


def loss(name: str, model: nn.Module) -> Tensor:
    """One forward pass of a batch that the model understands; with an image where it takes images."""
    tokens = torch.arange(20, 32)[None]
    image = torch.linspace(-1, 1, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with_image = torch.cat([torch.full((1, 4), 1100), tokens], dim=1)
    if name == "vit":
        return model(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32), labels=torch.tensor([1])).loss
    if name == "siglip":
        return model(pixel_values=torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)).pooler_output.square().mean()
    if name == "gemma3-vision":
        kinds = (with_image == 1100).long()
        return model(input_ids=with_image, pixel_values=image, labels=with_image, token_type_ids=kinds).loss
    if name.startswith("llava"):
        return model(input_ids=with_image, pixel_values=image.to(model.dtype), labels=with_image).loss
    return model(input_ids=tokens, labels=tokens).loss


@pytest.mark.parametrize("name", [*DENSE, *WITH_EXPERTS, "llama-tied:bf16", "mixtral:bf16"])
def test_b_spans_what_pefts_own_init_spans_and_one_step_moves_only_a(name: str, saved: Saved) -> None:
    folder, bank = saved(name)
    model = loaded(name, folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT on tied weights and fan_in_fan_out
        theirs = lora_layers(peft.get_peft_model(loaded(name, folder), settings(name, model)))
        model = get_peft_model(model, settings(name, model), bank=bank)
    ours = lora_layers(model)
    assert list(ours) == list(theirs) and len(ours) >= 4
    found = attachment(model)
    assert found.state == "verified"
    # The module's own name, without any renaming: what is in the bank is what the model has.
    assert list(found.weights) == [f"{module}.weight" for module in ours]
    # Both sides round B to the weight's dtype: a half unit in each of r unit columns.
    rounding = 2 * 2**-9 * RANK**0.5 if name.endswith(":bf16") else 0.0
    for module, layer in ours.items():
        angle = sine(factors(layer)[1], factors(theirs[module])[1])
        assert angle <= float32_angle(bank, f"{module}.weight", RANK) + rounding, module
    assert only_a_trains(model)
    before = {module: factors(layer)[1].clone() for module, layer in ours.items()}
    step = loss(name.partition(":")[0], model.train())
    assert torch.isfinite(step)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    step.backward()
    optimizer.step()
    moved = [module for module, layer in ours.items() if factors(layer)[0].any()]
    assert len(moved) > len(ours) // 2  # LLaVA takes its features before the tower's last layer
    assert all(torch.equal(factors(layer)[1], before[module]) for module, layer in ours.items())


@pytest.mark.parametrize("name, parameter", FUSED)
def test_an_experts_basis_is_that_of_its_slice_of_the_loaded_parameter(name: str, parameter: str, saved: Saved) -> None:
    folder, bank = saved(name)
    held = [basis for weight in bank if (basis := bank[weight]).module.endswith("." + parameter)]
    for path, stacked in loaded(name, folder).named_parameters():
        if not path.endswith("." + parameter):
            continue
        own = {basis.record.expert: basis for basis in held if basis.module == path}
        assert sorted(own) == list(range(len(stacked)))
        for expert, basis in own.items():
            matrix = stacked[expert].detach().double()
            U, S, Vh = torch.linalg.svd(matrix.mT if name in STACKED_IN_OUT else matrix, full_matrices=False)
            assert (basis.out_features, basis.in_features) == (len(U), Vh.shape[1])
            unresolved = unresolved_ranks(basis.sigma(STORED).flip(0).tolist(), basis.certificate.sigma_next, float(S[0]))
            assert RANK not in unresolved
            assert exact_sine(basis.left(RANK).double(), U[:, -RANK:]) <= BOUND
            assert exact_sine(basis.right(RANK).double(), Vh[-RANK:].mT) <= BOUND
            held.remove(basis)
    assert held == []


@pytest.mark.parametrize("name", [name for name in WITH_EXPERTS if name != "llama4"])
def test_experts_through_target_parameters_hold_the_banks_directions_and_one_step_moves_only_a(name: str, saved: Saved) -> None:
    """Where PEFT refuses mica: the freeze is ours."""
    folder, bank = saved(name)
    parameters = [f"experts.{part}" for part in ("gate_up_proj", "down_proj")]
    config = mica(RANK, target_modules=attention_of(loaded(name, folder)), target_parameters=parameters)
    with pytest.raises(ValueError, match="variant"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        peft.get_peft_model(loaded(name, folder), config)
    model = get_peft_model(loaded(name, folder), config, bank=bank)
    assert attachment(model).state == "verified"
    layers = wrappers(model)
    assert layers and only_a_trains(model)
    for path, layer in layers.items():
        stacked = layer.get_param().detach()
        for expert, matrix in enumerate(stacked.mT if name in STACKED_IN_OUT else stacked):
            own = bank[f"{path}.{expert}"].left(RANK)
            assert torch.equal(expert_b(layer, expert), own)
            U = torch.linalg.svd(matrix.double(), full_matrices=False)[0]
            assert exact_sine(own.double(), U[:, -RANK:]) <= BOUND
    before = {path: layer.lora_B["default"].weight.clone() for path, layer in layers.items()}
    step = loss(name, model.train())
    step.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    assert all(torch.equal(layer.lora_B["default"].weight, before[path]) for path, layer in layers.items())
    assert all(layer.lora_A["default"].weight.any() for layer in layers.values())
    assert only_a_trains(model)


def test_experts_whose_sides_peft_exchanges_are_refused_as_not_supported(saved: Saved) -> None:
    """Llama-4: PEFT reads (E, in, out) as (E, out, in)."""
    folder, bank = saved("llama4")
    model = loaded("llama4", folder)
    config = mica(RANK, target_modules=attention_of(model), target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    with pytest.raises(BankError, match="the other way round") as caught:
        get_peft_model(model, config, bank=bank)
    assert caught.value.hint and "not supported" in caught.value.hint


def test_a_tied_embedding_and_head_are_attached_from_one_stored_svd(saved: Saved, tmp_path: Path) -> None:
    folder, _ = saved("llama-tied")
    bank = svdbank.build(folder, tmp_path / "bank", rank=STORED, targets=("embed_tokens", "lm_head"))
    assert bank["lm_head.weight"].exchanged
    config = mica(RANK, target_modules=["embed_tokens", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # PEFT: adapters on tied layers cannot be merged
        theirs = lora_layers(peft.get_peft_model(loaded("llama-tied", folder), config))
        model = get_peft_model(loaded("llama-tied", folder), config, bank=bank)
        ours = lora_layers(model)
        assert attachment(model).state == "verified" and list(ours) == ["model.embed_tokens", "lm_head"]
        for module, layer in ours.items():
            B = factors(layer)[1]
            assert len(B) == {"lm_head": 1200, "model.embed_tokens": 64}[module]
            assert sine(B, factors(theirs[module])[1]) <= float32_angle(bank, f"{module}.weight", RANK)
        other = loaded("llama-tied", folder)
        with torch.no_grad():
            other.get_input_embeddings().weight.add_(1e-3)
        with pytest.raises(WrongBaseError, match="lm_head"):
            get_peft_model(other, mica(RANK, target_modules=["lm_head"]), bank=bank)
