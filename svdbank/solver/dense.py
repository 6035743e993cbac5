"""Dense path: all eigenvalues of the float64 Gram matrix, then Rayleigh–Ritz with the weight at the ends that are wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.basis import EPSILON
from svdbank.solver.contract import LAPACK_LIMIT, Block, Candidate, Failure
from svdbank.solver.gram import gram
from svdbank.solver.ritz import rayleigh_ritz


def solve_dense(matrix: Tensor, rank: int, principal: int) -> Candidate | Failure:
    """Minor (and principal) triplets of ``matrix`` (k, n) from ``eigh(M Mᵀ)``."""
    k = matrix.shape[0]
    if 2 * k * k + 6 * k + 1 > LAPACK_LIMIT:
        return Failure(f"k = {k} exceeds LAPACK's 32-bit workspace for syevd")
    eigenvalues, vectors = torch.linalg.eigh(gram(matrix))  # ascending
    sigma_max = eigenvalues[-1].clamp_min(0).sqrt().item()
    if eigenvalues[0].item() <= k * EPSILON * eigenvalues[-1].item():
        return Failure("the Gram matrix is singular to working precision")
    minor = rayleigh_ritz(matrix, vectors[:, :rank])
    top = None
    if principal:
        raised = rayleigh_ritz(matrix, vectors[:, k - principal :])
        top = Block(raised.short.flip(1), raised.long.flip(1), raised.sigma.flip(0))
        sigma_max = top.sigma[0].item()
    spectrum = eigenvalues.clamp_min(0).sqrt()
    following = spectrum[rank].item() if rank < k else None
    return Candidate(minor, top, following, minor.sigma[0].item(), sigma_max, spectrum, None)
