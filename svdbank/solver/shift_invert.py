"""Fast path: block Lanczos on the inverse of the float64 Gram matrix, applied by its Cholesky factor.

Inverting first maps the few huge directions of a trained weight to almost nothing, and spreads the crowded small end apart; a shift
just below it (:func:`place_shift`) spreads it further.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON, UNRESOLVED
from svdbank.solver.cholesky import factor
from svdbank.solver.contract import Candidate, Failure
from svdbank.solver.lanczos import Ritz, largest, orthogonalise
from svdbank.solver.ritz import rayleigh_ritz
from svdbank.solver.sizes import Shape, buffer_size, shape_for
from svdbank.solver.weight import Weight

#: Seed of the start blocks: own generators, never the global one, so that the same weight gives the same bytes.
SEED = 20260419
#: Predicted residual, relative to σ_max, at which the iteration stops: the measured one is then about a fifth of it.
STOP_RESIDUAL = 1e-12
#: Vectors that a cut may always be moved to, however small the rank, to leave a cluster whole (memory: a rank of 24 takes as many).
LEAST_CUT = 48
#: Residual, relative to σ_max, that rounding in the projection may leave: the Newton step brings it to a tenth (4096×4096, κ 7e4:
#: 1.3e-12 is left). Asking less costs up to a cycle of products where a few σ lie far below the rest, which square weights often have.
SPOILT = 1e-11
#: Predicted sine of the angle at the boundary at which it stops, where the gap there is resolved at all.
STOP_ANGLE = 1e-7
#: Columns of a block and blocks of the short iteration that looks for the edge (measured: its error is below a tenth of the margin).
SHIFT_BLOCK, SHIFT_STEPS = 8, 6
#: Distance kept from the edge, in units of the spread of the lowest 16 Ritz values.
MARGIN = 0.35
#: Least ratio n : k at which the small end keeps away from zero, so that there is something to gain (none was seen on square weights).
OBLONG = 1.2


def solve_shift_invert(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
    """Minor (and principal) triplets by Lanczos on ``(M Mᵀ)⁻¹`` and, for the other end, on ``M Mᵀ``."""
    k = weight.k
    if rank == k:
        return Failure("an iteration cannot give the whole spectrum")
    buffer = buffer_size(k, rank)
    shape = shape_for(k, rank + buffer)
    if shape is None:
        return Failure(f"rank {rank} leaves no room for an iteration in {k} dimensions")
    gram = weight.gram()
    top = _top(gram, max(principal, 1), loose=principal == 0)
    if isinstance(top, Failure):
        return top
    sigma_max = top.values[0].clamp_min(0).sqrt()
    # Enough to factorise an exactly singular Gram matrix, too little to slow the iteration.
    nudge = -32 * weight.rounding * top.values[0].item()
    dtype = weight.precision.factor
    shift = place_shift(gram, weight.n, nudge, generator()) if dtype == torch.float64 else nudge
    lower = factor(gram, dtype, shift=shift)
    if lower is None and shift > nudge:
        shift, lower = nudge, factor(gram, dtype, shift=nudge)
    if lower is None:
        return Failure("the Gram matrix is not positive definite at working precision")

    def excess(values: Tensor, residuals: Tensor, following: Tensor, noise: float) -> float:
        theta, error = values[:rank], residuals[:rank]
        if not bool(theta[-1] > 0):
            return math.inf
        # With λ = shift + 1/θ and the iteration's residual r of a pair, ‖M v − σ u‖ = ‖(G − shift) r‖ / (θ σ); all r point into
        # ``following``.
        sigma = (shift + 1 / theta).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        stretch = torch.linalg.matrix_norm(following @ gram - shift * following, ord=2)
        predicted = (error * stretch / (theta * sigma)).max() / (sigma_max * STOP_RESIDUAL)
        # dσ = dθ / (2 σ θ²). A gap that the data do not resolve is not waited for.
        unresolved = 2 * 100 * EPSILON / UNRESOLVED * sigma_max * sigma[-1] * theta[-1] ** 2
        angle = error.max() / (STOP_ANGLE * torch.maximum(theta[-1] - values[rank], unresolved))
        # Vectors 10,000 times better than asked, or as good as the projection can tell, need no more steps: what their residual
        # still lacks, the projection with M corrects, or the gates find.
        wanted = torch.minimum(torch.maximum(predicted, angle), 1e4 * angle)
        return min(float(wanted), error.max().item() / noise)

    def cut(values: Tensor) -> int:
        """How many vectors the weight itself shall tell apart: no cut inside a cluster, because G blurs what lies in one."""
        count, most = rank + buffer, min(shape.keep, max(2 * (rank + buffer), LEAST_CUT))
        theta = values[: most + 1]
        if most <= count or not bool(theta[-1] > 0):
            return count
        sigma = (shift + 1 / theta).clamp_min(0).sqrt()
        apart = (sigma.diff()[count - 1 :] > 100 * EPSILON / UNRESOLVED * sigma_max).nonzero()
        return count + int(apart[0]) if len(apart) else most

    def spoilt(values: Tensor, error: float) -> bool:
        # Mixed by error / (θ_i − θ_j), two pairs have a residual of error / (θ_i θ_j σ_i) in M: largest at the end that restarts keep.
        last, end = values[rank - 1], values[shape.keep - 1]
        sigma = (shift + 1 / last).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return bool((end > 0) & (error > SPOILT * sigma_max * sigma * last * end))

    start = _start(k, shape.block, weight.device)
    found = largest(lower.solve, start, rank + buffer, shape, excess, generator(), cut, spoilt)
    if isinstance(found, Failure):
        return found
    orthonormal = torch.linalg.qr(found.vectors.mT).Q
    wide = rayleigh_ritz(weight, orthonormal)
    minor = wide.first(rank)
    raised = None
    if principal:
        raised = rayleigh_ritz(weight, torch.linalg.qr(top.vectors[:principal].mT).Q).flipped()
        sigma_max = raised.sigma[0]
    return Candidate(minor, raised, wide.sigma[rank].item(), minor.sigma[0].item(), sigma_max.item(), None, gram, lower.solve)


def place_shift(gram: Tensor, length: int, fallback: float, generator: torch.Generator) -> float:
    """A shift below λ_min of ``gram`` (k, k), most likely, for a weight of long side ``length``; ``fallback`` where none pays.

    A shift just below the smallest eigenvalue spreads the inverse's crowded upper end apart and saves about a quarter of the iteration.
    Finding it in float64 would cost what it saves; a float32 factor and a few of its solves are enough to place it, because nothing but
    the speed depends on it: one that lies too high is refused by the factorisation.
    """
    k = gram.shape[0]
    if length < OBLONG * k:
        return fallback
    rough = factor(gram, torch.float32, shift=fallback)
    if rough is None:
        return fallback
    start = torch.randn(SHIFT_BLOCK, k, dtype=torch.float64, generator=generator).to(gram.device)
    basis = torch.linalg.qr(start.mT).Q.mT
    for _ in range(SHIFT_STEPS - 1):
        image = rough.solve_once(basis[-SHIFT_BLOCK:].mT).mT.contiguous()
        basis = torch.cat([basis, orthogonalise(image, basis, generator)[1]])
    ritz: list[float] = torch.linalg.eigvalsh(basis @ (gram @ basis.mT)).tolist()
    edge, spread = ritz[0], ritz[2 * SHIFT_BLOCK - 1] - ritz[0]
    return max(edge - MARGIN * spread, fallback)


def generator() -> torch.Generator:
    """A fresh generator with the solver's seed; on the CPU, so that every device starts from the same numbers."""
    return torch.Generator().manual_seed(SEED)


