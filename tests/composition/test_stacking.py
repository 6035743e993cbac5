"""A stack is the sum PEFT loads, and every domain in it can be scaled or taken out without the adapters it was made from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import svdbank
from svdbank.adapter.reading import read_adapter
from svdbank.adapter.settings import WEIGHTS
from svdbank.bank.reading import Bank
from svdbank.core.errors import OptionError
from svdbank_cli.main import run
from tests.composition.conftest import dense, dense_sum, relative_error
from tests.composition.test_merging import EXACT

ALL = ["law", "code", "med", "news", "chat", "verse", "plain"]


@pytest.mark.parametrize("names", [["law", "code"], ["law", "med", "verse"], ALL], ids="+".join)
def test_a_stack_is_the_dense_sum(names: list[str], trained: dict[str, Path], tmp_path: Path) -> None:
    folders = [trained[name] for name in names]
    report = svdbank.stack(folders, output=tmp_path / "stack")
    assert relative_error(dense(tmp_path / "stack"), dense_sum(folders, [1.0] * len(names))) < EXACT
    read = read_adapter(tmp_path / "stack")
    assert list(read.names) == list(report.domains) == names
    for name in names:
        own = dense(trained[name])
        assert max(float((read.only(name).delta(key) - own[key]).norm() / own[key].norm()) for key in own) < EXACT


def test_domains_come_back_in_the_order_given_and_their_sum_is_the_same_in_any(
    trained: dict[str, Path], tmp_path: Path
) -> None:
    for place, names in (("one", ("verse", "news", "code")), ("other", ("code", "verse", "news"))):  # verse: on few weights
        svdbank.stack([trained[name] for name in names], output=tmp_path / place)
        assert read_adapter(tmp_path / place).names == names
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "other" / WEIGHTS).read_bytes()


def test_a_stack_with_free_factors_is_read_without_a_complaint(
    trained: dict[str, Path], small_bank: Bank, tmp_path: Path
) -> None:
    svdbank.stack([trained["law"], trained["plain"]], output=tmp_path / "stack")
    for bank in (None, small_bank):
        read = read_adapter(tmp_path / "stack", bank=bank)
        assert set(read.names) == {"law", "plain"} and not read.notes


def test_scales_act_now_and_later(trained: dict[str, Path], tmp_path: Path) -> None:
    folders = [trained["law"], trained["med"]]
    svdbank.stack(folders, output=tmp_path / "now", scale={"law": 0.7})
    svdbank.stack(folders, output=tmp_path / "whole")
    svdbank.stack([tmp_path / "whole"], output=tmp_path / "later", scale={"law": 0.7})
    wanted = dense_sum(folders, [0.7, 1.0])
    assert relative_error(dense(tmp_path / "now"), wanted) < EXACT
    assert (tmp_path / "now" / WEIGHTS).read_bytes() == (tmp_path / "later" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("names", [["law", "code", "med"], ["med", "law", "plain", "chat", "verse"]], ids="+".join)
def test_dropping_a_domain_leaves_exactly_the_logits_of_the_others(
    names: list[str], trained: dict[str, Path], tmp_path: Path, logits: Callable[[Path], Tensor]
) -> None:
    """The originals are gone when the domain is dropped, and the model is loaded by PEFT alone."""
    copies = [Path(shutil.copytree(trained[name], tmp_path / "originals" / name)) for name in names]
    svdbank.stack(copies, output=tmp_path / "stack")
    svdbank.stack(copies[2:] + copies[:1], output=tmp_path / "others")
    shutil.rmtree(tmp_path / "originals")
    report = svdbank.stack([tmp_path / "stack"], output=tmp_path / "dropped", drop=[names[1]])
    assert report.dropped == (names[1],) and set(report.domains) == {*names} - {names[1]}
    whole, others, dropped = (logits(tmp_path / name) for name in ("stack", "others", "dropped"))
    assert torch.equal(others, dropped)
    assert not torch.equal(whole, dropped)


def test_the_last_domain_of_a_stack_is_the_adapter_it_was(
    trained: dict[str, Path], tmp_path: Path, logits: Callable[[Path], Tensor]
) -> None:
    svdbank.stack([trained["law"], trained["med"]], output=tmp_path / "stack")
    svdbank.stack([tmp_path / "stack"], output=tmp_path / "law", drop=["med"])
    assert torch.equal(logits(tmp_path / "law"), logits(shutil.copytree(trained["law"], tmp_path / "original")))


def test_stacks_stack(trained: dict[str, Path], tmp_path: Path) -> None:
    svdbank.stack([trained["law"], trained["med"]], output=tmp_path / "two")
    three = svdbank.stack([tmp_path / "two", trained["verse"]], output=tmp_path / "three")
    assert list(three.domains) == ["law", "med", "verse"]
    named = svdbank.stack([f"old={tmp_path / 'two'}", trained["verse"]], output=tmp_path / "named")
    assert list(named.domains) == ["old", "verse"]
    assert relative_error(dense(tmp_path / "named"), dense(tmp_path / "three")) < EXACT
    with pytest.raises(OptionError, match="two domains are called 'law'"):
        svdbank.stack([tmp_path / "two", trained["law"]], output=tmp_path / "out")


def test_domains_that_share_directions_are_named(trained: dict[str, Path], tmp_path: Path) -> None:
    report = svdbank.stack([trained["law"], trained["code"], trained["med"]], output=tmp_path / "stack")
    assert [(o.one, o.other, o.weights, o.of) for o in report.overlaps] == [("law", "code", 14, 14)]
    assert report.domains["med"].band == (8, 16) and report.rank == 16
    assert not svdbank.stack([trained["law"], trained["med"], trained["verse"]], output=tmp_path / "apart").overlaps


def test_what_cannot_be_meant_is_refused(trained: dict[str, Path], tmp_path: Path) -> None:
    two, out = [trained["law"], trained["med"]], tmp_path / "out"
    for folders, options, said in [
        (two, {"drop": ["meds"]}, "no domain 'meds'"),
        (two, {"scale": {"laws": 0.5}}, "no domain 'laws'"),
        (two, {"scale": {"law": 0.5}, "drop": ["law"]}, "scaled and dropped"),
        (two, {"scale": {"law": float("inf")}}, "not a finite number"),
        (two, {"drop": ["law", "med"]}, "every domain is dropped"),
        ([trained["law"]], {}, "alone is no stack"),
        ([], {}, "no adapter"),
        (["", trained["law"]], {}, "name is empty"),
    ]:
        with pytest.raises(OptionError, match=said):
            svdbank.stack(folders, output=out, **options)
        assert not out.exists()
    svdbank.stack(two, output=out)
    with pytest.raises(OptionError, match="not empty") as caught:
        svdbank.stack(two, output=out)
    assert "--force" in str(caught.value.hint)
    svdbank.stack(two, output=out, drop=["law"], force=True)
    assert list(read_adapter(out).names) == ["med"]


def test_the_command_scales_and_drops(trained: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stacked = str(tmp_path / "stack")
    assert (
        run(["stack", str(trained["law"]), f"c={trained['code']}", str(trained["med"]), "-o", stacked, "--scale", "c=0.5"]) == 0
    )
    shown = capsys.readouterr()
    assert "law and c share directions in 14 of 14 weights" in shown.err and "rank 16" in shown.out
    assert run(["stack", stacked, "-o", str(tmp_path / "less"), "--drop", "law", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert list(report["domains"]) == ["c", "med"] and report["dropped"] == ["law"]
    assert run(["stack", stacked, "-o", str(tmp_path / "x"), "--drop", "laws"]) == 2
    assert "there are: law, c, med" in capsys.readouterr().err
    assert run(["stack", stacked, "-o", str(tmp_path / "x"), "--scale", "law"]) == 2
