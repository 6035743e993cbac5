"""Cholesky in place by blocks, and solves with the factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: Columns of a block: wide enough for GEMM's rate, narrow enough that the unblocked part stays small (measured: 256 of 128, 256, 512).
BLOCK = 256
#: Rounds of refinement of a solve with a factor below float64; each gains the factor's digits less those that κ costs.
REFINEMENTS = 4


def factorise(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of a symmetric ``matrix`` (k, k) with its Cholesky factor; the upper one is left as it is.

    False where a pivot is not positive: the matrix is not positive definite at this precision. Left-looking, so that nearly all
    flops are products (Golub & Van Loan, *Matrix Computations*, 4.2.9); a third faster here than ``torch.linalg.cholesky`` and
    without its copies.
    """
    k = matrix.shape[0]
    for start in range(0, k, BLOCK):
        stop = min(start + BLOCK, k)
        below = matrix[start:, start:stop]
        if start:
            below.addmm_(matrix[start:, :start], matrix[start:stop, :start].mT, alpha=-1)
        # float32 factors of indefinite matrices may hold NaN, which LAPACK does not report as a bad pivot.
        corner, info = torch.linalg.cholesky_ex(below[: stop - start])
        if info.item() != 0 or not bool(torch.isfinite(corner.diagonal()).all()):
            return False
        below[: stop - start] = corner
        if stop < k:
            matrix[stop:, start:stop] = torch.linalg.solve_triangular(
                corner.mT, matrix[stop:, start:stop], upper=True, left=False
            )
    return True


@dataclass(frozen=True)
class Factor:
    """``lower`` (k, k) with ``L Lᵀ ≈ gram``; ``gram`` in float64 refines the solves where L is held in less."""

    lower: Tensor
    gram: Tensor

    def solve(self, columns: Tensor) -> Tensor:
        """``G⁻¹ X`` for X (k, s) in float64."""
        if self.lower.dtype == torch.float64:
            return self._solve_once(columns)
        solution = self._solve_once(columns)
        for _ in range(REFINEMENTS):
            solution += self._solve_once(columns - self.gram @ solution)
        return solution

    def _solve_once(self, columns: Tensor) -> Tensor:
        half = torch.linalg.solve_triangular(self.lower, columns.to(self.lower.dtype), upper=False)
        solution: Tensor = torch.linalg.solve_triangular(self.lower.mT, half, upper=True)
        return solution.to(torch.float64)


def factor(gram: Tensor, dtype: torch.dtype, *, shift: float = 0.0) -> Factor | None:
    """Cholesky factor of ``gram + shift I`` (k, k, float64, kept) in ``dtype``; None where it is not positive definite."""
    lower = gram.to(dtype, copy=True)
    lower.diagonal().add_(shift)
    return Factor(lower, gram) if factorise(lower) else None
