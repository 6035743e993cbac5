"""``work``: the second of the three steps of a build. Shards are claimed, read, hashed, solved, certified, written and recorded."""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from svdbank.bank.claims import Claims, session_over
from svdbank.bank.leases import Lease
from svdbank.bank.sessions import Session, current_session
from svdbank.bank.writing import BankWriter
from svdbank.building.fetching import READ_AHEAD, READERS, Downloads, FetchPlan, fetched, files_of
from svdbank.building.memory import DEVICE_AHEAD, WRITERS, give_back, shards_in_flight
from svdbank.building.preparation import PreparedBuild
from svdbank.building.reading import Loaded, Reader
from svdbank.building.records import Solved, log, shard_record
from svdbank.building.shards import Batch, batched, in_order, shard_works
from svdbank.building.solving import BatchSolver, GpuSolver, batch_solver
from svdbank.building.stopwatch import Stopwatch
from svdbank.checkpoint.source import Checkpoint
from svdbank.core.errors import OptionError
from svdbank.core.locks import locked
from svdbank.core.probe import taken
from svdbank.core.processors import available_cpus
from svdbank.core.specs import Plan, Progress, ProgressCallback, ShardSpec, WeightSpec
from svdbank.solver.devices import kind_of
from svdbank.solver.threads import pinned_threads

#: Seconds between progress reports while nothing is being solved.
_SHOW_EVERY = 1.0


@dataclass(frozen=True)
class WorkReport:
    """What one call of :func:`work` did: weights it solved, shards that others were at or had done, seconds by stage and without work."""

    solved: int
    elsewhere: tuple[ShardSpec, ...]
    stages: dict[str, float]
    waited: float


def work(
    prepared: PreparedBuild,
    shards: Sequence[ShardSpec],
    *,
    checkpoint: Checkpoint,
    device: torch.device,
    jobs: int,
    beside: int = 1,
    progress: ProgressCallback,
    lease: Lease | None = None,
    fetch: FetchPlan | None = None,
    as_given: bool = False,
    tick: Callable[[], None] = lambda: None,
) -> WorkReport:
    """Solve and record ``shards`` of a prepared build, on a CPU ``jobs`` small weights at a time, or ``beside`` large ones.

    Any number of processes may do so at once, of the same shards too: each shard is claimed by one of them, and what another has
    claimed or recorded is left out. What an interrupt or an error finds under way ends and is recorded. Under ``lease``, or one that is
    taken with the bank's lock; ``fetch`` instead of the build's; ``as_given`` keeps the order of ``shards``;
    ``tick`` is called about once a second.

    Raises OptionError where the plan's solves take more threads than there are processors here, LockedError where the session is over.
    """
    session = prepared.session
    if session is None:
        return WorkReport(0, (), {}, 0.0)
    with contextlib.ExitStack() as stack:
        lease = lease or stack.enter_context(lease_of(session, str(device)))
        claims = stack.enter_context(Claims(session, lease))
        worker = _Worker(prepared, claims, checkpoint, device, (jobs, beside), progress, fetch or prepared.fetch, tick)
        return worker.run(shards, as_given=as_given)


@contextlib.contextmanager
def lease_of(session: Session, device: str) -> Iterator[Lease]:
    """A worker's lease in a session, taken with the bank's lock: nobody deletes the bank or begins another session at that moment."""
    with contextlib.ExitStack() as stack:
        with locked(session.root, waiting=lambda _: None):
            if current_session(session.root) != session:
                raise session_over(session.root)
            lease = stack.enter_context(Lease(session, device=device))
        yield lease


def refuse_few_processors(plan: Plan, here: int) -> None:
    """OptionError where a plan's solves on a CPU take more threads than the ``here`` of this worker: other bytes, or a slow build."""
    needed = max((shard.threads for shard in plan.shards), default=1)
    if needed > here:
        raise OptionError(
            f"the plan solves with {needed} threads, and this worker has {here} (affinity, cgroup limits and --threads count)",
            hint=f"work on {needed} processors, with --threads {needed}; SVDBANK_THREADS={needed} takes fewer for so many, slowly",
        )


