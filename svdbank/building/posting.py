"""A worker of a build as an actor on a cluster: it comes to the bank's folder from where it is, and does the bundles it is given.

Weights and vectors never travel through the cluster: a worker reads its own bytes of the model and writes its own shards into the
bank's folder. What it is told and what it says are names and numbers.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Sequence

import torch

from svdbank.bank.claims import session_over
from svdbank.bank.sessions import Key, current_session
from svdbank.building.accounting import SHARED_STAGES
from svdbank.building.devices import working_device
from svdbank.building.execution import work
from svdbank.building.fetching import plan_fetch
from svdbank.building.joining import Workplace, joined
from svdbank.building.shards import ShardWork, shard_works
from svdbank.building.visit import OWN_RANGES, Posting, look
from svdbank.building.words import Said, last_words
from svdbank.core.errors import LockedError
from svdbank.core.specs import Progress


class _Stopped(BaseException):
    """The driver wants no more."""


class PostedWorker:
    """A worker: warm from its first bundle to its last. :meth:`talk` may be called while another method runs."""

    def __init__(self, posting: Posting, device: str) -> None:
        self._posting = posting
        self._device = device
        self._solver = torch.device("cpu")
        self._stopping = threading.Event()
        self._said: deque[Progress] = deque(maxlen=10_000)
        self._at = contextlib.ExitStack()
        self._here: Workplace | None = None
        self._works: dict[Key, ShardWork] = {}

    def join(self) -> Said:
        """Take a place at the build; says on which machine, or why not."""
        try:
            self._joined()
        except BaseException as error:
            return last_words(error)
        return Said(host=socket.gethostname())

    def work(self, shards: Sequence[Key]) -> Said:
        """Have these shards recorded, but for those that others are at; returns once all that was begun is. May be called again."""
        try:
            return self._worked(shards)
        except _Stopped:
            return Said(solved=0)
        except LockedError as error:  # silent for longer than its lease: the next bundle begins with joining again
            self._left()
            return last_words(error)
        except BaseException as error:
            return last_words(error)

    def talk(self, stop: bool) -> list[Progress]:
        """What happened since this was asked last. With ``stop`` nothing new is begun."""
        if stop:
            self._stopping.set()
        said = []
        with contextlib.suppress(IndexError):
            while True:
                said.append(self._said.popleft())
        return said

    def leave(self) -> None:
        """Give up the place at the build."""
        self._left()

    def _joined(self) -> Workplace:
        if self._here is None:
            look(self._posting)
            root = self._posting.request.output
            assert root is not None
            found = current_session(root)
            if found is None or found.name != self._posting.session:
                raise session_over(root)
            device = working_device(self._device)
            here = self._at.enter_context(
                joined(
                    self._posting.request,
                    device=str(device),
                    join=True,
                    on_cpu=device.type == "cpu",
                    progress=lambda _: None,
                )
            )
            plan, weights = here.prepared.plan, here.prepared.weights
            if here.prepared.session is not None:
                self._works = {(one.shard.family, one.shard.index): one for one in shard_works(plan, weights, plan.shards)}
            self._here, self._solver = here, device
        return self._here

    def _left(self) -> None:
        self._here = None
        at, self._at = self._at, contextlib.ExitStack()
        at.close()

    def _worked(self, shards: Sequence[Key]) -> Said:
        here = self._joined()
        prepared, checkpoint, session = here.prepared, here.checkpoint, here.prepared.session
        if session is None:  # published meanwhile
            return Said(solved=0)
        left = [self._works[key] for key in shards if not session.record_path(*key).exists()]
        weights = [weight for one in left for weight in one.weights]
        traffic = checkpoint.remote.traffic if checkpoint.remote is not None else None
        before = (traffic.nbytes, traffic.requests, traffic.retries) if traffic is not None else (0, 0, 0)
        done = work(
            prepared,
            [one.shard for one in left],
            checkpoint=checkpoint,
            device=self._solver,
            jobs=self._posting.request.jobs,
            progress=self._tell,
            lease=here.lease,
            fetch=plan_fetch(checkpoint, weights, OWN_RANGES, root=prepared.root, bank_bytes=0),
            as_given=True,
            tick=self._look_up,
        )
        after = (traffic.nbytes, traffic.requests, traffic.retries) if traffic is not None else (0, 0, 0)
        fetched = (after[0] - before[0], after[1] - before[1], after[2] - before[2])
        return Said(solved=done.solved, stages=done.stages, waited=done.waited, traffic=fetched)

    def _tell(self, progress: Progress) -> None:
        if progress.stage in SHARED_STAGES:
            self._said.append(progress)
        self._look_up()

    def _look_up(self) -> None:
        if self._stopping.is_set():
            raise _Stopped
