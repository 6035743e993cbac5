"""Several workers on this machine, a process for each device that was named: one plan, one view of progress."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from svdbank.building.accounting import SHARED_STAGES, Account
from svdbank.building.execution import WorkReport
from svdbank.building.fetching import FetchOptions
from svdbank.building.joining import Workplace, work_through
from svdbank.building.preparation import PreparedBuild
from svdbank.building.request import BuildRequest
from svdbank.building.shares import Share
from svdbank.building.words import Said, own_error
from svdbank.building.worker import Order
from svdbank.core.errors import WorkerError
from svdbank.core.specs import Progress, ProgressCallback, from_json

#: Threads of libraries that are still up at the end have nothing to say.
_PROGRAM = "import os; from svdbank.building.worker import main; os._exit(main())"


@dataclass
class _Member:
    name: str
    device: str
    process: subprocess.Popen[bytes]
    end: Said | None = None
    joined: bool = False
    ended: bool = False


class Crew:
    """Workers, one for each of ``devices``: the first is this process, the others are processes that it starts.

    They are started at once, so that they load their libraries while the plan is made and the first weights are solved. Use it as a
    context manager: at the end of the block, however that ends, every worker is told to stop, keeps what it has done and is waited for.
    """

    def __init__(self, devices: Sequence[str], threads: int) -> None:
        self._first, *self._others = devices
        self._threads = threads
        self._members: list[_Member] = []
        self._ordered = False
        self._heard: queue.Queue[tuple[_Member, bytes]] = queue.Queue()

    def __enter__(self) -> Crew:
        place = str(Path(__file__).parents[2])  # where the package lies: -P leaves the working folder out
        paths = [place, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
        environment |= {"SVDBANK_THREADS": str(self._threads)}
        for number, device in enumerate(self._others, 2):
            # A session of its own: an interrupt from the terminal reaches this process alone, which tells the others.
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
            member = _Member(_name(number, device), device, process)
            self._members.append(member)
            threading.Thread(target=self._listen, args=(member,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        for member in self._members:
            if not self._ordered:  # nothing is to be kept, and it may still be loading its libraries
                member.process.kill()
            try:
                member.process.wait()
            except KeyboardInterrupt:  # the second: what is being solved is given up
                for other in self._members:
                    other.process.kill()
                member.process.wait()
            if member.process.stdout is not None:
                member.process.stdout.close()

    def work(
        self, here: Workplace, share: Share, request: BuildRequest, *, device: torch.device, progress: ProgressCallback
    ) -> tuple[WorkReport, tuple[int, int, int]]:
        """Have all shards done, those of ``share`` first, in this process on ``device``: a report over all workers, and bytes, requests
        and retries of the others.

        The first error of a worker stops all and is raised in its own words. One that is killed costs what it was at: the others take
        that over.
        """
        prepared, remote = here.prepared, here.checkpoint.remote
        here_too = [] if self._others or device.type != "cpu" else range(2, (request.workers or 1) + 1)
        name = _name(1, self._first) if self._others or here_too else self._first
        others = [*(member.name for member in self._members), *(_name(number, "cpu") for number in here_too)]
        account = Account(prepared, [name, *others], progress)
        if prepared.fetch.way == "cache" and remote is not None and self._others:
            remote.download(lambda stage, done, total: progress(Progress(stage, done, total, "bytes")))
        if self._others:
            request = msgspec.structs.replace(request, output=prepared.root, fetch=_fetch(prepared, request), workers=None)
        self._ordered = True
        each = 1 + len(self._members)
        for number, member in enumerate(self._members, 1):
            order = Order(request, Share(share.index * each + number, share.count * each), member.device)
            with contextlib.suppress(BrokenPipeError):
                assert member.process.stdin is not None
                member.process.stdin.write(pickle.dumps(order).hex().encode() + b"\n")
                member.process.stdin.flush()
        mine = Share(share.index * each, share.count * each)
        done = work_through(
            here, mine, device=device, request=request, progress=account.of(name), tick=lambda: self._hear(account)
        )
        account.gone(name)
        for member in self._members:
            if not member.joined:  # all is done, and it is still loading its libraries
                member.process.kill()
                member.ended = True
        while any(not member.ended for member in self._members):
            self._hear(account, wait=True)
        ends = [member.end for member in self._members if member.end is not None]
        stages = dict(done.stages)
        for end in ends:
            for stage, seconds in end.stages.items():
                stages[stage] = round(stages.get(stage, 0.0) + seconds, 4)
        bytes_, requests, retries = (sum(end.traffic[column] for end in ends) for column in range(3))
        solved, waited = done.solved + sum(end.solved or 0 for end in ends), done.waited + sum(end.waited for end in ends)
        return WorkReport(solved, done.elsewhere, stages, waited), (bytes_, requests, retries)

    def _hear(self, account: Account, *, wait: bool = False) -> None:
        """Take in what the others have said since, in this thread; raises what one of them ended with."""
        while wait or not self._heard.empty():
            member, line = self._heard.get()
            wait = False
            if line:
                self._note(member, from_json(line, Said, where=member.name, error=WorkerError), account)
                continue
            if member.ended:
                continue
            member.ended = True
            account.gone(member.name)
            if (code := member.process.wait()) != 0:
                account.show(f"{member.name} {_ended(code)}")

    def _note(self, member: _Member, said: Said, account: Account) -> None:
        member.joined = True
        if said.error is not None:
            raise own_error(member.name, said)
        if said.solved is not None:
            member.end = said
        elif said.progress is not None and said.progress.stage in SHARED_STAGES:
            account.of(member.name)(said.progress)

    def _listen(self, member: _Member) -> None:
        assert member.process.stdout is not None
        with contextlib.suppress(ValueError):  # closed at the end
            for line in member.process.stdout:
                self._heard.put((member, line))
        self._heard.put((member, b""))

    def _stop(self) -> None:
        for member in self._members:
            with contextlib.suppress(OSError):
                assert member.process.stdin is not None
                member.process.stdin.close()


def _fetch(prepared: PreparedBuild, request: BuildRequest) -> FetchOptions:
    """How the workers fetch, so that no byte comes twice: whole files where they stay and the others find them, else ranges."""
    if prepared.fetch.way == "shards" and prepared.fetch.keep:
        return FetchOptions(fetch="shards", disk_budget=request.fetch.disk_budget, keep=True)
    if prepared.fetch.way in ("shards", "ranges"):
        return FetchOptions(fetch="ranges", disk_budget=None, keep=None)
    return FetchOptions(fetch="auto", disk_budget=None, keep=None)


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with code {code}"
    name = signal.Signals(-code).name if -code in {*signal.Signals} else str(-code)
    return f"was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _name(number: int, device: str) -> str:
    return f"worker {number} ({device})"
