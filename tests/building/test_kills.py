"""Workers, drivers and processes of a share killed at random: what was recorded stays, is not solved again, and the build ends."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import svdbank
from svdbank.bank.layout import LOG, MANIFEST
from svdbank.bank.sessions import current_session
from tests.building.small import tree, write_small_checkpoint

RANK, LAYERS = 18, 120  # up to 128 weights of a role are a shard each


def start(model: Path, bank: Path, *options: str, lease: float = 2.0) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "svdbank_cli.main", "build", str(model), "-o", str(bank), "--rank", str(RANK), "-q"]
    environment = {**os.environ, "SVDBANK_LEASE": str(lease)}
    return subprocess.Popen(
        [*command, "--threads", "1", *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
    )


def children(pid: int) -> list[int]:
    with contextlib.suppress(FileNotFoundError):
        return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def records(bank: Path) -> dict[str, bytes]:
    """Every record by shard; empty once they are published."""
    session = current_session(bank)
    found: dict[str, bytes] = {}
    with contextlib.suppress(FileNotFoundError):  # another session begins, or the bank is published
        for path in session.folder.glob("*/*.json") if session is not None else ():
            found[f"{path.parent.name}/{path.name}"] = path.read_bytes()
        return found
    return {}


def solved(bank: Path) -> tuple[Counter[str], int]:
    """How often each shard was recorded, and how many solves came too late to be, as the log has it."""
    lines = [json.loads(line) for line in (bank / LOG).read_text().splitlines()]
    shards = [line for line in lines if line["event"] == "shard"]
    recorded = Counter(f"{line['family']}/{line['index']}.json" for line in shards if line["recorded"])
    return recorded, sum(not line["recorded"] for line in shards)


def wait_for(bank: Path, count: int, processes: list[subprocess.Popen[bytes]]) -> None:
    """Until so many are recorded, or the processes have ended."""
    while (
        len(records(bank)) < count and not (bank / MANIFEST).exists() and any(process.poll() is None for process in processes)
    ):
        time.sleep(0.005)


#: Two commands at one bank, as on two machines; the first has a second worker.
COMMANDS = (("--shard", "1/2", "--workers", "2"), ("--shard", "2/2"))


def beaten(model: Path, bank: Path, draw: random.Random) -> Counter[str]:
    """A build under blows until it is published: each kills one process at random, and what is dead is started again."""
    struck: Counter[str] = Counter()
    kept: dict[str, bytes] = {}
    running = [start(model, bank, *options) for options in COMMANDS]
    try:
        while not (bank / MANIFEST).exists():
            running = [
                one if one.poll() is None else start(model, bank, *options)
                for one, options in zip(running, COMMANDS, strict=True)
            ]
            wait_for(bank, len(records(bank)) + draw.randrange(1, 5), running)
            victims = {running[0].pid: "a driver", running[1].pid: "a share"}
            victims |= dict.fromkeys((child for one in running for child in children(one.pid)), "a driver's worker")
            victim = draw.choice(sorted(victims))
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                struck[victims[victim]] += 1
            if now := records(bank):
                assert all(now[name] == data for name, data in kept.items()), "a record changed or is gone"
                kept = now
    finally:
        for one in running:
            one.kill()
            one.wait()
    return struck


#: Kills of the test below, in as many builds as they need.
KILLS = int(os.environ.get("SVDBANK_TEST_KILLS", "60"))


@pytest.mark.soak
def test_kills_at_random_cost_nothing_that_was_recorded(minilm: Path, memory_disk: Path) -> None:
    model = write_small_checkpoint(memory_disk / "model", minilm, layers=LAYERS, out=200, width=300)
    svdbank.build(model, memory_disk / "alone", rank=RANK, threads=1, jobs=1)
    expected = tree(memory_disk / "alone")
    draw = random.Random(1)
    struck: Counter[str] = Counter()
    builds = late = 0
    while struck.total() < KILLS:
        bank = memory_disk / f"bank{builds}"
        struck += beaten(model, bank, draw)
        builds += 1
        # Whoever was killed while publishing leaves what the same command finishes, or has.
        svdbank.build(model, bank, rank=RANK, threads=1)
        assert tree(bank) == expected
        assert svdbank.verify(bank, data=True).sound
        recorded, unrecorded = solved(bank)
        late += unrecorded
        assert not {shard for shard, count in recorded.items() if count > 1}, "recorded twice"
        shutil.rmtree(bank)
    print(f"{struck.total()} kills in {builds} builds of {LAYERS} weights: {dict(struck)}; {late} solves came too late")
    assert late == 0, "nobody was silent for longer than a lease, so nobody solved what another had"


@pytest.mark.soak
def test_workers_stopped_past_their_lease_and_woken_cost_nothing_that_was_recorded(minilm: Path, memory_disk: Path) -> None:
    model = write_small_checkpoint(memory_disk / "model", minilm, layers=LAYERS, out=200, width=300)
    svdbank.build(model, memory_disk / "alone", rank=RANK, threads=1, jobs=1)
    expected, draw = tree(memory_disk / "alone"), random.Random(5)
    for number in range(6):
        bank = memory_disk / f"bank{number}"
        stopped = start(model, bank, "--shard", "1/2", lease=0.5)
        wait_for(bank, draw.randrange(1, 40), [stopped])
        stopped.send_signal(signal.SIGSTOP)
        before = records(bank)
        assert before and not (bank / MANIFEST).exists()
        other = start(model, bank, "--shard", "2/2", lease=0.5)
        if number % 2:  # woken while the other is at it
            wait_for(bank, LAYERS - 30, [other])
        else:  # woken after all is published
            assert other.wait(300) == 0
        now = records(bank)
        assert all(now.get(name, data) == data for name, data in before.items())
        stopped.send_signal(signal.SIGCONT)
        assert stopped.wait(300) == 0 and other.wait(300) == 0
        assert tree(bank) == expected and svdbank.verify(bank, data=True).sound
        recorded, late = solved(bank)
        assert not {shard for shard, count in recorded.items() if count > 1}, "one of two records a shard"
        assert late <= 2, "solved again were those shards alone that the stopped worker held"
