"""Many small weights at once: one weight a worker, one torch thread each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from svdbank.basis import Basis
from svdbank.errors import OptionError
from svdbank.solver.solve import minor_basis
from svdbank.solver.threads import pinned_threads
from svdbank.specs import Side


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

    ``rank`` is one rank for all or one a weight. The bytes of a result depend on ``threads`` and not on ``jobs``. The first
    error is raised after the running solves have ended.
    """
    if jobs < 1:
        raise OptionError(f"jobs must be at least 1, not {jobs}")
    weights = list(weights)
    ranks = [rank] * len(weights) if isinstance(rank, int) else list(rank)
    if len(ranks) != len(weights):
        raise OptionError(f"{len(ranks)} ranks were given for {len(weights)} weights")

    def one(index: int) -> Basis:
        return minor_basis(weights[index], ranks[index], side=side, solver=solver, principal=principal, device=device)

    with pinned_threads(threads):
        if jobs == 1 or len(weights) < 2:
            return [one(index) for index in range(len(weights))]
        # OpenMP counts by thread: each worker sets its own before its first product.
        workers = ThreadPoolExecutor(min(jobs, len(weights)), "svdbank-solver", torch.set_num_threads, (threads,))
        with workers as pool:
            return list(pool.map(one, range(len(weights))))
