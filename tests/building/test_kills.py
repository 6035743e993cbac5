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
from collections.abc import Callable
from pathlib import Path

import pytest

import svdbank
from svdbank.bank.layout import LOG, MANIFEST
from svdbank.bank.sessions import current_session
from tests.building.small import tree, write_small_checkpoint
from tests.building.test_workers import claims_of

RANK, LAYERS = 18, 120  # up to 128 weights of a role are a shard each

#: Seconds without a new record or a published bank after which a build counts as stuck: processes load for ten on a busy machine.
STUCK = 240.0


class Command(subprocess.Popen[bytes]):
    """``svdbank build`` of a bank by options of its own; what it says goes into a file beside the bank."""

    def __init__(self, model: Path, bank: Path, *options: str, lease: float = 60.0) -> None:
        command = [sys.executable, "-m", "svdbank_cli.main", "build", str(model), "-o", str(bank), "--rank", str(RANK), "-q"]
        environment = {**os.environ, "SVDBANK_LEASE": str(lease), "PYTHONFAULTHANDLER": "1"}
        with (bank.parent / "said").open("ab") as said:
            super().__init__([*command, "--threads", "1", *options], stdout=said, stderr=said, env=environment)

    def workers(self) -> list[int]:
        """The processes that it has started and that are alive."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
            return [int(one) for one in found if alive(int(one))]
        return []


def alive(pid: int) -> bool:
    """True for a process that has not ended; one that nobody has waited for yet has."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False


def names(bank: Path) -> list[Path]:
    """The records that there are; none once they are published."""
    with contextlib.suppress(FileNotFoundError):
        session = current_session(bank)
        return [] if session is None else [*session.folder.glob("*/*.json")]
    return []


def records(bank: Path) -> dict[str, bytes]:
    """Every record by shard; empty where another session has begun meanwhile, or the bank is published."""
    with contextlib.suppress(FileNotFoundError):
        found = {f"{path.parent.name}/{path.name}": path.read_bytes() for path in names(bank)}
        return {} if (bank / MANIFEST).exists() else found
    return {}


def solved(bank: Path) -> tuple[Counter[str], int]:
    """How often each shard was recorded, and how many solves came too late to be, as the log has it."""
    lines = [json.loads(line) for line in (bank / LOG).read_text().splitlines()]
    shards = [line for line in lines if line["event"] == "shard"]
    recorded = Counter(f"{line['family']}/{line['index']}.json" for line in shards if line["recorded"])
    return recorded, sum(not line["recorded"] for line in shards)


def wait_until(happened: Callable[[], bool], bank: Path) -> None:
    """Until that, or the bank is published; an error where nothing goes on."""
    count, since = len(names(bank)), time.monotonic()
    while not (happened() or (bank / MANIFEST).exists()):
        time.sleep(0.005)
        if (now := len(names(bank))) != count:
            count, since = now, time.monotonic()
        if time.monotonic() - since > STUCK:
            said = (bank.parent / "said").read_text(errors="replace")[-4000:]
            raise AssertionError(f"nothing goes on at {count} of {LAYERS} records; the commands said: {said}")


#: Seconds of the lease of workers that are stopped for longer; one that is not is never silent for so long, however busy the machine.
LEASE = 5.0

#: Two commands at one bank, as on two machines; the first has a worker process of its own.
COMMANDS = (("--shard", "1/2", "--device", "cpu,cpu"), ("--shard", "2/2"))


