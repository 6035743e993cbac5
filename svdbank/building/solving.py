"""The bases of a batch: on the CPU, or on a GPU whose turns and memory the solves share."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import torch
from torch import Tensor

from svdbank.bank.writing import STORED_TORCH
from svdbank.building.memory import IN_FLIGHT
from svdbank.building.reading import Loaded
from svdbank.building.shards import Batch
from svdbank.building.stopwatch import Stopwatch
from svdbank.building.transfer import brought_home, uploaded
from svdbank.core.basis import Basis
from svdbank.core.errors import NotFiniteError, SolverError
from svdbank.core.specs import BuildOptions, WeightSpec
from svdbank.solver import batch_bases, minor_basis, on_own_stream
from svdbank.solver.devices import give_back_device, kind_of
from svdbank.solver.threads import pinned_threads

#: Seconds after which one that waits for its turn looks whether memory has run out.
_LET_GO = 0.1


class BatchSolver(Protocol):
    """What a worker solves with."""

    def solved(self, batch: Batch, loaded: Loaded) -> Iterator[tuple[WeightSpec, Basis, Tensor, str]]:
        """Each weight with its basis on the CPU, its matrix and its hash, in order; ``loaded`` is emptied. From any thread."""


class CpuSolver:
    """Solves weights in threads of its own, those of a shard beside each other: the last shard too keeps all of them at work."""

    def __init__(self, options: BuildOptions, watch: Stopwatch) -> None:
        self._options = options
        self._watch = watch
        self._threads: ThreadPoolExecutor | None = None

    @contextlib.contextmanager
    def at_once(self, count: int) -> Iterator[None]:
        """For the length of the block, ``count`` weights at a time."""
        with ThreadPoolExecutor(count, "svdbank-cpu") as self._threads:
            yield

    def solved(self, batch: Batch, loaded: Loaded) -> Iterator[tuple[WeightSpec, Basis, Tensor, str]]:
        """As :meth:`BatchSolver.solved`."""
        assert self._threads is not None, "within at_once"
        # Taken from the list when its turn comes, so that nothing holds a matrix that is solved.
        solving = deque(self._threads.submit(self._one, batch, weight, matrix) for weight, matrix, _ in loaded)
        try:
            while solving:
                basis = solving.popleft().result()
                weight, matrix, sha256 = loaded.pop(0)
                yield weight, basis, matrix, sha256
                del basis, matrix
        finally:
            for left in solving:
                left.cancel()

    def _one(self, batch: Batch, weight: WeightSpec, matrix: Tensor) -> Basis:
        with pinned_threads(batch.threads), self._watch.spending("solve"):
            basis = _solve(weight, matrix, batch, self._options, torch.device("cpu"))
            return brought_home(basis, STORED_TORCH[self._options.dtype])


class GpuSolver:
    """Solves on a GPU, up to ``turns`` batches at once; use it as a context manager around the work.

    Few threads use the device, since each brings the libraries' handles and workspaces with it: one more than solve, which uploads
    meanwhile. How many share it changes no byte of a result.
    """

    def __init__(self, device: torch.device, options: BuildOptions, watch: Stopwatch, largest: int) -> None:
        self._device = device
        self._options = options
        self._watch = watch
        free, _ = torch.cuda.mem_get_info(device)
        #: Who has a turn solves. As many as the ``largest`` batch, in bytes, leaves room for.
        self.turns = max(1, min(IN_FLIGHT, int(0.9 * free) // max(1, largest)))
        self._slots = threading.Semaphore(self.turns)
        self._taking_all = threading.Lock()
        #: Set once memory of the device has run out.
        self._scarce = False
        self._threads = ThreadPoolExecutor(self.turns + 1, "svdbank-device")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown()

    def solved(self, batch: Batch, loaded: Loaded) -> Iterator[tuple[WeightSpec, Basis, Tensor, str]]:
        """As :meth:`BatchSolver.solved`."""
        for basis in self._threads.submit(self._solved_there, batch, list(loaded)).result():
            weight, matrix, sha256 = loaded.pop(0)
            yield weight, basis, matrix, sha256

    def _solved_there(self, batch: Batch, loaded: Loaded) -> list[Basis]:
        """Bases of a batch from the GPU, in the calling thread."""
        found = list[Basis]()
        for first in range(0, len(loaded), batch.size):
            found += self._solved_part(loaded[first : first + batch.size], batch)
        return found

    def _solved_part(self, part: Loaded, batch: Batch) -> list[Basis]:
        """Bases of one batch or weight. Where uploading or fetching finds no memory: again with the device to itself, then on the CPU.

        Weights are uploaded before their turn, while the device solves others; once memory has run out, in it.
        """
        matrices: list[Tensor] = []
        try:
            if not self._scarce:
                with self._watch.spending("upload"):
                    matrices = on_own_stream(self._device, partial(self._upload, part))
            with self._watch.spending("wait for a turn on the device"):
                while not self._slots.acquire(timeout=_LET_GO):
                    if self._scarce:
                        matrices = []
            try:
                with self._watch.spending("upload"):
                    matrices = matrices or on_own_stream(self._device, partial(self._upload, part))
                with self._watch.spending("solve and download"):
                    return on_own_stream(self._device, partial(self._solve_on_device, part, matrices, batch))
            finally:
                self._slots.release()
        except torch.OutOfMemoryError:
            matrices = []
        with self._whole_device():
            try:
                with self._watch.spending("solve and download"):
                    matrices = on_own_stream(self._device, partial(self._upload, part))
                    return on_own_stream(self._device, partial(self._solve_on_device, part, matrices, batch))
            except torch.OutOfMemoryError:
                matrices = []
        before = (f"{batch.path}: out of memory on {self._device} for the weight itself",)
        with self._watch.spending("solve on the CPU"):
            here = torch.device("cpu")
            return [
                brought_home(_solve(weight, matrix, batch, self._options, here, before), STORED_TORCH[self._options.dtype])
                for weight, matrix, _ in part
            ]

    @contextlib.contextmanager
    def _whole_device(self) -> Iterator[None]:
        """Every turn on the device at once, by one thread at a time, with what torch keeps of its memory given back."""
        with self._taking_all:
            self._scarce = True
            for _ in range(self.turns):
                self._slots.acquire()
            try:
                time.sleep(2 * _LET_GO)  # those who wait with an uploaded weight let it go
                give_back_device(self._device)
                yield
            finally:
                for _ in range(self.turns):
                    self._slots.release()

    def _upload(self, part: Loaded) -> list[Tensor]:
        return [uploaded(matrix, self._device) for _, matrix, _ in part]

    def _solve_on_device(self, part: Loaded, matrices: list[Tensor], batch: Batch) -> list[Basis]:
        """Bases of a batch, or of one weight, brought home from the GPU in the dtype of the bank."""
        solved: list[Basis | str] = ["alone"] * len(part)
        if batch.size > 1:
            solved = batch_bases(matrices, batch.family.rank, batch.size, side=self._options.side)
        bases = []
        for (weight, _, _), matrix, basis in zip(part, matrices, solved, strict=True):
            if isinstance(basis, str):
                before = (f"batch: {basis}",) if batch.size > 1 else ()
                basis = _solve(weight, matrix, batch, self._options, self._device, before)
            bases.append(brought_home(basis, STORED_TORCH[self._options.dtype]))
        return bases


@contextlib.contextmanager
def batch_solver(
    device: torch.device, options: BuildOptions, watch: Stopwatch, batches: Sequence[Batch]
) -> Iterator[CpuSolver | GpuSolver]:
    """The solver for ``batches`` on ``device``, for the length of the block."""
    kind = kind_of(device)
    if kind == "cpu":
        yield CpuSolver(options, watch)
        return
    largest = max((batch.device_bytes(kind) for batch in batches), default=0)
    with GpuSolver(device, options, watch, largest) as solver:
        yield solver


def _solve(
    weight: WeightSpec,
    matrix: Tensor,
    batch: Batch,
    options: BuildOptions,
    device: torch.device,
    before: tuple[str, ...] = (),
) -> Basis:
    family = batch.family
    try:
        return minor_basis(
            matrix, family.rank, side=options.side, solver=batch.path, principal=family.principal, device=device, before=before
        )
    except NotFiniteError as cause:
        raise NotFiniteError(
            f"{weight.name} in {weight.sources[0].file}: {cause}",
            hint="leave it out with --targets, or repair the checkpoint",
        ) from cause
    except SolverError as cause:
        raise SolverError(f"{weight.name}: {cause}", hint=cause.hint) from cause
