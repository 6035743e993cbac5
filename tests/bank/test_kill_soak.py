"""Two hundred processes killed for good (SIGKILL) at operations all over build, extend, publish, repair, push and pull.

After each kill what was published is there and right, and the same call again ends as if nothing had been. How many died where is printed.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

import svdbank
from svdbank.bank.layout import MANIFEST
from svdbank.core import disk
from svdbank.core.errors import SvdbankError
from tests.bank.test_repair import KINDS, _flip
from tests.bank.test_state_machine import RANK, write_model
from tests.building.small import tree
from tests.checkpoint.hub_server import LocalHub, point_client

KILLS = int(os.environ.get("SVDBANK_KILLS", "200"))


class _KillAt:
    """Ends this process before its n-th file operation, as a power cut would."""

    def __init__(self, number: int) -> None:
        self.left = number

    def __call__(self, operation: str, path: Path) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)


def built(bank: Path, model: Path, targets: list[str]) -> None:
    svdbank.build(model, bank, rank=RANK, targets=targets, device="cpu", threads=1)


def act(verb: str, bank: Path, model: Path, url: str, home: Path) -> None:
    """One call of the verb."""
    if verb == "build":
        built(bank, model, ["query"])
    elif verb == "extend":
        built(bank, model, ["key"])
    elif verb == "publish":
        with contextlib.suppress(SvdbankError):
            svdbank.build(model, bank, rank=RANK, targets=["query"], device="cpu", threads=1)
    elif verb == "repair":
        svdbank.repair(bank, model=model)
    elif verb in ("push", "pull"):
        with pytest.MonkeyPatch.context() as patch:
            point_client(patch, url, home, "hf_aToken")
            patch.setenv("SVDBANK_HOME", str(home / "svdbank"))
            if verb == "push":
                svdbank.push(bank, "me/bank", base="org/base", source=model, force=True)
            else:
                svdbank.pull("hf://me/ready", into=bank)


def child(verb: str, number: int, bank: Path, model: Path, url: str, home: Path) -> None:
    import torch

    torch.set_num_threads(1)
    with disk.observe(_KillAt(number)):
        act(verb, bank, model, url, home)


def killed(verb: str, number: int, bank: Path, bench: Bench) -> bool:
    """Whether a process that does ``verb`` died before operation ``number``, of a push as that request came in; False where it ended."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["svdbank.verbs.build", "svdbank.verbs.repair", "svdbank.verbs.push", __name__])
    at = 1 << 60 if verb == "push" else number
    process = context.Process(target=child, args=(verb, at, bank, bench.model, bench.hub.url, bench.home))
    seen: list[str] = []

    def kill(request: str) -> None:
        seen.append(request)
        if len(seen) == number + 1:
            assert process.pid is not None
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.2)  # dead before it is answered; only the main thread waits for it

    bench.hub.before = kill if verb == "push" else None
    process.start()
    process.join()
    bench.hub.before = None
    while bench.hub.under_way:  # what the dead process asked for is carried out or not, as on a real Hub
        time.sleep(0.01)
    assert process.exitcode in (0, -signal.SIGKILL), process.exitcode
    return process.exitcode != 0


class Bench:
    """What each verb starts from, how many operations it has, and how it ends undisturbed."""

    def __init__(self, folder: Path, hub: LocalHub, home: Path) -> None:
        self.folder, self.hub, self.home = folder, hub, home
        self.model = write_model(folder / "model")
        hub.commit("org/base", {path.name: path.read_bytes() for path in self.model.iterdir()})
        self.one, self.both = folder / "one", folder / "both"
        built(self.one, self.model, ["query"])
        shutil.copytree(self.one, self.both)
        built(self.both, self.model, ["key"])
        svdbank.push(self.one, "me/ready", base="org/base", source=self.model, force=True)
        self.ends = {"build": tree(self.one), "extend": tree(self.both), "publish": tree(self.one), "repair": tree(self.both)}
        self.ends |= {"push": tree(self.one), "pull": tree(self.one)}
        self.counts = {verb: self.count(verb) for verb in self.ends}

    def start(self, verb: str) -> Path:
        """A bank as the verb finds it; what an earlier one left goes."""
        bank = self.folder / "bank"
        shutil.rmtree(bank, ignore_errors=True)
        self.hub.repositories.pop("me/bank", None)
        self.hub.objects.clear()  # what commits hold is found in them
        if verb in ("extend", "push"):
            shutil.copytree(self.one, bank)
        if verb == "repair":
            shutil.copytree(self.both, bank)
            for kind in ("left", "certificate"):
                _flip(sorted(bank.glob(KINDS[kind].replace("c/1/", "c/0/")))[0])
        return bank

    def count(self, verb: str) -> int:
        seen, before = _KillAt(1 << 60), len(self.hub.requests)
        with disk.observe(seen):
            act(verb, self.start(verb), self.model, self.hub.url, self.home)
        return len(self.hub.requests) - before if verb == "push" else (1 << 60) - seen.left


def shown(hub: LocalHub, repository: str) -> dict[str, bytes]:
    return recorded({name: blob.data for name, blob in hub.repositories[repository].head().items()})


def recorded(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if not name.startswith(".") and name not in ("README.md", "LICENSE.md")}


@pytest.mark.soak
def test_two_hundred_kills_lose_nothing(memory_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with LocalHub() as hub:
        hub.point(monkeypatch, tmp_path / "hf", token=hub.login("me"))
        monkeypatch.setenv("SVDBANK_HOME", str(tmp_path / "svdbank"))
        bench = Bench(memory_disk, hub, tmp_path / "hf")
        chance, died, tries = random.Random(int(os.environ.get("SVDBANK_SEED", "0"))), Counter[str](), 0
        print(bench.counts)
        while sum(died.values()) < KILLS:
            verb = list(bench.ends)[tries % len(bench.ends)]
            tries += 1
            bank, total = bench.start(verb), bench.counts[verb]
            number = chance.randrange(2 * total // 3, total) if verb == "publish" else chance.randrange(total)
            died[verb] += killed(verb, number, bank, bench)
            where = f"{verb}, operation {number} of {total}"
            if (bank / MANIFEST).exists():
                opened = svdbank.open(bank)
                assert verb in ("build", "publish", "pull") or {".query." in n for n in opened.names} >= {True}, where
                assert verb == "repair" or svdbank.verify(bank, data=True).sound, where
            else:
                assert verb in ("build", "publish", "pull"), where
            act(verb, bank, bench.model, hub.url, bench.home)
            assert recorded(tree(bank)) == recorded(bench.ends[verb]), where
            if verb == "push":
                assert shown(hub, "me/bank") == recorded(bench.ends[verb]), where
            print(where, dict(died), flush=True)
        print(f"{sum(died.values())} kills in {tries} tries: {dict(died)}")
