"""A sample of all model types goes through everything that we do with a model; all of them in the soak set."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.architectures.every_type import as_json, every, sample, table
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
def test_nearly_all_types_pass_none_is_wrong_and_every_exception_is_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ``docs/generate_architectures.py`` makes the list of types from is left in a file."""
    reports = every(model_types(), jobs=os.cpu_count() or 1)
    (tmp_path / "every_type.json").write_text(json.dumps(as_json(reports), indent=1) + "\n")
    with capsys.disabled():
        print(f"\n{table(reports)}\n\n{tmp_path / 'every_type.json'}")
    attached = [report for report in reports if report.stages["peft"].state == "ok"]
    passed = [report for report in attached if report.passed]
    assert len(reports) == len(model_types()) and len(passed) >= THRESHOLD * len(attached)
    ours = ("build", "attach", "step", "init", "fuse")
    assert not [report.name for report in reports if "wrong" in {report.stages[stage].state for stage in ours}]
