"""Path for GPUs: a Chebyshev filter on the explicit inverse of the float64 Gram matrix. Products of large matrices and little else.

A GPU multiplies ten times faster than it substitutes, so the inverse is made explicit; it waits for its host at every small
eigenproblem, so there is one, at the end, and none on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON
from svdbank.solver.contract import Block, Candidate, Failure
from svdbank.solver.inverse import gram_of_lower, inverse_factor
from svdbank.solver.orthogonal import orthonormal, orthonormal_factors
from svdbank.solver.ritz import rayleigh_ritz
from svdbank.solver.sizes import block_width, buffer_size
from svdbank.solver.subspace import GAIN, Operator, filter_for, iterate, quotients
from svdbank.solver.weight import Weight

#: Seed of the start blocks: own generators, never the global one, so that the same weight gives the same bytes.
SEED = 20261127
#: How far below zero the Gram matrix is first inverted, in units of λ_max: enough that random columns keep apart, and far below what is
#: wanted of any weight whose Gram matrix float64 can serve.
FIRST_NUDGE = 1e-9
#: Products with random columns before anything is read off them.
FIRST_PRODUCTS = 2
#: Ratio of the largest to the least Rayleigh quotient of the block from which the matrix is shifted and inverted again, and where to: below
#: zero by this part of λ_R. A wider spectrum allows filters of degree one or two only.
WIDE, SHIFT = 30.0, 0.75
#: Columns and products for λ_max, then one filter: its degree, and the end of what it damps in units of the largest Rayleigh quotient.
TOP_WIDTH, TOP_PRODUCTS = 24, 2
TOP_DEGREE, TOP_CUT = 10, 0.6
#: Departure from orthogonality up to which a Ritz value counts.
ORTHOGONAL = 1e-8
#: Terms of the series that carries a Newton step from the inverse at the shift to that at each σ².
SERIES = 4
#: Where the inverse is held in float32: the gain that its products allow, what a filter of a correction may tell apart by, how many
#: corrections at most, and the residual, relative to σ_max, at which they end.
LOW_GAIN, LOW_SPREAD = 1e6, 1e6
CORRECTIONS, CORRECTED = 6, 2e-13
#: Largest entry beside the diagonal of the projected weight, in units of ε σ_max, with which its diagonal serves as σ.
COUPLED = 64


def solve_filter(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
    """Minor (and principal) triplets of the (k, n) weight by filtered subspace iteration."""
    k = weight.k
    width = block_width(k, rank)
    if width is None:
        return Failure(f"rank {rank} leaves no room for an iteration in {k} dimensions")
    gram = weight.gram()
    top = upper_end(gram, principal)
    if isinstance(top, Failure):
        return top
    columns, (largest,) = top
    if not largest > 0:
        return Failure("the largest eigenvalue of the Gram matrix was not found")
    start = start_block(k, width, weight.device)
    dtype = weight.precision.factor
    lower = lower_end(gram, start, rank, [largest], least=32 * weight.rounding, dtype=dtype)
    if not lower.definite:
        return Failure("the Gram matrix is not positive definite at working precision")
    # NaN goes into no further routine: a factor that failed on the way has left it in every column.
    if not bool(torch.isfinite(lower.columns.sum())):
        return Failure("the filtered iteration left the range of float64")
    size = rank + buffer_size(k, rank)
    below = lower.columns if dtype == torch.float64 else corrected(gram, lower, rank, largest)
    wide = project(weight, below, size, largest**0.5)
    minor = wide.first(rank)
    raised, sigma_max = None, largest**0.5
    if principal:
        raised = rayleigh_ritz(weight, columns[:, : principal + buffer_size(k, principal)]).flipped().first(principal)
        sigma_max = raised.sigma[0].item()
    smallest, following = torch.stack([wide.sigma[0], wide.sigma[rank]]).tolist()
    newton = lower.newton(minor.short, minor.sigma)
    return Candidate(minor, raised, following, smallest, sigma_max, None, gram, newton)


@lru_cache(maxsize=64)
def start_block(k: int, width: int, device: torch.device) -> Tensor:
    """Random columns (k, width), the same on every device; kept, because a CPU takes longer to draw them than a GPU to solve."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    return torch.randn(k, width, dtype=torch.float64, generator=generator, device="cpu").to(device)


