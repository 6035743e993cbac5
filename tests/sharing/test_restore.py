"""``svdbank repair`` of a bank that lies elsewhere too: what is damaged comes from there, the same bytes, and nothing else is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.core.specs import Progress
from svdbank_cli.main import run
from tests.building.small import tree
from tests.checkpoint.hub_server import Fault, LocalHub

NAME = "hf://org/bank"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def harmed(bank: Path, *harms: tuple[str, Callable[[Path], object]]) -> list[str]:
    """Harm a file of each pattern; their names."""
    names = []
    for pattern, harm in harms:
        path = sorted(bank.glob(pattern))[0]
        names.append(path.relative_to(bank).as_posix())
        harm(path)
    return names


MANIFEST_LOST = (MANIFEST, Path.unlink)
INDEX_LOST = ("index-*.json", Path.unlink)
INDEX_FLIPPED = ("index-*.json", _flip)
SHARD_FLIPPED = ("*/left/c/1/0/0", _flip)
SIGMA_LOST = ("*/sigma/c/0/0", Path.unlink)


@pytest.fixture
def far(hub: LocalHub, built_banks: dict[str, Path]) -> LocalHub:
    hub.commit("org/bank", tree(built_banks["folder"]))
    return hub


@pytest.fixture
def bank(banks: dict[str, Path]) -> Path:
    return banks["folder"]


def fetched(hub: LocalHub) -> set[str]:
    """Files of the bank that the server sent since the requests were last forgotten."""
    return {one.split("/resolve/")[1].split("/", 1)[1] for one in hub.requests if one.startswith("GET") and "/resolve/" in one}


@pytest.mark.parametrize(
    "harms",
    [
        (MANIFEST_LOST,),
        ((MANIFEST, _flip), SIGMA_LOST),
        (INDEX_LOST,),
        (INDEX_FLIPPED, SHARD_FLIPPED),
        (MANIFEST_LOST, INDEX_LOST, SHARD_FLIPPED),
        (SHARD_FLIPPED, ("plan.json", Path.unlink)),
    ],
    ids=["manifest", "manifest-sigma", "index", "index-shard", "manifest-index-shard", "shard-plan"],
)
def test_what_is_damaged_comes_from_the_copy_and_nothing_else(
    harms: tuple[tuple[str, Callable[[Path], object]], ...], far: LocalHub, bank: Path
) -> None:
    before = tree(bank)
    names = harmed(bank, *harms)
    index = next(name for name in before if name.startswith("index-"))
    far.requests.clear()
    sent = far.sent
    would = svdbank.repair(bank, origin=NAME, dry_run=True)
    assert {*would.fetched} == {*names} and would.solved == 0 and not would.sound
    report = svdbank.repair(bank, origin=NAME)
    assert report.sound and not report.anew and report.solved == 0 and not report.changed
    assert {*report.fetched} == {*names} and report.origin == f"{NAME}@{far.repositories['org/bank'].branches['main']}"
    assert tree(bank) == before and svdbank.verify(bank, data=True).sound and not svdbank.verify(bank).unrecorded
    assert fetched(far) == {*names, index, MANIFEST}
    # The manifest by each of the two calls, which look at what is there now; everything else once.
    assert far.sent - sent == sum(len(before[name]) for name in {*names, index, MANIFEST}) + len(before[MANIFEST])


def test_a_bank_that_was_pulled_knows_where_from(far: LocalHub, tmp_path: Path) -> None:
    bank = Path(svdbank.pull(NAME, into=tmp_path / "pulled").path)
    before = tree(bank)
    far.requests.clear()
    for harms in ((SHARD_FLIPPED,), (MANIFEST_LOST,), (INDEX_LOST,)):
        names = harmed(bank, *harms)
        report = svdbank.repair(bank)
        assert report.sound and [*report.fetched] == names and tree(bank) == before
    assert fetched(far) == set(harmed(bank, SHARD_FLIPPED))  # manifest and index were kept in the cache
    far.faults.append(Fault("wrong-bytes", "left/c/1", times=99))
    seen: list[Progress] = []
    with pytest.raises(svdbank.OptionError, match="does not know the path"):
        svdbank.repair(bank, progress=seen.append)  # the model was a folder
    assert any(one.unit == "note" and "nothing is fetched from hf://org/bank@" in one.item for one in seen)


def test_another_bank_gives_nothing_and_a_harmed_copy_replaces_nothing(
    far: LocalHub, bank: Path, built_banks: dict[str, Path], small_base: Path
) -> None:
    far.commit("org/other", tree(built_banks["less"]))
    harmed(bank, MANIFEST_LOST, SHARD_FLIPPED)
    before = tree(bank)
    with pytest.raises(svdbank.BankError, match="is not the bank that"):
        svdbank.repair(bank, origin="hf://org/other")
    far.faults.append(Fault("wrong-bytes", "left/c/1", times=99))
    with pytest.raises(svdbank.DamageError, match="left/c/1/0/0: not the bytes that were published"):
        svdbank.repair(bank, origin=NAME)
    assert tree(bank) == before
    far.faults.clear()
    assert svdbank.repair(bank, origin="org/bank").sound
    harmed(bank, SHARD_FLIPPED)  # with its own manifest, what the other bank records otherwise is solved
    report = svdbank.repair(bank, origin="hf://org/other", model=small_base)
    assert report.sound and not report.fetched and report.solved == 1


def test_a_lost_manifest_is_no_unfinished_build_and_the_commands_say_what_helps(
    far: LocalHub, bank: Path, small_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Path(shutil.copytree(bank, tmp_path / "alone"))
    for one in (bank, alone):
        harmed(one, MANIFEST_LOST)
        assert run(["info", str(one)]) == 4
        assert f"svdbank repair {one} --source MODEL" in capsys.readouterr().err
    seen: list[Progress] = []
    report = svdbank.repair(alone, model=small_base, progress=seen.append)
    notes = [place for place, one in enumerate(seen) if one.unit == "note"]
    assert report.anew and report.sound and len(notes) == 1 and "2 weights are solved again, about" in seen[notes[0]].item
    assert not [one for one in seen[: notes[0]] if one.unit == "weights"]  # said before
    capsys.readouterr()
    assert run(["repair", str(bank), "--from", NAME]) == 0
    said = capsys.readouterr().out
    assert "fetched 1 damaged files from hf://org/bank@" in said and said.rstrip().endswith("sound")
    assert run(["info", str(bank)]) == 0
