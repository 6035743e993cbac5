"""The driver of a build on a cluster: gives bundles to the workers that Ray has started, and takes back those of workers that are gone.

Which shards are done the records say, and who is at one its claim: a bundle may be given out twice, and nothing is solved twice for it.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from svdbank.bank.claims import is_free, session_over
from svdbank.bank.sessions import current_session
from svdbank.building.accounting import Account
from svdbank.building.bundles import Bundles
from svdbank.building.cluster import Cluster
from svdbank.building.execution import WorkReport
from svdbank.building.joining import Workplace, is_published
from svdbank.building.planning import planned_path
from svdbank.building.request import BuildRequest
from svdbank.building.shards import ShardWork, shard_works
from svdbank.building.visit import OWN_RANGES, Posting
from svdbank.building.words import Said, own_error
from svdbank.core.errors import WorkerError
from svdbank.core.places import OnDisk, locate
from svdbank.core.specs import Progress, ProgressCallback, ShardSpec

#: Bundles that a worker has at a time: what it does, and what it does next.
_IN_FLIGHT = 2

#: Seconds after which the workers are asked how they are, the cluster what it has, and records are looked at.
_LOOK_AGAIN, _COUNT_AGAIN = 1.0, 5.0

#: Seconds without an answer after which a worker's bundles are given to others as well: it, or its machine, is gone or stopped.
_AWAY = 15.0

#: Workers that may end over a shard, each with Ray's own restarts, before it is taken to be the cause.
_ENDS = 3


@dataclass(eq=False)
class _Member:
    name: str
    actor: Any
    joining: Any
    joined: bool = False
    tasks: dict[Any, tuple[ShardWork, ...]] = field(default_factory=dict)
    begun: float = 0.0
    talk: Any = None
    heard: float = 0.0
    rests_until: float = 0.0

    @property
    def is_away(self) -> bool:
        return time.monotonic() - self.heard > _AWAY


class Dispatch:
    """Workers on a cluster at one build. Use it as a context manager: at its end, however that comes, every worker that is there is told to
    stop, keeps what it has done and leaves."""

    def __init__(
        self, cluster: Cluster, here: Workplace, request: BuildRequest, device: str, progress: ProgressCallback
    ) -> None:
        prepared, session, lease = here.prepared, here.prepared.session, here.lease
        assert session is not None and lease is not None
        self._cluster, self._prepared, self._session, self._lease = cluster, prepared, session, lease
        self._device = device
        self._most = request.workers
        #: Processors of a worker: as many as a large weight's solve takes, or as small ones that it solves at a time.
        self._threads = max(request.threads, *(shard.threads for shard in prepared.plan.shards))
        own = msgspec.structs.replace(
            request,
            model=_everywhere(request.model),
            output=prepared.root.resolve(),
            fetch=OWN_RANGES,
            workers=None,
            threads=self._threads,
        )
        self._jobs = request.jobs
        self._posting = Posting(own, session.name, lease.name)
        self._account = Account(prepared, (), progress)
        self._progress = progress
        works = shard_works(prepared.plan, prepared.weights, prepared.todo)
        places = {file.name: number for number, file in enumerate(here.checkpoint.files)}
        self._bundles = Bundles(works, places, self._at_once)
        #: Given out, and neither recorded nor with a worker of ours: others are at them, or were.
        self._elsewhere: list[ShardWork] = []
        self._members: list[_Member] = []
        self._hired = 0
        #: Workers in a row that ended, or were refused, before they had joined.
        self._unfit = 0
        self._ends: Counter[ShardSpec] = Counter()
        self._looked = self._counted = 0.0
        self._over = False
        self._done = WorkReport(0, (), {}, 0.0)
        self._traffic = (0, 0, 0)

    def __enter__(self) -> Dispatch:
        return self

    def __exit__(self, *_: object) -> None:
        waiting = {}
        for member in self._members:
            if member.joined and not member.is_away:
                member.talk = _talk(member.actor, stop=True)
                waiting[member.actor.leave.options(max_task_retries=0).remote()] = member
        ray = self._cluster.ray
        # A second interrupt gives up what is being solved.
        with contextlib.suppress(KeyboardInterrupt):
            while waiting := {ref: member for ref, member in waiting.items() if not member.is_away}:
                for ref in ray.wait(list(waiting), num_returns=len(waiting), timeout=_LOOK_AGAIN)[0]:
                    del waiting[ref]
                for member in waiting.values():
                    if ray.wait([member.talk], timeout=0)[0]:
                        member.heard, member.talk = time.monotonic(), _talk(member.actor, stop=True)
        for member in self._members:
            ray.kill(member.actor)

    def run(self) -> tuple[WorkReport, tuple[int, int, int]]:
        """Have all recorded: a report over all workers, and bytes, requests and retries of what they fetched.

        The first error of a worker is raised in its own words. Whoever dies costs what it was at.
        """
        begun = self._account.done
        self._account.show("")
        if self._most is None:
            self._cluster.refuse_no_room(self._device, self._threads)
        self._cluster.look_around(self._posting, self._device, self._threads)
        while not self._over and (self._bundles or self._elsewhere or any(member.tasks for member in self._members)):
            self._look()
            self._give()
            self._wait()
        return replace(self._done, solved=self._account.done - begun), self._traffic

    def _look(self) -> None:
        """About once a second: who is there, who is missing, what others have done."""
        now = time.monotonic()
        if now - self._looked < _LOOK_AGAIN:
            return
        self._looked = now
        try:
            lease_now = self._lease.now()
        except FileNotFoundError as cause:
            if not is_published(self._prepared):
                raise session_over(self._prepared.root) from cause
            self._over = True  # others have been quicker
            return
        if now - self._counted >= _COUNT_AGAIN:
            self._counted = now
            self._hire()
        for member in self._members:
            if member.joined and member.talk is None:
                member.talk = _talk(member.actor, stop=False)
            if member.joined and member.is_away and member.tasks:
                self._account.show(f"{member.name} does not answer")
                self._take_back(member)
        for work in self._elsewhere[:]:
            if not self._is_left(work):
                self._elsewhere.remove(work)
            elif is_free(self._session, work.shard, lease_now):
                self._elsewhere.remove(work)
                self._bundles.back((work,))
        if not any(member.joined and not member.is_away for member in self._members):
            left = sum(one.stop - one.start for one in self._prepared.todo)
            what = f"{'a GPU' if self._device == 'cuda' else f'{self._threads} processors'} of Ray for a worker"
            self._progress(Progress("wait for a place", 0, left, "weights", what))

    def _hire(self) -> None:
        """As many workers as are wanted, or as there is room for: those of machines that come later start then."""
        wanted = self._most or self._cluster.room(self._device, self._threads)
        left = (
            len(self._bundles)
            + len(self._elsewhere)
            + sum(len(bundle) for one in self._members for bundle in one.tasks.values())
        )
        while len(self._members) < min(wanted, left) and self._unfit < _ENDS:
            self._hired += 1
            actor = self._cluster.started(self._posting, self._device, self._threads)
            self._members.append(_Member(f"worker {self._hired} ({self._device})", actor, actor.join.remote()))

    def _give(self) -> None:
        """A bundle to everybody who has none, then a second one."""
        now = time.monotonic()
        able = [one for one in self._members if one.joined and not one.is_away and one.rests_until <= now]
        for already in range(_IN_FLIGHT):
            for member in able:
                if len(member.tasks) == already and (bundle := self._bundles.next(len(able), self._is_left)):
                    if not member.tasks:
                        member.begun = now
                    keys = [(work.shard.family, work.shard.index) for work in bundle]
                    member.tasks[member.actor.work.remote(keys)] = bundle

    def _wait(self) -> None:
        """Take in what has come within a moment."""
        ray = self._cluster.ray
        refs: dict[Any, _Member] = {}
        for member in self._members:
            refs |= dict.fromkeys((*member.tasks, *([member.talk] if member.talk is not None else ())), member)
            if not member.joined:
                refs[member.joining] = member
        if not refs:
            time.sleep(_LOOK_AGAIN / 4)
            return
        ready, _ = ray.wait(list(refs), num_returns=1, timeout=_LOOK_AGAIN)
        if ready:
            ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=0)
        for ref in ready:
            self._take(refs[ref], ref)

    def _take(self, member: _Member, ref: Any) -> None:
        """What a worker has answered, or that it cannot."""
        from ray.exceptions import ActorDiedError, RayError, RayTaskError

        try:
            answer = self._cluster.ray.get(ref)
        except RayTaskError as cause:
            raise WorkerError(f"{member.name}: {str(cause).strip().splitlines()[-1]}") from cause
        except RayError as cause:
            self._miss(member, ref, gone=isinstance(cause, ActorDiedError))
            return
        member.heard = time.monotonic()
        if ref == member.joining:
            self._welcome(member, answer)
        elif ref == member.talk:
            member.talk = None
            for progress in answer:
                self._account.of(member.name)(progress)
        else:
            self._finish(member, member.tasks.pop(ref, ()), answer)

    def _welcome(self, member: _Member, said: Said) -> None:
        if said.error is None:
            member.joined = True
            self._unfit = 0
            member.name = f"{member.name[:-1]} on {said.host})"
            self._account.came(member.name)
            self._account.show("")
            return
        # A machine that came after the others were looked at.
        self._progress(Progress("left out", 0, 1, "note", f"{member.name}: {said.message}"))
        self._members.remove(member)
        self._cluster.ray.kill(member.actor)
        self._unfit += 1
        if not any(other.joined for other in self._members):
            raise own_error(member.name, said)

    def _finish(self, member: _Member, bundle: tuple[ShardWork, ...], said: Said) -> None:
        now = time.monotonic()
        self._account.of(member.name)(Progress("decompose", 0, 1, "weights"))  # it waits for no bytes
        if said.error == "LockedError" and current_session(self._prepared.root) == self._session:
            member.rests_until = now + _LOOK_AGAIN  # it was silent for longer than its lease, and joins again
        elif said.error is not None:
            if is_published(self._prepared):
                return
            raise own_error(member.name, said)
        else:
            if said.solved == sum(len(work.weights) for work in bundle):  # nothing of it was with others
                self._bundles.took(bundle, now - member.begun)
        member.begun = now
        self._elsewhere += [work for work in bundle if self._is_left(work)]
        stages = dict(self._done.stages)
        for stage, seconds in said.stages.items():
            stages[stage] = round(stages.get(stage, 0.0) + seconds, 4)
        self._done = WorkReport(0, (), stages, self._done.waited + said.waited)
        self._traffic = tuple(map(sum, zip(self._traffic, said.traffic, strict=True)))  # type: ignore[assignment]

    def _miss(self, member: _Member, ref: Any, *, gone: bool) -> None:
        """A worker has not answered: Ray starts it again, or it is gone for good."""
        if ref == member.talk:
            member.talk = None
            if not gone:
                return
        at = next(iter(member.tasks.values()), ())
        self._elsewhere += [work for work in member.tasks.pop(ref, ()) if self._is_left(work)]
        member.rests_until = time.monotonic() + _LOOK_AGAIN
        if ref == member.joining and not gone:
            member.joining = member.actor.join.remote()
        if not gone or member not in self._members:
            return
        self._members.remove(member)
        self._account.gone(member.name)
        self._account.show(f"{member.name} is gone")
        self._unfit += not member.joined
        if self._unfit >= _ENDS and not self._members:
            raise WorkerError("workers end before they have begun", hint="Ray's logs say why: /tmp/ray/session_latest/logs")
        if (first := next((work for work in at if self._is_left(work)), None)) is not None:
            self._ends[first.shard] += 1
            if self._ends[first.shard] >= _ENDS:
                raise WorkerError(
                    f"{first.weights[0].name}: whoever is at it ends without a word, again and again (out of memory?)",
                    hint="leave it out with --targets, or give a worker more memory; what was finished is kept",
                )
        self._take_back(member)
        self._counted = 0.0

    def _take_back(self, member: _Member) -> None:
        """What a worker was given goes to others as well; where it lives on, its claims hold."""
        for bundle in member.tasks.values():
            self._elsewhere += [work for work in bundle if self._is_left(work)]
        member.tasks.clear()
        member.rests_until = time.monotonic() + _LOOK_AGAIN

    def _is_left(self, work: ShardWork) -> bool:
        if not self._session.record_path(work.shard.family, work.shard.index).exists():
            return True
        self._account.of("")(Progress("decompose", 0, 1, "weights", work.weights[-1].name))
        return False

    def _at_once(self, work: ShardWork) -> int:
        """How many shards of a kind a worker solves together."""
        if self._device == "cpu":
            return self._jobs if work.shard.threads == 1 else 1
        return max(1, planned_path(self._prepared.plan, work.family, "cuda").batch // work.family.weights_per_shard)


def _talk(actor: Any, *, stop: bool) -> Any:
    """Ask a worker beside its work; not again where it does not answer."""
    return actor.talk.options(concurrency_group="talk", max_task_retries=0).remote(stop)


def _everywhere(model: str | Path) -> str | Path:
    """A model's name as every machine understands it."""
    place = locate(model)
    return place.path.resolve() if isinstance(place, OnDisk) else model
