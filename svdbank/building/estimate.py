"""How fast this machine solves, from a small piece of work that is timed here and now: for an estimate that fixes nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from svdbank.core.specs import FamilySpec
from svdbank.solver.planning import choose_path, flops

#: Side of the float64 matrices whose product stands for a CPU; products of larger ones are no faster.
_SIDE, _REPEATS = 512, 3

#: Rate of a solve, by :func:`svdbank.solver.planning.flops`, over that of the product. Measured on one thread of a Xeon: 0.34 for a weight
#: of 192×576, 0.6 to 0.7 from 384×1536 to 1024×2048, 0.59 to 0.83 on the iteration's path (1536×3072 to 2048×2048).
SOLVE_OVER_PRODUCT = 0.65


def solve_rate(device: str = "cpu") -> float:
    """Flops per second of a solve: on a CPU those of one processor, from a product; on a GPU from a solve of its own."""
    return SOLVE_OVER_PRODUCT * _product_rate() if device == "cpu" else _gpu_rate(device)


def solve_seconds(work: Sequence[tuple[FamilySpec, int]]) -> float:
    """An estimate of solving so many weights of each family, on one processor."""
    shapes = [((family.out_features, family.in_features, family.rank), count) for family, count in work]
    needed = sum(count * flops(*shape, choose_path(*shape)) for shape, count in shapes)
    return needed / solve_rate() if needed else 0.0


def _product_rate() -> float:
    """Flops per second and processor of a float64 matrix product, the best of a few; torch is not needed for it.

    Counted in processor time, so that neither other programs nor the number of threads of numpy's BLAS changes what it means.
    """
    left = np.sin(np.arange(float(_SIDE * _SIDE))).reshape(_SIDE, _SIDE)
    right, product = left.T.copy(), np.empty_like(left)
    np.dot(left, right, out=product)  # the first starts the BLAS
    taken = []
    for _ in range(_REPEATS):
        begun = time.process_time()
        np.dot(left, right, out=product)
        taken.append(time.process_time() - begun)
    return 2.0 * _SIDE**3 / max(min(taken), 1e-9)


def _gpu_rate(device: str) -> float:
    import torch

    from svdbank.solver import choose_path, flops, minor_basis, pinned_threads
    from svdbank.solver.devices import kind_of

    out_features, in_features, rank = 2048, 4096, 64
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(device)
    with pinned_threads(1):
        minor_basis(weight, rank)  # the first loads what CUDA needs
        begun = time.perf_counter()
        minor_basis(weight, rank)
        elapsed = time.perf_counter() - begun
    path = choose_path(out_features, in_features, rank, kind_of(torch.device(device)))
    return flops(out_features, in_features, rank, path) / elapsed
