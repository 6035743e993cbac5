"""The schedule of a build on many workers, played through with measured costs: the order, batches and claims are those of the work."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from svdbank.bank.sessions import Key
from svdbank.building.costs import ShardCost
from svdbank.building.fetching import READ_AHEAD, READERS
from svdbank.building.memory import DEVICE_AHEAD, IN_FLIGHT, WRITERS
from svdbank.building.rates import Rates
from svdbank.building.shards import Batch, ShardWork, batched, in_order
from svdbank.building.shares import divided
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.specs import Plan

Then = Callable[[], None]


@dataclass(frozen=True)
class Staff:
    """Who works: ``workers``, each solving ``jobs`` small weights at a time on ``threads`` threads of a CPU, ``machine`` on a machine."""

    workers: int
    threads: int
    jobs: int
    machine: int


@dataclass(frozen=True)
class Build:
    """What is worked on: a plan's shards with what each costs; files come one by one with ``by_file``, over a network with ``remote``."""

    plan: Plan
    works: Sequence[ShardWork]
    costs: Mapping[Key, ShardCost]
    checkpoint: Checkpoint
    places: Mapping[str, int]
    by_file: bool
    remote: bool


@dataclass(frozen=True)
class Played:
    """How it went: seconds until the last record, and the bytes that each worker read."""

    seconds: float
    nbytes: tuple[int, ...]


