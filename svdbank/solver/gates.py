"""The gates every result passes before anyone sees it, and the figures that its certificate records."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdbank.core.basis import EPSILON, ORTHOGONALITY_LIMIT, RESIDUAL_LIMIT, UNRESOLVED
from svdbank.solver.cholesky import factorise
from svdbank.solver.contract import Block, Candidate
from svdbank.solver.ritz import refined
from svdbank.solver.weight import Weight

#: Residual, relative to σ_max, that is good enough not to be corrected, and how often a worse one is.
GOOD_RESIDUAL = 5e-13
REFINEMENTS = 2
#: Residual in units of ε σ_max below which no method in float64 can be told from another.
NOISE = 100


@dataclass(frozen=True)
class Verdict:
    """Figures of one candidate; ``failed`` names the first gate that it did not pass."""

    orthogonality: float
    residual: float
    angle_bound: float | None
    completeness: str
    failed: str | None


def judge(weight: Weight, candidate: Candidate) -> tuple[Candidate, Verdict]:
    """Measure ``candidate`` against ``weight`` in float64, correct it once or twice where κ cost it digits, and decide.

    Returns the candidate as it was judged. Overwrites ``candidate.gram``.
    """
    scale = candidate.sigma_max
    gaps, allowed = allowances(candidate.minor.sigma, candidate.sigma_next, scale)
    for attempt in range(REFINEMENTS + 1):
        defect, columns = defects(weight, candidate.minor)
        prefix = columns.cummax(0).values[: gaps.shape[0]]
        good = bool((columns.max() <= GOOD_RESIDUAL * scale) & (prefix <= allowed).all())
        if good or attempt == REFINEMENTS or candidate.apply_inverse is None:
            break
        candidate = replace(candidate, minor=refined(weight, candidate.minor, defect, candidate.apply_inverse))
    minor, principal = candidate.minor, candidate.principal
    others = 0.0 if principal is None else defects(weight, principal)[1].max().item()
    departures = torch.stack([departure(block) for block in ([minor] if principal is None else [minor, principal])])
    found = torch.cat([columns, departures.amax(0, keepdim=True)]).tolist()
    proof = "cholesky" if candidate.spectrum is None else "spectrum"
    return candidate, verdict(
        found[:-1], gaps.tolist(), allowed.tolist(), found[-1], others, scale, proof, lambda: complete(weight, candidate)
    )


def allowances(sigma: Tensor, following: float | Tensor | None, scale: float | Tensor) -> tuple[Tensor, Tensor]:
    """Gaps of the ladder σ_1 … σ_R, σ_{R+1} (…, R), and the residual that each allows: every prefix is served as a basis of its own.

    Wedin's bound at every rank; ``scale`` is σ_max, of a batch (…, 1). ``following`` is σ_{R+1}, None where the block holds all.
    """
    if following is not None:
        last = following if isinstance(following, Tensor) else sigma.new_tensor([following])
        sigma = torch.cat([sigma, last], dim=-1)
    gaps = sigma.diff()
    floor = NOISE * EPSILON * scale
    return gaps, torch.maximum(gaps * UNRESOLVED, floor if isinstance(floor, Tensor) else gaps.new_tensor(floor))


def verdict(
    columns: Sequence[float],
    gaps: Sequence[float],
    allowed: Sequence[float],
    orthogonality: float,
    others: float,
    scale: float,
    proof: str,
    proven: Callable[[], bool],
) -> Verdict:
    """Decide from the figures of one weight: residuals of its minor triplets (R,), of all ``others`` the worst, absolute."""
    # NaN must fail: Python's max may lose it.
    worst = max(columns, key=lambda value: math.inf if math.isnan(value) else value)
    relative = (worst if math.isnan(worst) else max(worst, others)) / scale
    angle_bound = worst / gaps[-1] if len(gaps) == len(columns) and gaps[-1] > 0 else None
    over, prefix = 0.0, 0.0
    for column, gap, allowance in zip(columns, gaps, allowed, strict=False):
        prefix = column if math.isnan(column) else max(prefix, column)
        if not prefix <= allowance:
            over = max(over, prefix / gap if gap > 0 else math.inf)
    failed = None
    # Comparisons are written so that NaN fails them.
    if not orthogonality <= ORTHOGONALITY_LIMIT:
        failed = f"orthogonality {orthogonality:.1e} > {ORTHOGONALITY_LIMIT:.0e}"
    elif not relative <= RESIDUAL_LIMIT:
        failed = f"residual {relative:.1e} > {RESIDUAL_LIMIT:.0e}"
    elif over:
        failed = f"residual over gap {over:.1e} > {UNRESOLVED:.0e}"
    elif not proven():
        failed = f"completeness ({proof})"
    return Verdict(orthogonality, relative, angle_bound, proof, failed)


def defects(weight: Weight, block: Block) -> tuple[Tensor, Tensor]:
    """``M V − U Σ`` (k, s), and ``max(‖M v − σ u‖, ‖Mᵀ u − σ v‖)`` of each triplet (s,), absolute."""
    short, long = weight.both_products(block)
    short -= block.short * block.sigma
    long -= block.long * block.sigma
    return short, torch.maximum(torch.linalg.vector_norm(short, dim=0), torch.linalg.vector_norm(long, dim=0))


def departure(block: Block) -> Tensor:
    """``max(|UᵀU − I|, |VᵀV − I|)``, the largest entry of each matrix (…)."""
    identity = torch.eye(block.sigma.shape[-1], dtype=torch.float64, device=block.sigma.device)
    return torch.stack([(side.mT @ side - identity).abs().amax((-2, -1)) for side in (block.short, block.long)]).amax(0)


def complete(weight: Weight, candidate: Candidate) -> bool:
    """Whether nothing smaller than the minor block, and nothing larger than the principal one, was missed."""
    minor, principal, spectrum = candidate.minor, candidate.principal, candidate.spectrum
    rank, scale = minor.sigma.shape[0], candidate.sigma_max
    slack = 4 * weight.rounding * scale**2
    if candidate.apply_inverse is None and spectrum is not None:
        # Singular values of the weight itself, each good to a small multiple of ε σ_max.
        tolerance = NOISE * EPSILON * scale
        found = bool(((minor.sigma - spectrum[:rank]).abs() <= tolerance).all())
        if principal is not None:
            found &= bool(((principal.sigma - spectrum.flip(0)[: principal.sigma.shape[0]]).abs() <= tolerance).all())
        return found
    last = minor.sigma[-1].item()
    gap = 0.0 if candidate.sigma_next is None else candidate.sigma_next - last
    square_gap = gap * (2 * last + gap)
    if not shown(gap, last, slack, scale):
        return False
    if spectrum is not None:
        found = bool(((minor.sigma**2 - spectrum[:rank] ** 2).abs() <= slack).all())
        if principal is not None:
            found &= bool(((principal.sigma**2 - spectrum.flip(0)[: principal.sigma.shape[0]] ** 2).abs() <= slack).all())
        return found
    gram = candidate.gram
    if gram is None:
        return False
    if principal is not None and not _none_larger(gram, principal, slack):
        return False
    return _none_smaller(gram, minor, square_gap, slack)


def shown(gap: float, last: float, slack: float, scale: float) -> bool:
    """False where the weight defines the boundary above σ_R = ``last``, but its Gram matrix cannot show it.

    Only a method that does not square may say then.
    """
    return not (gap * UNRESOLVED > NOISE * EPSILON * scale and gap * (2 * last + gap) <= slack)


def _none_smaller(gram: Tensor, block: Block, square_gap: float, slack: float) -> bool:
    """One Cholesky proves it: ``G − τ I + c U Uᵀ`` positive definite ⇒ at most R eigenvalues of G lie below τ (Weyl).

    τ is the middle of the gap at R where that is resolved, so that the gap itself is proven; else just below σ_R². Overwrites ``gram``.
    """
    edge = block.sigma[-1].item() ** 2
    threshold = edge + square_gap / 2 if square_gap > 2 * slack else edge - slack
    lift = 2 * abs(threshold) + gram.diagonal().mean().item()
    gram.addmm_(block.short * lift, block.short.mT)
    gram.diagonal().sub_(threshold)
    return factorise(gram)


def _none_larger(gram: Tensor, block: Block, slack: float) -> bool:
    """The mirror image for the principal block: ``τ I − G + c U Uᵀ`` positive definite, τ just above σ_p²."""
    threshold = block.sigma[-1].item() ** 2 + slack
    flipped = gram.neg()
    flipped.addmm_(block.short * (2 * block.sigma[0].item() ** 2), block.short.mT)
    flipped.diagonal().add_(threshold)
    return factorise(flipped)


def residual_check(weight: Tensor, left: Tensor, right: Tensor | None, sigma: Tensor) -> float:
    """How well stored triplets fit a weight: the largest column of ``‖W v − σ u‖`` and ``‖Wᵀ u − σ v‖``, over ‖W‖_F.

    ``weight`` (out, in), ``left`` (R, out), ``right`` (R, in) or None, ``sigma`` (R,): any floating dtype, as a bank
    stores them. Without right vectors ``‖W Wᵀ u − σ² u‖ / ‖W‖_F²`` takes their place. A weight of zeros gives the largest σ.
    """
    if weight.element_size() == 1:  # torch has no arithmetic for float8
        weight = weight.to(torch.float32)
    u, s = left.to(torch.float64).mT, sigma.to(torch.float64)
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) or 1.0
    tall = weight.shape[0] > weight.shape[1]
    view = Weight(weight.mT if tall else weight)
    image = view.times(u) if tall else view.transposed_times(u)
    if right is None:
        back = view.transposed_times(image) if tall else view.times(image)
        return _largest_column(back - u * s**2) / norm**2
    v = right.to(torch.float64).mT
    forward = view.transposed_times(v) if tall else view.times(v)
    return max(_largest_column(forward - u * s), _largest_column(image - v * s)) / norm


def _largest_column(columns: Tensor) -> float:
    return float(torch.linalg.vector_norm(columns, dim=0).max())
