"""Many weights at once: on CPUs one a worker with one torch thread, on a GPU equal ones as a batch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from svdbank.core.basis import Basis
from svdbank.core.errors import OptionError
from svdbank.core.specs import Side
from svdbank.solver.batched import filter_batch
from svdbank.solver.devices import give_back_device, kind_of, start, turns
from svdbank.solver.planning import choose_path
from svdbank.solver.sizes import DeviceKind, batch_size
from svdbank.solver.solve import check_request, minor_basis
from svdbank.solver.threads import pinned_threads

T = TypeVar("T")

_own = threading.local()

#: Batches that share a GPU at a time, each on a stream of its own; a third one only waits for the interpreter (measured).
IN_FLIGHT = 2


def minor_bases(
    weights: Iterable[Tensor],
    rank: int | Sequence[int],
    *,
    jobs: int = 1,
    threads: int = 1,
    side: Side = "both",
    solver: str = "auto",
    principal: int = 0,
    device: torch.device | str | None = None,
) -> list[Basis]:
    """:func:`minor_basis` of each of ``weights``, in order; ``jobs`` of them at a time with ``threads`` torch threads each.

    ``rank`` is one rank for all or one a weight. The bytes of a result depend on ``threads`` and not on ``jobs``; on a GPU, where equal
    weights are solved as batches, on the size of the batch. The first error is raised after the running solves have ended.
    """
    if jobs < 1:
        raise OptionError(f"jobs must be at least 1, not {jobs}")
    weights = list(weights)
    ranks = [rank] * len(weights) if isinstance(rank, int) else list(rank)
    if len(ranks) != len(weights):
        raise OptionError(f"{len(ranks)} ranks were given for {len(weights)} weights")

    def single(index: int, path: str = solver, before: tuple[str, ...] = ()) -> Basis:
        return minor_basis(
            weights[index], ranks[index], side=side, solver=path, principal=principal, device=device, before=before
        )

    if not weights:
        return []
    for weight, own in zip(weights, ranks, strict=True):
        check_request(weight, own, side, principal)
    target = torch.device(device) if device is not None else weights[0].device
    found: list[Basis | None] = [None] * len(weights)

    def run(group: tuple[int, ...]) -> None:
        if sizes[group] == 1:
            found[group[0]] = single(group[0])
            return
        chosen = [weights[index] for index in group]
        bases = batch_bases(chosen, ranks[group[0]], sizes[group], side=side, device=target)
        for index, basis in zip(group, bases, strict=True):
            found[index] = single(index, "filter", (f"batch: {basis}",)) if isinstance(basis, str) else basis

    sizes: dict[tuple[int, ...], int] = {(index,): 1 for index in range(len(weights))}
    if kind_of(target) != "cpu" and solver in ("auto", "filter") and not principal:
        sizes = _groups(weights, ranks, kind_of(target))
    groups = list(sizes)
    start(target)
    with pinned_threads(threads):
        # The host's part of a batch goes on beside the device's part of the next.
        jobs = max(jobs, IN_FLIGHT) if max(sizes.values()) > 1 else jobs
        if jobs == 1 or len(groups) < 2:
            for group in groups:
                run(group)
        else:
            # OpenMP counts by thread: each worker sets its own before its first product.
            workers = ThreadPoolExecutor(min(jobs, len(groups)), "svdbank-solver", torch.set_num_threads, (threads,))
            with workers as pool:
                list(pool.map(lambda group: on_own_stream(target, lambda: run(group)), groups))
    return [basis for basis in found if basis is not None]


def batch_bases(
    weights: Sequence[Tensor], rank: int, size: int, *, side: Side = "both", device: torch.device | str | None = None
) -> list[Basis | str]:
    """Certified minor bases of at most ``size`` weights of one shape, solved as one batch; where one has none, the reason.

    Bytes depend on a weight and on ``size``, not on the others. What is left over is for :func:`minor_basis` on the ``filter`` path.
    """
    target = torch.device(device) if device is not None else weights[0].device
    start(target)
    with turns(target).shared() as turn:
        for attempt in range(2):
            if attempt:  # outside the handler, so that what the first attempt held has been let go
                turn.alone()
                give_back_device(target)
            try:
                moved = [weight.detach().to(target, non_blocking=True) for weight in weights]
                return filter_batch(moved, rank, size, side=side)
            except torch.OutOfMemoryError as error:
                reason = f"filter: {str(error).splitlines()[0][:80]}"
    return [reason] * len(weights)


def _groups(weights: Sequence[Tensor], ranks: Sequence[int], kind: DeviceKind) -> dict[tuple[int, ...], int]:
    """Indices of equal weights that a GPU solves together, with the size of the batch that they make, full or not."""
    alike: dict[tuple[int, int, int, torch.dtype, torch.device], list[int]] = {}
    for index, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
        alike.setdefault((*weight.shape, rank, weight.dtype, weight.device), []).append(index)
    groups: dict[tuple[int, ...], int] = {}
    for (out_features, in_features, rank, dtype, _), members in alike.items():
        size = batch_size(out_features, in_features, len(members), kind) if dtype.itemsize > 1 else 1
        if choose_path(out_features, in_features, rank, kind, size) != "filter":
            size = 1
        groups |= {tuple(members[first : first + size]): size for first in range(0, len(members), size)}
    return groups


def on_own_stream(device: torch.device, work: Callable[[], T]) -> T:
    """What ``work()`` returns, done on this thread's own CUDA stream and finished; elsewhere just ``work()``."""
    if device.type != "cuda":
        return work()
    streams: dict[torch.device, torch.cuda.Stream] = _own.__dict__.setdefault("streams", {})
    if device not in streams:  # one a thread: each brings the libraries' workspaces with it
        streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream = streams[device]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result = work()
    stream.synchronize()
    return result
