"""A bank built on a pretended device, and losses measured on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import svdbank
from svdbank.bank.reading import Bank
from svdbank.core.basis import Basis
from svdbank.core.specs import Progress
from svdbank.lm.measuring import summed_losses
from svdbank.lm.windows import Window
from tests.building.small import tree
from tests.discipline.conftest import RANK
from tests.discipline.pretended import HEADING, PretendedDevice
from tests.peft.models import quiet


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_bank_is_built_there_as_on_the_cpu(
    jobs: int, llama: Path, bank: Bank, tmp_path: Path, pretended: PretendedDevice
) -> None:
    with pretended.counting() as counts:
        there = svdbank.build(llama, tmp_path / "bank", rank=2 * RANK, principal=RANK, device="cuda", jobs=jobs)
    print("", HEADING, counts.row(f"build, {len(there)} weights"), sep="\n")
    assert {there[name].certificate.device for name in there} == {"cuda"}
    for name in bank:
        for one, two in ((there[name].left(RANK), bank[name].left(RANK)), (there[name].right(RANK), bank[name].right(RANK))):
            # Stored in float32: a column is off by at most 2^-25 of itself on either side.
            assert torch.linalg.matrix_norm(one.double() - two.double() @ (two.double().mT @ one.double()), ord=2) <= 1e-6
    # What is stored comes back once: float32 and float64 entries of both ends and both sides.
    stored = sum(3 * RANK * (there[name].out_features + there[name].in_features) for name in there)
    assert counts.to_host <= 8 * stored + 2**12 * len(there)


def test_a_batch_of_windows_is_measured_with_one_answer(llama: Path, pretended: PretendedDevice) -> None:
    from transformers import LlamaForCausalLM

    windows = [Window(torch.arange(start, start + length).tolist(), ends=True) for start, length in ((3, 12), (20, 30), (5, 2))]
    with quiet():
        model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    here = summed_losses(model, windows)
    pretended.put_model(model)
    with pretended.counting() as counts:
        there = summed_losses(model, windows)
    assert there == pytest.approx(here, rel=1e-6)  # the same products, in float32
    assert counts.syncs["svdbank.lm.measuring:summed_losses"] == 1


@pytest.mark.parametrize("times", [1, 10**6], ids=["once", "always"])
@pytest.mark.parametrize("step", ["uploaded", "brought_home"])
def test_memory_that_runs_out_beside_the_solve_ends_no_build(
    step: str, times: int, llama: Path, tmp_path: Path, pretended: PretendedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: again with the device to itself. Always: the CPU takes over, and the certificate says so."""
    import svdbank.building.solving as solving

    works, left = getattr(solving, step), [times]

    def short_of_memory(*arguments: object) -> object:
        there = any(isinstance(part, torch.device) and part.type == "cuda" for part in arguments) or (
            isinstance(arguments[0], Basis) and arguments[0].certificate.device == "cuda"
        )
        if there and left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(*arguments)

    monkeypatch.setattr(solving, step, short_of_memory)
    bank = svdbank.build(llama, tmp_path / "bank", rank=RANK, device="cuda")
    found = [bank[name].certificate for name in bank]
    assert {one.device for one in found} == ({"cuda"} if times == 1 else {"cpu"})
    assert all(any("out of memory on cuda" in note for note in one.tried) == (times > 1) for one in found)
    assert svdbank.verify(bank.path, model=llama, data=True).sound


def test_a_build_that_was_stopped_in_mid_batch_ends_in_the_same_bytes(
    llama: Path, tmp_path: Path, pretended: PretendedDevice
) -> None:
    whole = svdbank.build(llama, tmp_path / "whole", rank=RANK, device="cuda")

    def interrupt(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdbank.build(llama, tmp_path / "stopped", rank=RANK, device="cuda", progress=interrupt)
    for record in sorted((tmp_path / "stopped" / "records").rglob("*.json"))[::2]:
        record.unlink()
    bank = svdbank.build(llama, tmp_path / "stopped", rank=RANK, device="cuda")
    assert tree(Path(bank.path)) == tree(Path(whole.path))
