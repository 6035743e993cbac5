"""Several workers on one machine: the bank of one, one view of progress, errors in their own words, and an end that keeps what is done."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import svdbank
from svdbank.bank.sessions import WORKERS, current_session
from svdbank.building.standing import UnfinishedInfo
from svdbank.core.specs import BuildProgress, Progress
from tests.building.small import tree, write_small_checkpoint
from tests.building.test_workers import claims_of

RANK, LAYERS = 18, 120


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    """Many weights of some milliseconds: both workers come to the work."""
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "model", minilm, layers=LAYERS, out=200, width=300)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def started(model: Path, bank: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "svdbank_cli.main", "build", str(model), "-o", str(bank), "--rank", str(RANK), "--json"]
    return subprocess.Popen([*command, *options], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_at(bank: Path) -> int:
    session = current_session(bank)
    with contextlib.suppress(FileNotFoundError):
        return sum(not one.name.startswith(".") for one in (session.folder / WORKERS).iterdir()) if session else 0
    return 0


class slowly:  # noqa: N801 - reads as an adverb
    """A build in this process that waits at each of its own steps until the other worker has joined."""

    def __init__(self, bank: Path) -> None:
        self.bank = bank
        self.seen: list[Progress] = []
        self.most = 0

    def __call__(self, progress: Progress) -> None:
        self.seen.append(progress)
        deadline = time.monotonic() + 60
        while progress.stage == "decompose" and self.most < 2 and time.monotonic() < deadline:
            self.most = max(self.most, workers_at(self.bank))
            time.sleep(0.01)


def test_two_workers_make_the_bank_of_one_and_tell_of_it_in_one_place(model: Path, tmp_path: Path) -> None:
    alone = svdbank.build(model, tmp_path / "alone", rank=RANK, threads=1)
    progress, reports = slowly(tmp_path / "two"), list[Any]()
    svdbank.build(model, tmp_path / "two", rank=RANK, threads=1, device="cpu,cpu", progress=progress, on_report=reports.append)
    assert progress.most == 2
    assert tree(tmp_path / "two") == tree(Path(alone.path))
    assert (reports[0].solved, reports[0].device) == (LAYERS, "cpu,cpu")
    steps = [one for one in progress.seen if isinstance(one, BuildProgress)]
    assert {one.workers for one in steps} >= {2} and all(0 <= one.done <= one.total == LAYERS for one in steps)
    assert [one.done for one in steps] == sorted(one.done for one in steps)
    last = steps[-1]
    assert (last.done, last.bytes_done, last.flops_done) == (LAYERS, last.bytes_total, last.flops_total)
    assert last.bytes_total == LAYERS * 200 * 300 * 4 and last.seconds_left == 0
    assert any((one.seconds_left or 0) > 0 for one in steps)


def test_an_error_of_another_worker_comes_with_its_weight_and_its_words(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    tensors = load_file(model / "model.safetensors")
    name = f"encoder.layer.{LAYERS - 1}.attention.self.query.weight"  # the end of the second worker's share
    tensors[name][3, 4] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    (broken / "config.json").write_bytes((model / "config.json").read_bytes())
    with pytest.raises(svdbank.NotFiniteError, match=name) as caught:
        svdbank.build(broken, tmp_path / "bank", rank=RANK, device="cpu,cpu", progress=slowly(tmp_path / "bank"))
    assert caught.value.hint and "repair the checkpoint" in caught.value.hint
    found = svdbank.info(tmp_path / "bank")
    assert isinstance(found, UnfinishedInfo) and found.recorded > 0 and not found.workers
    assert not claims_of(tmp_path / "bank")


def test_a_killed_worker_costs_no_build(model: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    progress = slowly(bank)

    def kill(step: Progress) -> None:
        progress(step)
        if progress.most == 2 and (others := children(os.getpid())):
            os.kill(others[-1], signal.SIGKILL)

    reports: list[Any] = []
    svdbank.build(model, bank, rank=RANK, threads=1, device="cpu,cpu", progress=kill, on_report=reports.append)
    assert any("SIGKILL" in step.item for step in progress.seen)
    assert svdbank.verify(bank, data=True).sound and reports[0].weights == LAYERS


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_all_and_keeps_what_is_done(number: signal.Signals, model: Path, tmp_path: Path) -> None:
    bank = tmp_path / "bank"
    with started(model, bank, "--device", "cpu,cpu", "--threads", "1") as process:
        assert process.stdout is not None
        deadline = time.monotonic() + 120
        while workers_at(bank) < 1 and time.monotonic() < deadline:
            time.sleep(0.005)
        lines = iter(process.stdout.readline, "")
        while json.loads(next(lines)).get("done", 0) < 3:
            pass
        others = children(process.pid)
        process.send_signal(number)
        drain = threading.Thread(target=lambda: [*lines])
        drain.start()
        errors = process.stderr.read() if process.stderr else ""
        drain.join(60)
        assert process.wait(60) == 130, errors
    assert "What was finished is kept; the same command goes on from there" in errors and "Traceback" not in errors
    assert len(others) == 1 and not Path(f"/proc/{others[0]}").exists()
    found = svdbank.info(bank)
    assert isinstance(found, UnfinishedInfo) and 3 <= found.recorded < LAYERS and not found.workers
    assert not claims_of(bank)
    reports: list[Any] = []
    svdbank.build(model, bank, rank=RANK, threads=1, on_report=reports.append)
    assert (reports[0].reused, reports[0].solved) == (found.recorded, LAYERS - found.recorded)
    assert svdbank.verify(bank, data=True).sound


def test_devices_and_workers_that_do_not_fit_are_refused(model: Path, tmp_path: Path) -> None:
    for options, said in (
        ({"device": "cpu,cpu", "workers": 3}, "2 devices are named and 3 workers"),
        ({"device": "cpu,tpu"}, "no device is called 'tpu'|runs on cpu and cuda"),
        ({"workers": 0}, "workers is a number from 1"),
        ({"threads": 0}, "threads is a number from 1"),
    ):
        with pytest.raises(svdbank.OptionError, match=said):
            svdbank.build(model, tmp_path / "bank", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "bank").exists()
