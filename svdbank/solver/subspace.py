"""Chebyshev-filtered subspace iteration: products and Cholesky QR alone, one matrix or a batch of equal shapes at once.

Zhou, Saad, Tiago & Chelikowsky, *Self-consistent-field calculations using Chebyshev-filtered subspace iteration* (J. Comput. Phys. 219,
2006), on an explicit inverse. No Ritz rotation between the filters: orthonormalising the columns in their order is the QR iteration,
which sorts and separates them by itself, so Rayleigh quotients say where the spectrum lies and no eigenproblem is solved on the way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON
from svdbank.solver.orthogonal import orthonormal

#: Columns a filter may tell apart by, largest over least amplification. The first one meets random columns, all of which hold the first
#: direction: beyond 1e7 Cholesky QR would lose the others in it. Later the columns are nearly eigenvectors; what is then
#: lost is rounding, ε times this, in the columns that are wanted least.
FIRST_SPREAD, SPREAD = 1e6, 1e9
#: How much smaller the unwanted part of the subspace is to become (seen: what is asked is missed by a factor of 100 at most, where the
#: spectrum is crowded, and 1e15 left residuals of 6e-13).
GAIN = 1e17
#: Relative width of the block's quotients from which it counts as one cluster: a filter would need thousands of products to tell its
#: vectors apart. One of this degree, damping what is smaller than half of it, takes out what does not belong; the gates decide.
CLUSTER, CLUSTER_DEGREE = 1e-4, 20
#: Least gain that a degree is counted with: Rayleigh quotients that lie too close together say nothing yet.
LEAST_GAIN = 0.05
#: Highest degree of one filter, and how many filters make an iteration that will not converge.
MOST_DEGREE, MOST_CYCLES = 40, 16


@dataclass(frozen=True)
class Subspace:
    """``columns`` (…, k, b), orthonormal, and the columns multiplied to get there."""

    columns: Tensor
    products: int


@dataclass(frozen=True)
class Operator:
    """A symmetric ``matrix`` (…, k, k); it is multiplied with float64 columns (…, k, s) in its own precision."""

    matrix: Tensor

    def product(self, columns: Tensor) -> Tensor:
        """``A X`` in float64."""
        if self.matrix.dtype == columns.dtype:
            return self.matrix @ columns
        return (self.matrix @ columns.to(self.matrix.dtype)).to(columns.dtype)

    def powered(self, columns: Tensor, steps: int) -> Tensor:
        """``columns`` after ``steps`` products, orthonormalised after each."""
        for _ in range(steps):
            columns = orthonormal(self.product(columns), passes=1)
        return columns

    def chebyshev(
        self, columns: Tensor, images: Tensor, cut: Tensor | float, degree: int, degrees: list[int] | None = None
    ) -> Tensor:
        """``T_d(2 A / cut − 1) X`` for X (…, k, b) and its ``images`` A X; with ``degrees`` each matrix stops at its own."""
        before, now = columns, images * (2 / cut) - columns
        scaled = None
        if self.matrix.dtype == columns.dtype and degree > 1:  # then a step is one product and no pass over the columns
            scaled = self.matrix * (4 / cut)
            scaled.diagonal(dim1=-2, dim2=-1).sub_(2)
        for step in range(2, degree + 1):
            if scaled is None:
                following = (self.product(now) * (4 / cut)).sub_(now, alpha=2).sub_(before)
            elif scaled.ndim == 2:
                following = torch.addmm(before, scaled, now, beta=-1)
            else:
                following = torch.baddbmm(before, scaled, now, beta=-1)
            if degrees is not None and step > min(degrees):
                going = (
                    torch.tensor([own >= step for own in degrees], device="cpu")
                    .to(columns.device)
                    .reshape(*columns.shape[:-2], 1, 1)
                )
                following = torch.where(going, following, now)
            before, now = now, following
        return now


def quotients(columns: Tensor, images: Tensor) -> list[list[float]]:
    """Rayleigh quotients of ``columns`` with their ``images`` (…, k, b), a list for each matrix, largest first."""
    values = ((columns * images).sum(-2) / (columns * columns).sum(-2)).sort(-1, descending=True).values
    return [[float(v) for v in row] for row in values.reshape(-1, values.shape[-1]).tolist()]


def iterate(operator: Operator, columns: Tensor, wanted: int, *, gain: float = GAIN) -> Subspace:
    """Turn ``columns`` (…, k, b) towards the ``wanted`` largest eigenvalues of a symmetric positive operator; orthonormal at the end.

    Each matrix of a batch takes the degrees and the number of filters that it alone asks for, and stands still once it is there: its
    result does not depend on its neighbours. After so many filters that more would not help it ends: whether what is there serves is for
    the gates to say.
    """
    count = math.prod(columns.shape[:-2])
    left = [math.log(gain)] * count
    products = 0
    spread = FIRST_SPREAD
    for _ in range(MOST_CYCLES):
        images = operator.product(columns)
        cuts, degrees = [], []
        for number, row in enumerate(quotients(columns, images)):
            cut, degree, won = filter_for(row, wanted, left[number], spread)
            cuts.append(cut)
            degrees.append(degree)
            left[number] -= won
        columns = _filtered(operator, columns, images, cuts, degrees)
        products += max(degrees) * columns.shape[-1]
        if all(rest <= 0 for rest in left):
            break
        spread = SPREAD
    return Subspace(orthonormal(columns, passes=1, lifted=False), products)


def filter_for(values: list[float], wanted: int, left: float, spread: float) -> tuple[float, int, float]:
    """End of the damped interval, degree (0 for none) and logarithm of the gain, from Rayleigh quotients, largest first."""
    if not (left > 0 and math.isfinite(values[0]) and math.isfinite(values[-1]) and values[0] > 0):
        return 1.0, 0, left  # it is done, or lost: NaN stays and fails every gate
    first, edge = values[0], max(values[-1], EPSILON * values[0])
    if first - edge <= CLUSTER * first:
        return edge / 2, CLUSTER_DEGREE, left
    reach = math.acosh(max(2 * first / edge - 1, 1 + EPSILON))
    each = max(math.acosh(max(2 * values[wanted - 1] / edge - 1, 1.0)), LEAST_GAIN)
    degree = min(MOST_DEGREE, max(1, int(math.acosh(spread) / reach)), math.ceil(left / each))
    return edge, degree, degree * each


def _filtered(operator: Operator, columns: Tensor, images: Tensor, cuts: list[float], degrees: list[int]) -> Tensor:
    """A filter of each matrix's own degree, orthonormalised once; a matrix of degree 0 keeps its columns."""
    most, least = max(degrees), min(degrees)
    if len(cuts) == 1:
        return orthonormal(operator.chebyshev(columns, images, cuts[0], most), passes=1)
    cut = columns.new_tensor(cuts).reshape(*columns.shape[:-2], 1, 1)
    found = operator.chebyshev(columns, images, cut, most, degrees if least < most else None)
    found = orthonormal(found, passes=1)
    if least == 0:
        going = (
            torch.tensor([degree > 0 for degree in degrees], device="cpu").to(columns.device).reshape(*columns.shape[:-2], 1, 1)
        )
        found = torch.where(going, found, columns)
    return found
