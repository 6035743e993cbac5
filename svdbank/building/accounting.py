"""Progress of a build in one place: weights, bytes and flops done, seconds left, who is at it and who waits for bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

from svdbank.building.preparation import PreparedBuild
from svdbank.building.shards import shard_works
from svdbank.building.shares import cost
from svdbank.core.specs import BuildProgress, Progress, ProgressCallback

#: Stages in which a worker has nothing to solve because bytes have not come.
_WAITING = ("wait for bytes", "download")

#: What one worker says that is not about itself alone.
SHARED_STAGES = ("decompose", *_WAITING)


class Account:
    """Adds up what workers say; from any thread. ``alive`` names the workers at it."""

    def __init__(self, prepared: PreparedBuild, alive: Iterable[str], progress: ProgressCallback) -> None:
        self._progress = progress
        self._changing = threading.Lock()
        self._begun = time.monotonic()
        works = shard_works(prepared.plan, prepared.weights, prepared.plan.shards)
        #: By the last weight of each shard, which is how it is told of: weights, bytes to read, flops.
        self._shards = {
            work.weights[-1].name: (len(work.weights), sum(weight.nbytes for weight in work.weights), cost(work))
            for work in works
        }
        todo = {(shard.family, shard.index) for shard in prepared.todo}
        before = [self._shards[work.weights[-1].name] for work in works if (work.shard.family, work.shard.index) not in todo]
        self._total, self._done = _summed(self._shards.values()), _summed(before)
        self._before = self._done[2]
        self._alive = list(alive)
        self._waiting: set[str] = set()
        self._told: tuple[object, ...] = ()

    def of(self, worker: str) -> Callable[[Progress], None]:
        """The callback of one worker."""

        def heard(progress: Progress) -> None:
            if progress.stage == "decompose":
                self._solved(worker, progress.item)
            elif progress.stage in _WAITING:
                with self._changing:
                    self._waiting.add(worker)
                if progress.stage == "download":
                    self._progress(progress)
                else:
                    self.show("")
            else:
                self._progress(progress)

        return heard

    def came(self, worker: str) -> None:
        """A worker has come. Time counts from the first one on."""
        with self._changing:
            if not self._alive and self._done[2] == self._before:
                self._begun = time.monotonic()
            self._alive.append(worker)

    def gone(self, worker: str) -> None:
        """A worker has ended."""
        with self._changing:
            self._waiting.discard(worker)
            if worker in self._alive:
                self._alive.remove(worker)

    @property
    def done(self) -> int:
        """Weights that are done, those that were before among them."""
        return int(self._done[0])

    def show(self, item: str) -> None:
        """Say how far all are, unless that has been said."""
        with self._changing:
            done, total = list(self._done), self._total
            told = (done, list(self._alive), set(self._waiting))
            if told == self._told:
                return
            self._told = told
            elapsed, solved = time.monotonic() - self._begun, done[2] - self._before
            report = BuildProgress(
                stage="decompose",
                done=done[0],
                total=total[0],
                unit="weights",
                item=item,
                bytes_done=int(done[1]),
                bytes_total=int(total[1]),
                flops_done=done[2],
                flops_total=total[2],
                seconds_left=round((total[2] - done[2]) * elapsed / solved, 1) if solved > 0 else None,
                workers=len(self._alive),
                waiting=tuple(sorted(self._waiting)),
            )
        self._progress(report)

    def _solved(self, worker: str, last: str) -> None:
        counted = self._shards.pop(last, None) if last else None
        with self._changing:
            self._waiting.discard(worker)
            if counted is not None:
                self._done = [one + other for one, other in zip(self._done, counted, strict=True)]
        self.show(last)


def _summed(shards: Iterable[tuple[int, int, float]]) -> list[float]:
    """Weights, bytes and flops of these shards."""
    found = list(shards)
    return [sum(column) for column in zip(*found, strict=True)] if found else [0, 0, 0.0]
