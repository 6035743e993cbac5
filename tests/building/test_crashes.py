"""A crash at any file operation, then the same build again, gives the bank of an undisturbed build, byte for byte.

Builds leave their device at ``auto``, which is what the test's ``device`` says (tests/conftest.py).
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.core import disk
from svdbank.verbs.build import BuildReport
from tests.building.crashes import Crash, FaultyDisk
from tests.building.small import tree, write_small_checkpoint

RANK = 18  # two rank chunks, the second partly filled


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, minilm: Path, device: str) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "model", minilm)


def _build(checkpoint: Path, bank: Path) -> list[BuildReport]:
    reports: list[BuildReport] = []
    svdbank.build(checkpoint, bank, rank=RANK, jobs=1, on_report=reports.append)
    return reports


@pytest.fixture(scope="module")
def undisturbed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    bank = tmp_path_factory.mktemp("undisturbed") / "bank"
    _build(checkpoint, bank)
    return tree(bank)


@pytest.fixture(scope="module")
def operations(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Every file operation of an undisturbed build, in order."""
    bank = tmp_path_factory.mktemp("counted") / "bank"
    faulty = FaultyDisk(bank)
    with disk.observe(faulty):
        _build(checkpoint, bank)
    return faulty.operations


def _crash(checkpoint: Path, bank: Path, stop_at: int) -> FaultyDisk:
    faulty = FaultyDisk(bank, stop_at=stop_at)
    with disk.observe(faulty), pytest.raises(Crash):
        _build(checkpoint, bank)
    return faulty


def _check_then_finish(checkpoint: Path, bank: Path, undisturbed: dict[str, bytes], where: str) -> None:
    if (bank / MANIFEST).exists():
        assert svdbank.verify(bank, data=True).sound, f"{where}: a manifest stands over a bank that is not whole"
    else:
        with pytest.raises(svdbank.BankNotFoundError):
            svdbank.open(bank)
    _build(checkpoint, bank)
    assert tree(bank) == undisturbed, where


def _crash_everywhere(
    checkpoint: Path,
    operations: list[str],
    undisturbed: dict[str, bytes],
    disk_folder: Path,
    *,
    every: int = 1,
    keep_every: int = 1,
) -> None:
    """Crash before each operation, or each ``every``-th; finish from what a power cut leaves, and every ``keep_every``-th time from all
    that was written."""
    for stop_at, operation in list(enumerate(operations))[::every]:
        where = f"crash before operation {stop_at} ({operation})"
        bank, after_power_cut = disk_folder / "bank", disk_folder / "cut"
        faulty = _crash(checkpoint, bank, stop_at)
        faulty.after_power_cut(after_power_cut)
        _check_then_finish(checkpoint, after_power_cut, undisturbed, f"{where}, unsynced bytes lost")
        if stop_at % keep_every == 0:
            _check_then_finish(checkpoint, bank, undisturbed, where)
        shutil.rmtree(bank, ignore_errors=True)
        shutil.rmtree(after_power_cut)


def test_a_crash_at_every_second_operation_then_a_second_build_gives_the_same_bytes(
    checkpoint: Path, operations: list[str], undisturbed: dict[str, bytes], memory_disk: Path
) -> None:
    assert len(operations) > 100
    assert {"create", "write", "fsync", "rename", "link", "fsync-dir", "mkdir", "rmtree"} <= {
        entry.split()[0] for entry in operations
    }
    _crash_everywhere(checkpoint, operations, undisturbed, memory_disk, every=2, keep_every=4)


@pytest.mark.soak
@pytest.mark.usefixtures("device")
def test_a_crash_at_any_operation_of_an_extension_leaves_the_first_bank_and_finishes(
    minilm: Path, tmp_path: Path, memory_disk: Path
) -> None:
    """Extending keeps what is published readable at every moment; finishing gives the same bytes."""
    model = write_small_checkpoint(tmp_path / "model", minilm, layers=3)
    first, everything = r".*layer\.0\..*", "all-linear"

    def begin(bank: Path) -> None:
        svdbank.build(model, bank, rank=RANK, targets=(first,), jobs=1)

    def extend(bank: Path) -> None:
        svdbank.build(model, bank, rank=RANK, targets=(everything,), jobs=1)

    counted = memory_disk / "counted"
    begin(counted)
    counter = FaultyDisk(counted)
    with disk.observe(counter):
        extend(counted)
    expected = tree(counted)
    for stop_at, operation in enumerate(counter.operations):
        bank = memory_disk / "bank"
        begin(bank)
        faulty = FaultyDisk(bank, stop_at=stop_at)
        with disk.observe(faulty), pytest.raises(Crash):
            extend(bank)
        assert svdbank.verify(bank, data=True).sound, operation
        assert len(svdbank.open(bank)) in (1, 3)
        extend(bank)
        assert tree(bank) == expected, f"crash before operation {stop_at} ({operation})"
        shutil.rmtree(bank)


