"""Block Lanczos with full re-orthogonalisation and thick restarts, for the largest eigenvalues of a symmetric operator.

Wu & Simon, *Thick-restart Lanczos method for large symmetric eigenvalue problems* (SIAM J. Matrix Anal. Appl. 22, 2000), with
blocks. Small blocks need far fewer products than subspace iteration as wide as the wanted rank; restarts keep the projected
problem, and so its ``eigh`` and the re-orthogonalisation, cheap.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON
from svdbank.solver.contract import Failure
from svdbank.solver.matrices import padded_rows
from svdbank.solver.orthogonal import thin_qr
from svdbank.solver.sizes import Shape

#: Checks before an iteration counts as stuck; converging ones here take 1 to 8.
MAX_CHECKS = 24
#: Residual, relative to its own θ, at which a leading Ritz pair has converged as far as float64 lets it.
LOCKED = 1e-14
#: Rounding in a computed residual, in units of ε times the largest θ of the projection (seen: up to 40).
NOISE = 64
#: Residual, relative to its own θ, at which an iteration that falls no further by half has done what eigh lets it: inside a cluster it
#: mixes converged vectors with others, whose residuals are far above the gap between the two (seen: plateaus up to 3,000 ε).
HALTED = 1e4 * EPSILON
#: Rounding in the columns of a projection and in its eigh, in units of ε times the mean θ and the root of their number (seen: 4 to 12).
FORGOTTEN = 10
#: Rounding of the operator itself, in units of ε times its largest θ, locked or not (seen: 0.001 to 0.006 on square weights, κ 1e5).
OPERATOR = 1 / 128
#: Ratio of the pivots of a block down to which two passes of Gram–Schmidt leave it orthogonal to the basis within 100 ε.
EVEN = 1e-2
#: Ratio of the largest θ in the projection to the last wanted one that its eigh is trusted with.
SPREAD = 100.0


@dataclass(frozen=True)
class Ritz:
    """Ritz pairs of one projection, largest first: ``values`` (m,), ``vectors`` (wanted or more, k) as rows, ``products`` applied."""

    values: Tensor
    vectors: Tensor
    products: int


def largest(
    apply: Callable[[Tensor], Tensor],
    start: Tensor,
    wanted: int,
    shape: Shape,
    excess: Callable[[Tensor, Tensor, Tensor, float], float],
    generator: torch.Generator,
    cut: Callable[[Tensor], int] | None = None,
    spoilt: Callable[[Tensor, float], bool] | None = None,
) -> Ritz | Failure:
    """Iterate from ``start`` (block, k) until ``excess(values, residuals, next_block, noise)`` is at most 1.

    ``excess`` is the worst error of the pairs over what is wanted of it.

    ``apply`` maps (k, block) columns to columns; ``residuals`` (m,) are ``‖A x − θ x‖`` of the Ritz pairs, largest θ first;
    ``next_block`` (block, k) is the direction that all of them point in; below ``noise`` a residual says nothing.

    ``cut(values)`` is the number of vectors to return, ``wanted`` where it is None. ``spoilt(values, error)``: whether an ``error`` in the
    entries of the projection is more than the wanted pairs stand.
    """
    block, limit, k = shape.block, shape.limit, start.shape[1]
    basis = padded_rows(limit + block, k, start.device)
    basis[:block] = torch.linalg.qr(start.mT).Q.mT
    projected = torch.zeros(limit + block, limit + block, dtype=torch.float64, device=start.device)
    # Rows before ``locked`` have converged and left the projection: eigh is accurate to ε times the largest eigenvalue it is
    # given, and θ may span ten orders of magnitude.
    size, products, locked, stuck = block, 0, 0, False
    values = residuals = start.new_empty(0)
    stop, former, seen = limit, math.inf, 0
    for _ in range(MAX_CHECKS):
        while True:
            last = basis[size - block : size]
            image = apply(last.mT).mT.contiguous()
            products += block
            projection, following, coupling = orthogonalise(image, basis[:size], generator)
            projected[size - block : size, :size] = projection
            projected[:size, size - block : size] = projection.mT
            basis[size : size + block] = following
            projected[size : size + block, size - block : size] = coupling
            projected[size - block : size, size : size + block] = coupling.mT
            if size + block > stop:
                break
            size += block
        active, mixing = torch.linalg.eigh(projected[locked:size, locked:size])
        active, mixing = active.flip(0), mixing.flip(1)
        if not bool(torch.isfinite(active).all()):
            return Failure("the iteration left the range of float64")
        tails = coupling @ mixing[-block:]
        values = torch.cat([values[:locked], active])
        residuals = torch.cat([residuals[:locked], torch.linalg.vector_norm(tails, dim=0)])
        # While locking still sheds large values, the next projection will know more than this one: go on.
        settled = stuck or not active[0].abs().item() > SPREAD * values[wanted - 1].abs().item()
        noise = EPSILON * max(NOISE * active[0].abs().item(), OPERATOR * values[0].abs().item())
        behind = excess(values, residuals, following, noise)
        halted = behind > former / 2 and bool((residuals[:wanted] <= HALTED * values[:wanted].abs()).all())
        if settled and (behind <= 1.0 or halted):
            count = wanted if cut is None else min(max(cut(values), wanted), size)
            free = max(count - locked, 0)
            return Ritz(values, torch.cat([basis[:locked], mixing[:, :free].mT @ basis[locked:size]])[:count], products)
        steps = _steps_left(former, behind, (products - seen) // block) if settled else limit
        former, seen = behind, products
        if size + block <= limit:  # there is room: a check does not cost what a restart costs
            size += block
            stop = min(limit, size + block * (steps - 1))
            continue
        keep = shape.keep - locked
        basis[locked : shape.keep] = mixing[:, :keep].mT @ basis[locked:size]
        size = shape.keep
        basis[size : size + block] = following
        projected.zero_()
        projected.diagonal()[:size] = values[:size]
        projected[size : size + block, locked:size] = tails[:, :keep]
        projected[locked:size, size : size + block] = tails[:, :keep].mT
        # A leading run only, and never the last wanted pair: what a locked pair still lacks is LOCKED / (1 − θ_R / θ) for the others.
        converged = (residuals[: wanted - 1] <= LOCKED * values[: wanted - 1].abs()).to(torch.int64).cumprod(0)
        before, locked = locked, max(locked, int(converged.sum()))
        stuck = before == locked
        if not stuck and spoilt is not None and spoilt(values, _forgotten(active)):
            # What eigh lost between the small values beside the large ones, a restart would keep for good: only the block that comes next,
            # and what has left the projection, know nothing of it.
            basis[locked : locked + block] = following
            size, steps = locked, limit
            projected.zero_()
            projected.diagonal()[:size] = values[:size]
        size += block
        stop = min(limit, size + block * (steps - 1))
    return Failure(f"no convergence after {products} products")


def _forgotten(active: Tensor) -> float:
    """What rounding makes of a column of the projection with these eigenvalues (m,): entries are as large as the mean on average."""
    return FORGOTTEN * EPSILON * active.abs().sum().item() / math.sqrt(len(active))


def _steps_left(former: float, behind: float, steps: int) -> int:
    """Steps until the excess is 1 if it goes on falling at the rate of the last ``steps``; at least one."""
    if not (math.isfinite(former) and 1.0 < behind < former):
        return 2**30
    return math.ceil(steps * math.log(behind) / math.log(former / behind))


def orthogonalise(image: Tensor, basis: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``image`` (b, k) into its part in ``basis`` (m, k) and an orthonormal remainder (b, k).

    Returns the coefficients (b, m), the remainder's orthonormal rows, and the (b, b) matrix that maps image columns onto them.
    Two passes of Gram–Schmidt: with one, the loss of orthogonality doubles a step and spoils the basis after about 30. A third
    where the block itself is ill-conditioned: the passes leave ε times the longest remainder, which QR then divides by its
    smallest pivot (Barlow & Smoktunowicz, *Reorthogonalized block classical Gram–Schmidt*, Numer. Math. 123, 2013).
    """
    scale = torch.linalg.vector_norm(image, dim=1).max()
    coefficients = image @ basis.mT
    image = image.addmm_(coefficients, basis, alpha=-1)
    again = image @ basis.mT
    image = image.addmm_(again, basis, alpha=-1)
    remainder, upper = thin_qr(image)
    lost = upper.diagonal().abs() <= 16 * EPSILON * scale
    if bool(lost.any()):
        # The Krylov space is exhausted in these directions (repeated eigenvalues): go on with new random ones.
        fresh = image.clone()
        fresh[lost] = torch.randn(int(lost.sum()), image.shape[1], dtype=torch.float64, generator=generator).to(image.device)
        fresh /= torch.linalg.vector_norm(fresh, dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        for _ in range(2):
            fresh = fresh - (fresh @ basis.mT) @ basis
        columns = torch.linalg.qr(fresh.mT).Q
        columns = columns - basis.mT @ (basis @ columns)
        remainder = torch.linalg.qr(columns).Q.mT
        upper = remainder @ image.mT
    elif bool(upper.diagonal().abs().min() < EVEN * upper.diagonal().abs().max()):
        third = remainder @ basis.mT
        again += upper.mT @ third
        remainder, correction = thin_qr(remainder.addmm(third, basis, alpha=-1))
        upper = correction @ upper
    return coefficients + again, remainder, upper
