"""Several processes at one frozen plan: each shard is worked on once, and the bank is that of one process, byte for byte."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import svdbank
from svdbank.bank.claims import Claims, free_shards
from svdbank.bank.leases import Lease
from svdbank.bank.sessions import WORKERS
from svdbank.building.execution import WorkReport, work
from svdbank.building.preparation import PreparedBuild, prepare
from svdbank.building.publication import publish
from svdbank.building.request import BuildRequest, build_request
from svdbank.checkpoint import open_checkpoint
from svdbank.core import disk
from svdbank.core.errors import UnfinishedError
from svdbank.core.locks import locked
from svdbank.core.specs import Progress, ignore_progress
from tests.building.small import tree, write_small_checkpoint

LAYERS, RANK = 12, 18

#: Works at every shard of a pickled build, and says how many weights it solved. Slow, so that all workers are at it together.
_WORKER = """
import pathlib, pickle, sys, time
import torch
from svdbank.bank.sessions import WORKERS
from svdbank.building.execution import work
from svdbank.checkpoint import open_checkpoint
prepared = pickle.loads(pathlib.Path(sys.argv[2]).read_bytes())
def show(progress):
    print(progress.done, flush=True)
    time.sleep(0.02)
with open_checkpoint(sys.argv[1]) as checkpoint:
    sys.stdin.readline()
    report = work(prepared, prepared.todo, checkpoint=checkpoint, device=torch.device("cpu"), jobs=1, progress=show)
print("solved", report.solved, len(report.elsewhere), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, minilm: Path) -> Path:
    return write_small_checkpoint(tmp_path_factory.mktemp("small") / "model", minilm, layers=LAYERS)


