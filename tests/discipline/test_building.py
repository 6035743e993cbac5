"""A bank built on a pretended device, and losses measured on one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import svdbank
from svdbank.bank import Bank
from svdbank.evaluation import _sums, _Window
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

    windows = [
        _Window(torch.arange(start, start + length).tolist(), ends=True) for start, length in ((3, 12), (20, 30), (5, 2))
    ]
    with quiet():
        model = LlamaForCausalLM.from_pretrained(llama, dtype=torch.float32, attn_implementation="eager").eval()
    here = _sums(model, (), windows)
    pretended.put_model(model)
    with pretended.counting() as counts:
        there = _sums(model, (), windows)
    assert there == pytest.approx(here, rel=1e-6)  # the same products, in float32
    assert counts.syncs["svdbank.evaluation:_sums"] == 1
