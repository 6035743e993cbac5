"""Cholesky in place by blocks, and solves with the factor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.solver.matrices import mirror
from svdbank.solver.sizes import CHOLESKY_BLOCK

#: Rounds of refinement of a solve with a factor below float64; each gains the factor's digits less those that κ costs.
REFINEMENTS = 4


def factorise(matrix: Tensor) -> bool:
    """Overwrite the lower triangle of a symmetric ``matrix`` (k, k) with its Cholesky factor; the upper one is left as it is.

    False where a pivot is not positive: the matrix is not positive definite at this precision. Left-looking, so that nearly all
    flops are products (Golub & Van Loan, *Matrix Computations*, 4.2.9); a third faster here than ``torch.linalg.cholesky`` and
    without its copies.
    """
    if matrix.is_cuda:  # there the library is twice as fast as we are, and a block's pivots are not worth a wait of the host
        lower, info = torch.linalg.cholesky_ex(matrix)
        matrix.copy_(lower)
        return bool((info == 0) & torch.isfinite(lower.diagonal()).all())
    k = matrix.shape[0]
    for start in range(0, k, CHOLESKY_BLOCK):
        stop = min(start + CHOLESKY_BLOCK, k)
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
    """``L Lᵀ ≈ gram - shift I``: ``both`` (k, k) holds L in its lower triangle and Lᵀ in its upper one.

    A substitution that reads the factor along its rows takes two thirds of the time of one along its columns. ``gram`` in
    float64 refines the solves where L is held in less.
    """

    both: Tensor
    gram: Tensor
    shift: float = 0.0

    def solve(self, columns: Tensor) -> Tensor:
        """``(G - shift I)⁻¹ X`` for X (k, s) in float64."""
        if self.both.dtype == torch.float64:
            return self.solve_once(columns)
        solution = self.solve_once(columns)
        for _ in range(REFINEMENTS):
            solution += self.solve_once(columns + self.shift * solution - self.gram @ solution)
        return solution

    def solve_once(self, columns: Tensor) -> Tensor:
        """The same to the precision that the factor is held in."""
        half = torch.linalg.solve_triangular(self.both, columns.to(self.both.dtype), upper=False)
        solution: Tensor = torch.linalg.solve_triangular(self.both, half, upper=True)
        return solution.to(torch.float64)


def factor(gram: Tensor, dtype: torch.dtype, *, shift: float = 0.0) -> Factor | None:
    """Cholesky factor of ``gram - shift I`` (k, k, float64, kept) in ``dtype``; None where it is not positive definite."""
    both = gram.to(dtype, copy=True)
    both.diagonal().sub_(shift)
    if not factorise(both):
        return None
    mirror(both)
    return Factor(both, gram, shift)
