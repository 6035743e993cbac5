"""A record of an unfinished build that is not of its plan is done again, whatever it says; a plan that cannot be meant is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import svdbank
import svdbank.verbs.build as build_verb
from svdbank.bank.layout import MANIFEST
from svdbank_cli.main import run
from tests.building.small import tree, write_small_checkpoint


@pytest.fixture(scope="module")
def model(minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("records") / "model", minilm)


@pytest.fixture
def unfinished(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All solved and recorded, and stopped before the publish."""

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(build_verb, "finished", stop)
        with pytest.raises(KeyboardInterrupt):
            svdbank.build(model, tmp_path / "bank", rank=4)
    assert not (tmp_path / "bank" / MANIFEST).exists()
    return tmp_path / "bank"


CHANGES: dict[str, Any] = {
    "shorter sigma": {"sigma": [[1.0, 2.0]]},
    "no sigma": {"sigma": []},
    "more sigma": {"sigma": [[1.0] * 4] * 2},
    "shorter probe": {"probe": [[0.5]]},
    "principal sigma that was not asked for": {"principal_sigma": [[1.0]]},
    "no weights": {"weights": []},
    "no files": {"files": {}},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_of_other_lengths_is_done_again(change: str, unfinished: Path, model: Path, tmp_path: Path) -> None:
    (path,) = unfinished.glob("records/*/*/0.json")
    path.write_text(json.dumps(json.loads(path.read_bytes()) | CHANGES[change]))
    reports: list[build_verb.BuildReport] = []
    svdbank.build(model, unfinished, rank=4, on_report=reports.append)
    assert reports[0].solved == 1 and svdbank.verify(unfinished, data=True, model=model).sound
    whole = svdbank.build(model, tmp_path / "whole", rank=4).path
    assert tree(unfinished) == tree(whole)


@pytest.mark.parametrize(
    "change",
    [
        {"threads": 2**70},
        {"threads": 0},
        {"family": "elsewhere"},
        {"index": 7},
        {"start": 1, "stop": 1},
        {"stop": 2**40},
    ],
    ids=str,
)
def test_a_frozen_plan_that_cannot_be_meant_is_refused(
    change: dict[str, Any], unfinished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank = Path(shutil.copytree(unfinished, tmp_path / "changed"))
    plan = json.loads((bank / "plan.json").read_bytes())
    plan["shards"][0] |= change
    (bank / "plan.json").write_text(json.dumps(plan))
    for command in (["build", str(model), "-o", str(bank), "--rank", "4"], ["publish", str(bank)], ["info", str(bank)]):
        assert run(command) == 1
        shown = capsys.readouterr().err
        assert "unexpected" not in shown and "plan.json" in shown
