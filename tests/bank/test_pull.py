"""``svdbank pull``: a bank brought whole, or the chunks of some ranks; and verify, ls, rm and prune of what lies elsewhere."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import zarr

import svdbank
from svdbank.core import disk
from svdbank.core.locks import locked
from svdbank.core.specs import Progress
from svdbank_cli.main import run
from tests.building.small import tree
from tests.checkpoint.hub_server import Fault, LocalHub

NAME = "hf://org/bank"


@pytest.fixture
def far(hub: LocalHub, near: svdbank.Bank, own_home: Path) -> LocalHub:
    hub.commit("org/bank", {**tree(near.path), "README.md": b"a card", "LICENSE.md": b"yes", ".gitattributes": b""})
    return hub


def offline(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def asked(hub: LocalHub) -> int:
    return sum("/resolve/" in request for request in hub.requests)


def test_a_bank_pulled_whole_is_the_bank_and_serves_its_address_and_its_model_offline(
    far: LocalHub, near: svdbank.Bank, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Progress] = []
    report = svdbank.pull(NAME, progress=seen.append)
    assert {**tree(near.path), "README.md": b"a card", "LICENSE.md": b"yes"} == tree(Path(report.path))
    assert Path(report.path).is_relative_to(own_home / "banks") and report.lacks is None and report.side == "both"
    assert seen[-1].done == seen[-1].total and svdbank.verify(report.path, data=True).sound
    before = asked(far)
    assert svdbank.pull("org/bank").path == report.path  # the manifest alone is asked for
    assert asked(far) - before <= 3
    offline(monkeypatch)
    assert str(svdbank.open(NAME).path) == report.path
    assert [bank.path for bank in svdbank.ls() if bank.complete] == [report.path]


def test_pull_into_a_folder_refuses_what_stands_there_and_knows_its_own(far: LocalHub, tmp_path: Path) -> None:
    place = tmp_path / "bank"
    assert svdbank.pull(NAME, into=place).path == svdbank.pull(NAME, into=place).path == str(place)
    path = next(place.rglob("c/0/0/0"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(svdbank.DamageError, match="is here already, and damaged") as caught:
        svdbank.pull(NAME, into=place)
    assert caught.value.hint is not None and run([*caught.value.hint.split()[1:], "-q"]) == 0 and svdbank.pull(NAME, into=place)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_bytes(b"")
    for into in (tmp_path / "other", tmp_path / "other" / "file", "hf://org/copy"):
        with pytest.raises(svdbank.OptionError):
            svdbank.pull(NAME, into=into)
    with pytest.raises(svdbank.OptionError, match="kept in the cache alone"):
        svdbank.pull(NAME, into=tmp_path / "part", rank=16)


def test_a_pull_stopped_at_any_operation_leaves_no_bank_and_goes_on(far: LocalHub, near: svdbank.Bank, tmp_path: Path) -> None:
    """Stopped after every 40 operations on the disk, as a kill would, until it is whole; and before each of the last ten."""

    class StopError(BaseException):
        pass

    def stopped_after(count: int) -> bool:
        def stop(operation: str, path: Path) -> None:
            nonlocal count
            count -= 1
            if count < 0:
                raise StopError

        try:
            with disk.observe(stop):
                svdbank.pull(NAME, into=place)
        except StopError:
            return True
        return False

    place, stops, operations = tmp_path / "bank", 0, list[str]()
    with disk.observe(lambda operation, path: operations.append(operation)):
        svdbank.pull(NAME, into=tmp_path / "counted")
    before = asked(far)
    while stopped_after(40):
        stops, before = stops + 1, asked(far)
        with pytest.raises(svdbank.BankNotFoundError):
            svdbank.open(place)
    assert stops > 3 and tree(place) == tree(tmp_path / "counted")
    assert asked(far) - before < len(tree(place)) / 2  # what had come was hashed and kept
    for last in range(1, 11):
        shutil.rmtree(place)
        if not stopped_after(len(operations) - last):
            continue
        if place.exists():
            assert tree(place) == tree(tmp_path / "counted")
        assert not stopped_after(1 << 30) and tree(place) == tree(tmp_path / "counted")
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} <= {".bank.pull.tmp"}


def test_a_harmed_file_is_fetched_again_and_a_harmed_server_brings_no_bank(far: LocalHub, tmp_path: Path) -> None:
    far.faults.append(Fault("wrong-bytes", "left/c/0"))
    assert svdbank.verify(svdbank.pull(NAME, into=tmp_path / "bank").path, data=True).sound
    far.faults.append(Fault("wrong-bytes", "left/c/0", times=99))
    with pytest.raises(svdbank.DamageError, match="left/c/0/0/0: not the bytes that were published"):
        svdbank.pull(NAME, into=tmp_path / "harmed")
    assert not (tmp_path / "harmed").exists()


def test_a_part_brings_its_chunks_alone_and_says_what_it_lacks(
    far: LocalHub, near: svdbank.Bank, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = far.sent
    report = svdbank.pull(NAME, rank=16, side="left")
    chunks = 6 * (16 * 24 * 4 + 4)
    index = near.manifest.files[near.manifest.index].size
    small = sum(far.repositories["org/bank"].head()[name].data.__len__() for name in read_beside(near))
    manifest = len((near.path / "manifest.json").read_bytes())
    assert far.sent - before == chunks + index + small + manifest == report.fetched
    assert report.lacks == "ranks 17 to 24, right vectors" and report.rank == 16 and report.side == "left"
    offline(monkeypatch)
    bank = svdbank.open(NAME)
    assert torch.equal(bank.left(near.names, 16)[near.names[0]], near.left(near.names, 16)[near.names[0]])
    bank.probes(near.names)
    bank.sigma(near.names, 24)
    for what in (lambda: bank.left(near.names, 17), lambda: bank.right(near.names, 1)):
        with pytest.raises(svdbank.BankError, match="not on this disk"):
            what()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert torch.equal(bank.right(near.names, 24)[near.names[0]], near.right(near.names, 24)[near.names[0]])


def read_beside(bank: svdbank.Bank) -> list[str]:
    """The small files that a part has beside its chunks."""
    names = ["left/zarr.json", "sigma/zarr.json", "sigma/c/0/0", "probe/zarr.json", "probe/c/0/0"]
    return [f"{family.spec.name}/{name}" for family in bank.index.families for name in names]


def test_a_part_is_no_zarr_hierarchy_and_no_bank(far: LocalHub, own_home: Path) -> None:
    folder = Path(svdbank.pull(NAME, rank=16).path)
    for path in (folder, *(path for path in folder.rglob("*") if path.is_dir())):
        with pytest.raises(Exception, match=r"."):
            zarr.open(str(path), mode="r")
    assert not {"zarr.json", "manifest.json"} & {path.name for path in folder.rglob("*")}


def test_what_was_brought_is_not_evicted(far: LocalHub, near: svdbank.Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVDBANK_PARTS_LIMIT", "0")
    svdbank.pull(NAME, rank=16)
    svdbank.open(NAME).left(near.names, 16)
    offline(monkeypatch)
    svdbank.open(NAME).left(near.names, 16)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": 0}, "rank 0 is none"),
        ({"rank": 25}, "stores ranks up to 24"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, int], text: str, far: LocalHub) -> None:
    with pytest.raises(svdbank.OptionError, match=text):
        svdbank.pull(NAME, **options)  # type: ignore[arg-type]


def test_verify_of_an_address_looks_at_what_is_there_now(
    far: LocalHub, near: svdbank.Bank, own_home: Path, minilm: Path, tmp_path: Path
) -> None:
    model = near.path.parent / "model"
    svdbank.pull(NAME, rank=24)
    assert svdbank.verify(NAME).sound and svdbank.verify(NAME, data=True).sound
    proven = svdbank.verify(NAME, model=model, sample=0.3)
    assert proven.sound and proven.proven == 2
    assert svdbank.verify(NAME, model=model).proven == 6
    (folder,) = [bank.path for bank in svdbank.ls() if bank.parts_of]
    held = svdbank.verify(folder)
    assert held.sound and held.level == "parts" and held.files > 12
    files = far.repositories["org/bank"].head()
    name = next(name for name in files if name.endswith("right/c/2/0/0"))
    far.repositories["org/bank"].head()[name] = type(files[name])(b"x" + files[name].data[1:], large=True)
    assert svdbank.verify(NAME).sound
    assert [damage.file for damage in svdbank.verify(NAME, data=True).damage] == [name]
    del far.repositories["org/bank"].head()[name]
    report = svdbank.verify(NAME)
    assert [(damage.file, damage.what) for damage in report.damage] == [(name, "missing")] and report.next is None
    assert run(["verify", NAME]) == 4


def test_verify_of_parts_finds_harm_on_this_disk(far: LocalHub, near: svdbank.Bank, own_home: Path) -> None:
    folder = Path(svdbank.pull(NAME, rank=24).path)
    path = next(path for path in sorted(folder.rglob("*")) if path.parts[-2:] == ("left", "3"))
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(data)
    before = asked(far)
    report = svdbank.verify(folder)
    assert [damage.what for damage in report.damage] == ["chunk 1 on this disk"] and asked(far) == before
    assert report.next == f"svdbank rm {folder}" and run(["verify", str(folder)]) == 4
    svdbank.open(NAME).left(near.names, 24)
    assert svdbank.verify(folder).sound


def test_ls_rm_and_prune_know_parts(
    far: LocalHub, near: svdbank.Bank, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    svdbank.open(NAME).left(near.names, 16)
    place = f"hf://org/bank@{far.repositories['org/bank'].branches['main']}"
    (listed,) = svdbank.ls()
    assert listed.parts_of == place and not listed.complete and listed.brought is None and listed.size > 6 * 1540
    assert run(["ls"]) == 0 and f"parts of {place}" in capsys.readouterr().out
    assert svdbank.prune(0).removed == (listed,) or svdbank.prune(0).kept == 0
    assert svdbank.ls() == []
    svdbank.pull(NAME, rank=16, side="left")
    (listed,) = svdbank.ls()
    assert listed.brought == "rank 16 left"
    svdbank.rm(listed.path)
    assert svdbank.ls() == [] and not Path(listed.path).exists()
    svdbank.open(NAME).left(near.names, 16)


def test_the_command_says_what_is_here_and_what_is_not(far: LocalHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["pull", "org/bank", "--rank", "16", "--side", "left"]) == 0
    out = capsys.readouterr().out
    assert (
        "not here    ranks 17 to 24, right vectors: fetched when asked for, refused offline" in out
        and "rank 16, side left" in out
    )
    assert run(["pull", NAME, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["lacks"] is None
    assert run(["pull", NAME, "--rank", "99"]) == 2
    assert run(["pull", "hf://org/none"]) == 10
    assert run(["pull", "org/../bank"]) == 2


@pytest.mark.parametrize("verb", ["rm", "repair"])
def test_verbs_that_change_a_folder_refuse_an_address(verb: str, far: LocalHub) -> None:
    assert run([verb, NAME]) == 2 and not asked(far)


def test_two_pulls_at_once_do_not_meet(far: LocalHub, tmp_path: Path) -> None:
    with locked(tmp_path / ".bank.pull.tmp"), pytest.raises(svdbank.LockedError):
        svdbank.pull(NAME, into=tmp_path / "bank")
    svdbank.pull(NAME, into=tmp_path / "bank")
