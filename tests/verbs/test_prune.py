"""``ls`` says how large a bank is and when it was used; ``prune`` deletes those of the cache that nobody has used for long."""

from __future__ import annotations

import datetime
import os
import shutil
import time
from pathlib import Path

import pytest

import svdbank
from svdbank.core.errors import OptionError
from svdbank.core.locks import locked
from svdbank_cli.main import run
from tests.structure.source import ROOT

DAY = 86400.0


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with four banks: used now, 40 and 50 days ago, and one that was begun 60 days ago and left."""
    monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "home"))
    for name, days in (("new", 0), ("old", 40), ("older", 50), ("begun", 60)):
        place = tmp_path / "home" / "banks" / f"model-{name}" / "r18-both-float32"
        shutil.copytree(ROOT / "tests" / "data" / "format-1", place)
        if name == "begun":
            for path in (place / "manifest.json", *place.glob("index-*.json")):
                path.unlink()
        then = time.time() - days * DAY
        for path in (*place.rglob("*"), place):
            os.utime(path, (then, then))
    return tmp_path / "home" / "banks"


def names(banks: list[svdbank.verbs.ls.BankSummary] | tuple[svdbank.verbs.ls.BankSummary, ...]) -> set[str]:  # type: ignore[name-defined]
    return {Path(bank.path).parent.name for bank in banks}


def test_ls_shows_size_and_last_use(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    banks = {Path(bank.path).parent.name: bank for bank in svdbank.ls()}
    for bank in banks.values():
        assert bank.size == sum(path.stat().st_size for path in Path(bank.path).rglob("*") if path.is_file())
    assert abs(time.time() - 40 * DAY - banks["model-old"].last_used) < DAY
    assert run(["ls"]) == 0
    shown = capsys.readouterr().out
    assert "40 days ago" in shown and "unfinished, 60 days ago" in shown and "today" in shown


def test_what_was_not_used_for_long_goes_and_a_dry_run_says_so_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry = svdbank.prune(datetime.timedelta(days=45), dry_run=True)
    assert names(dry.removed) == {"model-older", "model-begun"} and dry.kept == 2 and len(svdbank.ls()) == 4
    assert run(["prune", "--older-than", "45d", "--dry-run"]) == 0
    assert "would delete 2 banks" in capsys.readouterr().out
    assert run(["prune", "--older-than", "45d"]) == 0
    assert "deleted 2 banks" in capsys.readouterr().out
    assert names(svdbank.ls()) == {"model-new", "model-old"}
    for wrong in (
        ["prune"],
        ["prune", "--older-than", "soon"],
        ["prune", "--older-than", "-1d"],
        ["prune", "--older-than", "1m"],
    ):
        assert run(wrong) == 2
    with pytest.raises(OptionError, match="no length of time"):
        svdbank.prune(float("nan"))


def test_what_a_stopped_pull_left_goes_once_it_is_as_old(home: Path) -> None:
    for name, days in (("young", 10), ("old", 50)):
        work = home / "model-new" / f".{name}.pull.tmp"
        (work / "new").mkdir(parents=True)
        (work / "new" / "file").write_bytes(b"x" * 1000)
        then = time.time() - days * DAY
        for path in (work / "new" / "file", work / "new", work):
            os.utime(path, (then, then))
    assert svdbank.prune(70 * DAY).freed == 0 and svdbank.prune(45 * DAY, dry_run=True).freed > 1000
    svdbank.prune(45 * DAY)
    assert [path.name for path in (home / "model-new").glob(".*.pull.tmp")] == [".young.pull.tmp"]


def test_opening_a_bank_by_its_place_or_its_model_is_using_it(home: Path) -> None:
    place = home / "model-old" / "r18-both-float32"
    before = (place / "manifest.json").read_bytes(), (place / "manifest.json").stat().st_mtime
    svdbank.open(place)
    assert names(svdbank.prune(30 * DAY).removed) == {"model-older", "model-begun"}
    assert before == ((place / "manifest.json").read_bytes(), (place / "manifest.json").stat().st_mtime)


def test_a_bank_that_is_written_stays_and_what_a_killed_rm_left_goes(home: Path) -> None:
    busy = home / "model-older" / "r18-both-float32"
    left = home / "model-new" / ".0123456789abcdef.rm.tmp"
    left.mkdir()
    (left / "x").write_bytes(b"1234")
    with locked(busy):
        report = svdbank.prune(45 * DAY)
    assert report.busy == (str(busy),) and names(report.removed) == {"model-begun"} and not left.exists()
