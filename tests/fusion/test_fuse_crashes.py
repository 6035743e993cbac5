"""A fused checkpoint appears whole or not at all, and the same command after a crash gives the same bytes."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import svdbank
from svdbank.core import disk
from svdbank.core.errors import LockedError, OptionError
from svdbank.core.locks import locked
from tests.building.crashes import Crash, FaultyDisk
from tests.fusion.conftest import adapter, saved, small_model


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = saved(small_model("llama-untied", dtype=torch.bfloat16, num_hidden_layers=1), folder / "base", shard="150KB")
    adapter(small_model("llama-untied", num_hidden_layers=1), folder / "adapter", target_modules="all-linear")
    return base, folder / "adapter"


def _tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_crash_at_any_operation_shows_nothing_or_all_and_a_second_run_gives_the_same_bytes(
    inputs: tuple[Path, Path], memory_disk: Path
) -> None:
    counter = FaultyDisk(memory_disk)
    with disk.observe(counter):
        svdbank.fuse(*inputs, memory_disk / "whole")
    expected = _tree(memory_disk / "whole")
    assert len(counter.operations) > 40
    renamed = counter.operations.index("rename whole")
    for stop_at, operation in enumerate(counter.operations):
        place, cut = memory_disk / "place", memory_disk / "cut"
        place.mkdir()
        disk.fsync_dir(memory_disk)
        faulty = FaultyDisk(place, stop_at=stop_at)
        with disk.observe(faulty), pytest.raises(Crash):
            svdbank.fuse(*inputs, place / "whole")
        faulty.after_power_cut(cut)
        where = f"crash before operation {stop_at} ({operation})"
        assert (place / "whole").exists() == (stop_at > renamed), where
        for left in (place, cut):
            if (left / "whole").exists():
                assert _tree(left / "whole") == expected, where
            else:
                svdbank.fuse(*inputs, left / "whole")
                assert _tree(left / "whole") == expected, where
                assert [path.name for path in left.iterdir()] == ["whole"], f"{where}: what the crash left is still there"
        shutil.rmtree(place)
        shutil.rmtree(cut)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_of_the_disk_leaves_nothing(code: int, inputs: tuple[Path, Path], memory_disk: Path) -> None:
    counter = FaultyDisk(memory_disk)
    with disk.observe(counter):
        svdbank.fuse(*inputs, memory_disk / "counted")
    for stop_at in [i for i, entry in enumerate(counter.operations) if entry.split()[0] in ("write", "fsync", "rename")][::3]:
        faulty = FaultyDisk(memory_disk, stop_at=stop_at, error=OSError(code, os.strerror(code)))
        with disk.observe(faulty), pytest.raises(OSError):
            svdbank.fuse(*inputs, memory_disk / "fused")
        assert sorted(path.name for path in memory_disk.iterdir()) == ["counted"], counter.operations[stop_at]


def test_a_real_kill_leaves_nothing_that_looks_like_a_checkpoint(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    _, lora = inputs
    base = tmp_path / "base"
    saved(small_model("llama-untied", num_hidden_layers=1, vocab_size=150_000), base)
    command = [sys.executable, "-m", "svdbank_cli.main", "fuse", str(base), str(lora), "-o", str(tmp_path / "fused")]
    work = tmp_path / ".fused.tmp" / "new"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (work / "model.safetensors").exists():
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, "it was finished before it was killed"
    assert not (tmp_path / "fused").exists()
    assert work.exists()
    svdbank.fuse(base, lora, tmp_path / "fused")
    assert not work.parent.exists()


def test_two_at_one_place_do_not_mix(inputs: tuple[Path, Path], tmp_path: Path) -> None:
    with locked(tmp_path / ".fused.tmp"), pytest.raises(LockedError):
        svdbank.fuse(*inputs, tmp_path / "fused")
    assert not (tmp_path / "fused").exists()


def test_a_full_disk_is_said_before_the_work(
    inputs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(OptionError, match="100000 free"):
        svdbank.fuse(*inputs, tmp_path / "fused")
    assert list(tmp_path.iterdir()) == []