@pytest.mark.soak
def test_a_crash_at_any_operation_whatever_the_disk_kept(
    checkpoint: Path, operations: list[str], undisturbed: dict[str, bytes], memory_disk: Path
) -> None:
    _crash_everywhere(checkpoint, operations, undisturbed, memory_disk)


def test_the_faulty_disk_sees_a_missing_fsync(checkpoint: Path, operations: list[str], tmp_path: Path) -> None:
    """The simulation itself: without the fsync of data files a power cut after the build must leave a torn bank."""
    bank = tmp_path / "bank"
    faulty = FaultyDisk(bank)
    honest = faulty.__call__

    def without_data_fsync(operation: str, path: Path) -> None:
        if operation != "fsync" or "c" not in path.parts:
            honest(operation, path)

    with disk.observe(without_data_fsync):
        _build(checkpoint, bank)
    faulty.after_power_cut(tmp_path / "cut")
    assert not svdbank.verify(tmp_path / "cut", data=True).sound


def test_resume_solves_only_what_is_not_recorded(checkpoint: Path, operations: list[str], tmp_path: Path) -> None:
    after_first_record = next(i for i, entry in enumerate(operations) if entry == "link 0.json") + 3
    bank = tmp_path / "bank"
    _crash(checkpoint, bank, after_first_record)
    (report,) = _build(checkpoint, bank)
    assert (report.reused, report.solved) == (1, 1)


def test_a_recorded_shard_whose_bytes_changed_is_solved_again(
    checkpoint: Path, operations: list[str], undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    after_first_record = next(i for i, entry in enumerate(operations) if entry == "link 0.json") + 3
    bank = tmp_path / "bank"
    _crash(checkpoint, bank, after_first_record)
    (shard,) = bank.glob("*/left/c/0/0/.*.tmp")
    data = bytearray(shard.read_bytes())
    data[7] ^= 1
    shard.write_bytes(data)
    (report,) = _build(checkpoint, bank)
    assert (report.reused, report.solved) == (0, 2)
    assert tree(bank) == undisturbed


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_an_error_of_the_disk_leaves_a_state_that_the_next_build_finishes(
    code: int, checkpoint: Path, operations: list[str], undisturbed: dict[str, bytes], memory_disk: Path
) -> None:
    writes = [
        i for i, entry in enumerate(operations) if entry.split()[0] in ("create", "write", "fsync", "mkdir", "rename", "link")
    ]
    # Each kind of error at its own third of the operations: together, every one of them.
    for stop_at in writes[(errno.ENOSPC, errno.EIO, errno.EACCES).index(code) :: 3]:
        bank = memory_disk / "bank"
        faulty = FaultyDisk(bank, stop_at=stop_at, error=OSError(code, os.strerror(code), str(bank)))
        with disk.observe(faulty), pytest.raises(OSError) as caught:
            _build(checkpoint, bank)
        assert caught.value.errno == code
        _check_then_finish(checkpoint, bank, undisturbed, f"error at {operations[stop_at]}")
        shutil.rmtree(bank)


def _kill_and_finish(model: Path, bank: Path, delay: float) -> bool:
    """Kill a real build after ``delay`` seconds of its first output; True if it was still running."""
    command = [sys.executable, "-m", "svdbank_cli.main", "build", str(model), "-o", str(bank), "--rank", "64", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        running = process.poll() is None
        process.send_signal(signal.SIGKILL)
    if not (bank / MANIFEST).exists():
        with pytest.raises(svdbank.BankNotFoundError):
            svdbank.open(bank)
    svdbank.build(model, bank, rank=64)
    return running


def _kills(minilm: Path, tmp_path: Path, count: int, seed: int) -> int:
    svdbank.build(minilm, tmp_path / "undisturbed", rank=64)
    expected = tree(tmp_path / "undisturbed")
    delays = random.Random(seed)
    struck = 0
    for attempt in range(count):
        bank = tmp_path / f"killed-{attempt}"
        struck += _kill_and_finish(minilm, bank, delays.uniform(0, 0.8))
        assert tree(bank) == expected
        shutil.rmtree(bank)
    return struck


@pytest.mark.usefixtures("device")
def test_real_kills_then_a_second_build_give_the_same_bytes(minilm: Path, tmp_path: Path) -> None:
    assert _kills(minilm, tmp_path, count=3, seed=1) >= 1


@pytest.mark.soak
@pytest.mark.usefixtures("device")
def test_many_real_kills(minilm: Path, tmp_path: Path) -> None:
    assert _kills(minilm, tmp_path, count=40, seed=2) >= 20