def beaten(model: Path, bank: Path, draw: random.Random) -> Counter[str]:
    """A build under blows until it is published: each kills one process at random, and what is dead is started again.

    Every third blow comes after some time, whatever is going on, the others after some records; the last ones while it is published.
    """
    struck: Counter[str] = Counter()
    kept: dict[str, bytes] = {}
    running = [Command(model, bank, *options) for options in COMMANDS]
    try:
        while not (bank / MANIFEST).exists():
            running = [
                one if one.poll() is None else Command(model, bank, *options)
                for one, options in zip(running, COMMANDS, strict=True)
            ]
            count, late = len(names(bank)) + draw.randrange(1, 5), time.monotonic() + draw.uniform(0, 3)
            by_time = draw.random() < 1 / 3 or count > LAYERS
            wait_until(lambda: time.monotonic() > late if by_time else len(names(bank)) >= count, bank)  # noqa: B023 - called here
            victims = {one.pid: role for one, role in zip(running, ("driver", "share"), strict=True) if one.poll() is None}
            victims |= dict.fromkeys((child for one in running for child in one.workers()), "worker of a driver")
            if (bank / MANIFEST).exists() or not victims:
                continue
            victim = draw.choice(sorted(victims))
            when = "all recorded" if len(names(bank)) == LAYERS else "some recorded" if names(bank) else "none recorded"
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                struck[f"{victims[victim]}, {when}"] += 1
            if now := records(bank):
                assert kept.items() <= now.items(), "a record changed or is gone"
                kept = now
    finally:
        for one in running:
            one.kill()
            one.wait()
    return struck


#: Kills of the test below, in as many builds as they need, and what they are drawn from.
KILLS, SEED = int(os.environ.get("SVDBANK_TEST_KILLS", "60")), int(os.environ.get("SVDBANK_TEST_SEED", "1"))


@pytest.mark.soak
def test_kills_at_random_cost_nothing_that_was_recorded(minilm: Path, memory_disk: Path) -> None:
    model = write_small_checkpoint(memory_disk / "model", minilm, layers=LAYERS, out=200, width=300)
    svdbank.build(model, memory_disk / "alone", rank=RANK, threads=1, jobs=1)
    expected = tree(memory_disk / "alone")
    draw = random.Random(SEED)
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
        print(
            f"{struck.total()} kills in {builds} builds of {LAYERS} weights: {dict(struck)}; {late} solves too late", flush=True
        )
    assert late == 0, "nobody was silent for longer than a lease, so nobody solved what another had"


@pytest.mark.soak
def test_workers_stopped_past_their_lease_and_woken_cost_nothing_that_was_recorded(minilm: Path, memory_disk: Path) -> None:
    model = write_small_checkpoint(memory_disk / "model", minilm, layers=LAYERS, out=200, width=300)
    svdbank.build(model, memory_disk / "alone", rank=RANK, threads=1, jobs=1)
    expected, draw = tree(memory_disk / "alone"), random.Random(5)
    late_in_all = 0
    for number in range(6):
        bank = memory_disk / f"bank{number}"
        count = draw.randrange(1, 40)
        stopped = Command(model, bank, "--shard", "1/2", lease=LEASE)
        others: list[Command] = []
        try:
            wait_until(lambda: len(names(bank)) >= count, bank)  # noqa: B023 - called here
            stopped.send_signal(signal.SIGSTOP)
            before, held = records(bank), claims_of(bank)
            assert before and not (bank / MANIFEST).exists()
            others.append(Command(model, bank, "--shard", "2/2", lease=LEASE))
            if number % 2:  # woken while the other is at it
                wait_until(lambda: len(names(bank)) >= LAYERS - 30, bank)  # noqa: B023 - called here
            else:  # woken after all is published
                assert others[0].wait(STUCK) == 0
            now = records(bank)
            assert all(now.get(name, data) == data for name, data in before.items())
            stopped.send_signal(signal.SIGCONT)
            assert stopped.wait(STUCK) == 0 and others[0].wait(STUCK) == 0
        finally:
            for one in (stopped, *others):
                one.kill()
                one.wait()
        assert tree(bank) == expected and svdbank.verify(bank, data=True).sound
        recorded, late = solved(bank)
        assert not {shard for shard, times in recorded.items() if times > 1}, "one of two records a shard"
        assert late <= len(held), "solved again were those shards alone that the stopped worker held"
        late_in_all += late
        print(f"stopped at {len(before)} of {LAYERS} records, holding {len(held)} shards; {late} solved again", flush=True)
    print(f"6 workers stopped past their lease and woken: {late_in_all} solves came too late, none recorded twice")
