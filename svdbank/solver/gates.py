"""The gates every result passes before anyone sees it, and the figures that its certificate records."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdbank.basis import EPSILON, UNRESOLVED
from svdbank.solver.cholesky import factorise
from svdbank.solver.contract import Block, Candidate
from svdbank.solver.ritz import refined
from svdbank.solver.weight import Weight

#: Largest residual let through, relative to σ_max. Backward-stable solves lie below 1e-12; the rest is room for κ near 1e7.
RESIDUAL_LIMIT = 1e-10
#: Largest entry of UᵀU − I let through. Householder factors reach about 1e-14; a lost vector shows as 1.
ORTHOGONALITY_LIMIT = 1e-11
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
    # σ_1 … σ_R, σ_{R+1}: Wedin's bound at every rank, because every prefix is served as a basis of its own.
    ladder = candidate.minor.sigma
    if candidate.sigma_next is not None:
        ladder = torch.cat([ladder, ladder.new_tensor([candidate.sigma_next])])
    gaps = ladder.diff()
    allowed = torch.clamp(gaps * UNRESOLVED, min=NOISE * EPSILON * scale)
    for attempt in range(REFINEMENTS + 1):
        defect, columns = defects(weight, candidate.minor)
        prefix = columns.cummax(0).values[: gaps.shape[0]]
        good = columns.max().item() <= GOOD_RESIDUAL * scale and bool((prefix <= allowed).all())
        if good or attempt == REFINEMENTS or candidate.apply_inverse is None:
            break
        candidate = replace(candidate, minor=refined(weight, candidate.minor, defect, candidate.apply_inverse))
    minor, principal = candidate.minor, candidate.principal
    worst = columns.max().item()
    if principal is not None:
        worst = max(worst, defects(weight, principal)[1].max().item())
    orthogonality = max(departure(block) for block in ([minor] if principal is None else [minor, principal]))
    relative = worst / scale
    angle_bound = None
    if candidate.sigma_next is not None and gaps[-1].item() > 0:
        angle_bound = columns.max().item() / gaps[-1].item()
    proof = "cholesky" if candidate.spectrum is None else "spectrum"

    failed = None
    # Comparisons are written so that NaN fails them.
    if not orthogonality <= ORTHOGONALITY_LIMIT:
        failed = f"orthogonality {orthogonality:.1e} > {ORTHOGONALITY_LIMIT:.0e}"
    elif not relative <= RESIDUAL_LIMIT:
        failed = f"residual {relative:.1e} > {RESIDUAL_LIMIT:.0e}"
    elif not bool((prefix <= allowed).all()):
        failed = f"residual over gap {(prefix / gaps)[prefix > allowed].max().item():.1e} > {UNRESOLVED:.0e}"
    elif not complete(weight, candidate):
        failed = f"completeness ({proof})"
    return candidate, Verdict(orthogonality, relative, angle_bound, proof, failed)


def defects(weight: Weight, block: Block) -> tuple[Tensor, Tensor]:
    """``M V − U Σ`` (k, s), and ``max(‖M v − σ u‖, ‖Mᵀ u − σ v‖)`` of each triplet (s,), absolute."""
    short, long = weight.both_products(block)
    short -= block.short * block.sigma
    long -= block.long * block.sigma
    return short, torch.maximum(torch.linalg.vector_norm(short, dim=0), torch.linalg.vector_norm(long, dim=0))


def departure(block: Block) -> float:
    """``max(|UᵀU − I|, |VᵀV − I|)``, largest entry."""
    identity = torch.eye(block.sigma.shape[0], dtype=torch.float64, device=block.sigma.device)
    return max(float((side.mT @ side - identity).abs().max()) for side in (block.short, block.long))


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
    gap = 0.0 if candidate.sigma_next is None else candidate.sigma_next - minor.sigma[-1].item()
    square_gap = gap * (2 * minor.sigma[-1].item() + gap)
    if gap * UNRESOLVED > NOISE * EPSILON * scale and square_gap <= slack:
        return False  # the weight defines this boundary, its Gram matrix cannot show it: only a method that does not square may say
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
