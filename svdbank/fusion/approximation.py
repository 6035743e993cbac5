"""The best matrix of rank r of a difference.

For ``D = W' − W`` the best rank-r matrix in the Frobenius norm is its principal part (Eckart and Young 1936). It is found from the
eigenvectors of the Gram matrix of D's short side in float64. Squaring costs accuracy at the small end of the spectrum only; how far the
result is from the best is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

#: σ relative to the largest below which a direction is the rounding of float32 factors, and is left out.
_ROUNDING = 2.0**-24


@dataclass(frozen=True)
class BestFactors:
    """``A`` (k, in) and ``B`` (out, k), float32, of equal column and row norms; ``sigma`` (k,) float64 descending.

    ``energy`` is ``‖D‖²``, ``kept`` what is in the factors, ``best`` an upper bound on what any matrix of that rank could hold.
    """

    A: Tensor
    B: Tensor
    sigma: Tensor
    energy: float
    kept: float
    best: float


def best_factors(D: Tensor, rank: int) -> BestFactors:
    """The best approximation of ``D`` (out, in; float64, not zero) of rank ``rank`` or the rank of D, if that is less.

    ``best``: the ``rank`` largest eigenvalues of the computed Gram matrix, plus what its rounding can hide of each (Weyl): entries of a
    product of length n are off by at most ``n·eps·‖row‖·‖column‖``, the matrix by at most ``n·eps·‖D‖²``.
    """
    turned = D.shape[0] > D.shape[1]
    M = D.mT if turned else D  # (k, n), k ≤ n
    values, vectors = torch.linalg.eigh(M @ M.mT)
    values, vectors = values.flip(0)[:rank].clamp_min(0), vectors.flip(1)[:, :rank]
    count = max(1, int((values > (_ROUNDING**2) * values[0]).sum()))
    Q = vectors[:, :count]
    # M ≈ Q Qᵀ M; the SVD of the thin part gives singular values to full accuracy.
    U, sigma, Vh = torch.linalg.svd(Q.mT @ M, full_matrices=False)
    root = sigma.sqrt()
    short, long = ((Q @ U) * root).float(), (root[:, None] * Vh).float()
    energy = float(torch.linalg.vector_norm(M)) ** 2
    hidden = rank * M.shape[1] * torch.finfo(torch.float64).eps * energy
    best = min(energy, float(values.sum()) + hidden)
    A, B = (short.mT, long.mT) if turned else (long, short)
    # ‖D‖² − ‖D − B A‖², so that the rounding of the factors counts.
    lost = float(torch.linalg.vector_norm(D - B.double() @ A.double())) ** 2
    return BestFactors(A.contiguous(), B.contiguous(), sigma, energy, energy - lost, best)
