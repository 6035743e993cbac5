"""An adapter folder appears whole or not at all; one that is replaced is the old one or the new one."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import svdbank
from svdbank.adapter.writing import write_adapter
from svdbank.bank.reading import Bank
from svdbank.core import disk
from svdbank.core.errors import LockedError, OptionError
from svdbank.core.locks import locked
from tests.building.crashes import Crash, FaultyDisk

Make = Callable[[Path], object]

KINDS = ["write_adapter", "lora", "slim"]
KINDS += [pytest.param(kind, marks=pytest.mark.soak) for kind in ("init", "peft", "inference")]


@pytest.fixture
def make(pair_bank: Bank, trained: Callable[..., Path], tmp_path: Path) -> Callable[[str, int], Make]:
    """``make(kind, seed)``: a function that writes one small adapter to a place, replacing what is there."""

    def chosen(kind: str, seed: int) -> Make:
        name = f"source-{seed}"
        folder = tmp_path / name
        if not folder.exists():
            trained(name, seed, rank=1, layers=(0,))
        if kind == "write_adapter":
            adapter = svdbank.read_adapter(folder)
            return lambda output: write_adapter(adapter, output, force=True)
        if kind == "init":
            return lambda output: svdbank.init(pair_bank, output=output, rank=1 + seed, layers=(0,), force=True)
        source = folder
        if kind == "peft":
            source = tmp_path / f"{name}.slim"
            if not source.exists():
                svdbank.export(folder, to="slim", output=source, bank=pair_bank)
        to = "lora" if kind == "inference" else kind
        return lambda output: svdbank.export(
            source,
            to=to,  # type: ignore[arg-type]
            output=output,
            bank=None if to == "lora" else pair_bank,
            inference=kind == "inference",
            force=True,
        )

    return chosen


def tree(folder: Path) -> dict[str, bytes] | None:
    if not folder.exists():
        return None
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def operations(new: Make, old: Make | None, place: Path) -> tuple[FaultyDisk, int]:
    """A disk that saw ``new`` written at ``place / "out"``, over ``old`` if there is one, and how many operations came before."""
    place.mkdir()
    faulty = FaultyDisk(place)
    with disk.observe(faulty):
        disk.fsync_dir(place)
        if old is not None:
            old(place / "out")
        before = len(faulty.operations)
        new(place / "out")
    return faulty, before


@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_crash_at_any_operation_leaves_the_old_adapter_or_the_new_one(
    kind: str, replaces: bool, make: Callable[[str, int], Make], memory_disk: Path
) -> None:
    new, old = make(kind, 1), make("lora", 0) if replaces else None
    faulty, before = operations(new, old, memory_disk / "counted")
    after = tree(memory_disk / "counted" / "out")
    allowed = [None, after]
    if old is not None:
        old(memory_disk / "old")
        allowed = [tree(memory_disk / "old"), after]
    assert allowed[0] != after and len(faulty.operations) - before > 15
    seen = []
    for stop_at in range(before, len(faulty.operations)):
        place, cut = memory_disk / "place", memory_disk / "cut"
        place.mkdir()
        crashing = FaultyDisk(place, stop_at=stop_at)
        with disk.observe(crashing), pytest.raises(Crash):
            disk.fsync_dir(place)
            if old is not None:
                old(place / "out")
            new(place / "out")
        crashing.after_power_cut(cut)
        where = f"crash before operation {stop_at} ({faulty.operations[stop_at]})"
        for left in (place, cut):
            found = tree(left / "out")
            assert found in allowed, where
            seen.append(found == after)
            new(left / "out")
            assert tree(left / "out") == after, where
            assert [path.name for path in left.iterdir()] == ["out"], f"{where}: what the crash left is still there"
        shutil.rmtree(place)
        shutil.rmtree(cut)
    assert True in seen and False in seen


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("replaces", [False, True], ids=["new", "replacing"])
def test_an_error_of_the_disk_leaves_what_was_there(
    replaces: bool, code: int, make: Callable[[str, int], Make], memory_disk: Path
) -> None:
    new, old = make("lora", 1), make("lora", 0)
    faulty, before = operations(new, old if replaces else None, memory_disk / "counted")
    place = memory_disk / "place"
    place.mkdir()
    if replaces:
        old(place / "out")
    there = tree(place / "out")
    begin = len(faulty.operations) - before
    for i in range(begin):
        if faulty.operations[before + i].split()[0] not in ("create", "write", "fsync", "rename", "exchange"):
            continue
        with disk.observe(FaultyDisk(place, stop_at=i, error=OSError(code, os.strerror(code)))), pytest.raises(OSError):
            new(place / "out")
        assert tree(place / "out") == there, faulty.operations[before + i]
        assert [path.name for path in place.iterdir()] == (["out"] if replaces else [])


def test_where_folders_cannot_be_exchanged_the_next_run_puts_the_old_one_back(
    make: Callable[[str, int], Make], memory_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = make("lora", 1), make("lora", 0)
    monkeypatch.setattr(disk, "exchange", lambda one, other: False)  # as on macOS, Windows and some file systems
    faulty, before = operations(new, old, memory_disk / "counted")
    after = tree(memory_disk / "counted" / "out")
    old(memory_disk / "old")
    kept = tree(memory_disk / "old")
    gaps = 0
    for stop_at in range(before, len(faulty.operations)):
        place = memory_disk / "place"
        place.mkdir()
        with disk.observe(FaultyDisk(place, stop_at=stop_at)), pytest.raises(Crash):
            disk.fsync_dir(place)
            old(place / "out")
            new(place / "out")
        found = tree(place / "out")
        assert found in (None, kept, after)
        if found is None:
            gaps += 1
            settings = svdbank.read_adapter(memory_disk / "old")
            with pytest.raises(OptionError, match="not empty"):
                write_adapter(settings, place / "out")
            assert tree(place / "out") == kept
        new(place / "out")
        assert tree(place / "out") == after
        assert [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(place)
    assert gaps >= 1


def test_folders_are_exchanged_in_one_step(tmp_path: Path) -> None:
    """Linux has it on every common file system; elsewhere :func:`disk.exchange` says that it cannot, and changes nothing."""
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    swapped = disk.exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "file").read_text() == ("other" if swapped else "one")
    assert (tmp_path / "other" / "file").read_text() == ("one" if swapped else "other")
    assert not disk.exchange(tmp_path / "one", tmp_path / "absent") and (tmp_path / "one").is_dir()


def test_two_at_one_place_do_not_mix(make: Callable[[str, int], Make], tmp_path: Path) -> None:
    write = make("lora", 0)
    with locked(tmp_path / ".out.tmp"), pytest.raises(LockedError):
        write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_new_adapter_is_the_one_that_is_read(make: Callable[[str, int], Make], tmp_path: Path) -> None:
    make("write_adapter", 0)(tmp_path / "out")
    first = svdbank.read_adapter(tmp_path / "out")
    make("write_adapter", 1)(tmp_path / "out")
    second = svdbank.read_adapter(tmp_path / "out")
    key = next(iter(first.weights))
    assert not torch.equal(first.delta(key), second.delta(key))
