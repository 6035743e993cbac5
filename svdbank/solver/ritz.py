"""Rayleigh–Ritz with the weight itself."""

from __future__ import annotations

import torch
from torch import Tensor

from svdbank.solver.contract import Block
from svdbank.solver.gram import transposed_product


def rayleigh_ritz(matrix: Tensor, subspace: Tensor) -> Block:
    """Best triplets of M in the span of ``subspace`` (k, s), orthonormal columns; ascending.

    ``T = Mᵀ X``, thin QR ``T = Q F``, SVD of the s × s factor: ``T = V Σ Cᵀ``, ``U = X C``. It restores what
    squaring lost in σ and orders the vectors. V comes from T, never from ``Mᵀ U / σ``, which loses orthogonality for tiny σ.
    """
    orthonormal, factor = torch.linalg.qr(transposed_product(matrix, subspace))  # (n, s), (s, s)
    inner, sigma, outer = torch.linalg.svd(factor)
    ascending = torch.arange(sigma.shape[0] - 1, -1, -1, device=sigma.device)
    return Block(subspace @ outer.mH[:, ascending], orthonormal @ inner[:, ascending], sigma[ascending])