class _Worker:
    """One call of :func:`work`."""

    def __init__(
        self,
        prepared: PreparedBuild,
        claims: Claims,
        checkpoint: Checkpoint,
        device: torch.device,
        at_once: tuple[int, int],
        progress: ProgressCallback,
        fetch: FetchPlan,
        tick: Callable[[], None],
    ) -> None:
        self.prepared = prepared
        self.fetch = fetch
        self.tick = tick
        self.claims = claims
        self.checkpoint = checkpoint
        self.device = device
        self.small_at_once, self.large_at_once = at_once
        self.progress = progress
        self.kind = kind_of(device)
        if self.kind == "cpu":
            refuse_few_processors(prepared.plan, available_cpus())
        self.writer = BankWriter(prepared.root, prepared.plan, generation=prepared.generation, session=prepared.session)
        self.watch = Stopwatch()
        self.waited = 0.0
        self.elsewhere: list[ShardSpec] = []

    def run(self, shards: Sequence[ShardSpec], *, as_given: bool) -> WorkReport:
        """Do it."""
        solved, done = 0, self.prepared.recorded
        total = done + sum(shard.stop - shard.start for shard in self.prepared.todo)
        self.progress(Progress("decompose", done, total, "weights", ""))
        for shard in self._recorded(self._batches(shards, as_given=as_given)):
            solved += len(shard)
            self.progress(Progress("decompose", done + solved, total, "weights", shard[-1].name))
        return WorkReport(solved, tuple(self.elsewhere), self.watch.seconds(), self.waited)

    def _batches(self, shards: Sequence[ShardSpec], *, as_given: bool) -> list[Batch]:
        by_file = self.fetch.way == "shards"
        works = shard_works(self.prepared.plan, self.prepared.weights, shards)
        ordered = works if as_given else in_order(works, self.checkpoint, by_file=by_file)
        return batched(ordered, self.prepared.plan, self.checkpoint, self.kind, by_file=by_file)

    def _claimed(self, batches: Sequence[Batch], downloads: Downloads) -> Iterator[Batch]:
        """Batches of the shards that nobody else works on or has done, claimed when they are asked for."""
        for batch in batches:
            own = []
            for one in batch.works:
                is_mine = self.claims.take(one.shard)
                if is_mine and not self.writer.session.record_path(one.shard.family, one.shard.index).exists():
                    own.append(one)
                    continue
                if is_mine:
                    self.claims.release(one.shard)
                self.elsewhere.append(one.shard)
                for weight in one.weights:
                    downloads.done(files_of(weight))
            if own:
                yield batch.of(own)

    def _recorded(self, batches: list[Batch]) -> Iterator[tuple[WeightSpec, ...]]:
        """Read and solve shards, yielding the weights of each once its record is durable."""
        remote = self.fetch.way in ("shards", "ranges")
        on_gpu = self.kind != "cpu"
        threads = READERS if remote else min(READERS, available_cpus()) if on_gpu else 1
        # Reads outlive downloads: a read that waits for a download is told to give up when that ends.
        with Reader(threads=threads, ahead=DEVICE_AHEAD if on_gpu else READ_AHEAD if remote else 0) as reader:
            begun = time.perf_counter()
            weights = [weight for batch in batches for weight in batch.weights]
            with (
                fetched(self.checkpoint, weights, self.fetch, self.progress) as downloads,
                batch_solver(self.device, self.prepared.plan.options, self.watch, batches) as solver,
            ):
                self.waited += time.perf_counter() - begun  # a whole download comes before everything else

                def read(weight: WeightSpec) -> tuple[Tensor, str]:
                    with self.watch.spending("read and hash"):
                        result = self.checkpoint.read_hashed(weight)
                    downloads.done(files_of(weight))
                    return result

                reader.start(self._claimed(batches, downloads), read)
                if isinstance(solver, GpuSolver):
                    # What is solved is written while others are.
                    with pinned_threads(1):
                        yield from self._solved(reader, solver, at_once=solver.turns + WRITERS, threads=None)
                    return
                # One thread count at a time: two solves with different counts would fight over the processors.
                while (batch := reader.next) is not None:
                    at_once = self.small_at_once if batch.threads == 1 else self.large_at_once
                    with pinned_threads(batch.threads), solver.at_once(at_once):
                        yield from self._solved(reader, solver, at_once=at_once, threads=batch.threads)

    def _solved(
        self, reader: Reader, solver: BatchSolver, *, at_once: int, threads: int | None
    ) -> Iterator[tuple[WeightSpec, ...]]:
        """Solve batches, or on a CPU weights, ``at_once`` at a time, while the next are read: those that follow with this thread count,
        or all (None).
        """
        with ThreadPoolExecutor(at_once, "svdbank-solve") as solvers:
            running: set[Future[list[tuple[WeightSpec, ...]]]] = set()
            try:
                while (batch := reader.next) is not None and threads in (None, batch.threads):
                    most = at_once if threads is None else shards_in_flight(at_once, len(batch.weights))
                    while len(running) >= most:
                        finished, running = self._some_of(running)
                        for future in finished:
                            yield from future.result()
                    begun = time.perf_counter()
                    while (pending := reader.pending()) is not None:
                        either: set[Future[Any]] = {pending, *running}
                        wait(either, timeout=_SHOW_EVERY, return_when=FIRST_COMPLETED)
                        del either, pending  # they hold what was read
                        self.tick()
                        finished = {future for future in running if future.done()}
                        running -= finished
                        for future in finished:
                            yield from future.result()
                        if not running:
                            self._show_download()
                    self.waited += time.perf_counter() - begun
                    loaded = reader.take()
                    running.add(solvers.submit(self._solve_and_record, batch, loaded, solver))
                    del loaded
                while running:
                    finished, running = self._some_of(running)
                    for future in finished:
                        yield from future.result()
            except BaseException:
                # The solves under way end and are recorded; nothing new starts.
                solvers.shutdown(wait=False, cancel_futures=True)
                raise

    def _some_of(self, running: set[Future[Any]]) -> tuple[set[Future[Any]], set[Future[Any]]]:
        """Wait for the first that ends: those that have ended, and the others."""
        while True:
            finished, left = wait(running, timeout=_SHOW_EVERY, return_when=FIRST_COMPLETED)
            self.tick()
            if finished:
                return finished, left

    def _show_download(self) -> None:
        """Nothing is being solved: say what is waited for."""
        nbytes, remote = self.fetch.nbytes, self.checkpoint.remote
        if nbytes and remote is not None:
            self.progress(Progress("download", min(remote.traffic.nbytes, nbytes), nbytes, "bytes"))
        else:
            self.progress(Progress("wait for bytes", 0, 1, "reads"))

    def _solve_and_record(self, batch: Batch, loaded: Loaded, solver: BatchSolver) -> list[tuple[WeightSpec, ...]]:
        """Solve the weights of a batch's shards, giving each up once it is solved, and write them; the weights of each shard."""
        started = time.perf_counter()
        solved: list[Solved] = []
        recorded: list[tuple[WeightSpec, ...]] = []
        with pinned_threads(batch.threads if self.kind == "cpu" else 1):
            for weight, basis, matrix, sha256 in solver.solved(batch, loaded):
                solved.append(Solved(weight, basis, sha256, array("d", taken(matrix))))
                del matrix
        for one in batch.works:
            count = len(one.weights)
            own, solved = solved[:count], solved[count:]
            with self.watch.spending("write and record"):
                try:
                    record = self.writer.write_shard(one.shard, [each.basis for each in own], shard_record(one, own))
                except FileNotFoundError as cause:
                    raise session_over(self.prepared.root) from cause
            recorded += [one.weights] if record is not None else []
            own.clear()
            self.claims.release(one.shard)
            give_back()
            seconds = round(time.perf_counter() - started, 4)
            facts = {"seconds": seconds, "recorded": record is not None}
            log(self.prepared.root, "shard", family=one.family.name, index=one.shard.index, **facts)
        return recorded