def upper_end(gram: Tensor, principal: int = 0) -> tuple[Tensor, list[float]] | Failure:
    """Columns (…, k, b) at the upper end of ``gram``, best first, and λ_max of each matrix; ``principal`` of them converged.

    λ_max alone, the scale of the gates, is a Ritz value after one filter: 1 % low at most, mostly exact to many digits.
    """
    k = gram.shape[-1]
    width = min(k, TOP_WIDTH)
    if principal:
        found = block_width(k, principal)
        if found is None:
            return Failure(f"principal {principal} leaves no room for an iteration in {k} dimensions")
        width = found

    operator = Operator(gram)
    columns = operator.powered(start_block(k, width, gram.device).expand(*gram.shape[:-1], width), TOP_PRODUCTS)
    if principal:
        columns = iterate(operator, columns, principal + buffer_size(k, principal)).columns
        return columns, [row[0] for row in quotients(columns, operator.product(columns))]
    images = operator.product(columns)
    cut = TOP_CUT * ((columns * images).sum(-2, keepdim=True).amax(-1, keepdim=True))
    columns = orthonormal(operator.chebyshev(columns, images, cut, TOP_DEGREE))
    images = operator.product(columns)
    # A matrix of few directions leaves columns that no pass makes orthogonal, and a Ritz value of such columns can be anything. Rayleigh
    # quotients never exceed λ_max, and the first column has turned to it.
    lengths = (columns * columns).sum(-2)
    single = torch.nan_to_num((columns * images).sum(-2) / lengths, nan=0.0, posinf=0.0, neginf=0.0).amax(-1)
    identity = torch.eye(width, dtype=torch.float64, device=gram.device)
    sound = (columns.mT @ columns - identity).abs().amax((-2, -1)) <= ORTHOGONAL  # false of NaN
    ritz = torch.linalg.eigvalsh(torch.where(sound[..., None, None], columns.mT @ images, identity))[..., -1]
    return columns, [float(value) for value in torch.where(sound, ritz, single).reshape(-1).tolist()]


def lower_end(
    gram: Tensor,
    start: Tensor,
    rank: int,
    largest: list[float],
    *,
    least: float,
    dtype: torch.dtype = torch.float64,
) -> Lower:
    """Subspace (…, k, b) that holds the ``rank`` smallest eigenvectors of each ``gram`` (…, k, k), and the inverse used for it.

    ``largest`` is λ_max of each; ``least`` how far below zero float64 must shift for a factor, in units of it. With float32 as ``dtype``
    the inverse and its products are of that precision, and the subspace as good as that allows.
    """
    if dtype != torch.float64:
        least = max(least, FIRST_NUDGE)  # κ(L) = 3e4: of a float32 inverse three digits are right
    shifts = [-max(FIRST_NUDGE, least) * value for value in largest]
    operator, definite = _inverse(gram, shifts, dtype)
    columns = operator.powered(start.expand(*gram.shape[:-1], start.shape[-1]), FIRST_PRODUCTS)
    values = quotients(columns, operator.product(columns))
    again = [_shift(row, rank, shift, least * value) for row, shift, value in zip(values, shifts, largest, strict=True)]
    if again != shifts:
        # Of a batch all are inverted again: those whose shift has stayed come out as they were.
        shifts = again
        operator, definite = _inverse(gram, shifts, dtype)
    found = iterate(operator, columns, rank, gain=GAIN if dtype == torch.float64 else LOW_GAIN)
    return Lower(found.columns, found.products, operator, gram.new_tensor(shifts).reshape(gram.shape[:-2]), definite)


@dataclass(frozen=True)
class Lower:
    """What is found of the lower end of a Gram matrix, or of a batch of them.

    Attributes
    ----------
    columns
        (…, k, b), orthonormal.
    products
        Columns multiplied on the way.
    inverse
        ``(G - s I)⁻¹``.
    shifts
        s of each matrix, (…).
    definite
        Whether every ``G - s I`` was positive definite; one that was not has columns that no gate will pass.
    """

    columns: Tensor
    products: int
    inverse: Operator
    shifts: Tensor
    definite: bool

    def newton(self, short: Tensor, sigma: Tensor) -> Callable[[Tensor], Tensor]:
        """Solver of ``(G - σ_i²) y_i = r_i`` beside the vectors ``short`` (…, k, R), for columns r (…, k, R) that they are not in.

        The inverse is one of ``G - s``: the rest of the Neumann series ``A Σ ((σ² - s) A)^m`` makes up for the difference, which for
        vectors just above the block is most of it.
        """
        distance = (sigma.square() - self.shifts.unsqueeze(-1)).unsqueeze(-2)

        def solve(columns: Tensor) -> Tensor:
            found: Tensor = self.inverse.product(columns)
            for _ in range(SERIES):
                found = found - short @ (short.mT @ found)
                found = self.inverse.product(columns + distance * found)
            return found

        return solve


