"""How long a build will take, from one small solve that is timed here and now."""

from __future__ import annotations

import time


def solve_rate(device: str = "cpu") -> float:
    """Flops per second of one solve, small and on one thread on a CPU, larger on a GPU; timed here and now."""
    import torch

    from svdbank.solver import choose_path, flops, minor_basis, pinned_threads
    from svdbank.solver.devices import kind_of

    kind = kind_of(torch.device(device))
    out_features, in_features, rank = (512, 1024, 64) if kind == "cpu" else (2048, 4096, 64)
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(device)
    with pinned_threads(1):
        if kind != "cpu":
            minor_basis(weight, rank)  # the first loads what CUDA needs
        start = time.perf_counter()
        minor_basis(weight, rank)
        elapsed = time.perf_counter() - start
    return flops(out_features, in_features, rank, choose_path(out_features, in_features, rank, kind)) / elapsed