def play(build: Build, crew: Staff, rates: Rates) -> Played:
    """Play the work of ``crew`` through. Start-up and publish come on top."""
    clock = _Clock()
    parts = divided(build.works, crew.workers, build.places, by_file=build.by_file)
    unclaimed = _Unclaimed(parts)
    machines = [_Shared(clock, rates.processors if rates.kind != "cpu" else rates.at_once, _slowdown(rates)) for _ in parts]
    workers = []
    for number in range(crew.workers):
        processors = machines[number // crew.machine if rates.kind == "cpu" else number]
        workers.append(_Worker(number, build, crew, rates, clock, processors, unclaimed))
    for worker in workers:
        worker.next_round()
    clock.run()
    return Played(max(worker.recorded for worker in workers), tuple(worker.nbytes for worker in workers))


def _slowdown(rates: Rates) -> float:
    return rates.slowdown if rates.kind == "cpu" else 1.0


class _Clock:
    """What happens next."""

    def __init__(self) -> None:
        self.now = 0.0
        self._number = 0
        self._events: list[tuple[float, int, Then]] = []

    def at(self, when: float, then: Then) -> None:
        self._number += 1
        heapq.heappush(self._events, (when, self._number, then))

    def run(self) -> None:
        while self._events:
            self.now, _, then = heapq.heappop(self._events)
            then()


class _Shared:
    """Processors of a machine, or a device: ``at_once`` tasks beside each other take ``slowdown`` times as long; more share that."""

    def __init__(self, clock: _Clock, at_once: int, slowdown: float) -> None:
        self._clock = clock
        self._at_once = at_once
        self._slowdown = slowdown
        #: Seconds of work that every task has had, since the beginning, and when that was so.
        self._had = self._looked = 0.0
        self._busy = 0
        self._number = 0
        self._tasks: list[tuple[float, int, int, Then]] = []

    def speed(self, busy: int) -> float:
        """Of each of ``busy`` threads, 1 for one alone."""
        if busy <= 1:
            return 1.0
        if busy <= self._at_once:
            return 1 / (1 + (self._slowdown - 1) * (busy - 1) / (self._at_once - 1))
        return self._at_once / busy / (self._slowdown if self._at_once > 1 else 1.0)

    def start(self, seconds: float, then: Then, *, threads: int = 1) -> None:
        """Begin work of so many seconds (those of a solve on several threads were measured on as many)."""
        self._look()
        self._busy += threads
        self._number += 1
        work = seconds * self.speed(threads) if threads > 1 else seconds
        heapq.heappush(self._tasks, (self._had + work, self._number, threads, then))
        self._wake()

    def _look(self) -> None:
        self._had += (self._clock.now - self._looked) * self.speed(self._busy)
        self._looked = self._clock.now

    def _wake(self) -> None:
        if self._tasks:
            due, number = self._tasks[0][0], self._number
            self._clock.at(
                self._clock.now + max(0.0, due - self._had) / self.speed(self._busy), lambda: self._done(due, number)
            )

    def _done(self, due: float, number: int) -> None:
        if number != self._number or not self._tasks or self._tasks[0][0] != due:
            return  # something began or ended meanwhile
        self._look()
        self._had = max(self._had, due)
        _, _, threads, then = heapq.heappop(self._tasks)
        self._busy -= threads
        self._number += 1
        then()
        if number + 1 == self._number:
            self._wake()


class _Unclaimed:
    """The shards that nobody has claimed, by the share that they are in."""

    def __init__(self, parts: Sequence[Sequence[ShardWork]]) -> None:
        self.parts = parts
        self._share = {_key(work): number for number, part in enumerate(parts) for work in part}
        self._left = [len(part) for part in parts]

    def take(self, work: ShardWork) -> bool:
        """Claim a shard; False where somebody has it."""
        share = self._share.pop(_key(work), None)
        if share is None:
            return False
        self._left[share] -= 1
        return True

    def others(self, number: int) -> list[ShardWork]:
        """What is left of the shares after that of a worker, each from its end."""
        found: list[ShardWork] = []
        if self._share:
            for share in (*range(number + 1, len(self.parts)), *range(number)):
                if self._left[share]:
                    found += [work for work in reversed(self.parts[share]) if _key(work) in self._share]
        return found


class _Item:
    """A batch with those of its shards that a worker has claimed."""

    def __init__(self, batch: Batch, costs: Sequence[ShardCost]) -> None:
        self.threads = batch.threads
        #: Reads that are not over yet.
        self.missing = 0
        self.weights, self.nbytes, self.loaded = (
            sum(column) for column in zip(*((c.weights, c.nbytes, c.loaded) for c in costs), strict=True)
        )
        self.read = sum(cost.read + cost.hash for cost in costs)
        self.disk = sum(cost.disk for cost in costs)
        self.upload = sum(cost.upload for cost in costs)
        self.solve = sum(cost.solve for cost in costs)
        self.write = sum(cost.write + cost.record for cost in costs)


class _Worker:
    """One worker: a reader that claims and reads ahead, solves, and writing behind them, as :mod:`svdbank.building.execution` has it."""

    def __init__(
        self,
        number: int,
        build: Build,
        crew: Staff,
        rates: Rates,
        clock: _Clock,
        processors: _Shared,
        unclaimed: _Unclaimed,
    ) -> None:
        self.nbytes = 0
        #: When its last record was made.
        self.recorded = 0.0
        self._number, self._build, self._crew, self._rates, self._clock = number, build, crew, rates, clock
        self._processors, self._unclaimed = processors, unclaimed
        self._on_gpu = rates.kind != "cpu"
        self._device = _Shared(clock, rates.at_once, rates.slowdown)
        self._readers = READERS if build.remote else min(READERS, rates.processors) if self._on_gpu else 1
        self._limit = DEVICE_AHEAD if self._on_gpu else READ_AHEAD if build.remote else 0
        self._round = 0
        self._waiting: Iterator[Batch] = iter(())
        self._drawn: _Item | None = None
        self._ahead: deque[_Item] = deque()
        self._reads: deque[tuple[_Item, float, float]] = deque()
        self._reading = self._running = self._solving = 0
        self._turns: deque[_Item] = deque()
        self._phase = 1
        self._ending = False

    def next_round(self) -> None:
        """Begin with the own share, then with the ends of others', as :mod:`svdbank.building.joining` has it."""
        self._ending = False
        if self._round == 0:
            mine = self._unclaimed.parts[self._number]
            chosen = in_order(mine, self._build.checkpoint, by_file=self._build.by_file)
        else:
            chosen = self._unclaimed.others(self._number)
        self._round += 1
        if not chosen and self._round > 1:
            return
        kind, by_file = self._rates.kind, self._build.by_file
        self._waiting = iter(batched(chosen, self._build.plan, self._build.checkpoint, kind, by_file=by_file))
        self._fill()
        self._advance()

    def _claimed(self) -> _Item | None:
        """The next batch with shards that nobody has claimed."""
        for batch in self._waiting:
            if own := [self._build.costs[_key(work)] for work in batch.works if self._unclaimed.take(work)]:
                return _Item(batch, own)
        return None

    def _fill(self) -> None:
        """As :class:`svdbank.building.reading.Reader` does."""
        while (item := self._drawn or self._claimed()) is not None:
            self._drawn = item
            held = sum(other.loaded for other in self._ahead)
            if self._ahead and held + item.loaded > self._limit:
                break
            self._drawn = None
            self._ahead.append(item)
            self.nbytes += item.nbytes
            item.missing = min(self._readers, item.weights)
            self._reads += [(item, item.read / item.missing, item.disk / item.missing)] * item.missing
        self._read()

    def _read(self) -> None:
        while self._reads and self._reading < self._readers:
            item, busy, disk = self._reads.popleft()
            self._reading += 1

            def copied(item: _Item = item, disk: float = disk) -> None:
                self._clock.at(self._clock.now + disk, lambda: self._was_read(item))

            self._processors.start(busy, copied)

    def _was_read(self, item: _Item) -> None:
        self._reading -= 1
        item.missing -= 1
        self._read()
        self._advance()

    def _advance(self) -> None:
        """Begin what can be begun; at the end of a round the next."""
        while self._ahead and not self._ahead[0].missing:
            threads = 0 if self._on_gpu else self._ahead[0].threads
            if threads != self._phase and self._running:
                return
            self._phase = threads
            at_once = IN_FLIGHT + WRITERS if self._on_gpu else self._crew.jobs if threads == 1 else 1
            if self._running >= at_once:
                return
            item = self._ahead.popleft()
            self._running += 1
            self._solve(item)
            self._fill()
        if not self._ahead and self._drawn is None and not self._running and not self._ending:
            self._ending = True
            self._clock.at(self._clock.now, self.next_round)

    def _solve(self, item: _Item) -> None:
        if not self._on_gpu:
            self._processors.start(item.solve, lambda: self._write(item), threads=item.threads)
            return
        self._clock.at(self._clock.now + item.upload, lambda: self._turn(item))

    def _turn(self, item: _Item | None) -> None:
        """Solve on the device those whose turn it is."""
        if item is not None:
            self._turns.append(item)
        while self._turns and self._solving < IN_FLIGHT:
            one = self._turns.popleft()
            self._solving += 1

            def solved(one: _Item = one) -> None:
                self._solving -= 1
                self._write(one)
                self._turn(None)

            self._device.start(one.solve, solved)

    def _write(self, item: _Item) -> None:
        seconds, busy = item.write, self._rates.busy

        def recorded() -> None:
            self._running -= 1
            self.recorded = self._clock.now
            self._advance()

        def written() -> None:
            self._clock.at(self._clock.now + seconds * (1 - busy), recorded)

        self._processors.start(seconds * busy, written)


def _key(work: ShardWork) -> Key:
    return work.shard.family, work.shard.index