def corrected(gram: Tensor, lower: Lower, rank: int, largest: float) -> Tensor:
    """Orthonormal columns (k, b) that a float32 inverse found, made as good as float64 ones: one float64 product a round.

    With ``G X = X Λ + E`` after a rotation, a filter of the exact inverse maps X to ``X t(Θ) + D``, Θ = 1 / (Λ - s), where D follows the
    same three-term recurrence from ``-(G - s)⁻¹ E Θ`` on: what is small already is all that float32 has to carry.
    """
    columns, apply_inverse, shift = lower.columns, lower.inverse.product, float(lower.shifts)
    for _ in range(CORRECTIONS):
        image = gram @ columns
        values, mixing = torch.linalg.eigh(columns.mT @ image)
        columns = columns @ mixing
        defect = image @ mixing - columns * values
        # ‖M v - σ u‖ = ‖E‖ / σ; below the rounding of G there is nothing left to correct.
        size = torch.linalg.vector_norm(defect, dim=0)[:rank]
        sigma = values[:rank].clamp_min(EPSILON * largest).sqrt()
        if bool(((size <= CORRECTED * sigma * largest**0.5) | (size <= 16 * EPSILON * largest)).all()):
            break
        theta = 1 / (values - shift)
        row = theta.tolist()
        cut, degree, _ = filter_for(row, rank, math.log(LOW_GAIN), LOW_SPREAD)
        source = apply_inverse(defect * -theta)
        before, now = torch.zeros_like(columns), source * (2 / cut)
        ends = 2 * theta / cut - 1
        former, grown = torch.ones_like(theta), ends
        for _ in range(2, degree + 1):
            following = apply_inverse(now) * (4 / cut) - 2 * now - before + source * grown * (4 / cut)
            before, now = now, following
            former, grown = grown, 2 * ends * grown - former
        columns = orthonormal(columns + now / grown)
    return columns


def _shift(values: list[float], rank: int, nudge: float, least: float) -> float:
    """Where to invert again, from Rayleigh quotients of the first inverse: below zero, or where it was."""
    if not values[0] > WIDE * max(values[-1], EPSILON * values[0]) or not values[rank - 1] > 0:
        return nudge
    return -max(SHIFT * (1 / values[rank - 1] + nudge), least)


def _inverse(gram: Tensor, shifts: list[float], dtype: torch.dtype) -> tuple[Operator, bool]:
    """``(G - s I)⁻¹`` (…, k, k), symmetric up to rounding, and whether all were positive definite; NaN for one that was not."""
    shift = gram.new_tensor(shifts).reshape(gram.shape[:-2])
    lower, info = inverse_factor(gram, shift, dtype)
    inverse = gram_of_lower(lower)
    # No factorisation reports NaN as a bad pivot, but it stays in the trace.
    sound = (info == 0) & torch.isfinite(inverse.diagonal(dim1=-2, dim2=-1).sum(-1))
    inverse.masked_fill_(~sound[..., None, None], torch.nan)
    return Operator(inverse), bool(sound.all())


def project(weight: Weight, columns: Tensor, size: int, sigma_max: float) -> Block:
    """Rayleigh–Ritz with the weight: the ``size`` smallest triplets of M in the span of ``columns`` (k, b), ascending.

    By ``eigh`` of ``TᵀT`` with ``T = Mᵀ X``, whose vectors are good to ε (σ_b / σ_i)², and QR of what it leaves of T; an SVD of
    that small factor, three times as long on a GPU, only where its columns are still coupled.
    """
    image = weight.transposed_times(columns)
    mixing = torch.linalg.eigh(image.mT @ image).eigenvectors[:, :size]
    short = columns @ mixing
    long, upper = orthonormal_factors(image @ mixing)
    if not bool(upper.triu(1).abs().max() <= COUPLED * EPSILON * sigma_max):
        return rayleigh_ritz(weight, short)
    return Block(short, long, upper.diagonal().clone())