def _start(k: int, block: int, device: torch.device) -> Tensor:
    return torch.randn(block, k, dtype=torch.float64, generator=generator()).to(device)


def _top(gram: Tensor, wanted: int, *, loose: bool) -> Ritz | Failure:
    """Largest eigenpairs of ``gram``. ``loose``: only λ_max as the scale of the gates, to 1 % and mostly far better."""
    k = gram.shape[0]
    shape = Shape(8, 32, 16) if loose and k > 128 else shape_for(k, wanted + buffer_size(k, wanted))
    if shape is None:
        return Failure(f"principal {wanted} leaves no room for an iteration in {k} dimensions")

    def excess(values: Tensor, residuals: Tensor, following: Tensor, noise: float) -> float:
        if loose:
            return float(residuals[0] / (1e-2 * values[0]))
        gap = values[wanted - 1] - values[wanted]
        allowed = torch.clamp(STOP_ANGLE * gap, min=noise)
        # λ = σ²: every pair's residual is divided by its own σ.
        predicted = (residuals[:wanted] / values[:wanted].clamp_min(0).sqrt()).max() / (values[0].sqrt() * STOP_RESIDUAL)
        return float(torch.maximum(predicted, residuals[:wanted].max() / allowed))

    return largest(lambda columns: gram @ columns, _start(k, shape.block, gram.device), wanted, shape, excess, generator())
