"""Many weights at once: on CPUs one a worker with one torch thread, on a GPU equal ones as a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from svdbank.basis import Basis
from svdbank.errors import OptionError
from svdbank.solver.batched import batch_size, filter_batch
from svdbank.solver.devices import Kind, kind_of, start, turns
from svdbank.solver.planning import choose_path
from svdbank.solver.solve import minor_basis
from svdbank.solver.threads import pinned_threads
from svdbank.specs import Side

T = TypeVar("T")

#: Solves that share a GPU at a time, each on a stream of its own: more gain nothing (68, 52, 47 ms a weight with one, two, three).
IN_FLIGHT = 3


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

    def single(index: int) -> Basis:
        return minor_basis(weights[index], ranks[index], side=side, solver=solver, principal=principal, device=device)

    if not weights:
        return []
    target = torch.device(device) if device is not None else weights[0].device
    found: list[Basis | None] = [None] * len(weights)

    def run(group: Sequence[int]) -> None:
        if len(group) == 1:
            found[group[0]] = single(group[0])
            return
        chosen = [weights[index] for index in group]
        bases = minor_batch(chosen, ranks[group[0]], len(group), side=side, device=target)
        for index, basis in zip(group, bases, strict=True):
            found[index] = basis

    groups = _groups(weights, ranks, kind_of(target)) if solver in ("auto", "filter") and not principal else None
    if groups is None:
        groups = [(index,) for index in range(len(weights))]
    start(target)
    with pinned_threads(threads):
        # The host's part of a batch goes on beside the device's part of the next.
        jobs = max(jobs, IN_FLIGHT) if any(len(group) > 1 for group in groups) else jobs
        if jobs == 1 or len(groups) < 2:
            for group in groups:
                run(group)
        else:
            # OpenMP counts by thread: each worker sets its own before its first product.
            workers = ThreadPoolExecutor(min(jobs, len(groups)), "svdbank-solver", torch.set_num_threads, (threads,))
            with workers as pool:
                list(pool.map(lambda group: on_own_stream(target, run, group), groups))
    return [basis for basis in found if basis is not None]


def minor_batch(
    weights: Sequence[Tensor], rank: int, size: int, *, side: Side = "both", device: torch.device | str | None = None
) -> list[Basis]:
    """:func:`minor_basis` of at most ``size`` weights of one shape, as one batch on the ``filter`` path.

    Bytes depend on a weight and on ``size``, not on the others. One that does not pass there is solved by itself, on that path first.
    """
    target = torch.device(device) if device is not None else weights[0].device
    start(target)
    with turns(target).shared():
        try:
            found: list[Basis | str] = filter_batch([weight.detach().to(target) for weight in weights], rank, size, side=side)
        except torch.OutOfMemoryError as error:
            found = [f"filter: {str(error).splitlines()[0][:80]}"] * len(weights)
    return [
        minor_basis(weight, rank, side=side, solver="filter", device=target) if isinstance(basis, str) else basis
        for weight, basis in zip(weights, found, strict=True)
    ]


def _groups(weights: Sequence[Tensor], ranks: Sequence[int], kind: Kind) -> list[tuple[int, ...]] | None:
    """Indices of equal weights that a GPU solves together; None where nothing is."""
    if kind == "cpu":
        return None
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
        alike.setdefault((*weight.shape, rank), []).append(index)
    groups: list[tuple[int, ...]] = []
    for (out_features, in_features, rank), members in alike.items():
        fits = choose_path(out_features, in_features, rank, kind) == "filter"
        size = batch_size(out_features, in_features, len(members)) if fits else 1
        groups += [tuple(members[first : first + size]) for first in range(0, len(members), size)]
    return groups


def on_own_stream(device: torch.device, work: Callable[[T], None], argument: T) -> None:
    """``work(argument)`` on a CUDA stream of this thread's own; what it made is ready when this returns."""
    if device.type != "cuda":
        work(argument)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work(argument)
    stream.synchronize()
