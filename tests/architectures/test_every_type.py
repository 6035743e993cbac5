"""A sample of all model types goes through everything that we do with a model; all of them in the soak set."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.architectures.every_type import every, sample, table
from tests.architectures.small import model_types
from tests.architectures.stages import Type, run

COUNT = 20
#: Of the types to which PEFT attaches a plain LoRA.
THRESHOLD = 0.97


def told(report: Type) -> str:
    return "; ".join(f"{stage}: {result.state}: {result.message}" for stage, result in report.stages.items())


@pytest.mark.parametrize("number", range(COUNT))
def test_a_type_of_the_sample_passes_every_stage(number: int, tmp_path: Path) -> None:
    """Two with experts, and every n-th of the others by name; in place of one to which PEFT attaches nothing, the next by name."""
    types = model_types()
    first = types.index(sample(types, COUNT, always=("mixtral", "qwen2_moe"))[number])
    for place in range(first, first + len(types)):
        name = types[place % len(types)]
        report = run(name, tmp_path / name)
        if report.stages["peft"].state == "ok":
            break
    assert report.passed, f"{name}: {told(report)}"


@pytest.mark.soak
def test_nearly_all_types_pass_and_every_exception_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    reports = every(model_types(), jobs=os.cpu_count() or 1)
    with capsys.disabled():
        print(f"\n{table(reports)}")
    attached = [report for report in reports if report.stages["peft"].state == "ok"]
    passed = [report for report in attached if report.passed]
    assert len(reports) == len(model_types()) and len(passed) >= THRESHOLD * len(attached)
