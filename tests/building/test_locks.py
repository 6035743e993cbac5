"""The writer's lock of a folder: one process at a time, whatever becomes of the folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import svdbank
from svdbank.core import disk
from svdbank.core.errors import BankNotFoundError, LockedError
from svdbank.core.locks import locked
from tests.building.crashes import Crash, FaultyDisk
from tests.building.small import tree, write_small_checkpoint

# Adds 1 to a number in a file, in steps that another process inside the lock would spoil, as often as it is told.
_COUNTING = """
import pathlib, sys, time
from svdbank.core.errors import LockedError
from svdbank.core.locks import locked
folder, counter, times = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
while times:
    try:
        with locked(folder):
            value = int(counter.read_text())
            time.sleep(0.0005)
            counter.write_text(str(value + 1))
            times -= 1
    except LockedError:
        pass
"""


def test_two_processes_that_hammer_a_lock_are_never_in_it_together(memory_disk: Path) -> None:
    """The lock's file comes and goes with every turn; filelock before 3.29.5 lets both in within these turns."""
    counter, turns = memory_disk / "counter", 600
    counter.write_text("0")
    command = [sys.executable, "-c", _COUNTING, str(memory_disk / "folder"), str(counter), str(turns)]
    workers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors
    assert int(counter.read_text()) == 2 * turns


def test_a_folder_made_anew_by_another_keeps_the_others_lock(tmp_path: Path) -> None:
    """Who removes or renames the folder it has locked must not take away the lock of the next one."""
    folder = tmp_path / "folder"
    with locked(folder):
        disk.replace(folder, tmp_path / "moved")
        second = locked(folder)
        second.__enter__()
    with pytest.raises(LockedError), locked(folder):
        pass
    second.__exit__(None, None, None)
    assert not list(folder.glob(".lock*"))


def test_a_build_that_starts_while_its_folder_is_deleted_keeps_what_it_writes(minilm: Path, tmp_path: Path) -> None:
    """The old bank leaves its name first: whoever locks the place from then on stands in a folder that stays."""
    model, place = write_small_checkpoint(tmp_path / "model", minilm), tmp_path / "bank"
    svdbank.build(model, place, rank=2)
    moments: list[str] = []

    def begin(operation: str, _: Path) -> None:
        if operation == "rmtree" and not moments:
            moments.append(operation)
            svdbank.build(model, place, rank=3)

    with disk.observe(begin):
        svdbank.rm(place)
    assert moments and svdbank.open(place).rank == 3
    assert svdbank.verify(place, data=True).sound
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bank", "model"]


def test_a_bank_that_is_being_written_is_not_deleted(minilm: Path, tmp_path: Path) -> None:
    bank = svdbank.build(write_small_checkpoint(tmp_path / "model", minilm), tmp_path / "bank", rank=2)
    with locked(bank.path), pytest.raises(LockedError):
        svdbank.rm(bank.path)
    assert svdbank.verify(bank.path, data=True).sound


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_an_rm_that_is_killed_at_any_operation_is_finished_when_told_again(
    kind: str, minilm: Path, memory_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first step the bank is whole; after it there is no bank, and a new one can be built at the place."""
    bank = svdbank.build(write_small_checkpoint(memory_disk / "model", minilm), memory_disk / "bank", rank=2)
    if kind == "unfinished":
        (bank.path / "manifest.json").unlink()
    before = tree(bank.path)
    monkeypatch.setenv("SVDBANK_HOME", str(memory_disk / "home"))
    counted = FaultyDisk(memory_disk)
    shutil.copytree(bank.path, memory_disk / "counted")
    with disk.observe(counted):
        svdbank.rm(memory_disk / "counted")
    steps = [operation.split()[0] for operation in counted.operations]
    assert steps.index("rename") < steps.index("rmtree") and "unlink" not in steps[: steps.index("rename")]
    for stop_at in range(len(steps)):
        place = memory_disk / f"at-{stop_at}"
        shutil.copytree(bank.path, place)
        with disk.observe(FaultyDisk(memory_disk, stop_at=stop_at)), pytest.raises(Crash):
            svdbank.rm(place)
        if place.exists():
            assert tree(place) == before
        assert svdbank.rm(place) > 0
        with pytest.raises(BankNotFoundError):
            svdbank.rm(place)
        assert not [path.name for path in memory_disk.iterdir() if path.name.startswith(".")]


def test_an_rm_killed_among_its_files_is_finished_by_rm_and_by_the_next_build(
    minilm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_small_checkpoint(tmp_path / "model", minilm)
    place = svdbank.build(model, tmp_path / "bank", rank=2).path

    def some(path: Path, **options: object) -> None:
        for file in sorted(Path(path).rglob("*"))[:5]:
            if file.is_file():
                file.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", some)
        with pytest.raises(KeyboardInterrupt):
            svdbank.rm(place)
    assert not place.exists()
    svdbank.build(model, place, rank=2)
    assert svdbank.verify(place, data=True).sound
    svdbank.rm(place)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
