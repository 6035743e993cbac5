"""How far the iteration reaches, and what it costs: ``python -m tests.clustered [products]``. Figures for ``dev/solver-log.md``.

Without a word: 360 weights with a cluster of singular values below the others; prints those that leave ``shift-invert`` and counts them.
``products``: columns that the operator is applied to, on LLM-like and Gaussian weights.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdbank.solver import minor_basis, pinned_threads, shift_invert

sys.path.append(str(Path(__file__).parent / "solver"))
from hard_matrices import llm_like, with_spectrum

SHAPES = [(200, 200), (200, 700), (700, 200), (320, 400), (400, 1000)]
LLM_LIKE = [
    (1280, 1280, 64),
    (1280, 1600, 64),
    (1280, 1600, 16),
    (2048, 2048, 64),
    (2048, 2048, 128),
    (2048, 3072, 128),
    (2048, 5632, 128),
]


def clusters() -> Iterator[tuple[str, Tensor]]:
    """Name and float32 weight: σ from 2 to 1, and ``count`` at ``level``, ``width`` of it apart."""
    for (rows, columns), part, level, width, seed in product(SHAPES, (0, 4, 2), (0.3, 1e-2, 1e-3), (1e-9, 1e-6), (0, 1)):
        k = min(rows, columns)
        count = k // part if part else 10
        low = level * (1 + width * torch.arange(count, dtype=torch.float64))
        sigma = torch.cat([torch.linspace(2, 1, k - count, dtype=torch.float64), low])
        yield (
            f"{rows}x{columns}, {count} at {level}, {width} apart, seed {seed}",
            with_spectrum(sigma, rows, columns, seed).float(),
        )


def sweep() -> None:
    left = total = 0
    for name, weight in clusters():
        for rank in (1, 16):
            certificate = minor_basis(weight, rank, solver="shift-invert").certificate
            total += 1
            if certificate.path != "shift-invert":
                left += 1
                print(f"{name}, rank {rank}: {certificate.tried[0]}", flush=True)
    print(f"{left} of {total} leave shift-invert")


def products() -> None:
    counts: list[int] = []
    inner = shift_invert.largest

    def counted(*arguments: Any) -> Any:
        found = inner(*arguments)
        counts.append(getattr(found, "products", -1))
        return found

    shift_invert.largest = counted
    weights = [(f"llm {m}x{n}", r, lambda m=m, n=n: llm_like(m, n, strong=32)) for m, n, r in LLM_LIKE]
    for seed in range(4):
        source = torch.Generator().manual_seed(seed)
        weights.append(
            (f"gaussian 4096, seed {seed}", 128, lambda source=source: torch.randn(4096, 4096, generator=source) * 0.02)
        )
    for name, rank, make in weights:
        weight = make().to(torch.bfloat16)
        begun = time.process_time()
        certificate = minor_basis(weight, rank, solver="shift-invert").certificate
        spent = time.process_time() - begun
        print(f"{name}, rank {rank}: {counts[-1]} products, {spent:.1f} s, residual {certificate.residual:.1e}", flush=True)


if __name__ == "__main__":
    with pinned_threads(1):
        products() if "products" in sys.argv[1:] else sweep()
