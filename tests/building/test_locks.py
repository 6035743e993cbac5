"""The writer's lock of a folder: one process at a time, whatever becomes of the folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import svdbank
from svdbank.core import disk
from svdbank.core.errors import LockedError
from tests.building.small import write_small_checkpoint

# Adds 1 to a number in a file, in steps that another process inside the lock would spoil, as often as it is told.
_COUNTING = """
import pathlib, sys, time
from svdbank.core import disk
from svdbank.core.errors import LockedError
folder, counter, times = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
while times:
    try:
        with disk.locked(folder):
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
    with disk.locked(folder):
        disk.replace(folder, tmp_path / "moved")
        second = disk.locked(folder)
        second.__enter__()
    with pytest.raises(LockedError), disk.locked(folder):
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
    with disk.locked(bank.path), pytest.raises(LockedError):
        svdbank.rm(bank.path)
    assert svdbank.verify(bank.path, data=True).sound
