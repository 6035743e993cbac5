"""Paths that decompose in full.

``dense``: all eigenvalues of the float64 Gram matrix, then Rayleigh–Ritz with the weight at the ends that are wanted. ``lq`` and ``svd``,
for ill-conditioned and rank-deficient weights, never square the condition number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.solver.contract import LAPACK_LIMIT, Block, Candidate, Failure, LinAlgError
from svdbank.solver.ritz import rayleigh_ritz
from svdbank.solver.sizes import buffer_size
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


def solve_lq(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
    """``Mᵀ = Q F`` (Householder), then the SVD of the k × k factor ``Fᵀ``: backward stable, whatever κ is."""
    k = weight.k
    if 4 * k * k + 7 * k > LAPACK_LIMIT:
        return Failure(f"k = {k} exceeds LAPACK's 32-bit workspace for gesdd")
    orthonormal, factor = torch.linalg.qr(weight.matrix.to(torch.float64).mT)  # (n, k), (k, k)
    short, sigma, inner, notes = decompose(factor.mT)  # Fᵀ = short Σ inner
    return _ends(short, sigma, inner.mT, rank, principal, orthonormal, notes)


def solve_svd(weight: Weight, rank: int, principal: int) -> Candidate | Failure:
    """The reduced SVD of the whole weight in float64, the method of last resort."""
    k = weight.k
    if 4 * k * k + 7 * k > LAPACK_LIMIT:
        return Failure(f"k = {k} exceeds LAPACK's 32-bit workspace for gesdd")
    short, sigma, long, notes = decompose(weight.matrix.to(torch.float64))
    return _ends(short, sigma, long.mT, rank, principal, None, notes)


def decompose(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
    """Reduced SVD ``(U, σ, Vᵀ)`` with what had to be got round: where the driver does not converge, it is given the transpose.

    LAPACK's divide and conquer fails on rare matrices (a CPU has no other driver in torch); the transpose takes another way through it.
    On CUDA ``gesvd`` is asked for: Jacobi's method, the default, leaves four times its error, more than the gates allow where
    singular values repeat.
    """
    options = {"driver": "gesvd"} if matrix.is_cuda else {}
    try:
        return (*torch.linalg.svd(matrix, full_matrices=False, **options), ())
    except LinAlgError as error:
        long, sigma, short = torch.linalg.svd(matrix.mT.contiguous(), full_matrices=False, **options)
        return short.mT, sigma, long.mT, (f"svd driver: {error}; solved the transpose",)


def _ends(
    short: Tensor, sigma: Tensor, long: Tensor, rank: int, principal: int, frame: Tensor | None, notes: tuple[str, ...]
) -> Candidate:
    """Both ends of a full decomposition with σ descending; ``frame`` maps ``long`` back to n dimensions."""

    def block(columns: Tensor) -> Block:
        chosen = long[:, columns]
        return Block(short[:, columns], chosen if frame is None else frame @ chosen, sigma[columns])

    k = sigma.shape[0]
    minor = block(torch.arange(k - 1, k - 1 - rank, -1, device=sigma.device))
    top = block(torch.arange(principal, device=sigma.device)) if principal else None
    following = sigma[k - 1 - rank].item() if rank < k else None
    return Candidate(minor, top, following, sigma[-1].item(), sigma[0].item(), sigma.flip(0), None, None, notes)
