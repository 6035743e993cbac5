"""The gates every result passes before anyone sees it, and the figures that its certificate records."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from svdbank.basis import EPSILON, UNRESOLVED
from svdbank.solver.contract import Block, Candidate
from svdbank.solver.gram import product, transposed_product

#: Largest residual let through, relative to σ_max. Backward-stable solves lie below 1e-12; the rest is room for κ near 1e7.
RESIDUAL_LIMIT = 1e-10
#: Largest entry of UᵀU − I let through. Householder factors reach about 1e-14; a lost vector shows as 1.
ORTHOGONALITY_LIMIT = 1e-11


@dataclass(frozen=True)
class Verdict:
    """Figures of one candidate; ``failed`` names the first gate that it did not pass."""

    orthogonality: float
    residual: float
    angle_bound: float | None
    completeness: str
    failed: str | None


def judge(matrix: Tensor, candidate: Candidate) -> Verdict:
    """Measure ``candidate`` against ``matrix`` (k, n) in float64 and decide."""
    blocks = [candidate.minor] + ([candidate.principal] if candidate.principal is not None else [])
    orthogonality = max(_departure(block) for block in blocks)
    scale = candidate.sigma_max
    absolute = residual(matrix, candidate.minor)
    relative = max([absolute] + [residual(matrix, block) for block in blocks[1:]]) / scale
    gap = None if candidate.sigma_next is None else candidate.sigma_next - candidate.minor.sigma[-1].item()
    angle_bound = absolute / gap if gap is not None and gap > 0 else None
    proof = "cholesky" if candidate.spectrum is None else "spectrum"

    failed = None
    # Comparisons are written so that NaN fails them.
    if not orthogonality <= ORTHOGONALITY_LIMIT:
        failed = f"orthogonality {orthogonality:.1e} > {ORTHOGONALITY_LIMIT:.0e}"
    elif not relative <= RESIDUAL_LIMIT:
        failed = f"residual {relative:.1e} > {RESIDUAL_LIMIT:.0e}"
    elif angle_bound is not None and gap is not None and not angle_bound <= max(UNRESOLVED, 1e4 * EPSILON * scale / gap):
        failed = f"angle bound {angle_bound:.1e} > {UNRESOLVED:.0e}"
    elif not complete(candidate):
        failed = f"completeness ({proof})"
    return Verdict(orthogonality, relative, angle_bound, proof, failed)


def residual(matrix: Tensor, block: Block) -> float:
    """``max(‖M V − U Σ‖, ‖Mᵀ U − V Σ‖)``, largest column norm, absolute."""
    sides = (
        product(matrix, block.long) - block.short * block.sigma,
        transposed_product(matrix, block.short) - block.long * block.sigma,
    )
    return max(_largest_column(side) for side in sides)


def complete(candidate: Candidate) -> bool:
    """Whether nothing smaller than the block was missed."""
    spectrum = candidate.spectrum
    if spectrum is None:
        return False
    rank = candidate.minor.sigma.shape[0]
    # The spectrum of a Gram matrix is good to c k ε σ_max² in σ²: compare squares.
    slack = 16 * spectrum.shape[0] * EPSILON * candidate.sigma_max**2
    return bool(((candidate.minor.sigma**2 - spectrum[:rank] ** 2).abs() <= slack).all())


def _largest_column(columns: Tensor) -> float:
    return float(torch.linalg.vector_norm(columns, dim=0).max())


def _departure(block: Block) -> float:
    """``max(|UᵀU − I|, |VᵀV − I|)``, largest entry."""
    identity = torch.eye(block.sigma.shape[0], dtype=torch.float64, device=block.sigma.device)
    return max((side.mT @ side - identity).abs().max().item() for side in (block.short, block.long))


def residual_check(weight: Tensor, left: Tensor, right: Tensor | None, sigma: Tensor) -> float:
    """How well stored triplets fit a weight: the largest column of ``‖W v − σ u‖`` and ``‖Wᵀ u − σ v‖``, over ‖W‖_F.

    ``weight`` (out, in), ``left`` (R, out), ``right`` (R, in) or None, ``sigma`` (R,): any floating dtype, as a bank
    stores them. Without right vectors ``‖W Wᵀ u − σ² u‖ / ‖W‖_F²`` takes their place. Zero weights give the largest σ.
    """
    u, s = left.to(torch.float64).mT, sigma.to(torch.float64)
    norm = float(torch.linalg.vector_norm(weight, dtype=torch.float64)) or 1.0
    image = transposed_product(weight, u)
    if right is None:
        gap = product(weight, image) - u * s**2
        return _largest_column(gap) / norm**2
    v = right.to(torch.float64).mT
    sides = (product(weight, v) - u * s, image - v * s)
    return max(_largest_column(side) for side in sides) / norm