@pytest.fixture(scope="module")
def alone(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bank that one process makes."""
    bank = tmp_path_factory.mktemp("alone") / "bank"
    svdbank.build(model, bank, rank=RANK)
    return tree(bank)


def request(model: Path, bank: Path) -> BuildRequest:
    return build_request(model, bank, rank=RANK, device="cpu", jobs=1)


def prepared_build(model: Path, bank: Path) -> PreparedBuild:
    with open_checkpoint(model) as checkpoint, locked(bank):
        return prepare(checkpoint, request(model, bank), device="cpu", progress=ignore_progress)


def worked(model: Path, prepared: PreparedBuild, *, shards: slice = slice(None)) -> WorkReport:
    with open_checkpoint(model) as checkpoint:
        return work(
            prepared,
            prepared.todo[shards],
            checkpoint=checkpoint,
            device=torch.device("cpu"),
            jobs=1,
            progress=ignore_progress,
        )


def published(prepared: PreparedBuild) -> None:
    with locked(prepared.root):
        publish(prepared.root, prepared.plan, prepared.generation, progress=ignore_progress)


def start(model: Path, prepared: PreparedBuild, note: Path) -> subprocess.Popen[str]:
    note.write_bytes(pickle.dumps(prepared))
    command = [sys.executable, "-c", _WORKER, str(model), str(note)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_shares_of_one_plan_make_the_bank_of_one_process(model: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    prepared = prepared_build(model, tmp_path / "bank")
    assert worked(model, prepared, shards=slice(0, 5)).solved == 5
    with pytest.raises(UnfinishedError, match=r"7 of 12 shards have no record: .*/5, "):
        published(prepared)
    assert worked(model, prepared, shards=slice(5, None)).solved == LAYERS - 5
    again = worked(model, prepared)
    assert (again.solved, len(again.elsewhere)) == (0, LAYERS)  # what is recorded is not done again
    published(prepared)
    assert tree(tmp_path / "bank") == alone


def test_processes_that_are_given_all_shards_share_them(model: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    prepared = prepared_build(model, tmp_path / "bank")
    workers = [start(model, prepared, tmp_path / "prepared") for _ in range(2)]
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("go\n")
        worker.stdin.flush()
    counts = []
    for worker in workers:
        printed, _ = worker.communicate(timeout=300)
        assert worker.returncode == 0
        counts.append([int(number) for number in printed.splitlines()[-1].split()[1:]])
    assert sum(solved for solved, _ in counts) == LAYERS, counts
    published(prepared)
    assert tree(tmp_path / "bank") == alone


def test_a_killed_worker_s_shards_are_taken_over(model: Path, alone: dict[str, bytes], tmp_path: Path) -> None:
    prepared = prepared_build(model, tmp_path / "bank")
    worker = start(model, prepared, tmp_path / "prepared")
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()
    while int(worker.stdout.readline()) < 3:
        time.sleep(0.001)
    # It reads ahead, so it holds claims now.
    with pytest.raises(svdbank.LockedError, match=f"another process is working on it .process {worker.pid} on "):
        svdbank.build(model, tmp_path / "bank", rank=RANK)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert claims_of(tmp_path / "bank"), "the files of a dead worker's claims stay"
    report = worked(model, prepared)
    assert 0 < report.solved <= LAYERS - 3
    assert not claims_of(tmp_path / "bank")
    published(prepared)
    assert tree(tmp_path / "bank") == alone


def claims_of(bank: Path) -> list[Path]:
    return list(bank.glob("records/*/*/*.claim"))


def test_a_shard_is_claimed_by_one_and_let_go_at_the_end(model: Path, tmp_path: Path) -> None:
    prepared = prepared_build(model, tmp_path / "bank")
    first, second = prepared.todo[:2]
    session = prepared.session
    assert session is not None
    with Lease(session) as my, Lease(session) as their, Claims(session, my) as one, Claims(session, their) as other:
        assert one.take(first) and other.take(second)
        assert not other.take(first) and not one.take(second)
        one.release(first)
        assert other.take(first)
        one.release(first)  # which is another's now
        assert not one.take(first)
    with Lease(session) as my, Claims(session, my) as one:
        assert one.take(first) and one.take(second)


def test_a_bank_with_a_living_worker_is_not_deleted(model: Path, tmp_path: Path) -> None:
    prepared = prepared_build(model, tmp_path / "bank")
    session = prepared.session
    assert session is not None
    with Lease(session) as lease, Claims(session, lease) as worker:
        assert worker.take(prepared.todo[0])
        before = tree(tmp_path / "bank")
        with pytest.raises(svdbank.LockedError, match="another process is working on"):
            svdbank.rm(tmp_path / "bank")
        assert before.keys() <= tree(tmp_path / "bank").keys()
    # What a dead worker left binds nobody.
    session.claim_path(prepared.todo[0].family, prepared.todo[0].index).write_text("0123456789abcdef")
    assert svdbank.rm(tmp_path / "bank") > 0
    assert not (tmp_path / "bank").exists()


def test_a_silent_worker_loses_its_lease_and_its_claims(model: Path, tmp_path: Path) -> None:
    """The worker of another machine, whose lock cannot be asked: its age alone tells."""
    prepared = prepared_build(model, tmp_path / "bank")
    session, shard = prepared.session, prepared.todo[0]
    assert session is not None
    with Lease(session, seconds=60) as silent, Lease(session) as lease, Claims(session, silent) as one:
        assert one.take(shard)
        with Claims(session, lease) as other:
            assert not other.take(shard)
            os.utime(session.folder / WORKERS / silent.name, (0, lease.now() - 59))
            assert not other.take(shard)
            os.utime(session.folder / WORKERS / silent.name, (0, lease.now() - 61))
            assert other.take(shard)


def test_a_claim_whose_worker_died_before_it_wrote_its_name_binds_nobody(model: Path, tmp_path: Path) -> None:
    prepared = prepared_build(model, tmp_path / "bank")
    session, (first, second, *_) = prepared.session, prepared.todo
    assert session is not None
    with Lease(session) as lease:
        for shard, age in ((first, 3), (second, 60)):
            path = session.claim_path(shard.family, shard.index)
            path.touch()
            os.utime(path, (0, lease.now() - age))
        assert {first} == {*prepared.todo} - free_shards(session, prepared.plan, prepared.todo, lease)
        with Claims(session, lease) as claims:
            assert claims.take(second) and not claims.take(first), "its worker may be about to write its name"


@pytest.mark.parametrize("step", ["made", "named", "told"])
def test_an_interrupt_while_a_shard_is_claimed_leaves_no_claim(
    step: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared = prepared_build(model, tmp_path / "bank")
    assert prepared.session is not None
    create = disk.create_mark

    def interrupted(path: Path, data: bytes) -> bool:
        create(path, b"" if step == "made" else data)
        raise KeyboardInterrupt

    with Lease(prepared.session) as lease, pytest.raises(KeyboardInterrupt), Claims(prepared.session, lease) as claims:
        if step == "told":
            claims.take(prepared.todo[0])
            raise KeyboardInterrupt
        monkeypatch.setattr(disk, "create_mark", interrupted)
        claims.take(prepared.todo[0])
    assert not claims_of(tmp_path / "bank")


def test_an_interrupt_lets_every_claim_go(model: Path, tmp_path: Path) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.stage == "decompose" and progress.done >= 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        svdbank.build(model, tmp_path / "bank", rank=RANK, jobs=1, progress=interrupt)
    assert list((tmp_path / "bank").glob("records/*/*/*.json"))
    assert not claims_of(tmp_path / "bank") and not list((tmp_path / "bank").glob(f"records/*/{WORKERS}/*"))
