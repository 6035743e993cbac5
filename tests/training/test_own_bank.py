"""``train --build`` makes a bank of the rank and sides that the run needs, and looks it up the next time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from svdbank.bank.reading import Bank
from svdbank.core.specs import Progress
from svdbank.training.options import TrainOptions
from svdbank.verbs.train import _bank
from tests.building.small import write_small_checkpoint


def test_a_bank_is_built_where_none_serves_and_found_after(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    model = write_small_checkpoint(tmp_path / "model", minilm)
    solved: list[Progress] = []

    def bank(**options: Any) -> Bank:
        solved.clear()
        asked = TrainOptions(model=str(model), output="adapter", data=("text",), targets=("query",), **options)
        return _bank(asked, build=True, pull=None, find=False, tell=solved.append)

    first = bank(rank=4)
    assert (first.rank, first.side) == (4, "left") and solved
    assert bank(rank=3).path == first.path and not solved
    more = bank(rank=6, method="milora")
    assert (more.rank, more.side) == (6, "both") and bank(rank=6).path == more.path and not solved
    assert bank(rank=2, method="pissa").manifest.options.principal == 2
