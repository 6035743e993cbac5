"""Dense path: all eigenvalues of the float64 Gram matrix, then Rayleigh–Ritz with the weight at the ends that are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.solver.contract import LAPACK_LIMIT, Candidate, Failure
from svdbank.solver.ritz import buffer_size, rayleigh_ritz
from svdbank.solver.weight import Weight


def solve_dense(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
    """Minor (and principal) triplets of the (k, n) weight from ``eigh(M Mᵀ)``."""
    k = weight.k
    if 2 * k * k + 6 * k + 1 > LAPACK_LIMIT:
        return Failure(f"k = {k} exceeds LAPACK's 32-bit workspace for syevd")
    eigenvalues, vectors = torch.linalg.eigh(weight.gram())  # ascending
    eigenvalues = eigenvalues.clamp_min(0)
    sigma_max = eigenvalues[-1].sqrt().item()
    size = rank + buffer_size(k, rank)

    def apply_inverse(columns: Tensor) -> Tensor:
        # Only directions outside the projected space: inside it there is nothing left to correct.
        rest: Tensor = vectors[:, size:]
        scaled: Tensor = (rest.mT @ columns) / (eigenvalues[size:, None] + weight.rounding * eigenvalues[-1])
        return rest @ scaled

    wide = rayleigh_ritz(weight, vectors[:, :size])
    minor = wide.first(rank)
    top = None
    if principal:
        size = principal + buffer_size(k, principal)
        top = rayleigh_ritz(weight, vectors[:, k - size :]).flipped().first(principal)
        sigma_max = top.sigma[0].item()
    spectrum = eigenvalues.sqrt()
    # From the projection where it holds one more vector: the square root of an eigenvalue of G has lost κ.
    following = wide.sigma[rank].item() if rank < k else None
    return Candidate(minor, top, following, minor.sigma[0].item(), sigma_max, spectrum, None, apply_inverse)
