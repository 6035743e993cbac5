"""Attaching to a model on a pretended device: a copy there of what the bank holds, one answer back, and it trains."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

import svdbank
import svdbank.peft
from svdbank.bank.reading import Bank
from svdbank.training.attaching import attach
from svdbank.training.options import TrainOptions
from svdbank.training.writing import initial_factors, write_adapter
from tests.discipline.allowed import ALLOWED
from tests.discipline.conftest import RANK
from tests.discipline.pretended import HEADING, OnDevice, PretendedDevice
from tests.peft.models import factors, lora_layers, only_a_trains, quiet, without_svd
from tests.peft.test_experts import mixtral

#: Linear weights of the model below.
WEIGHTS = 14

_TABLE: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def _table() -> Iterator[None]:
    """What was counted, for whoever asks with -s."""
    yield
    print("", HEADING, *_TABLE, sep="\n")


@pytest.fixture
def model(llama: Path) -> nn.Module:
    """The model on the CPU. Attention in steps: torch's fused kernels make their masks in C++, where no wrapper reaches."""
    from transformers import LlamaForCausalLM

    with quiet():
        loaded: nn.Module = LlamaForCausalLM.from_pretrained(llama, dtype=torch.bfloat16, attn_implementation="eager")
    return loaded


def config(method: str) -> Any:
    return LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", init_lora_weights=method)


@pytest.mark.parametrize("method", ["mica", "milora", "pissa"])
def test_attaching_puts_the_same_numbers_on_the_device_as_on_the_cpu(
    method: str, model: nn.Module, bank: Bank, pretended: PretendedDevice
) -> None:
    here = svdbank.peft.get_peft_model(copy.deepcopy(model), config(method), bank=bank)
    pretended.put_model(model)
    with pretended.counting() as counts, without_svd():
        there = svdbank.peft.get_peft_model(model, config(method), bank=bank)
    _TABLE.append(counts.row(f"{method}, {WEIGHTS} weights"))
    assert svdbank.peft.attachment(there).state == "verified"
    assert svdbank.peft.attachment(there).rounding == svdbank.peft.attachment(here).rounding
    assert all(isinstance(parameter.data, OnDevice) for parameter in there.parameters())
    for (name, one), (other, two) in zip(here.named_parameters(), there.named_parameters(), strict=True):
        assert name == other and one.requires_grad == two.requires_grad and one.dtype == two.dtype
        assert torch.equal(one.detach(), two.detach().cpu()), name


@pytest.mark.parametrize("method, answers", [("mica", 1), ("milora", 2), ("pissa", 2)])
def test_how_often_the_host_waits_does_not_grow_with_the_weights(
    method: str, answers: int, model: nn.Module, bank: Bank, pretended: PretendedDevice
) -> None:
    """One copy of probed values a dtype; what rounding lost, once."""
    pretended.put_model(model)
    with pretended.counting() as counts:
        svdbank.peft.get_peft_model(model, config(method), bank=bank)
    assert counts.synchronisations == answers, dict(counts.syncs)
    sizes = [A.numel() + B.numel() for A, B in map(factors, lora_layers(model).values())]
    assert len(sizes) == WEIGHTS
    # float32 factors cross once, for the residual a second time; on top of it index tensors of the probe, 8 bytes an entry.
    probes = 64 * 2**10
    assert counts.to_device <= (1 if method == "mica" else 2) * 4 * sum(sizes) + probes
    # Values that the bank has for comparison: at most a kilobyte a weight.
    assert counts.to_host <= WEIGHTS * 2**10 + 8


def test_fused_experts_are_attached_there_as_on_the_cpu(pretended: PretendedDevice, tmp_path: Path) -> None:
    with quiet():
        mixtral().save_pretrained(tmp_path / "model")
    targets = ("q_proj", "gate_up_proj", "down_proj")
    bank = svdbank.build(tmp_path / "model", tmp_path / "bank", rank=RANK, targets=targets, device="cpu")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    for method, answers in (("mica", 1), ("milora", 2)):
        options = LoraConfig(r=4, lora_alpha=4, target_modules=["q_proj"], target_parameters=experts, init_lora_weights=method)
        here = svdbank.peft.get_peft_model(mixtral(), options, bank=bank)
        model = pretended.put_model(mixtral())
        with pretended.counting() as counts:
            there = svdbank.peft.get_peft_model(model, options, bank=bank)
        _TABLE.append(counts.row(f"{method}, experts"))
        assert counts.synchronisations == answers and svdbank.peft.attachment(there).state == "verified"
        for one, two in zip(here.parameters(), there.parameters(), strict=True):
            assert torch.equal(one.detach(), two.detach().cpu())


def test_an_adapter_is_loaded_to_where_its_base_lies(
    model: nn.Module, bank: Bank, tmp_path: Path, pretended: PretendedDevice
) -> None:
    svdbank.init(bank, rank=RANK, output=tmp_path / "a")
    with pretended.counting() as counts:
        there = svdbank.peft.load_adapter(pretended.put_model(model), tmp_path / "a", bank=bank)
    _TABLE.append(counts.row("load_adapter"))
    assert only_a_trains(there)
    for module, layer in lora_layers(there).items():
        assert isinstance(factors(layer)[1].data, OnDevice)
        assert torch.equal(factors(layer)[1].detach().cpu(), bank[f"{module}.weight"].left(RANK))


def test_mica_needs_no_float64_of_the_device(model: nn.Module, bank: Bank) -> None:
    with PretendedDevice(ALLOWED, float64=False).present() as single:
        single.put_model(model)
        attached = svdbank.peft.get_peft_model(model, config("mica"), bank=bank)
        assert only_a_trains(attached)


@pytest.mark.parametrize("method", ["mica", "milora"])
def test_what_was_attached_trains_there_as_on_the_cpu(
    method: str, model: nn.Module, bank: Bank, pretended: PretendedDevice
) -> None:
    ids = torch.randint(128, (2, 16))
    here = svdbank.peft.get_peft_model(copy.deepcopy(model), config(method), bank=bank)
    there = svdbank.peft.get_peft_model(pretended.put_model(model), config(method), bank=bank)
    losses = []
    for net, tokens in ((here, ids), (there, ids.cuda())):
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
        net.train()
        for _ in range(3):
            with pretended.counting() as counts:
                loss = net(input_ids=tokens, labels=tokens).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss.item())
    _TABLE.append(counts.row(f"{method}, a step"))
    # bfloat16 activations: sums in another order move a loss of 5 by less than one of its 8 bits.
    assert losses[:3] == pytest.approx(losses[3:], abs=2e-2)
    assert losses[2] < losses[0]


@pytest.mark.parametrize("method", ["mica", "milora"])
def test_a_run_is_set_up_and_its_adapter_written_from_the_device(
    method: str, model: nn.Module, llama: Path, bank: Bank, tmp_path: Path, pretended: PretendedDevice
) -> None:
    options = TrainOptions(model=str(llama), output=str(tmp_path / "adapter"), data=("-",), method=method, rank=RANK)
    there = attach(pretended.put_model(model), options, bank)
    initial = initial_factors(there, options)
    assert all(value.device.type == "cpu" for value in initial.values())
    (tmp_path / "adapter").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_adapter(there, tmp_path / "adapter", options, bank, initial, "card")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size > 0
